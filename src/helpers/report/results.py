"""Results read: one tidy frame, the one place that pairs answers, the one that compares latencies, and the choice rule."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import ttest_1samp

from helpers.files import StudyError, first_line, read_arrays, refused
from helpers.report.schema import (
    COLUMNS,
    MAY_BE_MISSING,
    RANDOM,
    arm_facts,
    is_deprecated,
    prediction_key,
    run_name,
    times_key,
)
from helpers.report.stats import (
    Ratio,
    accuracy_interval,
    difference_interval,
    latency_ratio,
    mcnemar_exact,
    on_common_seeds,
    seeds_interval,
)

ROW = ["arch", "recipe", "arm", "runtime", "engine"]  # what a row is: one model file and what runs it
CONDITIONS = ["machine", "threads", "batch", "size", "pace"]  # under which it is timed
MARGIN = 0.005  # differences of accuracy below half a point are taken as none
TENTH = 1.1  # files nearer than that count as equally small: two formats of the same weights differ by a few hundredths
Row = Mapping[str, Any]  # at least the columns of ROW; of latency, those of CONDITIONS and its numbers too


class NotMeasured(LookupError):
    """What was asked for is not in these results."""


@dataclass(frozen=True)
class Difference:
    """Accuracy of one row minus that of another on the same images and seeds, in points, with its 95 % interval."""

    points: float
    low: float
    high: float
    p: float  # McNemar's exact test with one seed, Student's over several
    seeds: int
    n: int  # images
    equal: bool  # two one-sided tests at 5 % show the difference to lie within half a point

    @property
    def verdict(self) -> str:
        """better, worse, equal (within half a point) or undecided."""
        return self.verdict_at(self.p)

    def verdict_at(self, p: float) -> str:
        """The verdict where `p` is corrected for a family of tests."""
        if p < 0.05 and (self.low > 0 or self.high < 0):
            return "better" if self.low > 0 else "worse"
        return "equal" if self.equal else "undecided"

    @property
    def kept(self) -> bool:
        """Whether a loss of more than half a point is ruled out."""
        return self.low > -100 * MARGIN


@dataclass(frozen=True, eq=False)
class Results:
    """The tables of a results folder and what is computed of them, once. Writes nothing."""

    folder: Path
    tables: Mapping[str, pd.DataFrame]
    runs: Mapping[str, Mapping[str, Any]]  # run_id -> how that run came to be
    _arrays: dict[str, dict[str, np.ndarray]] = field(default_factory=dict, repr=False)
    _differences: dict[tuple, Difference] = field(default_factory=dict, repr=False)
    _ratios: dict[tuple, Ratio] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder: Path | str) -> "Results":
        """Read the CSV files, runs.json and predictions of `folder`. Raises StudyError when it is missing, damaged or of an older form."""
        folder = Path(folder)
        if not (folder / "runs.json").exists():
            raise StudyError(
                f"{folder} has no results (no runs.json); run the notebooks 01 to 06, or give another folder."
            )
        tables = {table: _read_table(folder / f"{table}.csv", COLUMNS[table]) for table in COLUMNS}
        return cls(folder, tables, read_runs(folder))

    @cached_property
    def data(self) -> str:
        """Name of the data that the models were trained on; empty without a training. Raises StudyError for several."""
        names = sorted(
            {run["data"]["name"] for run in self.runs.values() if run["notebook"] == "01_train" and run["data"]}
        )
        if len(names) > 1:
            raise StudyError(f"The models were trained on {' and '.join(names)}; keep the records of one data set.")
        return names[0] if names else ""

    @cached_property
    def recipe(self) -> str:
        """The recipe that most rows were timed with; without latencies, the one that most were scored with."""
        timed = self.tables["latency"].recipe
        counts = pd.concat([timed[timed != RANDOM], self.tables["accuracy"].recipe]).value_counts()
        first = timed[timed != RANDOM].value_counts()
        return str((first if len(first) else counts).index[0]) if len(counts) else ""

    @cached_property
    def engine(self) -> str:
        """Whose INT8 kernels stand for eager PyTorch and TorchScript; empty where PyTorch has none."""
        engines = self.tables["accuracy"].engine
        return str(next(iter(engines[engines != ""]), ""))

    @cached_property
    def machine(self) -> str:
        """The machine that timed most architectures, and of several the most rows; empty without latencies."""
        counts = self._trained.groupby("machine").agg(archs=("arch", "nunique"), rows=("arch", "size"))
        return str(counts.sort_values(["archs", "rows"]).index[-1]) if len(counts) else ""

    @cached_property
    def benchmark(self) -> pd.DataFrame:
        """Of each architecture the latencies of one process: on `machine` where that timed it, and of several the first."""
        timed = self._trained.assign(elsewhere=self._trained.machine != self.machine)
        first = timed.sort_values(["elsewhere", "run_id"], kind="stable").drop_duplicates("arch")[["arch", "run_id"]]
        return timed.drop(columns="elsewhere").merge(first)

    @cached_property
    def _process(self) -> dict[str, str]:
        return dict(self.benchmark[["arch", "run_id"]].drop_duplicates().itertuples(index=False, name=None))

    @property
    def _trained(self) -> pd.DataFrame:
        latency = self.tables["latency"]
        return latency[(latency.recipe == self.recipe) & (latency["size"] == 32) & (latency.pace == "hot")]

    @cached_property
    def carried(self) -> pd.DataFrame:
        """Latencies by image size and pace, random weights, of the study's own process: other machines' have longer run_ids."""
        latency = self.tables["latency"]
        return latency[latency.run_id == run_name("08_carry_over")]

    @cached_property
    def archs(self) -> list[str]:
        """The architectures that were timed; where none was, those that were scored."""
        return sorted(self.benchmark.arch.unique()) or sorted(self.scores.arch.unique())

    @cached_property
    def threads(self) -> int:
        """The largest number of threads at which every architecture was timed; 0 without. Raises StudyError if none is common."""
        counts = [{*of} for _, of in self.benchmark.groupby("arch").threads]
        if counts and not set.intersection(*counts):
            each = "; ".join(f"{arch} {sorted({*of})}" for arch, of in self.benchmark.groupby("arch").threads)
            raise StudyError(
                f"No count of threads is common to all: {each}. Time them again (notebook 6) with one of them."
            )
        return int(max(set.intersection(*counts))) if counts else 0

    @cached_property
    def batches(self) -> list[int]:
        """The batch sizes of the benchmark, smallest first."""
        return sorted(int(batch) for batch in self.benchmark.batch.unique())

    @property
    def batch(self) -> int:
        """The smallest batch of the benchmark, which tables show; 1 without one."""
        return min(self.batches, default=1)

    @cached_property
    def scores(self) -> pd.DataFrame:
        """One line for each row that was scored: accuracy, its interval (fractions), seeds, n, run_ids; run_of: seed -> run_id.

        The interval covers images, and with several seeds these too. Other trainings of a seed, and other versions of the
        images, are not in it.
        """
        accuracy = self.tables["accuracy"]
        accuracy = accuracy[(accuracy.data == self.data) & (accuracy.training == 0)]
        first = accuracy.sort_values("run_id", kind="stable").drop_duplicates([*ROW, "seed"]).sort_values("seed")
        rows = []
        for key, of in first.groupby(ROW):
            row = dict(zip(ROW, key, strict=True))
            right = self._right(row, of)
            if len(right) == len(of):
                low, high = accuracy_interval(np.stack(right))
            else:
                low, high = seeds_interval(of.accuracy.to_numpy()) if len(of) > 1 else of[["ci_low", "ci_high"]].iloc[0]
            row |= {"accuracy": of.accuracy.mean(), "low": low, "high": high, "seeds": len(of), "n": int(of.n.min())}
            run_of = {int(seed): run_id for seed, run_id in zip(of.seed, of.run_id, strict=True)}
            rows.append(row | {"run_ids": tuple(of.run_id), "run_of": run_of})
        return pd.DataFrame(rows, columns=[*ROW, "accuracy", "low", "high", "seeds", "n", "run_ids", "run_of"])

    @cached_property
    def rows(self) -> pd.DataFrame:
        """Everything scored or timed: ROW and CONDITIONS -> accuracy, ms, speedup, mb, intervals, seeds, n, run_ids, facts of the arm.

        A row that was scored only has no conditions and no times (NaN); one that was timed only has no accuracy.
        """
        latency = self.tables["latency"].rename(columns={"median_ms": "ms", "p90_ms": "p90"})
        sizes = self.tables["size"].assign(mb=self.tables["size"].artifact_bytes / 1e6)
        sizes = sizes[["arch", "recipe", "arm", "runtime", "mb"]].drop_duplicates(["arch", "recipe", "arm", "runtime"])
        timed = latency[[*ROW, *CONDITIONS, "ms", "p90", "speedup", "speedup_low", "speedup_high", "run_id"]]
        rows = timed.merge(self.scores.drop(columns="run_of"), "outer", ROW).merge(
            sizes, "left", ["arch", "recipe", "arm", "runtime"]
        )
        rows["run_ids"] = [
            tuple(
                dict.fromkeys(
                    [*(scored if isinstance(scored, tuple) else ()), *([run] if isinstance(run, str) else [])]
                )
            )
            for scored, run in zip(rows.run_ids, rows.run_id, strict=True)
        ]
        facts = [arm_facts(arm) for arm in rows.arm]
        for name in ("label", "int8", "retrained", "trimmed", "control"):
            rows[name] = [getattr(arm, name) for arm in facts]
        rows["deprecated"] = [is_deprecated(*of) for of in zip(rows.arm, rows.runtime, strict=True)]
        return rows

    def row(self, arch: str, arm: str, runtime: str, recipe: str = "", engine: str | None = None) -> dict[str, str]:
        """What names a row: by default with the study's recipe and, for INT8 in eager PyTorch and TorchScript, its engine."""
        if engine is None:
            engine = self.engine if arm_facts(arm).int8 and runtime in ("eager", "torchscript") else ""
        return {"arch": arch, "recipe": recipe or self.recipe, "arm": arm, "runtime": runtime, "engine": engine}

    @cached_property
    def _scored(self) -> dict[tuple, dict[str, Any]]:
        return {_key(line): line for line in self.scores.to_dict("records")}

    def score(self, row: Row) -> dict[str, Any]:
        """The line of `scores` of a row. Raises NotMeasured."""
        if _key(row) not in self._scored:
            raise NotMeasured(f"{_name(row)} was not scored")
        return self._scored[_key(row)]

    @cached_property
    def _timed(self) -> dict[tuple, dict[str, Any]]:
        return {
            (line["run_id"], *_key(line), *_conditions(line)): line
            for line in self.tables["latency"].to_dict("records")
        }

    def timing(self, row: Row, run_id: str = "", **conditions: Any) -> dict[str, Any]:
        """The latency of a row in its architecture's `benchmark`, or in the process called `run_id`.

        conditions: threads, batch, size and pace; by default the study's threads and smallest batch, 32 and hot. With the key
        `times`: ms of each round, float64 [rounds], or None where they were not kept. What contradicts the median of the table
        (times of another median, and then the intervals that came of them) is not used. Raises NotMeasured.
        """
        asked = {"threads": self.threads, "batch": self.batch, "size": 32, "pace": "hot"} | conditions
        key = (run_id or self._process.get(row["arch"], ""), *_key(row), *_conditions(asked))
        if key not in self._timed:
            raise NotMeasured(f"{_name(row)} was not timed at {asked}")
        found = self._timed[key]
        times = self._stored(found["run_id"]).get(times_key(found))
        if times is not None and not np.isclose(np.median(times), found["median_ms"]):
            unknown = {"speedup_low": np.nan, "speedup_high": np.nan}
            found = found | unknown | {"p90_ms": max(found["p90_ms"], found["median_ms"])}
            times = None
        return found | {"times": times}

    def classes(self, row: Row) -> dict[int, np.ndarray]:
        """The class that a row gives each test image: training seed -> uint8 [n], where it was kept. Raises NotMeasured."""
        score = self.score(row)
        key = prediction_key(row["arm"], row["runtime"], row["engine"])
        found = {seed: self._stored(run_id).get(key) for seed, run_id in score["run_of"].items()}
        return {seed: predicted for seed, predicted in found.items() if predicted is not None}

    def answers(self, row: Row) -> dict[int, np.ndarray]:
        """Which test images a row got right: training seed -> bool [n]. Raises NotMeasured where no answers were kept."""
        right = {
            seed: predicted == truth
            for seed, predicted in self.classes(row).items()
            if (truth := self._truth(row, seed)) is not None
        }
        if not right:
            raise NotMeasured(f"no answers of {_name(row)} were kept")
        return right

    def setting_runs(self, arch: str) -> list[str]:
        """Notebook 19's runs of an architecture, each of a machine: the study's own first, because others have longer run_ids."""
        return [run_id for run_id in sorted(self.runs) if run_id.startswith(f"19_settings-{arch}-")]

    def setting_answers(self, run_id: str) -> dict[tuple[str, str], np.ndarray]:
        """Which test images each setting of a run got right: (name, runtime) -> bool [1, n]. Raises NotMeasured."""
        of, stored, model = self.tables["yours"], self._stored(run_id), self.runs[run_id]["parameters"]
        served = of[(of.run_id == run_id) & (of.reason == "")][["arm", "runtime"]].itertuples(index=False, name=None)
        truth = self._truth(model, model["seed"])
        if not stored or truth is None:
            raise NotMeasured(f"no answers of {run_id} were kept")
        predicted = {way: stored[prediction_key(*way)] for way in served}
        return {way: (classes == truth[: len(classes)])[None] for way, classes in predicted.items()}

    def setting_timing(self, run_id: str, name: str, runtime: str) -> dict[str, Any]:
        """The latency of a setting of a run on the most threads, as `timing` gives it. Raises NotMeasured."""
        of = self.tables["yours_latency"]
        of = of[(of.run_id == run_id) & (of.arm == name) & (of.runtime == runtime)]
        if of.empty:
            raise NotMeasured(f"{name} in {runtime} was not timed")
        found = of.loc[of.threads.idxmax()].to_dict()
        found |= {"arch": self.runs[run_id]["parameters"]["arch"], "recipe": RANDOM, "engine": ""}
        return found | {"times": self._stored(run_id).get(times_key(found))}

    def compare(self, a: Row, b: Row, seeds: Iterable[int] = ()) -> Difference:
        """Accuracy of `a` minus that of `b`, image by image on the seeds that both have, or on `seeds`. Raises NotMeasured."""
        key = (_key(a), _key(b), tuple(seeds))
        if key not in self._differences:
            of_a, of_b = (
                {seed: right for seed, right in self.answers(row).items() if not key[2] or seed in key[2]}
                for row in (a, b)
            )
            if not of_a.keys() & of_b.keys():
                raise NotMeasured(f"{_name(a)} and {_name(b)} have no training in common")
            self._differences[key] = difference(*on_common_seeds(of_a, of_b))
        return self._differences[key]

    def faster(self, a: Row, b: Row) -> Ratio:
        """How many times faster `a` is than `b`; both as `timing` gives them. Raises ValueError for two machines or conditions."""
        for condition in ("machine", "threads", "batch"):
            if a[condition] != b[condition]:
                raise ValueError(
                    f"{condition} is {a[condition]!r} and {b[condition]!r}: these latencies do not compare"
                )
        key = tuple((of["run_id"], *_key(of), *_conditions(of)) for of in (a, b))
        if key not in self._ratios:
            self._ratios[key] = latency_ratio(a, b)
        return self._ratios[key]

    def control(self, row: Row) -> dict[str, str]:
        """The row that shows what quantization changed: eager FP32 that trained further if `row` did, where there is one."""
        longer, fp32 = (
            self.row(row["arch"], arm, "eager", row["recipe"]) for arm in (arm_facts(row["arm"]).control, "fp32")
        )
        return longer if _key(longer) in self._scored else fp32

    def cost(self, row: Row, seeds: Iterable[int] = ()) -> Difference:
        """What quantization changed: accuracy of a row minus that of its own FP32 control. Raises NotMeasured."""
        return self.compare(row, self.control(row), seeds)

    @cached_property
    def shared_seeds(self) -> dict[str, list[int]]:
        """Of each timed architecture the trainings of which every row of the benchmark was scored that was scored at all."""
        scored = self.scores.merge(self.benchmark[ROW].drop_duplicates())
        return {
            str(arch): sorted(set.intersection(*({*self.answers(row)} for row in of.to_dict("records"))))
            for arch, of in scored.groupby("arch")
        }

    @cached_property
    def candidates(self) -> pd.DataFrame:
        """What can be chosen: every row of the benchmark that was scored as it runs, and whose file has a size, at `threads`.

        All of an architecture are judged on `shared_seeds`, because more trainings make a wider interval: accuracy in points as
        `percent` with percent_low and percent_high, what quantization changed as `change`, change_low and change_high, `kept`
        (see Difference), `seeds` and `n`; ms, p90, speedup, mb and facts as in `rows`.
        """
        timed = self.rows.merge(self.benchmark[[*ROW, *CONDITIONS, "run_id"]])
        timed = timed[(timed.threads == self.threads) & timed.accuracy.notna() & timed.mb.notna()]
        columns = "percent percent_low percent_high change change_low change_high kept seeds n".split()
        judged = []
        for key in timed[ROW].drop_duplicates().to_dict("records"):
            if seeds := self.shared_seeds[key["arch"]]:
                right = np.stack([self.answers(key)[seed] for seed in seeds])
                low, high = accuracy_interval(right)
                cost = self.cost(key, seeds)
                values = [
                    100 * right.mean(),
                    100 * low,
                    100 * high,
                    cost.points,
                    cost.low,
                    cost.high,
                    cost.kept,
                    *right.shape,
                ]
                judged.append(key | dict(zip(columns, values, strict=True)))
        scores = pd.DataFrame(judged, columns=[*ROW, *columns])
        whole = dict.fromkeys(("threads", "batch", "size"), int)  # floats where other rows have none
        return timed.drop(columns=["accuracy", "low", "high", "seeds", "n"]).astype(whole).merge(scores)

    def choose(self, pool: pd.DataFrame) -> tuple[pd.Series, pd.DataFrame]:
        """The row to take of a `pool` of candidates of one architecture and batch, and those that tie with the fastest.

        Of the rows that tie in latency, those drop out to which quantization did more harm than to another of them, each
        against its own FP32 control (by intervals that hold for all pairs at once); of the rest the smallest file counts, and
        only then the lower median. Raises NotMeasured for an empty pool.
        """
        if pool.empty:
            raise NotMeasured("no row qualifies")
        tied = self._tied(pool)
        left = tied[~tied.index.isin(self._harmed(tied))]
        left = smallest(left)
        return left.loc[left.ms.idxmin()], tied

    def _tied(self, pool: pd.DataFrame) -> pd.DataFrame:
        timings = {
            index: self.timing(row, threads=row.threads, batch=row.batch, run_id=row.run_id)
            for index, row in pool.iterrows()
        }
        fastest = timings[pool.ms.idxmin()]
        return pool[[self.faster(fastest, timings[index]).verdict != "faster" for index in pool.index]]

    def _harmed(self, tied: pd.DataFrame) -> set[Any]:
        """Index of the rows to which quantization is shown to have done more harm than to another of them."""
        pairs = [*combinations(tied.index, 2)]
        changes = {index: self._change(row) for index, row in tied.iterrows()}
        harmed = set()
        for a, b in pairs:
            (row_a, control_a), (row_b, control_b) = changes[a], changes[b]
            if not np.array_equal(control_a, control_b):  # (a - its control) - (b - its control), image by image
                row_a, row_b = row_a.astype(int) + control_b, row_b.astype(int) + control_a
            low, high = difference_interval(row_a, row_b, seed=0, confidence=1 - 0.05 / len(pairs))
            harmed |= {b} if low > 0 else {a} if high < 0 else set()
        return harmed

    def _change(self, row: Row) -> tuple[np.ndarray, np.ndarray]:
        return on_common_seeds(self.answers(row), self.answers(self.control(row)))

    def _right(self, row: Row, of: pd.DataFrame) -> list[np.ndarray]:
        """Right answers, bool [n], of each of the rows `of` accuracy.csv whose answers, and the truth, were kept."""
        key = prediction_key(row["arm"], row["runtime"], row["engine"])
        pairs = [
            (self._stored(run).get(key), self._truth(row, seed)) for run, seed in zip(of.run_id, of.seed, strict=True)
        ]
        return [predicted == truth for predicted, truth in pairs if predicted is not None and truth is not None]

    def _truth(self, row: Row, seed: int) -> np.ndarray | None:
        return self._stored(run_name("01_train", row["arch"], row["recipe"], seed)).get("truth")

    def _stored(self, run_id: str) -> dict[str, np.ndarray]:
        """The arrays of one run: answers (prediction_key) and times (times_key); none where it kept none."""
        if run_id not in self._arrays:
            path = self.folder / "predictions" / f"{run_id}.npz"
            self._arrays[run_id] = read_arrays(path) if path.exists() else {}
        return self._arrays[run_id]


