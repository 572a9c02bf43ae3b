"""A small model for every layout, a decoder of its files that shares nothing with dsv4, and ways to spoil them."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from oracle.files import Stored, linear_weight
from oracle.formats import decode_e2m1, decode_e4m3, unpack_nibbles
from safetensors.torch import load_file, save_file

from dsv4.config.releases import TINY

# One layer of each kind, the first with hash routing, and an MTP block; odd sizes as in random:tiny.
SMALL: dict[str, Any] = TINY | {
    "num_hidden_layers": 3,
    "num_hash_layers": 1,
    "compress_ratios": [0, 4, 16, 0],
    "n_routed_experts": 3,
    "num_experts_per_tok": 2,
}


# What transformers calls the modules (its rename table, read backwards).
RENAMES = [
    (r"^head", "lm_head"), (r"^embed\.", "model.embed_tokens."), (r"^norm", "model.norm"),
    (r"^hc_head_", "model.hc_head.hc_"), (r"^layers", "model.layers"),
    (r"\.attn\.indexer\.compressor\.norm", ".self_attn.compressor.indexer.kv_norm"),
    (r"\.attn\.indexer\.compressor\.", ".self_attn.compressor.indexer."),
    (r"\.attn\.indexer\.weights_proj", ".self_attn.compressor.indexer.scorer.weights_proj"),
    (r"\.attn\.indexer\.wq_b", ".self_attn.compressor.indexer.q_b_proj"),
    (r"\.attn\.compressor\.norm", ".self_attn.compressor.kv_norm"),
    (r"\.attn\.q_norm", ".self_attn.q_a_norm"), (r"\.attn\.", ".self_attn."), (r"\.ffn\.", ".mlp."),
    (r"attn_sink", "sinks"), (r"\.ape", ".position_bias"), (r"\.w(q_a|q_b|kv|o_a|o_b)\b", r".\1_proj"),
    (r"\.wgate", ".gate_proj"), (r"gate\.bias", "gate.e_score_correction_bias"),
    (r"\.attn_norm", ".input_layernorm"), (r"\.ffn_norm", ".post_attention_layernorm"),
    (r"\.hc_(attn|ffn)_", r".\1_hc."), (r"\.w1$", ".gate_proj"), (r"\.w2$", ".down_proj"), (r"\.w3$", ".up_proj"),
]  # fmt: skip


def transformers_name(name: str) -> str:
    if name.startswith("mtp."):
        return name
    for pattern, words in RENAMES:
        name = re.sub(pattern, words, name)
    return name


def decode(tensors: dict[str, Stored], module: str, naming: str) -> np.ndarray:
    """float64 [N, K] of one linear, from the definition of the layout its names show."""
    name = transformers_name(module) if naming == "compressed-tensors" else module
    name = name.removeprefix("model.")
    if f"{name}.weight_packed" in tensors:
        codes, factor = tensors[f"{name}.weight_packed"].raw, 1 / tensors[f"{name}.weight_global_scale"].floats()
    elif f"{name}.weight_scale_2" in tensors:
        codes, factor = tensors[f"{name}.weight"].raw, tensors[f"{name}.weight_scale_2"].floats()
    else:
        blocks = [s for s in ("weight_scale", "weight_scale_inv") if f"{name}.{s}" in tensors]
        if not blocks:
            return linear_weight(tensors, name)[1]
        weight, scale = tensors[f"{name}.weight"].floats(), tensors[f"{name}.{blocks[0]}"].floats()
        return weight * np.kron(scale, np.ones((128, 128)))[: weight.shape[0], : weight.shape[1]]
    values = decode_e2m1(unpack_nibbles(codes))
    return values * np.repeat(decode_e4m3(tensors[f"{name}.weight_scale"].raw), 16, axis=-1) * factor


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Applies `change` to the tensors of a checkpoint of one file."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def anonymous_bytes() -> int:
    """Private memory of this process, counted page by page (status only estimates); mapped files do not count."""
    match = re.search(r"Anonymous:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    assert match
    return int(match[1]) * 1024


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """[largest private memory seen inside the block], sampled a few hundred times a second."""
    peak, stop = [anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            peak[0] = max(peak[0], anonymous_bytes())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        peak[0] = max(peak[0], anonymous_bytes())
        stop.set()
        thread.join()


def memory_needed(first: str, then: str) -> int:
    """Bytes by which `then` raises the private memory of a fresh process; this one has freed memory to reuse.

    `first` does the same elsewhere: what is imported and allocated at first use is not what the work needs.
    """
    code = f"""
import ctypes
import torch
from checkpoint_files import anonymous_bytes, peak_memory
from dsv4.checkpoint import load_model_weights
from dsv4.checkpoint.quantize import quantize_checkpoint
torch.set_num_threads(1)
{first}
ctypes.CDLL(None).malloc_trim(0)  # small blocks that were freed go back too, or the work would lie in them unseen
before = anonymous_bytes()
with peak_memory() as peak:
    result = {then}
print(peak[0] - before)
"""
    # Every block over 64 KiB goes back to the system when it is freed: what stays is what is alive.
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)
