import json
import os
import re
import shutil
import subprocess
import sys
import time

import nbformat
import pytest
import torch
from conftest import ROOT, papermill, run

from helpers.quantize.arms import ENGINES
from helpers.report.results import Results
from helpers.serve.runtimes import RUNTIMES
from helpers.study.pipeline import NOTEBOOKS
from helpers.study.repository import repository_url, rewrite

SOURCES = {name: nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4) for name in NOTEBOOKS}


def cells(name, tag):
    return [cell for cell in SOURCES[name].cells if tag in cell.metadata.get("tags", [])]


def test_notebooks_are_the_numbered_ones_and_carry_no_outputs():
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == list(NOTEBOOKS)
    for name, notebook in SOURCES.items():
        for cell in notebook.cells:
            assert cell.cell_type == "markdown" or (not cell.outputs and cell.execution_count is None), name


def test_every_notebook_has_the_same_setup_one_parameters_cell_and_a_badge_of_its_own():
    url = repository_url(ROOT)
    assert len({cells(name, "setup")[0].source for name in NOTEBOOKS}) == 1
    assert url in cells("01_train", "setup")[0].source
    for name in NOTEBOOKS:
        assert len(cells(name, "parameters")) == 1, name
        for line in cells(name, "parameters")[0].source.splitlines():
            assert re.fullmatch(r"\w+: (int|str|list|bool|float) = .+  # .+", line), (name, line)
        owner = url.removeprefix("https://github.com/")
        assert (
            f"colab.research.google.com/github/{owner}/blob/main/notebooks/{name}.ipynb"
            in SOURCES[name].cells[0].source
        )


def test_the_whole_study_runs_and_its_tables_are_complete(smoke):
    tables = Results.open(smoke / "book" / "results").tables
    accuracy, latency = tables["accuracy"], tables["latency"]
    explained = set(re.findall(r"`(\w+)`", (ROOT / "book" / "methods.md").read_text()))
    assert {"fp32", "ptq", "qat", *accuracy.arm} <= explained and {*accuracy.runtime} <= explained
    exports = tables["exports"]
    refused = set(exports[exports.reason != ""][["arm", "runtime"]].itertuples(index=False, name=None))
    wanted = {("fp32", runtime) for runtime in RUNTIMES} | {
        ("ptq_longer_trimmed", "openvino"),
        ("qat_nncf", "openvino"),
    }
    wanted |= {(f"{how}_pt2e", runtime) for how in ("ptq", "qat") for runtime in PT2E_RUNTIMES}
    assert wanted - refused <= set(accuracy[["arm", "runtime"]].itertuples(index=False, name=None))
    assert {row for row in refused if not _may_be_refused(*row)} == set()
    trained = latency[latency.recipe != "random"]
    assert set(trained.engine) == {"", *ENGINES}
    scored = set(accuracy[["arm", "runtime", "engine"]].itertuples(index=False, name=None))
    assert set(trained[["arm", "runtime", "engine"]].itertuples(index=False, name=None)) <= scored
    assert (latency[(latency.arm == "fp32") & (latency.runtime == "eager")].speedup == 1).all()
    assert set(latency.pace) >= {"hot", "idle_10"}
    assert accuracy.ci_low.le(accuracy.accuracy).all() and accuracy.ci_high.ge(accuracy.accuracy).all()
    assert (accuracy.correct / accuracy.n == accuracy.accuracy).all()


def test_a_study_shows_a_line_a_notebook_its_headline_and_which_findings_hold(smoke):
    """Of the smoke study's first call: everything else it printed is in its log."""
    console = (smoke / "console.txt").read_text()
    shown = [name for name in NOTEBOOKS if re.search(rf"of \d+  {name}.*: [\d.]+ min", console)]
    assert shown == list(NOTEBOOKS)
    assert "epoch 1/1: loss" in console and len(console.splitlines()) < 100
    assert "OpenVINO: INT8 (NNCF)" in console and "Published findings here:" in console
    assert "jobid" not in console and "Executing notebook" in (smoke / "study.log").read_text()


def test_a_finished_study_leaves_no_float_exports_and_a_notebook_makes_them_again(smoke, tmp_path):
    assert not [*(smoke / "weights").glob("*-fp32.onnx")] and [*(smoke / "weights").glob("*-ptq.onnx")]
    run_dir = tmp_path / "run"
    for part in ("records", "weights"):
        shutil.copytree(smoke / part, run_dir / part)
    small = "{limit: 256, calibration_images: 64, rounds: 2, app_seconds: 1, arms: [fp32, ptq_nncf]}"
    done = papermill("06_benchmark", tmp_path / "out.ipynb", "-p", "run_dir", run_dir, "-y", small)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (run_dir / "weights" / "resnet18-tuned-s0-fp32.xml").exists()


PT2E_RUNTIMES = ("inductor", "aotinductor", "onnxruntime", "openvino")


def _may_be_refused(arm, runtime):
    """Whether a row has a reason to be missing on some machine."""
    compiled = runtime in ("inductor", "aotinductor") or arm == "qat_nncf"
    return (
        (arm, runtime) in (("ptq", "inductor"), ("fp32", "openvino_bf16"))
        or (compiled and not shutil.which("g++"))
        or (arm == "qat_nncf" and torch.cuda.is_available())
    )


def test_a_second_study_finds_everything_done(smoke):
    before = {path: path.stat().st_mtime_ns for path in (smoke / "records").iterdir()}
    started = time.monotonic()
    done = run(sys.executable, "-m", "helpers.study.run", "smoke")
    assert done.returncode == 0 and time.monotonic() - started < 60
    assert before == {path: path.stat().st_mtime_ns for path in (smoke / "records").iterdir()}


