"""Documents that cannot rot: marked README blocks run; commands, options and make targets named anywhere exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from dsv4.cli import app

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
BLOCK = re.compile(r"^```(?P<language>sh|python) test\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE)
TRANSCRIPT = re.compile(r"^```console test\n(.*?)^```$", re.DOTALL | re.MULTILINE)
README_BLOCKS = [(match["language"], match["body"]) for match in BLOCK.finditer((ROOT / "README.md").read_text())]


def code(text: str) -> list[str]:
    """Single lines of code in a Markdown text: `spans` and the lines of fenced or indented blocks."""
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose)
    indented = re.findall(r"^ {4}(\S.*)$", prose, flags=re.MULTILINE)
    return [*spans, *(line.removeprefix("$ ") for block in fenced for line in block.splitlines()), *indented]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Every `dsv4 NAME ... --option` in the code of a text, as (name, options); NAME is two words for a group's."""
    groups = "|".join(
        name for name, command in typer.main.get_command(app).commands.items() if hasattr(command, "commands")
    )
    start = rf"(?:\w+=\S* )*(?:\S*/)?dsv4 ((?:{groups}) [a-z][\w-]*|[a-z][\w-]*)(.*)"
    calls = [re.match(start, line) for line in code(text)]
    return [(call[1], re.findall(r"(?<=\s)--?[a-z][\w-]*", call[2].split(" #")[0])) for call in calls if call]


def known_commands() -> dict[str, set[str]]:
    """Name of every command of the program -> the options it takes."""
    found = dict(typer.main.get_command(app).commands)
    for name, group in list(found.items()):
        found |= {f"{name} {inner}": command for inner, command in getattr(group, "commands", {}).items()}
    return {
        name: {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for name, command in found.items()
    }


def unknown(text: str) -> list[str]:
    known = known_commands()
    findings = [f"dsv4 {name}" for name, _ in commands(text) if name not in known]
    findings += [
        f"dsv4 {name} {option}"
        for name, options in commands(text)
        for option in options
        if option not in known.get(name, {option}) | {"--help"}
    ]
    return findings


def test_the_readme_has_blocks_to_run() -> None:
    assert {language for language, _ in README_BLOCKS} == {"sh", "python"}


def run(command: list[str], folder: Path) -> str:
    """stdout of a command that must succeed; the environment's commands come first on PATH, the repository is far."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, f"{command[-1]}\n--- exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize(("language", "body"), README_BLOCKS, ids=[f"{i}" for i in range(len(README_BLOCKS))])
def test_a_marked_block_of_the_readme_runs(language: str, body: str, tmp_path: Path) -> None:
    command = ["bash", "-euo", "pipefail", "-c", body] if language == "sh" else [sys.executable, "-c", body]
    assert run(command, tmp_path).strip(), f"{body}\n--- printed nothing"


def transcript() -> list[tuple[str, str]]:
    """The commands of the README's transcript, each with what it is shown to print on stdout."""
    found = TRANSCRIPT.search((ROOT / "README.md").read_text())
    assert found, "the README shows no transcript"
    steps = re.split(r"^\$ ", found[1], flags=re.MULTILINE)[1:]
    return [(command, output) for command, _, output in (step.partition("\n") for step in steps)]


@pytest.mark.parametrize("step", range(len(transcript())))
def test_the_transcript_of_the_readme_is_real(step: int, tmp_path: Path) -> None:
    """Greedy answers that the embedded model is sure of, so that another processor's rounding does not change them."""
    command, shown = transcript()[step]
    assert run(["bash", "-euo", "pipefail", "-c", command], tmp_path) == shown


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_prose_exist(document: Path) -> None:
    assert not unknown(document.read_text()), "commands or options that the program does not have"


def test_a_dead_command_is_found() -> None:
    assert unknown("Try `dsv4 fly --high` and `dsv4 generate --no-such-option`.") == [
        "dsv4 fly",
        "dsv4 generate --no-such-option",
    ]


def test_make_targets_in_prose_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {
        (document.name, match[1])
        for document in DOCUMENTS
        for line in code(document.read_text())
        if (match := re.match(r"make ([a-z-]+)", line))
    }
    assert named, "no document names a make target"
    assert {(document, target) for document, target in named if target not in targets} == set()
