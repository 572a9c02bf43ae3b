"""The literal prompt texts of a release, read from its encoding/encoding_dsv4.py as data: parsed, never executed.

Each release words its tool section, response-format section and effort preambles itself, so they ship with the
checkpoint and not with dsv4. Read are the module constants TOOLS_TEMPLATE, response_format_template and either
REASONING_EFFORT_MAX (first releases: "high" adds nothing, "max" adds that preamble) or REASONING_EFFORT_PROMPTS
(later ones: a dict of levels, with DEFAULT_REASONING_EFFORT).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dsv4.errors import CheckpointError, RequestError
from dsv4.text.constants import Constant, Unreadable, read_constants

ENCODING_FILE = Path("encoding") / "encoding_dsv4.py"
MAX_SOURCE_BYTES = 1 << 20

# sha256 prefixes of the texts DeepSeek published, by what they are called here.
OFFICIAL_SHA256 = {
    "TOOLS_TEMPLATE": ("09b7269d",),
    "response_format_template": ("012f31fc",),
    "REASONING_EFFORT_MAX": ("f7a24f3b",),
    "REASONING_EFFORT_PROMPTS[high]": ("f7a24f3b",),
    "REASONING_EFFORT_PROMPTS[max]": ("53fb31b8",),
}

# What API clients send, on to the nearest levels a release may have, best first.
_API_EFFORTS = {
    "none": (),
    "minimal": ("low", "high"),
    "low": ("low", "high"),
    "medium": ("high",),
    "high": ("high",),
    "xhigh": ("high",),
    "max": ("max",),
    "ultra": ("max",),
}


@dataclass(frozen=True)
class PromptTexts:
    """The texts of one checkpoint; a text it lacks is None and the request that needs it fails with a RequestError.

    tools            template with {tool_schemas}, {dsml_token}, {thinking_start_token}, {thinking_end_token}
    response_format  template with {schema}
    efforts          level -> preamble after BOS ("" adds nothing, None: the level exists, its text was not found)
    default_effort   level meant by reasoning_effort=None, or None for "no preamble"
    verified         text name -> True if it is the text DeepSeek published, False if it is another one
    problems         text name -> why it could not be read
    source           the file, for messages
    """

    tools: str | None = None
    response_format: str | None = None
    efforts: Mapping[str, str | None] = field(default_factory=lambda: {"high": "", "max": None})
    default_effort: str | None = None
    verified: Mapping[str, bool] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)
    source: str = "no checkpoint"

    @classmethod
    def from_folder(cls, folder: str | Path) -> "PromptTexts":
        """Read the texts of a checkpoint folder. A folder without the file gives texts that are all missing."""
        path = Path(folder) / ENCODING_FILE
        if not path.is_file():
            return cls(source=str(path), problems={"*": f"there is no file {path}"})
        if path.stat().st_size > MAX_SOURCE_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes, at most {MAX_SOURCE_BYTES} expected")
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}: not UTF-8 text ({error})") from error
        return cls.from_source(source, str(path))

    @classmethod
    def from_source(cls, source: str, name: str) -> "PromptTexts":
        """Read the texts from Python source text. Raises CheckpointError if it is not Python."""
        constants = read_constants(source, name)
        texts: dict[str, str] = {}
        problems: dict[str, str] = {}

        def take(key: str, value: Constant | None) -> str | None:
            if isinstance(value, str):
                texts[key] = value
                return value
            if isinstance(value, Unreadable):
                problems[key] = value.reason
            elif isinstance(value, dict):
                problems[key] = f"{key} is a dict, a string was expected"
            return None

        tools = take("TOOLS_TEMPLATE", constants.get("TOOLS_TEMPLATE"))
        response_format = take("response_format_template", constants.get("response_format_template"))
        levels = constants.get("REASONING_EFFORT_PROMPTS")
        default = constants.get("DEFAULT_REASONING_EFFORT")
        efforts: dict[str, str | None]
        if isinstance(levels, dict):
            efforts = {level: take(f"REASONING_EFFORT_PROMPTS[{level}]", text) for level, text in levels.items()}
        else:
            efforts = {"high": "", "max": take("REASONING_EFFORT_MAX", constants.get("REASONING_EFFORT_MAX"))}
        return cls(
            tools=tools,
            response_format=response_format,
            efforts=efforts,
            default_effort=default if isinstance(default, str) and default in efforts else None,
            verified=_verify(texts),
            problems=problems,
            source=name,
        )

    def require_tools(self) -> str:
        """The tools template; RequestError if the checkpoint lacks it."""
        return self._require(self.tools, "TOOLS_TEMPLATE", "tools")

    def require_response_format(self) -> str:
        """The response-format template; RequestError if the checkpoint lacks it."""
        return self._require(self.response_format, "response_format_template", "response_format")

    def effort_preamble(self, effort: str | None) -> str:
        """Preamble of a level of this release. RequestError for an unknown level or one whose text is missing."""
        level = effort or self.default_effort
        if level is None:
            return ""
        if level not in self.efforts:
            raise RequestError(f"reasoning_effort {level!r} is not one of this checkpoint's {sorted(self.efforts)}")
        entry = f"REASONING_EFFORT_PROMPTS[{level}]"
        name = entry if entry in self.problems else "REASONING_EFFORT_MAX"
        return self._require(self.efforts[level], name, f"reasoning_effort={level!r}")

    def effort_level(self, requested: str | None) -> str | None:
        """The level of this release nearest to what an API client asked for (minimal … ultra); None stays None.

        "none" gives None: switching thinking off is the caller's business. RequestError for an unknown name.
        """
        if requested is None or requested in self.efforts:
            return requested
        if requested not in _API_EFFORTS:
            raise RequestError(f"reasoning_effort {requested!r} is not known, use one of {list(_API_EFFORTS)}")
        return next((level for level in _API_EFFORTS[requested] if level in self.efforts), None)

    def describe(self) -> list[str]:
        """One line per text, for `dsv4 inspect`: published text, this checkpoint's own, or missing."""
        words = {True: "the published text", False: "not the published text"}
        lines = [f"{name}: {words[official]}" for name, official in self.verified.items()]
        return lines + [f"{name}: missing, {reason}" for name, reason in self.problems.items()]

    def _require(self, text: str | None, name: str, wanted_by: str) -> str:
        if text is not None:
            return text
        reason = self.problems.get(name) or self.problems.get("*") or f"{self.source} has no constant {name}"
        raise RequestError(f"{wanted_by} needs the prompt text {name}, which this checkpoint lacks: {reason}")


def _verify(texts: Mapping[str, str]) -> dict[str, bool]:
    """Compare every text that was published with its sha256."""
    return {
        name: hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest().startswith(OFFICIAL_SHA256[name])
        for name, text in texts.items()
        if name in OFFICIAL_SHA256
    }
