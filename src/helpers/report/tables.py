"""The tables of the study: frames of numbers with the units in their column names, and `shown` for the eye.

A number with an interval takes three columns: `x`, `x low` and `x high`. Accuracy and differences are in percent and
percentage points, intervals at 95 %. What was not measured is NaN; a table of which nothing was measured is empty.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from helpers.machine import INSTRUCTIONS, instructions
from helpers.report.results import ROW, Difference, NotMeasured, Results, Row, difference, smallest
from helpers.report.schema import (
    ARCH_LABELS,
    ARMS,
    ENOUGH,
    OBSERVERS,
    PYTORCH,
    RANDOM,
    RUNTIMES,
    arm_facts,
)
from helpers.report.stats import Ratio, holm

THEIRS = Path("book/reference_study.csv")  # what the reference study reported
# What a reader can do tomorrow: no training, nothing deprecated, for images of any size.
PLAIN = [("fp32", "eager"), ("fp32", "openvino"), ("ptq_nncf", "openvino"), ("ptq_ort_u8", "onnxruntime")]
# What is set side by side for all machines.
ON_MACHINES = [
    ("fp32", "eager"),
    ("fp32", "torchscript"),
    ("fp32", "openvino"),
    ("ptq", "torchscript"),
    ("ptq", "openvino"),
    ("ptq_nncf", "openvino"),
    ("trimmed_ptq_nncf", "openvino"),
    ("qat_trimmed", "openvino"),
]
PACES = {"hot": "hot", "idle_10": "rested"}  # those that the first screen shows

# What the reference study claims: how many times faster one row is than another; threads where it had no such row.
THEIR_SPEED_UPS = [
    ("PTQ in TorchScript, times faster than eager FP32", ("ptq", "torchscript"), ("fp32", "eager"), 0),
    ("QAT in TorchScript, times faster than eager FP32", ("qat", "torchscript"), ("fp32", "eager"), 0),
    ("NNCF's INT8, times faster than OpenVINO FP32", ("ptq_nncf", "openvino"), ("fp32", "openvino"), 0),
    ("the same with 1 thread", ("ptq_nncf", "openvino"), ("fp32", "openvino"), 1),
]
# And what an arm gains or loses against the FP32 that it started from, in points; its name there; with whose recipe.
THEIR_COSTS = [
    ("PTQ with default observers minus FP32, points", "ptq_default", "ptq", ""),
    ("PTQ with robust observers minus FP32, points", "ptq", "", ""),
    ('their "QAT" minus the FP32 it started from, points', "qat_observer_only", "qat", ""),
    ("the same with their recipe, points", "qat_observer_only", "qat", "as_run"),
    ("FP32 trained as long with their recipe, points", "fp32_longer", "", "as_run"),
    ("QAT minus the FP32 it started from, points", "qat", "", ""),
]

# Which rows qualify for a need; all of them are shown to lose at most half a point to quantization.
NEEDS: dict[str, Callable[[pd.DataFrame], pd.Series]] = {
    "lowest latency": lambda of: of.kept,
    "nothing deprecated": lambda of: ~of.deprecated,
    "nothing deprecated, not retrained, any image size": lambda of: (
        ~of.deprecated & ~of.retrained & ~of.trimmed & of.int8
    ),
    "PTQ, not retrained": lambda of: of.int8 & ~of.retrained,
    "no quantization": lambda of: ~of.int8 & ~of.retrained,
    "smallest file": lambda of: of.index.isin(smallest(of[of.kept]).index),
    "PyTorch only": lambda of: of.runtime.isin(PYTORCH),
    "PyTorch only, nothing deprecated": lambda of: of.runtime.isin(PYTORCH) & ~of.deprecated,
}


def path_label(row: Row) -> str:
    """A row in plain words: what runs it, and what was done to the weights; the engine where it is not the usual one."""
    engine = f" ({row['engine']})" if row["engine"] not in ("", "fbgemm") else ""
    return f"{RUNTIMES[row['runtime']]}{engine}: {arm_facts(row['arm']).label}"


def model_label(arch: str, recipe: str = "") -> str:
    """An architecture in plain words, and the recipe where it is named."""
    return ARCH_LABELS.get(arch, arch) + (f", {recipe}" if recipe else "")


def headline(results: Results) -> pd.DataFrame:
    """What PyTorch FP32, OpenVINO FP32, INT8 by NNCF and INT8 by ONNX Runtime give, one image at a time, as benchmarked."""
    of = results.candidates
    of = of[of.batch == results.batch]
    return _lines(
        _judged(row)
        for arch in results.archs
        for arm, runtime in PLAIN
        for _, row in of[(of.arch == arch) & (of.arm == arm) & (of.runtime == runtime)].iterrows()
    )


def choices(results: Results) -> pd.DataFrame:
    """The row to take for each need (see `Results.choose`) and how many tie with the fastest; eager FP32 alone answers none."""
    lines = []
    for (arch, batch), of in results.candidates.groupby(["arch", "batch"]):
        kept = of[of.kept]
        for need, qualifies in (
            NEEDS.items() if batch == results.batch else {f"batches of {batch}": NEEDS["lowest latency"]}.items()
        ):
            pool = kept[qualifies(kept)]
            if pool.empty or not ((pool.runtime != "eager") | (pool.arm != pool.control)).any():
                continue
            row, tied = results.choose(pool)
            lines.append(
                {"model": model_label(arch), "need": need} | _judged(row) | {"tied": len(tied), "of": len(pool)}
            )
    return _lines(lines)


def rows(results: Results) -> pd.DataFrame:
    """Every row that was timed at the study's threads, one image at a time, fastest first; accuracy over all its seeds."""
    of = results.rows.merge(results.benchmark[[*ROW, "threads", "batch", "run_id"]])
    of = of[(of.threads == results.threads) & (of.batch == results.batch)]
    return _lines(_measured(row) for _, row in of.sort_values(["arch", "ms"]).iterrows())


