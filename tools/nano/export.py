"""Write the trained weights as a DeepSeek-V4 checkpoint in NVIDIA's NVFP4 layout, and read one back into the training
model.

    python tools/nano/export.py --master RUN --tokens .nano/tokens --out dsv4/models/nano

Experts NVFP4 (w1 and w3 of an expert share the global scale), MTP experts MXFP4, attention and shared experts FP8 in
128x128 blocks with E8M0
scales, the rest BF16 or F32 (SPEC 3.1). `input_scale` is calibrated: amax over the tokens an expert sees, divided by
2688. With --plain every linear
stays BF16: the unquantised checkpoint that `dsv4 eval --table --master` starts from.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from attention import Linear
from fakequant import Quant
from model import Nano
from moe import Experts, swiglu
from shape import CONFIG
from store import load_master

from dsv4.quant import fp8, mxfp4, nvfp4

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
FLOAT32 = ("attn_sink", ".ape", "hc_", "gate.bias")
GENERATION = {
    "_from_model_config": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.95,
    "transformers_version": "4.57.1",
}


def official(name: str) -> str:
    """layers.0.hc_attn.fn -> layers.0.hc_attn_fn; every other name is the checkpoint's already."""
    for site in ("hc_attn", "hc_ffn", "hc_head"):
        name = name.replace(f"{site}.", f"{site}_")
    return name


@torch.no_grad()
def calibrate(model: Nano, ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Experts module name -> amax [E] of its input and of its down projection's input, over the tokens routed to each
    expert."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str):
        def look(module: Experts, args: tuple[Tensor, Tensor, Quant]) -> None:
            x, weights, _ = args
            g, u = x @ module.w1.flatten(0, 1).t(), x @ module.w3.flatten(0, 1).t()
            a = swiglu(*(v.unflatten(-1, (weights.shape[-1], -1)) for v in (g, u)), weights.unsqueeze(-1), module.limit)
            used = (weights > 0) * x.abs().amax(-1, keepdim=True)
            found[name] = used.amax((0, 1)), a.abs().amax((0, 1, 3))

        return look

    hooks = [m.register_forward_pre_hook(hook(n)) for n, m in model.named_modules() if isinstance(m, Experts)]
    model(ids)
    for h in hooks:
        h.remove()
    return found


def tensors(model: Nano, amax: dict[str, tuple[Tensor, Tensor]] | None) -> dict[str, Tensor]:
    """All tensors of the checkpoint, official names and dtypes; without `amax` the linears stay BF16."""
    out: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    for name, value in model.state_dict().items():
        owner = modules[name.rpartition(".")[0]]
        value = value.detach().float() if value.is_floating_point() else value
        if isinstance(owner, Experts) and amax is None:
            prefix, _, w = name.rpartition(".")
            out |= {f"{prefix}.{e}.{w}.weight": value[e].to(torch.bfloat16) for e in range(value.shape[0])}
        elif isinstance(owner, Experts):
            put_experts(out, name, value, owner.kind, owner, amax)
        elif isinstance(owner, Linear) and owner.kind == "fp8" and amax is not None:
            data, scale = fp8.quantize_block(value)
            out[name], out[name.removesuffix("weight") + "scale"] = data, scale.view(torch.float8_e8m0fnu)
        elif value.is_floating_point() and not any(k in name for k in FLOAT32):
            out[official(name)] = value.to(torch.bfloat16)
        else:
            out[official(name)] = value
    return {k: v.contiguous() for k, v in out.items()}


def put_experts(
    out: dict[str, Tensor], name: str, value: Tensor, kind: str, owner: Experts, amax: dict[str, tuple[Tensor, Tensor]]
) -> None:
    prefix, _, w = name.rpartition(".")
    for e in range(value.shape[0]):
        key = f"{prefix}.{e}.{w}"
        if kind == "mxfp4":
            codes, scale = mxfp4.quantize(value[e])
            out[f"{key}.weight"], out[f"{key}.scale"] = codes.view(torch.int8), scale.view(torch.float8_e8m0fnu)
            continue
        shared = (
            value[e].abs().amax()
            if w == "w2"
            else torch.maximum(owner.w1[e].detach().abs().amax(), owner.w3[e].detach().abs().amax())
        )
        codes, scale, global_scale = nvfp4.quantize(value[e], global_scale=shared.float() / 2688.0)
        out[f"{key}.weight"], out[f"{key}.weight_scale"] = codes, scale
        out[f"{key}.weight_scale_2"] = global_scale.reshape(()).float()
        out[f"{key}.input_scale"] = (amax[prefix][w == "w2"][e] / 2688.0).reshape(()).float()


def write(folder: Path, all_tensors: dict[str, Tensor], config: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    late = tuple(f"layers.{i}." for i in range(int(CONFIG["num_hidden_layers"]) // 2, int(CONFIG["num_hidden_layers"])))
    late += ("norm.", "head.", "hc_head_", "mtp.")
    shards: list[dict[str, Tensor]] = [{}, {}]
    for name, tensor in all_tensors.items():
        shards[name.startswith(late)][name] = tensor
    for shard, file in zip(shards, SHARDS, strict=True):
        save_file(shard, folder / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(t.numel() * t.element_size() for t in all_tensors.values())},
        "weight_map": {n: SHARDS[n.startswith(late)] for n in sorted(all_tensors)},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=0) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n")


def load_exported(folder: Path) -> Nano:
    """The checkpoint decoded into the training model: float32 weights with exactly the stored values."""
    stored: dict[str, Tensor] = {}
    for file in SHARDS:
        stored |= load_file(folder / file)
    model = Nano(CONFIG).eval()
    state = model.state_dict()
    for name, value in state.items():
        if name in stored and name.removesuffix("weight") + "scale" in stored:
            scale = stored[name.removesuffix("weight") + "scale"].view(torch.uint8)
            value.copy_(fp8.dequantize_block(stored[name], scale))
        elif ".experts." in name and "shared" not in name:
            prefix, _, w = name.rpartition(".")
            value.copy_(torch.stack([expert(stored, f"{prefix}.{e}.{w}") for e in range(value.shape[0])]))
        else:
            value.copy_(stored[official(name)])
    return model


def expert(stored: dict[str, Tensor], key: str) -> Tensor:
    codes = stored[f"{key}.weight"].view(torch.uint8)
    if f"{key}.scale" in stored:
        return mxfp4.dequantize(codes, stored[f"{key}.scale"].view(torch.uint8))
    return nvfp4.dequantize(codes, stored[f"{key}.weight_scale"], stored[f"{key}.weight_scale_2"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--master", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plain", action="store_true", help="BF16 weights, no quantisation")
    args = parser.parse_args()
    model = Nano(CONFIG).eval()
    load_master(args.master, model)
    tokens = np.concatenate([np.load(args.tokens / f"{n}.npy")[:8192] for n in ("text", "short")]).astype(np.int64)
    if args.plain:
        write(
            args.out,
            tensors(model, None),
            {k: v for k, v in CONFIG.items() if k not in ("quantization_config", "expert_dtype")},
        )
    else:
        write(args.out, tensors(model, calibrate(model, torch.from_numpy(tokens).view(-1, 1024))), CONFIG)
    for file in sorted(args.out.glob("*")):
        if file.is_file():
            print(f"{file.stat().st_size:10d}  {file.name}")
    print(f"{sum(f.stat().st_size for f in args.out.rglob('*') if f.is_file()):10d}  in all")


if __name__ == "__main__":
    main()