def smallest(pool: pd.DataFrame) -> pd.DataFrame:
    """The rows of the smallest file; sizes within a tenth count as equal."""
    return pool[pool.mb <= TENTH * pool.mb.min()]


def difference(a: np.ndarray, b: np.ndarray) -> Difference:
    """The difference of two rows by their right answers on the same images. a, b: bool [seeds, n]."""
    low, high = difference_interval(a, b, seed=0)
    inner = difference_interval(a, b, seed=0, confidence=0.90)
    p = (
        mcnemar_exact(a[0], b[0])
        if len(a) == 1
        else float(np.nan_to_num(ttest_1samp(a.mean(1) - b.mean(1), 0).pvalue, nan=1))
    )
    equal = -MARGIN < inner[0] and inner[1] < MARGIN
    return Difference(100 * (a.mean() - b.mean()), 100 * low, 100 * high, p, *a.shape, equal)


def read_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """Read runs.json of a results folder: run_id -> how that run came to be. Raises StudyError when it is damaged."""
    path = Path(folder) / "runs.json"
    with refused(f"{path} is damaged; gather the records of the run again"):
        runs = json.loads(path.read_text())
        for run_id, run in runs.items():
            check_run(run_id, run)
    return runs


def check_run(run_id: str, run: Any) -> None:
    """Raise StudyError if `run` does not say how a run came to be, as `records.save_record` does."""
    kinds = {"notebook": str, "parameters": dict, "commit": str, "date": str, "data": dict | None, "versions": dict}
    whole = isinstance(run, dict) and all(isinstance(run.get(key, ...), kind) for key, kind in kinds.items())
    if not whole or not isinstance((run["data"] or {"name": ""}).get("name"), str):
        raise StudyError(f"{run_id} does not say how it came to be ({', '.join(kinds)}); run its notebook again.")


