"""`make canary`: the smoke study on the newest packages beside the pinned ones. What died, answers otherwise, or left INT8?

Command line: python -m helpers.study.canary makes both runs and compares them; python -m helpers.study.canary PINNED NEWEST
compares two run directories. The exit code is not 0 when a row died.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from helpers.files import StudyError, whole_file
from helpers.report.records import gather, runs_of
from helpers.report.results import ROW, NotMeasured, Results, Row
from helpers.report.schema import COLUMNS, RANDOM, arm_facts
from helpers.report.tables import as_text, model_label, path_label
from helpers.study.console import last_lines

PROFILE = "smoke_full"
FOLDER = Path("runs/canary")
PAGE = Path(".github/canary.md")  # its sentences; {versions}, {counts} and {rows} become tables
FILE = ("arch", "recipe", "arm", "runtime")  # what names a row where kernels do not matter
STATUSES = ("died", "left INT8", "answers changed", "new", "same")  # the first that applies, the worst first


def compare(pinned: Path, newest: Path) -> pd.DataFrame:
    """What became of each row that was scored or timed in either of two run directories, the worst first.

    A notebook that left no record is a line, too: its run_id stands as the path. Columns: model, path, status (of STATUSES);
    answers changed of n test images, over the seeds that both have; the share of layers that ran in INT8, in percent, where it was recorded (NaN elsewhere); the reason why a row died. A run that stopped
    early is compared as far as it came. Raises StudyError when `pinned` has no records, or records are damaged.
    """
    with TemporaryDirectory() as folder:
        if not _has_records(pinned):
            raise StudyError(f"There are no records in {pinned}; run the study there first.")
        before, after = (_results(run, Path(folder) / name) for run, name in ((pinned, "pinned"), (newest, "newest")))
        rows = pd.concat([before.rows, after.rows])[ROW].drop_duplicates().sort_values(ROW).to_dict("records")
        lines = [_compared(row, before, after, newest) for row in rows]
        lines += [
            {"model": "", "path": run_id, "status": "died", "reason": _stopped(run_id, newest)}
            for run_id in sorted(before.runs.keys() - after.runs.keys())
        ]
    frame = pd.DataFrame(lines).fillna({"answers changed": 0, "n": 0}).astype({"answers changed": int, "n": int})
    return frame.sort_values("status", key=lambda of: of.map(STATUSES.index), kind="stable").reset_index(drop=True)


def _has_records(run: Path) -> bool:
    return any((run / "records").glob("*.json"))


def _results(run: Path, folder: Path) -> Results:
    if not _has_records(run):
        return Results(run, {table: pd.DataFrame(columns=columns) for table, columns in COLUMNS.items()}, {})
    gather(str(run), folder)
    return Results.open(folder)


def _matching(of: pd.DataFrame, row: Row, keys: Sequence[str] = ROW) -> pd.DataFrame:
    """The lines of a table that agree with `row` in `keys`."""
    return of[(of[[*keys]] == [row[key] for key in keys]).all(axis=1)]


def _compared(row: Row, before: Results, after: Results, newest: Path) -> dict[str, object]:
    """A line of `compare`."""
    was, there = (
        {table for table, of in (("scores", r.scores), ("latency", r.tables["latency"])) if len(_matching(of, row))}
        for r in (before, after)
    )
    changed, n = _changed_answers(row, before, after)
    int8 = [_int8_percent(row, results) for results in (before, after)]
    applies = {
        "died": bool(was - there),
        "left INT8": int8[1] < int8[0],
        "answers changed": changed > 0,
        "new": not was,
        "same": True,
    }
    return {
        "model": model_label(row["arch"], "random weights" if row["recipe"] == RANDOM else ""),
        "path": path_label(row),
        "status": next(status for status in STATUSES if applies[status]),
        "answers changed": changed,
        "n": n,
        "INT8 layers before, %": int8[0],
        "INT8 layers now, %": int8[1],
        "reason": _reason(row, before, after, newest) if applies["died"] else "",
    }


def _changed_answers(row: Row, before: Results, after: Results) -> tuple[int, int]:
    """How many test images get another class, and of how many; 0 of 0 where one run kept no answers."""
    try:
        pairs = before.classes(row), after.classes(row)
    except NotMeasured:
        return 0, 0
    seeds = [seed for seed in pairs[0] if seed in pairs[1] and len(pairs[0][seed]) == len(pairs[1][seed])]
    return sum(int((pairs[0][s] != pairs[1][s]).sum()) for s in seeds), sum(len(pairs[0][s]) for s in seeds)


def _int8_percent(row: Row, results: Results) -> float:
    """The share of an INT8 row's convolutions and matrix products that its runtime executed in INT8; NaN if it was not recorded."""
    of = _matching(results.tables["profile"], {**row, "check": "executed layers"}, [*FILE, "check"])
    if of.empty or not arm_facts(row["arm"]).int8:
        return float("nan")
    return 100 * float(of.value[of.setting.str.endswith("int8")].sum() / of.value.sum())


