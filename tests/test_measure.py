import hashlib
import itertools
import threading
import time

import numpy as np
import pytest

from helpers.serve.timing import CALLS_A_TURN, summarise, time_interleaved


def test_every_candidate_is_timed_in_every_round_and_the_slower_one_is_slower():
    calls = {"fast": 0, "slow": 0}

    def predictor(name, seconds):
        def call(batch):
            calls[name] += 1
            time.sleep(seconds)
            return batch

        return call

    times = time_interleaved(
        {"fast": predictor("fast", 0.001), "slow": predictor("slow", 0.01)}, np.zeros((1, 3, 32, 32)), 5, 0, settle_s=0
    )
    assert {name: len(values) for name, values in times.items()} == {"fast": 5, "slow": 5}
    assert calls["slow"] == 1 + 2 * 5
    assert np.median(times["slow"]) > 2 * np.median(times["fast"])
    with pytest.raises(ValueError, match="at least one"):
        time_interleaved({}, np.zeros(1), 5, 0)


def disturbed_calls():
    """The share of calls that began while threads which the candidate before them had left still ran."""
    spinning: list[threading.Thread] = []
    disturbed: list[bool] = []

    def spins(batch):
        spinning.append(threading.Thread(target=hashlib.pbkdf2_hmac, args=("sha256", b"", b"", 50_000)))
        spinning[-1].start()
        return batch

    def next_one(batch):
        disturbed.append(any(thread.is_alive() for thread in spinning))
        return batch

    time_interleaved({"next": next_one, "spins": spins}, np.zeros(1), 5, 0, settle_s=0)
    assert len(spinning) > 5
    return np.mean(disturbed[1:])  # the first call compiles, before any clock starts


def test_threads_that_spin_after_a_call_do_not_disturb_the_next_candidate():
    # On a busy machine a thread that waits for a core looks asleep, so one quiet try of three is enough.
    assert min(disturbed_calls() for _ in range(3)) < 0.5


def test_at_an_idle_pace_each_timed_call_follows_a_rest_and_an_earlier_call_of_the_same_candidate():
    calls = []

    def predictor(name):
        def call(batch):
            calls.append((name, time.perf_counter()))
            return batch

        return call

    idle_s, rounds = 0.02, 7
    times = time_interleaved({name: predictor(name) for name in "ab"}, np.zeros(1), rounds, 0, idle_s=idle_s)
    turns = -(-rounds // CALLS_A_TURN)
    for name in "ab":
        assert sum(called == name for called, _ in calls) == 1 + turns + rounds  # compile, take the caches back, timed
        rested = [
            after - before
            for (earlier, before), (later, after) in itertools.pairwise(calls)
            if (earlier, later) == (name, name)
        ]
        assert sum(rest >= idle_s for rest in rested) >= rounds
        assert np.median(times[name]) < 1e3 * idle_s  # the clock runs for the call, not for the rest
    with pytest.raises(ValueError, match="idle_s is -1"):
        time_interleaved({"a": predictor("a")}, np.zeros(1), 1, 0, idle_s=-1)


def test_summary_by_hand():
    summary = summarise(np.arange(1.0, 12.0))
    assert (summary["median_ms"], summary["p90_ms"], summary["p95_ms"]) == (6.0, 10.0, 10.5)
    assert summary["cv"] == pytest.approx(np.sqrt(10) / 6)
