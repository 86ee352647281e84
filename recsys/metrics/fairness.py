"""Two aspects of CURE4Rec: fairness between active and inactive users, and completeness."""

import math
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mmforget.metrics.common import both, with_interval
from mmforget.metrics.ranking import Interval, Ranking
from mmforget.record import MetricValue
from mmforget.recsys.data import joined
from mmforget.recsys.metrics.pairs import (
    Pairs,
    interactions,
    moments,
    non_edges,
    pair_scores,
    pairs_of,
    recommender,
)
from mmforget.recsys.metrics.ranking import HEADLINE_K, rankings, share_interval
from mmforget.recsys.ranking import Floats, Ints
from mmforget.rng import derive
from mmforget.types import Metric, ModelView, Trial

ACTIVE_SHARE = 0.05
ORACLE_PAIRS = 20_000  # a side that the oracle learns from, at most
_MINIMUM = 10  # pairs a side without which an oracle says nothing
_RESAMPLES = 200


class Fairness(Metric):
    """How differently active and inactive users are served.

    - `fairness/a_igf`: A-IGF = |mean NDCG@20 of active users - of inactive users| on test, in
      [0, 1], down. Active: the floor(5 %) of remaining users with most retained training pairs,
      ties by id; inactive: the rest. The interval is that of a difference of two means.
    - `fairness/ndcg@20/active`, `fairness/ndcg@20/inactive`: the two means, up.

    Remaining users have a retained training pair; those without a test pair are in no mean.

    Pitfalls: a model that serves everyone badly is fair. The public code has no line for sharded
    learners and the paper's exact text could not be read: this is the user-oriented form. With
    fewer than 20 users there is no active one (NaN).
    """

    citation: ClassVar[str] = "Chen et al., CURE4Rec, arXiv 2408.14393"

    def compute(self, trial: Trial) -> Mapping[str, MetricValue]:
        """Return the values; NaN with a note where a group is empty."""
        counts = np.bincount(interactions(trial.splits.retain).user)
        active = active_users(counts)
        own, theirs = (
            None if ranked is None else _parted(ranked.user, ranked.at("ndcg", HEADLINE_K), counts)
            for ranked in rankings(trial, "test")
        )
        assert own is not None
        reference = None if theirs is None else a_igf(*theirs).value
        empty = not len(own.active) or not len(own.inactive)
        note = f"{len(active)} active users of {int((counts > 0).sum())}"
        if empty:
            note = "not defined: no active or no inactive users among those of the test set"
        values = {
            "fairness/a_igf": with_interval(
                a_igf(*own), "down", reference, len(own.active) + len(own.inactive), note
            )
        }
        for name, part in own._asdict().items():
            same = None if theirs is None else share_interval(getattr(theirs, name)).value
            values[f"fairness/ndcg@{HEADLINE_K}/{name}"] = with_interval(
                share_interval(part), "up", same, len(part), note
            )
        return values


class _Parts(NamedTuple):
    active: Floats
    inactive: Floats


def _parted(user: Ints, values: Floats, counts: Ints) -> _Parts:
    """Return the values of active and of inactive users; `counts` are training pairs a user."""
    chosen = np.isin(user, active_users(counts))
    remaining = np.isin(user, np.flatnonzero(counts))
    return _Parts(values[chosen], values[remaining & ~chosen])


def active_users(counts: Ints, share: float = ACTIVE_SHARE) -> Ints:
    """Return the users with most interactions, most first, ties by id: floor(share · users).

    Args:
        counts: Training pairs of each user, [U]; users without any are not counted.
        share: Share of the users.
    """
    some = np.flatnonzero(counts)
    order = np.lexsort((some, -counts[some]))
    return some[order[: math.floor(share * len(some) + 1e-9)]]


def a_igf(active: Floats, inactive: Floats) -> Interval:
    """Return A-IGF, |mean of active - mean of inactive|, with a normal 95 % interval.

    Args:
        active: A measure of each active user, such as NDCG@20.
        inactive: The same of each inactive user.
    """
    if not len(active) or not len(inactive):
        return Interval(math.nan, math.nan, math.nan)
    gap = abs(float(active.mean() - inactive.mean()))
    if min(len(active), len(inactive)) < 2:
        return Interval(gap, math.nan, math.nan)
    half = 1.959964 * math.sqrt(sum(float(x.var(ddof=1)) / len(x) for x in (active, inactive)))
    return Interval(gap, max(0.0, gap - half), gap + half)


