"""Metrics of recommenders: closed forms, plain loops on small worlds, and a trained world."""

import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mmforget.errors import CollapsedError, ConfigError
from mmforget.record import Cost
from mmforget.recsys import ENTRIES
from mmforget.recsys.backbones.mf import MatrixFactorisation
from mmforget.recsys.data import Interactions, Known
from mmforget.recsys.graph import Graph
from mmforget.recsys.metrics import pairs as pairs_module
from mmforget.recsys.metrics.fairness import Completeness, Fairness, a_igf, active_users
from mmforget.recsys.metrics.gap import Gap
from mmforget.recsys.metrics.groups import Groups, groups
from mmforget.recsys.metrics.mi import MI, margin, mi_bf, mi_ng
from mmforget.recsys.metrics.pairs import moments, non_edges, pair_scores
from mmforget.recsys.metrics.ranking import RankingMetrics, popularity, split_ranking
from mmforget.recsys.ranking import rank
from mmforget.registry import METRICS
from mmforget.types import ModelView, Splits, Trial
from tests.recsys.world import make_world


def view(model, splits):
    return ModelView(lambda: model, lambda model, data: {}, splits)


def make_trial(splits, model, original=None, retrained=None, benchmark=None):
    return Trial(
        view=view(model, splits),
        original=view(model if original is None else original, splits),
        retrained=None if retrained is None else view(retrained, splits),
        splits=splits,
        seed=0,
        cost=Cost(),
        cost_reference=None,
        benchmark=benchmark,
        lab=None,
    )


def factorised(graph, scores):
    """Return a model whose scores are this matrix, [U, I]."""
    model = MatrixFactorisation(graph, dim=graph.users)
    with torch.no_grad():
        model.users.copy_(torch.eye(graph.users))
        model.items.copy_(torch.as_tensor(scores, dtype=torch.float32).T)
    return model


