"""Signals, rankings and similarities on arrays: closed forms, invariances, degenerate cases."""

import math
import time

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mmforget.errors import CollapsedError, SplitError
from mmforget.metrics.mia import average_gap, nomus, simple_mia, svc_mia, threshold_mia
from mmforget.metrics.probes import knn_leave_one_out, knn_predict, linear_predict
from mmforget.metrics.ranking import Ranking, mean_interval, thin, wilson
from mmforget.metrics.signals import Predictions, entropy, member_signals, modified_entropy
from mmforget.metrics.similarity import (
    activation_distance,
    js_divergence,
    linear_cka,
    rbf_cka,
    unbiased_cka,
    zrf,
)


def test_single_and_multi_label_share_one_form():
    single = Predictions.of([[0.0, math.log(3.0)]], [1])
    assert single.probs.tolist() == [[[pytest.approx(0.25), pytest.approx(0.75)]]]
    assert not single.multi_label
    multi = Predictions.of([[math.log(3.0), -math.log(3.0)]], [[1.0, 1.0]])
    assert multi.multi_label
    np.testing.assert_allclose(multi.vector, [[0.75, 0.25]])
    np.testing.assert_allclose(multi.confidence, [0.75 * 0.25])
    np.testing.assert_allclose(multi.correctness, [0.5])
    np.testing.assert_allclose(multi.entropy, 2 * single.entropy)
    assert multi[:1].label.tolist() == [[1, 1]]


def test_phi_is_the_logit_difference_and_keeps_its_digits():
    gaps = np.array([-40.0, -3.0, 0.0, 5.0, 40.0, 60.0])
    two = Predictions.of(np.stack([np.zeros(6), gaps], axis=1), np.ones(6, dtype=int))
    np.testing.assert_allclose(two.phi, gaps, rtol=1e-12, atol=1e-12)
    certain = Predictions.of([[0.0, 2000.0]], [1])
    assert certain.phi[0] == pytest.approx(103.616, abs=1e-3)
    assert Predictions.of([[0.0, 2000.0]], [0]).phi[0] == pytest.approx(-103.616, abs=1e-3)
    joint = Predictions.of([[40.0, 40.0]], [[1.0, 1.0]])  # each head misses with e^-40
    assert joint.phi[0] == pytest.approx(40 - math.log(2), rel=1e-9)
    assert np.isfinite(Predictions.of([[900.0, 900.0]], [[0.0, 0.0]]).phi).all()


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(CollapsedError, match="not finite"):
        Predictions.of([[0.0, math.nan]], [0])


def test_entropies_by_hand():
    assert entropy([0.5, 0.5]) == pytest.approx(math.log(2))
    assert entropy([1.0, 0.0]) == 0
    p = [0.7, 0.2, 0.1]
    expected = -0.3 * math.log(0.7) - 0.2 * math.log(0.8) - 0.1 * math.log(0.9)
    assert modified_entropy([p], [0])[0] == pytest.approx(expected)
    assert modified_entropy([[1.0, 0.0]], [0])[0] == 0
    assert modified_entropy([[1.0, 0.0]], [1])[0] == pytest.approx(-2 * math.log(1e-30))


def test_every_signal_is_larger_for_what_the_model_knows():
    logits = np.array([[4.0, 0.0, 0.0], [1.0, 0.5, 0.0]])
    loss = -np.log(Predictions.of(logits, [0, 0]).confidence)
    for name, signal in member_signals({"loss": loss, "logits": logits, "label": [0, 0]}).items():
        assert signal[0] > signal[1], name


def test_ranking_by_hand_with_ties():
    ranking = Ranking.of([3, 2, 2], [2, 1])
    assert ranking.auc == pytest.approx(5 / 6)
    assert ranking.balanced_accuracy == pytest.approx(0.75)
    assert ranking.tpr_at(0.5) == 1.0
    assert math.isnan(ranking.tpr_at(0.4))
    fpr, tpr = ranking.curve
    assert fpr.tolist() == [0, 0, 0.5, 1]
    np.testing.assert_allclose(tpr, [0, 1 / 3, 1, 1])


def test_larger_means_member():
    assert Ranking.of([2.0, 3.0], [0.0, 1.0]).auc == 1
    assert Ranking.of([0.0, 1.0], [2.0, 3.0]).auc == 0
    assert Ranking.of([0.0, 1.0], [2.0, 3.0]).balanced_accuracy == 0.5


