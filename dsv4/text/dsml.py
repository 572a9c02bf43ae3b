"""The grammar of a DSML tool-call block, as a scanner that takes its text in pieces.

    <｜DSML｜tool_calls>
    <｜DSML｜invoke name="NAME">
    <｜DSML｜parameter name="KEY" string="true|false">VALUE</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜tool_calls>

Inside a value only the closing parameter tag has a meaning. What the scanner concludes depends on the text alone, not
on how it was cut into pieces.
"""

import json
import re
from typing import Literal, NoReturn

from dsv4.text.tokens import DSML

BLOCK_OPEN, BLOCK_CLOSE = f"<{DSML}tool_calls>", f"</{DSML}tool_calls>"
CALL_OPEN, CALL_CLOSE = f"<{DSML}invoke", f"</{DSML}invoke>"
PARAM_OPEN, PARAM_CLOSE = f"<{DSML}parameter", f"</{DSML}parameter>"

_CALL_HEAD = re.compile(r'\s+name="([^"\n]+)">')
_CALL_HEAD_BEGUN = re.compile(r'\s*(?:n?|na|nam|name=?|name="[^"\n]*"?)\Z')
_PARAM = re.compile(r'\s+name="(.*?)" string="(true|false)">(.*)', re.DOTALL)
_SPACE = re.compile(r"\s*")


class BlockScanner:
    """Reads one block, from its opening tag on.

    feed(text)   may be called repeatedly while state is "open"
    state        "open" (more text may complete it), "done", or "malformed"
    calls        [(name, arguments as the JSON text of an object)]; meaningful once done
    problem      what broke the grammar
    taken()      text of the block, once done; once malformed, text up to the fault
    rest()       text after that
    strict       accept only the line breaks the official encoder writes and refuse a non-string value that is not JSON
                 (otherwise any white space between tags, and such a value is taken as a string)
    """

    def __init__(self, strict: bool = False) -> None:
        self.state: Literal["open", "done", "malformed"] = "open"
        self.calls: list[tuple[str, str]] = []
        self.problem = ""
        self._strict = strict
        self._text = ""
        self._at = 0  # everything before has been understood
        self._searched = 0  # no closing parameter tag starts before this
        self._next = self._block_open
        self._name = ""
        self._arguments: dict[str, str] = {}

    def feed(self, text: str) -> None:
        """Take more text and understand as much as it allows."""
        self._text += text
        try:
            while self.state == "open":
                self._next()
        except _More:
            pass
        except _Malformed as problem:
            self.state, self.problem = "malformed", str(problem)

    def taken(self) -> str:
        """Text that has been used up."""
        return self._text[: self._at]

    def rest(self) -> str:
        """Text behind what has been used up."""
        return self._text[self._at :]

    def _block_open(self) -> None:
        self._tag(BLOCK_OPEN)
        self._next = self._between_calls

    def _between_calls(self) -> None:
        if self._tag(CALL_OPEN, BLOCK_CLOSE, gap="\n") == BLOCK_CLOSE:
            self.state = "done"
        else:
            self._next = self._call_head

    def _call_head(self) -> None:
        head = _CALL_HEAD.match(self._text, self._at)
        if head is None:
            if _CALL_HEAD_BEGUN.match(self._text, self._at):
                raise _More
            raise _Malformed('expected name="…">')
        self._at, self._name, self._arguments = head.end(), head.group(1), {}
        self._next = self._first_parameter

    def _first_parameter(self) -> None:
        # A call without arguments is written with an empty line in their place.
        self._after_gap(self._tag(PARAM_OPEN, CALL_CLOSE, gap="\n", empty_line=True))

    def _between_parameters(self) -> None:
        self._after_gap(self._tag(PARAM_OPEN, CALL_CLOSE, gap="\n"))

    def _after_gap(self, tag: str) -> None:
        if tag == PARAM_OPEN:
            self._searched = self._at
            self._next = self._parameter
        else:
            pairs = [f"{json.dumps(key, ensure_ascii=False)}: {value}" for key, value in self._arguments.items()]
            self.calls.append((self._name, "{" + ", ".join(pairs) + "}"))
            self._next = self._between_calls

    def _parameter(self) -> None:
        close = self._text.find(PARAM_CLOSE, self._searched)
        if close < 0:
            self._searched = max(self._at, len(self._text) - len(PARAM_CLOSE) + 1)
            raise _More
        start, self._at = self._at, close + len(PARAM_CLOSE)
        found = _PARAM.fullmatch(self._text, start, close)
        if found is None:
            raise _Malformed('expected name="…" string="true|false">')
        key, is_string, value = found.groups()
        if key in self._arguments:
            raise _Malformed(f"parameter {key!r} occurs twice")
        self._arguments[key] = json.dumps(value, ensure_ascii=False) if is_string == "true" else self._json(key, value)
        self._next = self._between_parameters

    def _json(self, key: str, value: str) -> str:
        try:
            json.loads(value, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            if self._strict:
                raise _Malformed(f"parameter {key!r} is neither marked as a string nor JSON") from error
            return json.dumps(value, ensure_ascii=False)
        return value

    def _tag(self, *tags: str, gap: str = "", empty_line: bool = False) -> str:
        """Pass the white space and one of the tags, and return the tag; _More if either may still be incomplete."""
        space = _SPACE.match(self._text, self._at)
        assert space is not None
        at = space.end()
        for tag in tags:
            if self._text.startswith(tag, at):
                allowed = (gap, "\n\n") if empty_line and tag == CALL_CLOSE else (gap,)
                if self._strict and space.group() not in allowed:
                    raise _Malformed(f"expected a line break before {tag}")
                self._at = at + len(tag)
                return tag
        seen = self._text[at : at + max(map(len, tags))]
        if any(tag.startswith(seen) for tag in tags):
            raise _More
        raise _Malformed(f"expected {' or '.join(tags)}, found {seen!r}")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


class _More(Exception):
    """The text so far ends inside an element."""


class _Malformed(Exception):
    """No further text can make the block right."""