def reference(results: Results, table: int, theirs: Path = THEIRS) -> pd.DataFrame:
    """Table 1 (PyTorch) or 2 (OpenVINO) of the reference study, ours beside theirs; rows that we lack are left out.

    Another machine and another training: compare ratios, not milliseconds.
    """
    asked = _theirs(theirs)
    lines = []
    for line in asked[asked.table == table].to_dict("records"):
        try:
            row = results.row(line["arch"], line["arm"], line["runtime"])
            ours = _measured(_joined(results, row))
        except NotMeasured:
            continue
        lines.append(ours | {"their times": line["times"], "their ms": line["latency_ms"]})
        if table == 1:
            lines[-1] |= {"their accuracy, %": line["accuracy_percent"], "their MB": line["size_mb"]}
    return _lines(lines)


def reference_claims(results: Results, theirs: Path = THEIRS) -> pd.DataFrame:
    """What the reference study concluded, as numbers that both studies have: theirs beside ours."""
    asked = _theirs(theirs)
    lines = []
    for arch in [arch for arch in results.archs if arch in {*asked.arch}]:
        their = asked[asked.arch == arch].set_index(["arm", "runtime"])
        for claim, fast, slow, threads in THEIR_SPEED_UPS:
            ratio = np.nan if threads else their.latency_ms[slow] / their.latency_ms[fast]
            try:
                pair = (
                    results.timing(results.row(arch, *of), threads=threads or results.threads) for of in (fast, slow)
                )
                ours = _of(results.faster(*pair), "ours")
            except NotMeasured:
                continue
            lines.append({"model": model_label(arch), "claim": claim, "theirs": ratio} | ours)
        percent = their.accuracy_percent.xs("eager", level="runtime")
        for claim, arm, called_there, recipe in THEIR_COSTS:
            points = percent[called_there] - percent["fp32"] if called_there else np.nan
            try:
                cost = results.compare(*(results.row(arch, of, "eager", recipe) for of in (arm, "fp32")))
            except NotMeasured:
                continue
            lines.append({"model": model_label(arch), "claim": claim, "theirs": points} | _of(cost, "ours"))
    return _lines(lines)


def costs(results: Results) -> pd.DataFrame:
    """What each INT8 row lost to quantization: minus eager FP32 that trained as long, over all seeds that both have."""
    scored = results.scores[results.scores.recipe == results.recipe]
    lines = []
    for row in scored[[arm_facts(arm).int8 for arm in scored.arm]].to_dict("records"):
        try:
            cost = results.cost(row)
        except NotMeasured:
            continue
        lines.append(
            _named(row)
            | {"against": arm_facts(results.control(row)["arm"]).label}
            | _points(cost)
            | {"kept": cost.kept}
        )
    return _lines(lines)


