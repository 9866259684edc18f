"""`make machine`: time this CPU with random weights and add it to the published results as one more machine.

Command line: python -m helpers.study.this_machine
"""

import json
import re
import shutil
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import papermill

from helpers.files import StudyError, check_writable
from helpers.machine import machine_name
from helpers.report.records import read_record, write_record
from helpers.report.results import Results, read_runs
from helpers.report.tables import as_text, machines
from helpers.study.pipeline import collect

RUN = Path("runs/machine")
RESULTS = Path("book/results")
# What is timed, and with which parameters: always the same, so that machines compare.
TIMED: dict[str, dict[str, Any]] = {
    "18_this_machine": {"threads": [2]},
    "08_carry_over": {"archs": ["resnet18", "resnet50"], "threads": [2], "idle_ms": [0, 10]},
}


def time_this_machine(run: Path = RUN) -> None:
    """Run the notebooks of TIMED into `run`, where nothing of an earlier time is left."""
    shutil.rmtree(run, ignore_errors=True)
    check_writable(run / "notebooks")
    for notebook, parameters in TIMED.items():
        print(f"{notebook} ...", flush=True)
        started = time.monotonic()
        executed = run / "notebooks" / f"{notebook}.ipynb"
        values = parameters | {"run_dir": str(run)}
        papermill.execute_notebook(f"notebooks/{notebook}.ipynb", executed, values, progress_bar=False)
        print(f"{notebook}: {(time.monotonic() - started) / 60:.1f} min", flush=True)


def add_machine(run: Path = RUN, results: Path = RESULTS) -> str:
    """Add the records of `run` to `results` under run_ids that name their machine, in the place of earlier ones of the same.

    Rows of other run_ids stay as they are. `results` changes once all is gathered. Returns the name of the machine. Raises
    StudyError without records.
    """
    with TemporaryDirectory() as folder:
        named, aside = Path(folder) / "run", Path(folder) / "results"
        shutil.copytree(results, aside)
        names = {_named_after_machine(path, named / "records") for path in sorted((run / "records").glob("*.json"))}
        replaced = {path.stem for path in (named / "records").glob("*.json")}
        kept = {run_id: facts for run_id, facts in read_runs(aside).items() if run_id not in replaced}
        (aside / "runs.json").write_text(json.dumps(kept))
        collect(str(named), aside, keep=True)
        shutil.copytree(aside, results, dirs_exist_ok=True)
    return ", ".join(sorted(names))


def _named_after_machine(path: Path, target: Path) -> str:
    """Copy a record, and its arrays, into `target` under the run_id of its machine; returns the machine's name."""
    record = read_record(path)
    machine = machine_name(record["run"])
    words = re.sub(r"\((r|tm)\)|processor|cores?", "", machine.lower())
    run_id = "-".join([record["run_id"], *re.findall(r"\w+", words)])
    record["run_id"] = run_id
    for row in (row for rows in record["tables"].values() for row in rows):
        row["run_id"] = run_id
    write_record(target / f"{run_id}.json", record)
    shutil.copy(path.with_suffix(".npz"), target / f"{run_id}.npz")
    return machine


if __name__ == "__main__":
    try:
        time_this_machine()
        machine = add_machine()
        table = machines(Results.open(RESULTS))
        print(as_text(table[table.machine == machine].drop(columns=["instructions", "machine"])).to_string(index=False))
        print(f"{RESULTS} has the rows of {machine}; `make book` builds the page that sets all machines side by side.")
    except StudyError as error:
        sys.exit(f"machine: {error}")
    except papermill.PapermillExecutionError as error:
        sys.exit(f"machine: {str(error).strip().splitlines()[-1]}")
