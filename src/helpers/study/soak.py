"""`make soak`: the smoke study, disturbed at random moments and started again. Does it end with the records of an undisturbed one?

Command line: python -m helpers.study.soak [KILLS]. Two clones of the checked-out commit run the study: one to its end at once,
the other one killed (20 times unless told otherwise), set beside a second study, without room on its disk, and with a run
directory that nobody may write. The exit code is not 0 when anything differs from what is promised.
"""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import psutil

from helpers.files import UNFINISHED, StudyError, read_arrays
from helpers.report.results import Results
from helpers.study.canary import clone_commit
from helpers.study.pipeline import WITH_PARENT
from helpers.train.weights import load_weights

PROFILE = "smoke"
RUN = Path("runs") / PROFILE
FOLDER = Path("runs/soak")
KILLS = 20
SEED = 0
DISK_MB = 2000  # of the disk that becomes full: the clone, all of its run, and room to spare
PATIENCE = 600  # seconds for a study to notice that it cannot write
ORPHANS_LIVE = 10  # seconds at most that a notebook outlives its study
STARTED = re.compile(r"^ *\d+ of (?P<jobs>\d+)  (?P<name>.+) \.\.\.$", re.MULTILINE)
FINISHED = re.compile(r"^ *\d+ of \d+  (?P<name>.+): [\d.]+ min\b", re.MULTILINE)
# What two runs on one machine may differ in. Values of `profile` are times, too, unless they count layers.
MEASURED = (
    "median_ms p90_ms p95_ms cv speedup speedup_low speedup_high export_seconds first_call_ms seconds images_per_second"
).split()


class Study:
    """The smoke study, running in a clone as a process group of its own; its console is a file in FOLDER."""

    _numbers = count()

    def __init__(self, clone: Path) -> None:
        """Start it. clone: a folder from `clone_commit`, which becomes its working folder and gives it its code."""
        self.console = FOLDER / f"console-{next(self._numbers)}.txt"
        environment = os.environ | {"PYTHONPATH": str((clone / "src").resolve())}
        with open(self.console, "w") as console:
            self.process = psutil.Popen(
                [*WITH_PARENT, sys.executable, "-m", "helpers.study.run", PROFILE],
                **{"cwd": clone, "env": environment, "stdout": console, "stderr": console, "start_new_session": True},
            )
        self.began = time.monotonic()

    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self.began

    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.poll() is None

    def notebooks(self) -> list[str]:
        """What it has started so far, as its console names it: notebooks with their models, and the book."""
        return [start["name"] for start in STARTED.finditer(self.console.read_text())]

    def finished(self) -> list[str]:
        """Those of `notebooks` that have ended."""
        return [end["name"] for end in FINISHED.finditer(self.console.read_text())]

    def resumed(self) -> str:
        """Where it went on: the first notebook that it started, and how many were left to do then."""
        first = STARTED.search(self.console.read_text())
        return f"{first['name']}, {first['jobs']} left" if first else "nothing yet"

    def wait(self, until: Callable[[], bool]) -> bool:
        """Wait until something is so or the study has ended; whether it is still running then."""
        while self.running() and not until():
            time.sleep(0.05)
        return self.running()

    def last_lines(self) -> str:
        """What its console said last."""
        return " / ".join(self.console.read_text().splitlines()[-3:])


@dataclass(frozen=True)
class Span:
    """When a notebook of the undisturbed study ran, in seconds after the study's start."""

    begin: float
    end: float = math.inf


@dataclass(frozen=True)
class Moment:
    """A moment of the undisturbed study: `at` seconds after its start, `after` seconds after that of `notebook` ("": before any)."""

    at: float
    notebook: str
    after: float


def undisturbed(clone: Path) -> dict[str, Span]:
    """Run the study to its end: when each notebook ran, in the order of their starts. Raises StudyError when it stops."""
    study, spans = Study(clone), {}

    def look() -> bool:
        for name in study.notebooks():
            spans.setdefault(name, Span(study.seconds()))
        for name in spans.keys() & {*study.finished()}:
            spans[name] = replace(spans[name], end=min(spans[name].end, study.seconds()))
        return False

    study.wait(look)
    look()
    if study.process.returncode:
        raise StudyError(f"The undisturbed study stopped, see {study.console}: {study.last_lines()}")
    return spans


