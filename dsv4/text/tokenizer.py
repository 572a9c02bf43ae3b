"""Text to ids and back, with control tokens under control: only trusted text can produce them.

Encoding runs on a copy of the tokenizer without its added tokens, so `<｜User｜>` typed by a user comes out as ordinary
text. Trusted text is cut at control tokens first; what lies between two of them is encoded in one go, whoever wrote it,
so a prompt without typed control tokens gets exactly the ids the plain tokenizer gives for the whole string.
"""

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer as Backend

from dsv4.errors import CheckpointError, RequestError
from dsv4.text.segments import Segment
from dsv4.text.tokens import BOS, EOS, MARKUP, PROMPT_TOKENS, REQUIRED

OnSurrogate = Literal["error", "replace"]


def _byte_alphabet() -> dict[str, int]:
    """Character of a byte-level vocabulary -> byte. Printable Latin-1 stands for itself, the rest starts at U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


class Tokenizer:
    """The tokenizer of a checkpoint (byte-level BPE of tokenizer.json).

    bos_id, eos_id   ids of the sentence tokens
    vocab_size       highest id + 1
    """

    def __init__(self, source: str, name: str = "tokenizer.json") -> None:
        """source: the JSON text of a tokenizer.json. Raises CheckpointError if it is not one this engine can use."""
        try:
            spec = json.loads(source)
            added = [entry for entry in spec.get("added_tokens") or () if entry["content"]]
            bare = dict(spec, added_tokens=[], post_processor=None, truncation=None, padding=None)
            self._plain = Backend.from_str(json.dumps(bare))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{name}: not a tokenizer.json the tokenizers library can read ({error})") from error
        self._source = source
        self._ids: dict[str, int] = {entry["content"]: entry["id"] for entry in added}
        self._hidden = {entry["id"] for entry in added if entry.get("special") and entry["content"] not in MARKUP}
        self._check(spec, added, name)
        self._cut = re.compile("|".join(map(re.escape, sorted({*self._ids, *PROMPT_TOKENS}, key=len, reverse=True))))
        self._control = {token_id: content.encode() for content, token_id in self._ids.items()}
        self._bytes: dict[int, bytes] = {}
        self.bos_id = self._ids[BOS]
        self.eos_id = self._ids[EOS]
        self.vocab_size = max(*self._ids.values(), *self._plain.get_vocab().values()) + 1

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read tokenizer.json of a checkpoint folder."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; a checkpoint folder holds the release's tokenizer.json")
        try:
            return cls(path.read_text(encoding="utf-8"), str(path))
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}: not UTF-8 text ({error})") from error

    def encode(
        self, text: str, *, add_bos: bool = False, control: bool = False, on_surrogate: OnSurrogate = "error"
    ) -> list[int]:
        """Ids of a text.

        add_bos        begin with BOS, unless the text already begins with the BOS token (never two)
        control        read control tokens typed in the text as control tokens; otherwise they are ordinary text
        on_surrogate   a lone surrogate, which UTF-8 cannot hold, is a RequestError or becomes U+FFFD
        """
        text = _clean(text, on_surrogate)
        ids = self._whole.encode(text, add_special_tokens=False).ids if control else self._encode_plain(text)
        return [self.bos_id, *ids] if add_bos and ids[:1] != [self.bos_id] else ids

    def encode_chat(
        self, segments: Iterable[Segment], *, official: bool = False, on_surrogate: OnSurrogate = "error"
    ) -> list[int]:
        """Ids of a prompt from encode_segments; nothing is added to it.

        official   encode the joined string as DeepSeek's own code does, so that control tokens typed by anyone count
        Raises RequestError if the prompt needs a control token that this tokenizer lacks.
        """
        if official:
            return self.encode("".join(text for text, _ in segments), control=True, on_surrogate=on_surrogate)
        ids: list[int] = []
        pending: list[str] = []
        for text, trusted in segments:
            at = 0
            for found in self._cut.finditer(text) if trusted else ():
                token_id = self.control_id(found.group())
                ids += self._encode_plain(_clean("".join([*pending, text[at : found.start()]]), on_surrogate))
                ids.append(token_id)
                pending, at = [], found.end()
            pending.append(text[at:])
        return ids + self._encode_plain(_clean("".join(pending), on_surrogate))

    def control_id(self, content: str) -> int:
        """Id of a control token, for example "</think>". RequestError if the tokenizer has no such token."""
        if content not in self._ids:
            raise RequestError(f"this checkpoint's tokenizer has no control token {content}")
        return self._ids[content]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD. Ids outside the vocabulary give nothing.

        skip_special   leave out tokens marked special; `<think>`, `</think>` and the DSML mark are always kept
        """
        return self.decode_bytes(ids, skip_special=skip_special).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = True) -> bytes:
        """Bytes of ids, exactly as they were produced; arguments as for decode."""
        return b"".join(self.token_bytes(i) for i in ids if not (skip_special and i in self._hidden))

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token; part of a UTF-8 character is possible. Empty for an id outside the vocabulary."""
        if token_id in self._control:
            return self._control[token_id]
        if token_id not in self._bytes:
            token = self._plain.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
            known = all(char in _BYTE_OF for char in token or "")
            self._bytes[token_id] = bytes(_BYTE_OF[c] for c in token or "") if known else (token or "").encode()
        return self._bytes[token_id]

    @cached_property
    def _whole(self) -> Backend:
        """The tokenizer as shipped, for encoding that reads typed control tokens as such."""
        whole = Backend.from_str(self._source)
        whole.no_truncation()
        whole.no_padding()
        return whole

    def _encode_plain(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids if text else []

    def _check(self, spec: Any, added: list[dict[str, Any]], name: str) -> None:
        problems = [f"no control token {token}" for token in REQUIRED if token not in self._ids]
        if (spec.get("decoder") or {}).get("type") != "ByteLevel":
            problems.append("the decoder is not ByteLevel")
        if spec.get("normalizer") not in (None, {"type": "Sequence", "normalizers": []}):
            problems.append("it has a normalizer, so decoding would not give the text back")
        unreachable = sum(self._plain.token_to_id(char) is None for char in _BYTE_OF)
        if unreachable:
            problems.append(f"{unreachable} of 256 bytes are not in the vocabulary")
        problems += [
            f"{entry['content']} takes neighbouring text with it ({flag})"
            for entry in added
            for flag in ("lstrip", "rstrip", "single_word")
            if entry.get(flag)
        ]
        if problems:
            raise CheckpointError(f"{name} is not a DeepSeek-V4 tokenizer: " + "; ".join(problems))


def _clean(text: str, on_surrogate: OnSurrogate) -> str:
    """Text that UTF-8 can hold. Surrogates that happen to form a pair become their character when replacing."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if on_surrogate == "replace":
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        found = f"U+{ord(text[error.start]):04X} at character {error.start}"
        raise RequestError(f"the text holds a lone surrogate, {found}, which is not Unicode text; remove it") from None
    return text