def observers(results: Results) -> pd.DataFrame:
    """PTQ in eager PyTorch with its default observers and with robust ones, and what either loses to FP32."""
    lines = []
    for arch, recipe in results.scores[results.scores.arm == "ptq_default"][["arch", "recipe"]].itertuples(index=False):
        fp32 = results.row(arch, "fp32", "eager", recipe)
        line = {"model": model_label(arch, recipe), "FP32, %": 100 * results.score(fp32)["accuracy"]}
        for name, arm in (("default", "ptq_default"), ("robust", "ptq")):
            row = results.row(arch, arm, "eager", recipe)
            cost = results.compare(row, fp32)
            line |= {f"{name}, %": 100 * results.score(row)["accuracy"]} | _of(cost, f"{name}, points")
        lines.append(line | {"seeds": cost.seeds, "n": cost.n})
    return _lines(lines)


def trainings(results: Results) -> pd.DataFrame:
    """Accuracy in eager PyTorch of every training, in percent, one line each; two trainings of one seed are two lines."""
    accuracy = results.tables["accuracy"]
    of = accuracy[
        (accuracy.runtime == "eager") & (accuracy.data == results.data) & accuracy.engine.isin(["", results.engine])
    ]
    of = of[of.arm.isin(["fp32", "ptq_default", "ptq", "fp32_longer", "ptq_longer", "qat", "qat_observer_only"])]
    of = of.assign(model=[model_label(*key) for key in zip(of.arch, of.recipe, strict=True)], percent=100 * of.accuracy)
    wide = of.pivot_table(index=["model", "seed", "training"], columns="arm", values="percent", aggfunc="first")
    return wide[[arm for arm in ARMS if arm in wide]].rename(columns=lambda arm: f"{ARMS[arm].label}, %").reset_index()


def qat(results: Results) -> pd.DataFrame:
    """QAT in eager PyTorch against what it started from and against PTQ of FP32 that trained as long, by model.

    `gain`: QAT minus the FP32 it started from. `training`: further training in FP32 alone, minus the same. `points`: QAT minus
    PTQ of FP32 trained as long, the difference that is QAT's own; its verdict is that of `qat_by_runtime`. The line of the
    reference study's recipe has its kind of "QAT", of observers only.
    """
    lines = []
    itself = qat_by_runtime(results)
    for line in itself[itself.runtime == "eager"].to_dict("records") if len(itself) else ():
        arch, recipe, arm = line["arch"], line["recipe"], line["arm"]
        fp32, longer, row = (results.row(arch, of, "eager", recipe) for of in ("fp32", "fp32_longer", arm))
        found = {"model": model_label(arch, recipe), "QAT": ARMS[arm].label}
        found |= _of(results.compare(row, fp32), "gain") | _of(results.compare(longer, fp32), "training")
        lines.append(
            found | {key: line[key] for key in ("points", "points low", "points high", "p, Holm", "seeds", "verdict")}
        )
    return _lines(lines)


def qat_by_runtime(results: Results) -> pd.DataFrame:
    """QAT minus PTQ of FP32 that trained as long in every runtime that scored both; p corrected after Holm for these.

    Runtimes in which both arms answer every image alike are one test. For the recipe of the reference study (as_run) its own
    "QAT" is compared, too.
    """
    lines: list[dict[str, Any]] = []
    models = results.scores[results.scores.arm == "qat"][["arch", "recipe"]].drop_duplicates()
    for arch, recipe in models.itertuples(index=False):
        for arm in ("qat", "qat_observer_only") if recipe == "as_run" else ("qat",):
            lines += _qat_by_runtime(results, arch, recipe, arm)
    return pd.DataFrame(lines)


def _qat_by_runtime(results: Results, arch: str, recipe: str, arm: str) -> list[dict[str, Any]]:
    found: dict[str, Difference] = {}
    for runtime in RUNTIMES:
        try:
            pair = (results.row(arch, of, runtime, recipe) for of in (arm, "ptq_longer"))
            found[runtime] = results.compare(*pair)
        except NotMeasured:
            continue
    p = {of: of.p for of in found.values()}  # one test for runtimes that answer alike
    corrected = dict(zip(p, holm([*p.values()]), strict=True))
    return [
        {"arch": arch, "recipe": recipe, "arm": arm, "model": model_label(arch, recipe), "runtime": runtime}
        | _of(of, "points")
        | {"p, Holm": corrected[of], "seeds": of.seeds, "n": of.n, "verdict": of.verdict_at(corrected[of])}
        for runtime, of in found.items()
    ]