def moments(spans: Mapping[str, Span], number: int, rng: np.random.Generator) -> list[Moment]:
    """Random moments of the undisturbed study, in order: one in each of `number` equal parts, so that they are all over it.

    The parts reach to the middle of what ran last: the disturbed study may be faster, and none is to come after its end.
    Two notebooks may run at once; a moment belongs to the one that began first, because that one lasts when the study goes on.
    """
    drawn, last = [], [*spans.values()][-1]
    for part in range(number):
        at = float(rng.uniform(part, part + 1)) * (last.begin + last.end) / 2 / number
        begun = [name for name, span in spans.items() if span.begin <= at]
        running = [name for name in begun if at < spans[name].end]
        notebook = [*begun[-1:], *running[:1]][-1] if begun else ""
        drawn.append(Moment(at, notebook, at - spans[notebook].begin if notebook else at))
    return drawn


def wait_for(study: Study, moment: Moment, spans: Mapping[str, Span]) -> bool:
    """Wait until the moment's notebook has run as long, or one that needs it begins; whether the study is still running then."""
    if moment.notebook:
        names, end = [*spans], spans[moment.notebook].end
        later = {*names[names.index(moment.notebook) :]}
        next_ones = {name for name in names if spans[name].begin >= end}
    else:
        later, next_ones = set(), {*spans}
    study.wait(lambda: not later or bool(later & {*study.notebooks()}))
    since = time.monotonic()
    return study.wait(lambda: time.monotonic() - since >= moment.after or bool(next_ones & {*study.notebooks()}))


