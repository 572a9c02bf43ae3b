"""What a rank of the tests of several GPUs does: `python tp_ranks.py N FOLDER`, started by run_ranks."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import load_file, save_file

import dsv4
from dsv4.kernels.gather_columns.gather_columns import gather_columns
from dsv4.kernels.mhc_last.mhc_last import mhc_last
from dsv4.kernels.mhc_seam.mhc_seam import mhc_seam
from dsv4.layers.mhc import peers_of
from dsv4.layers.vocabulary import shares_of
from dsv4.parallel.mesh import Experts, Mesh, join

EXPERTS: tuple[Experts, ...] = get_args(Experts)
PROMPTS = ["def read(self, path):\n", "import os\n\n\nclass Cache:\n", "try:\n    import json\nexcept"]
WIDTH, LAYERS, VOCAB = 4096, 43, 129280


def greedy(model: dsv4.model.Model) -> list[list[int]]:
    """Text of the captured step, prompts included."""
    params = dsv4.SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    with dsv4.LLM(model, max_num_seqs=4) as llm:
        return [[*out.prompt_token_ids, *out.outputs[0].token_ids] for out in llm.generate(PROMPTS, params)]


def partial(mesh: Mesh, rows: int, turn: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * turn + rank)
    return torch.randn(rows, WIDTH, generator=generator).to(mesh.device)


def captured_sums(mesh: Mesh, rows: int) -> dict[str, Any]:
    """A graph of as many all-reduces as a step has, each fed by the one before it; replayed with other inputs."""
    x = partial(mesh, rows, 0, mesh.rank)

    def step() -> torch.Tensor:
        total = mesh.all_reduce(x.clone(), torch.float32)
        for _ in range(2 * LAYERS - 1):
            total = mesh.all_reduce(total / mesh.size, torch.float32)
        return total.bfloat16()

    eager = step().clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    worst, same = 0.0, True
    for turn in range(20):
        x.copy_(partial(mesh, rows, turn, mesh.rank))
        graph.replay()
        parts = [partial(mesh, rows, turn, rank).double() for rank in range(mesh.size)]
        true = torch.stack(parts).sum(0)
        worst = max(worst, float((out.double() - true).abs().max() / true.abs().max()))
        same &= turn > 0 or torch.equal(out, eager)
    return {"worst": worst, "replay_equals_eager": same, "bits": out.flatten()[:4096].view(torch.int16).sum().item()}


def captured_seams(mesh: Mesh, rows: int) -> dict[str, Any]:
    """A graph of as many seams as a step has, each fed by the one before it, and of leaving the last site, against
    all-reduces and the ops apart."""
    generator = torch.Generator().manual_seed(rows)
    shapes = (rows, 4), (rows, 4, 4), (24, 4 * WIDTH), (24,), (24,), (WIDTH,)
    post, comb, fn, base, scale, weight = (torch.rand(s, generator=generator).to(mesh.device) for s in shapes)
    site = (fn - 0.5) / WIDTH**0.5, base, scale, weight
    streams = torch.randn(rows, 4, WIDTH, generator=generator).bfloat16().to(mesh.device)
    y, how = partial(mesh, rows, 0, mesh.rank), {"sinkhorn_iters": 20, "hc_eps": 1e-6, "norm_eps": 1e-6}
    ends, peers = {"hc_eps": 1e-6, "norm_eps": 1e-6}, peers_of(mesh)
    assert peers is not None

    def step(together: bool) -> tuple[torch.Tensor, ...]:
        given, found = y, (streams, None, post, comb / 4)
        for _ in range(2 * LAYERS):
            before = found[0], *found[2:], *site
            if together:
                found = mhc_seam(given, *before, **how, peers=peers)
            else:
                found = mhc_seam(mesh.all_reduce(given.clone(), torch.bfloat16), *before, **how)
            given = found[1].float() * (mesh.rank + 1)
        last = found[0], *found[2:], fn[:4] / WIDTH**0.5, base[:4], scale[:1]
        if together:
            return *found, *mhc_last(given, *last, **ends, peers=peers)
        return *found, *mhc_last(mesh.all_reduce(given.clone(), torch.bfloat16), *last, **ends)

    step(together=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(together=True)
    same = True
    for turn in range(10):
        y.copy_(partial(mesh, rows, turn, mesh.rank))
        graph.replay()
        same &= all(torch.equal(a, b) for a, b in zip(out, step(together=False), strict=True))
    return {"replay_equals_apart": same, "bits": out[1].flatten()[:4096].view(torch.int16).sum().item()}


def captured_gather(mesh: Mesh, rows: int, *, in_words: bool) -> bool:
    share = VOCAB // mesh.size
    peers = shares_of(mesh, share)
    assert peers is not None

    def gather() -> None:
        if in_words:
            gather_columns(x, peers, out=out)
        else:
            mesh.all_gather(x, out)

    x, out = torch.zeros(rows, share, device=mesh.device), torch.zeros(rows, VOCAB, device=mesh.device)
    gather()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gather()
    right = True
    for turn in range(20):
        x.fill_(turn + 100 * mesh.rank)
        graph.replay()
        expected = torch.arange(mesh.size, device=mesh.device).repeat_interleave(share) * 100 + turn
        right &= torch.equal(out, expected.float().expand(rows, -1))
    return right


def sums_apart(mesh: Mesh, rows: int) -> bool:
    """Whether what is added up apart has the bits of what every rank adds up by itself."""
    x = partial(mesh, rows, 0, mesh.rank)
    dtypes = torch.float32, torch.bfloat16
    return all(torch.equal(mesh.comm.add_apart(x.clone(), t), mesh.comm.add(x.clone()).to(t)) for t in dtypes)


def main(size: int, folder: Path) -> None:
    mesh = join(size, "cuda")
    facts: dict[str, Any] = {
        "sums": {rows: captured_sums(mesh, rows) for rows in (1, 3, 64, 300)},
        "seams": {rows: captured_seams(mesh, rows) for rows in (1, 2, 3, 5, 8, 9, 17, 64, 65, 128)},
        "apart": [sums_apart(mesh, rows) for rows in (1, 3, 64, 256)],
        "gathers": [
            *(captured_gather(mesh, rows, in_words=False) for rows in (1, 64, 300)),
            *(captured_gather(mesh, rows, in_words=True) for rows in (1, 8, 64, 3, 128)),
        ],
    }
    text, logits = load_file(folder / "text.safetensors"), {}
    facts["tokens"] = {}
    for experts in EXPERTS:
        model = dsv4.load("nano", tp=replace(mesh, experts=experts))
        logits |= {f"{experts} {name}": model.logits(ids, prefill=48).cpu() for name, ids in text.items()}
        facts["tokens"][experts] = greedy(model)
    save_file(logits, folder / f"{mesh.rank}.safetensors")
    (folder / f"{mesh.rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
