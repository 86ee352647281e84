from dataclasses import replace

import numpy as np
import pytest
import torch

from mmforget.checkpoint import load_model, read_state, save_model
from mmforget.engine import Engine, Runtime
from mmforget.errors import ConfigError
from mmforget.options import faults
from mmforget.recsys.adapter import Pairs, RankingAdapter, outputs
from mmforget.recsys.backbones.base import Triples
from mmforget.recsys.backbones.lightgcn import LightGCN
from mmforget.recsys.backbones.mf import MatrixFactorisation
from mmforget.recsys.backbones.sharded import ShardedRecommender, shards_in
from mmforget.recsys.data import Interactions
from mmforget.recsys.graph import Graph
from mmforget.recsys.methods import receraser
from mmforget.recsys.methods.receraser import (
    Aggregated,
    Listed,
    RecEraser,
    RecEraserConfig,
    ShardAttention,
    tables_of,
)
from mmforget.recsys.methods.shards import below
from mmforget.recsys.methods.sisa import SISA, Shortened, SISAConfig
from mmforget.rng import Draws
from mmforget.types import Splits
from tests.recsys import world as worlds
from tests.recsys.world import ITEMS, RECIPE, USERS, World, make_world

QUICK = replace(RECIPE, epochs=2)
BACKBONES = {
    "mf": lambda graph: MatrixFactorisation(graph, dim=8),
    "lightgcn": lambda graph: LightGCN(graph, dim=8, layers=2),
}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(worlds, "RECIPE", QUICK)


@pytest.fixture
def longer(monkeypatch):
    monkeypatch.setattr(worlds, "RECIPE", replace(RECIPE, epochs=20))


def small_world(backbone="lightgcn", pairs=None, **options):
    """Return a world; `pairs` of its graph are forgotten instead of its own choice."""
    world = make_world(BACKBONES[backbone], **options)
    return world if pairs is None else forgetting(world, pairs)


def forgetting(world, gone):
    """Return the world with other pairs forgotten: indices of its training pairs."""
    train = world.splits.train
    left = np.setdiff1d(np.arange(len(train)), gone)
    splits = replace(world.splits, forget=train.select(gone), retain=train.select(left))
    return replace(world, splits=splits)


def of_pairs(world, user, item, gone):
    """Return a world of the same sizes and models, with other training pairs."""
    graph = Graph(USERS, ITEMS, user, item)
    train = Interactions(user, item, ITEMS, np.arange(len(user)))
    splits = Splits(
        forget=train, retain=train, train=train, holdout=world.splits.test, test=world.splits.test
    )
    return forgetting(World(splits, graph, world.adapter, world.engine, world.make), gone)


def without(world):
    """Return the world that never had the forgotten pairs, on the same graph."""
    return replace(world, splits=replace(world.splits, train=world.splits.retain))


def counted(world):
    """Count trainings: the number of pairs of each."""
    calls = []
    train = world.train

    def wrapped(model, data, seed, state=None):
        calls.append(len(data))
        return train(model, data, seed, state)

    world.train = wrapped
    return calls


def prepared(world, method, seed=0):
    method.prepared = method.prepare(world.preparing(world.build(0), seed))
    return method


def unlearned(world, method, seed=0):
    return method.run(world.context(world.build(0), method, seed))


def same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def auc(world, model):
    """Return the share of test pairs that score above a random negative."""
    test = world.splits.test
    draws = Draws(0, "test", total=len(test))
    data = world.adapter.prepare(test.take(range(len(test))), draws, train=False)
    with torch.no_grad():
        pred = world.adapter.forward(model, data).pred
    return float((pred[:, 0] > pred[:, 1]).float().mean())


# The sharded recommender.


def three_shards(graph):
    shards = []
    for m in range(3):
        torch.manual_seed(m)
        shard = LightGCN(graph, dim=4, layers=2)
        shard.keep((torch.arange(len(graph)) % 4 == m).nonzero()[:, 0])
        shards.append(shard)
    return shards