def test_constant_scores_say_nothing():
    found = Ranking.of(np.zeros(200), np.zeros(200)).intervals((0.01,), seed=0, resamples=100)
    assert found["auc"] == (0.5, 0.5, 0.5)
    assert found["balanced_accuracy"] == (0.5, 0.5, 0.5)
    assert found["tpr@0.01"] == (0, 0, 0)


def test_ranking_refuses_what_it_cannot_rank():
    with pytest.raises(SplitError, match="empty"):
        Ranking.of([], [1.0])
    with pytest.raises(CollapsedError, match="not finite"):
        Ranking.of([math.nan], [1.0])
    assert Ranking.of([math.inf], [1.0]).auc == 1


def test_ranking_agrees_with_scikit_learn_and_a_plain_bootstrap():
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.7, 1, 150).round(1), rng.normal(0, 1, 120).round(1)
    truth = np.repeat([1, 0], [150, 120])
    found = Ranking.of(a, b).intervals((0.05,), seed=3, resamples=2000)
    assert found["auc"].value == pytest.approx(roc_auc_score(truth, np.concatenate([a, b])))
    plain = [
        roc_auc_score(truth, np.concatenate([rng.choice(a, 150), rng.choice(b, 120)]))
        for _ in range(800)
    ]
    np.testing.assert_allclose(found["auc"][1:], np.percentile(plain, [2.5, 97.5]), atol=0.015)
    limit = np.sort(b)[::-1][6]  # six non-members above it: FPR 5 %
    assert found["tpr@0.05"].value == pytest.approx((a > limit).mean())


def test_a_thousand_resamples_are_quick():
    rng = np.random.default_rng(0)
    ranking = Ranking.of(rng.normal(0.3, 1, 1500), rng.normal(0, 1, 1500))
    start = time.process_time()
    first = ranking.intervals((0.01, 0.001), seed=0)
    assert time.process_time() - start < 1.5  # a fraction of this on an idle machine
    assert first == ranking.intervals((0.01, 0.001), seed=0)
    assert first["auc"].low < ranking.auc < first["auc"].high


def test_thinned_curve_keeps_ends_and_only_its_own_points():
    rng = np.random.default_rng(0)
    fpr, tpr = Ranking.of(rng.normal(1, 1, 3000), rng.normal(0, 1, 3000)).curve
    x, y = thin(fpr, tpr)
    assert 50 < len(x) <= 200
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert set(zip(x, y, strict=True)) <= set(zip(fpr.tolist(), tpr.tolist(), strict=True))
    assert thin(np.array([0.0, 1.0]), np.array([0.0, 1.0])) == ([0.0, 1.0], [0.0, 1.0])


