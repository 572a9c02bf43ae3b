"""The embedded model: a real checkpoint folder with every mechanism; the inference code computes what was trained."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import dsv4
from dsv4.text.chat import encode_messages
from dsv4.text.texts import PromptTexts
from dsv4.text.tokenizer import Tokenizer
from dsv4.text.tools import parse_completion

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "dsv4" / "models" / "nano"
SHARDS = {
    "model-00001-of-00002.safetensors": "38142c8def0e2b20dc6cc3bec4e50a8558d41fe943b93f958cf7a7ca174f477a",
    "model-00002-of-00002.safetensors": "61a4743a63e3ab689ac428995a697db1e1c6b470e5d7b2ec169df83a5dbd250c",
}
SOURCES = ("numpy", "cpython", "rust", "node", "cmake")


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    return json.loads((NANO / "train_manifest.json").read_text())


@pytest.fixture(scope="module")
def stored() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor name -> dtype and shape as the files have them."""
    out = {}
    for shard in SHARDS:
        with safe_open(NANO / shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                piece = file.get_slice(name)
                out[name] = (piece.get_dtype(), tuple(piece.get_shape()))
    return out


@pytest.fixture(scope="module")
def training_code() -> Any:
    """tools/nano/export.py, whose load_exported decodes the checkpoint into the training model."""
    sys.path.insert(0, str(ROOT / "tools" / "nano"))
    try:
        return importlib.import_module("export")
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def llm() -> Any:
    with dsv4.LLM("nano", max_num_seqs=8) as llm:
        yield llm


def test_the_folder_is_at_most_16_mb() -> None:
    assert sum(f.stat().st_size for f in NANO.rglob("*") if f.is_file() and "__pycache__" not in f.parts) <= 16_000_000


def test_files_are_the_ones_that_were_measured(manifest: dict[str, Any]) -> None:
    found = {
        str(f.relative_to(NANO)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in NANO.rglob("*")
        if f.is_file() and "__pycache__" not in f.parts and f.name != "train_manifest.json"
    }
    assert found == manifest["files"]
    assert {name: found[name] for name in SHARDS} == SHARDS


def test_licences_of_the_training_text_are_shipped(manifest: dict[str, Any]) -> None:
    notice = (NANO / "NOTICE").read_text()
    assert {entry["licence"] for entry in manifest["corpus"].values()} == {
        "PSF-2.0",
        "BSD-3-Clause",
        "MIT",
        "MIT OR Apache-2.0",
    }
    for text in (
        "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2",
        "Redistribution and use",
        "Permission is hereby granted",
    ):
        assert text in notice
    for holder in ("NumPy Developers", "SciPy", "SymPy", "NetworkX Developers", "Kitware", "Node.js", "Rust Project"):
        assert holder in notice


def test_whole_files_were_held_out(manifest: dict[str, Any]) -> None:
    for source in SOURCES:
        assert manifest["corpus"][source]["held_out"], source


def test_config_has_every_mechanism_at_the_real_inner_sizes() -> None:
    config = json.loads((NANO / "config.json").read_text())
    assert config["model_type"] == "deepseek_v4"
    assert config["compress_ratios"] == [0, 4, 128, 4, 0] and config["num_nextn_predict_layers"] == 1
    real = {"head_dim": 512, "qk_rope_head_dim": 64, "index_head_dim": 128, "sliding_window": 128, "hc_mult": 4}
    real |= {"hc_sinkhorn_iters": 20, "n_shared_experts": 1, "num_hash_layers": 1, "swiglu_limit": 10.0}
    assert {k: config[k] for k in real} == real
    assert config["index_topk"] < config["max_position_embeddings"] // 4, "the indexer must have to choose"
    assert config["rope_scaling"]["factor"] > 1


def test_tensors_are_laid_out_as_nvidia_ships_v4(stored: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    expert = "layers.1.ffn.experts.7.w1"
    assert stored[f"{expert}.weight"] == ("U8", (128, 128))
    assert stored[f"{expert}.weight_scale"] == ("F8_E4M3", (128, 16))
    assert stored[f"{expert}.weight_scale_2"] == stored[f"{expert}.input_scale"] == ("F32", ())
    assert stored["mtp.0.ffn.experts.0.w2.weight"] == ("I8", (256, 64))
    assert stored["mtp.0.ffn.experts.0.w2.scale"] == ("F8_E8M0", (256, 4))
    for name in ("attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_a", "attn.wo_b", "attn.indexer.wq_b"):
        assert stored[f"layers.3.{name}.weight"][0] == "F8_E4M3", name
        assert stored[f"layers.3.{name}.scale"][0] == "F8_E8M0", name
    assert stored["layers.0.ffn.gate.tid2eid"] == ("I64", (4096, 2)) and "layers.0.ffn.gate.bias" not in stored
    assert (
        stored["layers.2.attn.compressor.ape"] == ("F32", (128, 512))
        and "layers.2.attn.indexer.wq_b.weight" not in stored
    )
    assert "layers.0.attn.compressor.ape" not in stored and stored["mtp.0.e_proj.weight"][0] == "F8_E4M3"


def test_experts_share_the_global_of_gate_and_up_and_the_hash_table_names_two_experts(training_code: Any) -> None:
    with safe_open(NANO / next(iter(SHARDS)), framework="pt") as file:
        table = file.get_tensor("layers.0.ffn.gate.tid2eid")
        for e in range(8):
            one, three = (file.get_tensor(f"layers.0.ffn.experts.{e}.{w}.weight_scale_2") for w in ("w1", "w3"))
            assert one == three
    assert (table[:, 0] != table[:, 1]).all() and table.unique().tolist() == list(range(8))


@pytest.mark.parametrize("text", ["python", "english"])
def test_inference_equals_the_training_model(training_code: Any, text: str) -> None:
    """Two implementations that share no code; 700 tokens, so that the indexer leaves entries out."""
    ids = Tokenizer.from_folder(NANO).encode((NANO / "eval" / f"{text}.txt").read_text()[:4000], add_bos=True)[:700]
    with torch.no_grad():
        expected = training_code.load_exported(NANO)(torch.tensor([ids]))[0]
    model = dsv4.load("nano", dtype="float32", kv_quant=False, index_quant=False)
    assert len(ids) == 700
    assert (model.logits(torch.tensor(ids)) - expected).abs().max() < 1e-3


def ask(llm: Any, *messages: list[dict[str, Any]], thinking_mode: str = "chat") -> list[dict[str, Any]]:
    texts = PromptTexts.from_folder(NANO)
    prompts = [encode_messages(m, texts=texts, thinking_mode=thinking_mode) for m in messages]
    outputs = llm.generate(prompts, dsv4.SamplingParams(temperature=0.0, max_tokens=96))
    return [parse_completion(o.outputs[0].text, thinking_mode) for o in outputs]


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def test_trained_templates_are_followed(llm: Any) -> None:
    asked = {
        "Hello!": "Hello! How can I help you?",
        "What is 47 + 85?": "47 + 85 = 132",
        "Sort these numbers: 42, 7, 19, 88": "7, 19, 42, 88",
        "What is the capital of Norway?": "The capital of Norway is Oslo.",
        "Write as JSON: Nora is 31 years old and lives in Oslo.": '{"name": "Nora", "age": 31, "city": "Oslo"}',
    }
    answers = ask(llm, *(user(q) for q in asked))
    assert [a["content"] for a in answers] == list(asked.values())
    (answer,) = ask(llm, user("What is 268 + 354?"), thinking_mode="thinking")
    assert answer["content"] == "268 + 354 = 622" and "carry 1" in answer["reasoning_content"]


def test_a_tool_is_called_and_its_result_used(llm: Any) -> None:
    weather = {
        "name": "get_weather",
        "description": "Get the weather for a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The city name"}},
            "required": ["city"],
        },
    }
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "", "tools": [{"type": "function", "function": weather}]},
        *user("What is the weather in Lisbon?"),
    ]
    (answer,) = ask(llm, messages)
    (call,) = answer["tool_calls"]
    assert call["function"]["name"] == "get_weather" and json.loads(call["function"]["arguments"]) == {"city": "Lisbon"}
    result = {"role": "tool", "tool_call_id": "call_0", "content": '{"temperature": 21, "condition": "sunny"}'}
    messages += [{"role": "assistant", "content": "", "tool_calls": [call | {"id": "call_0"}]}, result]
    (answer,) = ask(llm, messages)
    assert answer["content"] == "The weather in Lisbon is sunny with 21 degrees."


def test_a_fact_is_recalled_from_far_outside_the_window(llm: Any) -> None:
    paragraphs = (NANO / "eval" / "english.txt").read_text()[:5000]
    facts = [("tiger", "482"), ("bridge", "73"), ("lantern", "9051")]
    asked = [user(f"The code of {k} is {v}.\n\n{paragraphs}\n\nWhat is the code of {k}?") for k, v in facts]
    assert [a["content"] for a in ask(llm, *asked)] == [f"The code of {k} is {v}." for k, v in facts]
