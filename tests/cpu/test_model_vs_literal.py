"""The model bit for bit against DeepSeek's script written out in torch float32, every quantiser on.

With rounding decisions in every layer only equal bits stay equal over whole sequences (docs/numerics.md), so the
twins follow that script's order of operations where a CPU shows it. Bits compare within one machine and process.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from oracle.literal import Literal
from oracle.writer import official_config, write_checkpoint

import dsv4

CASES = {
    "WCHC": (official_config([0, 4, 128, 4]), 300),
    "CWH": (official_config([4, 0, 128], head_dim=512, num_hash_layers=2), 257),
    "HC-short-window": (official_config([128, 4], sliding_window=8, index_topk=3), 140),
    "C-wide": (official_config([4], hidden_size=512, n_routed_experts=16, num_experts_per_tok=6), 77),
    "WC-all-visible": (official_config([0, 4], index_topk=64, num_hash_layers=0), 12),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [1, 2])
def test_prefill_and_decode_have_the_bits_of_the_script(tmp_path: Path, name: str, seed: int) -> None:
    config, length = CASES[name]
    folder = write_checkpoint(tmp_path, config, seed=seed)
    ids = np.random.default_rng(seed).integers(0, config["vocab_size"], length)
    model = dsv4.load(folder, dtype="float32", act="fp8", kv_quant=True, index_quant=True)
    for prefill in (length, 1 if length < 50 else length - 40):
        found = model.logits(ids, prefill=prefill)
        expected = Literal(folder, most=length + 3).logits(ids, prefill)
        differing = (found != expected).any(-1).nonzero().flatten().tolist()
        worst = float((found - expected).abs().max())
        assert torch.equal(found, expected), f"prefill {prefill}: tokens {differing[:8]} differ, by {worst:.1e} at most"
