"""Calibrated scores and the challenge's epsilon on arrays: closed forms and degenerate cases."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from mmforget.attacks.challenge import (
    challenge_epsilons,
    final_score,
    forget_score,
    top_bucket,
)
from mmforget.attacks.likelihood import (
    calibrated,
    expected_offline,
    expected_online,
    gaussian,
    lira_offline,
    lira_online,
    rmia,
)


def test_lira_by_hand():
    inside, outside = [[3.0, 5.0]], [[-1.0, 1.0]]
    expected = norm.logpdf(4.5, 4, 1) - norm.logpdf(4.5, 0, 1)
    assert lira_online([4.5], inside, outside)[0] == pytest.approx(expected)
    assert lira_online([2.0], inside, outside)[0] == pytest.approx(0)
    assert lira_offline([1.0], outside)[0] == pytest.approx(-norm.logsf(1))
    assert calibrated([4.5], outside)[0] == 4.5
    assert calibrated([4.5], outside, inside)[0] == 2.5


def test_offline_lira_tells_apart_what_the_published_score_rounds_to_one():
    scores = lira_offline([9.0, 30.0], [[-1.0, 1.0]] * 2)
    assert scores[1] > scores[0] > 0
    assert (norm.cdf([9.0, 30.0]) == 1).all()


def test_fixed_variance_ignores_the_spread_between_examples():
    signals = np.array([[0.0, 2.0], [100.0, 102.0]])
    assert gaussian(signals, fixed_variance=True)[1].tolist() == [pytest.approx(1)] * 2
    assert gaussian(signals, fixed_variance=True, reference=True)[1][0] > 50
    assert gaussian(signals, fixed_variance=False)[1].tolist() == [pytest.approx(1)] * 2


def test_models_that_do_not_count_are_left_out():
    nan = math.nan
    assert lira_online([1.0], [[3.0, nan, 5.0]], [[nan, -1.0, 1.0]])[0] == pytest.approx(
        lira_online([1.0], [[3.0, 5.0]], [[-1.0, 1.0]])[0]
    )
    assert expected_offline([[0.5, nan]], 1.0)[0] == 0.5


def test_rmia_by_hand():
    assert expected_online([[0.8, 0.6]], [[0.1]])[0] == pytest.approx(0.4)
    assert expected_offline([[0.2]], 0.4)[0] == pytest.approx(0.5 * (1.4 * 0.2 + 0.6))
    z, expected_z = [0.5, 0.5, 0.5], [0.5, 1.0, 0.25]  # ratios 1, 0.5 and 2
    assert rmia([0.8], [0.4], z, expected_z)[0] == pytest.approx(1 / 3)  # strictly more than 2x
    assert rmia([0.8], [0.4], z, expected_z, gamma=1.0)[0] == pytest.approx(2 / 3)
    assert rmia([0.0], [0.4], z, expected_z)[0] == 0


def test_epsilon_of_identical_distributions_is_zero():
    x = np.random.default_rng(0).normal(size=(64, 5))
    assert challenge_epsilons(x, x).tolist() == [0] * 5
    assert challenge_epsilons(np.zeros((8, 1)), np.zeros((8, 1))).tolist() == [0]


def test_epsilon_of_two_draws_of_one_distribution_is_not_zero():
    rng = np.random.default_rng(0)
    epsilons = challenge_epsilons(rng.normal(size=(64, 20)), rng.normal(size=(64, 20)))
    assert 0.5 < epsilons.mean() < 3
    assert forget_score(epsilons, 64) < 0.6


def test_epsilon_of_separate_distributions_is_the_cap():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(32, 3)), rng.normal(loc=50, size=(32, 3))
    assert challenge_epsilons(a, b).tolist() == [50] * 3
    assert challenge_epsilons(b, a).tolist() == [50] * 3
    peaked = 0.001 * rng.normal(size=(32, 3))
    assert challenge_epsilons(a, peaked, cap=7.0).tolist() == [7] * 3
    assert challenge_epsilons(np.zeros((8, 1)), np.ones((8, 1))).tolist() == [50]


def test_epsilon_by_hand_through_a_single_threshold():
    # Between 0 and 4 one of four on each side is wrong: FPR = FNR = 1/4.
    a, b = np.array([[0.0], [4.0], [4.1], [4.2]]), np.array([[4.3], [0.1], [0.2], [0.3]])
    assert challenge_epsilons(a, b)[0] == pytest.approx(math.log((0.75 - 1e-5) / 0.25))


def test_forget_score_buckets_and_final_score():
    assert top_bucket(512) == 7
    assert top_bucket(16) == 3
    values = [0.0, 0.49, 0.5, 2.9, 3.0, 50.0, math.nan]
    points = [1, 1, 0.5, 2**-5, 0, 0, 0]
    for value, point in zip(values, points, strict=True):
        assert forget_score([value], 16) == point
    assert forget_score(values, 16) == pytest.approx(np.mean(points))
    assert final_score(0.5, (0.9, 1.0), (0.8, 0.4)) == pytest.approx(0.9)
