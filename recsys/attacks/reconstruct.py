"""Reconstruction: read the forgotten pairs back out of the unlearned weights."""

import time
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmforget.metrics.common import both, with_interval
from mmforget.metrics.ranking import thin
from mmforget.options import option
from mmforget.record import AttackResult, MetricValue
from mmforget.recsys.backbones.base import Recommender
from mmforget.recsys.data import Ids, joined
from mmforget.recsys.metrics.pairs import PAIRS, Pairs, interactions, pairs_of, recommender
from mmforget.recsys.metrics.ranking import share_interval
from mmforget.recsys.ranking import Floats, Ints, standing
from mmforget.rng import derive
from mmforget.types import Attack, Budget, ModelView, Trial


@dataclass(frozen=True)
class ReconstructConfig:
    """Whom the attack is run on."""

    users: int = option(
        2000, "users with forgotten pairs that are attacked; drawn at random", low=1
    )


class Reconstruct(Attack[ReconstructConfig]):
    """Rank, for every user with forgotten pairs, all items that are not retained.

    The attacker holds the unlearned weights and the retained graph, and scores items by

    - `final`: the model's own scores;
    - `layer0`: inner products of the free tables, before anything is propagated; left out where
      the model has none or they are the final vectors;
    - `neighbours`: the mean cosine of an item's final vector to those of the user's retained
      items: an item that was trained together with them stays near. 0 for all without such items.

    Values per signal, mean over users with normal 95 % intervals, ties by half:

    - `auc`: a forgotten item against an item that is no training pair of the user, in [0, 1].
    - `mrr`: 1 / place of the best forgotten item.
    - `hit`: share of forgotten items among the first |forgotten| places.

    Direction: closer to the retrained model. The curve is the mean over pairs.

    Pitfalls: a retrained model has an AUC well above 0.5, as forgotten pairs fit their users'
    tastes; only what is above it was read from the weights, and what is below it is a trace too.
    Layers that only the weights hold (encoders of item features) are not searched.
    """

    access: ClassVar[str] = "white"
    citation: ClassVar[str] = (
        "after He et al., Stealing Links from Graph Neural Networks, arXiv 2005.02131"
    )
    config_type: ClassVar[type] = ReconstructConfig

    def budget(self) -> Budget:
        """No steps and no shadow models: the weights are read."""
        return Budget(steps=0, models=0)

    def run(self, trial: Trial, budget: Budget) -> AttackResult:
        """Attack the model under test, and the retrained one for reference."""
        start = time.monotonic()
        user, item = pairs_of(trial.splits.forget)
        rng = np.random.default_rng(derive(trial.seed, "reconstruct"))
        chosen = rng.permutation(np.unique(user))[: self.config.users]
        rows = np.isin(user, chosen)
        pairs = (user[rows], item[rows])
        found, theirs = both(trial, lambda view: _attack(view, trial, pairs))
        values: dict[str, MetricValue] = {}
        curves = {}
        for signal, own in found.items():
            reference = None if theirs is None else theirs.get(signal)
            for name in ("auc", "mrr", "hit"):
                same = None if reference is None else float(getattr(reference, name).mean())
                values[f"{signal}/{name}"] = with_interval(
                    share_interval(getattr(own, name)), "to_reference", same, len(chosen)
                )
            curves[f"roc/{signal}"] = _curve(own.above)
        return AttackResult(
            access=self.access,
            values=values,
            queries=len(pairs[0]),
            seconds=time.monotonic() - start,
            curves=curves,
            targets={
                "forget_ids": np.array(list(Ids(*pairs))),
                **{f"forget_{signal}": 1 - own.above for signal, own in found.items()},
            },
        )


class Recovered(NamedTuple):
    """What a signal brings back.

    Attributes:
        above: Share of the user's non-edges that score above each forgotten pair, [P].
        auc: Of each user, [n].
        mrr: Of each user, [n].
        hit: Of each user, [n].
    """

    above: Floats
    auc: Floats
    mrr: Floats
    hit: Floats


def recover(user: Ints, above: Floats, others: Ints) -> Recovered:
    """Return how well a ranking brings the forgotten pairs of each user back.

    Args:
        user: User of each forgotten pair, [P].
        above: Items of the user, neither retained nor forgotten, that score higher, ties by half.
        others: Such items in all, [P].
    """
    share = np.where(others > 0, above / np.maximum(others, 1), 0.5)
    order = np.lexsort((above, user))
    _, first, group, count = np.unique(
        user[order], return_index=True, return_inverse=True, return_counts=True
    )
    # The j-th best forgotten item has j - 1 forgotten ones before it, and `above` others.
    place = above[order] + np.arange(len(order)) - first[group] + 1
    within = np.bincount(group, place <= count[group])
    return Recovered(
        above=share,
        auc=1 - np.bincount(group, share[order]) / count,
        mrr=1 / place[first],
        hit=within / count,
    )


def _attack(view: ModelView, trial: Trial, pairs: Pairs) -> dict[str, Recovered]:
    model = recommender(view)
    retain, train = interactions(trial.splits.retain), interactions(trial.splits.train)
    edges = joined([train], train.items)
    found = {}
    for name, table in _tables(model, (retain.user, retain.item)).items():
        stands = standing(table, model.graph.users, *pairs, edges)
        found[name] = recover(pairs[0], stands.above + stands.equal / 2, stands.others)
    return found


def _tables(model: Recommender, retained: Pairs) -> dict[str, Tensor]:
    """Return, by signal, vectors whose inner products are its scores."""
    final, users = model.final(), model.graph.users
    found = {"final": final}
    named = dict(model.named_parameters())
    tables = [named[name].detach() for name in ("users", "items") if name in named]
    if [len(table) for table in tables] == [users, model.graph.items]:
        free = torch.cat(tables) if tables[0].shape[1] == tables[1].shape[1] else final
        if not torch.equal(free, final):
            found["layer0"] = free
    items = F.normalize(final[users:])
    user, item = (torch.from_numpy(column).to(final.device) for column in retained)
    near = torch.zeros(users, items.shape[1], dtype=items.dtype, device=items.device)
    for at in range(0, len(user), PAIRS):
        near.index_add_(0, user[at : at + PAIRS], items[item[at : at + PAIRS]])
    count = torch.bincount(user, minlength=users).clamp(min=1)
    found["neighbours"] = torch.cat([near / count[:, None], items])
    return found


def _curve(above: Floats) -> dict[str, Any]:
    """Return the ROC curve, the mean over forgotten pairs, as a series to draw."""
    fpr, count = np.unique(np.concatenate([[0.0], above, [1.0]]), return_counts=True)
    reached = np.cumsum(count) - 1  # the added 0 is no pair
    reached[-1] -= 1  # nor is the added 1
    x, y = thin(np.concatenate([[0.0], fpr]), np.concatenate([[0.0], reached / len(above)]))
    return {
        "x": x,
        "y": y,
        "x_label": "false-positive rate",
        "y_label": "true-positive rate",
        "x_scale": "log",
        "y_scale": "log",
    }
