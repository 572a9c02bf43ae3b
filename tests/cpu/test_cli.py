"""`dsv4 generate` and `dsv4 chat`, and what all commands share: channels, exit codes, options, interruption."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import Program, write_model
from text_samples import sample_tokenizer

from dsv4 import LLM, SamplingParams, load
from dsv4.checkpoint.sizes import count
from dsv4.cli.options import LoadOptions
from dsv4.engine.metrics import weight_bytes_per_token
from dsv4.model import Model
from dsv4.parallel.comm import CpuComm
from dsv4.parallel.mesh import Mesh

TOKENIZER = sample_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def dsv4(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Program:
    for name in [name for name in os.environ if name.startswith("DSV4_")]:
        monkeypatch.delenv(name)
    return Program(capsys)


def typed(monkeypatch: pytest.MonkeyPatch, text: str | bytes) -> None:
    """Text that waits on stdin."""
    data = text.encode() if isinstance(text, str) else text
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def expected(folder: Path, prompt: str, **params: Any) -> str:
    with LLM(folder) as llm:
        return llm.generate(prompt, SamplingParams(temperature=0, **params))[0].outputs[0].text


def test_generate_puts_the_text_on_stdout_and_the_speed_on_stderr(dsv4: Program, folder: Path) -> None:
    done = dsv4("generate", folder, "-p", "The tool", "--max-tokens", 12)
    text = expected(folder, "The tool", max_tokens=12)
    assert done.code == 0 and done.out == text + ("" if text.endswith("\n") else "\n")
    for word in ("prompt", "decode 12 tokens", "tok/s", "MB/token", "GB/s", "ended by length"):
        assert word in done.err
    assert "no model named" not in done.err


def test_generate_as_one_json_document(dsv4: Program, folder: Path) -> None:
    done = dsv4("generate", folder, "-p", "The tool", "--max-tokens", 5, "--json", "--logprobs", 2, "--seed", 9)
    document = json.loads(done.out)
    assert document["text"] == expected(folder, "The tool", max_tokens=5)
    assert document["prompt_token_ids"] == TOKENIZER.encode("The tool", add_bos=True)
    assert len(document["token_ids"]) == len(document["logprobs"]) == 5
    assert [p[0]["token_id"] for p in document["logprobs"]] == document["token_ids"]
    assert document["finish_reason"] == "length" and document["sampling"]["seed"] == 9
    assert document["settings"]["act"] == "bf16" and document["metrics"]["generated_tokens"] == 5
    assert document["metrics"]["weight_bytes_per_token"] > 0


def test_sampling_options_reach_the_sampler(dsv4: Program, folder: Path) -> None:
    options = ["--temperature", 1.5, "--top-p", 0.9, "--top-k", 30, "--min-p", 0.01, "--repetition-penalty", 1.1,
               "--presence-penalty", 0.2, "--frequency-penalty", 0.1, "--stop", "zzz", "--stop", "yyy",
               "--min-tokens", 1, "--ignore-eos"]  # fmt: skip
    texts = {}
    for seed in (1, 2, 1):
        done = dsv4("generate", folder, "-p", "a", "--max-tokens", 12, "--json", "--seed", seed, *options)
        document = json.loads(done.out)
        assert texts.setdefault(seed, document["text"]) == document["text"]
    assert texts[1] != texts[2]
    sampling = document["sampling"]
    assert (sampling["temperature"], sampling["top_p"], sampling["top_k"], sampling["min_p"]) == (1.5, 0.9, 30, 0.01)
    assert (sampling["stop"], sampling["min_tokens"], sampling["ignore_eos"]) == (["zzz", "yyy"], 1, True)
    assert (sampling["repetition_penalty"], sampling["presence_penalty"], sampling["frequency_penalty"]) == (
        1.1,
        0.2,
        0.1,
    )


def test_without_options_the_checkpoint_decides(dsv4: Program, folder: Path) -> None:
    document = json.loads(dsv4("generate", folder, "-p", "a", "--max-tokens", 2, "--json").out)
    assert document["sampling"]["temperature"] == 0.0


@pytest.mark.parametrize(("thinking", "opening"), [(True, "<think>"), (False, "</think>")])
def test_generate_in_the_chat_format(dsv4: Program, folder: Path, thinking: bool, opening: str) -> None:
    switch = "--think" if thinking else "--no-think"
    done = dsv4("generate", folder, "-p", "2+3?", "--chat", switch, "--system", "S", "--json", "--max-tokens", 4)
    document = json.loads(done.out)
    assert document["prompt"] == f"<｜begin▁of▁sentence｜>S<｜User｜>2+3?<｜Assistant｜>{opening}"
    said = document["message"]["reasoning_content" if thinking else "content"]
    assert document["text"].startswith(said)


def test_the_prompt_may_come_from_stdin(dsv4: Program, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "two\nlines\n")
    document = json.loads(dsv4("generate", folder, "-p", "-", "--max-tokens", 1, "--json").out)
    assert document["prompt"] == "two\nlines\n"
    typed(monkeypatch, "question\n")
    document = json.loads(dsv4("generate", folder, "-p", "-", "--chat", "--max-tokens", 1, "--json").out)
    assert "<｜User｜>question<｜Assistant｜>" in document["prompt"]
    typed(monkeypatch, b"\xff\xfe")
    done = dsv4("generate", folder, "-p", "-", "--max-tokens", 1)
    assert done.code == 1 and "stdin is not UTF-8" in done.err


def test_the_model_comes_from_the_argument_the_option_the_environment_or_is_nano(
    dsv4: Program, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dsv4("generate", "-m", folder, "-p", "a", "--max-tokens", 1).code == 0
    monkeypatch.setenv("DSV4_MODEL", str(folder))
    assert dsv4("generate", "-p", "a", "--max-tokens", 1).code == 0
    assert "no such file" in dsv4("generate", folder / "gone", "-p", "a").err
    monkeypatch.setattr("dsv4.cli.options.EMBEDDED", str(folder))
    monkeypatch.delenv("DSV4_MODEL")
    done = dsv4("generate", "-p", "a", "--max-tokens", 1)
    assert done.code == 0 and done.err.count("no model named: using") == 1


def test_load_options_are_the_same_everywhere(dsv4: Program, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--dtype", "float32", "--act", "nvfp4", "--weights", "nvfp4", "--no-kv-quant", "--no-index-quant"]
    done = dsv4("generate", folder, "-p", "a", "--max-tokens", 1, "--json", *flags)
    settings = json.loads(done.out)["settings"]
    assert (settings["dtype"], settings["act"], settings["weights"]) == ("float32", "nvfp4", "nvfp4")
    assert settings["kv_quant"] is False and settings["index_quant"] is False
    monkeypatch.setenv("DSV4_ACT", "fp8")
    settings = json.loads(dsv4("generate", folder, "-p", "a", "--max-tokens", 1, "--json").out)["settings"]
    assert settings["act"] == "fp8"
    assert dsv4("generate", folder, "-p", "a", "--act", "fp3").code == 2


def test_a_small_model_runs_on_one_thread_unless_told_otherwise(
    dsv4: Program, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", chosen.append)
    dsv4("generate", folder, "-p", "a", "--max-tokens", 1)
    dsv4("generate", folder, "-p", "a", "--max-tokens", 1, "--threads", 3)
    monkeypatch.setattr("dsv4.cli.options.SMALL_BYTES", 1)
    dsv4("generate", folder, "-p", "a", "--max-tokens", 1)
    assert chosen == [1, 3]


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_ranks_share_the_threads_of_their_host(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Threads of several processes that are more than the cores wait for one another at every barrier."""
    chosen: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", chosen.append)
    monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    monkeypatch.setattr("dsv4.cli.options.load", lambda model, **how: how["tp"])
    mesh = Mesh(1, 2, device, CpuComm(2))
    monkeypatch.setattr("dsv4.cli.options._ranks", lambda size, device, experts: mesh if size > 1 else None)
    assert LoadOptions(tp=2, device=device).load("nano") is mesh
    LoadOptions(tp=2, device=device, threads=5).load("nano")
    LoadOptions(device=device).load("nano")
    assert chosen == [3, 5]


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ([], 2, "Usage"),
        (["generate"], 2, "--prompt"),
        (["generate", "-p", "a", "--max-tokens", "many"], 2, "max-tokens"),
        (["fly"], 2, "fly"),
        (["generate", "-p", "a", "--top-p", "7"], 1, "error: top_p must be"),
        (["generate", "-p", "a", "--max-tokens", "5000"], 1, "error: the context holds 4096 tokens"),
        (["generate", "-p", "a", "-c", "5000"], 1, "error: max_model_len = 5000"),
        (["generate", "-p", "a", "--device", "tpu9"], 1, "error: device"),
        (["generate", "random:tiny", "-p", "a"], 1, "error: this model has no tokenizer.json"),
        (["generate", "random:flash", "--layers", "0", "-p", "a"], 1, "error: layers = 0: this model has 43 layers"),
        (["generate", "-p", "a", "--logprobs", "-1"], 1, "error: logprobs must be"),
    ],
)
def test_failures_are_one_line_and_a_code(
    dsv4: Program, folder: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], code: int, words: str
) -> None:
    monkeypatch.setenv("DSV4_MODEL", str(folder))
    done = dsv4(*args)
    assert done.code == code and words in done.err + (done.out if not args else "")
    assert "Traceback" not in done.err
    if code == 1:
        assert done.out == "" and len(done.err.splitlines()) == 1