def qat_of_tools(results: Results) -> pd.DataFrame:
    """QAT by NNCF and by torchao's PT2E in OpenVINO, minus PTQ of FP32 that trained as long: NNCF's where there is one."""
    lines = []
    for arch in results.archs:
        for arm, control in (("qat_nncf", "ptq_longer_nncf"), ("qat_pt2e", "ptq_longer")):
            try:
                cost = results.compare(*(results.row(arch, of, "openvino") for of in (arm, control)))
            except NotMeasured:
                continue
            lines.append(
                {"model": model_label(arch), "QAT": ARMS[arm].label, "against": ARMS[control].label} | _points(cost)
            )
    return _lines(lines)


def runtimes(results: Results) -> pd.DataFrame:
    """What runs a model without anything deprecated, fastest first, and last PyTorch's eager INT8 as a file.

    `of FP32 there`: the median beside that of FP32 in the same runtime; above 1 INT8 is slower.
    """
    lines = []
    for arch in results.archs:
        of = results.rows.merge(results.benchmark[[*ROW, "threads", "batch", "run_id"]])
        of = of[(of.arch == arch) & (of.threads == results.threads) & (of.batch == results.batch)]
        of = of[~of.runtime.isin(["eager", "torchscript"]) & ~of.trimmed & (of.int8 | ~of.retrained)]
        of = of[~of.deprecated | (of.arm == "ptq")].assign(last=of.deprecated).sort_values(["last", "ms"])
        for row in of.to_dict("records"):
            fp32 = results.row(arch, "fp32", row["runtime"].removesuffix("_bf16"))
            line = _measured(row) | {"of FP32 there": row["ms"] / results.timing(fp32)["median_ms"]}
            try:
                line |= _of(results.cost(row), "points")
            except NotMeasured:
                pass
            lines.append(line)
    return _lines(lines)


def trimming(results: Results) -> pd.DataFrame:
    """Each model without its dead taps beside the whole one, timed in one process: bytes, milliseconds, answers."""
    lines = []
    for arch in results.archs:
        of = results.benchmark
        keys = of[(of.arch == arch) & of.arm.isin([arm for arm, facts in ARMS.items() if facts.trimmed])][ROW]
        for cut in keys.drop_duplicates().to_dict("records"):
            whole = cut | {"arm": ARMS[cut["arm"]].untrimmed}
            try:
                before, after = results.timing(whole), results.timing(cut)
                ratio, change = results.faster(after, before), results.compare(cut, whole)
                sizes = {"MB before": _joined(results, whole)["mb"], "MB": _joined(results, cut)["mb"]}
            except NotMeasured:
                continue
            lines.append(
                _named(cut)
                | sizes
                | {"ms before": before["median_ms"], "ms": after["median_ms"]}
                | _of(ratio, "times")
                | {"verdict": ratio.verdict}
                | _of(change, "points")
            )
    return _lines(lines)


def machines(results: Results) -> pd.DataFrame:
    """Speed-ups over eager FP32 of a few paths on every machine that timed them, 32x32, hot, one image a call.

    By instruction set, the least first; the baseline is each machine's own. A machine has one line a path: of notebook 6 where
    it has run there, else of notebook 18, whose weights are random.
    """
    latency = results.tables["latency"]
    of = latency[(latency.threads == results.threads) & (latency.pace == "hot") & (latency["size"] == 32)]
    of = of[(of.batch == results.batch) & of.engine.isin(["", results.engine])]
    of = of[(of.recipe != RANDOM) | of.run_id.str.startswith("18_this_machine")]
    of = of.assign(random=of.recipe == RANDOM)
    of = of.sort_values(["random", "run_id"], kind="stable").drop_duplicates(["arch", "arm", "runtime", "machine"])
    return _lines(
        _named(row) | _machine(results, row) | {"ms": row["median_ms"]} | _speedup(row)
        for row in _by_instructions(results, of, ON_MACHINES)
    )


def machines_by_size(results: Results) -> pd.DataFrame:
    """How many times faster than eager FP32 on every machine that ran notebook 8, by image size, in a hot loop and rested.

    Of several runs on one machine the first: the study's own before that of `make machine`.
    """
    latency = results.tables["latency"]
    of = latency[latency.run_id.str.startswith("08_carry_over") & (latency.batch == 1)]
    of = of[of["size"].isin([32, 224]) & of.pace.isin(PACES)]
    of = of[of.threads == of.groupby("run_id").threads.transform("max")]
    of = of.sort_values("run_id", kind="stable").drop_duplicates(["arch", "arm", "runtime", "machine", "size", "pace"])
    return _lines(
        _named(row)
        | {"images": f"{row['size']}x{row['size']}, {PACES[row['pace']]}"}
        | _machine(results, row)
        | {"ms": row["median_ms"]}
        | _speedup(row)
        for row in _by_instructions(results, of, PLAIN)
    )


