"""Rows of a record: pure functions of what a notebook has measured.

`model` is always a mapping that holds at least arch, recipe and seed, such as the parameters of the notebook. The rows go
to `records.save_record`; the columns stand in `schema.COLUMNS`.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from helpers.report.schema import COLUMNS, prediction_key
from helpers.report.stats import sqnr_db, wilson_interval

if TYPE_CHECKING:
    from helpers.train.training import Evaluation

Row = dict[str, Any]
# Arm, runtime and INT8 engine, which is empty where the runtime has no such choice.
Served = tuple[str, str, str]


def accuracy_row(
    of: Mapping[str, Any],
    arm: str,
    runtime: str,
    data: str,
    correct: int,
    n: int,
    interval: tuple[float, float],
    engine: str = "",
) -> dict[str, Any]:
    """One row of accuracy.csv for the test split. of: holds arch, recipe and seed; interval: (low, high) in [0, 1]."""
    return {
        **{key: of[key] for key in ("arch", "recipe", "seed")},
        **{"arm": arm, "runtime": runtime, "engine": engine, "data": data, "split": "test", "n": n, "correct": correct},
        **{"accuracy": correct / n, "ci_low": interval[0], "ci_high": interval[1]},
    }


def size_row(
    arch: str, arm: str, runtime: str, parameters: int, weight_bytes: int, artifact_bytes: int
) -> dict[str, Any]:
    """One row of size.csv, less the recipe and seed, which `save_record` takes from the parameters of the run."""
    return {
        **{"arch": arch, "arm": arm, "runtime": runtime, "parameters": parameters},
        **{"weight_bytes": weight_bytes, "artifact_bytes": artifact_bytes},
    }


def export_row(
    of: Mapping[str, Any],
    arm: str,
    runtime: str,
    export_seconds: float | None = None,
    first_call_ms: float | None = None,
    agreement: float | None = None,
    n: int | None = None,
    reason: str = "",
) -> dict[str, Any]:
    """One row of exports.csv. of: holds arch, recipe and seed; agreement: with the source model, in [0, 1], on n images."""
    return {
        **{key: of[key] for key in ("arch", "recipe", "seed")},
        **{"arm": arm, "runtime": runtime, "export_seconds": export_seconds, "first_call_ms": first_call_ms},
        **{"agreement": agreement, "n": n, "reason": reason},
    }


def profile_row(
    of: Mapping[str, Any],
    check: str,
    setting: str,
    value: float,
    unit: str = "",
    arm: str = "",
    runtime: str = "",
    engine: str = "",
    threads: int = 0,
    batch: int = 0,
) -> dict[str, Any]:
    """One row of profile.csv. of: holds arch and recipe; threads and batch are 0 where they do not apply."""
    return {
        **{key: of[key] for key in ("arch", "recipe")},
        **{"arm": arm, "runtime": runtime, "engine": engine, "threads": threads, "batch": batch},
        **{"check": check, "setting": setting, "value": float(value), "unit": unit},
    }


def training_rows(model: Mapping[str, Any], histories: Mapping[str, Sequence[Row]]) -> list[Row]:
    """Rows of training: one an epoch. histories: arm -> what `training.fit` returned."""
    of = {key: model[key] for key in ("arch", "recipe", "seed")}
    return [of | {"arm": arm} | epoch for arm, history in histories.items() for epoch in history]


def accuracy_rows(model: Mapping[str, Any], data: str, results: Mapping[Served, "Evaluation"]) -> list[Row]:
    """Rows of accuracy, with Wilson's interval. data: name of the copy whose test split was scored."""
    return [
        accuracy_row(model, arm, runtime, data, found.correct, found.n, wilson_interval(found.correct, found.n), engine)
        for (arm, runtime, engine), found in results.items()
    ]


def predictions_by_key(results: Mapping[Served, "Evaluation"]) -> dict[str, np.ndarray]:
    """The predicted classes that stand beside a record: `schema.prediction_key` -> uint8 [n]."""
    return {prediction_key(*served): found.predictions for served, found in results.items()}


def yours_row(
    way: tuple[str, str],
    model: str,
    reason: str,
    logits: np.ndarray | None,
    reference: np.ndarray,
    labels: np.ndarray | None,
    in_int8: Sequence[bool],
    **measured: float,
) -> Row:
    """One row of yours. way: arm and runtime; reason: why it has no logits; reference: the logits of FP32, float32 [n, classes].

    labels: int64 [n], or None where there are none; in_int8: of each convolution and linear layer that was executed, empty where
    that is not known; measured: file_bytes and first_call_ms.
    """
    row = dict.fromkeys(COLUMNS["yours"][:-1]) | {"model": model, "arm": way[0], "runtime": way[1], "reason": reason}
    if logits is None:
        return row
    classes = logits.argmax(1)
    row |= {"agreement": float((classes == reference.argmax(1)).mean()), "n": len(classes)} | measured
    row |= {"top1": None if labels is None else float((classes == labels).mean())}
    row |= {"sqnr_db": None if np.array_equal(logits, reference) else sqnr_db(reference, logits)}
    return row | ({"int8_layers": float(np.mean(in_int8)), "layers": len(in_int8)} if len(in_int8) else {})


def diagnosis_rows(facts: Mapping[str, Any], check: str, values: Mapping[Any, float], n: int) -> list[Row]:
    """Rows of diagnosis, one for each setting. facts: arch, recipe, second_relu, seed, epochs, data and split.

    values: setting -> number, of `n` images each; a pandas Series is one, too.
    """
    rows = ({"check": check, "setting": str(setting), "n": n, "value": float(v)} for setting, v in values.items())
    return [dict(facts) | row for row in rows]


def profile_rows(
    model: Mapping[str, Any], check: str, values: Mapping[Any, float], unit: str = "", **where: Any
) -> list[Row]:
    """Rows of profile, one for each setting whose value is there; NaN is left out.

    values: setting -> number in `unit`; a pandas Series is one, too. where: arm, runtime, engine, threads, batch, as
    `profile_row` takes them.
    """
    found = ((str(setting), float(value)) for setting, value in values.items())
    return [profile_row(model, check, setting, value, unit, **where) for setting, value in found if value == value]
