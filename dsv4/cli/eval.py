"""`dsv4 eval`: perplexity and bits per byte of texts, under one setting or, as a table, under several."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv4.checkpoint.faults import Faults
from dsv4.checkpoint.load import open_source
from dsv4.checkpoint.reader import Checkpoint
from dsv4.cli.console import put, put_json
from dsv4.cli.groups import command
from dsv4.cli.options import LoadOptions, ModelOption
from dsv4.cli.perplexity import Score, encode_text, negative_log_likelihood, windows
from dsv4.cli.settings import NAMED, load_setting, parse_setting
from dsv4.engine.progress import progress_bar
from dsv4.engine.prompts import find_tokenizer, require_tokenizer
from dsv4.errors import RequestError
from dsv4.model import Model

DEFAULT_CONTEXT = 1024
Encoded = dict[str, tuple[list[int], int]]  # ids and bytes of the scored ones, by file
FROM_MASTER = ("bf16", "official")


@command
def evaluate(
    files: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, readable=True, help="UTF-8 texts.")],
    model: ModelOption,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens a prediction may see.", show_default="1024 or the model's")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens scored per window.", show_default="half the context")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Score so many tokens of each file.")] = None,
    control_tokens: Annotated[
        bool, typer.Option("--control-tokens", help="Read control tokens spelled in the files as such: transcripts.")
    ] = False,
    table: Annotated[bool, typer.Option("--table", help="Compare settings; print one Markdown table.")] = False,
    setting: Annotated[
        list[str], typer.Option(help="With --table: a row, by name or as key=value,...; may be repeated.")
    ] = list(NAMED),  # noqa: B006 - typer copies it
    master: Annotated[
        str | None, typer.Option(help="With --table: the unquantised checkpoint that bf16 and official start from.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    *,
    load: LoadOptions,
) -> None:
    """Score texts: nats per token, perplexity, bits per byte. Files are independent documents, each behind BOS.

    --table runs the same texts under several settings. Rows bf16 and official take their weights from --master if it
    is given; a weight that is stored in another format than the row's is rounded anew from what there is.
    """
    if table and load.tp > 1:
        raise RequestError(f"--table runs in one process, got --tp {load.tp}; leave one of them out")
    load.ranks()
    name, texts = model.resolve(), {str(path): _read(path) for path in files}
    source, _ = open_source(name, Faults())
    tokenizer = require_tokenizer(find_tokenizer(source.path if isinstance(source, Checkpoint) else None))
    encoded = {path: encode_text(tokenizer, text, limit, control=control_tokens) for path, text in texts.items()}
    if not table:
        scores = _score(load.load(name), encoded, context, stride)
        about = {"model": name, "settings": asdict(load)}
        _print_scores(about, scores) if not as_json else put_json({**about, **_document(scores)})
        return
    rows = []
    for text in setting:
        path = master if master is not None and text in FROM_MASTER else name
        parsed = parse_setting(text)
        scores = _score(load_setting(path, parsed, device=load.device), encoded, context, stride)
        rows.append({"name": text, "model": path, "setting": asdict(parsed), **_document(scores)})
    put_json({"rows": rows}) if as_json else put(markdown(rows), end="\n")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text ({error})") from error


def _score(model: Model, encoded: Encoded, context: int | None, stride: int | None) -> dict[str, Score]:
    """Score per file."""
    longest = model.config.max_position_embeddings
    context = min(DEFAULT_CONTEXT, longest) if context is None else context
    stride = max(1, context // 2) if stride is None else stride
    if context > longest:
        raise RequestError(f"context = {context} is more than the model's {longest} positions")
    scores = {}
    for name, (ids, text_bytes) in encoded.items():
        steps = len(windows(len(ids), context, stride))
        with progress_bar(name, steps, shown=True) as advance:
            nats = negative_log_likelihood(model, ids, context=context, stride=stride, advance=advance)
        scores[name] = Score(nats, len(ids) - 1, text_bytes)
    return scores


def _document(scores: dict[str, Score]) -> dict[str, Any]:
    return {
        "files": {name: score.document() for name, score in scores.items()},
        "total": sum(scores.values(), Score()).document(),
    }


def _print_scores(about: dict[str, Any], scores: dict[str, Score]) -> None:
    rows = list(scores.items())
    if len(rows) > 1:
        rows.append(("total", sum(scores.values(), Score())))
    for name, score in rows:
        put(
            f"{name}: {score.nats_per_token:.4f} nats/token, perplexity {score.perplexity:.3f}, "
            f"{score.bits_per_byte:.4f} bits/byte ({score.tokens} tokens, {score.text_bytes} bytes)",
            end="\n",
        )


def markdown(rows: list[dict[str, Any]]) -> str:
    """One row per setting; differences in bits per byte are to the first row."""
    lines = [
        "| setting | weights | linear inputs | KV, index | nats/token | perplexity | bits/byte | to the first |",
        "|---|---|---|---|---:|---:|---:|---:|",
    ]
    base = rows[0]["total"]["bits_per_byte"]
    for row in rows:
        s, total = row["setting"], row["total"]
        rounded = ", ".join(part for part, on in (("FP8", s["kv_quant"]), ("FP4", s["index_quant"])) if on) or "exact"
        lines.append(
            f"| {row['name']} | {s['weights']} | {s['act']} | {rounded} | {total['nats_per_token']:.4f} | "
            f"{total['perplexity']:.3f} | {total['bits_per_byte']:.4f} | {total['bits_per_byte'] - base:+.4f} |"
        )
    total, files = rows[0]["total"], ", ".join(Path(name).name for name in rows[0]["files"])
    sources = {row["model"]: [r["name"] for r in rows if r["model"] == row["model"]] for row in rows}
    origin = "; ".join(f"{Path(model).name} ({', '.join(names)})" for model, names in sources.items())
    told = f"{total['tokens']} tokens, {total['bytes']} bytes of {files}. Weights: {origin}."
    return "\n".join([*lines, "", told])
