import shutil

import numpy as np
import pytest

from helpers.files import StudyError
from helpers.machine import machine_facts, machine_name
from helpers.report import tables
from helpers.report.records import save_record
from helpers.report.results import Results
from helpers.report.schema import times_key
from helpers.study.this_machine import RESULTS, add_machine

FOUND = {"p90_ms": 9.0, "p95_ms": 9.0, "cv": 0.1, "speedup_low": 1.0, "speedup_high": 3.0, "rounds": 3}


def timed(run, notebook, ms, **more):
    """A record of eager FP32 and of OpenVINO's INT8, as notebooks 8 and 18 leave it on this machine."""
    rows, times = [], {}
    for arm, runtime, median in (("fp32", "eager", 2 * ms), ("ptq_nncf", "openvino", ms)):
        row = {"arch": "resnet34", "recipe": "random", "arm": arm, "runtime": runtime, "engine": "", "threads": 2}
        row |= {"batch": 1, "size": 32, "pace": "hot", "median_ms": median, "speedup": 2 * ms / median, **FOUND} | more
        rows.append(row | {"machine": machine_name(machine_facts())})
        times[times_key(row)] = np.full(3, median)
    save_record(str(run), notebook, {}, None, {"latency": rows}, times=times)


@pytest.fixture
def added(tmp_path, monkeypatch):
    """(folder of results, function that adds this machine to it with other milliseconds); its CPU is one that is not published."""
    cpu = {"brand_raw": "Unheard-of CPU", "flags": ["avx2"], "arch_string_raw": "x86_64"}
    monkeypatch.setattr("helpers.machine._cpu_info", lambda: cpu)
    results = tmp_path / "results"
    shutil.copytree(RESULTS, results)

    def add(ms):
        run = tmp_path / f"run{ms}"
        timed(run, "18_this_machine", ms)
        timed(run, "08_carry_over", ms, size=224)
        return add_machine(run, results)

    return results, add


def test_this_machine_joins_the_published_results_and_nothing_else_changes(added):
    folder, add = added
    before, files = Results.open(folder), {path: path.read_bytes() for path in folder.glob("*.csv")}
    assert add(4.0) == machine_name(machine_facts())
    after = Results.open(folder)
    assert {path for path in files if path.read_bytes() != files[path]} == {folder / "latency.csv"}
    lines = (folder / "latency.csv").read_text().splitlines()
    assert {*files[folder / "latency.csv"].decode().splitlines()} < {*lines}
    assert after.machine == before.machine and after.benchmark.equals(before.benchmark)
    assert tables.first_screen(after).equals(tables.first_screen(before)) and len(tables.first_screen(after))
    here = [run_id for run_id in after.runs if run_id not in before.runs]
    assert len(here) == 2 and all((folder / "predictions" / f"{run_id}.npz").exists() for run_id in here)
    for table in (tables.machines(after), tables.machines_by_size(after)):
        assert machine_name(machine_facts()) in {*table[table.model == "ResNet34"].machine}
        column = tables.side_by_side(table).query("model == 'ResNet34'").set_index("path")["AVX2, Unheard-of CPU"]
        assert column["PyTorch: FP32"] == "8.00 ms" and column["OpenVINO: INT8 (NNCF)"] == "2.0 [1.0,\u00a03.0]"
    assert set(tables.machines(after).instructions) <= {
        "AMX",
        "AVX-512 VNNI",
        "AVX-VNNI",
        "AVX-512",
        "AVX2",
        "Arm I8MM",
        "Arm NEON",
    }


def test_the_same_machine_again_takes_the_place_of_its_earlier_rows(added):
    folder, add = added
    add(4.0)
    first = Results.open(folder)
    add(8.0)
    second = Results.open(folder)
    assert {*first.runs} == {*second.runs} and len(first.tables["latency"]) == len(second.tables["latency"])
    mine = second.tables["latency"].query("run_id.str.startswith('18_this_machine-unheard')", engine="python")
    assert sorted(mine.median_ms) == [8.0, 16.0]


def test_without_records_the_published_results_stay_as_they_are(added, tmp_path):
    folder, _ = added
    before = (folder / "latency.csv").read_bytes()
    with pytest.raises(StudyError, match="no records"):
        add_machine(tmp_path / "nothing", folder)
    assert (folder / "latency.csv").read_bytes() == before
