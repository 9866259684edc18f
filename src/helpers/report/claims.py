"""What the study says it found, as sentences that a test can refute: each is checked on any results, and says what by.

A sentence is typed by hand. A page that cites it puts `<!-- claim: id -->` after its own sentence, whose numbers must be the
claim's (see `numbers_in` and `Verdict.knows`).
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from helpers.machine import sums_saturate
from helpers.report.results import MARGIN, Difference, NotMeasured, Results, Row, difference
from helpers.report.schema import ARCH_LABELS, RANDOM, RUNTIMES, arm_facts
from helpers.report.stats import SAME_WORK, Ratio, wilson_interval

STATUSES = ("holds", "fails", "undecided", "not measured")
POINTS, HALF_A_POINT = "points", 100 * MARGIN
CHANCE = 0.1  # accuracy of guessing: all data have ten classes
CITED = re.compile(r"<!--\s*claim:\s*([\w-]+)\s*-->")


@dataclass(frozen=True)
class Evidence:
    """One measured value behind a claim, with its 95 % interval and the records that it comes from."""

    what: str
    value: float
    low: float
    high: float
    unit: str  # times, points, %, MB, ms or layers
    status: str = "holds"  # what this value alone says of the claim; values for context always hold
    n: int = 0  # images, or rounds of a timing; 0 where neither applies
    seeds: int = 0
    machine: str = ""  # of a latency
    run_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What the results say of a claim: fails if any of the evidence does, else undecided if any is, else holds."""

    evidence: tuple[Evidence, ...]

    @property
    def status(self) -> str:
        """One of STATUSES."""
        said = {of.status for of in self.evidence}
        return next((status for status in ("fails", "undecided", "holds") if status in said), "not measured")

    @property
    def deciding(self) -> Evidence | None:
        """The value that decides: the first one with the claim's status."""
        return next((of for of in self.evidence if of.status == self.status), None)

    def knows(self, number: str) -> bool:
        """Whether a number, as typed, is a value of the evidence, an end of its interval, its n or seeds, as rounded there."""
        decimals = len(number.partition(".")[2])
        values = [value for of in self.evidence for value in (of.value, of.low, of.high, of.n, of.seeds)]
        return any(f"{abs(value):.{decimals}f}" == number.replace(",", "") for value in values if np.isfinite(value))


@dataclass(frozen=True)
class Claim:
    """A finding: what it says, the numbers that name its conditions and bounds, and how it is checked."""

    id: str
    sentence: str
    numbers: tuple[
        str, ...
    ]  # what a sentence on this claim may say beside the evidence: 95 of a CI, 64 of a batch, a bound
    measure: Callable[[Results], Iterable[Evidence]]

    def check(self, results: Results) -> Verdict:
        """What `results` say; without evidence where a record is missing."""
        try:
            return Verdict(tuple(self.measure(results)))
        except NotMeasured:
            return Verdict(())


def check(results: Results) -> pd.DataFrame:
    """A line for each claim: status, and the value that decides it with its interval, n, seeds, machine, run_ids and commit."""
    lines = []
    for claim in CLAIMS:
        verdict = claim.check(results)
        of = verdict.deciding
        line: dict[str, Any] = {"id": claim.id, "sentence": claim.sentence, "status": verdict.status}
        lines.append(line | (_line(of, results) if of else {}))
    columns = "id sentence status what value low high unit n seeds machine run_ids commit".split()
    return pd.DataFrame(lines, columns=columns).fillna(
        {"what": "", "unit": "", "machine": "", "run_ids": "", "commit": ""}
    )


def evidence(results: Results) -> pd.DataFrame:
    """A line for each value behind each claim."""
    return pd.DataFrame(
        {"id": claim.id, "status": of.status} | _line(of, results)
        for claim in CLAIMS
        for of in claim.check(results).evidence
    )


def _line(of: Evidence, results: Results) -> dict[str, Any]:
    commits = dict.fromkeys(results.runs[run_id]["commit"][:12] for run_id in of.run_ids if run_id in results.runs)
    line = {key: getattr(of, key) for key in ("what", "value", "low", "high", "unit", "n", "seeds", "machine")}
    return line | {"run_ids": " ".join(of.run_ids), "commit": " ".join(commits)}


def cited_in(text: str) -> list[tuple[str, list[str]]]:
    """The sentences of a page that cite claims, each with the ids of all marks that follow it."""
    found: list[tuple[str, list[str]]] = []
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*[-*|] )", text):
        parts = re.split(CITED, paragraph)
        for before, mark in zip(parts[::2], parts[1::2], strict=False):
            sentences = [part for part in re.split(r"(?<=[.!?:])\s+", before) if re.search(r"\w", part)]
            if sentences:
                found.append((" ".join(sentences[-1].split()), [mark]))
            elif found:
                found[-1][1].append(mark)
    return found


def numbers_in(sentence: str) -> list[str]:
    """The numbers of a sentence as typed, without sign and `x`; not those in names (INT8, ResNet18), sizes (32x32), links and code."""
    text = re.sub(r"<!--.*?-->|`[^`]*`|\]\([^)]*\)|\d+x\d+", " ", sentence)
    text = re.sub(r"\b[A-Za-z_]+[\w-]*\d\w*", " ", text)
    return re.findall(r"\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?", text)


# How a value decides.


def _within(low: float, high: float, least: float = -np.inf, most: float = np.inf) -> str:
    """holds if the interval lies between the bounds, fails if it lies outside, else undecided."""
    if least < low and high < most:
        return "holds"
    return "fails" if high <= least or low >= most else "undecided"


def _label(arch: str) -> str:
    return ARCH_LABELS.get(arch, arch)


def _archs(results: Results, one: Callable[[str], Iterable[Evidence]], archs: Iterable[str] = ()) -> list[Evidence]:
    """The evidence of every architecture that has it. Raises NotMeasured when none has."""
    found: list[Evidence] = []
    for arch in archs or results.archs:
        try:
            found += one(arch)
        except NotMeasured:
            continue
    if not found:
        raise NotMeasured("no architecture has this")
    return found


def _speed(
    results: Results, a: Row, b: Row, what: str, least: float = -np.inf, most: float = np.inf, **conditions: Any
) -> Evidence:
    """How many times faster `a` is than `b`."""
    return _faster(results, results.timing(a, **conditions), results.timing(b, **conditions), what, least, most)


def _faster(
    results: Results, first: Row, second: Row, what: str, least: float = -np.inf, most: float = np.inf
) -> Evidence:
    """The same of two rows of latency."""
    ratio: Ratio = results.faster(first, second)
    status = _within(ratio.low, ratio.high, least, most)
    return Evidence(
        *(f"{_label(first['arch'])}: {what}", ratio.times, ratio.low, ratio.high, "times", status, first["rounds"], 1),
        *(first["machine"], (first["run_id"],)),
    )


def _change(
    results: Results, a: Row, b: Row, what: str, judge: Callable[[Difference], str], seeds: Sequence[int] = ()
) -> Evidence:
    """Accuracy of `a` minus that of `b`."""
    found = results.compare(a, b, seeds)
    common = results.answers(a).keys() & results.answers(b).keys()
    used = [seed for seed in sorted(common) if not seeds or seed in seeds]
    run_ids = dict.fromkeys(results.score(row)["run_of"][seed] for row in (a, b) for seed in used)
    name = f"{_label(a['arch'])}: {what}"
    return Evidence(
        name, found.points, found.low, found.high, POINTS, judge(found), found.n, found.seeds, "", (*run_ids,)
    )