def test_scores_are_the_mean_of_the_shards_scores():
    graph = make_world().graph
    shards = three_shards(graph)
    made = ShardedRecommender(shards)
    user, item = torch.arange(60), torch.arange(60) + graph.users
    wanted = torch.stack([(s.final()[user] * s.final()[item]).sum(1) for s in shards]).mean(0)
    torch.testing.assert_close((made.final()[user] * made.final()[item]).sum(1), wanted)
    torch.testing.assert_close((made(user) * made(item)).sum(1), wanted)
    data = Pairs(user, item - graph.users, (item - graph.users).flip(0)[:, None])
    parts = [RankingAdapter().forward(shard, data).pred for shard in shards]
    pred = RankingAdapter().forward(made, data).pred
    torch.testing.assert_close(pred, torch.stack(parts).mean(0))


def test_edges_go_to_the_shards_and_kept_is_their_union():
    graph = make_world().graph
    shards = three_shards(graph)
    made = ShardedRecommender(shards)
    place = torch.arange(len(graph)) % 4
    assert torch.equal(made.kept, place < 3)
    before = made.final()
    made.drop(torch.tensor([0, 1, 3]))
    assert not made.kept[:2].any() and not any(s.kept[0] or s.kept[1] for s in shards)
    assert not torch.equal(made.final(), before)
    made.keep(torch.tensor([4, 5, 7]))
    assert made.kept.nonzero()[:, 0].tolist() == [4, 5, 7]
    # 4 belongs to shard 0, 5 to shard 1, and 7 to none: every shard gets it.
    found = [shard.kept.nonzero()[:, 0].tolist() for shard in shards]
    assert found == [[4, 7], [5, 7], [7]]


def test_a_change_of_one_shards_edges_is_seen():
    made = ShardedRecommender(three_shards(make_world().graph))
    before = made.final()
    made.members()[1].drop(torch.tensor([1]))
    assert not torch.equal(made.final(), before)


def test_auxiliary_is_the_mean_over_shards():
    graph = make_world().graph
    shards = three_shards(graph)
    made = ShardedRecommender(shards)
    user, item, negative = torch.arange(9), torch.arange(9), torch.arange(9)[:, None] + 20

    def extra(model):
        rows = (model(user), model(item + USERS), model(negative[:, 0] + USERS)[:, None])
        return model.auxiliary(Triples(user, item, negative, *rows, size=9))

    wanted = torch.stack([extra(shard)["l2"] for shard in shards]).mean()
    torch.testing.assert_close(extra(made)["l2"], wanted)
    extra(made)["l2"].backward()
    assert all(shard.users.grad is not None for shard in shards)


def test_auxiliary_gives_each_shard_its_own_rows():
    class Spy(MatrixFactorisation):
        def auxiliary(self, batch):
            torch.testing.assert_close(batch.user_row, self(batch.user))
            torch.testing.assert_close(
                batch.negative_row, self((batch.negative + USERS).reshape(-1)).view(5, 2, -1)
            )
            return {"seen": batch.user_row.square().sum()}

    graph = make_world().graph
    made = ShardedRecommender([Spy(graph, dim=3), Spy(graph, dim=3)])
    user, negative = torch.arange(5), torch.arange(10).view(5, 2)
    rows = made(user), made(user + USERS), made((negative + USERS).reshape(-1)).view(5, 2, -1)
    found = made.auxiliary(Triples(user, user, negative, *rows, size=5))["seen"]
    parts = [shard(user).square().sum() for shard in made.members()]
    torch.testing.assert_close(found, torch.stack(parts).mean())


def test_a_checkpoint_says_how_many_shards_and_is_read_back(tmp_path):
    graph = make_world().graph
    made = ShardedRecommender(three_shards(graph))
    save_model(made, tmp_path / "model.safetensors")
    state = read_state(tmp_path / "model.safetensors")
    assert shards_in(state) == 3
    assert shards_in(made.members()[0].state_dict()) == 0
    again = ShardedRecommender.like(LightGCN(graph, dim=4, layers=2), shards_in(state))
    load_model(again, tmp_path / "model.safetensors")
    same(dict(again.state_dict()), dict(made.state_dict()))
    assert torch.equal(again.final(), made.final())
    assert again.members()[0].graph is graph


# SISA.


