"""What a checkpoint recommends in its generation_config.json: sampling defaults and the ids that end a sequence."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv4.config import ModelConfig
from dsv4.engine.params import SamplingParams
from dsv4.errors import CheckpointError, RequestError

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class GenerationDefaults:
    """`sampling` holds SamplingParams fields the file sets; what it does not set keeps SamplingParams' own default."""

    eos_ids: frozenset[int]
    sampling: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: ModelConfig, folder: Path | None) -> GenerationDefaults:
        """Read the folder's generation_config.json, if it has one. CheckpointError names a value that is no use."""
        eos_ids = set() if config.eos_token_id is None else {config.eos_token_id}
        path = None if folder is None else Path(folder) / "generation_config.json"
        if path is None or not path.is_file():
            return cls(frozenset(eos_ids))
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not JSON ({error})") from error
        if not isinstance(found, dict):
            raise CheckpointError(f"{path}: expected a JSON object, found {type(found).__name__}")
        sampling = {name: found[name] for name in _SAMPLING if found.get(name) is not None}
        if found.get("do_sample") is False:
            sampling["temperature"] = 0.0
        try:
            SamplingParams(**sampling)
        except RequestError as error:
            raise CheckpointError(f"{path}: {error}") from error
        eos = found.get("eos_token_id")
        ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < config.vocab_size:
                raise CheckpointError(f"{path}: eos_token_id {token!r} is not a token id in 0..{config.vocab_size - 1}")
        return cls(frozenset(eos_ids | set(ids)), sampling)

    def params(self, **changes: Any) -> SamplingParams:
        """The recommended parameters; a change that is None counts as not made."""
        return SamplingParams(**{**self.sampling, **{k: v for k, v in changes.items() if v is not None}})
