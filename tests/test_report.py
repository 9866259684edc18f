import json

import numpy as np
import pandas as pd
import pytest

from helpers.files import StudyError
from helpers.report import tables
from helpers.report.results import NotMeasured, Results
from helpers.report.schema import COLUMNS, arm_facts, is_deprecated, prediction_key, run_name, times_key

ARCH = {"arch": "resnet18", "recipe": "tuned", "engine": ""}
IMAGES = 400


def first(correct):
    """Right on the first `correct` of the images."""
    return np.arange(IMAGES) < correct


RUN = {"data": {"name": "d"}, "commit": "c", "date": "2026-01-01", "parameters": {}, "versions": {}}


class Study:
    """A results folder made by hand: rows of the tables, and the arrays of one run a seed."""

    def __init__(self, folder):
        self.folder, self.rows, self.arrays = folder, {table: [] for table in COLUMNS}, {}
        self.runs = {}

    def score(self, arm, runtime, right, seed=0, training=0, **more):
        run_id = run_name("01_train", "resnet18", "tuned", seed) + (f"-t{training}" if training else "")
        row = ARCH | {"arm": arm, "runtime": runtime, "seed": seed, "training": training, "data": "d", "split": "test"}
        row |= {
            "n": IMAGES,
            "correct": right.sum(),
            "accuracy": right.mean(),
            "ci_low": 0,
            "ci_high": 1,
            "run_id": run_id,
        }
        self.rows["accuracy"].append(row | more)
        self.rows["size"].append(
            {**ARCH, "arm": arm, "runtime": runtime, "seed": seed, "parameters": 1, "weight_bytes": 1}
            | {"artifact_bytes": 1_000_000, "run_id": run_id}
        )
        self.runs[run_id] = {"notebook": "01_train", **RUN}
        if not training:
            arrays = self.arrays.setdefault(run_id, {"truth": np.ones(IMAGES, np.uint8)})
            arrays[prediction_key(arm, runtime)] = right.astype(np.uint8)

    def time(self, arm, runtime, ms, machine="m", run_id="06_benchmark-resnet18-tuned-s0", kept=True, **more):
        row = ARCH | {"arm": arm, "runtime": runtime, "threads": 2, "batch": 1, "size": 32, "pace": "hot"} | more
        median = float(np.median(ms))
        row |= {"rounds": len(ms), "median_ms": median, "p90_ms": 1.01 * median, "p95_ms": median, "cv": 0.1}
        row |= {"speedup": 10 / median, "speedup_low": 9 / median, "speedup_high": 11 / median}
        self.rows["latency"].append(row | {"machine": machine, "run_id": run_id})
        if kept:
            self.arrays.setdefault(run_id, {})[times_key(row)] = np.asarray(ms, float)
        self.runs[run_id] = {"notebook": "06_benchmark", **RUN}

    def open(self):
        (self.folder / "predictions").mkdir(parents=True, exist_ok=True)
        for table, columns in COLUMNS.items():
            pd.DataFrame(self.rows[table], columns=columns).to_csv(self.folder / f"{table}.csv", index=False)
        for run_id, arrays in self.arrays.items():
            np.savez_compressed(self.folder / "predictions" / f"{run_id}.npz", **arrays)
        (self.folder / "runs.json").write_text(json.dumps(self.runs))
        return Results.open(self.folder)


@pytest.fixture
def study(tmp_path):
    return Study(tmp_path / "results")


def test_results_that_are_missing_damaged_or_older_end_in_a_sentence(study, tmp_path):
    with pytest.raises(StudyError, match="nowhere has no results"):
        Results.open(tmp_path / "nowhere")
    study.score("fp32", "eager", first(300))
    study.open()
    path = study.folder / "accuracy.csv"
    whole = path.read_text()
    path.write_text(whole.replace("training,", "", 1).replace(",0,0,", ",0,", 1))
    with pytest.raises(StudyError, match="older form.*training"):
        Results.open(study.folder)
    path.write_text(whole + "half a row\n")
    with pytest.raises(StudyError, match="accuracy.csv is damaged"):
        Results.open(study.folder)
    path.write_text(whole)
    (study.folder / "predictions" / "01_train-resnet18-tuned-s0.npz").write_bytes(b"PK half")
    with pytest.raises(StudyError, match="npz is damaged"):
        _ = Results.open(study.folder).scores
    (study.folder / "runs.json").write_text("{")
    with pytest.raises(StudyError, match="runs.json is damaged"):
        Results.open(study.folder)


