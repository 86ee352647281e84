"""Ranking of all items against a plain sort, user by user, and the measures in closed form."""

import math
import time

import numpy as np
import pytest
import torch

from mmforget.errors import CollapsedError, ConfigError
from mmforget.recsys.data import Interactions, Known
from mmforget.recsys.ranking import MEASURES, Ranked, rank, standing, top_items

USERS, ITEMS, DIM = 37, 53, 5


def pairs(rng, n, users=USERS, items=ITEMS):
    keys = rng.choice(users * items, n, replace=False)
    return Interactions(keys // items, keys % items, items)


def world(seed, ties=False):
    rng = np.random.default_rng(seed)
    table = torch.from_numpy(rng.normal(size=(USERS + ITEMS, DIM)))
    if ties:
        table = table.round()  # whole numbers: many equal scores, none of them rounded
    both = pairs(rng, 500)
    train, test = both.select(range(380)), both.select(range(380, 500))
    return table, train, test


def brute_order(table, user, masked, candidates=None):
    """Return one user's items, best first, ties by id, masked ones left out."""
    scores = (table[:USERS] @ table[USERS:].T).numpy()[user]
    hidden = set(masked.item[masked.user == user].tolist()) if masked is not None else set()
    if candidates is not None:
        hidden |= set(np.flatnonzero(~candidates).tolist())
    return sorted(set(range(ITEMS)) - hidden, key=lambda i: (-scores[i], i))


def brute_measures(order, truth, k):
    """Return the measures of one user, by their definitions, in plain Python."""
    top = order[:k]
    places = [place for place, item in enumerate(top, 1) if item in truth]
    gain = sum(1 / math.log2(place + 1) for place in places)

    def ideal(n):
        return sum(1 / math.log2(place + 1) for place in range(1, n + 1))

    capped = min(k, len(truth))
    precisions = sum((n + 1) / place for n, place in enumerate(places))
    return {
        "recall": len(places) / len(truth),
        "precision": len(places) / k,
        "hit": float(bool(places)),
        "mrr": 1 / places[0] if places else 0.0,
        "ndcg": gain / ideal(capped),
        "ndcg_all": gain / ideal(len(truth)),
        "map": precisions / capped,
        "map_all": precisions / len(truth),
        "recall_capped": len(places) / capped,
    }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("chunk", [2**26, 3 * ITEMS * 8])  # all users at once, three at a time
def test_ranking_equals_a_sort_of_each_user(seed, ties, chunk):
    table, train, test = world(seed, ties)
    ks = (1, 3, 10, 60)  # 60: more places than items
    found = rank(table, USERS, test, train.known, ks, chunk_bytes=chunk)
    top = top_items(table, USERS, torch.arange(USERS), train.known, 10, chunk_bytes=chunk)
    assert found.user.tolist() == sorted(set(test.user.tolist()))
    for row, user in enumerate(found.user):
        order = brute_order(table, user, train)
        assert top[user].tolist() == order[:10]
        truth = set(test.item[test.user == user].tolist())
        assert found.relevant[row] == len(truth)
        for column, k in enumerate(ks):
            wanted = brute_measures(order, truth, k)
            assert wanted.keys() == set(MEASURES)
            for name, value in wanted.items():
                assert found.values(name)[row, column] == pytest.approx(value, abs=1e-12), name
    pooled = sum(len(set(brute_order(table, u, train)[:3]) & t) for u, t in truths(test).items())
    assert found.pooled_recall(3) == pytest.approx(pooled / len(test))
    assert (found.recall == found.values("recall")).all()
    assert found.mean("ndcg", 10) == pytest.approx(found.ndcg[:, 2].mean())


def truths(test):
    return {u: set(test.item[test.user == u].tolist()) for u in set(test.user.tolist())}


def test_candidates_limit_the_ranking_and_what_is_no_candidate_is_missed():
    table, train, test = world(3)
    candidates = np.arange(ITEMS) % 3 > 0
    found = rank(table, USERS, test, train.known, (7,), candidates)
    for row, user in enumerate(found.user):
        order = brute_order(table, user, train, candidates)[:7]
        truth = truths(test)[user]
        assert found.recall[row, 0] == len(truth & set(order)) / len(truth)
    some = top_items(table, USERS, torch.tensor([4]), None, 60, torch.from_numpy(candidates))
    assert some[0].tolist() == [*brute_order(table, 4, None, candidates), *[-1] * (60 - 35)]


def test_places_left_over_hit_nothing():
    # User 1 knows all but item 0; -1 in its ranking must not read as user 0's last item.
    table = torch.ones(2 + 3, 1)
    masked = Known(np.array([1, 1]), np.array([1, 2]), 3)
    truth = Interactions(np.array([0, 1]), np.array([2, 0]), 3)
    found = rank(table, 2, truth, masked, (1, 2, 3))
    assert found.hits.tolist() == [[False, False, True], [True, False, False]]
    assert top_items(table, 2, torch.arange(2), masked, 3).tolist() == [[0, 1, 2], [0, -1, -1]]


def test_ties_go_to_the_lower_item_also_at_the_last_place():
    scores = [[1.0, 2.0, 2.0, 1.0, 1.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]
    table = torch.cat([torch.eye(2), torch.tensor(scores).T])
    top = top_items(table, 2, torch.arange(2), None, 4)
    assert top.tolist() == [[5, 1, 2, 0], [0, 1, 2, 3]]


def test_a_masked_relevant_item_counts_as_missed():
    table, train, _ = world(0)
    found = rank(table, USERS, train, train.known, (ITEMS,))
    assert found.mean("recall", ITEMS) == 0.0
    assert rank(table, USERS, train, None, (ITEMS,)).mean("recall", ITEMS) == 1.0


def test_a_repeated_relevant_pair_counts_once():
    table, _, _ = world(0)
    best = int(brute_order(table, 5, None)[0])
    twice = Interactions(np.array([5, 5]), np.array([best, best]), ITEMS)
    assert rank(table, USERS, twice, None, (1,)).mean("recall", 1) == 1.0


def test_scores_are_not_squeezed():
    # A float32 sigmoid is 1 for both items; the raw scores are not equal.
    table = torch.tensor([[10.0], [3.0], [4.0]])
    assert top_items(table, 1, torch.tensor([0]), None, 2).tolist() == [[1, 0]]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("chunk", [2**26, 3 * ITEMS * 8])
def test_standing_counts_the_other_items(ties, chunk):
    table, train, test = world(1, ties)
    asked = Interactions(
        np.concatenate([test.user, train.user[:50]]),
        np.concatenate([test.item, train.item[:50]]),
        ITEMS,
    )
    for masked in (None, train):
        known = None if masked is None else masked.known
        found = standing(table, USERS, asked.user, asked.item, known, chunk)
        scores = (table[:USERS] @ table[USERS:].T).numpy()
        for n, (user, item) in enumerate(zip(asked.user, asked.item, strict=True)):
            others = set(brute_order(table, user, masked)) - {int(item)}
            rest = scores[user, sorted(others)]
            assert found.others[n] == len(others)
            assert found.above[n] == (rest > scores[user, item]).sum()
            assert found.equal[n] == (rest == scores[user, item]).sum()
            share = (found.above[n] + found.equal[n] / 2) / len(others)
            assert found.share_above[n] == pytest.approx(share)


def test_standing_among_no_others_is_a_half():
    table = torch.ones(1 + 2, 1)
    known = Known(np.array([0, 0]), np.array([0, 1]), 2)
    found = standing(table, 1, np.array([0]), np.array([0]), known)
    assert found.others.tolist() == [0]
    assert found.share_above.tolist() == [0.5]


def test_vectors_that_are_not_finite_are_no_ranking():
    table, train, test = world(0)
    table[3, 1] = torch.nan
    with pytest.raises(CollapsedError, match="not finite"):
        rank(table, USERS, test, train.known)
    with pytest.raises(CollapsedError, match="not finite"):
        standing(table, USERS, test.user, test.item, None)


def test_unknown_names_and_cut_offs_are_refused():
    found = Ranked(np.array([0]), np.array([1]), np.array([[True, False]]), (1, 2))
    with pytest.raises(ConfigError, match="Accepted: recall"):
        found.values("recal")
    with pytest.raises(ConfigError, match="there are: 1, 2"):
        found.mean("recall", 20)


def test_no_relevant_pairs_give_nan():
    table, train, test = world(0)
    found = rank(table, USERS, test.select([]), train.known, (5,))
    assert len(found) == 0
    assert math.isnan(found.mean("recall", 5))


def test_only_some_scores_are_held_at_a_time(monkeypatch):
    table, train, test = world(0)
    shapes = []
    real = torch.mm

    def watched(rows, items, out):
        shapes.append(len(out))
        return real(rows, items, out=out)

    monkeypatch.setattr(torch, "mm", watched)
    rank(table, USERS, test, train.known, (5,), chunk_bytes=4 * ITEMS * 8)
    assert max(shapes) == 4
    assert sum(shapes) == len(set(test.user.tolist()))


@pytest.mark.slow
def test_ten_times_as_fast_as_propagating_for_every_hundred_users():
    from mmforget.recsys.backbones.lightgcn import LightGCN
    from mmforget.recsys.graph import Graph

    rng = np.random.default_rng(0)
    users, items = 8000, 10000
    both = pairs(rng, 500_000, users, items)
    train = both.select(range(400_000))
    test = both.select(range(400_000, 500_000))
    order = np.lexsort((train.item, train.user))
    model = LightGCN(Graph(users, items, train.user[order], train.item[order]), dim=64)
    start = time.process_time()
    found = rank(model.final(), users, test, train.known)
    ours = time.process_time() - start

    # As gusye1234/LightGCN-PyTorch evaluates: three products with a COO matrix per 100 users.
    matrix = model.adjacency().to_sparse_coo()
    matrix = torch.sparse_coo_tensor(matrix.indices().long(), matrix.values(), matrix.shape)
    matrix = matrix.coalesce()
    start = time.process_time()
    positive = [[] for _ in range(users)]
    for u, i in zip(train.user.tolist(), train.item.tolist(), strict=True):
        positive[u].append(i)
    wanted = truths(test)
    batches = [found.user[first : first + 100] for first in range(0, 1000, 100)]
    with torch.no_grad():
        for who in batches:
            layers = [torch.cat([model.users, model.items])]
            for _ in range(3):
                layers.append(torch.sparse.mm(matrix, layers[-1]))
            table = torch.stack(layers, dim=1).mean(1)
            scores = torch.sigmoid(table[who] @ table[users:].T)
            for row, user in enumerate(who.tolist()):
                scores[row, positive[user]] = -1024
            for row, user in enumerate(who.tolist()):
                top = scores[row].topk(50)[1].tolist()
                [item in wanted[user] for item in top]
    theirs = (time.process_time() - start) * len(found) / 1000
    assert theirs / ours > 10, f"{theirs:.1f} s against {ours:.1f} s"