def _reason(row: Row, before: Results, after: Results, newest: Path) -> str:
    """Why a row died: what its export was refused with, else what stopped its notebook, else which notebook left it out."""
    refused = [reason for reason in _matching(after.tables["exports"], row, FILE).reason if reason]
    made_by = [run_id for run_ids in _matching(before.rows, row).run_ids for run_id in run_ids]
    stopped = [_stopped(run_id, newest) for run_id in made_by if run_id not in after.runs]
    return [*refused, *stopped, f"{made_by[0]} has no such row"][0]


def _stopped(run_id: str, run: Path) -> str:
    """Why a notebook left no record: the last line of its failed cell, or that it was not run."""
    return [f"{run_id} was not run", *last_lines(run / "notebooks" / f"{run_id}.ipynb")][-1]


def versions(pinned: Path, newest: Path) -> pd.DataFrame:
    """Version of each package in the two runs, and the date of their last records."""
    found = {}
    for name, run in (("pinned", pinned), ("newest", newest)):
        runs = runs_of(str(run)).values() if _has_records(run) else ()
        last = max(runs, key=lambda of: of["date"], default={"date": "", "versions": {}})
        found[name] = {"date": last["date"]} | last["versions"]
    return pd.DataFrame(found).fillna("").rename_axis("package").reset_index()


def report(pinned: Path, newest: Path) -> pd.DataFrame:
    """Compare two runs; write FOLDER/canary.csv (every row) and canary.md (PAGE with its tables). Returns `compare`'s table."""
    table = compare(pinned, newest)
    counts = table.status.value_counts().reindex(STATUSES, fill_value=0).rename_axis("status").reset_index(name="rows")
    tables = {
        "versions": versions(pinned, newest),
        "counts": counts,
        "rows": as_text(table[table.status != "same"]),
    }
    text = {name: frame.to_markdown(index=False, disable_numparse=True) for name, frame in tables.items()}
    with whole_file(FOLDER / "canary.csv") as aside:
        table.to_csv(aside, index=False)
    with whole_file(FOLDER / "canary.md") as aside:
        aside.write_text(PAGE.read_text().format(**text))
    return table


def run_pinned() -> Path:
    """The smoke study in this environment, which has the versions of constraints.txt. Returns its run directory."""
    if subprocess.run([sys.executable, "-m", "helpers.study.run", PROFILE]).returncode:
        raise StudyError("The smoke study stopped with the pinned versions (see above); mend that first.")
    return Path("runs") / PROFILE


def clone_commit(folder: Path) -> None:
    """Clone the checked-out commit into `folder`, which is empty or missing."""
    subprocess.run(["git", "clone", "--quiet", ".", str(folder)], check=True)


def run_newest(clone: Path = FOLDER / "newest") -> Path:
    """The smoke study in a clone of the checked-out commit whose constraints are empty; it may stop. Returns its run directory.

    Raises StudyError when the newest packages cannot be installed.
    """
    shutil.rmtree(clone, ignore_errors=True)
    clone_commit(clone)
    (clone / "constraints.txt").write_text("")
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")}
    subprocess.run(["make", "study", f"PROFILE={PROFILE}", f"PYTHON={sys.executable}"], cwd=clone, env=environment)
    if not (clone / ".venv" / "bin" / "installed").exists():
        raise StudyError("The newest packages could not be installed (see above).")
    return clone / "runs" / PROFILE


def _command(arguments: list[str]) -> int:
    match arguments:
        case []:
            runs = run_pinned(), run_newest()
        case [pinned, newest]:
            runs = Path(pinned), Path(newest)
        case other:
            raise StudyError(f"{other} is given; allowed are nothing, and the run directories PINNED NEWEST.")
    died = (report(*runs).status == "died").any()
    print((FOLDER / "canary.md").read_text())
    return int(died)


if __name__ == "__main__":
    try:
        sys.exit(_command(sys.argv[1:]))
    except StudyError as error:
        sys.exit(f"canary: {error}")