def _accuracy(results: Results, row: Row, what: str) -> Evidence:
    """The accuracy of a row, in percent, for context."""
    score = results.score(row)
    percent = [100 * score[key] for key in ("accuracy", "low", "high")]
    name = f"{_label(row['arch'])}: {what}"
    return Evidence(name, *percent, "%", "holds", score["n"], score["seeds"], "", score["run_ids"])


def _loses_at_most(points: float) -> Callable[[Difference], str]:
    return lambda found: _within(found.low, found.high, least=-points)


def _equal(found: Difference) -> str:
    """Two one-sided tests at 5 %: within half a point."""
    if found.equal:
        return "holds"
    return "fails" if found.low > HALF_A_POINT or found.high < -HALF_A_POINT else "undecided"


def _not_better(found: Difference) -> str:
    """Fails if the first is shown to be better; undecided where a point either way cannot be told."""
    if found.verdict == "better":
        return "fails"
    return "holds" if found.high < 1 else "undecided"


EAGER, OPENVINO, NNCF = ("fp32", "eager"), ("fp32", "openvino"), ("ptq_nncf", "openvino")


def _speeds(
    a: tuple[str, str], b: tuple[str, str], what: str, least: float = -np.inf, most: float = np.inf,
    archs: tuple[str, ...] = (), **conditions: Any,
) -> Callable[[Results], list[Evidence]]:  # fmt: skip
    """A check of how many times faster one row of each architecture is than another."""
    return lambda results: _archs(
        results,
        lambda arch: [_speed(results, results.row(arch, *a), results.row(arch, *b), what, least, most, **conditions)],
        archs,
    )


# The checks that are about more than one ratio or difference.


def _batch_64(results: Results, a: tuple[str, str], b: tuple[str, str], what: str, grows: bool) -> list[Evidence]:
    """Whether a speed-up is larger, or smaller, at batch 64 than one image at a time."""

    def one(arch: str) -> list[Evidence]:
        rows = results.row(arch, *a), results.row(arch, *b)
        alone = _speed(results, *rows, f"{what}, one image a call", batch=1)
        many = _speed(results, *rows, f"{what}, batch 64", batch=64)
        bounds = {"least": alone.high} if grows else {"most": alone.low}
        return [_with(many, _within(many.low, many.high, **bounds)), alone]

    return _archs(results, one)


def _with(of: Evidence, status: str) -> Evidence:
    return replace(of, status=status)


def _nncf_cost(results: Results) -> list[Evidence]:
    def one(arch: str) -> list[Evidence]:
        row = results.row(arch, *NNCF)
        seeds = results.shared_seeds.get(arch, [])
        return [
            _change(results, row, results.control(row), "INT8 (NNCF) minus FP32", _loses_at_most(HALF_A_POINT), seeds)
        ]

    return _archs(results, one)


def _nncf_seeds(results: Results) -> list[Evidence]:
    row = results.row("resnet18", *NNCF)
    found = _change(results, row, results.control(row), "INT8 (NNCF) minus FP32", _equal)
    if found.seeds < 2:
        raise NotMeasured("one training only")
    return [found]


def _qat(results: Results) -> list[Evidence]:
    """QAT minus PTQ of FP32 trained as long in eager PyTorch, the best for QAT first; and in other trainings of a seed."""
    found, superseded = [], []
    models = results.scores[results.scores.arm == "qat"][["arch", "recipe"]].drop_duplicates()
    for arch, recipe in models.itertuples(index=False):
        pair = [results.row(arch, arm, "eager", recipe) for arm in ("qat", "ptq_longer")]
        what = f"{recipe}, QAT minus PTQ of FP32 trained as long"
        found.append(_change(results, *pair, what, _not_better))
        superseded += _superseded(results, arch, recipe, "qat", "ptq_longer", what, least=-np.inf)
    # A model that cannot tell does not undo what another one says.
    if any(of.status == "holds" for of in found):
        found = [_with(of, "holds") if of.status == "undecided" else of for of in found]
    return sorted(found, key=lambda of: -of.high) + superseded


def _longer_training(results: Results) -> list[Evidence]:
    def row(arm: str) -> Row:
        return results.row("resnet18", arm, "eager", "as_run")

    theirs, longer, ptq, fp32 = (row(arm) for arm in ("qat_observer_only", "fp32_longer", "ptq_longer", "fp32"))
    context: Callable[[Difference], str] = lambda _: "holds"  # noqa: E731
    return [
        _change(results, theirs, ptq, 'their "QAT" minus PTQ of FP32 trained as long', _equal),
        _change(results, theirs, fp32, 'their "QAT" minus the FP32 it started from', context),
        _change(results, longer, fp32, "FP32 trained as long minus the same", context),
    ]


def _better_recipe(results: Results) -> list[Evidence]:
    """The same three for the recipe `tuned`, which has momentum, a schedule and weight decay."""
    qat, longer, fp32 = (results.row("resnet18", arm, "eager", "tuned") for arm in ("qat", "fp32_longer", "fp32"))
    return [
        _change(results, qat, longer, "tuned, QAT minus FP32 trained as long", _equal),
        _change(
            results, qat, fp32, "tuned, QAT minus the FP32 it started from", lambda of: _within(of.low, of.high, 1)
        ),
        _change(results, longer, fp32, "tuned, FP32 trained as long minus the same", lambda _: "holds"),
    ]


def _recipes(results: Results) -> list[Evidence]:
    """Notebook 20: QAT minus FP32 trained as long for each recipe, and what further FP32 training is worth with a schedule and without."""
    of = results.tables["diagnosis"]
    of = of[of.run_id.str.startswith("20_recipes-") & (of.arch == "resnet18")]
    if not {"as_run", "as_run_schedule"} <= {*of.recipe}:
        raise NotMeasured("the recipes were not compared")
    wide = of.pivot_table(index=["check", "recipe"], columns="setting", values="value")
    rest = POINTS, int(of.n.min()), of.seed.nunique(), "", tuple(of.run_id.unique())

    def line(check: str, recipe: str, judge: Callable[[float, float], str] = lambda *_: "holds") -> Evidence:
        value, low, high = wide.loc[(check, recipe), ["points", "low", "high"]]
        return Evidence(f"{recipe}: {check}", value, low, high, rest[0], judge(low, high), *rest[1:])

    recipes = [*of.recipe.unique()]
    found = [line("QAT minus longer", recipe, lambda low, _: "fails" if low > 0 else "holds") for recipe in recipes]
    most = line("longer minus FP32", "as_run").low
    found.append(line("longer minus FP32", "as_run_schedule", lambda low, high: _within(low, high, most=most)))
    return found + [line(check, recipe) for check in ("longer minus FP32", "QAT minus FP32") for recipe in recipes]


def _collapse(results: Results) -> list[Evidence]:
    fp32, default = (results.row("resnet50", arm, "eager") for arm in ("fp32", "ptq_default"))
    before = results.score(fp32)["accuracy"]
    half = 100 * (before - CHANCE) / 2
    lost = _change(
        results, default, fp32, "default observers minus FP32", lambda of: _within(of.low, of.high, most=-half)
    )
    what = "default observers minus FP32"
    return [
        lost,
        _accuracy(results, default, "default observers"),
        _accuracy(results, fp32, "FP32"),
        *_superseded(results, "resnet50", results.recipe, "ptq_default", "fp32", what, least=-np.inf),
    ]


