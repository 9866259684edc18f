"""Intervals and paired tests: pure functions of counts, arrays and frames' rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest, t
from statsmodels.stats.proportion import proportion_confint

FEW = 30  # images on which two arms differ: below, the percentile bootstrap is too narrow
# Rows that do the same work with other numbers in it (ptq, ptq_longer, qat) lie apart by up to this in one process.
SAME_WORK = 1.1


def wilson_interval(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval for an accuracy measured once on `n` independent images.

    correct, n: counts, 0 <= correct <= n, n >= 1. Returns (low, high), fractions in [0, 1].
    Raises ValueError if the counts contradict each other. Source: Wilson, JASA 22 (1927).
    """
    if not 0 <= correct <= n or n < 1:
        raise ValueError(f"{correct} correct of {n} is impossible")
    low, high = proportion_confint(correct, n, alpha=1 - confidence, method="wilson")
    return float(low), float(high)


def seeds_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Interval for the mean accuracy over training seeds. values: float [seeds], at least two, one accuracy a seed.

    Returns (low, high). Raises ValueError for fewer than two values. Source: Student, Biometrika 6 (1908).
    """
    if len(values) < 2:
        raise ValueError(f"{len(values)} seeds: at least two are needed")
    mean, error = values.mean(), values.std(ddof=1) / np.sqrt(len(values))
    half = float(t.ppf((1 + confidence) / 2, len(values) - 1)) * error
    return float(mean - half), float(mean + half)


def mcnemar_exact(first_correct: np.ndarray, second_correct: np.ndarray) -> float:
    """Two-sided exact p-value that two models err equally often on the same images.

    first_correct, second_correct: bool [n], image by image. Only images on which they differ count; 1.0 when there are none.
    Raises ValueError if the shapes differ. Source: McNemar, Psychometrika 12 (1947).
    """
    if first_correct.shape != second_correct.shape:
        raise ValueError(f"shapes {first_correct.shape} and {second_correct.shape} differ")
    only_first = int((first_correct & ~second_correct).sum())
    only_second = int((~first_correct & second_correct).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second).pvalue)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p-values of one family of tests, corrected so that the chance of any false one stays at the level. float [tests].

    Source: Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    p = np.asarray(p_values, float)
    order = np.argsort(p, kind="stable")
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return corrected


def paired_bootstrap(
    first_correct: np.ndarray, second_correct: np.ndarray, seed: int, draws: int = 5000, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile interval for the mean difference in accuracy, first minus second, of two arms on the same images.

    first_correct, second_correct: bool [seeds, n], or the fraction of several models that are right, paired by training
    seed and image. Each draw takes seeds and images with replacement, the same images for every seed; with one seed the
    interval covers the images only. seed: of the draws. Returns (low, high), fractions in [-1, 1]. Raises ValueError if the shapes differ. Source: Efron and
    Tibshirani, An Introduction to the Bootstrap (1993), chapters 8 and 13.
    """
    if first_correct.shape != second_correct.shape or first_correct.ndim != 2:
        raise ValueError(f"shapes {first_correct.shape} and {second_correct.shape}: both must be [seeds, n]")
    seeds, n = first_correct.shape
    # Images on which every seed differs alike are interchangeable: it is enough to draw how many there are of each kind.
    kinds, images = _kinds(first_correct, second_correct)
    generator = np.random.default_rng(seed)
    of_seed = generator.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds
    of_kind = generator.multinomial(n, images / n, draws) / n
    means = ((of_seed @ kinds) * of_kind).sum(1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _kinds(first_correct: np.ndarray, second_correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different columns of first minus second, float [seeds, kinds], in order, and how many images have each."""
    if first_correct.dtype != bool or second_correct.dtype != bool:
        return np.unique(first_correct.astype(float) - second_correct, axis=1, return_counts=True)
    digits = 3 ** np.arange(len(first_correct))[::-1, None]  # a column as one number, which is quicker to sort
    numbers, images = np.unique(((first_correct.astype(int) - second_correct + 1) * digits).sum(0), return_counts=True)
    return (numbers // digits % 3 - 1).astype(float), images


def difference_interval(
    first_correct: np.ndarray, second_correct: np.ndarray, seed: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Interval for the mean difference in accuracy, first minus second, that is not too narrow for a handful of seeds.

    first_correct, second_correct: bool [seeds, n], paired. With one seed the paired bootstrap over the images; with more,
    what covers both that and Student's interval of the differences by seed, because a bootstrap of three seeds is too
    narrow. Two arms that never differ get the rule of three (Hanley and Lippman-Hand, JAMA 249, 1983). Two that differ on
    fewer than FEW images of a seed get at least the exact interval given on how many they differ (Clopper and Pearson,
    Biometrika 26, 1934), which excludes zero only where McNemar's exact test does; where it includes zero, at least the
    rule of three, too. Within +-margin at
    confidence 0.90 it is an equivalence test at 5 % (two one-sided tests; Schuirmann, J. Pharmacokin. Biopharm. 15,
    1987). Returns (low, high), fractions in [-1, 1].
    """
    low, high = paired_bootstrap(first_correct, second_correct, seed, confidence=confidence)
    if np.array_equal(first_correct, second_correct):
        # Resampling no differences gives none, but n images only bound them.
        low, high = -3 / first_correct.shape[1], 3 / first_correct.shape[1]
    by_seed = first_correct.mean(1) - second_correct.mean(1)
    for first, second in zip(first_correct, second_correct, strict=True) if first_correct.dtype == bool else ():
        if 0 < (differing := int((first != second).sum())) < FEW:
            exact = proportion_confint(int((first & ~second).sum()), differing, alpha=1 - confidence, method="beta")
            exact_low, exact_high = ((2 * share - 1) * differing / len(first) for share in exact)
            if exact_low <= 0 <= exact_high:
                exact_low, exact_high = min(exact_low, -3 / len(first)), max(exact_high, 3 / len(first))
            low, high = min(low, exact_low), max(high, exact_high)
    if len(by_seed) > 1:
        student = seeds_interval(by_seed, confidence)
        low, high = min(low, student[0]), max(high, student[1])
    return low, high


def accuracy_interval(correct: np.ndarray) -> tuple[float, float]:
    """Interval at 95 % for the mean accuracy of one arm over its training seeds: it covers the images, and the seeds too.

    correct: bool [seeds, n], the right answers of each seed on the same images. With one seed Wilson's interval, which
    covers the images only; with more, what covers that of the mean and `difference_interval` to a model that is never
    right. Seeds share their images, so no number of seeds makes up for few images. Returns (low, high), fractions in
    [0, 1]. Raises ValueError without a seed or an image.
    """
    if correct.ndim != 2 or not correct.size:
        raise ValueError(f"shape {correct.shape}: it must be [seeds, n], with a seed and an image at least")
    low, high = wilson_interval(round(correct.sum(1).mean()), correct.shape[1])
    if len(correct) > 1:
        over_both = difference_interval(correct, np.zeros_like(correct), seed=0)
        low, high = max(0.0, min(low, over_both[0])), min(1.0, max(high, over_both[1]))
    return low, high


def on_common_seeds(first: Mapping[int, np.ndarray], second: Mapping[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The right answers of two arms on the training seeds that both have, for a paired comparison.

    first, second: training seed -> bool [n], on the same images. Returns two arrays, bool [seeds, n], in the order of the
    seeds. Raises ValueError if no seed is common.
    """
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        raise ValueError(f"seeds {sorted(first)} and {sorted(second)} have none in common")
    return np.stack([first[seed] for seed in seeds]), np.stack([second[seed] for seed in seeds])


def speedup_interval(
    baseline_ms: np.ndarray, candidate_ms: np.ndarray, seed: int, confidence: float = 0.95, draws: int = 2000
) -> tuple[float, float]:
    """Percentile interval for how many times faster a candidate is: median of `baseline_ms` over median of `candidate_ms`.

    baseline_ms, candidate_ms: ms > 0, [rounds], of one `timing.time_interleaved`: each draw takes rounds with replacement, the same
    for both, so a slow moment that hit both counts for none. The ratio of the medians, not the median of the ratios of the
    rounds, because it is the number beside which the interval is shown. It covers the rounds of one process; what another
    start of it, or another machine, would give is not in it. seed: of the draws. Returns (low, high). Raises ValueError if
    the shapes differ or a time is not positive. Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993),
    chapters 8 and 13.
    """
    if baseline_ms.shape != candidate_ms.shape or baseline_ms.ndim != 1 or not len(baseline_ms):
        raise ValueError(
            f"shapes {baseline_ms.shape} and {candidate_ms.shape}: both must be [rounds], with one at least"
        )
    if min(baseline_ms.min(), candidate_ms.min()) <= 0:
        raise ValueError("a time is not positive; give milliseconds that a clock measured")
    rounds = len(baseline_ms)
    chosen = np.random.default_rng(seed).integers(0, rounds, (draws, rounds))
    ratios = np.median(baseline_ms[chosen], axis=1) / np.median(candidate_ms[chosen], axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return float(low), float(high)


def speedups_known(times_ms: Mapping[Any, np.ndarray], baseline: Any, width: float) -> bool:
    """Whether the 95 % interval of every row's speed-up over `baseline` lies within `width`, a share, of that speed-up.

    times_ms: row -> ms, [rounds], paired by round as for `speedup_interval`.
    """
    for milliseconds in times_ms.values():
        speedup = np.median(times_ms[baseline]) / np.median(milliseconds)
        low, high = speedup_interval(times_ms[baseline], milliseconds, seed=0, draws=500)
        if high - speedup > width * speedup or speedup - low > width * speedup:
            return False
    return True


@dataclass(frozen=True)
class Ratio:
    """How many times faster one row of latency is than another, with its 95 % interval."""

    times: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """faster, slower, or tied: beyond what rows of the same work differ by, or not."""
        return "faster" if self.low > SAME_WORK else "slower" if self.high < 1 / SAME_WORK else "tied"


def latency_ratio(first: Mapping[str, Any], second: Mapping[str, Any]) -> Ratio:
    """How many times faster the first of two rows of latency is than the second.

    Rows have `median_ms`, `p90_ms`, `speedup_low`, `speedup_high`, `run_id` and `times`: ms of each round, float64 [rounds],
    or None. Rows of one process (one run_id, which is not empty) with times of as many rounds are paired by round. Others have
    the ratios of the ends of their speed-up intervals, and where either has none (NaN), those that their 90th percentiles
    allow.
    """
    ratio = second["median_ms"] / first["median_ms"]
    times = first.get("times"), second.get("times")
    one_process = bool(first.get("run_id")) and first["run_id"] == second.get("run_id")
    if one_process and all(isinstance(ms, np.ndarray) for ms in times) and len(times[0]) == len(times[1]):
        return Ratio(ratio, *speedup_interval(times[1], times[0], seed=0))
    ends = [row[f"speedup_{end}"] for row in (first, second) for end in ("low", "high")]
    if np.isfinite(ends).all():
        return Ratio(ratio, ends[0] / ends[3], ends[1] / ends[2])
    return Ratio(ratio, second["median_ms"] / first["p90_ms"], second["p90_ms"] / first["median_ms"])


def shown_faster(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether the first of two rows of latency is shown to be faster: the interval of `latency_ratio` lies above SAME_WORK.

    Rows of which neither is shown to be faster tie; so may two rows of which a third is shown to be faster than one only.
    """
    return latency_ratio(first, second).verdict == "faster"


def sqnr_db(reference: np.ndarray, answered: np.ndarray) -> float:
    """Signal to quantization noise ratio in dB of float arrays of one shape: 10 log10(sum x^2 / sum (x - q)^2); inf if equal."""
    noise = float(np.square(reference.astype(np.float64) - answered).sum())
    return float(10 * np.log10(np.square(reference, dtype=np.float64).sum() / noise)) if noise else float("inf")


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """How far a model's confidence is from its accuracy, on average over images: a fraction in [0, 1], 0 is calibrated.

    confidence: float [n] in [0, 1], the probability of the predicted class. correct: bool [n]. The images are sorted into
    `bins` bins (low, high] of equal width; the error is the mean of |accuracy - mean confidence| of the bins, weighted by
    their images. Few images make it too high. Raises ValueError for shapes that differ, no images, bins < 1 or a
    confidence outside [0, 1]. Source: Naeini et al., AAAI (2015); Guo et al., ICML (2017).
    """
    if confidence.shape != correct.shape or confidence.ndim != 1 or not len(confidence):
        raise ValueError(f"shapes {confidence.shape} and {correct.shape}: both must be [n], with an image at least")
    if bins < 1 or not (0 <= confidence.min() and confidence.max() <= 1):
        raise ValueError(
            f"bins is {bins}, confidence is from {confidence.min()} to {confidence.max()}, not within [0, 1]"
        )
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(index, weights=correct - confidence.astype(np.float64), minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))