@pytest.mark.parametrize(
    "backbone, by, slices",
    [
        ("mf", "interactions", 3),
        ("lightgcn", "interactions", 1),
        ("lightgcn", "users", 2),
        ("mf", "users", 1),
    ],
)
def test_sisa_forgets_exactly(quick, backbone, by, slices):
    world = small_world(backbone, forget=0.02)
    config = SISAConfig(shards=4, by=by, slices=slices)
    found = unlearned(world, prepared(world, SISA(config)))
    never = prepared(without(world), SISA(config))
    last = {
        f"shards.{m}.{name}": value
        for m in range(4)
        for name, value in below(never.prepared, f"shards.{m}.slices.{slices - 1}.").items()
    }
    state = {k: v for k, v in found.state_dict().items() if k != "kept"}
    same(state, last)
    gone = torch.from_numpy(world.splits.forget.edge)
    assert not found.kept[gone].any()
    assert int(found.kept.sum()) == len(world.splits.retain)


def test_sisa_shards_are_disjoint_and_whole(quick):
    world = small_world("mf")
    made = prepared(world, SISA(SISAConfig(shards=5))).prepared
    kept = torch.stack([made[f"shards.{m}.slices.0.kept"] for m in range(5)])
    assert (kept.sum(0) == 1).all()
    by_user = prepared(world, SISA(SISAConfig(shards=5, by="users"))).prepared
    user = world.graph.user
    held = [set(user[by_user[f"shards.{m}.slices.0.kept"]].tolist()) for m in range(5)]
    assert sum(len(users) for users in held) == len(set().union(*held)) == len(user.unique())


def test_sisa_trains_only_what_is_touched(quick):
    world = small_world("mf")
    method = prepared(world, SISA(SISAConfig(shards=6)))
    labels = method._places(world.splits.train, 0).shard
    world = forgetting(world, np.flatnonzero(labels == 2)[:3])
    calls = counted(world)
    found = unlearned(world, method)
    assert calls == [int((labels == 2).sum()) - 3]
    for m, shard in enumerate(found.members()):
        before = method.prepared[f"shards.{m}.slices.0.users"]
        assert torch.equal(shard.users, before) == (m != 2)


def test_sisa_goes_on_from_the_checkpoint_before_the_first_touched_slice(quick):
    world = small_world("mf")
    method = SISA(SISAConfig(shards=2, slices=4))
    calls = counted(world)
    prepared(world, method)
    places = method._places(world.splits.train, 0)
    assert len(calls) == 8
    # Each stage draws 2/5 of what it has seen, and all stages together as much as one recipe.
    assert sum(calls) == pytest.approx(len(world.splits.train), rel=0.1)
    gone = np.flatnonzero((places.shard == 1) & (places.slice == 2))[:1]
    world = forgetting(world, gone)
    calls = counted(world)
    unlearned(world, method)
    seen = [((places.shard == 1) & (places.slice <= stage)).sum() - 1 for stage in (2, 3)]
    assert calls == [round(0.4 * n) for n in seen]


def test_a_forgotten_pair_leaves_no_trace(quick):
    """The forgotten pair was another one: the result is the same."""
    base = small_world("lightgcn")
    user, item = base.splits.train.user, base.splits.train.item
    results = []
    for turn in (0, 1):
        row = int(np.flatnonzero(user == 7)[0])
        free = np.setdiff1d(np.arange(ITEMS), item[user == 7])[turn]
        others = np.arange(len(user)) != row
        pairs = np.concatenate([user[others], [7]]), np.concatenate([item[others], [free]])
        order = np.lexsort((pairs[1], pairs[0]))
        gone = np.flatnonzero(order == len(user) - 1)
        world = of_pairs(base, pairs[0][order], pairs[1][order], gone)
        for method in (
            SISA(SISAConfig(shards=4)),
            RecEraser(RecEraserConfig(shards=4, partition="random", aggregation_epochs=2)),
        ):
            results.append(unlearned(world, prepared(world, method)).final())
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


def test_sisa_learns_and_another_seed_gives_other_shards(longer):
    world = small_world("lightgcn")
    config = SISAConfig(shards=2)
    method = prepared(world, SISA(config))
    found = unlearned(world, method)
    assert auc(world, found) > 0.75
    other = SISA(config)._places(world.splits.train, 1).shard
    assert (other != SISA(config)._places(world.splits.train, 0).shard).any()


def test_a_shard_that_lost_all_its_pairs_is_left_untrained(quick):
    world = small_world("mf")
    method = prepared(world, SISA(SISAConfig(shards=15, by="users")))
    labels = method._places(world.splits.train, 0).shard
    world = forgetting(world, np.flatnonzero(labels == labels[0]))
    calls = counted(world)
    found = unlearned(world, method)
    shard = found.members()[labels[0]]
    assert calls == [] and not shard.kept.any()
    assert torch.isfinite(found.final()).all()


