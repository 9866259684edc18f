import os
import shutil
import sys

from conftest import ROOT, papermill, run

from helpers.report.results import Results

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
        shutil.copytree(ROOT / part, study / part, ignore=shutil.ignore_patterns("chapters", "_build"))
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
