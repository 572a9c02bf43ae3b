"""`dsv4 inspect PATH [--json]`: what a model is, how large it is, what one token costs, before anything is loaded."""

import json
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dsv4.checkpoint.summary import Document, summarize

_SCHEME_TITLES = {
    "native": "FP4+FP8",
    "nvfp4": "policy nvfp4",
    "all_linear_nvfp4": "all NVFP4",
    "all_linear_nvfp4_bf16_head": "all NVFP4, BF16 head",
}


def inspect(
    path: Annotated[str, typer.Argument(help="Checkpoint folder, .safetensors file, nano, or random:tiny|flash|pro.")],
    layers: Annotated[int | None, typer.Option(help="Of a random:... model, the first so many layers.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Print config, parameters, bytes, KV cache and decode floor of a model; only headers are read.

    Exits with 1 when the checkpoint has problems that loading would refuse; they are listed.
    """
    document = summarize(path, layers)
    if as_json:
        typer.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        render(document, Console())
    if document["problems"]:
        raise typer.Exit(1)


def render(document: Document, console: Console) -> None:
    """Print the document of `summarize` as tables."""
    console.print(_config_table(document))
    console.print(_parameter_table(document))
    if document["checkpoint"]:
        console.print(_stored_table(document["checkpoint"]))
    console.print(_decode_table(document))
    console.print(_kv_table(document["kv_cache"]))
    kv = document["kv_cache"]
    console.print(f"KV entry {kv['entry_bytes']} B, index key {kv['index_key_bytes']} B")
    checkpoint = document["checkpoint"]
    if checkpoint:
        unused = checkpoint["unused"]
        console.print(f"Unused without speculation: {unused['tensors']} tensors, {_bytes(unused['stored_bytes'])}")
    for problem in document["problems"]:
        console.print(f"[red]problem[/red] {escape(problem)}", soft_wrap=True)


def _bytes(number: float) -> str:
    """Decimal units, as the published figures have them."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:,.3f} {unit}"
    return f"{number:,.0f} B"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.min_width = min(len(title), 80)  # a narrow table would break its title
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    return table


def _config_table(document: Document) -> Table:
    config = document["config"]
    layers, experts = config["layers"], config["n_routed_experts"]
    table = _table(document["source"], "config", "")
    lines: dict[str, Any] = {
        "layers": f"{layers['window']} window, {layers['csa']} CSA, {layers['hca']} HCA; {layers['hash']} hash-routed",
        "draft stages": f"{config['draft_stages']}" + (" (DSpark)" if config["dspark"] else ""),
        "hidden, streams": f"{config['hidden_size']} x {config['hc_mult']}",
        "heads": f"{config['num_attention_heads']} x {config['head_dim']}, {config['qk_rope_head_dim']} rotary",
        "experts": f"{experts} x {config['moe_intermediate_size']}, top {config['num_experts_per_tok']}, 1 shared",
        "indexer": f"{config['index_n_heads']} x {config['index_head_dim']}, top {config['index_topk']} entries",
        "window": config["sliding_window"],
        "vocabulary": f"{config['vocab_size']:,}",
        "context": f"{config['max_position_embeddings']:,} tokens",
        "quantization": config["quantization"] or "none",
    }
    for key, value in lines.items():
        table.add_row(key, str(value))
    return table


def _parameter_table(document: Document) -> Table:
    schemes = [scheme for scheme in document["resident_bytes"] if scheme != "all_linear_nvfp4_bf16_head"]
    table = _table("Parameters and resident bytes", "", "parameters", *(_SCHEME_TITLES[scheme] for scheme in schemes))
    counts, resident = document["parameters"], document["resident_bytes"]
    for name, nbytes in resident["native"]["by_component_bytes"].items():
        if name != "draft" and nbytes:
            sizes = (_bytes(resident[scheme]["by_component_bytes"][name]) for scheme in schemes)
            table.add_row(name, f"{counts['by_component_params'].get(name, 0):,}", *sizes)
    table.add_section()
    trunk = (_bytes(resident[scheme]["trunk_bytes"]) for scheme in schemes)
    table.add_row("trunk", f"{counts['trunk_params']:,}", *trunk, style="bold")
    draft = (_bytes(resident[scheme]["draft_bytes"]) for scheme in schemes)
    table.add_row("draft", f"{counts['draft_params']:,}", *draft)
    table.add_row("active per token", f"{counts['active_params_per_token']:,}")
    return table


def _stored_table(checkpoint: Document) -> Table:
    stored = _bytes(checkpoint["stored_bytes"])
    title = f"Stored: {checkpoint['tensors']:,} tensors in {checkpoint['files']} files, {stored}"
    table = _table(title, "component", "format", "tensors", "parameters", "bytes")
    groups = checkpoint["components"] | ({"draft": checkpoint["draft"]} if checkpoint["draft"] else {})
    for component, formats in groups.items():
        for form, cell in formats.items():
            table.add_row(component, form, f"{cell['tensors']:,}", f"{cell['params']:,}", _bytes(cell["stored_bytes"]))
    return table


def _decode_table(document: Document) -> Table:
    reads = {_SCHEME_TITLES[scheme]: read for scheme, read in document["decode_floor_per_token"].items()}
    if document["checkpoint"]:
        reads = {"as stored here": document["checkpoint"]["decode_floor_per_token"]} | reads
    table = _table(
        "Decode floor: weight bytes read per token at batch 1", "", "linears", "mHC", "linears + mHC", "everything"
    )
    for title, read in reads.items():
        keys = ("linears_bytes", "mhc_bytes", "linears_and_mhc_bytes", "total_bytes")
        table.add_row(title, *(_bytes(read[key]) for key in keys))
    return table


def _kv_table(kv: Document) -> Table:
    title = f"KV cache of one sequence: {kv['bytes_per_token']:,.2f} B per token"
    table = _table(title, "tokens", *(f"{int(tokens):,}" for tokens in kv["context_tokens"]))
    rows = {
        "CSA entries": "csa_bytes",
        "index keys": "index_keys_bytes",
        "HCA entries": "hca_bytes",
        "windows, fixed": "windows_bytes",
        "total": "total_bytes",
        "total with FP8 index keys": "total_fp8_index_bytes",
        "read per token": "read_bytes_per_token",
    }
    for title, key in rows.items():
        table.add_row(title, *(_bytes(parts[key]) for parts in kv["context_tokens"].values()))
    table.add_row("compressor states, fixed", *[_bytes(kv["state_bytes_per_sequence"])] * len(kv["context_tokens"]))
    return table
