import json
import shutil
import sys
from contextlib import ExitStack
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run

from helpers.files import NotWritten, StudyError, remove_unfinished, whole_file
from helpers.quantize.nncf import quantize_openvino
from helpers.quantize.ort import quantize_onnxruntime
from helpers.report.records import gather, save_record
from helpers.report.rows import accuracy_row, export_row
from helpers.serve.export import convert_to_openvino, export_onnx, export_torchscript
from helpers.study import soak
from helpers.study.console import last_lines
from helpers.study.run import run_study
from helpers.train.data import load_data
from helpers.train.training import Recipe, fit
from helpers.train.weights import save_weights


class Wide(torch.nn.Module):
    """12 MB of weights, 3 MB in INT8, for images of 32x32: more than the small disk holds."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 32 * 32, 1024)

    def forward(self, images):
        return self.layer(images.flatten(1))


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk")
    try:
        with soak.small_disk(folder, 2):
            yield folder
    except StudyError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder, module = tmp_path_factory.mktemp("model"), Wide().eval()
    export_onnx(module, folder / "fp32.onnx")
    convert_to_openvino(folder / "fp32.onnx", folder / "fp32.xml")
    return SimpleNamespace(
        module=module, onnx=folder / "fp32.onnx", ir=folder / "fp32.xml", images=torch.rand(4, 3, 32, 32)
    )


def test_an_export_names_no_folder_of_the_machine_that_made_it(model):
    for file in (model.onnx, model.ir):
        assert str(ROOT).encode() not in file.read_bytes() and b"site-packages" not in file.read_bytes(), file


NOISE = np.random.default_rng(0).integers(0, 256, 4_000_000).astype(np.uint8)  # does not compress
RUN_ID = "01_train-resnet18-tuned-s0"


def _train(model, path):
    path.unlink()  # which stands for the checkpoint of another training
    fit(Wide(), load_data("digits", limit=64), Recipe(0.01), 1, 0, path, precision="fp32")


WRITERS = {
    "weights.safetensors": lambda model, path: save_weights(path, model.module.state_dict(), {"arch": "resnet18"}),
    f"records/{RUN_ID}.npz": lambda _, path: save_record(str(path.parents[1]), RUN_ID, {}, None, {}, {"truth": NOISE}),
    f"records/{RUN_ID}.json": lambda _, path: save_record(
        str(path.parents[1]), RUN_ID, {"note": "x" * len(NOISE)}, None, {}
    ),
    "checkpoint.pt": _train,
    "torchscript.pt": lambda model, path: export_torchscript(model.module, path),
    "fp32.onnx": lambda model, path: export_onnx(model.module, path),
    "fp32.xml": lambda model, path: convert_to_openvino(model.onnx, path),
    "fp32.bin": lambda model, path: convert_to_openvino(model.onnx, path.with_suffix(".xml")),
    "ptq_nncf.xml": lambda model, path: quantize_openvino(model.ir, model.images, path),
    "ptq_ort.onnx": lambda model, path: quantize_onnxruntime(model.onnx, model.images, path),
}


@pytest.mark.parametrize("file", WRITERS)
def test_on_a_full_disk_the_earlier_file_stays_and_a_sentence_ends_the_work(disk, model, file):
    path = disk / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"earlier")
    try:
        with pytest.raises(NotWritten, match=r"could not be written \((the disk is full|No space left on device)\)"):
            WRITERS[file](model, path)
        assert [*disk.rglob("*.*")] == ([] if file == "checkpoint.pt" else [path])
        assert file == "checkpoint.pt" or path.read_bytes() == b"earlier"
    finally:
        for left in disk.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def test_a_study_without_room_ends_in_a_sentence_before_it_starts(disk, tmp_path):
    for part in ("profiles", "notebooks", "book", "Snakefile"):
        (tmp_path / part).symlink_to(ROOT / part)
    (tmp_path / "runs").symlink_to(disk)
    with soak.full(disk):
        done = run(sys.executable, "-m", "helpers.study.run", "smoke", cwd=tmp_path)
    assert done.returncode and not done.stdout
    assert (
        done.stderr.startswith("study: ") and "the disk is full" in done.stderr and len(done.stderr.splitlines()) == 1
    )


def test_a_study_that_runs_out_of_room_half_way_says_so(disk, tmp_path, monkeypatch):
    for part in ("profiles", "notebooks"):
        (tmp_path / part).symlink_to(ROOT / part)
    (tmp_path / "runs").symlink_to(disk)
    monkeypatch.chdir(tmp_path)
    with ExitStack() as stack, pytest.raises(NotWritten, match="the disk is full"):

        def stops(*_):
            stack.enter_context(soak.full(disk))
            return 1

        monkeypatch.setattr("helpers.study.run._snakemake", stops)
        run_study("smoke", [])


def test_what_a_killed_process_was_writing_is_no_record_and_is_removed(tmp_path):
    save_record(str(tmp_path), RUN_ID, {}, None, {})
    half = whole_file(tmp_path / "records" / "02_ptq-resnet18-tuned-s0.json")
    half.__enter__().write_text("{")  # and no more: it is killed
    gather(str(tmp_path), tmp_path / "results")
    assert [*json.loads((tmp_path / "results" / "runs.json").read_text())] == [RUN_ID]
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in (tmp_path / "records").iterdir()) == [f"{RUN_ID}.json"]


def test_a_notebook_that_is_not_whole_hides_no_failure(tmp_path):
    (tmp_path / "x.ipynb").write_text('{"cells": [')
    assert last_lines(tmp_path / "x.ipynb") == []


OF = {"arch": "resnet18", "recipe": "tuned", "seed": 0}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return a_run(tmp_path_factory.mktemp("one"))


def a_run(folder, predicted=0, correct=3, weight=1.0, seconds=1.0):
    """A finished run in small."""
    tables = {
        "accuracy": [accuracy_row(OF, "fp32", "eager", "d", correct, 4, (0, 1))],
        "exports": [export_row(OF, "fp32", "openvino", export_seconds=seconds, reason="")],
    }
    save_record(str(folder), RUN_ID, {}, ("d", "ab"), tables, {"truth": np.full(4, predicted, np.uint8)})
    save_weights(folder / "weights" / "fp32.safetensors", {"w": torch.full((2,), weight)}, {"arch": "resnet18"})
    gather(str(folder), folder / "book" / "results")
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seconds": 2.0}, []),
        ({"predicted": 1}, [f"{RUN_ID}.npz has other predictions"]),
        ({"correct": 2}, ["the table accuracy differs"]),
        ({"weight": 1.0001}, ["fp32.safetensors has other weights"]),
    ],
)
def test_a_difference_is_named_and_times_are_none(one, tmp_path, change, said):
    other = a_run(tmp_path, **change)
    assert soak.differences(one, other) == said
    (other / "records" / "stray").touch()
    assert soak.differences(one, other) == ["records/stray is in one of them only", *said]


def test_how_often_to_kill_is_a_whole_number():
    with pytest.raises(StudyError, match="allowed is nothing, or how often to kill the study"):
        soak._command(["often"])


SPANS = {
    "01_train": soak.Span(5, 50),
    "02_ptq": soak.Span(51, 90),
    "04_jit": soak.Span(52, 60),
    "book": soak.Span(91, 109),
}


def test_moments_are_all_over_the_study_and_know_the_notebook_that_ran_longest():
    drawn = soak.moments(SPANS, 20, np.random.default_rng(0))
    assert [int(moment.at // 5) for moment in drawn] == list(range(20))
    assert drawn[0].notebook == "" and drawn[0].after == drawn[0].at
    ran = [[name for name, span in SPANS.items() if span.begin <= moment.at < span.end] for moment in drawn[1:]]
    assert ["02_ptq", "04_jit"] in ran
    assert all(moment.notebook == names[0] for moment, names in zip(drawn[1:], ran, strict=True) if names)
    assert all(moment.at - moment.after == SPANS[moment.notebook].begin for moment in drawn[1:])


@pytest.mark.parametrize(
    ("notebooks", "reached"),
    [
        (["02_ptq"], False),  # it has just begun
        (["02_ptq", "04_jit"], False),  # which ran beside it then, too
        (["02_ptq", "book"], True),
        (["book"], True),  # it had ended before an earlier kill
    ],
)
def test_a_moment_waits_as_long_as_its_notebook_ran_but_not_into_the_next_one(notebooks, reached):
    study = SimpleNamespace(notebooks=lambda: notebooks, wait=lambda until: until())
    assert soak.wait_for(study, soak.Moment(81, "02_ptq", 30), SPANS) == reached
