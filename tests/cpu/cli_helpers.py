"""A small checkpoint with a tokenizer for tests of the command line, and a way to run commands in this process."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import pytest
from text_samples import encoding_source, sample_tokenizer, tokenizer_source

from dsv4.cli import main
from dsv4.config import ModelConfig
from dsv4.testing.checkpoints import Format, write_random_checkpoint


def write_model(folder: Path, format: Format = "modelopt", *, tokenizer: bool = True) -> Path:
    """random:tiny with the sample tokenizer's vocabulary."""
    t = sample_tokenizer()
    tiny = ModelConfig.from_name("random:tiny")
    config = dataclasses.replace(tiny, vocab_size=t.vocab_size, bos_token_id=t.bos_id, eos_token_id=t.eos_id)
    write_random_checkpoint(folder, config, format=format)
    if tokenizer:
        (folder / "tokenizer.json").write_text(tokenizer_source(), encoding="utf-8")
        (folder / "encoding").mkdir()
        texts = encoding_source(REASONING_EFFORT_MAX="Think hard.\n\n")
        (folder / "encoding" / "encoding_dsv4.py").write_text(texts, encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.0, "eos_token_id": t.eos_id}))
    return folder


class Done(NamedTuple):
    code: int
    out: str
    err: str


class Program:
    """`dsv4 ...` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]):
        self._capsys = capsys

    def __call__(self, *args: object) -> Done:
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in args])
        out, err = self._capsys.readouterr()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return Done(code or 0, out, err)
