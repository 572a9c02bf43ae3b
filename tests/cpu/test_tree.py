"""The rules the tree obeys: import direction, op folders, forbidden calls, no machine paths, no dead references."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dsv4"

# What each part of dsv4 may import from dsv4, besides itself. A part is a file or folder directly under dsv4/.
BASE = {"errors"}
NUMBERS = BASE | {"config", "quant"}
MODEL = NUMBERS | {"kernels", "kvcache", "layers", "checkpoint", "parallel"}
ENGINE = MODEL | {"model", "text"}
EVERYTHING = ENGINE | {"engine", "bench", "testing", "dsv4"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "config": BASE,
    "quant": BASE,
    "text": BASE,
    "parallel": NUMBERS,
    "checkpoint": NUMBERS | {"parallel"},
    "testing": NUMBERS | {"checkpoint"},
    "kernels": NUMBERS,
    "kvcache": NUMBERS | {"kernels"},
    "layers": NUMBERS | {"kernels", "kvcache", "parallel"},
    "model": MODEL,
    "engine": ENGINE,
    "dsv4": ENGINE | {"engine"},  # dsv4/__init__.py: the public names
    "bench": EVERYTHING,
    "server": EVERYTHING,
    "cli": EVERYTHING | {"server"},
    "__main__": {"cli"},
}
# A twin computes with torch and dsv4.quant; from the standard library it may take the names of types.
TWIN_STDLIB = {"__future__", "collections", "typing"}
FORBIDDEN_MODULES = {"transformers", "pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "torch.hub.load"}

# Written in pieces so that this file does not contain what it looks for.
MACHINE_PATHS = re.compile(r"(?<![\w.~-])/(?:" + "|".join(["work", "root", "home", "opt"]) + r")/\w")
REGISTRY_HOSTS = re.compile(r"\b(?:" + "|".join(["pypi", "pythonhosted", "npmjs", "debian"]) + r")\.(?:org|com)\b")
UNFINISHED = re.compile(r"\b(?:" + "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK"]) + r")\b")
NEVER_RUN = re.compile(r"pytest\.(?:mark\.(?:skip|skipif|xfail)|skip|xfail|importorskip)\b")


def tracked(*suffixes: str) -> list[Path]:
    """Files git knows and new ones it does not ignore, with one of these suffixes (all when none is given)."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    paths = sorted(ROOT / name for name in names if name)
    return [path for path in paths if path.is_file() and (not suffixes or path.suffix in suffixes)]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def package_files() -> list[Path]:
    return [path for path in tracked(".py") if path.is_relative_to(PACKAGE) and "models" not in path.parts]


def shipped_files() -> list[Path]:
    """The package without the tests that live beside the kernels."""
    return [path for path in package_files() if not path.name.startswith("test_")]


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every imported module as (line, absolute dotted name); `from dsv4 import x` gives `dsv4.x`."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def part_of(dotted: str) -> str | None:
    """dsv4.quant.nvfp4 -> quant; a public name of dsv4/__init__.py -> dsv4; anything outside -> None."""
    names = dotted.split(".")
    if names[0] != "dsv4":
        return None
    known = len(names) > 1 and (names[1] in MAY_IMPORT or (PACKAGE / names[1]).is_dir())
    return names[1] if known else "dsv4"


