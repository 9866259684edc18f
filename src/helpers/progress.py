"""A bar with the time left where a person watches; in batch, one line an epoch, which reaches the console of `make study`, too."""

import os
import sys
import warnings
from collections.abc import Iterable
from contextlib import suppress
from typing import TypeVar

import psutil

# Without a widget library a notebook shows the bar as text, which is as good.
warnings.filterwarnings("ignore", message="IProgress not found")
from tqdm.auto import tqdm  # noqa: E402

T = TypeVar("T")

CONSOLE = "STUDY_CONSOLE"  # environment variable: the file from which `helpers.study` takes lines that it shows

# A notebook that another one runs (`pipeline.ensure`) is a child of that one's kernel; `make machine` runs papermill in its own process.
BATCH_RUNNERS = ("papermill", "nbconvert", "nbclient", "jupyter-execute", "snakemake", "ipykernel", "helpers.study")


def person_watches() -> bool:
    """Tell whether output goes to a terminal or to a notebook that somebody has open (and not to a batch runner)."""
    if "ipykernel" not in sys.modules:
        return sys.stderr.isatty()
    try:
        parent = " ".join(psutil.Process().parent().cmdline())
    except (psutil.Error, AttributeError):
        return False
    return not any(runner in parent for runner in BATCH_RUNNERS)


def progress(steps: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
    """Go through `steps`; show a bar labelled `label` with the time left if a person watches."""
    return tqdm(steps, desc=label, total=total, leave=False, disable=not person_watches())


def announce(line: str) -> None:
    """Print a line; under `make study` it is shown on its console, too, where the output of notebooks is not."""
    print(line, flush=True)
    if file := os.environ.get(CONSOLE):
        with suppress(OSError), open(file, "a") as console:  # a line less ends no training
            console.write(line + "\n")