def _other_recipes(results: Results) -> list[Evidence]:
    """What the default observers cost ResNet50 when another recipe than the study's trained it, and how good it is then."""
    scored = results.scores.query("arch == 'resnet50' and arm == 'ptq_default' and recipe != @results.recipe")
    found = []
    for recipe in sorted(scored.recipe.unique()):
        default, fp32 = (results.row("resnet50", arm, "eager", recipe) for arm in ("ptq_default", "fp32"))
        found.append(_change(results, default, fp32, f"{recipe}, default observers minus FP32", _loses_at_most(1)))
        found.append(_accuracy(results, fp32, f"{recipe}, FP32"))
    if not found:
        raise NotMeasured("ResNet50 was trained with one recipe only")
    return found


def _zero_init(results: Results) -> list[Evidence]:
    zero, tuned = (results.row("resnet50", "fp32", "eager", recipe) for recipe in ("tuned_zero_init", results.recipe))
    what = "FP32, tuned_zero_init minus tuned"
    gained = _change(results, zero, tuned, what, lambda of: _within(of.low, of.high, least=5))
    return [gained, _accuracy(results, zero, "tuned_zero_init, FP32"), _accuracy(results, tuned, "tuned, FP32")]


def _others_hold(results: Results) -> list[Evidence]:
    def one(arch: str) -> list[Evidence]:
        default, fp32 = (results.row(arch, arm, "eager") for arm in ("ptq_default", "fp32"))
        what = "default observers minus FP32"
        return [
            _change(results, default, fp32, what, _loses_at_most(1)),
            *_superseded(results, arch, results.recipe, "ptq_default", "fp32", what, least=-1),
        ]

    return _archs(results, one, ("resnet18", "resnet34"))


def _superseded(results: Results, arch: str, recipe: str, a: str, b: str, what: str, least: float) -> list[Evidence]:
    """The difference of two arms in eager PyTorch in other trainings of a seed, of which only accuracies were kept."""
    of = results.tables["accuracy"]
    of = of[(of.training > 0) & (of.arch == arch) & (of.recipe == recipe) & (of.data == results.data)]
    of = of[(of.runtime == "eager") & of.arm.isin([a, b])]
    found = []
    for _, rows in of.groupby(["seed", "training"]):
        if {*rows.arm} == {a, b}:
            percent = 100 * rows.groupby("arm").accuracy.first()
            change = percent[a] - percent[b]
            name = f"{_label(arch)}: {what}, another training"
            status = _within(change, change, least)
            found.append(
                Evidence(name, change, np.nan, np.nan, POINTS, status, int(rows.n.min()), 1, "", (*rows.run_id,))
            )
    return found


def _robust(results: Results) -> list[Evidence]:
    row, fp32 = (results.row("resnet50", arm, "eager") for arm in ("ptq", "fp32"))
    kept = _change(
        results, row, fp32, "without the most extreme 5 % of images, minus FP32", _loses_at_most(HALF_A_POINT)
    )
    return [kept, _accuracy(results, row, "without the most extreme 5 % of images")]


def _more_images(results: Results) -> list[Evidence]:
    """Default observers by the number of calibration images: all draws of the most below all of the fewest, by 10 points."""
    of = results.tables["calibration"]
    of = of[(of.arch == "resnet50") & (of.observer == "histogram") & (of.weights == "per_channel")]
    if of.images.nunique() < 2:
        raise NotMeasured("resnet50 was not calibrated with several numbers of images")
    few, many = (100 * of.accuracy[of.images == images] for images in (of.images.min(), of.images.max()))
    status = "holds" if many.max() < few.min() - 10 else "fails" if many.min() > few.max() - 10 else "undecided"
    rest = (int(of.n.min()), of.seed.nunique(), "", tuple(of.run_id.unique()))
    return [
        Evidence(
            f"ResNet50: {of.images.max()} calibration images", many.mean(), many.min(), many.max(), "%", status, *rest
        ),
        Evidence(
            f"ResNet50: {of.images.min()} calibration images", few.mean(), few.min(), few.max(), "%", "holds", *rest
        ),
    ]


def _cause(results: Results) -> list[Evidence]:
    """What the ranges of a collapsed ResNet50 do to a healthy one, and the healthy one's to it."""
    tests, rest = _tests(results, "test, ")
    return [
        Evidence(f"ResNet50: {setting}", *tests[setting], POINTS, _within(*tests[setting][1:], 0), *rest)
        for setting in ("ranges taken away", "ranges given")
    ]


def _tests(results: Results, check: str) -> tuple[dict[str, tuple[float, float, float]], tuple[Any, ...]]:
    """Tests of ResNet50 that a notebook kept as `check`points, `check`low and `check`high, by setting; and their n, seeds, machine and run_ids."""
    of = results.tables["diagnosis"].query("arch == 'resnet50'")
    of = of[of.check.str.startswith(check)]
    if of.empty:
        raise NotMeasured(f"no {check}was kept")
    wide = of.pivot_table(index="setting", columns="check", values="value")
    values = wide[[f"{check}{part}" for part in ("points", "low", "high")]]
    rest = int(of.n.min()), of.seed.nunique(), "", tuple(of.run_id.unique())
    return {str(setting): tuple(row) for setting, row in zip(values.index, values.to_numpy(), strict=True)}, rest


def _pilots(results: Results) -> list[Evidence]:
    """What two changes to its recipe gain ResNet50's FP32 in pilots, each alone, and what each is worth beside the other."""
    tests, rest = _tests(results, "pilot test, trains, ")
    ends = results.tables["diagnosis"].query("arch == 'resnet50' and check == 'pilot' and setting == 'fp32'")
    ends = ends.groupby("recipe").value.mean()
    found = []
    for change, label in (("lower_rate", "a quarter of the peak rate"), ("zero_init", "zero-initialised branches")):
        for where, bounds in (("added to tuned", {"least": 5}), ("taken from all together", {"most": 0})):
            test = tests[f"{change}, {where}"]
            found.append(Evidence(f"{label}, {where}", *test, POINTS, _within(*test[1:], **bounds), *rest))
    for name in ("tuned", "lower_rate", "zero_init", "zero_init + lower_rate"):
        found.append(Evidence(f"FP32 of the pilot {name}", 100 * ends[name], np.nan, np.nan, "%", "holds", *rest))
    return found


def _floor(results: Results) -> list[Evidence]:
    """How many times the floor of its arithmetic and bytes a call in OpenVINO's INT8 takes, at its least, by batch."""

    def one(arch: str) -> list[Evidence]:
        of = results.tables["profile"].query("check == 'ms / floor' and arm == 'ptq_nncf' and runtime == 'openvino'")
        of = of[(of.arch == arch) & (of.recipe == results.recipe) & (of.threads == results.threads)].set_index("batch")
        if not {1, 64} <= {*of.index}:
            raise NotMeasured("the floor was not measured for both batches")
        found = []
        for batch, bounds in ((1, {"most": 2}), (64, {"least": 2})):
            times, run_id = of.value[batch], of.run_id[batch]
            what = f"{_label(arch)}: ms over the floor, batch {batch}"
            rest = _within(times, times, **bounds), 0, 1, results.runs[run_id]["cpu"], (run_id,)
            found.append(Evidence(what, times, np.nan, np.nan, "times", *rest))
        return found

    return _archs(results, one)