def _read_table(path: Path, columns: list[str]) -> pd.DataFrame:
    again = "gather the records of the run again (make publish, or notebook 7 of that run)"
    if not path.exists():
        raise StudyError(f"{path} is missing; {again}.")
    try:
        frame = pd.read_csv(path, keep_default_na=False, na_values={column: [""] for column in MAY_BE_MISSING})
    except Exception as error:  # pandas has several of its own
        raise StudyError(f"{path} is damaged ({first_line(error)}); {again}.") from error
    if absent := [column for column in columns if column not in frame]:
        raise StudyError(f"{path} is of an older form (it has no {', '.join(absent)}); {again}.")
    numbers = [column for column in columns if column in NUMBERS]
    if wrong := [column for column in numbers if len(frame) and not pd.api.types.is_numeric_dtype(frame[column])]:
        raise StudyError(f"{path} is damaged ({', '.join(wrong)} is not a number everywhere); {again}.")
    return frame[columns]


NUMBERS = (
    "seed training n correct accuracy ci_low ci_high threads batch size rounds median_ms p90_ms speedup parameters "
    "artifact_bytes value images draw streams processes rate images_per_second p50_ms p99_ms cores_busy memory_bytes"
).split()


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in ROW)


def _conditions(row: Row) -> tuple[int, int, int, str]:
    return int(row["threads"]), int(row["batch"]), int(row["size"]), row["pace"]


def _name(row: Row) -> str:
    return f"{row['arch']} {prediction_key(row['arm'], row['runtime'], row['engine'])}"