class Completeness(Metric):
    """The membership inference oracle: does a forgotten pair still look like a training pair?

    A logistic regression on three features of a pair, its score, and its score in standard
    deviations of its user's and of its item's scores, learns retained pairs against pairs that
    were never seen, and then judges the forgotten ones.

    - `completeness/auc`: learned against unseen pairs that users DID choose (test and half of the
      holdout), judged against the other half. 0.5 is complete: nothing but training tells the sides
      apart.
    - `completeness/auc_random`: learned and judged against random pairs that nobody chose. Not 0.5
      even when retrained: a pair that fits its user's taste scores high without having been seen.

    Direction of both: closer to the retrained model. Bootstrap 95 % intervals.

    Pitfalls: below 0.5 is over-forgetting, which is as visible. The public code of CURE4Rec holds
    no attack and its features are not known: compare these numbers with each other only. The
    oracle knows which pairs are retained; that is its power and no attacker's.
    """

    citation: ClassVar[str] = "Chen et al., CURE4Rec, arXiv 2408.14393 (the oracle's form is ours)"

    def compute(self, trial: Trial) -> Mapping[str, MetricValue]:
        """Return the values; NaN with a note where a side has under 10 pairs."""
        sides = _sides(trial)
        own, theirs = both(
            trial,
            lambda view: view.memo(
                ("recsys/completeness", trial.seed), lambda v: _oracle(v, trial, sides)
            ),
        )
        values = {}
        for name, found in own.items():
            reference = None if theirs is None else theirs[name].value
            n = len(sides["forget"][0]) + len(sides[f"{name}/judged"][0])
            few = (
                "" if not math.isnan(found.value) else f"not defined: under {_MINIMUM} pairs a side"
            )
            values[f"completeness/{name}"] = with_interval(found, "to_reference", reference, n, few)
        return values


def _sides(trial: Trial) -> dict[str, Pairs]:
    """Return the pairs the oracles learn from and judge, the same for every model."""
    splits = trial.splits
    rng = np.random.default_rng(derive(trial.seed, "completeness"))
    retain, forget, holdout, test = (
        pairs_of(splits.get(name)) for name in ("retain", "forget", "holdout", "test")
    )
    parts = [splits.train, splits.test, splits.holdout, splits.val or splits.test]
    items = interactions(splits.train).items
    seen = joined([interactions(part) for part in parts], items)
    half = rng.permutation(len(holdout[0]))[: len(holdout[0]) // 2]
    judged = (holdout[0][half], holdout[1][half])
    left = np.unique(np.concatenate([test[0] * items + test[1], holdout[0] * items + holdout[1]]))
    left = left[~np.isin(left, judged[0] * items + judged[1])]
    users = recommender(trial.view).graph.users
    random = non_edges(seen, users, 2 * ORACLE_PAIRS, trial.seed)
    middle = len(random[0]) // 2
    return {
        "retain": _some(retain, rng),
        "forget": _some(forget, rng),
        "auc/learned": _some((left // items, left % items), rng),
        "auc/judged": _some(judged, rng),
        "auc_random/learned": (random[0][:middle], random[1][:middle]),
        "auc_random/judged": (random[0][middle:], random[1][middle:]),
    }


def _some(pairs: Pairs, rng: np.random.Generator) -> Pairs:
    rows = rng.permutation(len(pairs[0]))[:ORACLE_PAIRS]
    return pairs[0][rows], pairs[1][rows]


def _oracle(view: ModelView, trial: Trial, sides: Mapping[str, Pairs]) -> dict[str, Interval]:
    """Return the AUC of each oracle on forgotten pairs against its own unseen ones."""
    model = recommender(view)
    table, users = model.final(), model.graph.users
    spread = moments(table, users, pairs_of(trial.splits.retain))

    def features(pairs: Pairs) -> Floats:
        scores = pair_scores(table, users, pairs)
        return np.stack([scores, spread.by_user(scores, pairs), spread.by_item(scores, pairs)], 1)

    found = {name: features(pairs) for name, pairs in sides.items()}
    intervals = {}
    for name in ("auc", "auc_random"):
        learned, judged = found[f"{name}/learned"], found[f"{name}/judged"]
        if min(len(x) for x in (found["retain"], found["forget"], learned, judged)) < _MINIMUM:
            intervals[name] = Interval(math.nan, math.nan, math.nan)
            continue
        oracle = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced"))
        label = np.repeat([1, 0], [len(found["retain"]), len(learned)])
        oracle.fit(np.concatenate([found["retain"], learned]), label)
        members, others = (oracle.decision_function(x) for x in (found["forget"], judged))
        seed = derive(trial.seed, "completeness", name)
        intervals[name] = Ranking.of(members, others).intervals((), seed, _RESAMPLES)["auc"]
    return intervals
