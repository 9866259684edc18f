"""Latency, measured so that ratios can be believed: all candidates in one process, in turns, in shuffled order.

Called by notebooks; needs nothing but numpy.
"""

import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeVar

import numpy as np

Name = TypeVar("Name", bound=Hashable)


def time_interleaved(
    predictors: Mapping[Name, Callable[[np.ndarray], np.ndarray]],
    batch: np.ndarray,
    rounds: int,
    seed: int,
    settle_s: float = 0.005,
    turns: Callable[[range], Iterable[int]] = iter,
) -> dict[Name, np.ndarray]:
    """Time one call per round of every predictor on `batch`; returns name -> milliseconds, float64 [rounds].

    Slow drift of the machine (clock, neighbours) then hits all candidates alike. Each round visits them in a new order drawn
    from `seed`. Compilation is over before the clock starts, and before each timed call the predictor runs untimed for at
    least `settle_s` seconds: thread pools of the previous candidate have gone to sleep and the caches hold this one.
    turns: wraps the range of rounds, for a progress bar. Raises ValueError if rounds < 1 or there are no predictors.
    """
    if rounds < 1 or not predictors:
        raise ValueError(f"{rounds} rounds of {len(predictors)} predictors: at least one of each is needed")
    for predictor in predictors.values():
        predictor(batch)
    generator = np.random.default_rng(seed)
    names = list(predictors)
    times = {name: np.empty(rounds) for name in names}
    for turn in turns(range(rounds)):
        for index in generator.permutation(len(names)):
            predictor = predictors[names[index]]
            settled = time.perf_counter() + settle_s
            while True:
                predictor(batch)
                if time.perf_counter() >= settled:
                    break
            started = time.perf_counter()
            predictor(batch)
            times[names[index]][turn] = 1e3 * (time.perf_counter() - started)
    return times


def summarise(times_ms: np.ndarray) -> dict[str, float]:
    """Median, 90th and 95th percentile in ms, and the coefficient of variation (standard deviation / mean)."""
    return {
        "median_ms": float(np.median(times_ms)),
        "p90_ms": float(np.percentile(times_ms, 90)),
        "p95_ms": float(np.percentile(times_ms, 95)),
        "cv": float(times_ms.std() / times_ms.mean()),
    }