def test_two_studies_in_one_run_directory_are_refused(smoke):
    from filelock import FileLock

    with FileLock(smoke / ".lock"):
        done = run(sys.executable, "-m", "helpers.study.run", "smoke")
    assert done.returncode != 0 and "Another study is running" in done.stderr and "Traceback" not in done.stderr


def test_missing_data_ends_the_study_before_it_starts(tmp_path):
    done = run(sys.executable, "-m", "helpers.study.run", "cifar10", CIFAR10_ROOT=tmp_path)
    assert done.returncode != 0 and "(3) leave both unset" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-p", "epochs", "ten"], "epochs is 'ten'"),
        (["-p", "epoch", "3"], "epoch is not a parameter"),
        (["-p", "arch", "resnet19"], "arch is 'resnet19'"),
    ],
)
def test_a_wrong_parameter_ends_in_one_sentence_and_no_work(tmp_path, arguments, said):
    done = papermill("01_train", tmp_path / "out.ipynb", "-p", "run_dir", tmp_path / "run", *arguments)
    assert done.returncode != 0
    assert said in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_failed_run_leaves_the_earlier_record(smoke, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(smoke / "records", run_dir / "records")
    shutil.copytree(smoke / "weights", run_dir / "weights")
    (run_dir / "weights" / "resnet18-tuned-s0-fp32.safetensors").write_bytes(b"damaged")
    record = run_dir / "records" / "02_ptq-resnet18-tuned-s0.json"
    before = record.read_bytes()
    done = papermill("02_ptq", tmp_path / "out.ipynb", "-p", "run_dir", run_dir, "-p", "limit", "256")
    assert done.returncode != 0 and "not a whole safetensors file" in done.stderr
    assert record.read_bytes() == before


def test_the_cluster_path_of_snakemake_runs_the_same_file(smoke):
    record = smoke / "records" / "02_ptq-resnet18-tuned-s0.json"
    before = record.stat().st_mtime_ns
    command = ["--executor", "cluster-generic", "--cluster-generic-submit-cmd", "bash", "--jobs", "1", "--cores", "1"]
    done = run(
        *(sys.executable, "-m", "snakemake", *command, "--nolock", "--latency-wait", "2", "--forcerun", "02_ptq"),
        *("--until", "02_ptq", "--config", "profile=smoke"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert record.stat().st_mtime_ns > before


def test_environment_yml_gives_the_versions_of_constraints():
    import tomllib

    import yaml

    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip == ["--constraint constraints.txt", f"--editable .[{','.join(project['optional-dependencies'])}]"]
    assert "python=3.11" in environment["dependencies"] and project["requires-python"] == ">=3.11"
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    asked = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    assert {re.split(r"[><=\[]", name)[0].lower() for name in asked} <= pinned


def test_a_fork_s_url_reaches_every_place(tmp_path):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    old = repository_url(tmp_path).removeprefix("https://github.com/")
    rewrite("https://github.com/someone/fork", tmp_path)
    assert repository_url(tmp_path) == "https://github.com/someone/fork"
    left = [
        name
        for name in tracked
        if not name.startswith("tests/") and old in (tmp_path / name).read_text(errors="ignore")
    ]
    assert left == []
    json.loads((tmp_path / "notebooks" / "01_train.ipynb").read_text())


WITHOUT_TORCH_AO = """
import builtins

imported = builtins.__import__


def without(name, globals=None, *rest, **named):
    if (globals or {}).get("__name__") == "helpers.quantize.eager" and name.startswith("torch.ao"):
        raise ImportError(f"No module named {name!r}")
    return imported(name, globals, *rest, **named)


builtins.__import__ = without
"""


LITTLE = """
models: [{archs: [resnet18], recipes: [tuned], seeds: [0], leave_out: [12_runtimes]}]
experiments: false
common: {data: digits, limit: 64}
notebooks: {01_train: {epochs: 1}, 05_onnx_openvino: {calibration_images: 16}, 06_benchmark: {rounds: 2, app_seconds: 1}}
"""


def test_when_torch_ao_is_gone_the_study_runs_without_its_legacy_rows_and_says_so(tmp_path):
    """What eager.py imports is taken away, as a later torch would; a copy of the study trains, times and compares what is left."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_TORCH_AO)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    study = tmp_path / "study"
    for part in ("notebooks", "profiles", "book"):
        shutil.copytree(ROOT / part, study / part, ignore=shutil.ignore_patterns("results", "chapters", "_build"))
    shutil.copy(ROOT / "Snakefile", study)
    (study / "profiles" / "little.yml").write_text(LITTLE)
    done = run(sys.executable, "-m", "helpers.study.run", "little", cwd=study, PYTHONPATH=path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "has no torch.ao.quantization" in done.stdout and "Notebooks left out: 02_ptq, 03_qat" in done.stdout
    run_dir = study / "runs" / "little"
    made = {path.stem.split("-")[0] for path in (run_dir / "records").glob("*.json")}
    assert made == {"01_train", "05_onnx_openvino", "06_benchmark"}
    latency = Results.open(run_dir / "book" / "results").tables["latency"]
    rows = {("fp32", "eager"), ("fp32", "onnxruntime"), ("fp32", "openvino"), ("ptq_nncf", "openvino")}
    assert set(zip(latency.arm, latency.runtime, strict=True)) == rows
    refused = papermill("02_ptq", tmp_path / "02.ipynb", "-p", "run_dir", tmp_path / "alone", PYTHONPATH=path)
    assert refused.returncode != 0 and "has no torch.ao.quantization" in refused.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "alone").exists()  # it stops before it trains anything
