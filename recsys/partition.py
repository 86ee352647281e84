"""Partitions into shards: balanced by distance to centroids (users, pairs), or by a hash of ids.

Balanced means greedy: of all (element, shard) distances the smallest comes first, and an element
goes to the first shard met that has room. `assign` gives the same answer as that walk over n·k
sorted distances without sorting them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from mmforget.errors import ConfigError
from mmforget.rng import derive, generator

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint64]
T = TypeVar("T")

SLACK = 1.2  # of RecEraser: a shard takes elements while it holds fewer than 1.2·n/k
BLOCK = 65536  # vectors whose differences from a centroid are held at once


class Clusters(NamedTuple):
    """A balanced partition.

    Attributes:
        labels: Shard of each element, int64 [n].
        inertia: Sum of the elements' distances to the centroids by which they were assigned.
        moves: After each round that was run, how far the centroids moved: the sum over shards of
            the distance between the old and the new centroid (RecEraser's "loss").
    """

    labels: Ints
    inertia: float
    moves: list[float]


def hashed(seed: int, count: int, *ids: Ints) -> Ints:
    """Return a shard for each element that is a function of the seed and its own ids alone.

    So elements that go away move no other one: a model trained without them has the same shards.
    Sizes are those of independent draws, n/k ± about sqrt(n/k).

    Args:
        seed: The run's seed.
        count: Shards k.
        ids: Columns of ids, int64 [n] each; at least one.

    Returns:
        Labels in [0, k), int64 [n].
    """
    word: Words = np.full(len(ids[0]), derive(seed, "partition"), np.uint64)
    for column in ids:
        word = _mixed(word ^ _mixed(column.astype(np.uint64)))
    # The high half of the word, scaled: no bias that matters for k far below 2^32.
    return ((word >> np.uint64(32)) * np.uint64(count) >> np.uint64(32)).astype(np.int64)


def capacity(elements: int, count: int, slack: float = SLACK) -> int:
    """Return the largest size of a shard that takes elements while it holds < slack·n/k."""
    return math.ceil(slack * elements / count)


def assign(distance: Floats, room: int) -> Ints:
    """Return the greedy balanced assignment, exactly.

    The walk: all (element, shard) pairs by distance, nearest first, ties by element and then by
    shard; an element goes to the first shard met that holds fewer than `room`. Until a shard is
    full each element goes to its nearest one; so it is enough to find the moment at which the first
    shard fills, to send those who come later to their nearest open shard, and so on: k moments,
    each found by selection among the claimants of a shard. O(n·k), no sort.

    Args:
        distance: float64 [k, n], finite.
        room: Elements a shard takes; k·room must be at least n.

    Returns:
        Shard of each element, int64 [n].

    Raises:
        ConfigError: There is not room for all.
    """
    count, elements = distance.shape
    if count * room < elements:
        raise ConfigError(
            f"{count} shards of at most {room} cannot hold {elements} elements: the slack must be "
            f"at least 1"
        )
    shards = list(range(count))
    claim = np.zeros(elements, np.int64)
    best = np.empty(elements)
    _claim(distance, shards, np.arange(elements), claim, best)
    while shards:
        sizes = np.bincount(claim, minlength=count)
        moments = []
        for shard in shards:
            if sizes[shard] < room:
                continue
            rows = np.flatnonzero(claim == shard)
            values = best[rows]
            value = np.partition(values, room - 1)[room - 1]
            ties = rows[values == value]
            before = int(np.count_nonzero(values < value))
            moments.append((float(value), int(ties[room - before - 1]), shard))
        if not moments:
            return claim
        value, element, full = min(moments)
        shards.remove(full)
        late = best > value
        tied = np.flatnonzero(best == value)
        late[tied[tied > element]] = True
        rows = np.flatnonzero(late & (claim == full))
        if len(rows):
            _claim(distance, shards, rows, claim, best)
    return claim


def balanced_kmeans(
    x: Floats,
    start: Ints,
    rounds: int = 30,
    slack: float = 1.0,
    reference: bool = False,
    scalar: bool = False,
) -> Clusters:
    """Cluster vectors by squared distance into clusters of bounded size.

    CURE4Rec's balanced k-means has slack 1; RecEraser's partition of users (UBP) slack 1.2; a slack
    of k bounds nothing and gives plain k-means. Labels are those found before the centroids moved
    for the last time, as in both. Stops early once labels repeat, which changes nothing.

    Args:
        x: Vectors, float64 [n, d].
        start: Rows of `x` that are the first centroids, int64 [k].
        rounds: Rounds of assignment and move.
        slack: A cluster takes vectors while it holds fewer than slack·n/k.
        reference: Assign the farthest pairs first, as CURE4Rec's code does; it then rarely settles.
        scalar: A centroid moves to the mean of all *numbers* of its cluster, one scalar for all
            dimensions, as in RecEraser's code; otherwise to the mean vector.

    Returns:
        The clusters; the distance is |x - c|².
    """

    def distances(centroids: Floats) -> Floats:
        return _squared(x, centroids)

    def move(labels: Ints, old: Floats) -> tuple[Floats, float]:
        new = old.mean(1, keepdims=True) if scalar else old.copy()
        for cluster in np.unique(labels):  # an empty one stays where it is
            new[cluster] = x[labels == cluster].mean(axis=None if scalar else 0)
        return new, float(np.square(new - old).sum())

    room = capacity(len(x), len(start), slack)
    return _settle(distances, move, x[start], room, rounds, reference)


def by_interactions(
    user: Ints,
    item: Ints,
    users: Floats,
    items: Floats,
    start: Ints,
    rounds: int = 50,
    slack: float = SLACK,
    reference: bool = False,
) -> Clusters:
    """Return RecEraser's partition of pairs (InBP): distance |p_u - c_u|²·|q_i - c_i|².

    Args:
        user: User of each pair, int64 [n].
        item: Item of each pair, int64 [n].
        users: Vectors p, float64 [U, d].
        items: Vectors q, float64 [I, d].
        start: Pairs that are the first centroids, int64 [k].
        rounds: Rounds T; stops early once labels repeat, which changes nothing.
        slack: A shard takes pairs while it holds fewer than slack·n/k.
        reference: Centroids collapse to one scalar a side after the first round, as in the
            published code; otherwise they move to mean vectors.
    """
    pairs = len(user)

    def distances(centroids: tuple[Floats, Floats]) -> Floats:
        # Distances of users and of items are few; only their products are many.
        near_user, near_item = _squared(users, centroids[0]), _squared(items, centroids[1])
        found = np.empty((len(near_user), pairs))
        for row, p, q in zip(found, near_user, near_item, strict=True):
            np.multiply(p[user], q[item], out=row)
        return found

    def move(labels: Ints, old: tuple[Floats, Floats]) -> tuple[tuple[Floats, Floats], float]:
        new_users = _means(labels, user, users, old[0], reference)
        new_items = _means(labels, item, items, old[1], reference)
        moved = np.square(new_users - old[0]).sum(1) * np.square(new_items - old[1]).sum(1)
        return (new_users, new_items), float(moved.sum())

    first = (users[user[start]], items[item[start]])
    return _settle(distances, move, first, capacity(pairs, len(start), slack), rounds)


def first_centroids(seed: int, elements: int, count: int) -> Ints:
    """Return k distinct elements at random, int64 [k].

    Raises:
        ConfigError: There are fewer elements than shards.
    """
    if elements < count:
        raise ConfigError(
            f"{count} shards of {elements} elements: a shard needs at least one. Lower "
            f"method.shards"
        )
    order = torch.randperm(elements, generator=generator(seed, "centroids"))
    return np.sort(order[:count].numpy())


def _settle(
    distances: Callable[[T], Floats],
    move: Callable[[Ints, T], tuple[T, float]],
    centroids: T,
    room: int,
    rounds: int,
    farthest: bool = False,
) -> Clusters:
    """Assign and move in turn, until labels repeat or the rounds are over."""
    labels, inertia, moves = np.empty(0, np.int64), 0.0, []
    for _ in range(rounds):
        found = distances(centroids)
        new = assign(-found if farthest else found, room)
        inertia = float(np.take_along_axis(found, new[None], axis=0).sum())
        settled = np.array_equal(new, labels)
        labels = new
        centroids, moved = move(labels, centroids)
        moves.append(moved)
        if settled:  # centroids are a function of the labels: nothing would change any more
            break
    return Clusters(labels, inertia, moves)


def _claim(distance: Floats, shards: list[int], rows: Ints, claim: Ints, best: Floats) -> None:
    """Let these elements claim their nearest of some shards, the first of equally near ones."""
    whole = len(rows) == distance.shape[1]
    near = distance[shards[0]].copy() if whole else distance[shards[0], rows]
    which = np.full(len(rows), shards[0], np.int64)
    for shard in shards[1:]:
        other = distance[shard] if whole else distance[shard, rows]
        nearer = other < near
        np.copyto(near, other, where=nearer)
        which[nearer] = shard
    claim[rows], best[rows] = which, near


def _squared(x: Floats, centroids: Floats) -> Floats:
    """Return |x - c|², [k, n]; by differences, since ties and zeros must come out exact."""
    found = np.empty((len(centroids), len(x)))
    for row, centroid in zip(found, centroids, strict=True):
        for first in range(0, len(x), BLOCK):
            difference = x[first : first + BLOCK] - centroid
            np.einsum("nd,nd->n", difference, difference, out=row[first : first + BLOCK])
    return found


def _means(labels: Ints, node: Ints, vectors: Floats, old: Floats, scalar: bool) -> Floats:
    """Return the mean vector of each shard's pairs on one side (or one number, for `scalar`)."""
    count = len(old)
    tally = np.bincount(labels * len(vectors) + node, minlength=count * len(vectors))
    weights = tally.reshape(count, len(vectors)).astype(np.float64)
    sizes = weights.sum(1, keepdims=True)
    means = weights @ vectors / np.maximum(sizes, 1.0)
    if scalar:  # [k, 1], as wide as the published code's: its moves count one number from then on
        means, old = means.mean(1, keepdims=True), old.mean(1, keepdims=True)
    return np.where(sizes > 0, means, old)  # a shard without pairs stays where it is


def _mixed(word: Words) -> Words:
    """Return the finaliser of SplitMix64 (Steele et al., 2014): every bit moves every other."""
    word = word + np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))
