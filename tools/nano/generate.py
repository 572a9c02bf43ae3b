"""Batched greedy or sampled continuation with the training model: the whole text again for every token, simple and
slow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from attention import W
from data import EOS
from fakequant import Quant
from model import Nano
from torch import Tensor


@torch.no_grad()
def last_logits(model: Nano, ids: Tensor, lengths: Tensor, quant: Quant, dtype: torch.dtype) -> Tensor:
    """Logits [B, V] after the first lengths[b] tokens of each row of ids [B, T]."""
    h, _ = model.streams(F.pad(ids, (0, -ids.shape[1] % W)), quant, True, dtype)
    row = h[torch.arange(len(ids), device=ids.device), lengths - 1].unsqueeze(1)
    return model.logits(model.norm(model.hc_head(row)), quant)[:, 0]


@torch.no_grad()
def generate(
    model: Nano,
    prompts: list[list[int]],
    new_tokens: int,
    quant: Quant,
    dtype: torch.dtype,
    temperature: float = 0.0,
    seed: int = 0,
    rows: int = 64,
) -> list[list[int]]:
    """The continuation of each prompt, without its EOS."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    out: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for at in range(0, len(order), rows):
        part = order[at : at + rows]
        lengths = torch.tensor([len(prompts[i]) for i in part], device=device)
        ids = torch.full((len(part), int(lengths.max()) + new_tokens), EOS, dtype=torch.long)
        for r, i in enumerate(part):
            ids[r, : len(prompts[i])] = torch.tensor(prompts[i])
        ids = ids.to(device)
        going = torch.ones(len(part), dtype=torch.bool, device=device)
        while bool(going.any()) and int(lengths.max()) < ids.shape[1]:
            used = -(-int(lengths.max()) // W) * W
            logits = last_logits(model, ids[:, :used], lengths, quant, dtype).float().cpu()
            if temperature:
                token = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)[:, 0]
            else:
                token = logits.argmax(-1)
            token = token.to(device)
            going &= token != EOS
            ids[going, lengths[going]] = token[going]
            lengths = lengths + going
        for r, i in enumerate(part):
            out[i] = ids[r, len(prompts[i]) : int(lengths[r])].tolist()
    return out
