import time

import numpy as np
import pytest

from helpers.measure import summarise, time_interleaved


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


def test_summary_by_hand():
    summary = summarise(np.arange(1.0, 12.0))
    assert (summary["median_ms"], summary["p90_ms"]) == (6.0, 10.0)
    assert summary["cv"] == pytest.approx(np.sqrt(10) / 6)
