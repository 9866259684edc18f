import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes side by side; threads that wait for each other crawl

import pytest

ROOT = Path(__file__).parents[1]
SOAK = bool(os.environ.get("SOAK"))  # SOAK=1: hundreds of damaged files and bad inputs


@pytest.fixture(autouse=True)
def _from_the_top_folder(monkeypatch):
    monkeypatch.chdir(ROOT)


def pytest_addoption(parser):
    parser.addoption("--study", default="smoke", choices=("smoke", "smoke_full"), help="full: the experiments, too")


# A file stays in one of the two processes; those that take longest start first, so that neither waits at the end.
LONGEST_FIRST = [
    "test_study.py",
    "test_runtimes.py",
    "test_quantization.py",
    "test_without_torch_ao.py",
    "test_colab.py",
]
LONGEST_FIRST += ["test_training.py", "test_your_model.py", "test_claims.py"]


def pytest_collection_modifyitems(items):
    rank = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def run(*command, cwd=ROOT, **environment):
    """Run a command; the finished process with its output as text."""
    settings = {k: v for k, v in os.environ.items() if k != "CIFAR10_ROOT"} | environment
    return subprocess.run([str(part) for part in command], cwd=cwd, env=settings, capture_output=True, text=True)


def papermill(notebook, output, *arguments, **environment):
    """Run one notebook in batch."""
    return run(
        sys.executable,
        "-m",
        "papermill",
        "--no-progress-bar",
        f"notebooks/{notebook}.ipynb",
        output,
        *arguments,
        **environment,
    )
