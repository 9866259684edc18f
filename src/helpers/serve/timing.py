"""Latency, measured so that ratios can be believed: all candidates in one process, in turns, in shuffled order.

Needs nothing but numpy.
"""

import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeVar

import numpy as np

Name = TypeVar("Name", bound=Hashable)
CALLS_A_TURN = 5  # calls of one candidate in a row where each comes after a rest


def time_interleaved(
    predictors: Mapping[Name, Callable[[np.ndarray], np.ndarray]],
    batch: np.ndarray,
    rounds: int,
    seed: int,
    settle_s: float = 0.02,
    turns: Callable[[range], Iterable[int]] = iter,
    idle_s: float = 0.0,
    enough: Callable[[dict[Name, np.ndarray]], bool] | None = None,
) -> dict[Name, np.ndarray]:
    """Time one call per round of every predictor on `batch`; returns name -> milliseconds, float64 [rounds].

    enough: asked after every fifth round, from the tenth on, with the times so far; once it says so, no more rounds follow.
    Slow drift of the machine (clock, neighbours) then hits all candidates alike. Each turn visits them in a new order drawn
    from `seed`. Compilation is over before the clock starts. Before a candidate's turn the threads that the previous one left
    spinning (ONNX Runtime's do so for some 40 ms) have gone to sleep (it waits for them, at most a second).

    idle_s is the pace. At 0, a hot loop, a turn is one round: the candidate runs untimed for at least `settle_s` seconds, so
    that its own threads are awake and the caches hold its weights, and its next call is timed. Above 0, calls come alone, as
    to a service with one model: a turn is up to `CALLS_A_TURN` rounds, one untimed call takes the caches back from the other
    candidates, and the process sleeps for `idle_s` seconds before each timed call. The candidate's own threads do meanwhile
    what they always do: those that go on spinning answer sooner, and keep a core busy.
    turns: wraps the range of rounds at which turns begin, for a progress bar. Raises ValueError if rounds < 1, idle_s < 0 or
    there are no predictors.
    """
    if rounds < 1 or not predictors:
        raise ValueError(f"{rounds} rounds of {len(predictors)} predictors: at least one of each is needed")
    if idle_s < 0:
        raise ValueError(f"idle_s is {idle_s}; give the seconds of rest before a call, 0 for none")
    for predictor in predictors.values():
        predictor(batch)
    generator = np.random.default_rng(seed)
    names = list(predictors)
    times = {name: np.empty(rounds) for name in names}
    calls = CALLS_A_TURN if idle_s else 1
    for start in turns(range(0, rounds, calls)):
        for index in generator.permutation(len(names)):
            predictor = predictors[names[index]]
            _wait_until_idle()
            settled = time.perf_counter() + (0 if idle_s else settle_s)
            while True:
                predictor(batch)
                if time.perf_counter() >= settled:
                    break
            for turn in range(start, min(start + calls, rounds)):
                if idle_s:
                    time.sleep(idle_s)
                times[names[index]][turn] = 1e3 * seconds_of(predictor, batch)
        done = min(start + calls, rounds)
        if enough is not None and done >= 10 and done % 5 == 0 and enough({n: ms[:done] for n, ms in times.items()}):
            return {name: milliseconds[:done] for name, milliseconds in times.items()}
    return times


def _wait_until_idle(limit_s: float = 1.0) -> None:
    """Sleep until this process uses less than a fifth of a core, at most `limit_s` seconds."""
    given_up = time.perf_counter() + limit_s
    while time.perf_counter() < given_up:
        slept, used = time.perf_counter(), time.process_time()
        time.sleep(0.01)  # two ticks of the kernel that counts the time used
        if time.process_time() - used < 0.2 * (time.perf_counter() - slept):
            return


def seconds_of(call: Callable[..., object], *arguments: object) -> float:
    """Seconds that one call takes; what it returns is dropped."""
    started = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - started


def summarise(times_ms: np.ndarray) -> dict[str, float]:
    """Median, 90th and 95th percentile in ms, and the coefficient of variation (standard deviation / mean)."""
    return {
        "median_ms": float(np.median(times_ms)),
        "p90_ms": float(np.percentile(times_ms, 90)),
        "p95_ms": float(np.percentile(times_ms, 95)),
        "cv": float(times_ms.std() / times_ms.mean()),
    }
