"""The choice among ways to serve one model, by the study's rule, where there is one model and one process."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from helpers.report.results import MARGIN, Difference, difference
from helpers.report.stats import latency_ratio

Way = TypeVar("Way", bound=Hashable)


@dataclass(frozen=True)
class Choice(Generic[Way]):
    """The way to take; those that tie with the fastest; those that may be taken; and what each changes against FP32."""

    way: Way
    tied: list[Way]
    kept: list[Way]
    changes: dict[Way, Difference]


def choose_way(
    times_ms: Mapping[Way, np.ndarray], right: Mapping[Way, np.ndarray], agreement: Mapping[Way, float], reference: Way
) -> Choice[Way]:
    """Of the ways that are not shown to lose more than half a point against `reference`, the fastest; agreement decides ties.

    times_ms: ms, float64 [rounds], paired by round. right: bool [n], which images are answered as they should be: by their
    labels, or where there are none, as the reference answers. agreement: share of images with the class of the reference, in
    [0, 1]; of ways that agree alike the one with the lower median counts.
    """
    changes = {way: difference(right[way][None], right[reference][None]) for way in times_ms}
    kept = [way for way in times_ms if changes[way].high >= -100 * MARGIN]
    rows = {
        way: {"median_ms": float(np.median(times_ms[way])), "times": times_ms[way], "run_id": "one"} for way in kept
    }
    fastest = min(kept, key=lambda way: rows[way]["median_ms"])
    tied = [way for way in kept if latency_ratio(rows[fastest], rows[way]).verdict != "faster"]
    chosen = max(tied, key=lambda way: (agreement[way], -rows[way]["median_ms"]))
    return Choice(chosen, tied, kept, changes)
