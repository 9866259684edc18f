import json
import os
from types import SimpleNamespace

import numpy as np
import pytest

from helpers.files import StudyError, whole_file
from helpers.report.records import commit, gather, read_record, save_record, write_record
from helpers.report.results import Results
from helpers.report.rows import accuracy_row, export_row, size_row
from helpers.report.schema import COLUMNS, run_name
from helpers.study.pipeline import collect

OF = {"arch": "resnet18", "recipe": "tuned", "seed": 0}


def test_what_is_saved_is_gathered_with_its_provenance(tmp_path):
    row = accuracy_row(OF, "ptq", "eager", "digits", 3, 4, (0.3, 0.95), "fbgemm")
    run_id = run_name("02_ptq", "resnet18", "tuned", 0)
    predictions = {"ptq-eager-fbgemm": np.array([1, 2, 3, 4], np.uint8)}
    save_record(str(tmp_path), run_id, {"seed": 0}, ("digits", "ab" * 32), {"accuracy": [row]}, predictions)
    gather(str(tmp_path), tmp_path / "results")
    accuracy = Results.open(tmp_path / "results").tables["accuracy"]
    assert list(accuracy.columns) == COLUMNS["accuracy"] and accuracy.accuracy.tolist() == [0.75]
    run = json.loads((tmp_path / "results" / "runs.json").read_text())[run_id]
    assert run["data"]["sha256"] == "ab" * 32 and run["commit"] and run["versions"]["torch"] and run["cpu"]
    with np.load(tmp_path / "results" / "predictions" / f"{run_id}.npz") as stored:
        assert stored["ptq-eager-fbgemm"].tolist() == [1, 2, 3, 4]


def test_a_row_outside_the_contract_is_refused(tmp_path):
    with pytest.raises(ValueError, match="too many or too few"):
        save_record(str(tmp_path), "x", {}, None, {"size": [{"arch": "resnet18"}]})


def test_no_records_and_damaged_records_end_in_a_sentence(tmp_path):
    with pytest.raises(StudyError, match="no records"):
        gather(str(tmp_path), tmp_path / "results")
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "x.json").write_text('{"run_id": ')
    with pytest.raises(StudyError, match="is damaged"):
        gather(str(tmp_path), tmp_path / "results")


def test_a_failed_write_leaves_the_earlier_file_and_nothing_else(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("earlier")
    with pytest.raises(StudyError, match="could not be written.*unchanged"), whole_file(path) as aside:
        aside.write_text("half")
        raise OSError(28, "No space left on device")
    assert path.read_text() == "earlier" and os.listdir(tmp_path) == ["result.json"]


def test_a_file_that_could_not_be_read_is_not_said_to_be_one_that_could_not_be_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="source.onnx"), whole_file(tmp_path / "target.onnx") as aside:
        aside.write_bytes((tmp_path / "source.onnx").read_bytes())


def test_a_run_directory_that_cannot_be_written_ends_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(StudyError, match="choose a place that can be written"),
        whole_file(tmp_path / "file" / "x.json"),
    ):
        pass


def test_the_sentence_comes_also_when_the_writer_has_an_exception_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.files.shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(StudyError, match="the disk is full"), whole_file(tmp_path / "x.pt"):
        raise RuntimeError("unexpected pos 64 vs 0")


def test_a_kept_run_is_not_replaced_by_another_experiment(tmp_path):
    def save(epochs, run_dir):
        save_record(
            str(run_dir),
            "01_train-resnet18-tuned-s0",
            {"epochs": epochs, "run_dir": str(run_dir)},
            ("digits", "ab"),
            {},
        )

    for epochs, run_dir in ((10, tmp_path / "a"), (10, tmp_path / "b"), (5, tmp_path / "c")):
        save(epochs, run_dir)
    gather(str(tmp_path / "a"), tmp_path / "results", keep=True)
    gather(str(tmp_path / "b"), tmp_path / "results", keep=True)
    before = (tmp_path / "results" / "runs.json").read_bytes()
    with pytest.raises(StudyError, match="already with another epochs"):
        gather(str(tmp_path / "c"), tmp_path / "results", keep=True)
    assert (tmp_path / "results" / "runs.json").read_bytes() == before


def test_a_run_older_than_what_it_was_made_from_is_not_gathered(tmp_path):
    names = [run_name(notebook, "resnet18", "tuned", 0) for notebook in ("01_train", "02_ptq")]
    for run_id in names:
        save_record(str(tmp_path), run_id, {}, ("digits", "ab"), {})
    collect(str(tmp_path), tmp_path / "results")
    record = read_record(tmp_path / "records" / f"{names[0]}.json")
    record["run"]["date"] = "9999-01-01T00:00:00+00:00"  # trained anew, after its PTQ
    write_record(tmp_path / "records" / f"{names[0]}.json", record)
    before = (tmp_path / "results" / "runs.json").read_bytes()
    with pytest.raises(StudyError, match="02_ptq-resnet18-tuned-s0 is older than 01_train.*run 02_ptq again"):
        collect(str(tmp_path), tmp_path / "results")
    assert (tmp_path / "results" / "runs.json").read_bytes() == before


def test_counts_stay_counts_where_a_row_of_exports_has_none(tmp_path):
    of = {"arch": "resnet18", "recipe": "tuned", "seed": 0}
    rows = [
        export_row(of, "ptq", "openvino", 1.0, 2.0, 0.5, 360),
        export_row(of, "ptq", "inductor", reason="it cannot"),
    ]
    save_record(str(tmp_path), "05_onnx_openvino-resnet18-tuned-s0", {}, None, {"exports": rows})
    gather(str(tmp_path), tmp_path / "results")
    gather(str(tmp_path), tmp_path / "results", keep=True)
    text = (tmp_path / "results" / "exports.csv").read_text()
    assert ",360," in text and "360.0" not in text
    assert Results.open(tmp_path / "results").tables["exports"].set_index("runtime").n["openvino"] == 360


def test_the_commit_is_unknown_outside_git_and_without_git(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert commit() == "unknown"
    monkeypatch.setenv("PATH", "")
    assert commit() == "unknown"


def test_a_record_says_of_which_training_a_size_is(tmp_path):
    size = size_row("resnet18", "ptq", "eager", 10, 10, 12)
    parameters = {"recipe": "tuned", "seed": 3}
    save_record(str(tmp_path), "02_ptq-x", parameters, None, {"size": [size]})
    gather(str(tmp_path), tmp_path / "results")
    found = Results.open(tmp_path / "results").tables["size"].iloc[0]
    assert (found.recipe, found.seed) == ("tuned", 3)
