"""The contract with every reader of the results: one JSON per run_id, gathered into CSV files."""

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from helpers.files import UNSEALED, StudyError, check_whole, refused, seal, whole_file
from helpers.machine import machine_facts
from helpers.report.results import Results, check_run, read_runs
from helpers.report.schema import COLUMNS

# What a row is, if it does not say so: of the first training of its seed, timed call after call on images of 32x32 pixels.
ASSUMED: dict[str, dict[str, Any]] = {"accuracy": {"training": 0}, "latency": {"size": 32, "pace": "hot"}}


def _complete(table: str, row: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """A row with what it may leave out: ASSUMED, and of a size the recipe and seed of its run."""
    own = {key: run["parameters"][key] for key in ("recipe", "seed") if key in run["parameters"]}
    return ASSUMED.get(table, {}) | (own if table == "size" else {}) | dict(row)


def commit() -> str:
    """The commit checked out in the working folder, `-dirty` when a tracked file differs from it, `unknown` outside or without git.

    Every notebook works from the top folder of the study, also where the package itself is installed elsewhere.
    """
    if not shutil.which("git"):
        return "unknown"
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return "unknown"
    changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True)
    return head.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def save_record(
    run_dir: str,
    run_id: str,
    parameters: Mapping[str, Any],
    data: tuple[str, str] | None,
    rows: Mapping[str, list[dict[str, Any]]],
    predictions: Mapping[str, np.ndarray] | None = None,
    times: Mapping[str, np.ndarray] | None = None,
    trained_on: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write what one run found: `run_dir`/records/`run_id`.json and, with `predictions` or `times`, the .npz beside it.

    data: name and sha256 of the data set. rows: table name -> rows with the columns of COLUMNS but run_id, which is added.
    predictions: see `prediction_key`; uint8 [n], the predicted class of each test image (01_train adds `truth`).
    times: see `times_key`; milliseconds of each round behind a row of latency, float64 [rounds], paired by round.
    trained_on: the machines that trained, see `training.trained_on`: it may have gone on from another one's checkpoint. A row
    may leave out what ASSUMED says, and one of a size its recipe and seed. The JSON is written last and whole, so a record
    that exists is complete. Raises ValueError for a row whose columns differ from the contract.
    """
    run = {
        "notebook": run_id.split("-")[0],
        "parameters": dict(parameters),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": {"name": data[0], "sha256": data[1]} if data else None,
        **machine_facts(),
    }
    if trained_on:
        run["trained_on"] = [dict(machine) for machine in trained_on]
    tables = {
        table: [_complete(table, row, run) | {"run_id": run_id} for row in found] for table, found in rows.items()
    }
    for table, found in tables.items():
        for row in found:
            if set(row) != set(COLUMNS[table]):
                raise ValueError(f"{table} row has {sorted(set(row) ^ set(COLUMNS[table]))} too many or too few")
    path = Path(run_dir) / "records" / f"{run_id}.json"
    if predictions or times:
        with whole_file(path.with_suffix(".npz")) as aside:
            np.savez_compressed(aside, **(predictions or {}), **(times or {}))
    write_record(path, {"run_id": run_id, "run": run, "tables": tables})


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record: run_id, run (how it came to be) and tables (name -> rows)."""
    with whole_file(path) as aside:
        aside.write_text(json.dumps(record | UNSEALED, indent=1, sort_keys=True))
        seal(aside)


def read_record(path: Path) -> dict[str, Any]:
    """Read what `write_record` wrote. Raises StudyError when it, or the .npz beside it, is damaged, and when it is missing."""
    again = "delete it and run its notebook again"
    for file in (path, path.with_suffix(".npz")):
        if file == path or file.exists():
            check_whole(file)
    with refused(f"{path} is damaged; {again}"):
        record = {key: value for key, value in json.loads(path.read_text()).items() if key not in UNSEALED}
        check_run(record["run_id"], record["run"])
        if {*record} != {"run_id", "run", "tables"} or not {*record["tables"]} <= {*COLUMNS}:
            raise StudyError(f"{path} is no record of this study; {again}.")
    return record


def record_rows(run_dir: str, run_id: str, table: str) -> list[dict[str, Any]]:
    """The rows of one table of one record; none if the run has not been made."""
    path = Path(run_dir) / "records" / f"{run_id}.json"
    return read_record(path)["tables"].get(table, []) if path.exists() else []


def runs_of(run_dir: str, results: Path | None = None) -> dict[str, Any]:
    """How each run came to be, by run_id: those with a record in `run_dir`, and those that `results` has of others.

    Raises StudyError when there are no records, and when one is damaged.
    """
    before = read_runs(results) if results is not None and (results / "runs.json").exists() else {}
    return before | {record["run_id"]: record["run"] for record in _records(run_dir)}


def _records(run_dir: str) -> Iterator[dict[str, Any]]:
    paths = sorted((Path(run_dir) / "records").glob("*.json"))
    if not paths:
        raise StudyError(f"There are no records in {run_dir}; run the notebooks 01 to 06 with this run_dir first.")
    yield from map(read_record, paths)


def gather(run_dir: str, results: Path, keep: bool = False) -> None:
    """Collect `run_dir`/records into `results`: a CSV for each table, runs.json and predictions/ (times, too).

    keep: leave what `results` has of other runs, so that a study which took several machines or days comes together.
    Rows are sorted, so the same records give the same files. Raises StudyError when there are no records, when one is
    damaged, and when one would replace a kept run of other data or parameters.
    """
    tables: dict[str, list[dict[str, Any]]] = {table: [] for table in COLUMNS}
    runs: dict[str, Any] = {}
    for record in _records(run_dir):
        runs[record["run_id"]] = record["run"]
        for table, rows in record["tables"].items():
            tables[table] += [_complete(table, row, record["run"]) for row in rows]
    if keep and (results / "runs.json").exists():
        before = read_runs(results)
        _no_other_experiment(before, runs)
        for table, frame in Results.open(results).tables.items():
            tables[table] += frame[~frame.run_id.isin(runs)].to_dict("records")
        runs = before | runs
    for path in (Path(run_dir) / "records").glob("*.npz"):
        if path.with_suffix(".json").exists():
            with whole_file(results / "predictions" / path.name) as aside:
                aside.write_bytes(path.read_bytes())
    for table, rows in tables.items():
        keys = [column for column in COLUMNS[table] if column not in ("accuracy", "median_ms")]
        frame = pd.DataFrame(rows, columns=COLUMNS[table]).sort_values(keys, kind="stable", key=_as_read)
        if "n" in frame:
            frame = frame.astype({"n": "Int64"})  # a count, also where a row of exports has none
        with whole_file(results / f"{table}.csv") as aside:
            frame.to_csv(aside, index=False)
    with whole_file(results / "runs.json") as aside:
        aside.write_text(json.dumps(runs, indent=1, sort_keys=True))


def _as_read(column: pd.Series) -> pd.Series:
    """A column to sort by: a record says True, a table that was read "True"."""
    return column.astype(str) if column.dtype == object else column


def _no_other_experiment(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise StudyError if a run would replace one of the same name that had other data or parameters."""
    places = ("run_dir", "data_dir")
    for run_id in sorted(before.keys() & now.keys()):
        facts = [
            {"data": run["data"]} | {key: value for key, value in run["parameters"].items() if key not in places}
            for run in (before[run_id], now[run_id])
        ]
        different = [key for key in facts[0] | facts[1] if facts[0].get(key) != facts[1].get(key)]
        if different:
            raise StudyError(
                f"{run_id} is there already with another {', '.join(different)}; publish a run of the same profile, or remove "
                "the results it would replace."
            )
