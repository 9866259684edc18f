import numpy as np
import pytest

from helpers.report.stats import (
    accuracy_interval,
    difference_interval,
    expected_calibration_error,
    holm,
    mcnemar_exact,
    on_common_seeds,
    paired_bootstrap,
    seeds_interval,
    shown_faster,
    speedup_interval,
    wilson_interval,
)


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


def test_seeds_that_agree_do_not_make_an_accuracy_more_precise_than_its_images():
    answers = np.stack([np.arange(10_000) < correct for correct in (8014, 8016, 8012)])
    one = accuracy_interval(answers[:1])
    assert one == wilson_interval(8014, 10_000)
    low, high = accuracy_interval(answers)
    assert low <= one[0] and high >= one[1] and high - low < 0.017  # Student's alone: 0.001 wide


def test_seeds_that_disagree_make_an_accuracy_less_precise():
    answers = np.stack([np.arange(10_000) < correct for correct in (7800, 8000, 8200)])
    assert accuracy_interval(answers) == pytest.approx(seeds_interval(np.array([0.78, 0.80, 0.82])))
    # A model that is always right leaves nothing to resample, and no interval leaves the scale.
    low, high = accuracy_interval(np.ones((2, 50), bool))
    assert low == pytest.approx(wilson_interval(50, 50)[0]) and high == 1
    with pytest.raises(ValueError, match=r"\[seeds, n\]"):
        accuracy_interval(np.empty((0, 10), bool))


def test_two_arms_are_compared_on_the_seeds_that_both_have():
    zero, one, two = (np.array([number == 0, number == 1, number == 2]) for number in range(3))
    first, second = on_common_seeds({2: two, 0: zero, 1: one}, {1: zero, 2: one, 3: two})
    assert first.tolist() == [one.tolist(), two.tolist()] and second.tolist() == [zero.tolist(), one.tolist()]
    with pytest.raises(ValueError, match="none in common"):
        on_common_seeds({0: zero}, {1: zero})


def test_the_interval_of_a_speedup_uses_that_rounds_are_paired():
    rounds = np.random.default_rng(0).lognormal(0, 0.5, 50)  # slow moments that hit both candidates alike
    assert speedup_interval(3 * rounds, rounds, seed=0) == pytest.approx((3, 3))
    shuffled = speedup_interval(3 * rounds, rounds[::-1].copy(), seed=0)
    assert shuffled[0] < 2.9 and shuffled[1] > 3.1


def test_the_interval_of_a_speedup_by_hand():
    # Of two rounds a draw takes the first twice (a quarter of the draws), both (half) or the second twice (a quarter).
    assert speedup_interval(np.array([4.0, 8.0]), np.array([2.0, 2.0]), seed=0) == (2.0, 4.0)
    assert speedup_interval(np.array([5.0]), np.array([2.0]), seed=0) == (2.5, 2.5)
    with pytest.raises(ValueError, match="both must be"):
        speedup_interval(np.ones(2), np.ones(3), seed=0)
    with pytest.raises(ValueError, match="not positive"):
        speedup_interval(np.array([0.0]), np.ones(1), seed=0)


def test_a_row_is_faster_by_its_interval_or_where_there_is_none_by_its_p90():
    def row(median, p90, low=np.nan, high=np.nan):
        return {"median_ms": median, "p90_ms": p90, "speedup_low": low, "speedup_high": high}

    assert shown_faster(row(1.0, 1.5, 9.8, 10.2), row(1.2, 1.8, 8.5, 8.8))
    assert not shown_faster(row(1.0, 1.05, 9.8, 10.2), row(1.2, 1.8, 8.5, 9.0))  # as far apart as the same work may be
    # Rounds of one process are paired: of times that rise and fall together, the interval of the ratio decides.
    rounds = np.random.default_rng(0).lognormal(0, 0.5, 50)
    process = {"run_id": "a"}
    fast, slow = (
        row(np.median(ms), np.quantile(ms, 0.9), 1, 9) | process | {"times": ms} for ms in (rounds, 1.2 * rounds)
    )
    assert shown_faster(fast, slow) and not shown_faster(slow, fast) and not shown_faster(fast, fast)
    assert not shown_faster(fast, slow | {"run_id": "b"})  # two processes: nothing is paired
    assert not shown_faster(fast | {"run_id": ""}, slow | {"run_id": ""})  # nothing says that it was one process
    assert not shown_faster(fast, slow | {"times": None})
    assert not shown_faster(fast, slow | {"times": 1.05 * rounds})  # nearer than rows that do the same work
    assert not shown_faster(row(1.0, 1.5), row(1.2, 1.8, 8.5, 8.8)) and shown_faster(row(1.0, 1.05), row(1.2, 1.8))