def _ort_resnet50(results: Results) -> list[Evidence]:
    row = results.row("resnet50", "ptq_ort", "onnxruntime")
    lost = _change(
        results,
        row,
        results.control(row),
        "ONNX Runtime's default INT8 minus FP32",
        lambda of: _within(of.low, of.high, most=-10),
    )
    return [lost, _accuracy(results, row, "ONNX Runtime's default INT8")]


def _pt2e_resnet50(results: Results) -> list[Evidence]:
    found = []
    for runtime in ("openvino", "inductor", "aotinductor", "onnxruntime"):
        row = results.row("resnet50", "ptq_pt2e", runtime)
        try:
            found.append(
                _change(
                    results,
                    row,
                    results.control(row),
                    f"INT8 (PT2E) in {runtime} minus FP32",
                    lambda of: _within(of.low, of.high, most=-1),
                )
            )
        except NotMeasured:
            continue
    return found


def _trimming_exact(results: Results) -> list[Evidence]:
    """Images that get another class from the trimmed FP32 model than from the whole one, in percent."""

    def one(arch: str) -> list[Evidence]:
        found = []
        for runtime in ("eager", "torchscript", "onnxruntime", "openvino"):
            cut, whole = (results.row(arch, arm, runtime) for arm in ("fp32_trimmed", "fp32"))
            try:
                a, b = results.classes(cut), results.classes(whole)
            except NotMeasured:
                continue
            for seed in a.keys() & b.keys():
                other, n = int((a[seed] != b[seed]).sum()), len(a[seed])
                ends = [100 * end for end in wilson_interval(other, n)]
                run_ids = tuple(results.score(row)["run_of"][seed] for row in (cut, whole))
                what = f"{_label(arch)}: another class when trimmed, {runtime}"
                found.append(
                    Evidence(what, 100 * other / n, *ends, "%", "fails" if other else "holds", n, 1, "", run_ids)
                )
        return found

    return _archs(results, one)


def _files(results: Results, arch: str, *arms: str) -> list[Evidence]:
    """The size of OpenVINO's files of a model, in MB. Raises NotMeasured where one is missing."""
    of = results.tables["size"].query("runtime == 'openvino' and arch == @arch and recipe == @results.recipe")
    of = of.drop_duplicates("arm").set_index("arm")
    if not {*arms} <= {*of.index}:
        raise NotMeasured(f"{arch} has no files of {', '.join(arms)}")
    return [
        Evidence(f"{_label(arch)}: {arm_facts(arm).label}", size / 1e6, np.nan, np.nan, "MB", run_ids=(run_id,))
        for arm, size, run_id in of.loc[[*arms], ["artifact_bytes", "run_id"]].itertuples()
    ]


def _trimming_bytes(results: Results) -> list[Evidence]:
    def one(arch: str) -> list[Evidence]:
        cut, whole = _files(results, arch, "trimmed_ptq_nncf", "ptq_nncf")
        saved = 100 * (1 - cut.value / whole.value)
        what, status = f"{_label(arch)}: saved", _within(saved, saved, 10)
        return [Evidence(what, saved, np.nan, np.nan, "%", status, run_ids=cut.run_ids), cut, whole]

    return _archs(results, one)


def _size(results: Results) -> list[Evidence]:
    """How many times smaller NNCF's INT8 file is than FP32's, both OpenVINO IRs."""

    def one(arch: str) -> list[Evidence]:
        fp32, int8 = _files(results, arch, "fp32", "ptq_nncf")
        times = fp32.value / int8.value
        what, status = f"{_label(arch)}: FP32's bytes over INT8's", _within(times, times, 3.5)
        return [Evidence(what, times, np.nan, np.nan, "times", status, run_ids=int8.run_ids), fp32, int8]

    return _archs(results, one)


def _elsewhere(results: Results) -> list[tuple[str, str]]:
    """(run_id, machine) of benchmarks of ResNet18 on other machines. Raises NotMeasured without."""
    of = results.tables["latency"]
    of = of[(of.arch == "resnet18") & (of.recipe == results.recipe) & (of.machine != results.machine)]
    if of.empty:
        raise NotMeasured("ResNet18 was timed on one machine only")
    return [*of[["run_id", "machine"]].drop_duplicates().itertuples(index=False, name=None)]


def _trimming_elsewhere(results: Results) -> list[Evidence]:
    """Of every machine but the benchmark's: of the trained model, and of random weights."""
    latency, found = results.tables["latency"], []
    of = latency[(latency.arch == "resnet18") & (latency.arm == "trimmed_ptq_nncf") & (latency["size"] == 32)]
    of = of[(of.machine != results.machine) & (of.batch == 1) & (of.pace == "hot")]
    if of.empty:
        raise NotMeasured("ResNet18 was timed on one machine only")
    for (run_id, recipe), threads in of.groupby(["run_id", "recipe"]).threads.max().items():
        cut, whole = (results.row("resnet18", arm, "openvino", recipe) for arm in ("trimmed_ptq_nncf", "ptq_nncf"))
        what, where = "INT8 (NNCF), trimmed, over INT8 (NNCF)", {"threads": int(threads), "batch": 1, "size": 32}
        ratio = _speed(results, cut, whole, what, run_id=run_id, pace="hot", **where)
        found.append(_with(ratio, "fails" if ratio.high < 1 / SAME_WORK else "holds"))
    return found


def _machines(results: Results) -> list[Evidence]:
    """INT8 (NNCF) in OpenVINO over eager PyTorch on each machine: the largest more than twice the smallest."""
    rows = results.row("resnet18", *NNCF), results.row("resnet18", *EAGER)
    here = _speed(results, *rows, "INT8 (NNCF) over eager FP32")
    there = [_speed(results, *rows, "INT8 (NNCF) over eager FP32", run_id=run_id) for run_id, _ in _elsewhere(results)]
    return _twice_apart([here, *there])


def _twice_apart(found: Iterable[Evidence]) -> list[Evidence]:
    """The largest first, which holds if it is more than twice the smallest."""
    first, *rest = sorted(found, key=lambda of: -of.value)
    return [_with(first, _within(first.low, first.high, least=2 * rest[-1].high)), *rest]


def _x86_engine(results: Results) -> list[Evidence]:
    """A call of one image by PyTorch's x86 engine in TorchScript: after a batch of 64 came first, over after one image did."""
    of = results.tables["profile"]
    of = of[(of.check == "first shape: ms") & (of.engine == "x86") & (of.threads == of.threads.max()) & (of.batch == 1)]

    def one(arch: str) -> list[Evidence]:
        mine = of[of.arch == arch]
        alone = mine[mine.setting.str.startswith("first batch 1, pass")].value
        after = mine[mine.setting.str.match(r"first batch (?!1,)\d+, pass")].value
        if alone.empty or after.empty:
            raise NotMeasured(f"{arch} was not called with two batch sizes")
        low, high = after.min() / alone.max(), after.max() / alone.min()
        status = _within(low, high, least=SAME_WORK)
        run_ids = tuple(mine.run_id.unique())
        machine = results.runs[run_ids[0]]["cpu"] if run_ids[0] in results.runs else ""
        return [Evidence(f"{_label(arch)}: ms after another batch size over ms before", after.mean() / alone.mean(), low, high, "times", status, 0, 1, machine, run_ids)]  # fmt: skip

    return _archs(results, one)


