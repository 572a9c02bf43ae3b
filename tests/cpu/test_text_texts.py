"""Prompt texts of a release: read as literals, checked against what was published, missing ones reported."""

import hashlib
from pathlib import Path

import pytest
from text_samples import encoding_source, sample_texts, tools_template

from dsv4.errors import CheckpointError, RequestError
from dsv4.text.chat import render_tools
from dsv4.text.template import fill
from dsv4.text.texts import MAX_SOURCE_BYTES, PromptTexts

NANO = Path(__file__).parents[2] / "dsv4" / "models" / "nano"


def read(source: str) -> PromptTexts:
    return PromptTexts.from_source(source, "encoding_dsv4.py")


def test_published_tool_template_can_be_rebuilt_from_the_vector_and_is_verified(tmp_path: Path) -> None:
    template = tools_template()
    assert len(template.encode()) == 1075
    assert hashlib.sha256(template.encode()).hexdigest().startswith("09b7269d")
    (tmp_path / "encoding").mkdir()
    (tmp_path / "encoding" / "encoding_dsv4.py").write_text(encoding_source(TOOLS_TEMPLATE=template), encoding="utf-8")
    texts = PromptTexts.from_folder(tmp_path)
    assert texts.tools == template
    assert texts.verified == {"TOOLS_TEMPLATE": True}
    assert read(encoding_source(TOOLS_TEMPLATE=template + " ")).verified == {"TOOLS_TEMPLATE": False}


def test_published_tool_template_renders_to_the_published_digest() -> None:
    rendered = str(render_tools([{"function": {"name": "@@"}}], sample_texts())).replace('{"name": "@@"}', "@@")
    assert (len(rendered), len(rendered.encode())) == (955, 991)
    assert hashlib.sha256(rendered.encode()).hexdigest().startswith("15edbf86")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("TOOLS_TEMPLATE = 'a' 'b'", "ab"),
        ("TOOLS_TEMPLATE = (\n  'a'\n  'b\\n'\n)", "ab\n"),
        ('TOOLS_TEMPLATE = """x\ny "z"\n"""', 'x\ny "z"\n'),
        ("TOOLS_TEMPLATE: str = 'a' + 'b' + r'\\n'", "ab\\n"),
        ("mark = '｜DSML｜'\nTOOLS_TEMPLATE = f'<{mark}calls>' + mark", "<｜DSML｜calls>｜DSML｜"),
        ("TOOLS_TEMPLATE = 'first'\nTOOLS_TEMPLATE = 'second'", "second"),
        ("other = TOOLS_TEMPLATE = 'both'", "both"),
        ("TOOLS_TEMPLATE = 'kept'\nif True:\n    TOOLS_TEMPLATE = 'nested'", "kept"),
    ],
)
def test_literals_are_read_as_python_would(source: str, expected: str) -> None:
    assert read(source).tools == expected


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("TOOLS_TEMPLATE = 'a'.strip()", "line 1: Call"),
        ("import os\nTOOLS_TEMPLATE = os.environ['X']", "line 2: Subscript"),
        ("TOOLS_TEMPLATE = f'{1 + 1}'", "line 1: Constant"),
        ("mark = 'x'\nTOOLS_TEMPLATE = f'{mark!r}'", "FormattedValue"),
        ("TOOLS_TEMPLATE = later\nlater = 'x'", "Name"),
        ("TOOLS_TEMPLATE = 5", "Constant"),
        ("TOOLS_TEMPLATE = {'a': 'b'}", "is a dict"),
        ("x = 1", "has no constant TOOLS_TEMPLATE"),
        ("TOOLS_TEMPLATE = " + "+".join(["'a'"] * 1500), "nested too deeply"),
    ],
)
def test_what_is_not_a_literal_is_named_when_a_request_needs_it(source: str, found: str) -> None:
    with pytest.raises(RequestError, match=found):
        read(source).require_tools()


