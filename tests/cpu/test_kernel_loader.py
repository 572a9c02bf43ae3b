"""How a kernel is found: content-addressed cache, pack, refusals and errors, with a compiler that compiles nothing."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import fake_nvcc
import pytest
import torch

from dsv4.errors import KernelError
from dsv4.kernels import cache, compiler, loader, pack
from dsv4.kernels.cache import cached_library


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A fake compiler, an empty cache and no pack; `.calls()` counts compilations."""
    nvcc = fake_nvcc.install(tmp_path / "cuda")
    log = tmp_path / "log"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("DSV4_KERNEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DSV4_KERNEL_PACK", str(tmp_path / "pack"))
    monkeypatch.setenv("FAKE_LOG", str(log))
    monkeypatch.delenv("DSV4_KERNELS", raising=False)
    calls = lambda: len(log.read_text().splitlines()) if log.exists() else 0  # noqa: E731
    return SimpleNamespace(nvcc=nvcc, cache=tmp_path / "cache", pack=tmp_path / "pack", calls=calls, log=log)


def entries(fake):
    return [path for path in fake.cache.iterdir() if path.is_dir()]


# ------------------------------------------------------------------------------------------------------- the content


def test_the_hash_follows_source_and_transitive_includes_only(tmp_path):
    shutil.copytree(compiler.INCLUDE, tmp_path / "include")
    shutil.copytree(compiler.FOLDER / "mhc_head", tmp_path / "mhc_head")
    first = compiler.source_hash("mhc_head", tmp_path)
    assert first == compiler.source_hash("mhc_head")
    headers = tmp_path / "include" / "dsv4"
    (headers / "rope.cuh").write_text("// not included by mhc_head\n")
    assert compiler.source_hash("mhc_head", tmp_path) == first
    with (headers / "reduce.cuh").open("a") as file:  # mhc_head.cu -> mhc.cuh -> reduce.cuh
        file.write("// changed\n")
    second = compiler.source_hash("mhc_head", tmp_path)
    assert second != first
    with (tmp_path / "mhc_head" / "mhc_head.cu").open("a") as file:
        file.write("// changed\n")
    assert compiler.source_hash("mhc_head", tmp_path) not in {first, second}


def test_a_missing_header_and_a_missing_source_are_named(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "x.cu").write_text("#include <dsv4/gone.cuh>\n")
    with pytest.raises(KernelError, match=r"x\.cu includes dsv4/gone\.cuh, which does not exist"):
        compiler.source_hash("x", tmp_path)
    with pytest.raises(KernelError, match=r"op 'grouped_linear' has no CUDA source.*rms_norm"):
        compiler.source_of("grouped_linear")


def test_the_name_of_an_entry_follows_compiler_and_target(fake, monkeypatch):
    first = cache.entry_name("swiglu", "sm_90a", fake.nvcc)
    assert cache.entry_name("swiglu", "sm_120a", fake.nvcc).split("-")[-1] != first.split("-")[-1]
    monkeypatch.setenv("FAKE_VERSION", "2")
    os.utime(fake.nvcc, (1, 1))  # another compiler in the same place
    assert cache.entry_name("swiglu", "sm_90a", fake.nvcc) != first


# --------------------------------------------------------------------------------------------------------- the cache


def test_an_op_is_compiled_once(fake):
    assert cached_library("swiglu", "sm_90a").dsv4_swiglu() == 0
    assert cached_library("swiglu", "sm_90a").dsv4_swiglu() == 0
    assert fake.calls() == 1
    assert "-gencode=arch=compute_90a,code=sm_90a" in fake.log.read_text()
    (entry,) = entries(fake)
    assert sorted(path.name for path in entry.iterdir()) == ["build.log", "kernel.cu", "kernel.so", "meta.json"]


def test_two_at_once_compile_once(fake, monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "0.3")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: cached_library("swiglu", "sm_90a"), range(4)))
    assert fake.calls() == 1


@pytest.mark.parametrize("damage", ["kernel.so", "meta.json"])
def test_a_broken_entry_is_rebuilt_and_said_once(fake, damage):
    cached_library("swiglu", "sm_90a")
    broken = entries(fake)[0] / damage
    broken.unlink()  # the library may be mapped: never written over
    broken.write_text("{}")
    with pytest.warns(RuntimeWarning, match="rebuilding kernel cache entry swiglu-sm_90a") as said:
        assert cached_library("swiglu", "sm_90a").dsv4_swiglu() == 0
        assert cached_library("swiglu", "sm_90a").dsv4_swiglu() == 0
    assert len(said) == 1
    assert fake.calls() == 2


