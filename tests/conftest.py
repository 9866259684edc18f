import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes side by side; threads that wait for each other crawl

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _from_the_top_folder(monkeypatch):
    monkeypatch.chdir(ROOT)


def pytest_collection_modifyitems(items):
    """The tests of the smoke study first: they take longest, and the other process has all the rest meanwhile."""
    items.sort(key=lambda item: item.path.name != "test_study.py")


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


@pytest.fixture(scope="session")
def smoke():
    """The whole study, smoke profile, from nothing: its run directory."""
    import shutil

    shutil.rmtree(ROOT / "runs" / "smoke", ignore_errors=True)
    done = run(sys.executable, "-m", "helpers.study.run", "smoke", "--max-threads", "1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert done.stdout.splitlines()[-1].endswith("index.html")
    (ROOT / "runs" / "smoke" / "console.txt").write_text(done.stdout)
    return ROOT / "runs" / "smoke"
