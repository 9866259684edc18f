import numpy as np
import pytest

from helpers.stats import mcnemar_exact, seeds_interval, wilson_interval


def test_wilson_interval_by_hand():
    # 8 of 10: centre (0.8 + 1.96^2 / 20) / (1 + 1.96^2 / 10) = 0.7167, half width 0.2266
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    with pytest.raises(ValueError, match="impossible"):
        wilson_interval(11, 10)


def test_mcnemar_counts_only_the_images_on_which_two_models_differ():
    first = np.array([True] * 6 + [False] * 4)
    second = np.array([True] + [False] * 5 + [False] * 4)
    assert mcnemar_exact(first, second) == pytest.approx(2 * 0.5**5)
    assert mcnemar_exact(first, first) == 1.0
    with pytest.raises(ValueError, match="differ"):
        mcnemar_exact(first, second[:3])


def test_seeds_interval_by_hand():
    # mean 2, standard error 1 / sqrt(3), t(0.975, 2) = 4.3027
    assert seeds_interval(np.array([1.0, 2.0, 3.0])) == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-3)
    with pytest.raises(ValueError, match="at least two"):
        seeds_interval(np.array([1.0]))
