"""transformers can write all experts of a layer as two tensors; this shows them as the official ones, one per expert.

`...experts.gate_up_proj` [E, 2F, D] holds w1 (rows 0..F) and w3 (rows F..2F), `...experts.down_proj` [E, D, F] w2.
"""

import re
from dataclasses import replace

from torch import Tensor

from dsv4.checkpoint.header import TensorEntry
from dsv4.checkpoint.reader import TensorSource
from dsv4.config import ModelConfig

_FUSED = re.compile(r"(?:model\.)?((?:layers|mtp)\.\d+)\.(?:mlp|ffn)\.experts\.(gate_up_proj|down_proj)")


class SplitExperts:
    """`source` with every fused expert tensor replaced by per-expert entries, which are views when read."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self.unknown = source.unknown or any(_FUSED.fullmatch(n) for n in source.unreadable if n not in source.entries)
        self.unreadable = source.unreadable
        self._slices: dict[str, tuple[str, int, slice]] = {}
        self.entries: dict[str, TensorEntry] = {}
        for name, entry in source.entries.items():
            match = _FUSED.fullmatch(name)
            # One of another rank stays as it is, and is then reported as a tensor that does not belong here.
            if match and len(entry.shape) == 3:
                self._split(entry, f"{match[1]}.ffn.experts", match[2])
            else:
                self.entries[name] = entry

    def config(self) -> ModelConfig:
        return self._source.config()

    def tensor(self, name: str) -> Tensor:
        if name not in self._slices:
            return self._source.tensor(name)
        fused, expert, rows = self._slices[name]
        return self._source.tensor(fused)[expert, rows]

    def _split(self, entry: TensorEntry, prefix: str, kind: str) -> None:
        experts, height, width = entry.shape
        half = height // 2
        parts = {"w2": (0, height)} if kind == "down_proj" else {"w1": (0, half), "w3": (half, height)}
        for expert in range(experts):
            for projection, (start, stop) in parts.items():
                name = f"{prefix}.{expert}.{projection}.weight"
                nbytes = entry.nbytes * (stop - start) // (experts * height) if height else 0
                self.entries[name] = replace(entry, name=name, shape=(stop - start, width), nbytes=nbytes)
                self._slices[name] = (entry.name, expert, slice(start, stop))
        if entry.name in self.unreadable:
            self.unreadable |= frozenset(name for name, (fused, _, _) in self._slices.items() if fused == entry.name)
