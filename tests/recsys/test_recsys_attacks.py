"""Attacks on recommenders: they find what is planted, and nothing in noise or retrained models."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mmforget.record import Cost
from mmforget.recsys import ENTRIES
from mmforget.recsys.attacks import membership
from mmforget.recsys.attacks.membership import PairMembership, PairMembershipConfig
from mmforget.recsys.attacks.reconstruct import Reconstruct, ReconstructConfig, recover
from mmforget.recsys.backbones.mf import MatrixFactorisation
from mmforget.recsys.data import Interactions
from mmforget.recsys.graph import Graph
from mmforget.registry import ATTACKS
from mmforget.types import Budget, ModelView, Splits, Trial
from tests.recsys.world import make_world

USERS, ITEMS = 30, 50
SIGNALS = ("score", "gap", "gap_z", "rank", "shadow")


def view(model, splits):
    return ModelView(lambda: model, lambda model, data: {}, splits)


class Lab:
    """Trains shadow models with the function it was given and keeps what was asked for."""

    def __init__(self, splits, train):
        self.splits = splits
        self.train = train
        self.asked = []
        self.engine = SimpleNamespace(share=lambda value: value)

    def view(self, model):
        return view(model, self.splits)

    def shadow(self, keep, seed):
        self.asked.append(list(keep))
        return self.train(keep, seed)


def make_trial(splits, model, retrained=None, train=None):
    return Trial(
        view=view(model, splits),
        original=view(model, splits),
        retrained=None if retrained is None else view(retrained, splits),
        splits=splits,
        seed=0,
        cost=Cost(),
        cost_reference=None,
        benchmark=None,
        lab=Lab(splits, train),
    )


def attack(made, given, **budget):
    return made.run(given, Budget(**budget) if budget else made.budget())


def factorised(graph, scores):
    """Return a model whose scores are this matrix, [U, I]."""
    model = MatrixFactorisation(graph, dim=graph.users)
    with torch.no_grad():
        model.users.copy_(torch.eye(graph.users))
        model.items.copy_(torch.as_tensor(scores, dtype=torch.float32).T)
    return model


def random_splits(seed=0):
    """Return splits of random pairs of 30 users and 50 items, and the graph of the train ones."""
    rng = np.random.default_rng(seed)
    keys = rng.permutation(USERS * ITEMS)[:600]
    retain, forget, unseen = (np.sort(part) for part in np.split(keys, [300, 450]))
    train = np.sort(np.concatenate([retain, forget]))

    def made(part, edge=None):
        return Interactions(part // ITEMS, part % ITEMS, ITEMS, edge)

    test = made(unseen)
    parts = [made(part, np.searchsorted(train, part)) for part in (forget, retain, train)]
    return Splits(*parts, test, test), Graph(USERS, ITEMS, train // ITEMS, train % ITEMS)


@pytest.fixture(scope="module")
def trained():
    world = make_world()
    splits = world.splits

    def train(keep, seed):
        return world.train(world.build(seed), splits.train.select(keep), seed)

    everything, retained = (
        range(len(splits.train)),
        np.flatnonzero(~np.isin(splits.train.edge, splits.forget.edge)),
    )
    original, retrained, other = train(everything, 1), train(retained, 1), train(retained, 2)
    return SimpleNamespace(
        nothing=make_trial(splits, original, retrained, train),
        perfect=make_trial(splits, other, retrained, train),
        noise=make_trial(splits, world.fresh(5), retrained, train),
    )


def test_all_attacks_are_registered_with_a_budget():
    for name in ENTRIES["attacks"]:
        made = ATTACKS.get(name)
        budget = made(made.config_type()).budget()
        assert (budget.queries, budget.steps, budget.models, budget.seconds) != (None,) * 4
        assert made.citation
        assert made.access in ("black", "grey", "white")
        assert "Pitfalls" in made.__doc__


# Membership.


def test_membership_finds_what_was_not_forgotten(trained):
    result = attack(PairMembership(PairMembershipConfig(resamples=100)), trained.nothing)
    for name in SIGNALS:
        value = result.values[f"{name}/auc"]
        assert value.value > 0.7, name
        assert value.low > value.reference, name
        assert abs(value.reference - 0.5) < 0.1, name
        random = result.values[f"random/{name}/auc"]
        assert random.value > random.reference > 0.5, name
        assert {f"roc/{name}", f"roc/random/{name}"} <= result.curves.keys()
    assert result.values["score/tpr@0.01"].value > result.values["score/tpr@0.01"].reference
    assert len(trained.nothing.lab.asked) == 2


def test_membership_finds_nothing_in_retrained_models_and_noise(trained):
    made = PairMembership(PairMembershipConfig(resamples=100, shadows=0))
    for given in (trained.perfect, trained.noise):
        values = attack(made, given).values
        for name in SIGNALS[:4]:
            assert abs(values[f"{name}/auc"].value - 0.5) < 0.1, name
    for name in SIGNALS[:4]:  # tastes alone tell them from random pairs, but noise has none
        assert values[f"random/{name}/auc"].reference > 0.75
        assert abs(values[f"random/{name}/auc"].value - 0.5) < 0.15


def test_signals_are_what_they_say():
    splits, graph = random_splits()
    scores = np.random.default_rng(3).normal(size=(USERS, ITEMS))
    given = make_trial(splits, factorised(graph, scores))
    result = attack(PairMembership(PairMembershipConfig(resamples=100, shadows=0)), given)
    scores = scores.astype(np.float32).astype(np.float64)
    retained = np.zeros((USERS, ITEMS), np.bool_)
    retained[splits.retain.user, splits.retain.item] = True
    taken = retained.copy()
    for split in (splits.train, splits.test):
        taken[split.user, split.item] = True
    for side in ("forget", "holdout", "random"):
        ids = [tuple(map(int, name.split(":"))) for name in result.targets[f"{side}_ids"]]
        assert len(ids) == len(set(ids))
        for n, (user, item) in enumerate(ids):
            assert side != "random" or not taken[user, item]
            free = scores[user, ~retained[user]]
            rest = np.delete(free, np.flatnonzero(np.flatnonzero(~retained[user]) == item))
            wanted = {
                "score": scores[user, item],
                "gap": scores[user, item] - free.mean(),
                "gap_z": (scores[user, item] - free.mean()) / free.std(),
                "rank": (rest < scores[user, item]).mean(),
            }
            for name, value in wanted.items():
                assert result.targets[f"{side}_{name}"][n] == pytest.approx(value, abs=1e-6)
    assert len(result.targets["random_ids"]) == USERS * ITEMS - taken.sum()


def test_no_more_pairs_are_attacked_than_asked():
    splits, graph = random_splits()
    given = make_trial(splits, factorised(graph, np.zeros((USERS, ITEMS))))
    made = PairMembership(PairMembershipConfig(pairs=20, resamples=100, shadows=0))
    result = attack(made, given)
    assert {len(result.targets[f"{side}_ids"]) for side in ("forget", "holdout", "random")} == {20}
    assert result.queries == 60
    assert all(value.value == 0.5 for k, value in result.values.items() if k.endswith("auc"))
    again = attack(made, given)
    assert (again.targets["forget_ids"] == result.targets["forget_ids"]).all()


def test_shadow_models_cancel_what_makes_a_pair_easy():
    # A pair's own appeal hides a small gain from training; models without the pair show the appeal.
    splits, graph = random_splits()
    appeal = np.random.default_rng(0).normal(0, 3, size=(USERS, ITEMS))

    def train(keep, seed):
        noise = np.random.default_rng(seed % 2**32).normal(0, 0.1, size=(USERS, ITEMS))
        scores = appeal + noise
        rows = np.array(keep)
        scores[splits.train.user[rows], splits.train.item[rows]] += 1
        return factorised(graph, scores)

    everything = range(len(splits.train))
    retained = np.flatnonzero(~np.isin(splits.train.edge, splits.forget.edge))
    given = make_trial(splits, train(everything, 1), train(retained, 2), train)
    result = attack(PairMembership(PairMembershipConfig(resamples=100)), given)
    assert result.values["score/auc"].value < 0.7
    for prefix in ("", "random/"):
        assert result.values[f"{prefix}shadow/auc"].value > 0.99
        assert abs(result.values[f"{prefix}shadow/auc"].reference - 0.5) < 0.1
    assert [len(keep) for keep in given.lab.asked] == [225, 225]
    assert sorted(row for keep in given.lab.asked for row in keep) == list(everything)


def test_only_models_without_a_pair_calibrate_it():
    splits, graph = random_splits()

    def train(keep, seed):
        scores = np.zeros((USERS, ITEMS))
        scores[splits.train.user[keep], splits.train.item[keep]] = 1
        return factorised(graph, scores)

    given = make_trial(splits, train(np.arange(450), 0), train=train)
    made = PairMembership(PairMembershipConfig(shadows=6))
    sides = made._sides(given)
    found = membership._shadow_scores(given, sides, 6, None)
    for side, scores in found.items():
        assert scores.shape == (len(sides[side][0]), 6)
        assert (np.isnan(scores).sum(1) == 3).all()
        assert (scores[~np.isnan(scores)] == 0).all()


def test_the_budget_limits_the_shadow_models():
    splits, graph = random_splits()
    given = make_trial(
        splits,
        factorised(graph, np.zeros((USERS, ITEMS))),
        train=lambda keep, seed: factorised(graph, np.zeros((USERS, ITEMS))),
    )
    made = PairMembership(PairMembershipConfig(shadows=6, resamples=100))
    assert made.budget().models == 6
    attack(made, given, models=2)
    assert len(given.lab.asked) == 2
    attack(made, given, models=6, seconds=0.0)
    assert len(given.lab.asked) == 4  # one pair of models is the least
    assert "shadow/auc" not in attack(made, given, models=0).values


# Reconstruction.


def test_recovery_equals_a_plain_ranking():
    rng = np.random.default_rng(0)
    for _ in range(30):
        users, items = 4, 12
        scores = rng.integers(6, size=(users, items)) + 0.01 * rng.permutation(items)
        forgotten = [rng.permutation(items)[: rng.integers(1, 5)] for _ in range(users)]
        user = np.repeat(np.arange(users), [len(part) for part in forgotten])
        item = np.concatenate(forgotten)
        shuffle = rng.permutation(len(user))
        user, item = user[shuffle], item[shuffle]
        others = [np.setdiff1d(np.arange(items), part) for part in forgotten]
        above = np.array(
            [(scores[u, others[u]] > scores[u, i]).sum() for u, i in zip(user, item, strict=True)]
        )
        sizes = np.array([len(part) for part in others])
        found = recover(user, above.astype(float), sizes[user])
        for u, part in enumerate(forgotten):
            order = np.argsort(-scores[u])
            places = 1 + np.flatnonzero(np.isin(order, part))
            pairs = scores[u, part][:, None] > scores[u, others[u]]
            assert found.auc[u] == pytest.approx(pairs.mean())
            assert found.mrr[u] == pytest.approx(1 / places[0])
            assert found.hit[u] == pytest.approx((places <= len(part)).mean())


def test_reconstruction_reads_planted_pairs_and_none_from_noise():
    splits, graph = random_splits()
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(USERS, ITEMS))
    noise = factorised(graph, scores)
    scores[splits.forget.user, splits.forget.item] += 20
    values = attack(
        Reconstruct(ReconstructConfig()), make_trial(splits, factorised(graph, scores), noise)
    ).values
    for name in ("auc", "mrr", "hit"):
        assert values[f"final/{name}"].value == pytest.approx(1.0)
    assert abs(values["final/auc"].reference - 0.5) < 0.08
    assert values["final/hit"].reference < 0.3
    assert "layer0/auc" not in values  # the free tables are the final vectors
    assert values["final/auc"].n == len(set(splits.forget.user.tolist()))
    assert values["final/auc"].direction == "to_reference"


def test_reconstruction_of_a_trained_recommender(trained):
    made = Reconstruct(ReconstructConfig())
    nothing, perfect, noise = (
        attack(made, given).values for given in (trained.nothing, trained.perfect, trained.noise)
    )
    for name in ("final", "layer0", "neighbours"):
        assert nothing[f"{name}/auc"].value > 0.93, name
        assert nothing[f"{name}/auc"].low > nothing[f"{name}/auc"].reference, name
        assert perfect[f"{name}/auc"].gap < 0.06, name
        assert nothing[f"{name}/mrr"].gap > perfect[f"{name}/mrr"].gap, name
    assert nothing["final/hit"].value > 0.4
    assert perfect["final/hit"].value < 0.25
    for name in ("final", "layer0"):
        assert abs(noise[f"{name}/auc"].value - 0.5) < 0.12, name


def test_neighbours_score_by_the_mean_cosine_to_retained_items():
    graph = Graph(2, 4, np.array([0, 0, 0, 1]), np.array([0, 1, 2, 3]))
    model = MatrixFactorisation(graph, dim=2)
    with torch.no_grad():
        model.users.zero_()
        model.items.copy_(torch.tensor([[2.0, 0.0], [0.0, 5.0], [3.0, 3.0], [-1.0, 0.0]]))
    edges = np.arange(4)
    train = Interactions(graph.user.numpy(), graph.item.numpy(), 4, edges)
    forget, retain = train.select([2, 3]), train.select([0, 1])
    test = Interactions(np.array([1]), np.array([0]), 4)
    result = attack(
        Reconstruct(ReconstructConfig()),
        make_trial(Splits(forget, retain, train, test, test), model),
    )
    # User 0 retains items 0 and 1: item 2 lies between them, item 3 opposite. User 1 retains none.
    assert result.targets["forget_ids"].tolist() == ["0:2", "1:3"]
    assert result.targets["forget_neighbours"].tolist() == [1.0, 0.5]
    assert result.targets["forget_final"].tolist() == [0.5, 0.5]
    assert result.values["neighbours/auc"].value == pytest.approx(0.75)


def test_some_users_are_drawn_and_the_curve_is_that_of_their_pairs():
    splits, graph = random_splits()
    scores = np.random.default_rng(2).normal(size=(USERS, ITEMS))
    given = make_trial(splits, factorised(graph, scores))
    result = attack(Reconstruct(ReconstructConfig(users=7)), given)
    users = {name.split(":")[0] for name in result.targets["forget_ids"]}
    assert len(users) == result.values["final/auc"].n == 7
    curve = result.curves["roc/final"]
    above = 1 - result.targets["forget_final"]
    for x, y in zip(curve["x"], curve["y"], strict=True):
        assert math.isclose(y, (above <= x + 1e-12).mean()) or x == y == 0
    assert (curve["x"][0], curve["y"][0], curve["x"][-1], curve["y"][-1]) == (0, 0, 1, 1)
    assert curve["x"] == sorted(curve["x"])
    assert np.trapezoid(curve["y"], curve["x"]) == pytest.approx(1 - above.mean(), abs=0.05)
