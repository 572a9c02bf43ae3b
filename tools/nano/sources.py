"""Where the training text comes from: one reader per permissive source.

Every reader yields `(name, text)` pairs; `name` is the file's path inside its source, so that whole files can be held
out and
listed. Roots are found on the machine and can be given instead (`--root cpython=/path`). Licences: see NOTICE in the
model folder.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar

LICENCES = {
    "cpython": "PSF-2.0",
    "pydoc": "PSF-2.0",
    "numpy": "BSD-3-Clause",
    "scipy": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
    "networkx": "BSD-3-Clause",
    "node": "MIT",
    "cmake": "BSD-3-Clause",
    "rust": "MIT OR Apache-2.0",
}
SKIP_PYTHON = {
    "test",
    "tests",
    "idlelib",
    "encodings",
    "site-packages",
    "__pycache__",
    "_bundled",
    "pydoc_data",
    "_pyrepl",
    "lib2to3",
}
RUST_BOOKS = (
    "book",
    "reference",
    "rust-by-example",
    "cargo",
    "rustc",
    "nomicon",
    "edition-guide",
    "style-guide",
    "error_codes",
)
RUST_SKIP = {
    "zh",
    "ja",
    "es",
    "ko",
    "fr",
    "first-edition",
    "second-edition",
    "2018-edition",
}  # translations, pages that only point on


def default_roots() -> dict[str, Path]:
    """Folders of the sources on a machine that has pyenv, rustup, Debian's nodejs-doc and cmake-data; missing ones
    are left out."""
    home = Path.home()
    roots: dict[str, Path] = {}
    found = {
        "cpython": sorted(home.glob(".pyenv/versions/3.13.*/lib/python3.13")),
        "node": [Path("/usr/share/doc/nodejs/api")],
        "cmake": sorted(Path("/usr/share").glob("cmake-*/Help")),
        "rust": sorted(home.glob(".rustup/toolchains/nightly-*/share/doc/rust/html")),
    }
    for package in ("numpy", "scipy", "sympy", "networkx"):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin:
            found[package] = [Path(spec.origin).parent]
    for source, paths in found.items():
        if paths and paths[-1].is_dir():
            roots[source] = paths[-1]
    return roots


def read(source: str, root: Path) -> Iterator[tuple[str, str]]:
    """All documents of one source."""
    if source == "cpython":
        yield from python_files(root)
        yield from pydoc_topics(root)
    elif source in ("numpy", "scipy", "sympy", "networkx"):
        yield from docstrings(root)
    elif source == "node":
        yield from plain(root, "*.md")
    elif source == "cmake":
        yield from plain(root, "*.rst")
    elif source == "rust":
        for book in RUST_BOOKS:
            yield from html_pages(root, book)
    else:
        raise ValueError(f"unknown source {source!r}; known: {sorted(LICENCES)}")


def plain(root: Path, pattern: str) -> Iterator[tuple[str, str]]:
    for path in sorted(root.rglob(pattern)):
        yield str(path.relative_to(root)), path.read_text(encoding="utf-8", errors="ignore")


def python_files(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(root.rglob("*.py")):
        rel = path.relative_to(root)
        if not SKIP_PYTHON & set(rel.parts) and not rel.name.startswith("_sysconfig"):
            yield str(rel), path.read_text(encoding="utf-8", errors="ignore")


def pydoc_topics(root: Path) -> Iterator[tuple[str, str]]:
    tree = ast.parse((root / "pydoc_data" / "topics.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for topic, text in ast.literal_eval(node.value).items():
                yield f"pydoc_data/topics/{topic}", text


def docstrings(root: Path) -> Iterator[tuple[str, str]]:
    """One document per module: each long docstring under its signature, as it stands in a source file."""
    for path in sorted(root.rglob("*.py")):
        rel = path.relative_to(root)
        if {"tests", "testing", "_vendor", "f2py"} & set(rel.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
        except SyntaxError:
            continue
        parts = []
        for node in ast.walk(tree):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                continue
            text = ast.get_docstring(node)
            if text is None or len(text) < 200:
                continue
            body = "\n".join("    " + line if line else "" for line in text.splitlines()).strip()
            if isinstance(node, ast.FunctionDef):
                parts.append(f'def {node.name}({ast.unparse(node.args)}):\n    """{body}\n    """\n')
            elif isinstance(node, ast.ClassDef):
                parts.append(f'class {node.name}:\n    """{body}\n    """\n')
            else:
                parts.append(text + "\n")
        if parts:
            yield str(rel), "\n\n".join(parts)


def html_pages(root: Path, book: str) -> Iterator[tuple[str, str]]:
    for path in sorted((root / book).rglob("*.html")):
        rel = path.relative_to(root)
        if path.name in ("print.html", "toc.html", "404.html") or rel.parts[1] in RUST_SKIP:
            continue
        page = Page()
        page.feed(path.read_text(encoding="utf-8", errors="ignore"))
        yield str(rel), page.text()


class Page(HTMLParser):
    """The `<main>` part of an mdBook page as Markdown-like text; hidden code lines and the navigation are dropped."""

    HEADINGS: ClassVar = {f"h{i}": "#" * i + " " for i in range(1, 7)}

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.out: list[str] = []
        self.main = self.pre = self.hidden = 0
        self.spans: list[bool] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        classes = (dict(attrs).get("class") or "").split()
        if tag == "main":
            self.main += 1
        elif not self.main:
            return
        elif tag in self.HEADINGS:
            self.out.append("\n\n" + self.HEADINGS[tag])
        elif tag == "pre":
            self.pre += 1
            self.out.append("\n\n```")
        elif tag == "code" and self.pre:
            language = [c[9:] for c in classes if c.startswith("language-")]
            self.out.append((language[0].split(",")[0] if language else "") + "\n")
        elif tag == "code":
            self.out.append("`")
        elif tag in ("p", "ul", "ol", "table", "blockquote", "dl", "div"):
            self.out.append("\n\n" if not (self.out and self.out[-1] == "- ") else "")
        elif tag == "li":
            self.out.append("\n")
            self.out.append("- ")
        elif tag in ("tr", "dt", "dd"):
            self.out.append("\n")
        elif tag in ("td", "th"):
            self.out.append(" | ")
        elif tag in ("script", "style", "nav", "button"):
            self.hidden += 1
        elif tag == "span":
            self.spans.append("boring" in classes)
            self.hidden += self.spans[-1]

    def handle_endtag(self, tag: str) -> None:
        if tag == "main":
            self.main -= 1
        elif not self.main:
            return
        elif tag == "pre":
            self.pre -= 1
            self.out.append("```\n" if self.out and self.out[-1].endswith("\n") else "\n```\n")
        elif tag == "code" and not self.pre:
            self.out.append("`")
        elif tag in ("script", "style", "nav", "button"):
            self.hidden -= 1
        elif tag == "span" and self.spans:
            self.hidden -= self.spans.pop()

    def handle_data(self, data: str) -> None:
        if self.main and not self.hidden:
            if not self.pre and not data.strip() and "\n" in data:
                data = " " if self.out and self.out[-1][-1:] not in "\n " else ""
            self.out.append(data)

    def text(self) -> str:
        return "".join(self.out)