def test_paired_bootstrap_covers_the_difference_and_knows_pairs():
    first = np.zeros((1, 400), bool)
    first[0, :40] = True
    second = np.zeros((1, 400), bool)
    low, high = paired_bootstrap(first, second, seed=0)
    # 40 of 400 differ, all one way: mean 0.1, standard error sqrt(0.1 * 0.9 / 400) = 0.015
    assert low == pytest.approx(0.1 - 1.96 * 0.015, abs=0.004) and high == pytest.approx(0.1 + 1.96 * 0.015, abs=0.004)
    assert paired_bootstrap(first, first, seed=0) == (0.0, 0.0)
    assert paired_bootstrap(first, second, seed=1) == paired_bootstrap(first, second, seed=1)
    with pytest.raises(ValueError, match=r"\[seeds, n\]"):
        paired_bootstrap(first[0], second[0], seed=0)


def test_paired_bootstrap_takes_fractions_of_several_models():
    first, second = np.random.default_rng(0).choice([0, 0.25, 0.875, 1], (2, 3, 200))
    assert paired_bootstrap(first, first, seed=0) == (0.0, 0.0)
    low, high = paired_bootstrap(first, second, seed=0)
    assert low < (first - second).mean() < high
    np.testing.assert_allclose(paired_bootstrap(second, first, seed=0), (-high, -low), atol=0.02)


def test_paired_bootstrap_is_wider_when_seeds_disagree():
    same = np.repeat(np.arange(1000)[None] < 500, 2, axis=0)
    apart = np.stack([np.arange(1000) < 600, np.arange(1000) < 400])
    other = np.repeat(np.arange(1000)[None] < 450, 2, axis=0)
    narrow, wide = (np.ptp(paired_bootstrap(arm, other, seed=0)) for arm in (same, apart))
    assert wide > 2 * narrow


def test_a_difference_over_few_seeds_has_student_s_interval_when_that_is_wider():
    # Per seed +1.2, -1.0 and 0.0 points: the images are many, the seeds disagree.
    base = np.arange(10_000) < 8_000
    first = np.stack([np.arange(10_000) < 8_000 + shift for shift in (120, -100, 0)])
    second = np.repeat(base[None], 3, axis=0)
    low, high = difference_interval(first, second, seed=0)
    assert (low, high) == pytest.approx(seeds_interval(np.array([0.012, -0.010, 0.0])))
    inner = difference_interval(first, second, seed=0, confidence=0.90)
    assert low < inner[0] < -0.005 and high > inner[1] > 0.005  # no equivalence within half a point


def test_one_seed_and_many_equal_images_show_equivalence_and_few_do_not():
    answers = np.arange(10_000)[None] % 5 > 0
    other = answers.copy()
    other[0, :20] = ~other[0, :20]
    assert np.abs(difference_interval(answers, other, seed=0, confidence=0.90)).max() < 0.005
    assert np.abs(difference_interval(answers[:, :100], other[:, :100], seed=0, confidence=0.90)).max() > 0.005


def test_a_handful_of_differing_images_shows_no_more_than_mcnemar_does():
    same = np.ones((1, 360), bool)
    for differing, shown in ((5, False), (6, True)):  # all one way: p is 2 / 2^5 = 0.0625 and 2 / 2^6 = 0.031
        other = same.copy()
        other[0, :differing] = False
        low, high = difference_interval(other, same, seed=0)
        assert (high < 0) == shown == (mcnemar_exact(other[0], same[0]) < 0.05)
        assert low < -differing / 360 < high
        assert difference_interval(same, other, seed=0)[0] == pytest.approx(-high)
        again = difference_interval(np.repeat(other, 3, 0), np.repeat(same, 3, 0), seed=0)
        assert (again[1] < 0) == shown  # the same images in three seeds are no more images


def test_a_model_that_differs_on_one_image_is_known_no_better_than_one_that_never_differs():
    same = np.ones((1, 360), bool)
    other = same.copy()
    other[0, 0] = False
    never, once = (difference_interval(answers, same, seed=0) for answers in (same, other))
    assert once[0] <= never[0] and once[1] >= never[1]


def test_expected_calibration_error_by_hand():
    # (0.8, 0.9]: accuracy 1/2, confidence 0.875; (0.5, 0.6]: accuracy 1, confidence 0.55; two and one of three images
    confidence, correct = np.array([0.85, 0.9, 0.55]), np.array([True, False, True])
    assert expected_calibration_error(confidence, correct, bins=10) == pytest.approx(0.375 * 2 / 3 + 0.45 / 3)
    # All in one bin: only the means count, 2/3 and 2.3/3. The default is Guo et al.'s 15 bins.
    assert expected_calibration_error(confidence, correct, bins=1) == pytest.approx(0.1)
    assert expected_calibration_error(confidence, correct) == expected_calibration_error(confidence, correct, bins=15)
    # The ends of the scale have bins too.
    assert expected_calibration_error(np.array([0.0, 1.0]), np.array([False, True])) == 0.0
    with pytest.raises(ValueError, match="within"):
        expected_calibration_error(np.array([1.2]), np.array([True]))
    with pytest.raises(ValueError, match="shapes"):
        expected_calibration_error(confidence, correct[:2])


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.04 times 3, 2, 1: 0.03, 0.04, 0.04, and none below the one before it.
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04]) and holm([0.9, 0.8])[0] == 1
