"""What the tests of several ranks compute, in one process or, run as a script, as one of several."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import save_file

import dsv4
from dsv4.bench.record import recording
from dsv4.engine.step import DecodeStep
from dsv4.kernels.decode_layers.program import Unfit
from dsv4.parallel.mesh import Experts, Mesh, join

EXPERTS: tuple[Experts, ...] = get_args(Experts)

PROMPTS = [[5, 9, 2, 7, 30, 11], list(range(40, 75))]
EXACT: dict[str, Any] = {"dtype": "float32", "kv_quant": False, "index_quant": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "exact": EXACT,
    "nvfp4": EXACT | {"weights": "nvfp4"},
    "bfloat16": {"dtype": "bfloat16"},
}


def logits_of(model: dsv4.model.Model, seed: int) -> torch.Tensor:
    """Of chunks and of single tokens of one random text, float32 [T, V]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (60,), generator=generator)
    return model.logits(ids, prefill=48, chunk=20)


def tokens_of(model: dsv4.model.Model) -> list[list[int]]:
    """Greedy and sampled answers of a batch."""
    params = [dsv4.SamplingParams(temperature=t, max_tokens=20, ignore_eos=True) for t in (0.0, 1.0)]
    with dsv4.LLM(model, seed=3) as llm:
        return [out.outputs[0].token_ids for p in params for out in llm.generate(PROMPTS, p)]


def stepped(model: dsv4.model.Model) -> list[list[int]]:
    """Tokens of the step at fixed shapes that a GPU captures, two of three rows used."""
    cache = model.new_cache(3, 64)
    slots = [cache.acquire() for _ in range(2)]
    for slot in slots:
        cache.reserve([(slot, 8)])
    step, lines = DecodeStep(model, cache, 3), []
    step.stage(slots, [3, 4])
    for _ in range(4):
        step.run()
        lines.append(step.wait()[:2])
        for slot in slots:
            cache.advance(slot, 1)
    return lines


def measure(path: str, tp: Mesh | None = None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    logits, facts = {}, {}
    for name, settings in SETTINGS.items():
        model = dsv4.load(path, tp=tp, **settings)
        logits[name] = logits_of(model, 1)
        if name == "exact":
            facts = {"tokens": tokens_of(model), "stepped": stepped(model)}
    return logits, facts


def all_layers_at_once(model: dsv4.model.Model) -> str:
    """What is said against it."""
    try:
        DecodeStep(model, model.new_cache(1, 16), 1, persistent=True)
    except Unfit as error:
        return str(error)
    return ""


def sums(mesh: Mesh) -> bool:
    """Whether sums that are added up apart have the bits of the others."""
    x = torch.randn(6, 36, generator=torch.Generator().manual_seed(mesh.rank))
    dtypes = torch.float32, torch.bfloat16
    return all(torch.equal(mesh.comm.add_apart(x.clone(), t), mesh.all_reduce(x.clone(), t)) for t in dtypes)


def observed(model: dsv4.model.Model) -> torch.Tensor:
    """Streams and logits of one chunk, float32 [.., D]."""
    cache, seen = model.new_cache(1, 24), list[torch.Tensor]()
    slot = cache.acquire()
    model.forward([(slot, torch.arange(5, 29))], cache, observe=lambda _, x: seen.append(x.flatten()))
    return torch.cat(seen)


def by_rows(path: str, mesh: Mesh) -> tuple[dict[str, torch.Tensor], list[int]]:
    """As on GPUs with many rows: every rank takes its rows through the seams. Also how many rows those were given."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh.comm, "apart", lambda elements: True)
        model = dsv4.load(path, tp=mesh, **EXACT)
        with recording(lambda: True, {"mhc_pre", "mhc_seam", "mhc_post"}) as calls:
            found = {"rows logits": logits_of(model, 1), "rows observed": observed(model)}
    return found, [len(call.args[0]) for call in calls]


def main(size: int, path: str, folder: Path) -> None:
    torch.set_num_threads(1)
    mesh, logits, facts = join(size), {}, dict[str, Any]()
    for experts in EXPERTS:
        found, facts[experts] = measure(path, replace(mesh, experts=experts))
        logits |= {f"{experts} {name}": x for name, x in found.items()}
    facts["unfit"] = all_layers_at_once(dsv4.load(path, tp=replace(mesh, experts="ep")))
    facts["said"] = mesh.comm.tell("what the first says, \u00fc" if mesh.rank == 0 else "and no other")
    facts["sums"] = sums(mesh)
    found, facts["rows"] = by_rows(path, mesh)
    logits |= found
    save_file(logits, folder / f"{mesh.rank}.safetensors")
    (folder / f"{mesh.rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