def _flips(results: Results) -> list[Evidence]:
    """Images that change class in INT8 against the change of accuracy."""
    of = results.tables["diagnosis"]
    of = of[of.check == "flips"].set_index(["arch", "setting"])
    found = []
    for arch, setting in of.index:
        arm, _, what = setting.partition(" ")
        if what != "changed" or arm not in ("ptq", "ptq_longer"):
            continue
        row = of.loc[(arch, setting)]
        changed = [100 * share for share in (row.value, *wilson_interval(round(row.value * row.n), int(row.n)))]
        net = 100 * abs(of.value[arch, f"{arm} wrong to right"] - of.value[arch, f"{arm} right to wrong"])
        rest = (int(row.n), 1, "", (row.run_id,))
        found.append(
            Evidence(
                f"{_label(arch)}: {arm}, images that change class",
                *changed,
                "%",
                _within(changed[1], changed[2], net),
                *rest,
            )
        )
        found.append(
            Evidence(f"{_label(arch)}: {arm}, change of accuracy", net, np.nan, np.nan, POINTS, "holds", *rest)
        )
    if not found:
        raise NotMeasured("answers were not compared image by image")
    return found


def _bit_widths(results: Results) -> list[Evidence]:
    found = []
    for width in ("w8a8", "w4a8", "w4a4"):
        for arm in ("ptq_longer", "ptq_longer_default"):
            pair = (results.row("resnet18", f"{of}_{width}", "simulated") for of in ("qat", arm))
            found.append(_change(results, *pair, f"{width.upper()}, QAT minus {arm}", _not_better))
    return found


def _int8_layers(results: Results) -> list[Evidence]:
    """Convolutions that OpenVINO ran in INT8, of all, in NNCF's file."""
    of = results.tables["profile"]
    of = of[(of.check == "executed layers") & (of.arm == "ptq_nncf") & of.setting.str.startswith("convolution")]

    def one(arch: str) -> list[Evidence]:
        mine = of[of.arch == arch].sort_values("run_id")
        mine = mine[mine.run_id == mine.run_id.min()]
        if mine.empty:
            raise NotMeasured(f"{arch}: its layers were not listed")
        int8, every = mine.value[mine.setting == "convolution, int8"].sum(), mine.value.sum()
        status = "holds" if int8 == every else "fails"
        return [Evidence(f"{_label(arch)}: convolutions in INT8", int8, np.nan, np.nan, "layers", status, int(every), 1, "", tuple(mine.run_id.unique()))]  # fmt: skip

    return _archs(results, one)


def _ort_layers(results: Results) -> list[Evidence]:
    of = results.tables["profile"]
    of = of[(of.check == "convolutions in INT8") & (of.arm == "ptq_ort")]
    if of.empty:
        raise NotMeasured("ONNX Runtime's layers were not listed")
    found = []
    for row in of.to_dict("records"):
        every = int(row["setting"].removeprefix("of "))
        status = "holds" if row["value"] < every else "fails"
        found.append(Evidence(f"{_label(row['arch'])}: convolutions in INT8", row["value"], np.nan, np.nan, "layers", status, every, 1, "", (row["run_id"],)))  # fmt: skip
    return found


# Larger images and calls that come alone: one process with random weights.


def _carried(
    results: Results, arch: str, a: tuple[str, str], b: tuple[str, str], what: str, **conditions: Any
) -> Evidence:
    """A ratio of the process that timed random weights, one image a call, at its largest number of threads."""
    of = results.carried[results.carried.arch == arch]
    if of.empty:
        raise NotMeasured(f"{arch} was not timed at other sizes")
    process = {"run_id": of.run_id.iloc[0], "threads": int(of.threads.max()), "batch": 1}
    rows = (results.row(arch, arm, runtime, RANDOM) for arm, runtime in (a, b))
    pace = {"hot": "hot", "idle_10": "after 10 ms of rest", "idle_100": "after 100 ms of rest"}[conditions["pace"]]
    name = f"{what}, {conditions['size']}x{conditions['size']}, {pace}"
    return _speed(results, *rows, name, **process, **conditions)


def _carry_machines(results: Results) -> list[Evidence]:
    """INT8 (NNCF) over eager PyTorch at 224x224 on every machine that timed it: the largest more than twice the smallest."""
    latency = results.tables["latency"]
    of = latency[(latency.recipe == RANDOM) & (latency.arch == "resnet18") & (latency["size"] == 224)]
    of = of[(of.arm == NNCF[0]) & (of.runtime == NNCF[1]) & (of.batch == 1) & (of.pace == "hot")]
    if of.run_id.nunique() < 2:
        raise NotMeasured("one machine or none timed larger images")
    rows = [results.row("resnet18", *served, RANDOM) for served in (NNCF, EAGER)]
    what, conditions = "INT8 (NNCF) over eager FP32, 224x224, hot", {"batch": 1, "size": 224, "pace": "hot"}
    most_threads = of.groupby("run_id").threads.max()
    return _twice_apart(
        _speed(results, *rows, what, run_id=run_id, threads=int(count), **conditions)
        for run_id, count in most_threads.items()
    )


CARRIED = ("resnet18", "resnet50")
HOT, RESTED = {"pace": "hot"}, {"pace": "idle_10"}


def _carry(
    a: tuple[str, str], b: tuple[str, str], what: str, size: int, pace: Mapping[str, str], least: float = -np.inf, most: float = np.inf
) -> Callable[[Results], list[Evidence]]:  # fmt: skip
    """A check of a ratio at one size and pace against bounds."""

    def one(results: Results, arch: str) -> list[Evidence]:
        of = _carried(results, arch, a, b, what, size=size, **pace)
        return [_with(of, _within(of.low, of.high, least, most))]

    return lambda results: _archs(results, lambda arch: one(results, arch), CARRIED)


def _changes(
    a: tuple[str, str], b: tuple[str, str], what: str, then: Mapping[str, Any], now: Mapping[str, Any], grows: bool, archs: tuple[str, ...] = CARRIED
) -> Callable[[Results], list[Evidence]]:  # fmt: skip
    """A check that a ratio is larger (`grows`) or smaller under the conditions `now` than under `then`."""

    def one(results: Results, arch: str) -> list[Evidence]:
        before, after = (_carried(results, arch, a, b, what, **of) for of in (then, now))
        bounds = {"least": before.high} if grows else {"most": before.low}
        return [_with(after, _within(after.low, after.high, **bounds)), before]

    return lambda results: _archs(results, lambda arch: one(results, arch), archs)


def _after_100_ms(results: Results) -> list[Evidence]:
    found: list[Evidence] = []
    for size in (32, 224):
        then, now = ({"size": size, "pace": pace} for pace in ("hot", "idle_100"))
        found += _changes(NNCF, EAGER, "INT8 (NNCF) over eager FP32", then, now, False, ("resnet18",))(results)
    return found


def _not_shown_faster_after_a_rest(results: Results) -> list[Evidence]:
    of = _carried(results, "resnet18", NNCF, OPENVINO, "INT8 (NNCF) over OpenVINO FP32", size=32, **RESTED)
    return [_with(of, "fails" if of.low > SAME_WORK else "holds")]


# Under load: services in processes of their own, each started once. Without an interval, a ratio decides by as much as rows of
# the same work differ, SAME_WORK.