def test_a_killed_preparation_goes_on_with_the_next_shard(quick, tmp_path):
    world = small_world("mf")
    config = SISAConfig(shards=4)
    whole = prepared(world, SISA(config)).prepared
    train, calls = world.train, []

    def dying(model, data, seed, state=None):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(data))
        return train(model, data, seed, state)

    world.train = dying
    method = SISA(config)
    method.resume = tmp_path
    with pytest.raises(KeyboardInterrupt):
        prepared(world, method)
    world.train = train
    calls = counted(world)
    same(dict(prepared(world, method).prepared), dict(whole))
    assert len(calls) == 2


def test_shortened_draws_a_share_of_all_pairs():
    train = small_world("mf").splits.train
    short = Shortened(train, 0.25)
    assert len(short) == round(len(train) / 4) and (short.edge == train.edge).all()
    held = set(zip(train.user.tolist(), train.item.tolist(), strict=True))
    raw = short.sampled(False).take(range(100))
    data = [
        RankingAdapter().prepare(raw, Draws(0, step, total=100), train=True) for step in range(60)
    ]
    drawn = [pair for d in data for pair in zip(d.user.tolist(), d.item.tolist(), strict=True)]
    assert set(drawn) <= held and len(set(drawn)) > 0.97 * len(held)
    assert not any(bool(train.known.holds(d.user, d.negative[:, 0]).any()) for d in data)
    # Drawn by user, a user with few pairs comes as often as one with many.
    degree = np.bincount(train.user, minlength=USERS)
    raw = short.sampled(True).take(range(100))
    drawn_users = torch.cat(
        [RankingAdapter().prepare(raw, Draws(1, s, total=100), True).user for s in range(200)]
    )
    counts = np.bincount(drawn_users.numpy(), minlength=USERS)
    assert abs(np.corrcoef(counts[degree > 0], degree[degree > 0])[0, 1]) < 0.35


# RecEraser.

FAST = RecEraserConfig(shards=4, aggregation_epochs=2, rounds=10)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_receraser_with_hashed_shards_forgets_exactly(quick, backbone):
    world = small_world(backbone, forget=0.02)
    config = replace(FAST, partition="random")
    method = prepared(world, RecEraser(config))
    found = unlearned(world, method)
    assert type(found) is type(world.build(0))
    # Prepared without the forgotten pairs, no shard holds any: only the attention is trained.
    world = without(world)
    never = prepared(world, RecEraser(config))
    calls = counted(world)
    same(dict(found.state_dict()), dict(unlearned(world, never).state_dict()))
    assert calls == []


@pytest.mark.parametrize("partition", ["inbp", "ubp"])
def test_receraser_shards_are_exact_given_the_partition(quick, partition, monkeypatch):
    world = small_world("lightgcn", forget=0.005)
    config = replace(FAST, partition=partition)
    method = prepared(world, RecEraser(config))
    edge_shard = method.prepared["shard"].numpy()
    assert (edge_shard[world.splits.train.edge] >= 0).all()
    never = RecEraser(config)
    never._partition = lambda ctx, model, train: edge_shard[train.edge]
    prepared(without(world), never)
    made = remembered(monkeypatch)
    unlearned(world, method)
    assert torch.equal(made[0].users, never.prepared["users"])
    assert torch.equal(made[0].items, never.prepared["items"])


def remembered(monkeypatch):
    """Return a list that the aggregators made from now on are put into."""
    made, original = [], Aggregated.__init__

    def remember(self, *args):
        original(self, *args)
        made.append(self)

    monkeypatch.setattr(Aggregated, "__init__", remember)
    return made


