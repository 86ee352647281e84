"""Scores of pairs, pairs nobody chose, and how a pair's score stands among its user's others."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmforget.errors import CollapsedError
from mmforget.recsys.backbones.base import Recommender
from mmforget.recsys.data import Interactions, Known
from mmforget.recsys.ranking import Floats, Ints
from mmforget.rng import derive
from mmforget.types import Dataset, ModelView

Pairs = tuple[Ints, Ints]

PAIRS = 2**18  # whose vectors are held at a time
_LISTED = 2**24  # pairs of a world that is small enough to list what is free in it


def recommender(view: ModelView) -> Recommender:
    """Return the model of a view."""
    assert isinstance(view.model, Recommender), "recommender metrics need a recommender"
    return view.model


def interactions(data: Dataset) -> Interactions:
    """Return a split as what the splits of recommenders are."""
    assert isinstance(data, Interactions), "recommender metrics need pairs of user and item"
    return data


def pairs_of(data: Dataset) -> Pairs:
    """Return user and item of a split's pairs, [n] each."""
    found = interactions(data)
    return found.user, found.item


def pair_scores(table: Tensor, users: int, pairs: Pairs) -> Floats:
    """Return the inner products of pairs, float64 [n].

    Args:
        table: Vectors, users first, [N, d].
        users: Number of users.
        pairs: User and item of each pair.

    Raises:
        CollapsedError: A score is not finite.
    """
    user, item = (torch.from_numpy(column).to(table.device) for column in pairs)
    parts = [
        (table[user[at : at + PAIRS]] * table[users + item[at : at + PAIRS]]).sum(1)
        for at in range(0, len(user), PAIRS)
    ]
    found = torch.cat(parts).double() if parts else torch.zeros(0, dtype=torch.float64)
    if not bool(torch.isfinite(found).all()):
        raise CollapsedError("the recommender's scores are not finite, so it ranks nothing")
    return found.cpu().numpy()


def view_scores(view: ModelView, pairs: Pairs) -> Floats:
    """Return a model's scores of pairs, float64 [n]; see `pair_scores`."""
    model = recommender(view)
    return pair_scores(model.final(), model.graph.users, pairs)


def non_edges(known: Known, users: int, count: int, seed: int) -> Pairs:
    """Return random pairs outside a set: uniform, no repeats, in random order.

    Args:
        known: The pairs that are never drawn.
        users: Number of users.
        count: How many; fewer are returned where there are no more.
        seed: Seed of the choice.
    """
    size = users * known.items
    rng = np.random.default_rng(derive(seed, "non_edges"))
    taken = known.keys.numpy()
    if size <= _LISTED:
        free = np.ones(size, np.bool_)
        free[taken] = False
        left = np.flatnonzero(free)
        keys = rng.permutation(left)[:count]
    else:
        # At most half of what is free, so that each round finds half of what it draws.
        count = min(count, (size - len(taken)) // 2)
        keys = np.empty(0, np.int64)
        while len(keys) < count:
            drawn = rng.integers(size, size=2 * (count - len(keys)) + 16)
            place = np.searchsorted(taken, drawn).clip(max=max(len(taken) - 1, 0))
            fresh = drawn[taken[place] != drawn] if len(taken) else drawn
            every = np.concatenate([keys, fresh])
            _, first = np.unique(every, return_index=True)
            keys = every[np.sort(first)]
        keys = keys[:count]
    return keys // known.items, keys % known.items


class Moments(NamedTuple):
    """Mean and standard deviation of scores over the pairs outside a set, float64.

    Attributes:
        user_mean: Over the items of each user, [U].
        user_std: [U].
        item_mean: Over the users of each item, [I].
        item_std: [I].
    """

    user_mean: Floats
    user_std: Floats
    item_mean: Floats
    item_std: Floats

    def by_user(self, scores: Floats, pairs: Pairs) -> Floats:
        """Return scores in standard deviations of their user's, [n]; 0 where these are equal."""
        user = pairs[0]
        return _standardised(scores, self.user_mean[user], self.user_std[user])

    def by_item(self, scores: Floats, pairs: Pairs) -> Floats:
        """Return scores in standard deviations of their item's, [n]; 0 where these are equal."""
        item = pairs[1]
        return _standardised(scores, self.item_mean[item], self.item_std[item])


def moments(table: Tensor, users: int, known: Pairs) -> Moments:
    """Return mean and spread of every user's and item's scores, exactly, without scoring all pairs.

    Sums over all pairs come from the sum and the second moment of the vectors, [d] and [d, d];
    those of the known pairs are taken away.

    Args:
        table: Final vectors, users first, [N, d].
        users: Number of users.
        known: Pairs that are left out: those that an attacker knows to be in the graph.

    Raises:
        CollapsedError: A score is not finite.
    """
    wide = table.detach().double()
    scores = torch.from_numpy(pair_scores(wide, users, known)).to(wide.device)
    sides = (wide[:users], wide[users:])
    found = []
    for own, other, nodes in (
        (*sides, known[0]),
        (*sides[::-1], known[1]),
    ):
        place = torch.from_numpy(nodes).to(wide.device)
        first = own @ other.sum(0)
        second = ((own @ (other.T @ other)) * own).sum(1)
        count = torch.full_like(first, len(other))
        count.index_add_(0, place, torch.ones_like(scores), alpha=-1)
        first.index_add_(0, place, scores, alpha=-1)
        second.index_add_(0, place, scores.square(), alpha=-1)
        left = count.clamp(min=1)
        mean = first / left
        # What rounding leaves of a difference of equal sums is no spread.
        spread = (second / left - mean.square()).clamp(min=0)
        spread[spread <= 1e-12 * (second / left).abs()] = 0
        found += [mean.cpu().numpy(), spread.sqrt().cpu().numpy()]
    return Moments(*found)


def _standardised(scores: Floats, mean: Floats, std: Floats) -> Floats:
    return np.where(std > 0, (scores - mean) / np.where(std > 0, std, 1.0), 0.0)
