"""`make study`: check everything, lock the run directory, let Snakemake run the notebooks, say what came out.

Command line: python -m helpers.study.run PROFILE [arguments for snakemake].
"""

import fcntl
import os
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from snakemake.cli import main as snakemake
from snakemake_interface_logger_plugins.registry import LoggerPluginRegistry

from helpers.files import StudyError, check_writable, remove_unfinished
from helpers.progress import CONSOLE
from helpers.quantize.arms import NO_LEGACY
from helpers.report import claims, tables
from helpers.report.results import Results
from helpers.report.schema import run_name
from helpers.study import console
from helpers.study.pipeline import LEFT_OUT, NOTEBOOKS, SIZE_OF, Profile, load_profile
from helpers.train.data import check_available
from helpers.train.published import check_start

# Those that this process may use, which may be fewer than the machine has.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
SNAKEMAKE = [
    *("--cores", str(CORES), "--keep-going", "--logger", "study"),
    # Locking is done here: the files of Snakemake's own lock outlive a kill -9. Half-made outputs cannot exist (files appear whole).
    *("--nolock", "--rerun-incomplete", "--rerun-triggers", "mtime", "params"),
]
FLOAT_EXPORTS = (".pt", ".pt2", ".onnx", ".xml", ".bin")


def run_study(name: str, arguments: list[str]) -> int:
    """Run the profile called `name`; returns Snakemake's exit code, 0 when the book is there.

    Snakemake runs in this process, which holds the lock: neither outlives the other. Raises StudyError before any work
    starts for a bad profile, missing data or published weights, a run directory that cannot be written, or one that another study is working in;
    and NotWritten when the study stopped and nothing can be written there any more.
    """
    profile = load_profile(name)
    data = profile.common.get("data", "digits")
    check_available(data, profile.common.get("data_dir", ""))
    for model in profile.trained():
        check_start(profile.common.get("start_from", "random"), **model, data=data)
    run = Path("runs") / name
    check_writable(run)
    with open(run / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StudyError(f"Another study is running in {run}; wait for it, or choose another PROFILE.") from error
        remove_unfinished(run)
        if LEFT_OUT:
            print(f"{NO_LEGACY} Notebooks left out: {', '.join(LEFT_OUT)}.", flush=True)
        started = time.monotonic()
        with _watched(run) as peak:
            code = _snakemake(name, [*SNAKEMAKE, *_slowest_first(profile, run), *_with_profile(name, arguments)])
        if code:
            check_writable(run)  # a full disk takes no log either, so it is said here
            print(
                f"The study stopped; all that its notebooks printed is in {run / 'study.log'}. The same command goes on from here."
            )
            return code
        _remove_float_exports(run)
    _closing_lines(run, peak[0], (time.monotonic() - started) / 60)
    return 0


def _with_profile(name: str, arguments: list[str]) -> list[str]:
    if "--config" not in arguments:
        arguments = [*arguments, "--config"]
    config = arguments.index("--config") + 1
    return [*arguments[:config], f"profile={name}", *arguments[config:]]


def _slowest_first(profile: Profile, run: Path) -> list[str]:
    """What has the most work before it, itself included, comes first, so that no core waits for it at the end."""
    targets = {
        f"{run}/records/{run_name(name, **model)}.json": _minutes_with_needs(name) * SIZE_OF[model["arch"]]
        for name, notebook in NOTEBOOKS.items()
        for model in profile.planned(name)
        if model and not notebook.alone
    }
    return ["--prioritize", max(targets, key=lambda target: targets[target])]


def _minutes_with_needs(name: str) -> float:
    return NOTEBOOKS[name].minutes + max(map(_minutes_with_needs, NOTEBOOKS[name].needs), default=0)


def _snakemake(name: str, arguments: list[str]) -> int:
    os.environ[console.PROFILE] = name
    LoggerPluginRegistry().register_plugin("snakemake_logger_plugin_study", console)
    try:
        snakemake(arguments)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@contextmanager
def _watched(run: Path) -> Iterator[list[int]]:
    """Meanwhile, print what trainings announce (`progress.announce`) and keep the largest sum of memory, in bytes, of all processes."""
    announced = run / ".announced"
    announced.write_text("")
    os.environ[CONSOLE] = str(announced.resolve())
    peak, ended = [0], threading.Event()

    def watch() -> None:
        with open(announced) as lines:
            while not ended.wait(0.5):
                for line in lines:
                    print(f"            {line}", end="", flush=True)
                peak[0] = max(peak[0], _memory_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()
        with suppress(OSError):  # where nothing can be written any more
            announced.unlink()
        del os.environ[CONSOLE]


def _memory_bytes() -> int:
    me, total = psutil.Process(), 0
    for process in [me, *me.children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.Error:  # it has just ended
            continue
    return total


def _remove_float_exports(run: Path) -> None:
    """Float models for other runtimes are large, and `pipeline.ensure` makes them again in seconds when a notebook asks for them."""
    for suffix in FLOAT_EXPORTS:
        for file in (run / "weights").glob(f"*-fp32*{suffix}"):
            file.unlink()


def _closing_lines(run: Path, peak_bytes: int, minutes: float) -> None:
    """The headline of this run, which published findings hold here, what it took, and the page to open."""
    results = Results.open(run / "book" / "results")
    headline = tables.headline(results)
    if len(headline):
        columns = [column for column in headline if column in ("model", "path", "ms") or column.startswith("times")]
        print(tables.as_text(headline[columns]).to_string(index=False))
    found = claims.check(results)
    print("Published findings here:")
    for status in claims.STATUSES:
        ids = ", ".join(found.id[found.status == status]) or "none"
        print(
            textwrap.fill(
                ids, 110, initial_indent=f"  {status:13s} ", subsequent_indent=16 * " ", break_on_hyphens=False
            )
        )
    print(
        f"{minutes:.1f} minutes, at most {peak_bytes / 1e9:.1f} GB of memory; all that its notebooks printed: {run / 'study.log'}"
    )
    print(f"The study is done. Open {run / 'book' / '_build' / 'html' / 'index.html'}")


if __name__ == "__main__":
    try:
        sys.exit(run_study(sys.argv[1] if len(sys.argv) > 1 else "quick", sys.argv[2:]))
    except StudyError as error:
        sys.exit(f"study: {error}")
    except KeyboardInterrupt:
        sys.exit("study: interrupted. The same command goes on from here.")