def test_receraser_partitions_are_balanced_and_of_their_kind(quick):
    world = small_world("mf")
    original = world.train(world.build(0), world.splits.train, 0)
    user, n = world.graph.user.numpy(), len(world.splits.train)
    active = len(np.unique(user))
    seen = {}
    for config in (
        FAST,
        replace(FAST, partition="ubp"),
        replace(FAST, partition="random"),
        replace(FAST, reference=True),
        replace(FAST, slack=1.0),
    ):
        method = RecEraser(config)
        shard = method.prepare(world.preparing(original))["shard"].numpy()
        seen[config] = shard
        sizes = np.bincount(shard, minlength=4)
        if config.partition == "ubp":
            owner = np.full(USERS, -1)
            owner[user] = shard
            assert (owner[user] == shard).all()
            sizes = np.bincount(owner[owner >= 0], minlength=4)
            assert sizes.max() <= np.ceil(1.2 * active / 4)
        elif config.partition == "inbp":
            assert sizes.max() <= np.ceil(config.slack * n / 4)
    for a in seen:
        for b in seen:
            assert a == b or (seen[a] != seen[b]).any()


def test_vectors_choose_what_a_graph_backbone_is_partitioned_by(quick):
    world = small_world("lightgcn")
    original = world.train(world.build(0), world.splits.train, 0)
    found = [
        RecEraser(replace(FAST, vectors=name)).prepare(world.preparing(original))["shard"]
        for name in ("final", "free")
    ]
    assert (found[0] != found[1]).any()


def test_receraser_trains_only_touched_shards_and_returns_a_plain_model(quick):
    world = small_world("lightgcn")
    method = prepared(world, RecEraser(FAST))
    shard = method.prepared["shard"].numpy()
    world = forgetting(world, np.flatnonzero(shard == 1)[:4])
    calls = counted(world)
    before = {k: v.clone() for k, v in method.prepared.items()}
    found = unlearned(world, method)
    assert calls == [int((shard == 1).sum()) - 4]
    assert type(found) is LightGCN and found.users.shape == (USERS, 8)
    assert int(found.kept.sum()) == len(world.splits.retain)
    same(dict(method.prepared), before)  # another request can use them


@pytest.mark.parametrize("backbone", BACKBONES)
def test_what_is_written_scores_as_the_aggregator_did(quick, backbone, monkeypatch):
    world = small_world(backbone)
    made = remembered(monkeypatch)
    found = unlearned(world, prepared(world, RecEraser(FAST)))
    torch.testing.assert_close(found.final(), made[0].table().detach())
    nodes = torch.tensor([3, 3, USERS + 5, 0, USERS, USERS + 5])
    torch.testing.assert_close(made[0](nodes).detach(), found.final()[nodes])


def test_attention_against_a_plain_loop():
    torch.manual_seed(0)
    attention = ShardAttention(3, 4, 2, seed=1)
    with torch.no_grad():
        for weight in attention.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    shards = torch.randn(3, 5, 4)
    for side, own in (("users", attention.users), ("items", attention.items)):
        vectors, share = attention(shards, side)
        for node in range(5):
            t = [attention.transfer[m].T @ shards[m, node] + attention.shift[m] for m in range(3)]
            logit = [own.head @ torch.relu(own.weight.T @ v + own.bias) for v in t]
            a = torch.stack(logit).softmax(0)
            torch.testing.assert_close(share[node], a)
            torch.testing.assert_close(vectors[node], sum(a[m] * t[m] for m in range(3)))


def test_receraser_learns_and_so_does_its_attention(longer):
    world = small_world("lightgcn")
    method = RecEraser(replace(FAST, shards=2))
    method.prepared = method.prepare(
        world.preparing(world.train(world.build(0), world.splits.train, 0))
    )
    found = {}
    for epochs in (0, 8):
        method.config = replace(
            method.config, aggregation_epochs=epochs, aggregation_lr=0.01, keep=1.0
        )
        model = unlearned(world, method)
        found[epochs] = auc(world, model)
        assert method.prepared["users"].grad is None
    assert found[8] > max(0.75, found[0])


def test_every_option_of_the_aggregation_changes_the_result(quick):
    world = small_world("mf")
    method = prepared(world, RecEraser(FAST))
    world = forgetting(world, np.arange(1))
    base = unlearned(world, method).final().clone()
    for change in (
        {"keep": 1.0},
        {"transfer_l2": 0.1},
        {"aggregation_epochs": 3},
        {"aggregation_lr": 0.02},
        {"aggregation_batch_size": 64},
        {"attention_size": 3},
    ):
        method.config = replace(FAST, **change)
        assert not torch.allclose(unlearned(world, method).final(), base, atol=1e-7), change


