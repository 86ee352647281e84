import math

import numpy as np
import pytest

from mmforget.errors import ConfigError
from mmforget.recsys.partition import (
    assign,
    balanced_kmeans,
    by_interactions,
    capacity,
    first_centroids,
    hashed,
)


def greedy(distance, room):
    """The walk over all sorted (element, shard) pairs, as the reference describes it."""
    count, elements = distance.shape
    pairs = [(distance[m, e], e, m) for e in range(elements) for m in range(count)]
    labels, sizes = [-1] * elements, [0] * count
    for _, element, shard in sorted(pairs, key=lambda pair: pair[0]):
        if labels[element] < 0 and sizes[shard] < room:
            labels[element] = shard
            sizes[shard] += 1
    return labels


@pytest.mark.parametrize("seed", range(150))
def test_assign_is_the_greedy_walk(seed):
    rng = np.random.default_rng(seed)
    count, elements = int(rng.integers(1, 7)), int(rng.integers(1, 60))
    room = capacity(elements, count, float(rng.choice([1.0, 1.2, 1.5, count])))
    levels = int(rng.choice([1, 2, 4, 1000000]))  # few levels: nearly everything is tied
    distance = rng.integers(levels, size=(count, elements)) / 7.0
    assert assign(distance, room).tolist() == greedy(distance, room)


def test_one_shard_that_everyone_wants_takes_the_nearest_and_then_the_first_of_equals():
    distance = np.array([[3.0, 1.0, 1.0, 1.0, 0.0], [9.0, 9.0, 9.0, 9.0, 9.0]])
    assert assign(distance, 3).tolist() == [1, 0, 0, 1, 0]


def test_assign_refuses_too_little_room():
    with pytest.raises(ConfigError, match="cannot hold 7"):
        assign(np.zeros((2, 7)), 3)


@pytest.mark.parametrize("n, k", [(10, 5), (6040, 10), (7, 3), (12, 4)])
def test_capacity_is_where_a_shard_stops_accepting(n, k):
    size = 0
    while size < 1.2 * n / k:
        size += 1
    assert capacity(n, k) == size
    assert capacity(n, k, 1.0) == math.ceil(n / k)


def test_published_shards_fill_to_725_users():
    assert capacity(6040, 10) == 725


def slow_kmeans(x, centroids, rounds, room, sign, scalar):
    for _ in range(rounds):
        distance = np.array([((x - c) ** 2).sum(1) for c in centroids])
        labels = np.array(greedy(sign * distance, room))
        inertia = sum(distance[m, e] for e, m in enumerate(labels))
        axis = None if scalar else 0
        centroids = [x[labels == m].mean(axis) for m in range(len(centroids))]
    return labels.tolist(), inertia


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("slack", [1.0, 1.2])
def test_balanced_kmeans_is_the_slow_one(reference, scalar, slack):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(41, 3))
    start = np.array([2, 11, 17, 30])
    for rounds in (1, 2, 3, 25):
        found = balanced_kmeans(x, start, rounds, slack, reference, scalar)
        room = math.ceil(slack * 41 / 4)
        labels, inertia = slow_kmeans(x, x[start], rounds, room, -1 if reference else 1, scalar)
        assert found.labels.tolist() == labels
        assert found.inertia == pytest.approx(inertia, rel=1e-10)
        assert np.bincount(found.labels).max() <= room


def test_separated_clusters_are_found_and_nothing_moves_any_more():
    rng = np.random.default_rng(0)
    centres = np.array([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]])
    x = np.repeat(centres, 20, axis=0) + rng.normal(size=(60, 2))
    found = balanced_kmeans(x, np.array([0, 20, 40]), rounds=50)
    assert found.labels.tolist() == [0] * 20 + [1] * 20 + [2] * 20
    assert len(found.moves) == 2 and found.moves[-1] == 0.0
    means = x.reshape(3, 20, 2).mean(1)
    within = ((x.reshape(3, 20, 2) - means[:, None]) ** 2).sum()
    assert found.inertia == pytest.approx(within)


def test_farthest_first_is_worse_than_nearest_first():
    x = np.random.default_rng(1).normal(size=(200, 4))
    start = first_centroids(0, 200, 5)
    ours, theirs = (balanced_kmeans(x, start, 30, reference=flag) for flag in (False, True))
    assert ours.inertia < 0.8 * theirs.inertia
    assert set(np.bincount(ours.labels)) == {40} == set(np.bincount(theirs.labels))