def _served(results: Results, arm: str, runtime: str, pace: str, setting: str = "") -> pd.Series:
    """ResNet18 at 32x32 on its most threads, one process, one request at a time. Raises NotMeasured."""
    of = results.tables["load"]
    wanted = {"arch": "resnet18", "arm": arm, "runtime": runtime, "size": 32, "batch": 1, "streams": 1, "processes": 1}
    for column, value in (wanted | {"pace": pace, "setting": setting}).items():
        of = of[of[column] == value]
    if of.empty:
        raise NotMeasured(f"{arm} in {runtime} was not served at {pace}")
    return of.loc[of.threads.idxmax()]


def _load_ratio(
    what: str, a: float, b: float, row: pd.Series, least: float = -np.inf, most: float = np.inf
) -> Evidence:
    status = _within(a / b / SAME_WORK, a / b * SAME_WORK, least, most)
    return Evidence(
        f"ResNet18: {what}", a / b, np.nan, np.nan, "times", status, int(row.n), 1, row.machine, (row.run_id,)
    )


def _load_capacity(results: Results) -> list[Evidence]:
    eager, int8 = (_served(results, *row, "hot") for row in (EAGER, NNCF))
    return [
        _load_ratio(
            "requests a second, INT8 (NNCF) over eager FP32",
            int8.images_per_second,
            eager.images_per_second,
            int8,
            least=3,
        ),
        _load_ratio("memory, eager FP32 over INT8 (NNCF)", eager.memory_bytes, int8.memory_bytes, int8, least=3),
    ]


def _load_queue(results: Results) -> list[Evidence]:
    found = []
    for arm, runtime in (EAGER, ("fp32", "onnxruntime"), OPENVINO, NNCF):
        hot, busy = (_served(results, arm, runtime, pace) for pace in ("hot", "load_90"))
        what = f"{arm_facts(arm).label} in {RUNTIMES[runtime]}, median at 90 % of capacity over that of calls in a row"
        found.append(_load_ratio(what, busy.p50_ms, hot.p50_ms, busy, least=3))
    return found


def _keep_warm(results: Results) -> list[Evidence]:
    found = []
    for arm, runtime in (OPENVINO, NNCF):
        hot, warm = (_served(results, arm, runtime, *how) for how in (("hot",), ("idle_50", "keep warm, 5 ms")))
        what = f"{arm_facts(arm).label} in {RUNTIMES[runtime]}, a rested call that was kept warm over one in a row"
        found.append(_load_ratio(what, warm.p50_ms, hot.p50_ms, warm, least=1.5))
    return found


def _settings(
    results: Results, one: Callable[[str], Iterable[Evidence]], archs: Sequence[str] = ("resnet18",)
) -> list[Evidence]:
    """The evidence of every run of notebook 19 that has it. Raises NotMeasured when none has."""
    runs = [run_id for arch in archs for run_id in results.setting_runs(arch)]
    if not runs:
        raise NotMeasured("the settings were not compared")
    return _archs(results, one, runs)


def _eight_bits(results: Results, saturate: bool, bounds: Mapping[int, Mapping[str, float]]) -> list[Evidence]:
    """Settings of notebook 19 with 8 or 7 bits for weights or activations, in points over FP32 in the same runtime.

    saturate: on machines whose sums of 8-bit products saturate, or on the others. bounds: of the points, by number of bits.
    """

    def one(run_id: str) -> list[Evidence]:
        if sums_saturate(results.runs[run_id]["isa"]) != saturate:
            raise NotMeasured("this machine is of the other kind")
        right, machine = results.setting_answers(run_id), results.setting_timing(run_id, *EAGER)["machine"]
        found = []
        for bits, bound in bounds.items():
            for setting, runtime in OF_BITS[bits].items():
                if {(setting, runtime), ("fp32", runtime)} - right.keys():
                    raise NotMeasured(f"{setting} was not measured")
                of = difference(right[setting, runtime], right["fp32", runtime])
                what, status = f"ResNet18: {setting} ({bits} bits) minus FP32", _within(of.low, of.high, **bound)
                found.append(Evidence(what, of.points, of.low, of.high, POINTS, status, of.n, 1, machine, (run_id,)))
        return found

    return _settings(results, one)


OF_BITS = {
    8: {"ort U8, per channel": "onnxruntime", "pt2e freezing": "inductor", "nncf 8-bit weights": "openvino"},
    7: {
        "ort U8, per channel, reduce range": "onnxruntime",
        "pt2e freezing, reduce range": "inductor",
        "nncf default": "openvino",  # 7 bits in the first layer
    },
}


DEFAULTS = (("ort default", "onnxruntime"), ("pt2e default", "inductor"), ("nncf default", "openvino"))


def _defaults_of_a_better_model(results: Results) -> list[Evidence]:
    """What each tool's default, and the worst of notebook 19's settings, costs the better trained ResNet50 where sums do not saturate."""

    def one(run_id: str) -> list[Evidence]:
        run = results.runs[run_id]
        if sums_saturate(run["isa"]) or run["parameters"]["recipe"] != "tuned_zero_init":
            raise NotMeasured("another model, or a CPU whose sums saturate")
        right, machine = results.setting_answers(run_id), results.setting_timing(run_id, *EAGER)["machine"]
        changes = {way: difference(of, right[EAGER]) for way, of in right.items() if not way[0].startswith("fp32")}
        worst = min(changes, key=lambda way: changes[way].low)
        found = []
        for way in dict.fromkeys([*DEFAULTS, worst]):
            of, what = changes[way], f"ResNet50: {way[0]} minus FP32" + ", the worst setting" * (way == worst)
            status = _within(of.low, of.high, least=-HALF_A_POINT)
            found.append(Evidence(what, of.points, of.low, of.high, POINTS, status, of.n, 1, machine, (run_id,)))
        return found

    return _settings(results, one, ["resnet50"])


def _pt2e_freezing(results: Results) -> list[Evidence]:
    """Layers that Inductor executes in INT8, as PT2E's file comes and with frozen weights."""
    of = results.tables["yours"]
    of = of[of.run_id.str.startswith("19_settings-") & (of.reason == "")]
    found = []
    for setting, share in (("pt2e default", 0), ("pt2e freezing", 1)):
        for row in of[of.arm == setting].to_dict("records"):
            in_int8, status = row["int8_layers"] * row["layers"], "holds" if row["int8_layers"] == share else "fails"
            what = f"{_label(row['model'])}: {setting}, layers in INT8 of {row['layers']:.0f}"
            found.append(Evidence(what, in_int8, np.nan, np.nan, "layers", status, 0, 1, "", (row["run_id"],)))
    if not found:
        raise NotMeasured("the settings were not compared")
    return found


def _setting_speed(
    a: tuple[str, str], b: tuple[str, str], what: str, least: float, archs: Sequence[str] = ("resnet18",)
) -> Callable[[Results], list[Evidence]]:
    """A check of how many times faster one of notebook 19's settings is than another, on each machine."""

    def one(results: Results, run_id: str) -> list[Evidence]:
        return [_faster(results, *(results.setting_timing(run_id, *of) for of in (a, b)), what, least)]

    return lambda results: _settings(results, lambda run_id: one(results, run_id), archs)


def _pt2e_inductor(results: Results) -> list[Evidence]:
    """INT8 by PT2E over FP32 in Inductor, on each machine, by whether it has dot products for INT8."""

    def one(run_id: str) -> list[Evidence]:
        int8, fp32 = (results.setting_timing(run_id, name, "inductor") for name in ("pt2e freezing", "fp32"))
        bounds = {"most": 1.3} if sums_saturate(results.runs[run_id]["isa"]) else {"least": 1.3}
        return [_faster(results, int8, fp32, "INT8 (PT2E) over FP32 in Inductor", **bounds)]

    return _settings(results, one)