def side_by_side(machines: pd.DataFrame) -> pd.DataFrame:
    """A table of `machines` or `machines_by_size` as text: a column for each machine, with times, and ms of the baseline."""
    if machines.empty:
        return machines
    text = as_text(machines)
    baseline = machines.path == path_label({"arm": "fp32", "runtime": "eager", "engine": ""})
    times = text["times [95 % CI]"].str.replace(", ", ",\u00a0")
    return _by_machine(text.assign(cell=times.mask(baseline, text.ms + " ms")), ["model", "path", "images"])


def settings(results: Results) -> pd.DataFrame:
    """Notebook 19's settings as text, with a column for each machine: points minus and times faster than its eager FP32."""
    lines = []
    for run_id in [run_id for arch in ARCH_LABELS for run_id in results.setting_runs(arch)]:
        with suppress(NotMeasured):
            right = results.setting_answers(run_id)
            for (name, runtime), answers in right.items():
                row, change = results.setting_timing(run_id, name, runtime), difference(answers, right["fp32", "eager"])
                line = {"model": model_label(row["arch"]), "setting": name, "runtime": RUNTIMES[runtime]}
                cell = f"{change.points:+.1f}, {row['speedup']:.1f}x"
                lines.append(line | _machine(results, row) | {"cell": cell})
    return _by_machine(_lines(lines), ["model", "setting", "runtime"])


def _by_machine(lines: pd.DataFrame, rows: Sequence[str]) -> pd.DataFrame:
    """`lines` with a column for each machine, named after its instructions and CPU, the one with the least instructions first.

    rows: columns that stay, where `lines` has them. The others have to hold instructions, machine and cell.
    """
    if lines.empty:
        return lines
    kept = [column for column in rows if column in lines]
    cpus = lines.machine.str.partition(",")[0].str.replace(r"\(\w+\)| Processor", "", regex=True)
    names = lines.instructions + ", " + cpus
    unique = lines.machine.groupby(names).transform("nunique") == 1
    lines = lines.assign(column=names.where(unique, lines.machine))
    by_strength = lines.sort_values("instructions", key=lambda of: of.map(_WEAKEST_FIRST.index), kind="stable")
    wide = lines.set_index([*kept, "column"]).cell.unstack(fill_value="")[by_strength.column.unique()]
    return wide.loc[[*dict.fromkeys(lines[kept].itertuples(index=False, name=None))]].reset_index()


_WEAKEST_FIRST = ["", *reversed(INSTRUCTIONS.values())]


def _machine(results: Results, row: Row) -> dict[str, Any]:
    isa = results.runs.get(row["run_id"], {}).get("isa", ())
    return {"instructions": instructions(isa), "machine": row["machine"]}