def test_opening_results_writes_nothing(study):
    study.score("fp32", "eager", first(300))
    study.open()
    before = {path: path.stat().st_mtime_ns for path in study.folder.rglob("*")}
    results = Results.open(study.folder)
    assert len(results.rows) == 1
    assert before == {path: path.stat().st_mtime_ns for path in study.folder.rglob("*")}


def test_a_row_has_what_was_scored_over_its_seeds_and_what_was_timed(study):
    for seed, correct in ((0, 300), (1, 320)):
        study.score("fp32", "eager", first(correct), seed)
    study.score("ptq_nncf", "openvino", first(200))
    study.time("fp32", "eager", [9.0, 10.0, 11.0])
    study.time("qat_nncf", "openvino", [1.0, 2.0, 3.0])
    rows = study.open().rows.set_index("arm")
    assert rows.accuracy["fp32"] == pytest.approx(310 / IMAGES) and rows.seeds["fp32"] == 2 and rows.ms["fp32"] == 10
    assert rows.low["fp32"] < 300 / IMAGES < 320 / IMAGES < rows.high["fp32"]  # two seeds say little
    assert rows.run_ids["fp32"][-1] == "06_benchmark-resnet18-tuned-s0" and rows.mb["fp32"] == 1
    assert np.isnan(rows.ms["ptq_nncf"]) and np.isnan(rows.accuracy["qat_nncf"])
    assert rows.retrained["qat_nncf"] and rows.int8["ptq_nncf"] and not rows.deprecated["ptq_nncf"]


def test_other_trainings_of_a_seed_are_listed_but_not_mixed_in(study):
    study.score("fp32", "eager", first(300))
    study.score("fp32", "eager", first(100), training=1)
    results = study.open()
    assert results.scores.accuracy.tolist() == [300 / IMAGES]
    assert tables.trainings(results)["FP32, %"].tolist() == [75.0, 25.0]


def test_answers_are_compared_on_the_seeds_that_both_rows_have(study):
    for seed, correct in ((0, 300), (1, 200)):
        study.score("fp32", "eager", first(correct), seed)
    study.score("ptq_nncf", "openvino", first(260))
    results = study.open()
    row = results.row("resnet18", "ptq_nncf", "openvino")
    cost = results.cost(row)
    assert cost.points == pytest.approx(-10) and cost.seeds == 1 and cost.n == IMAGES
    assert cost.verdict == "worse" and cost.p == pytest.approx(2 * 0.5**40) and not cost.kept
    with pytest.raises(NotMeasured):
        results.compare(row, results.row("resnet18", "qat", "eager"))


def test_latencies_of_one_process_are_paired_and_those_of_two_machines_do_not_compare(study):
    rounds = np.random.default_rng(0).lognormal(0, 0.5, 50)  # slow moments that hit both alike
    study.score("fp32", "eager", first(300))
    study.time("fp32", "eager", 3 * rounds)
    study.time("ptq_nncf", "openvino", rounds)
    study.time("ptq_nncf", "openvino", rounds, machine="other", run_id="06_benchmark-resnet18-tuned-s0-other")
    results = study.open()
    slow, fast = (results.timing(results.row("resnet18", *of)) for of in (("fp32", "eager"), ("ptq_nncf", "openvino")))
    ratio = results.faster(fast, slow)
    assert (ratio.times, ratio.low, ratio.high) == pytest.approx((3, 3, 3)) and ratio.verdict == "faster"
    elsewhere = results.timing(fast, run_id="06_benchmark-resnet18-tuned-s0-other")
    with pytest.raises(ValueError, match="machine is 'm' and 'other'"):
        results.faster(fast, elsewhere)


def test_times_that_contradict_the_table_are_not_used(study):
    study.score("fp32", "eager", first(300))
    study.time("fp32", "eager", [10.0] * 5)
    study.time("ptq_nncf", "openvino", [2.0] * 5)
    study.rows["latency"][1]["median_ms"] = 6.0
    results = study.open()
    fast, slow = (results.timing(results.row("resnet18", *of)) for of in (("ptq_nncf", "openvino"), ("fp32", "eager")))
    assert results.faster(fast, slow).high < 1.7  # not 5, which the times still say