def slow_inbp(user, item, users, items, start, rounds, room, scalar):
    cu, ci = list(users[user[start]]), list(items[item[start]])
    for _ in range(rounds):
        distance = np.array(
            [
                ((users[user] - p) ** 2).sum(1) * ((items[item] - q) ** 2).sum(1)
                for p, q in zip(cu, ci, strict=True)
            ]
        )
        labels = np.array(greedy(distance, room))
        axis = None if scalar else 0
        cu = [users[user[labels == m]].mean(axis) for m in range(len(start))]
        ci = [items[item[labels == m]].mean(axis) for m in range(len(start))]
    return labels.tolist()


@pytest.mark.parametrize("reference", [False, True])
def test_inbp_is_the_slow_one(reference):
    rng = np.random.default_rng(7)
    user, item = np.nonzero(rng.random((14, 17)) < 0.4)
    users, items = rng.normal(size=(14, 5)), rng.normal(size=(17, 5))
    start = first_centroids(3, len(user), 4)
    room = capacity(len(user), 4)
    for rounds in (1, 2, 6):
        found = by_interactions(user, item, users, items, start, rounds, reference=reference)
        wanted = slow_inbp(user, item, users, items, start, rounds, room, reference)
        assert found.labels.tolist() == wanted
        assert np.bincount(found.labels, minlength=4).max() <= room


def test_early_stop_changes_nothing():
    rng = np.random.default_rng(2)
    user, item = np.nonzero(rng.random((30, 40)) < 0.3)
    users, items = rng.normal(size=(30, 4)), rng.normal(size=(40, 4))
    start = first_centroids(0, len(user), 3)
    found = by_interactions(user, item, users, items, start, 200)
    stopped = len(found.moves)
    assert stopped < 200
    wanted = slow_inbp(user, item, users, items, start, stopped + 5, capacity(len(user), 3), False)
    assert found.labels.tolist() == wanted


def test_a_cluster_without_elements_stays_where_it_is():
    x = np.zeros((6, 2))  # equal vectors: with a slack of k the first centroid takes all
    found = balanced_kmeans(x, np.array([0, 1, 2]), rounds=5, slack=3.0)
    assert found.labels.tolist() == [0] * 6 and found.inertia == 0.0
    pairs = np.zeros(6, np.int64)
    found = by_interactions(pairs, pairs, x, x, np.array([0, 1, 2]), rounds=5, slack=3.0)
    assert found.labels.tolist() == [0] * 6 and np.isfinite(found.moves).all()


def test_hashed_labels_depend_on_ids_and_seed_alone():
    rng = np.random.default_rng(0)
    user, item = rng.integers(1000, size=5000), rng.integers(3000, size=5000)
    labels = hashed(7, 10, user, item)
    some = rng.permutation(5000)[:1234]
    assert (hashed(7, 10, user[some], item[some]) == labels[some]).all()
    assert (hashed(8, 10, user, item) != labels).mean() > 0.8
    assert (hashed(7, 10, item, user) != labels).mean() > 0.8  # columns are not interchangeable
    per_user = hashed(7, 10, user)
    assert all(len(np.unique(per_user[user == u])) == 1 for u in range(20))


@pytest.mark.parametrize("count", [2, 3, 7, 10])
def test_hashed_shards_are_even_and_independent_of_ids(count):
    user, item = (column.ravel() for column in np.mgrid[:400, :250])
    labels = hashed(0, count, user, item)
    assert labels.min() == 0 and labels.max() == count - 1
    expected = len(user) / count
    sizes = np.bincount(labels, minlength=count)
    chi2 = ((sizes - expected) ** 2 / expected).sum()
    assert chi2 < count - 1 + 5 * math.sqrt(2 * (count - 1))
    table = np.zeros((400, count))
    np.add.at(table, (user, labels), 1)
    chi2 = ((table - 250 / count) ** 2 / (250 / count)).sum()
    freedom = 400 * (count - 1)
    assert abs(chi2 - freedom) < 6 * math.sqrt(2 * freedom)


def test_first_centroids_are_distinct_seeded_elements():
    found = first_centroids(3, 100, 10)
    assert len(set(found.tolist())) == 10 and found.min() >= 0 and found.max() < 100
    assert (first_centroids(3, 100, 10) == found).all()
    assert (first_centroids(4, 100, 10) != found).any()
    with pytest.raises(ConfigError, match=r"method\.shards"):
        first_centroids(0, 3, 4)
