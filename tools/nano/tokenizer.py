"""Train nano's tokenizer: byte-level BPE with DeepSeek's pre-split (SPEC 5.1), except that every digit stands alone.

    python tools/nano/tokenizer.py --text .nano/corpus/train.jsonl --text .nano/synth/train.jsonl --out dsv4/models/nano

Writes tokenizer.json and tokenizer_config.json. Special tokens come first: bos 0, eos 1, pad 2.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from shape import CONFIG
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
SPECIAL = [BOS, EOS, PAD, "<|EOT|>"]  # left out of decoded text; the rest is text that a parser must see
MARKS = [
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    "｜DSML｜",
    "<｜latest_reminder｜>",
    "<｜fim▁hole｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁end｜>",
    "<｜action｜>",
    "<｜query｜>",
    "<｜authority｜>",
    "<｜domain｜>",
    "<｜title｜>",
    "<｜extracted_url｜>",
    "<｜read_url｜>",
]
WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def lines(paths: list[Path], sample: int) -> Iterator[str]:
    """The texts, every `sample`-th document of the synthetic files left in (they repeat themselves)."""
    for path in paths:
        for i, line in enumerate(path.read_text().splitlines()):
            if "synth" not in str(path) or i % sample == 0:
                yield json.loads(line)["text"]


def train(texts: Iterator[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.Split(Regex("[一-龥\u3040-ゟ゠-ヿ]+"), "isolated"),
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokens = [AddedToken(t, normalized=False, special=True) for t in SPECIAL] + [
        AddedToken(t, normalized=False, special=False) for t in MARKS
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=int(CONFIG["vocab_size"]),
        special_tokens=tokens,
        show_progress=False,
        max_token_length=16,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = train(lines(args.text, 8))
    tokenizer.save(str(args.out / "tokenizer.json"), pretty=False)
    added = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": added | {"content": BOS},
        "eos_token": added | {"content": EOS},
        "pad_token": added | {"content": PAD},
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (args.out / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    for text in (
        "def read(self, path):\n    return 123",
        "Perché no? 日本語 🙂",
        "<｜User｜>Hi<｜Assistant｜></think>",
    ):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if tokenizer.decode(ids, skip_special_tokens=False) != text:
            raise SystemExit(f"does not round-trip: {text!r}")
    print(f"{tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
