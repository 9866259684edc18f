import numpy as np
import pandas as pd

from helpers.report.rows import accuracy_rows, diagnosis_rows, predictions_by_key, profile_rows, training_rows
from helpers.report.schema import COLUMNS
from helpers.train.training import Evaluation

MODEL = {"arch": "resnet18", "recipe": "tuned", "seed": 0, "limit": 256}
FACTS = {
    "arch": "resnet18",
    "recipe": "tuned",
    "second_relu": "",
    "seed": 0,
    "epochs": 3,
    "data": "digits",
    "split": "test",
}


def columns(table):
    return {*COLUMNS[table]} - {"run_id", "training"}


def test_every_row_has_the_columns_of_its_table():
    scored = {("ptq", "eager", "x86"): Evaluation(np.array([1, 2], np.uint8), 1, 2)}
    epoch = {"epoch": 1, "lr": 0.1, "train_loss": 1.0, "val_accuracy": 0.5, "seconds": 2.0, "images_per_second": 3.0}
    for table, rows in {
        "accuracy": accuracy_rows(MODEL, "digits", scored),
        "training": training_rows(MODEL, {"qat": [epoch]}),
        "diagnosis": diagnosis_rows(FACTS, "parts", {"FP32": 0.5}, 2),
        "profile": profile_rows(MODEL, "read", {"2 MB": 1.5}, "GB/s", threads=2),
    }.items():
        assert [set(row) for row in rows] == [columns(table)], table


def test_accuracies_keep_their_interval_their_engine_and_their_answers():
    answers = np.array([1, 2, 3, 4], np.uint8)
    scored = {("ptq", "eager", "x86"): Evaluation(answers, 3, 4), ("ptq", "openvino", ""): Evaluation(answers, 2, 4)}
    eager, openvino = accuracy_rows(MODEL, "digits", scored)
    assert (eager["engine"], eager["accuracy"], openvino["accuracy"]) == ("x86", 0.75, 0.5)
    assert eager["ci_low"] < 0.75 < eager["ci_high"]
    assert [*predictions_by_key(scored)] == ["ptq-eager-x86", "ptq-openvino"]


def test_a_value_that_could_not_be_measured_is_no_row():
    rows = profile_rows(MODEL, "overhead", pd.Series({"fp32": 0.25, "ptq": np.nan}), "fraction")
    assert [(row["setting"], row["value"]) for row in rows] == [("fp32", 0.25)]