WRAPPED = "pt2e freezing, C++ wrapper", "inductor"

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "runtime-alone",
        "OpenVINO runs the FP32 models more than 3x faster than eager PyTorch: 32x32, one image a call, hot loop.",
        ("3", "2"),
        _speeds(OPENVINO, EAGER, "OpenVINO FP32 over eager FP32", least=3),
    ),
    Claim(
        "int8-total",
        "INT8 by NNCF in OpenVINO is more than 5x faster than eager PyTorch: 32x32, one image a call, hot loop.",
        ("5", "2"),
        _speeds(NNCF, EAGER, "INT8 (NNCF) over eager FP32", least=5),
    ),
    Claim(
        "int8-adds",
        "In OpenVINO, INT8 by NNCF is more than 1.3x faster than FP32: 32x32, one image a call, hot loop.",
        ("1.3", "2"),
        _speeds(NNCF, OPENVINO, "INT8 (NNCF) over OpenVINO FP32", least=1.3),
    ),
    Claim(
        "batch-64-runtime",
        "The runtime alone gives less in batches of 64 than with one image a call.",
        ("64", "2"),
        lambda results: _batch_64(results, OPENVINO, EAGER, "OpenVINO FP32 over eager FP32", grows=False),
    ),
    Claim(
        "batch-64-int8",
        "In OpenVINO, INT8 gives more over FP32 in batches of 64 than with one image a call.",
        ("64", "2"),
        lambda results: _batch_64(results, NNCF, OPENVINO, "INT8 (NNCF) over OpenVINO FP32", grows=True),
    ),
    Claim(
        "int8-layers",
        "OpenVINO runs every convolution of NNCF's file in INT8.",
        (),
        _int8_layers,
    ),
    Claim(
        "int8-cost",
        "INT8 by NNCF loses at most half a point (95 % CI) in the trainings that were timed.",
        ("95", "0.5"),
        _nncf_cost,
    ),
    Claim(
        "int8-cost-seeds",
        "Over several trainings of ResNet18, INT8 by NNCF is equal to FP32 within half a point (two one-sided tests at 5 %).",
        ("5", "0.5", "95"),
        _nncf_seeds,
    ),
    Claim(
        "qat",
        "QAT in eager PyTorch is not shown to beat PTQ of an FP32 model that trained as long, in any model.",
        ("0.5",),
        _qat,
    ),
    Claim(
        "longer-training",
        "Longer training explains the reference study's gain: with its recipe, its QAT equals PTQ of ResNet18 trained as long, "
        "within half a point.",
        ("0.5",),
        _longer_training,
    ),
    Claim(
        "better-recipe",
        "A better recipe leaves QAT's apparent gain: QAT of ResNet18 gains more than 1 point over the FP32 it started from, "
        "and equals FP32 trained as long, within half a point.",
        ("1", "0.5"),
        _better_recipe,
    ),
    Claim(
        "recipes",
        "With no recipe is QAT of ResNet18 shown to beat FP32 trained as long. A schedule that lowers the rate within the first training "
        "leaves further training less to gain (9,000 training images, 6 epochs and 6 more).",
        ("9,000", "6"),
        _recipes,
    ),
    Claim(
        "collapse",
        "PyTorch's default observers collapse ResNet50: it loses more than half of its accuracy above chance.",
        ("10", "512"),
        _collapse,
    ),
    Claim(
        "collapse-recipes",
        "Trained with zero-initialised branches, or with a quarter of the peak learning rate, ResNet50 loses less than 1 point with the same "
        "observers.",
        ("1",),
        _other_recipes,
    ),
    Claim(
        "zero-init",
        "Zero-initialised branches gain ResNet50 more than 5 points in FP32.",
        ("5",),
        _zero_init,
    ),
    Claim(
        "collapse-others",
        "With the same observers ResNet18 and ResNet34 lose less than 1 point.",
        ("1",),
        _others_hold,
    ),
    Claim(
        "more-images",
        "More calibration images make ResNet50's default observers worse, by more than 10 points.",
        ("10", "16", "2048", "2,048"),
        _more_images,
    ),
    Claim(
        "robust-observers",
        "Ignoring the most extreme 5 % of calibration images, ResNet50 loses at most half a point (95 % CI).",
        ("5", "95", "0.5"),
        _robust,
    ),
    Claim(
        "cause",
        "Wide activation ranges cause the collapse: narrower ranges heal a collapsed ResNet50, its ranges break a healthy one.",
        ("25", "512"),
        _cause,
    ),
    Claim(
        "pilots",
        "In pilots of ResNet50 a quarter of the peak rate gains more than 5 points, and so do zero-initialised branches; both together less.",
        ("5", "9000", "9,000", "3"),
        _pilots,
    ),
    Claim(
        "ort-default-slow",
        "ONNX Runtime's static quantization with its default, signed activations is slower than its own FP32: 32x32, one image a call.",
        ("2",),
        _speeds(("ptq_ort", "onnxruntime"), ("fp32", "onnxruntime"), "ONNX Runtime's default INT8 over its FP32", most=1),
    ),
    Claim(
        "ort-default-layers",
        "ONNX Runtime runs some convolutions in FP32 where activations are signed, its quantizer's default.",
        (),
        _ort_layers,
    ),
    Claim(
        "ort-default-resnet50",
        "ONNX Runtime's static quantization with signed, min-max activations loses more than 10 points on ResNet50.",
        ("10",),
        _ort_resnet50,
    ),
    Claim(
        "pt2e-resnet50",
        "PT2E's PTQ loses more than 1 point on ResNet50, in every runtime.",
        ("1",),
        _pt2e_resnet50,
    ),
    Claim(
        "pt2e-inductor",
        "In Inductor with frozen weights, INT8 by PT2E is more than 1.3x faster than FP32 on a CPU with VNNI, and less on one without: "
        "ResNet18 at 32x32, one image a call.",
        ("1.3",),
        _pt2e_inductor,
    ),
    Claim(
        "pt2e-wrapper",
        "With Inductor's C++ wrapper, INT8 by PT2E is more than 1.2x faster than FP32: ResNet18 at 32x32, one image a call.",
        ("1.2",),
        _setting_speed(WRAPPED, ("fp32, C++ wrapper", "inductor"), "INT8 (PT2E) over FP32 in Inductor, both with the C++ wrapper", 1.2),
    ),
    Claim(
        "pt2e-openvino",
        "INT8 by NNCF in OpenVINO is more than 2x faster than INT8 by PT2E in Inductor with its C++ wrapper: ResNet18 at 32x32, one image a call.",
        ("2",),
        _setting_speed(("nncf default", "openvino"), WRAPPED, "INT8 in OpenVINO (NNCF) over INT8 in Inductor (PT2E, C++ wrapper)", 2),
    ),
    Claim(
        "torchscript",
        "TorchScript runs the FP32 models more than 1.2x faster than eager PyTorch: 32x32, one image a call, hot loop.",
        ("1.2", "2"),
        _speeds(("fp32", "torchscript"), EAGER, "TorchScript FP32 over eager FP32", least=1.2),
    ),
    Claim(
        "size",
        "INT8 files by NNCF are more than 3.5 times smaller than FP32's.",
        ("3.5",),
        _size,
    ),
    Claim(
        "trimming-exact",
        "Trimming changes no answer of the FP32 models.",
        ("32",),
        _trimming_exact,
    ),
    Claim(
        "trimming-bytes",
        "Trimming saves more than 10 % of the bytes of NNCF's INT8 file.",
        ("10",),
        _trimming_bytes,
    ),
    Claim(
        "trimming-ms",
        "Trimming makes NNCF's INT8 of ResNet18 more than 1.1x faster in OpenVINO: 32x32, one image a call, hot loop.",
        ("1.1", "2"),
        _speeds(("trimmed_ptq_nncf", "openvino"), NNCF, "INT8 (NNCF), trimmed, over INT8 (NNCF)", least=SAME_WORK, archs=("resnet18",)),
    ),
    Claim(
        "trimming-elsewhere",
        "On no other machine was trimming shown to make NNCF's INT8 of ResNet18 slower in OpenVINO: 32x32, one image a call, hot loop.",
        ("1.1", "2"),
        _trimming_elsewhere,
    ),
    Claim(
        "machines",
        "The same INT8 path of ResNet18 gains more than twice as much on one machine as on another.",
        ("2",),
        _machines,
    ),
    Claim(
        "x86-engine",
        "PyTorch's x86 engine in TorchScript answers one image slower after another batch size came first.",
        ("64", "2"),
        _x86_engine,
    ),
    Claim(
        "flips",
        "PTQ in eager PyTorch moves more images of ResNet18 to another class than its accuracy shows.",
        (),
        _flips,
    ),
    Claim(
        "bit-widths",
        "QAT is not shown to beat PTQ of an equally trained ResNet18 at 8 or 4 bits, simulated, in one training.",
        ("8", "4"),
        _bit_widths,
    ),
    Claim(
        "carry-size",
        "The runtime alone gives ResNet18 less at 224x224 than at 32x32: OpenVINO FP32 over eager PyTorch, hot loop.",
        ("1", "2"),
        _changes(OPENVINO, EAGER, "OpenVINO FP32 over eager FP32", {"size": 32, **HOT}, {"size": 224, **HOT}, False, ("resnet18",)),
    ),
    Claim(
        "carry-size-int8",
        "INT8 adds more at 224x224 than at 32x32: INT8 by NNCF over FP32 in OpenVINO, hot loop.",
        ("1", "2"),
        _changes(NNCF, OPENVINO, "INT8 (NNCF) over OpenVINO FP32", {"size": 32, **HOT}, {"size": 224, **HOT}, True),
    ),
    Claim(
        "carry-224",
        "At 224x224, INT8 by NNCF in OpenVINO is more than 2.5x faster than eager PyTorch, one image a call.",
        ("2.5", "1", "2"),
        _carry(NNCF, EAGER, "INT8 (NNCF) over eager FP32", 224, HOT, least=2.5),
    ),
    Claim(
        "carry-224-int8",
        "At 224x224, INT8 by NNCF is more than 1.3x faster than FP32 in OpenVINO, one image a call.",
        ("1.3", "1", "2"),
        _carry(NNCF, OPENVINO, "INT8 (NNCF) over OpenVINO FP32", 224, HOT, least=1.3),
    ),
    Claim(
        "carry-rest",
        "At 32x32, INT8's speed-up of ResNet18 over eager PyTorch is smaller when each call comes after 10 ms of rest.",
        ("10", "1", "2"),
        _changes(NNCF, EAGER, "INT8 (NNCF) over eager FP32", {"size": 32, **HOT}, {"size": 32, **RESTED}, False, ("resnet18",)),
    ),
    Claim(
        "carry-rest-100",
        "After 100 ms of rest INT8's speed-up of ResNet18 over eager PyTorch is smaller than hot, at 32x32 and at 224x224.",
        ("100", "2"),
        _after_100_ms,
    ),
    Claim(
        "carry-rest-int8",
        "At 32x32 and after 10 ms of rest, INT8 by NNCF is not shown to be more than 1.1x faster than OpenVINO's FP32 on ResNet18.",
        ("10", "1.1", "1", "2"),
        _not_shown_faster_after_a_rest,
    ),
    Claim(
        "carry-rest-224",
        "At 224x224, INT8 by NNCF is more than 2.5x faster than eager PyTorch after 10 ms of rest, too.",
        ("10", "2.5", "1", "2"),
        _carry(NNCF, EAGER, "INT8 (NNCF) over eager FP32", 224, RESTED, least=2.5),
    ),
    Claim(
        "carry-machines",
        "At 224x224, INT8 of ResNet18 gains more than twice as much on one machine as on another: INT8 by NNCF over eager PyTorch.",
        ("2",),
        _carry_machines,
    ),
    Claim(
        "ort-u8",
        "With unsigned activations, ONNX Runtime's INT8 is more than 1.3x faster than its FP32 at 224x224, one image a call.",
        ("1.3", "8", "1", "2"),
        _carry(("ptq_ort_u8", "onnxruntime"), ("fp32", "onnxruntime"), "INT8 (U8 activations) over FP32 in ONNX Runtime", 224, HOT, least=1.3),
    ),
    Claim(
        "floor",
        "One image a call, INT8 by NNCF in OpenVINO takes less than 2x the floor that the machine's arithmetic and reading speed set; in batches of 64 more than 2x.",
        ("1", "2", "64"),
        _floor,
    ),
    Claim(
        "saturation",
        "On a CPU without VNNI, all 8 bits of weights and activations cost ResNet18 more than 4 points, and 7 bits of either less than half a "
        "point: ONNX Runtime (weights per channel), PT2E in Inductor, and NNCF in OpenVINO.",
        ("8", "4", "7"),
        lambda results: _eight_bits(results, True, {8: {"most": -4}, 7: {"least": -HALF_A_POINT}}),
    ),
    Claim(
        "eight-bits-vnni",
        "On a CPU with VNNI, all 8 bits of weights and activations cost ResNet18 at most half a point (95 % CI) in the same three tools.",
        ("8", "0.5", "95"),
        lambda results: _eight_bits(results, False, {8: {"least": -HALF_A_POINT}}),
    ),
    Claim(
        "defaults-better-model",
        "With zero-initialised branches and on a CPU with VNNI, ResNet50 loses at most half a point (95 % CI) in ONNX Runtime, PT2E and NNCF with "
        "their defaults, and with each other setting.",
        ("0.5", "95"),
        _defaults_of_a_better_model,
    ),
    Claim(
        "pt2e-freezing",
        "Inductor runs no layer of a PT2E model in INT8 as it comes, and every layer when it freezes the weights.",
        (),
        _pt2e_freezing,
    ),
    Claim(
        "load-capacity",
        "INT8 by NNCF in OpenVINO answers more than 3x the requests of eager PyTorch, from less than 1/3 of the memory: ResNet18 at 32x32.",
        ("1/3", "1", "3"),
        _load_capacity,
    ),
    Claim(
        "load-queue",
        "At 90 % of the requests that ResNet18 answers call after call, half of all random arrivals take more than 3x as long as such a call.",
        ("90", "3"),
        _load_queue,
    ),
    Claim(
        "keep-warm",
        "A keep-warm call every 5 ms does not bring the hot loop back: after 50 ms of rest, a call of ResNet18 in OpenVINO still takes more than 1.5x as long.",
        ("50", "5", "1.5"),
        _keep_warm,
    ),
)  # fmt: skip