def test_a_failed_compilation_shows_the_compiler_and_leaves_nothing(fake, monkeypatch):
    monkeypatch.setenv("FAKE_FAIL", "1")
    with pytest.raises(KernelError, match=r"(?s)op 'swiglu' does not compile \(exit status 2\).*expected a ;"):
        cached_library("swiglu", "sm_90a")
    assert entries(fake) == []


# ---------------------------------------------------------------------------------------------------------- the pack


def test_a_pack_is_used_and_nothing_is_compiled(fake, monkeypatch):
    manifest = pack.build(None, ["sm_90a"], ["swiglu"])
    assert manifest == pack.read_manifest(fake.pack)
    assert manifest.ops == (pack.Entry("swiglu", "dsv4_swiglu", compiler.source_hash("swiglu")),)
    assert (manifest.archs, manifest.nvcc, manifest.flags) == (("sm_90a",), "Build 1", compiler.FLAGS)
    assert sorted(path.name for path in fake.pack.iterdir()) == [pack.MANIFEST, pack.LIBRARY]
    built = fake.calls()
    for mode in ("auto", "pack"):
        monkeypatch.setenv("DSV4_KERNELS", mode)
        assert loader.load("swiglu", "sm_90a").dsv4_swiglu() == 0
    assert fake.calls() == built


def test_what_a_pack_lacks_is_compiled_in_development(fake):
    pack.build(None, ["sm_90a"], ["swiglu"])
    built = fake.calls()
    assert loader.load("swiglu", "sm_120a").dsv4_swiglu() == 0
    assert fake.calls() == built + 1


def test_production_never_compiles(fake, monkeypatch):
    monkeypatch.setenv("DSV4_KERNELS", "pack")

    def refused(op, arch, reason):
        command = rf"dsv4 kernels build --arch {arch} --out "
        with pytest.raises(KernelError, match=rf"op '{op}' has no compiled kernel for {arch}.*{reason}.*{command}"):
            loader.load(op, arch)

    refused("swiglu", "sm_90a", "there is no pack")
    pack.build(None, ["sm_90a"], ["swiglu"])
    built = fake.calls()
    refused("swiglu", "sm_120a", "built for sm_90a, not for sm_120a")
    refused("rope", "sm_90a", "does not hold 'rope'")
    monkeypatch.setattr(pack, "source_hash", lambda op: "changed since")
    refused("swiglu", "sm_90a", "built from other sources of 'swiglu'")
    assert fake.calls() == built


def test_damaged_packs_and_wrong_words_are_named(fake, monkeypatch):
    fake.pack.mkdir()
    (fake.pack / pack.MANIFEST).write_text('{"archs": []}')
    with pytest.raises(KernelError, match=r"not a pack's manifest.*rebuild it: dsv4 kernels build"):
        loader.load("swiglu", "sm_90a")
    with pytest.raises(KernelError, match=r"cannot be loaded.*rebuild it"):
        pack.library(fake.pack)
    with pytest.raises(KernelError, match="unknown target sm_80; known: sm_90a, sm_100a, sm_103a, sm_120a"):
        pack.build(None, ["sm_80"])
    monkeypatch.setenv("DSV4_KERNELS", "production")
    with pytest.raises(KernelError, match="DSV4_KERNELS is 'production'; expected one of auto, pack"):
        loader.mode()


# ------------------------------------------------------------------------------------------------ compiler and launch


def test_without_a_compiler_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    with pytest.raises(KernelError, match=r"nvcc is neither on PATH nor in \$CUDA_HOME/bin; install the CUDA toolkit"):
        compiler.find_nvcc()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(KernelError, match=r"CUDA_HOME is .*no nvcc in its bin folder"):
        compiler.find_nvcc()


def test_a_launch_that_fails_names_op_target_and_error(monkeypatch):
    kernel, seen = loader.Kernel("swiglu", "pi"), []
    kernel.loaded[0] = lambda *values: seen.append(values) or 9, lambda code: b"invalid configuration", "sm_90a"
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=77))
    x = torch.zeros(1)
    with pytest.raises(KernelError, match=r"op 'swiglu' failed on sm_90a: invalid configuration \(cudaError 9\)"):
        kernel(torch.device("cuda", 0), x, 5)
    assert seen == [(x.data_ptr(), 5, 77)]


def test_an_unknown_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(KernelError, match=r"NVIDIA A100 has compute capability 8\.0.*DSV4_REF=all"):
        loader.arch_of(torch.device("cuda"))


def test_a_library_without_the_symbol_is_named(fake):
    with pytest.raises(KernelError, match=r"does not export .*dsv4_rope.*rebuild it"):
        loader.bind(cached_library("swiglu", "sm_90a"), "rope", [])