def test_dropout_keeps_a_share_of_the_users_vectors_and_their_mean(quick, monkeypatch):
    world = small_world("mf")
    method = prepared(world, RecEraser(FAST))
    seen = {}
    for keep in (1.0, 0.7):
        rows = seen[keep] = []

        def spy(found, rows=rows):
            rows.append(found)
            return outputs(found)

        monkeypatch.setattr(receraser, "outputs", spy)
        method.config = replace(FAST, keep=keep)
        unlearned(world, method)
    whole, dropped = seen[1.0][0], seen[0.7][0]  # of the first step: the weights are the same
    left = dropped.user != 0
    assert float(left.float().mean()) == pytest.approx(0.7, abs=0.03)
    torch.testing.assert_close(dropped.user[left], whole.user[left] / 0.7)
    assert torch.equal(dropped.item, whole.item)


def test_shards_begin_with_weights_of_their_own(monkeypatch):
    monkeypatch.setattr(worlds, "RECIPE", replace(RECIPE, epochs=0))
    users = prepared(small_world("mf"), RecEraser(FAST)).prepared["users"]
    assert all(not torch.equal(users[a], users[b]) for a in range(4) for b in range(a))


def test_micro_batches_give_the_same_aggregation(quick):
    world = small_world("mf")
    method = prepared(world, RecEraser(FAST))
    results = []
    for accumulation in (1, 3):
        runtime = Runtime(device="cpu", threads=1, progress=False, accumulation=accumulation)
        split = replace(world, engine=Engine(runtime))
        split.train = world.train  # shards as before: what is compared is the aggregation
        results.append(unlearned(split, method).final())
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-5)


def test_negatives_of_a_shard_come_from_its_items():
    rng = np.random.default_rng(0)
    user, item = np.nonzero(rng.random((30, 40)) < 0.2)
    inside = np.flatnonzero(item % 3 == 0)
    listed = np.unique(item[inside])
    for rows, wanted in ((inside, "shard"), (np.arange(len(user)), "global")):
        known = Listed(user[rows], item[rows], 40, listed)
        assert bool(known.holds(torch.from_numpy(user[rows]), torch.from_numpy(item[rows])).all())
        asked = torch.arange(30).repeat(200)
        found = known.negatives(asked, Draws(0, wanted, total=6000), 2)
        assert found.shape == (6000, 2) and np.isin(found.numpy(), listed).all()
        assert not bool(known.holds(asked[:, None], found).any())
        for u in range(30):  # all that may be drawn is drawn
            free = np.setdiff1d(listed, item[rows][user[rows] == u])
            assert set(found[asked == u].reshape(-1).tolist()) == set(free.tolist())


def test_negatives_option_says_whose_pairs_count(quick):
    world = small_world("mf")
    seen = {}
    for name in ("shard", "global"):
        known = []
        train = world.train

        def spy(model, data, seed, state=None, known=known, train=train):
            known.append((data.known, data.item))
            return train(model, data, seed, state)

        world.train = spy
        prepared(world, RecEraser(replace(FAST, negatives=name)))
        world.train = train
        seen[name] = known
        assert all(isinstance(found, Listed) for found, _ in known)
    pairs = world.splits.train
    every = (torch.from_numpy(pairs.user), torch.from_numpy(pairs.item))
    assert all(bool(found.holds(*every).all()) for found, _ in seen["global"])
    held = sum(int(found.holds(*every).sum()) for found, _ in seen["shard"])
    assert held == len(pairs)  # each pair is known to its own shard only


def test_receraser_refuses_backbones_with_other_weights():
    class Gated(MatrixFactorisation):
        def __init__(self, graph):
            super().__init__(graph, 4)
            self.gate = torch.nn.Linear(4, 4)

    world = make_world(Gated)
    with pytest.raises(ConfigError, match=r"gate\.bias.*sisa"):
        prepared(world, RecEraser(FAST))
    users, _ = tables_of(MatrixFactorisation(world.graph, 4))
    assert users.shape == (USERS, 4)


def test_configs_refuse_what_cannot_be():
    assert faults(SISAConfig(shards=1)) and faults(SISAConfig(by="items"))
    assert faults(RecEraserConfig(partition="kmeans")) and faults(RecEraserConfig(slack=0.9))
    assert faults(RecEraserConfig(keep=0.0)) and not faults(RecEraserConfig())