def interrupt_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Ctrl-C during the given call of the model, once."""
    forward, seen = Model.forward, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        if len(seen) == calls:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(Model, "forward", interrupted)


def test_an_interrupted_generate_exits_with_130(dsv4: Program, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(monkeypatch, 4)
    done = dsv4("generate", folder, "-p", "a", "--max-tokens", 50)
    assert done.code == 130 and "Traceback" not in done.err


def test_chat_keeps_the_conversation(dsv4: Program, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[str] = []
    stream_chat = LLM.stream_chat

    def watched(self: LLM, *args: Any, **kwargs: Any) -> Any:
        stream = stream_chat(self, *args, **kwargs)
        prompts.append(stream.output.prompt or "")
        return stream

    monkeypatch.setattr(LLM, "stream_chat", watched)
    lines = ["one", "", "/nothink", "two", "/think max", "three", "/reset", "/nothink", "four", "/quit", "five"]
    typed(monkeypatch, "\n".join(lines))
    done = dsv4("chat", folder, "--system", "S", "--max-tokens", 3)
    assert done.code == 0
    starts = ["<｜begin▁of▁sentence｜>S<｜User｜>one<｜Assistant｜><think>"] + [""] * 3
    assert prompts[0] == starts[0]
    assert prompts[1].startswith("<｜begin▁of▁sentence｜>S<｜User｜>one<｜Assistant｜>") and "two" in prompts[1]
    assert prompts[1].endswith("<｜User｜>two<｜Assistant｜></think>")
    assert prompts[2].startswith("<｜begin▁of▁sentence｜>Think hard.") and prompts[2].endswith(
        "three<｜Assistant｜><think>"
    )
    assert prompts[3] == "<｜begin▁of▁sentence｜>S<｜User｜>four<｜Assistant｜></think>" and len(prompts) == 4
    for word in ("thinking off", "thinking on, effort max", "conversation forgotten", "tok/s"):
        assert word in done.err
    assert "> " not in done.out


def test_chat_puts_answers_on_stdout_and_reasoning_on_stderr(
    dsv4: Program, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [{"role": "user", "content": "hi"}]
    for thinking in (True, False):
        with LLM(folder) as llm:
            params = SamplingParams(temperature=0, max_tokens=6)
            message = llm.chat(messages, params, thinking=thinking)[0].outputs[0].message
        assert message is not None
        typed(monkeypatch, "hi\n")
        done = dsv4("chat", folder, "--max-tokens", 6, "--think" if thinking else "--no-think")
        if thinking:
            assert message["reasoning_content"] in done.err and message["reasoning_content"] not in done.out
        else:
            assert done.out == message["content"] + "\n"


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(
    dsv4: Program, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(monkeypatch, 3)
    typed(monkeypatch, "first\nsecond\n")
    done = dsv4("chat", folder, "--no-think", "--max-tokens", 6)
    assert done.code == 0 and done.err.count("stopped") == 1
    assert "ended by abort" in done.err and "ended by length" in done.err


def test_chat_survives_what_it_cannot_answer(dsv4: Program, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "word " * 100 + "\n/bogus\n/help\nshort\n")
    done = dsv4("chat", folder, "--no-think", "--max-tokens", 4, "-c", 60)
    assert done.code == 0
    assert "error: the context holds 60 tokens" in done.err and "error: no command /bogus" in done.err
    assert done.err.count("/reset") == 2 and "ended by" in done.err
    typed(monkeypatch, "hi\n")
    assert "error: reasoning_effort 'wild'" in dsv4("chat", folder, "--reasoning-effort", "wild").err


def test_weight_bytes_agree_with_the_config_alone() -> None:
    """The sizes counted from the config know no per-tensor globals: 4 bytes for each NVFP4 matrix."""
    model = load("random:tiny", weights="nvfp4")
    extra = weight_bytes_per_token(model) - sum(count(model.config).read["nvfp4"].linears.values())
    layers, used = len(model.config.layers), model.config.num_experts_per_tok
    assert extra % 4 == 0 and 4 * layers * 3 * used < extra < 4 * layers * (3 * used + 20)


@pytest.mark.parametrize("module", ["dsv4", "dsv4.cli"])
def test_python_dash_m(module: str, folder: Path) -> None:
    command = [sys.executable, "-m", module, "generate", str(folder), "-p", "a", "--max-tokens", "2", "--top-p", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith("error: top_p must be")


def test_a_closed_pipe_is_no_crash(folder: Path) -> None:
    command = [sys.executable, "-m", "dsv4", "generate", str(folder), "-p", "a", "--max-tokens", "40"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(timeout=120) == 1 and "Traceback" not in said
