"""What every test gets: one thread, a fixed seed, no network, repeatable hypothesis; at the end the longest files."""

import os
import subprocess
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers is an oracle here, never a downloader
torch.set_num_threads(1)  # one process per core already; more threads only fight
hypothesis.settings.register_profile(
    "dsv4",
    derandomize=True,
    deadline=None,
    database=None,  # workers run side by side; what derandomize repeats needs no memory
    suppress_health_check=[hypothesis.HealthCheck.too_slow],  # a busy machine is no finding
)
hypothesis.settings.load_profile("dsv4")


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited by every command line that a test starts


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def tracked_files() -> list[Path]:
    """Files git knows, and new ones it does not ignore: what a commit of everything would hold."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return sorted(path for name in names.split("\0") if name and (path := ROOT / name).is_file())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    code = [path for path in tracked_files() if path.suffix in {".py", ".cu", ".cuh"}]
    lines = sorted(((len(path.read_text().splitlines()), path) for path in code), reverse=True)[:10]
    terminalreporter.section("ten longest files (guide: Python 300 lines, CUDA 600)")
    for count, path in lines:
        terminalreporter.write_line(f"{count:6d}  {path.relative_to(ROOT)}")