def kill(study: Study, group: bool) -> list[psutil.Process]:
    """SIGKILL the study, as a machine without memory does, or its process group; returns those of its children that are alive."""
    children = study.process.children(recursive=True)
    (os.killpg if group else os.kill)(study.process.pid, signal.SIGKILL)
    study.process.wait()
    return children


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A file system in memory at `folder`. Raises StudyError where this process may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise StudyError(f"No small disk can be mounted here ({done.stderr.strip()}); only root may, on Linux.")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """Leave no room on a `small_disk`."""
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as file:
        for size in (2**20, 2**12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Let nobody write in `folder` and its folders. Root may write anywhere, so for root they become immutable."""
    no, yes = (("chattr", "+i"), ("chattr", "-i")) if os.geteuid() == 0 else (("chmod", "a-w"), ("chmod", "u+w"))
    folders = [str(path) for path in [folder, *folder.rglob("*")] if path.is_dir() and UNFINISHED not in str(path)]
    subprocess.run([*no, *folders], check=True)
    try:
        yield
    finally:
        subprocess.run([*yes, *folders], check=True)


def stops_with_a_sentence(study: Study) -> str:
    """Wait for a study that can no longer write; returns what is wrong with how it ended, "" if it is as promised."""
    since = time.monotonic()
    study.wait(lambda: time.monotonic() - since > PATIENCE)
    said = study.console.read_text()
    if study.running():
        kill(study, group=True)
        return f"did not stop in {PATIENCE} s"
    if not study.process.returncode:
        return "ended as if all were well"
    if "could not be written (" not in said or "Traceback" in said:
        return f"ended without a sentence, or with more, see {study.console}"
    return ""


def second_study(study: Study, clone: Path) -> str:
    """Start another study beside one that is running; returns what is wrong with how it is refused, "" if it is as promised."""
    second = Study(clone)
    second.wait(lambda: second.seconds() > PATIENCE)
    said = second.console.read_text().splitlines()
    if second.running():
        kill(second, group=True)
        return "two studies ran at once"
    if len(said) != 1 or "Another study is running" not in said[0] or not second.process.returncode:
        return f"the second study did not end with its sentence, see {second.console}"
    return "" if study.running() else "the first study ended with the second one"


def disturbed(
    clone: Path, spans: Mapping[str, Span], kinds: Sequence[tuple[str, Moment]], rng: np.random.Generator
) -> pd.DataFrame:
    """Run the study through all disturbances, then to its end.

    kinds: what happens when, in order; killed, second study, full disk or read-only. Returns a line for each: the moment (`at`, seconds of the
    undisturbed study), the notebook that ran, what happened, where the study went on, and what was wrong ("": nothing).
    """
    lines: list[dict[str, object]] = []
    study, children = Study(clone), []
    for kind, moment in kinds:
        running = wait_for(study, moment, spans)
        notebooks = study.notebooks()
        line = {"at": moment.at, "running": notebooks[-1] if notebooks else "", "happened": kind, "wrong": ""}
        if not running:
            line |= {
                "happened": "nothing",
                "wrong": f"it had ended before it could be {kind}; start again on an idle machine",
            }
        elif kind == "killed":
            group = bool(rng.integers(2))
            line["happened"] += ", with its group" if group else ", alone"
            children = kill(study, group)
        elif kind == "second study":
            line["wrong"] = second_study(study, clone)
        else:
            with full(clone) if kind == "full disk" else read_only(clone / RUN):
                line["wrong"] = stops_with_a_sentence(study)
        if not study.running():
            study = Study(clone)
            _, alive = psutil.wait_procs(children, timeout=ORPHANS_LIVE)
            for process in alive:
                process.kill()
                line["wrong"] = f"{len(alive)} processes lived on for more than {ORPHANS_LIVE} s"
            children = []
        lines.append(line | {"study": study})
        print(f"{moment.at:6.1f} s  {line['running'] or 'before the first notebook'}: {line['happened']}", flush=True)
    study.wait(lambda: False)
    if study.process.returncode:
        lines[-1]["wrong"] = f"the study stopped for good, see {study.console}: {study.last_lines()}"
    return pd.DataFrame([line | {"went on": line["study"].resumed()} for line in lines]).drop(columns="study")


def differences(undisturbed: Path, disturbed: Path) -> list[str]:
    """What differs between two finished run directories that must not, a sentence each.

    Equal are the files, all columns of the tables but MEASURED, all that is recorded of a run but its date, the predictions, and
    the weights.
    """
    found = [f"{file} is in one of them only" for file in sorted(_files(undisturbed) ^ _files(disturbed))]
    one, other = (Results.open(run / "book" / "results") for run in (undisturbed, disturbed))
    for table, frame in one.tables.items():
        if not _comparable(frame).equals(_comparable(other.tables[table])):
            found.append(f"the table {table} differs")
    for run_id, run in one.runs.items():
        if run | {"date": ""} != other.runs.get(run_id, {}) | {"date": ""}:
            found.append(f"{run_id} is recorded otherwise")
    for path in sorted((undisturbed / "records").glob("*.npz")):
        arrays, others = read_arrays(path), read_arrays(disturbed / "records" / path.name)
        same = {*arrays} == {*others} and all(
            arrays[name].dtype == float or np.array_equal(arrays[name], others[name]) for name in arrays
        )
        if not same:
            found.append(f"{path.name} has other predictions")
    for path in sorted((undisturbed / "weights").glob("*.safetensors")):
        (state, facts), (others, other_facts) = load_weights(path), load_weights(disturbed / "weights" / path.name)
        if facts != other_facts or any(not state[name].equal(others[name]) for name in state.keys() | others.keys()):
            found.append(f"{path.name} has other weights")
    return found


def _comparable(table: pd.DataFrame) -> pd.DataFrame:
    kept = table.drop(columns=[column for column in MEASURED if column in table])
    return kept.assign(value=kept.value.where(kept.unit == "count")) if "unit" in kept else kept


def _files(run: Path) -> set[str]:
    """Names of the files of a run, but for pictures of the book, which are named after their content."""
    every = {path.relative_to(run) for path in run.rglob("*") if path.is_file()}
    return {str(path) for path in every if "_build" not in path.parts or path.suffix == ".html"}


def soak(kills: int = KILLS, seed: int = SEED) -> list[str]:
    """Run both studies, print what happened to the disturbed one, and return what is wrong, a sentence each."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    calm, clone = FOLDER / "undisturbed", FOLDER / "disturbed"
    rng = np.random.default_rng(seed)
    kinds = [*["killed"] * kills, "second study", "read-only"]
    with ExitStack() as stack:
        try:
            stack.enter_context(small_disk(clone, DISK_MB))
            kinds.append("full disk")
        except StudyError as error:
            print(f"Without a full disk: {error}", flush=True)
        for folder in (calm, clone):
            clone_commit(folder)
        spans = undisturbed(calm)
        print(f"Undisturbed: {len(spans)} notebooks and pages in {[*spans.values()][-1].end:.0f} s", flush=True)
        happens = [*zip(rng.permutation(kinds).tolist(), moments(spans, len(kinds), rng), strict=True)]
        table = disturbed(clone, spans, happens, rng)
        print(table.round(1).to_string(index=False))
        wrong = [f"{line.running}, {line.happened}: {line.wrong}" for line in table.itertuples() if line.wrong]
        finished = (clone / RUN / "book" / "results" / "runs.json").exists()
        wrong += differences(calm / RUN, clone / RUN) if finished else ["the disturbed study never ended"]
        if wrong:
            shutil.copytree(clone / RUN, FOLDER / "evidence")
    return wrong


def _command(arguments: list[str]) -> int:
    match arguments:
        case []:
            kills = KILLS
        case [number] if number.isdecimal():
            kills = int(number)
        case other:
            raise StudyError(
                f"{other} is given; allowed is nothing, or how often to kill the study, as a whole number."
            )
    wrong = soak(kills)
    print("\n".join(wrong) if wrong else "Equal: the disturbed study ended with the records of the undisturbed one.")
    return int(bool(wrong))


if __name__ == "__main__":
    try:
        sys.exit(_command(sys.argv[1:]))
    except StudyError as error:
        sys.exit(f"soak: {error}")
