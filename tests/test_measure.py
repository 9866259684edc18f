import itertools
import time

import numpy as np
import pytest

from helpers.serve import timing
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


class SpinningClock:
    """A clock that only sleep moves. Threads use a core of it until `spins_until`."""

    def __init__(self):
        self.now = self.used = self.spins_until = 0.0

    def perf_counter(self):
        return self.now

    def process_time(self):
        return self.used

    def sleep(self, seconds):
        self.used += max(0.0, min(seconds, self.spins_until - self.now))
        self.now += seconds


@pytest.mark.parametrize(
    ("spin_s", "disturbed"), [(0.04, False), (1e9, True)]
)  # as ONNX Runtime's; a thread that never ends
def test_a_candidate_waits_for_threads_that_the_one_before_it_left_spinning_but_not_forever(
    monkeypatch, spin_s, disturbed
):
    clock = SpinningClock()
    monkeypatch.setattr(timing, "time", clock)
    began_while_spinning = []

    def spins(batch):
        clock.spins_until = clock.now + spin_s

    def next_one(batch):
        began_while_spinning.append(clock.now < clock.spins_until)

    time_interleaved({"next": next_one, "spins": spins}, np.zeros(1), 5, 0, settle_s=0)
    assert len(began_while_spinning) == 1 + 2 * 5
    assert any(began_while_spinning) == disturbed


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
