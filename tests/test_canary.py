import nbformat
import numpy as np
import pytest

from helpers.files import StudyError
from helpers.report.records import read_record, save_record, write_record
from helpers.report.rows import accuracy_row, export_row, profile_row
from helpers.study import canary

OF = {"arch": "resnet18", "recipe": "tuned", "seed": 0}
MODEL = "-resnet18-tuned-s0"
TRUTH = np.zeros(8, np.uint8)


def save(run, notebook, rows, refused=(), int8=None):
    """A record as notebooks leave it. rows: (arm, runtime) -> predicted classes; int8: (arm, runtime) -> layers in INT8 of 21."""
    tables = {
        "accuracy": [accuracy_row(OF, *row, "d", int((p == TRUTH).sum()), 8, (0, 1)) for row, p in rows.items()],
        "exports": [export_row(OF, *row, reason=reason) for row, reason in dict(refused).items()],
        "profile": [
            profile_row(OF, "executed layers", f"convolution, {precision}", count, "count", *row)
            for row, layers in (int8 or {}).items()
            for precision, count in (("int8", layers), ("float32", 21 - layers))
        ],
    }
    predictions = {"truth": TRUTH} | {"-".join(row): predicted for row, predicted in rows.items()}
    save_record(str(run), notebook + MODEL, {}, ("d", "ab"), tables, predictions)


FP32, IR, NNCF, COMPILED = ("fp32", "eager"), ("fp32", "openvino"), ("ptq_nncf", "openvino"), ("fp32", "inductor")


@pytest.fixture
def pinned(tmp_path):
    save(tmp_path / "pinned", "01_train", {FP32: TRUTH})
    save(tmp_path / "pinned", "05_onnx_openvino", {IR: TRUTH, NNCF: TRUTH}, int8={NNCF: 21, IR: 0})
    save(tmp_path / "pinned", "12_runtimes", {COMPILED: TRUTH})
    return tmp_path / "pinned"


def statuses(table):
    return dict(zip(table.path, table.status, strict=True))


def test_a_run_is_the_same_as_itself(pinned):
    table = canary.compare(pinned, pinned)
    assert {*table.status} == {"same"} and len(table) == 4 and table["answers changed"].sum() == 0


def test_what_died_left_int8_or_answers_otherwise_is_told_apart_with_reasons(pinned, tmp_path):
    newest = tmp_path / "newest"
    other = TRUTH.copy()
    other[:3] = 1
    save(newest, "01_train", {FP32: other})
    save(newest, "05_onnx_openvino", {NNCF: TRUTH}, {IR: "it is not converted"}, {NNCF: 14})
    failed = nbformat.v4.new_code_cell("compile()")
    failed.outputs = [nbformat.v4.new_output("error", ename="E", evalue="e", traceback=["Traceback", "E: no compiler"])]
    (newest / "notebooks").mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=[failed]), newest / "notebooks" / f"12_runtimes{MODEL}.ipynb")
    table = canary.compare(pinned, newest).set_index("path")
    assert table.status.to_dict() == {
        f"12_runtimes{MODEL}": "died",
        "Inductor: FP32": "died",
        "OpenVINO: FP32": "died",
        "OpenVINO: INT8 (NNCF)": "left INT8",
        "PyTorch: FP32": "answers changed",
    }
    assert (
        table.reason["OpenVINO: FP32"] == "it is not converted" and table.reason["Inductor: FP32"] == "E: no compiler"
    )
    assert table.reason[f"12_runtimes{MODEL}"] == "E: no compiler"
    assert table["INT8 layers now, %"]["OpenVINO: INT8 (NNCF)"] == pytest.approx(100 * 14 / 21)
    assert (table["answers changed"]["PyTorch: FP32"], table.n["PyTorch: FP32"]) == (3, 8)
    assert statuses(canary.compare(newest, pinned))["OpenVINO: FP32"] == "new"


def test_when_nothing_ran_every_row_died(pinned, tmp_path):
    table = canary.compare(pinned, tmp_path / "newest")
    assert {*table.status} == {"died"} and table.reason.str.contains("was not run").all() and len(table) == 4 + 3
    with pytest.raises(StudyError, match="There are no records in .*newest"):
        canary.compare(tmp_path / "newest", pinned)


def test_the_page_has_the_versions_the_dates_and_the_rows_and_the_command_fails_when_one_died(
    pinned, tmp_path, monkeypatch, capsys
):
    newest = tmp_path / "newest"
    save(newest, "01_train", {FP32: TRUTH})
    record = newest / "records" / f"01_train{MODEL}.json"
    facts = read_record(record)
    facts["run"] |= {"date": "2031-01-02T03:04:05+00:00", "versions": {"torch": "9.9.9"}}
    write_record(record, facts)
    monkeypatch.setattr(canary, "FOLDER", tmp_path / "out")
    assert canary._command([str(pinned), str(newest)]) == 1
    page = capsys.readouterr().out
    assert "9.9.9" in page and "2031-01-02" in page and "Inductor: FP32" in page and "{" not in page
    assert canary._command([str(pinned), str(pinned)]) == 0
    with pytest.raises(StudyError, match="allowed are nothing, and the run directories"):
        canary._command(["one"])
