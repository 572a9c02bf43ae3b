"""The forms a prompt may take, brought to one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsv4.errors import RequestError
from dsv4.text.tokenizer import Tokenizer

PromptLike = str | Sequence[int] | Mapping[str, Any]
_FORMS = 'a string, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}'


class Prompt(NamedTuple):
    """A prompt ready to run. `text` is None when token ids were given."""

    text: str | None
    token_ids: list[int]


def find_tokenizer(folder: Path | None) -> Tokenizer | None:
    """The tokenizer of a checkpoint folder; None if there is none, as for a model made from a seed."""
    has_one = folder is not None and (folder / "tokenizer.json").is_file()
    return Tokenizer.from_folder(folder) if folder is not None and has_one else None


def require_tokenizer(tokenizer: Tokenizer | None) -> Tokenizer:
    """RequestError for a model without a tokenizer."""
    if tokenizer is None:
        raise RequestError("this model has no tokenizer.json; it works with token ids alone")
    return tokenizer


def parse_prompts(prompts: PromptLike | Sequence[PromptLike], tokenizer: Tokenizer | None) -> list[Prompt]:
    """One prompt, or a list of them in any mixture of forms. A list whose first item is an integer is one prompt.

    Text is completed as it stands: control tokens typed in it count, and BOS goes before it unless it is there already.
    Token ids are taken as they are. RequestError says which prompt cannot be used and why.
    """
    single = isinstance(prompts, str | Mapping) or not isinstance(prompts, Sequence) or _is_ids(prompts)
    many: Sequence[Any] = [prompts] if single else prompts  # type: ignore[assignment]
    return [_parse(f"prompts[{i}]" if len(many) > 1 else "the prompt", p, tokenizer) for i, p in enumerate(many)]


def _is_ids(value: Any) -> bool:
    return bool(value) and isinstance(value[0], int)


def _parse(where: str, prompt: Any, tokenizer: Tokenizer | None) -> Prompt:
    if isinstance(prompt, Mapping):
        ids, text = prompt.get("prompt_token_ids"), prompt.get("prompt")
        if ids is not None:
            return Prompt(text if isinstance(text, str) else None, _ids(where, ids))
        if not isinstance(text, str):
            raise RequestError(f"{where} has neither prompt_token_ids nor a prompt text; give {_FORMS}")
        prompt = text
    if not isinstance(prompt, str):
        return Prompt(None, _ids(where, prompt))
    if tokenizer is None:
        raise RequestError(f"{where} is text, but this model has no tokenizer.json; give token ids instead")
    return Prompt(prompt, tokenizer.encode(prompt, add_bos=True, control=True))


def _ids(where: str, ids: Any) -> list[int]:
    if isinstance(ids, str | bytes) or not hasattr(ids, "__iter__"):
        raise RequestError(f"{where} is {type(ids).__name__}; give {_FORMS}")
    tokens = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if not all(isinstance(token, int) for token in tokens):
        raise RequestError(f"{where} holds something other than token ids; give {_FORMS}")
    return tokens