def test_intervals_of_rates_and_means():
    low, high = wilson(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == pytest.approx(1)
    assert math.isnan(wilson(0, 0)[0])
    assert mean_interval([1.0, 1.0]) == (1, 1, 1)
    assert mean_interval([2.0]).value == 2
    assert math.isnan(mean_interval([]).value)


# The test accuracy, the forgetting score and the NoMUS of the README of ndb796/MachineUnlearning.
README = [
    (0.5951, 0.2136, 0.5839),
    (0.4880, 0.0445, 0.6995),
    (0.6055, 0.2129, 0.5898),
    (0.4048, 0.0485, 0.6539),
    (0.5984, 0.1415, 0.6577),
    (0.8852, 0.0568, 0.8858),
    (0.9147, 0.0708, 0.8865),
    (0.4193, 0.0356, 0.6740),
    (0.1762, 0.1289, 0.4592),
    (0.5549, 0.4680, 0.3094),
    (0.7607, 0.0152, 0.8651),
]


@pytest.mark.parametrize(("accuracy", "score", "published"), README)
def test_published_nomus_recomputes(accuracy, score, published):
    assert float(nomus(accuracy, 0.5 + score)) == pytest.approx(published, abs=1e-3)
    assert float(nomus(accuracy, 0.5 - score)) == pytest.approx(published, abs=1e-3)


def test_simple_mia_knows_members_and_only_cuts_the_forget_set():
    rng = np.random.default_rng(0)
    found = simple_mia(rng.normal(0, 0.1, 60), rng.normal(5, 0.1, 50))
    assert found.accuracy == 1
    assert found.forgetting_score == 0.5
    assert len(found.forget) == 50
    assert len(simple_mia(rng.normal(size=40), rng.normal(size=90)).forget) == 40


def test_average_gap_by_hand():
    gaps, mean = average_gap({"ua": 5.0, "ra": 99.0}, {"ua": 7.0, "ra": 100.0})
    assert gaps == {"ua": 2.0, "ra": 1.0}
    assert mean == 1.5


def test_svc_mia_counts_non_members():
    sure, unsure = [[6.0, 0.0]] * 30, [[0.2, 0.0]] * 30
    zeros = np.zeros(30, dtype=int)
    member, other = Predictions.of(sure, zeros), Predictions.of(unsure, zeros)
    assert svc_mia(member, other, member)["confidence"] == 0
    assert svc_mia(member, other, other)["confidence"] == 1


def test_threshold_mia_of_a_class_nobody_shadowed():
    seen = Predictions.of_probs([[0.9, 0.1], [0.6, 0.4]], [0, 0])
    rest = Predictions.of_probs([[0.2, 0.8]], [1])
    found = threshold_mia(seen[:1], seen[1:], seen[:1], rest)
    assert found["confidence"].member_recall == 1
    assert found["correctness"].accuracy == 0.5


def test_js_divergence_zrf_and_activation_distance_by_hand():
    one, other = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    assert js_divergence(one, other)[0] == pytest.approx(math.log(2))
    assert js_divergence(one, one)[0] == 0
    assert zrf(one, other) == pytest.approx(1 - math.log(2))
    assert math.isinf(js_divergence(one, other, reference=True)[0])
    p, q = np.array([[0.9, 0.1]]), np.array([[0.6, 0.4]])
    reversed_kl = [
        sum(m * math.log(m / x) for m, x in zip((0.75, 0.25), side[0], strict=True))
        for side in (p, q)
    ]
    assert js_divergence(p, q, reference=True)[0] == pytest.approx(sum(reversed_kl) / 4)
    assert activation_distance(one, other)[0] == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize("n", [12, 200])  # fewer and more examples than features
def test_cka_ignores_rotation_shift_and_scale(n):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 20))
    rotation, _ = np.linalg.qr(rng.normal(size=(20, 20)))
    moved = 3.5 * x @ rotation + 7
    for cka in (linear_cka, rbf_cka, unbiased_cka):
        assert cka(x, moved) == pytest.approx(1, abs=1e-9), cka
        assert math.isnan(linear_cka(x, np.ones((n, 4))))


def test_linear_cka_has_one_value_for_both_ways_to_compute_it():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 10)), rng.normal(size=(30, 40))
    h = np.eye(30) - 1 / 30
    k, m = h @ x @ x.T @ h, h @ y @ y.T @ h
    expected = np.vdot(k, m) / math.sqrt(np.vdot(k, k) * np.vdot(m, m))
    assert linear_cka(x, y) == pytest.approx(expected)
    assert linear_cka(x[:, :5], y[:, :5]) < 1


def test_only_the_unbiased_cka_of_unrelated_features_is_near_zero():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 300)), rng.normal(size=(400, 300))
    assert linear_cka(x, y) > 0.3
    assert abs(unbiased_cka(x, y)) < 0.05
    assert abs(unbiased_cka(x, y, batch=100)) < 0.05
    assert math.isnan(unbiased_cka(x[:3], y[:3]))
    assert math.isnan(unbiased_cka(x, np.ones((400, 2))))


def test_knn_votes_and_leaves_the_example_itself_out():
    x = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    y = np.array([0, 1, 1, 1])
    assert knn_predict(x, y, [[1.0, 0.0]], k=1).tolist() == [0]
    assert knn_predict(x, y, [[1.0, 0.0]], k=2).tolist() == [0]  # a tie goes to the smaller label
    assert knn_predict(x, y, [[1.0, 0.0]], k=9).tolist() == [1]
    assert knn_leave_one_out(x, y, k=1).tolist() == [1, 0, 1, 1]
    both = np.stack([y, 1 - y], axis=1)
    assert knn_leave_one_out(x, both, k=1).tolist() == [[1, 0], [0, 1], [1, 0], [1, 0]]


def test_linear_probe_separates_and_survives_a_constant_target():
    x = np.concatenate([np.full((20, 2), -1.0), np.full((20, 2), 1.0)])
    y = np.repeat([0, 1], 20)
    assert linear_predict(x, y, [[-2.0, -2.0], [2.0, 2.0]]).tolist() == [0, 1]
    targets = np.stack([y, np.ones(40, dtype=int)], axis=1)
    assert linear_predict(x, targets, [[-2.0, -2.0]]).tolist() == [[0, 1]]
