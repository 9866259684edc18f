"""Intervals and paired tests: pure functions of counts and arrays."""

import numpy as np
from scipy.stats import binomtest, t
from statsmodels.stats.proportion import proportion_confint


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