def own_part(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "dsv4" if first == "__init__" else first


def dotted_name(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted_name(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def listed(findings: list[str]) -> str:
    return "\n  " + "\n  ".join(findings)


def test_every_part_has_a_place_in_the_import_order() -> None:
    unknown = sorted({own_part(path) for path in package_files()} - MAY_IMPORT.keys())
    assert not unknown, f"give these parts of dsv4 a line in MAY_IMPORT: {unknown}"


def test_imports_point_one_way() -> None:
    findings = []
    for path in shipped_files():
        own = own_part(path)
        for line, name in imports(path):
            part = part_of(name)
            if part is not None and part != own and part not in MAY_IMPORT.get(own, set()):
                findings.append(f"{relative(path)}:{line} imports {name}; {own} may import {sorted(MAY_IMPORT[own])}")
    assert not findings, listed(findings)


def test_a_twin_imports_torch_and_quant_only() -> None:
    """Or other twins, which a fused op's twin composes, and what it is given: `operand.py`, `rows.py`, `phases.py`."""
    findings = []
    for path in shipped_files():
        if path.name.endswith("_ref.py"):
            for line, name in imports(path):
                module = name.split(".")[-2] if name.startswith("dsv4.kernels.") else ""
                twin = module.endswith("_ref") or module in {"operand", "rows", "phases"}
                outside = name.split(".")[0] in {"torch"} | TWIN_STDLIB
                if not (twin or outside or name.startswith("dsv4.quant.")):
                    findings.append(f"{relative(path)}:{line} imports {name}; a twin sees torch and dsv4.quant")
    assert not findings, listed(findings)


def op_folders() -> list[Path]:
    files = [path for path in package_files() if path.is_relative_to(PACKAGE / "kernels")]
    return sorted({path.parent for path in files} - {PACKAGE / "kernels"})


def test_there_are_ops() -> None:
    assert op_folders(), "dsv4/kernels holds no op folder: the two tests below would check nothing"


def test_an_op_folder_holds_one_stem() -> None:
    findings = []
    for folder in op_folders():
        op = folder.name
        findings += [
            f"{relative(folder)} lacks {name}"
            for name in (f"{op}.py", f"{op}_ref.py", f"test_{op}.py")
            if not (folder / name).is_file()
        ]
    assert not findings, listed(findings)


def test_an_op_says_its_contract() -> None:
    """<op>.py defines <op>, whose docstring states shapes in brackets, as in `x [T, D] bf16`."""
    findings = []
    for folder in op_folders():
        path = folder / f"{folder.name}.py"
        if not path.is_file():
            continue  # the test above says so
        functions = {node.name: node for node in parsed(path).body if isinstance(node, ast.FunctionDef)}
        op = functions.get(folder.name)
        if op is None:
            findings.append(f"{relative(path)} defines no function {folder.name}")
        elif not re.search(r"\[[\w\s,.*/+()-]*\]", ast.get_docstring(op) or ""):
            findings.append(f"{relative(path)}:{op.lineno} {folder.name} states no shape like [T, D] in its docstring")
    assert not findings, listed(findings)


def test_every_module_says_what_it_is() -> None:
    silent = [relative(path) for path in shipped_files() if parsed(path).body and not ast.get_docstring(parsed(path))]
    assert not silent, f"modules without a docstring: {listed(silent)}"


def test_nothing_loads_code_from_data() -> None:
    findings = []
    for path in shipped_files():
        findings += [
            f"{relative(path)}:{line} imports {name}"
            for line, name in imports(path)
            if name.split(".")[0] in FORBIDDEN_MODULES or name in FORBIDDEN_CALLS
        ]
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call):
                name = dotted_name(node.func)
                unsafe = any(keyword.arg in {"allow_pickle", "trust_remote_code"} for keyword in node.keywords)
                if name in FORBIDDEN_CALLS or unsafe:
                    findings.append(f"{relative(path)}:{node.lineno} calls {name}")
    assert not findings, listed(findings)


def text_files() -> Iterator[tuple[Path, str]]:
    for path in tracked():
        data = path.read_bytes()
        if b"\0" not in data:
            yield path, data.decode("utf-8")


@pytest.mark.parametrize("pattern", [MACHINE_PATHS, REGISTRY_HOSTS], ids=["path", "registry"])
def test_no_file_names_a_machine(pattern: re.Pattern[str]) -> None:
    findings = [
        f"{relative(path)}:{text.count(chr(10), 0, match.start()) + 1} contains {match.group()!r}"
        for path, text in text_files()
        for match in pattern.finditer(text)
    ]
    assert not findings, listed(findings)


def test_nothing_is_left_for_later() -> None:
    findings = [
        f"{relative(path)}:{number} {line.strip()}"
        for path in tracked(".py", ".cu", ".cuh", ".md")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if UNFINISHED.search(line)
    ]
    assert not findings, listed(findings)


def test_no_cpu_test_is_skipped() -> None:
    """On this machine everything the CPU suite names must run; tests that need a GPU live in their own folder."""
    findings = [
        f"{relative(path)}:{number} {line.strip()}"
        for path in tracked(".py")
        if path.is_relative_to(ROOT / "tests" / "cpu") and path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if NEVER_RUN.search(line)
    ]
    assert not findings, listed(findings)


# ---------------------------------------------------------------------------------------------- references in prose

PATH_SUFFIXES = (".py", ".md", ".cu", ".cuh", ".toml", ".txt", ".json", ".safetensors", "/")
PLACEHOLDER = re.compile(r"<[\w-]+>|\bX\b|\*")


def mentioned_paths(text: str) -> set[str]:
    """Paths in `backticks` and in [links](path) of a Markdown text, fenced blocks left out."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose)
    tops = tuple(f"{path.name}/" for path in ROOT.iterdir() if path.is_dir())
    found = {span for span in spans if re.fullmatch(r"[\w./<>*-]+", span)}
    found = {span for span in found if span.startswith(tops) or (span.endswith(PATH_SUFFIXES) and span[0] not in "<./")}
    links = {target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in target}
    return found | {link for link in links if link}


def exists(mention: str, document: Path) -> bool:
    """A path counts from the root, the package, the embedded model or the document's folder; <x>, X and * match any."""
    pattern = PLACEHOLDER.sub("*", mention).rstrip("/")
    bases = (ROOT, PACKAGE, PACKAGE / "models" / "nano", document.parent)
    return any(next(base.glob(pattern), None) is not None for base in bases)


def test_every_path_in_prose_exists() -> None:
    findings = [
        f"{relative(document)} names {mention}, which does not exist"
        for document in tracked(".md")
        for mention in sorted(mentioned_paths(document.read_text()))
        if not exists(mention, document)
    ]
    assert not findings, listed(findings)


def test_a_dead_path_is_found() -> None:
    text = "See `dsv4/no_such_file.py`, `quant/gone.py` and [this](docs/lost.md); not `amax/2688` or `x.scale`."
    paths = mentioned_paths(text)
    assert paths == {"dsv4/no_such_file.py", "quant/gone.py", "docs/lost.md"}
    assert not any(exists(path, ROOT / "README.md") for path in paths)