def _by_instructions(results: Results, of: pd.DataFrame, paths: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Rows of latency of these paths, a path at a time, the machine with the least instructions first."""
    kept = [row for row in of.to_dict("records") if (row["arm"], row["runtime"]) in paths]
    return sorted(
        kept,
        key=lambda row: (
            row["arch"],
            paths.index((row["arm"], row["runtime"])),
            _WEAKEST_FIRST.index(_machine(results, row)["instructions"]),
            row["machine"],
            row["size"],
        ),
    )


def exports(results: Results) -> pd.DataFrame:
    """Seconds to write a file, first call, and share of images that get the class of its source; or why there is none."""
    of = results.tables["exports"]
    of = of[of.recipe == results.recipe].sort_values(["seed", "run_id"]).drop_duplicates(["arch", "arm", "runtime"])
    return _lines(
        {"model": model_label(row["arch"]), "path": path_label(row | {"engine": ""}), "export s": row["export_seconds"]}
        | {"first call ms": row["first_call_ms"], "same class, %": 100 * row["agreement"], "reason": row["reason"]}
        for row in of.sort_values(["arch", "arm", "runtime"]).to_dict("records")
    )


def calibration(results: Results) -> pd.DataFrame:
    """PTQ's validation accuracy by observer and number of calibration images: the mean, least and most of the draws."""
    of = results.tables["calibration"]
    of = of[(of.weights == "per_channel") & (of.recipe == results.recipe)]
    fp32 = results.tables["calibration"].query("observer == ''").groupby("arch").accuracy.mean()
    return _lines(
        {"model": model_label(arch), "observer": OBSERVERS[observer], "images": images, "FP32, %": 100 * fp32[arch]}
        | {
            "accuracy, %": 100 * draws.mean(),
            "least, %": 100 * draws.min(),
            "most, %": 100 * draws.max(),
            "draws": len(draws),
        }
        for (arch, observer, images), draws in of.groupby(["arch", "observer", "images"]).accuracy
    )


def bit_widths(results: Results) -> pd.DataFrame:
    """QAT and PTQ of FP32 that trained as long at several widths, simulated: accuracies and QAT minus PTQ."""
    lines = []
    for arch in sorted(results.scores.arch.unique()):
        for width in ("w8a8", "w4a8", "w4a4"):
            qat_row, *controls = (
                results.row(arch, f"{arm}_{width}", "simulated") for arm in ("qat", "ptq_longer", "ptq_longer_default")
            )
            try:
                line = {
                    "model": model_label(arch),
                    "width": width.upper(),
                    "QAT, %": 100 * results.score(qat_row)["accuracy"],
                }
                for name, row in zip(("PTQ", "PTQ, default observers"), controls, strict=True):
                    found = results.compare(qat_row, row)
                    line |= {f"{name}, %": 100 * results.score(row)["accuracy"]} | _of(found, f"QAT minus {name}")
                lines.append(line | {"seeds": found.seeds})
            except NotMeasured:
                continue
    return _lines(lines)


def flips(results: Results) -> pd.DataFrame:
    """Images that change their class though accuracy stays, in eager PyTorch: changed, and what becomes of them, in percent."""
    of = results.tables["diagnosis"].query("check == 'flips'")
    parts = of.setting.str.split(n=1, expand=True) if len(of) else pd.DataFrame(columns=[0, 1])
    of = of.assign(arm=parts[0], what=parts[1], percent=100 * of.value)
    wide = of.pivot_table(index=["arch", "arm", "n"], columns="what", values="percent").reset_index()
    wide.insert(0, "model", wide.arch.map(model_label))
    wide.insert(2, "path", [arm_facts(arm).label for arm in wide.arm])
    return wide.drop(columns=["arch", "arm"]).rename(columns={name: f"{name}, %" for name in of.what.unique()})


def carry_over(results: Results) -> pd.DataFrame:
    """Latency by image size, batch and pace, with random weights, in one process: ms and times faster than eager FP32."""
    of = results.carried
    return _lines(
        {"model": model_label(row["arch"]), "path": path_label(row), "size": row["size"], "batch": row["batch"]}
        | {"pace": row["pace"], "threads": row["threads"], "ms": row["median_ms"], "p90 ms": row["p90_ms"]}
        | _speedup(row)
        for row in of.sort_values(["arch", "threads", "size", "batch", "pace", "median_ms"]).to_dict("records")
    )


def first_screen(results: Results) -> pd.DataFrame:
    """The plain paths at 32x32 and 224x224, in a hot loop and after 10 ms of rest, one image a call: ms, times, accuracy.

    Latencies are of one process with random weights, at its largest number of threads; accuracies of the trained models.
    """
    of = results.carried[results.carried.batch == 1]
    of = of[(of.threads == of.threads.max()) & of["size"].isin([32, 224]) & of.pace.isin(PACES)]
    lines = []
    for (arch, arm, runtime), group in of.groupby(["arch", "arm", "runtime"]):
        if (arm, runtime) not in PLAIN:
            continue
        line: dict[str, Any] = {"model": model_label(arch), "path": path_label(group.iloc[0])}
        for (size, pace), row in group.groupby(["size", "pace"]):
            name = f"{size}x{size}, {PACES[pace]}"
            line |= {f"{name}, ms": row.median_ms.iloc[0], f"{name}, times": row.speedup.iloc[0]}
        try:
            line |= (
                _of(results.cost(results.row(arch, arm, runtime), results.shared_seeds.get(arch, ())), "points")
                if arm != "fp32"
                else {}
            )
        except NotMeasured:
            pass
        lines.append((results.archs.index(arch) if arch in results.archs else 9, PLAIN.index((arm, runtime)), line))
    return _lines(line for _, _, line in sorted(lines, key=lambda of: of[:2]))


NEARLY = 0.05  # what lies so near the best counts as equally good
SERVICE = "arch size arm runtime batch streams processes threads setting".split()


def load(of: pd.DataFrame) -> pd.DataFrame:
    """What each way to serve gives: images a second and resident MB, call after call; latency at random arrivals.

    of: rows of load. Shares are of the images a second in the same line. Without the settings that `rested` compares.
    """
    loaded, lines = of[of.pace.str.startswith("load_")], []
    kept = of.merge(loaded[SERVICE].drop_duplicates(), "left", SERVICE, indicator=True)
    for _, group in kept[(kept["_merge"] == "both") | (kept.batch > 1)].groupby(SERVICE, sort=False):
        hot = group[group.pace == "hot"].iloc[0]
        line = _service(hot) | {"images/s": hot.images_per_second, "MB": hot.memory_bytes / 1e6}
        for row in group[group.pace.str.startswith("load_")].itertuples():
            share = row.pace.removeprefix("load_")
            line |= {f"p50 ms at {share} %": row.p50_ms, f"p99 ms at {share} %": _p99(row)}
        lines.append(line)
    return _lines(lines)


def rested(of: pd.DataFrame) -> pd.DataFrame:
    """One request at a time, by number of threads and setting: images a second in a hot loop; latency and cores busy after a rest.

    of: rows of load.
    """
    alone, lines = of[of.batch * of.streams * of.processes == 1], []
    for _, group in alone.groupby(SERVICE, sort=False):
        line = _service(group.iloc[0])
        for row in group[~group.pace.str.startswith("load_")].itertuples():
            if row.pace == "hot":
                line |= {"images/s": row.images_per_second, "p50 ms, hot": row.p50_ms}
            else:
                idle = row.pace.removeprefix("idle_")
                line |= {f"p50 ms after {idle}": row.p50_ms, f"cores busy, {idle}": row.cores_busy}
        lines.append(line)
    return _lines(lines)


def load_choice(of: pd.DataFrame, limit_ms: float) -> pd.DataFrame:
    """How to serve each model, by rule; of what is nearly as good as the best (NEARLY), what costs least.

    of: rows of load. Three needs: the most requests a second at random arrivals whose p99 is at most `limit_ms`, for the
    least memory; the shortest median after the longest rest, for the fewest cores kept busy; and the number of threads that
    answers most one at a time, call after call, the fewest. A need that nothing meets has no line.
    """
    alone = (of.batch * of.streams * of.processes == 1) & ~of.pace.str.startswith("load_")
    rests = of.pace.str.extract(r"^idle_(\d+)$")[0].astype(float)
    p99 = pd.Series([_p99(row) for row in of.itertuples()], of.index, float)
    count = of.threads.where(of.threads > 0, np.inf)  # the runtime's own choice comes last
    needs = {
        "requests/s under load": (of[of.pace.str.startswith("load_") & (p99 <= limit_ms)], "rate", False),
        "ms after a rest": (of[alone & (rests == rests.max())], "p50_ms", True),
        "images/s by threads": (of[alone & (of.pace == "hot") & (of.setting == "")], "images_per_second", False),
    }
    costs = dict(zip(needs, ("memory_bytes", "cores_busy", "count"), strict=True))
    lines = []
    for need, (pool, column, ascending) in needs.items():
        for _, group in pool.assign(count=count).groupby(["arch", "size", "arm", "runtime"], sort=False):
            best = group[column].min() if ascending else group[column].max()
            nearly = (
                group[group[column] <= best * (1 + NEARLY)]
                if ascending
                else group[group[column] >= best * (1 - NEARLY)]
            )
            row = nearly.sort_values([costs[need], column], ascending=[True, ascending]).iloc[0]
            line = {"need": need} | _service(row) | {"value": row[column], "p99 ms": _p99(row)}
            lines.append(line | {"cores busy": row.cores_busy, "MB": row.memory_bytes / 1e6})
    return _lines(lines)


def _service(row: Any) -> dict[str, Any]:
    path = path_label({"runtime": row.runtime, "arm": row.arm, "engine": ""})
    shown = {"model": model_label(row.arch), "path": path, "size": row["size"], "batch": row.batch}
    threads = row.threads or "its own"
    return shown | {"streams": row.streams, "processes": row.processes, "threads": threads, "setting": row.setting}


def _p99(row: Any) -> float:
    return row.p99_ms if row.n >= ENOUGH else np.nan


def runs(results: Results) -> pd.DataFrame:
    """Where every record comes from: notebook, date, commit, data and machine of each run_id."""
    return _lines(
        {"run_id": run_id, "notebook": run["notebook"], "date": run["date"], "commit": run["commit"][:12]}
        | {
            "data": (run["data"] or {}).get("name", ""),
            "cpu": run["cpu"],
            "cores": run["cores"],
            "isa": " ".join(run["isa"]),
        }
        | {"gpu": run["gpu"]}
        for run_id, run in sorted(results.runs.items())
    )


def verdicts(frame: pd.DataFrame) -> pd.DataFrame:
    """How many lines of a table have each verdict, by model."""
    return (
        frame.pivot_table(index="model", columns="verdict", aggfunc="size", fill_value=0).reset_index()
        if len(frame)
        else frame
    )


def shown(frame: pd.DataFrame) -> Styler:
    """A table for the eye: `x low` and `x high` become `x [95 % CI]`, numbers are rounded by their unit."""
    return as_text(frame).style.hide(axis="index").set_table_attributes('class="results"')


def as_text(frame: pd.DataFrame) -> pd.DataFrame:
    """The same as text, for Markdown and HTML."""
    text = {}
    for column in frame:
        if column.endswith((" low", " high")):
            continue
        values = [_text(column, value) for value in frame[column]]
        if f"{column} low" in frame:
            ends = zip(values, frame[f"{column} low"], frame[f"{column} high"], strict=True)
            values = [
                f"{value} [{_text(column, low)}, {_text(column, high)}]" if low == low else value
                for value, low, high in ends
            ]
            text[f"{column} [95 % CI]"] = values
        else:
            text[column] = values
    return pd.DataFrame(text)


def _text(column: str, value: Any) -> str:
    if not isinstance(value, float | np.floating):
        return str(value)
    if np.isnan(value):
        return ""
    points = column.endswith("points") or column in ("gain", "training") or column.startswith("QAT minus")
    if points:
        return f"{value:+.2f}"
    if column.startswith("p,") or column == "p":
        return f"{value:.2g}"
    return f"{value:.1f}" if column.endswith(("times", "MB", "MB before", "export s", "images/s")) else f"{value:.2f}"


def _lines(lines: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame([*lines])


def _named(row: Row) -> dict[str, Any]:
    return {"model": model_label(row["arch"]), "path": path_label(row)}


def _of(found: Ratio | Difference, name: str) -> dict[str, float]:
    value = found.times if isinstance(found, Ratio) else found.points
    return {name: value, f"{name} low": found.low, f"{name} high": found.high}


def _points(found: Difference) -> dict[str, Any]:
    return _of(found, "points") | {"p": found.p, "seeds": found.seeds, "n": found.n, "verdict": found.verdict}


def _speedup(row: Row) -> dict[str, float]:
    return {"times": row["speedup"], "times low": row["speedup_low"], "times high": row["speedup_high"]}


def _judged(row: Row) -> dict[str, Any]:
    """A candidate: what it takes, gains and loses."""
    found = _named(row) | {"ms": row["ms"], "p90 ms": row["p90"]} | _speedup(row)
    found |= {
        "accuracy, %": row["percent"],
        "accuracy, % low": row["percent_low"],
        "accuracy, % high": row["percent_high"],
    }
    found |= {"points": row["change"], "points low": row["change_low"], "points high": row["change_high"]}
    return found | {"MB": row["mb"], "seeds": row["seeds"]}


def _measured(row: Row) -> dict[str, Any]:
    """A line of `Results.rows`: latency, and accuracy over all its seeds."""
    found = _named(row) | {"ms": row["ms"], "p90 ms": row["p90"]} | _speedup(row)
    percent = {f"accuracy, %{end}": 100 * row[of] for end, of in (("", "accuracy"), (" low", "low"), (" high", "high"))}
    return found | percent | {"seeds": row["seeds"], "MB": row["mb"]}


def _joined(results: Results, row: Row) -> dict[str, Any]:
    """The line of `Results.rows` that is the benchmark's, one image at a time. Raises NotMeasured."""
    timing = results.timing(row)
    of = results.rows
    found = of[(of.run_id == timing["run_id"]) & (of.threads == timing["threads"]) & (of.batch == timing["batch"])]
    for key in ROW:
        found = found[found[key] == row[key]]
    return found.iloc[0].to_dict()


def _theirs(path: Path) -> pd.DataFrame:
    theirs = pd.read_csv(path)
    eager = theirs[(theirs.arm == "fp32") & (theirs.runtime == "eager")].set_index("arch").latency_ms
    return theirs.assign(times=theirs.arch.map(eager) / theirs.latency_ms)