def test_ties_are_broken_by_what_quantization_changed_not_by_longer_training(study):
    study.score("fp32", "eager", first(280))
    study.score("fp32_longer", "eager", first(380))
    study.score("ptq_nncf", "openvino", first(280))
    study.score("ptq_longer_nncf", "openvino", first(340))  # more accurate, but it lost 40 images to quantization
    for arm, runtime in (("fp32", "eager"), ("fp32_longer", "eager")):
        study.time(arm, runtime, [10.0] * 5)
    study.time("ptq_longer_nncf", "openvino", [1.0] * 5)
    study.time("ptq_nncf", "openvino", [1.05] * 5)
    results = study.open()
    of = results.candidates
    row, tied = results.choose(of[of.int8])
    assert row.arm == "ptq_nncf" and set(tied.arm) == {"ptq_nncf", "ptq_longer_nncf"}
    row, tied = results.choose(of)
    assert row.arm == "ptq_nncf" and len(tied) == 2
    assert of.set_index("arm").change.round(6).to_dict() == {
        **{"fp32": 0, "fp32_longer": 0, "ptq_nncf": 0, "ptq_longer_nncf": -10}
    }
    with pytest.raises(NotMeasured):
        results.choose(of[of.trimmed])


def test_of_rows_that_lost_alike_the_smaller_file_counts_then_the_lower_median(study):
    study.score("fp32", "eager", first(280))
    for arm, ms, size in (("ptq_nncf", 1.0, 3), ("trimmed_ptq_nncf", 1.02, 1), ("ptq_pt2e", 1.01, 1.05)):
        study.score(arm, "openvino", first(280))
        study.rows["size"][-1]["artifact_bytes"] = size * 1e6
        study.time(arm, "openvino", [ms] * 5)
    study.time("fp32", "eager", [10.0] * 5)
    row, _ = study.open().choose(study.open().candidates)
    assert row.arm == "ptq_pt2e"


@pytest.mark.parametrize(
    ("arm", "runtime", "deprecated"),
    [
        ("fp32", "eager", False),
        ("fp32", "torchscript", True),
        ("ptq", "openvino", True),  # quantized in eager mode, and exported by what only eager INT8 needs
        ("fp32", "onnxruntime", False),
        ("trimmed_ptq_nncf", "openvino", False),
        ("ptq_pt2e", "inductor", False),
    ],
)
def test_a_path_is_deprecated_if_any_step_of_it_is(arm, runtime, deprecated):
    assert is_deprecated(arm, runtime) == deprecated


def test_an_arm_that_is_not_described_ends_in_a_sentence():
    with pytest.raises(StudyError, match="arm 'ptq_tvm'; describe it in ARMS"):
        arm_facts("ptq_tvm")
    assert arm_facts("qat_trimmed").control == "fp32_longer" and arm_facts("trimmed_ptq").control == "fp32"


def test_models_of_two_data_sets_end_in_a_sentence(study):
    study.score("fp32", "eager", first(300))
    study.score("fp32", "eager", first(300), seed=1)
    study.runs["01_train-resnet18-tuned-s1"]["data"] = {"name": "e"}
    with pytest.raises(StudyError, match="trained on d and e"):
        _ = study.open().scores


def test_a_table_is_shown_with_its_intervals_rounded_by_unit():
    frame = pd.DataFrame({"path": ["a"], "times": [1.234], "times low": [1.1], "times high": [1.26], "points": [0.456]})
    text = tables.as_text(frame)
    assert text.to_dict("records") == [{"path": "a", "times [95 % CI]": "1.2 [1.1, 1.3]", "points": "+0.46"}]


def test_tables_of_a_study_that_has_only_trained_are_empty_or_short(study):
    study.score("fp32", "eager", first(300))
    results = study.open()
    for make in (tables.headline, tables.choices, tables.qat, tables.runtimes, tables.trimming, tables.calibration):
        assert make(results).empty, make.__name__
    assert len(tables.trainings(results)) == 1
