"""What the text tests share: the published vectors, the release's tool text cut out of one, a small tokenizer."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from dsv4.text.texts import PromptTexts
from dsv4.text.tokenizer import Tokenizer
from dsv4.text.tokens import BOS, EOS, PAD, PROMPT_TOKENS

WORDS = (
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DATA = Path(__file__).parent / "data" / "encoding"


def vector(number: int) -> tuple[list[dict[str, Any]], str]:
    """Messages and exact prompt of a published case."""
    case = json.loads((DATA / f"input_{number}.json").read_text(encoding="utf-8"))
    messages = case["messages"] if isinstance(case, dict) else case
    if isinstance(case, dict):
        messages[0]["tools"] = case["tools"]
    return messages, (DATA / f"output_{number}.txt").read_text(encoding="utf-8")


def tools_template() -> str:
    """The April 2026 TOOLS_TEMPLATE, turned back from its rendered form in case 1."""
    messages, prompt = vector(1)
    section = prompt[prompt.index("## Tools") : prompt.index("<｜User｜>")]
    schemas = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in messages[0]["tools"])
    for text, placeholder in (
        (schemas, "{tool_schemas}"),
        ("｜DSML｜", "{dsml_token}"),
        ("<think>", "{thinking_start_token}"),
        ("</think>", "{thinking_end_token}"),
    ):
        assert text in section
        section = section.replace(text, placeholder)
    return section


def encoding_source(**constants: object) -> str:
    """Source text of an encoding_dsv4.py that holds these constants as literals."""
    return "import json\n\n" + "\n".join(f"{name} = {value!r}" for name, value in constants.items()) + "\n"


@cache
def sample_texts() -> PromptTexts:
    """Texts of a first-generation release with the published tool template and short own texts for the rest."""
    source = encoding_source(
        TOOLS_TEMPLATE=tools_template(),
        REASONING_EFFORT_MAX="Think hard.\n\n",
        response_format_template="## Format\n{schema}",
    )
    return PromptTexts.from_source(source, "sample")


@cache
def tokenizer_source(special: bool = False) -> str:
    """A tokenizer.json in the manner of the release: byte-level BPE, some control tokens not flagged special, and a
    post-processor that adds BOS."""
    backend = Backend(BPE())
    backend.pre_tokenizer = Sequence(
        [
            Split(Regex(r"\p{N}{1,3}"), "isolated"),
            Split(Regex(r"[一-龥぀-ゟ゠-ヿ]+"), "isolated"),
            Split(
                Regex(WORDS),
                "isolated",
            ),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = ByteLevelDecoder()
    flagged = (BOS, EOS, PAD)
    trainer = BpeTrainer(
        vocab_size=600,
        special_tokens=[AddedToken(token, special=True) for token in flagged],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [vector(1)[1], vector(2)[1], Path(__file__).read_text(encoding="utf-8"), "a.\n\n## b\n\n<c> 你好 héllo 🙂"]
    backend.train_from_iterator(corpus, trainer)
    rest = dict.fromkeys(token for token in PROMPT_TOKENS if token not in flagged)
    backend.add_tokens([AddedToken(token, special=special, normalized=False) for token in rest])
    backend.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))])
    return backend.to_str()


@cache
def sample_tokenizer() -> Tokenizer:
    return Tokenizer(tokenizer_source())