def test_the_file_is_never_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    write = f"open({str(trap)!r}, 'w')"
    source = f"TOOLS_TEMPLATE = 'fine'\n{write}\nresponse_format_template = {write}.name"
    assert read(source).tools == "fine"
    assert not trap.exists()


def test_files_that_are_no_python_are_checkpoint_errors(tmp_path: Path) -> None:
    path = tmp_path / "encoding" / "encoding_dsv4.py"
    path.parent.mkdir()
    for content, found in ((b"TOOLS_TEMPLATE = (", "not a Python file"), (b"\xff\xfe", "UTF-8"), (b"x=1\0", "Python")):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=found):
            PromptTexts.from_folder(tmp_path)
    path.write_bytes(b"#" * (MAX_SOURCE_BYTES + 1))
    with pytest.raises(CheckpointError, match="bytes"):
        PromptTexts.from_folder(tmp_path)


def test_a_folder_without_texts_fails_only_the_requests_that_need_them(tmp_path: Path) -> None:
    texts = PromptTexts.from_folder(tmp_path)
    assert texts.effort_preamble(None) == texts.effort_preamble("high") == ""
    for need in (texts.require_tools, texts.require_response_format, lambda: texts.effort_preamble("max")):
        with pytest.raises(RequestError, match=r"lacks: there is no file .*encoding_dsv4\.py"):
            need()


def test_effort_levels_of_the_first_releases() -> None:
    texts = read(encoding_source(REASONING_EFFORT_MAX="M"))
    assert [texts.effort_preamble(level) for level in (None, "high", "max")] == ["", "", "M"]
    with pytest.raises(RequestError, match="low"):
        texts.effort_preamble("low")
    names = ("minimal", "low", "medium", "high", "xhigh", "max", "ultra", "none", None)
    assert [texts.effort_level(name) for name in names] == ["high"] * 5 + ["max"] * 2 + [None] * 2
    with pytest.raises(RequestError, match="hgih"):
        texts.effort_level("hgih")


def test_effort_levels_of_the_later_releases() -> None:
    levels = "{'low': '', 'high': ('H' 'h'), 'max': 'M'.upper()}"
    texts = read(f"REASONING_EFFORT_PROMPTS: dict = {levels}\nDEFAULT_REASONING_EFFORT = 'low'")
    assert [texts.effort_preamble(level) for level in (None, "low", "high")] == ["", "", "Hh"]
    assert [texts.effort_level(name) for name in ("minimal", "low", "medium", "xhigh", "ultra")] == [
        "low",
        "low",
        "high",
        "high",
        "max",
    ]
    with pytest.raises(RequestError, match=r"REASONING_EFFORT_PROMPTS\[max\] is not a string literal"):
        texts.effort_preamble("max")


def test_nano_ships_short_texts_of_its_own() -> None:
    texts = PromptTexts.from_folder(NANO)
    assert texts.tools is not None and len(texts.tools) < 400
    assert set(texts.verified.values()) == {False} and not texts.problems
    for placeholder in ("dsml_token", "thinking_start_token", "thinking_end_token", "tool_schemas"):
        assert "{" + placeholder + "}" in texts.tools
    assert "{schema}" in texts.require_response_format() and texts.effort_preamble("max")


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{schema.__class__}", "placeholder"),
        ("{schema[0]}", "placeholder"),
        ("{schema!r}", "placeholder"),
        ("{schema:>99999999}", "placeholder"),
        ("{}", "placeholder"),
        ("{other}{schema}", "other"),
        ("no field", "no placeholder {schema}"),
        ("{schema", "not a template"),
    ],
)
def test_templates_cannot_do_more_than_fill_in(template: str, found: str) -> None:
    with pytest.raises(CheckpointError, match=found):
        fill(template, "response_format_template", {}, {"schema": "{}"})


def test_values_are_not_templates() -> None:
    assert str(fill("{{{schema}}}", "t", {}, {"schema": "{dsml_token}"})) == "{{dsml_token}}"