def small(users=24, items=40, seed=0):
    """Return splits of random pairs: half retained, the rest forgotten, test and validation."""
    rng = np.random.default_rng(seed)
    keys = rng.permutation(users * items)[: users * items // 3]
    cut = [len(keys) // 2, len(keys) * 7 // 10, len(keys) * 9 // 10]
    parts = [np.sort(part) for part in np.split(keys, cut)]
    train = np.sort(np.concatenate(parts[:2]))
    graph = Graph(users, items, train // items, train % items)

    def made(part):
        return Interactions(part // items, part % items, items)

    forget, retain = (
        Interactions(part // items, part % items, items, np.searchsorted(train, part))
        for part in (parts[1], parts[0])
    )
    edge = np.arange(len(train))
    every = Interactions(train // items, train % items, items, edge)
    splits = Splits(forget, retain, every, made(parts[2]), made(parts[2]), made(parts[3]))
    return splits, graph


@pytest.fixture(scope="module")
def trained():
    world = make_world()
    original = world.train(world.build(1), world.splits.train, 1)
    retrained = world.train(world.build(1), world.splits.retain, 1)
    other = world.train(world.build(2), world.splits.retain, 2)
    return SimpleNamespace(
        world=world,
        nothing=make_trial(world.splits, original, original, retrained),
        perfect=make_trial(world.splits, other, original, retrained),
        noise=make_trial(world.splits, world.fresh(5), original, retrained),
        linked=make_trial(world.splits, world.build(5), original, retrained),
    )


def test_all_metrics_are_registered_and_documented():
    for name in ENTRIES["metrics"]:
        made = METRICS.get(name)
        assert made.citation
        assert "Pitfalls" in made.__doc__


# Pairs.


def test_scores_of_pairs_are_inner_products_however_they_are_cut(monkeypatch):
    splits, graph = small()
    table = torch.randn(graph.nodes, 7, generator=torch.Generator().manual_seed(0))
    wanted = (table[: graph.users] @ table[graph.users :].T).numpy()
    asked = (splits.train.user, splits.train.item)
    for size in (2**18, 3):
        monkeypatch.setattr(pairs_module, "PAIRS", size)
        found = pair_scores(table, graph.users, asked)
        assert found.dtype == np.float64
        assert found == pytest.approx(wanted[asked], abs=1e-5)
    assert pair_scores(table, graph.users, (asked[0][:0], asked[1][:0])).shape == (0,)
    table[2] = torch.inf
    with pytest.raises(CollapsedError, match="not finite"):
        pair_scores(table, graph.users, asked)


def test_moments_are_those_of_all_pairs_but_the_known():
    splits, graph = small()
    table = 3 + torch.randn(graph.nodes, 6, generator=torch.Generator().manual_seed(1))
    known = (
        np.concatenate([splits.train.user, np.full(graph.items, 3)]),
        np.concatenate([splits.train.item, np.arange(graph.items)]),
    )
    keys = np.unique(known[0] * graph.items + known[1])  # user 3 knows every item
    known = (keys // graph.items, keys % graph.items)
    found = moments(table, graph.users, known)
    scores = (table[: graph.users].double() @ table[graph.users :].double().T).numpy()
    scores[known] = np.nan
    for u in range(graph.users):
        if u == 3:
            assert found.user_std[u] == 0
            continue
        assert found.user_mean[u] == pytest.approx(np.nanmean(scores[u]))
        assert found.user_std[u] == pytest.approx(np.nanstd(scores[u]))
    for i in range(graph.items):
        assert found.item_mean[i] == pytest.approx(np.nanmean(scores[:, i]))
        assert found.item_std[i] == pytest.approx(np.nanstd(scores[:, i]))
    asked = (np.array([0, 3]), np.array([5, 5]))
    values = np.array([10.0, 10.0])
    wanted = (10 - found.user_mean[0]) / found.user_std[0]
    assert found.by_user(values, asked) == pytest.approx([wanted, 0.0])
    wanted = (10 - found.item_mean[5]) / found.item_std[5]
    assert found.by_item(values, asked) == pytest.approx([wanted, wanted])


def test_equal_scores_have_no_spread():
    table = torch.full((30, 4), 0.7)
    none = (np.empty(0, np.int64), np.empty(0, np.int64))
    assert (moments(table, 10, none).user_std == 0).all()
    assert (moments(table, 10, none).item_std == 0).all()


@pytest.mark.parametrize("listed", [2**24, 0])
def test_random_pairs_are_uniform_outside_what_is_known(monkeypatch, listed):
    monkeypatch.setattr(pairs_module, "_LISTED", listed)
    splits, graph = small()
    known = Known(splits.train.user, splits.train.item, graph.items)
    free = graph.users * graph.items - len(splits.train)
    drawn = np.zeros((graph.users, graph.items))
    for seed in range(300):
        user, item = non_edges(known, graph.users, free // 4, seed)
        assert len(user) == free // 4
        drawn[user, item] += 1
        assert drawn.max() <= seed + 1  # no repeats within a draw
    assert (drawn[splits.train.user, splits.train.item] == 0).all()
    outside = drawn.copy()
    outside[splits.train.user, splits.train.item] = np.nan
    rate = free // 4 / free
    spread = math.sqrt(300 * rate * (1 - rate))
    assert abs(np.nanstd(outside) / spread - 1) < 0.15
    assert np.nanmax(np.abs(outside - 300 * rate)) < 5 * spread
    again = non_edges(known, graph.users, 50, 7), non_edges(known, graph.users, 50, 7)
    assert (np.stack(again[0]) == np.stack(again[1])).all()
    assert len(non_edges(known, graph.users, 10**6, 0)[0]) == (free if listed else free // 2)


# Ranking.


def test_ranking_values_are_those_of_the_ranking_with_the_stated_masks():
    splits, graph = small()
    rng = np.random.default_rng(1)
    model = factorised(graph, rng.normal(size=(graph.users, graph.items)))
    theirs = factorised(graph, rng.normal(size=(graph.users, graph.items)))

    def known(data):
        return Known(data.user, data.item, graph.items)

    for mask, hidden in (("train", splits.train), ("kept", splits.retain)):
        benchmark = SimpleNamespace(config=SimpleNamespace(ks=[5, 7], mask=mask))
        values = RankingMetrics().compute(
            make_trial(splits, model, retrained=theirs, benchmark=benchmark)
        )
        for split, masked in (("test", hidden), ("val", hidden), ("forget", splits.retain)):
            args = (graph.users, splits.get(split), known(masked), (5, 7, 20))
            found, reference = rank(model.final(), *args), rank(theirs.final(), *args)
            for label, name in (("recall", "recall"), ("hr", "hit"), ("map", "map")):
                for k in (5, 7, 20):
                    value = values[f"{label}@{k}/{split}"]
                    assert value.value == pytest.approx(found.mean(name, k))
                    assert value.reference == pytest.approx(reference.mean(name, k))
                    assert 0 <= value.low <= value.value <= value.high <= 1
                    assert value.n == len(found)
                    assert value.direction == ("to_reference" if split == "forget" else "up")
        said = {"train": "all training pairs masked", "kept": "retained training pairs masked"}
        assert values["recall@5/test"].note == said[mask]
        assert values["recall@5/forget"].note == said["kept"]
    assert "recall@10/test" not in values


def test_the_default_cut_offs_hold_without_a_benchmark_and_a_model_is_ranked_once():
    splits, graph = small()
    model = factorised(graph, np.random.default_rng(2).normal(size=(graph.users, graph.items)))
    given = make_trial(splits, model)
    values = RankingMetrics().compute(given)
    assert {f"ndcg@{k}/val" for k in (10, 20, 50)} <= values.keys()
    assert values["ndcg@10/val"].reference is None
    first = split_ranking(given.view, None, splits, "test")
    assert split_ranking(given.view, None, splits, "test") is first


def test_a_perfect_and_a_hopeless_recommender():
    splits, graph = small()
    scores = np.zeros((graph.users, graph.items))
    scores[splits.test.user, splits.test.item] = 1
    for sign, wanted in ((1, 1.0), (-1, 0.0)):
        values = RankingMetrics().compute(make_trial(splits, factorised(graph, sign * scores)))
        assert values["hr@10/test"].value == wanted
        assert values["ndcg@10/test"].value == wanted


def test_what_is_no_candidate_is_not_recommended():
    splits, graph = small()
    scores = np.zeros((graph.users, graph.items))
    scores[splits.test.user, splits.test.item] = 1
    allowed = np.zeros(graph.items, np.bool_)
    benchmark = SimpleNamespace(
        config=SimpleNamespace(ks=[20], mask="train"), candidates=lambda retain: allowed
    )
    values = RankingMetrics().compute(
        make_trial(splits, factorised(graph, scores), benchmark=benchmark)
    )
    assert values["recall@20/test"].value == 0.0
    assert values["popularity/recall@20"].value == 0.0


def test_popularity_ranks_by_retained_pairs_then_by_id():
    splits, graph = small()
    counts = np.bincount(splits.retain.item, minlength=graph.items)
    order = sorted(range(graph.items), key=lambda i: (-counts[i], i))
    found = popularity(make_trial(splits, factorised(graph, np.zeros((24, 40)))))
    for row, user in enumerate(found.user):
        seen = set(splits.train.item[splits.train.user == user].tolist())
        top = [i for i in order if i not in seen][:10]
        truth = set(splits.test.item[splits.test.user == user].tolist())
        assert found.at("recall", 10)[row] == pytest.approx(len(truth & set(top)) / len(truth))


def test_a_recommender_of_nan_is_collapsed():
    splits, graph = small()
    model = factorised(graph, np.full((graph.users, graph.items), np.nan))
    for metric in (RankingMetrics, MI, Groups, Fairness, Completeness, Gap):
        with pytest.raises(CollapsedError, match="not finite"):
            metric().compute(make_trial(splits, model))


def test_ranking_shows_what_was_learned_and_forgotten(trained):
    nothing, perfect, noise = (
        RankingMetrics().compute(given)
        for given in (trained.nothing, trained.perfect, trained.noise)
    )
    floor = nothing["popularity/recall@20"].value
    assert nothing["recall@20/test"].value > 2 * floor
    assert perfect["recall@20/test"].value > 2 * floor
    assert noise["recall@20/test"].value < floor + 0.1
    assert nothing["ndcg@20/forget"].gap > 0.25
    assert perfect["ndcg@20/forget"].gap < 0.1


# MI.


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_mi_ratios_in_closed_form():
    before, after, random = np.array([2.0, 4.0]), np.array([1.0, 0.0]), np.array([-1.0, 2.0])
    assert mi_bf(before, after) == pytest.approx((sigmoid(2) + sigmoid(4)) / (sigmoid(1) + 0.5))
    assert mi_ng(random, after) == pytest.approx((sigmoid(-1) + sigmoid(2)) / (sigmoid(1) + 0.5))
    assert mi_bf(before, after, "score") == pytest.approx(6.0)
    assert mi_ng(random, after, "score") == pytest.approx(1.0)
    assert margin(random, after) == 0.0
    assert mi_bf(np.array([-800.0]), np.array([800.0])) == 0.0  # no overflow
    with pytest.raises(ConfigError, match="Accepted: probability, score"):
        mi_bf(before, after, "raw")


def test_mi_compares_forgotten_pairs_with_before_and_with_random_pairs():
    splits, graph = small()
    scores = np.full((graph.users, graph.items), 0.25)
    scores[splits.train.user, splits.train.item] = 3.0
    original = factorised(graph, scores)
    scores[splits.forget.user, splits.forget.item] = 0.5
    retrained = factorised(graph, scores)
    scores[splits.forget.user, splits.forget.item] = -0.5
    model = factorised(graph, scores)
    values = MI().compute(make_trial(splits, model, original, retrained))
    p = sigmoid
    assert values["mi_bf/probability"].value == pytest.approx(p(3) / p(-0.5), rel=1e-6)
    assert values["mi_bf/probability"].reference == pytest.approx(p(3) / p(0.5), rel=1e-6)
    assert values["mi_ng/probability"].value == pytest.approx(p(0.25) / p(-0.5), rel=1e-6)
    assert values["mi_ng/probability"].direction == "up"
    assert values["mi/margin"].value == pytest.approx(0.75)
    assert values["mi/forget_probability"].value == pytest.approx(p(-0.5), rel=1e-6)
    assert values["mi/random_probability"].value == pytest.approx(p(0.25), rel=1e-6)
    for name, reference in (("mi_bf/score", 6.0), ("mi_ng/score", 0.5)):
        assert math.isnan(values[name].value)
        assert "not positive" in values[name].note
        assert values[name].reference == pytest.approx(reference)


def test_mi_of_the_original_is_one_and_falls_with_forgetting(trained):
    nothing, perfect = (MI().compute(given) for given in (trained.nothing, trained.perfect))
    assert nothing["mi_bf/probability"].value == 1.0
    assert perfect["mi_bf/probability"].value > 1.05
    assert perfect["mi_ng/probability"].value > nothing["mi_ng/probability"].value


# Groups.


def test_groups_part_users_by_degree_and_never_part_equal_ones():
    splits, graph = small(users=60, seed=3)
    scores = np.random.default_rng(3).normal(size=(graph.users, graph.items))
    given = make_trial(splits, factorised(graph, scores))
    ranked = split_ranking(given.view, None, splits, "test")
    found = groups(ranked, splits)
    degree = np.bincount(splits.train.user, minlength=graph.users)[ranked.user]
    assert sorted(np.concatenate([g.rows for g in found]).tolist()) == list(range(len(ranked)))
    filled = [g for g in found if len(g.rows)]
    assert len(filled) == 4
    for group, following in pairwise(filled):
        assert group.high < following.low
        assert (group.low, group.high) == (degree[group.rows].min(), degree[group.rows].max())
    values = Groups().compute(given)
    for number, group in enumerate(found, start=1):
        value = values[f"recall@20/group{number}"]
        assert value.value == pytest.approx(ranked.at("recall", 20)[group.rows].mean())
        assert value.note == f"users with {group.low} to {group.high} training pairs"


def test_groups_of_equal_users_are_one_group():
    users, items = 8, 10
    pairs = np.array([(u, i) for u in range(users) for i in range(3)])
    graph = Graph(users, items, pairs[:, 0], pairs[:, 1])
    train = Interactions(pairs[:, 0], pairs[:, 1], items, np.arange(len(pairs)))
    test = Interactions(np.arange(users), np.full(users, 5), items)
    parts = (train.select(range(2)), train.select(range(2, 24)))
    splits = Splits(*parts, train, test, test)
    values = Groups().compute(make_trial(splits, factorised(graph, np.zeros((users, items)))))
    assert values["recall@20/group1"].n == users
    for number in (2, 3, 4):
        value = values[f"ndcg@20/group{number}"]
        assert math.isnan(value.value)
        assert value.n == 0
        assert "not defined" in value.note


# CURE4Rec.


def test_active_users_have_most_pairs_and_ties_go_by_id():
    counts = np.array([0, 3, 9, 3, 9, 0, 1, 3])
    assert active_users(counts, 0.5).tolist() == [2, 4, 1]  # of six users with pairs
    assert active_users(counts).tolist() == []
    assert len(active_users(np.ones(40, np.int64))) == 2
    assert len(active_users(np.ones(39, np.int64))) == 1


def test_a_igf_is_the_gap_of_two_means():
    active, inactive = np.array([0.1, 0.3]), np.array([0.5, 0.7, 0.6])
    found = a_igf(active, inactive)
    assert found.value == pytest.approx(0.4)
    half = 1.959964 * math.sqrt(0.02 / 2 + 0.01 / 3)
    assert (found.low, found.high) == pytest.approx((0.4 - half, 0.4 + half))
    assert a_igf(inactive, active).value == pytest.approx(0.4)
    assert math.isnan(a_igf(active[:0], inactive).value)


def test_fairness_counts_remaining_users_by_retained_pairs():
    splits, graph = small()
    scores = np.zeros((graph.users, graph.items))
    counts = np.bincount(splits.retain.user, minlength=graph.users)
    best = min(range(graph.users), key=lambda u: (-counts[u], u))
    test = splits.test
    own = test.user == best
    if not own.any():
        pytest.fail("the world needs a test pair of its most active user")
    scores[best, test.item[own]] = 1
    scores[test.user[~own], test.item[~own]] = -1
    values = Fairness().compute(make_trial(splits, factorised(graph, scores)))
    assert values["fairness/ndcg@20/active"].value == 1.0
    rest = values["fairness/ndcg@20/inactive"].value
    assert values["fairness/a_igf"].value == pytest.approx(1 - rest)
    assert values["fairness/a_igf"].direction == "down"
    assert "1 active users of 24" in values["fairness/a_igf"].note


def test_fairness_of_few_users_is_not_defined():
    splits, graph = small(users=12)
    values = Fairness().compute(make_trial(splits, factorised(graph, np.zeros((12, 40)))))
    assert math.isnan(values["fairness/a_igf"].value)
    assert "not defined" in values["fairness/a_igf"].note


def test_completeness_is_half_for_retraining_and_noise_only(trained):
    nothing, perfect, noise = (
        Completeness().compute(given)["completeness/auc"]
        for given in (trained.nothing, trained.perfect, trained.noise)
    )
    assert nothing.value > 0.75
    assert nothing.low > nothing.reference
    assert abs(perfect.value - 0.5) < 0.1
    assert abs(noise.value - 0.5) < 0.1
    # Forgotten edges that stay in the graph give themselves away, whatever the weights are.
    assert Completeness().compute(trained.linked)["completeness/auc"].value > 0.6
    random = Completeness().compute(trained.nothing)["completeness/auc_random"]
    assert random.value > random.reference > 0.7  # tastes alone tell these apart


def test_completeness_needs_some_pairs():
    splits, graph = small()
    few = Splits(
        splits.forget.select(range(3)), splits.retain, splits.train, splits.holdout, splits.test
    )
    scores = np.random.default_rng(0).normal(size=(graph.users, graph.items))
    values = Completeness().compute(make_trial(few, factorised(graph, scores)))
    assert math.isnan(values["completeness/auc"].value)
    assert "under 10 pairs" in values["completeness/auc"].note


# Gap.


def test_the_gap_of_the_retrained_model_is_zero(trained):
    given = trained.perfect
    same = make_trial(given.splits, given.retrained.model, None, given.retrained.model)
    assert Gap().compute(same)["gap/average"].value == 0.0
    assert "gap/average" not in Gap().compute(make_trial(given.splits, given.view.model))


def test_the_gap_is_the_mean_of_its_parts_and_ranks_forgetting(trained):
    nothing, perfect, noise = (
        Gap().compute(given) for given in (trained.nothing, trained.perfect, trained.noise)
    )
    parts = [nothing[f"gap/{name}"].gap for name in ("test", "forget", "retain", "membership")]
    assert nothing["gap/average"].value == pytest.approx(np.mean(parts))
    assert perfect["gap/average"].value < 5 < nothing["gap/average"].value
    assert perfect["gap/average"].value < noise["gap/average"].value
    assert nothing["gap/membership"].value > 70
    shown = RankingMetrics().compute(trained.nothing)["ndcg@20/test"].value
    assert nothing["gap/test"].value == pytest.approx(100 * shown)
