"""`make study`: check everything, lock the run directory, let Snakemake run the notebooks, say where the book is.

Command line: python -m helpers.study PROFILE [arguments for snakemake].
"""

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

from helpers.data import check_available
from helpers.files import StudyError, check_writable
from helpers.parameters import LEFT_OUT, load_profile
from helpers.quantization import NO_LEGACY

SNAKEMAKE = [
    *("--cores", str(os.cpu_count() or 1), "--quiet", "host", "reason", "--keep-going"),
    # Locking is done here: the files of Snakemake's own lock outlive a kill -9. Half-made outputs cannot exist (files appear whole).
    *("--nolock", "--rerun-incomplete", "--rerun-triggers", "mtime", "params"),
]


def _wait(snakemake: subprocess.Popen) -> int:
    """The exit code of Snakemake, for which an interrupted study waits too: the lock holds until its notebooks have stopped."""
    try:
        return snakemake.wait()
    except KeyboardInterrupt:
        snakemake.wait()
        raise


def run_study(name: str, arguments: list[str]) -> int:
    """Run the profile called `name`; returns Snakemake's exit code, 0 when the book is there.

    Raises StudyError before any work starts for a bad profile, missing data, a run directory that cannot be written, or
    one that another study is working in.
    """
    profile = load_profile(name)
    check_available(profile.common.get("data", "digits"), profile.common.get("data_dir", ""))
    run = Path("runs") / name
    check_writable(run)
    if LEFT_OUT:
        print(f"{NO_LEGACY} Notebooks left out: {', '.join(LEFT_OUT)}.", flush=True)
    if "--config" not in arguments:
        arguments = [*arguments, "--config"]
    config = arguments.index("--config") + 1
    arguments = [*arguments[:config], f"profile={name}", *arguments[config:]]
    with open(run / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StudyError(f"Another study is running in {run}; wait for it, or choose another PROFILE.") from error
        started = time.time()
        # Snakemake holds the lock, too: it goes on if this process alone is killed.
        command = [sys.executable, "-m", "snakemake", *SNAKEMAKE, *arguments]
        code = _wait(subprocess.Popen(command, pass_fds=[lock.fileno()]))
    page = run / "book" / "_build" / "html" / "index.html"
    if code == 0 and page.exists():
        print(f"The study is done. Open {page}")
    elif code:
        for log in sorted((run / "notebooks").glob("*.ipynb")):
            if log.stat().st_mtime >= started and "papermill-error-cell-tag" in log.read_text():
                print(f"This notebook failed; it is kept with its traceback: {log}", file=sys.stderr)
        print("The study stopped. The same command goes on from here.", file=sys.stderr)
    return code


if __name__ == "__main__":
    try:
        sys.exit(run_study(sys.argv[1] if len(sys.argv) > 1 else "quick", sys.argv[2:]))
    except StudyError as error:
        sys.exit(f"study: {error}")
    except KeyboardInterrupt:
        sys.exit("study: interrupted. The same command goes on from here.")
