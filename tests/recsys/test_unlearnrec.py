import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmforget.errors import CollapsedError, ConfigError, SplitError
from mmforget.recsys.adversarial import implausible_edges, write_edges
from mmforget.recsys.backbones.base import Recommender
from mmforget.recsys.backbones.lightgcn import LightGCN
from mmforget.recsys.backbones.mf import MatrixFactorisation
from mmforget.recsys.data import Interactions, Known, joined
from mmforget.recsys.graph import Graph
from mmforget.recsys.influence_encoder import (
    InfluenceEncoder,
    InfluenceGraph,
    choice,
    contrast_loss,
)
from mmforget.recsys.methods import unlearnrec
from mmforget.recsys.methods.unlearnrec import (
    Simulated,
    UnlearnRec,
    UnlearnRecConfig,
    free_table,
    with_tables,
)
from mmforget.recsys.training import Ranking
from mmforget.training import fit
from mmforget.types import Training
from tests.recsys.world import ITEMS, USERS, World, make_world

RECIPE = Training(epochs=25, lr=0.04, optimizer="adam", batch_size=256)
QUICK = UnlearnRecConfig(epochs=12, batch_size=256, unlearn_weight=0.1, request_epochs=3)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


@pytest.fixture(scope="module")
def original(world: World) -> Recommender:
    return trained(world, world.splits.train, 0)


@pytest.fixture(scope="module")
def retrained(world: World) -> Recommender:
    return trained(world, world.splits.retain, 7)


@pytest.fixture(scope="module")
def prepared(world: World, original: Recommender) -> dict[str, Tensor]:
    return dict(UnlearnRec(QUICK).prepare(world.preparing(original)))


def trained(world: World, data: Any, seed: int) -> Recommender:
    model = world.build(seed)
    assert isinstance(model, Recommender)
    model.keep(torch.from_numpy(data.edge))
    fit(world.engine, model, world.adapter, data, RECIPE, seed, method=Ranking(RECIPE))
    return model


def unlearn(
    world: World,
    original: Recommender,
    prepared: dict[str, Tensor],
    config: UnlearnRecConfig = QUICK,
) -> Recommender:
    method = UnlearnRec(config)
    method.prepared = prepared
    made = method.run(world.context(original, method))
    assert isinstance(made, Recommender)
    return made


def mean_score(model: Recommender, data: Interactions) -> float:
    final = model.final()
    user, item = torch.from_numpy(data.user), torch.from_numpy(data.item)
    return float((final[user] * final[item + USERS]).sum(1).mean())


def recall(model: Recommender, data: Interactions) -> float:
    final = model.final()
    scores = final[:USERS] @ final[USERS:].T
    graph = model.graph
    scores[graph.user[model.kept], graph.item[model.kept]] = -torch.inf
    wanted = torch.zeros_like(scores)
    wanted[torch.from_numpy(data.user), torch.from_numpy(data.item)] = 1.0
    hits = wanted.gather(1, scores.topk(20).indices).sum(1)
    some = wanted.sum(1) > 0
    return float((hits[some] / wanted.sum(1)[some]).mean())


# ------------------------------------------------------------------------------------ the encoder


def small(seed: int = 0, users: int = 7, items: int = 9) -> tuple[Graph, Tensor]:
    rng = np.random.default_rng(seed)
    user, item = np.nonzero(rng.random((users, items)) < 0.5)
    graph = Graph(users, items, user, item)
    edges = torch.from_numpy(rng.permutation(len(graph))[: len(graph) // 3])
    return graph, edges


def dense(graph: Graph, edges: Tensor) -> Tensor:
    """The normalised adjacency of some edges alone, [N, N], in double precision."""
    matrix = torch.zeros(graph.nodes, graph.nodes, dtype=torch.float64)
    user, item = graph.user[edges], graph.item[edges] + graph.users
    matrix[user, item] = matrix[item, user] = 1.0
    degree = matrix.sum(1)
    scale = torch.where(degree > 0, degree.rsqrt(), torch.zeros_like(degree))
    return scale[:, None] * matrix * scale


def filled(encoder: InfluenceEncoder, seed: int = 0) -> InfluenceEncoder:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        encoder.h0.copy_(torch.randn(encoder.h0.shape, generator=rng))
        encoder.eta.copy_(torch.rand(encoder.eta.shape, generator=rng))
    return encoder


def test_influence_matrix_is_that_of_the_forgotten_edges_alone() -> None:
    graph, edges = small()
    influence = InfluenceGraph(graph, torch.cat([edges, edges[:2]]))  # repeats count once
    wanted = dense(graph, edges)
    touched = (wanted.sum(1) > 0).nonzero()[:, 0]
    assert influence.nodes.tolist() == touched.tolist()
    assert torch.allclose(influence.matrix.to_dense().double(), wanted[touched][:, touched])
    x = torch.randn(len(touched), 3)
    spread = torch.zeros(graph.nodes, 3)
    spread[touched] = x
    assert torch.equal(influence.rows(x, torch.arange(graph.nodes)), spread)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("form", ["release", "paper"])
def test_encoder_equals_its_dense_formula(form: str, layers: int) -> None:
    graph, edges = small()
    withdrawn, free = torch.randn(graph.nodes, 4), torch.randn(graph.nodes, 4)
    encoder = filled(InfluenceEncoder(withdrawn, layers=layers, form=form))
    matrix, h0 = dense(graph, edges), encoder.h0.detach().double()
    powers = [h0]
    for _ in range(layers):
        powers.append(matrix @ powers[-1])
    rate = 0.1 if form == "release" else 1.0
    gone = torch.linalg.matrix_power(matrix, layers) @ (rate * encoder.eta * withdrawn).double()
    change = (torch.stack(powers).sum(0) if form == "release" else powers[-1]) - gone
    wanted = free + torch.where(change < 0, 0.9801 * change, change)
    influence = InfluenceGraph(graph, edges)
    found = encoder(influence, free)
    assert torch.allclose(found.double(), wanted, atol=1e-5)
    by_hops = encoder.change_of(influence, encoder.hops(influence))
    assert torch.allclose(encoder.updated(free, by_hops), found, atol=1e-6)
    if form == "paper":
        untouched = matrix.sum(1) == 0
        assert untouched.any() and torch.equal(found[untouched], free[untouched])


@pytest.mark.parametrize("form", ["release", "paper"])
def test_encoder_without_forgotten_edges(form: str) -> None:
    graph, edges = small()
    free = torch.randn(graph.nodes, 4)
    encoder = filled(InfluenceEncoder(torch.randn(graph.nodes, 4), form=form))
    found = encoder(InfluenceGraph(graph, edges[:0]), free)
    h0 = encoder.h0.detach() if form == "release" else torch.zeros(graph.nodes, 4)
    assert torch.allclose(found, free + torch.where(h0 < 0, 0.9801 * h0, h0))


def test_an_mlp_with_weights_begins_as_the_one_without() -> None:
    graph, edges = small()
    withdrawn, free = torch.randn(graph.nodes, 4), torch.randn(graph.nodes, 4)
    plain = filled(InfluenceEncoder(withdrawn))
    trained_mlp = filled(InfluenceEncoder(withdrawn, train_mlp=True))
    influence = InfluenceGraph(graph, edges)
    assert torch.allclose(plain(influence, free), trained_mlp(influence, free), atol=1e-6)
    assert len(list(plain.parameters())) == 2 and len(list(trained_mlp.parameters())) == 6


def test_encoder_of_another_form_is_refused() -> None:
    with pytest.raises(ConfigError, match="release, paper"):
        InfluenceEncoder(torch.zeros(3, 2), form="other")


def test_contrast_equals_its_dense_formula_and_teaches_the_thinned_side_only() -> None:
    graph, edges = small()
    encoder = filled(InfluenceEncoder(torch.randn(graph.nodes, 4), layers=2))
    influence = InfluenceGraph(graph, edges)
    nodes = [torch.tensor([0, 1, 4, 6]), torch.tensor([7, 9, 15])]
    hops = encoder.hops(influence)
    own = encoder.h0[influence.nodes]
    torch.manual_seed(3)
    found = contrast_loss(influence, own, hops, nodes, rate=0.4)
    torch.manual_seed(3)  # the same edges are dropped once more
    thin = []
    for _ in range(2):
        small_matrix = influence.thinned(0.4).to_dense()
        assert torch.equal(small_matrix, small_matrix.T)
        full = torch.zeros(graph.nodes, graph.nodes)
        full[influence.nodes[:, None], influence.nodes] = small_matrix
        thin.append(full)
    whole = dense(graph, edges).float()
    before: Tensor = encoder.h0
    wanted = torch.zeros(())
    for matrix in thin:
        clean, moved = whole @ before, matrix @ before
        for group in nodes:
            a = F.normalize(clean[group].detach() + 1e-8, eps=1e-30)
            b = F.normalize(moved[group] + 1e-8, eps=1e-30)
            wanted = wanted + F.cross_entropy(a @ b.T, torch.arange(len(group)))
        before = clean
    assert torch.allclose(found, wanted, rtol=1e-5)
    (mine,) = torch.autograd.grad(found, encoder.h0)
    (theirs,) = torch.autograd.grad(wanted, encoder.h0)
    assert mine.abs().max() > 0 and torch.allclose(mine, theirs, atol=1e-5)


def test_thinning_drops_the_stated_share_of_edges() -> None:
    user, item = np.divmod(np.arange(4000), 80)
    graph = Graph(50, 80, user, item)
    influence = InfluenceGraph(graph, torch.arange(4000))
    torch.manual_seed(0)
    left = influence.thinned(0.05).values() > 0
    assert 0.93 < float(left.float().mean()) < 0.97
    assert torch.equal(influence.thinned(0.0).values(), influence.matrix.values())


@pytest.mark.parametrize("form", ["v2", "v3"])
def test_shares_survive_scores_that_overflow_the_published_exponential(form: str) -> None:
    user = (torch.eye(3) * 900.0).requires_grad_()
    item = torch.tensor([[1.0, -1, 0], [-1, 1, 0], [-1, -1, -1]])
    found = choice(user, item, 1.0, form)
    (gradient,) = torch.autograd.grad(found.sum(), user)
    assert torch.isfinite(found).all() and torch.isfinite(gradient).all()
    assert found[2].exp().item() < 1.1e-6  # nothing left but the constant


# ----------------------------------------------------------------------------- simulated requests


def test_simulated_requests_cover_the_training_pairs_and_change(
    world: World, original: Recommender
) -> None:
    train = world.splits.train
    assert isinstance(train, Interactions)
    simulated = Simulated(train, original, QUICK, seed=0)
    seen = []
    for simulated.epoch in (0, 2, 3, 6):
        number, edges, left = simulated.current()
        assert number == simulated.epoch // 3
        together = np.concatenate([edges.numpy(), left.edge])
        assert np.sort(together).tolist() == list(range(len(train)))
        assert len(edges) == round(0.1 * len(train)) and len(simulated) == len(left)
        # What a request names may come up as a negative; what is kept may not.
        user, item = torch.from_numpy(train.user), torch.from_numpy(train.item)
        gone = torch.zeros(len(train), dtype=torch.bool)
        gone[edges] = True
        assert torch.equal(left.known.holds(user, item), ~gone)
        seen.append(edges.tolist())
    assert seen[0] == seen[1] and len({tuple(edges) for edges in seen}) == 3


def test_an_epoch_stops_after_the_stated_steps(world: World, original: Recommender) -> None:
    train = world.splits.train
    assert isinstance(train, Interactions)
    config = replace(QUICK, max_steps_per_epoch=2, batch_size=50)
    simulated = Simulated(train, original, config, seed=0)
    assert len(simulated) == 100
    parts = []
    for simulated.epoch in (0, 1):
        left = set(simulated.current()[2].ids)
        ids = list(simulated.ids)
        assert len(set(ids)) == 100 and set(ids) <= left
        parts.append(ids)
    assert parts[0] != parts[1]


def test_edges_that_the_original_does_not_know_are_never_simulated(
    world: World, original: Recommender
) -> None:
    train = world.splits.train
    assert isinstance(train, Interactions)
    part = copy.deepcopy(original)
    part.drop(torch.arange(200))
    _, edges, left = Simulated(train, part, QUICK, seed=0).current()
    assert len(edges) + len(left) == len(train) - 200
    assert min(int(edges.min()), left.edge.min()) >= 200


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_drop_rate_of_nothing_or_all_is_refused(
    world: World, original: Recommender, rate: float
) -> None:
    method = UnlearnRec(replace(QUICK, drop_rate=rate))
    with pytest.raises(ConfigError, match="drop_rate"):
        method.prepare(world.preparing(original))


# --------------------------------------------------------------------------------------- preparing


def test_given_tables_act_like_the_models_own(world: World, original: Recommender) -> None:
    other = world.build(5)
    assert isinstance(other, Recommender)
    before = free_table(original)
    table = free_table(other).requires_grad_()
    found = with_tables(original, table, lambda model: model.table())
    assert torch.equal(found, other.table())
    (mine,) = torch.autograd.grad(found.square().sum(), table)
    tables = list(other.parameters())
    users, items = torch.autograd.grad(other.table().square().sum(), tables)
    assert torch.allclose(mine, torch.cat([users, items]))
    assert torch.equal(free_table(original), before)


def test_preparing_reads_train_only_and_leaves_the_original_as_it_was(
    world: World, original: Recommender, prepared: dict[str, Tensor]
) -> None:
    ctx = world.preparing(original)
    for name in ("forget", "retain", "test"):
        with pytest.raises(SplitError):
            ctx.split(name)
    assert set(prepared) == {"h0", "eta", "final"}
    assert torch.equal(prepared["final"], original.final())
    assert prepared["h0"].shape == (USERS + ITEMS, 16) and prepared["h0"].abs().max() > 0
    again = UnlearnRec(QUICK).prepare(ctx)
    assert all(torch.equal(again[name], prepared[name]) for name in prepared)
    after = dict(ctx.model.named_parameters())
    for name, weight in original.named_parameters():
        assert torch.equal(after[name], weight)


def test_no_epochs_give_the_initial_encoder(world: World, original: Recommender) -> None:
    made = UnlearnRec(replace(QUICK, epochs=0)).prepare(world.preparing(original))
    assert not made["h0"].any()
    assert torch.allclose(made["eta"], torch.tensor(0.002))


def test_pretraining_goes_on_after_a_kill(
    world: World, original: Recommender, prepared: dict[str, Tensor], tmp_path: Path
) -> None:
    eager = copy.deepcopy(world)
    eager.engine.runtime = replace(eager.engine.runtime, checkpoint_every_s=0.0, log_every=1)

    class Killed(Exception):
        pass

    def killed(self: Any, *args: Any) -> None:
        calls.append(1)
        if len(calls) == 30:  # in the eighth epoch of twelve, of the third simulated request
            raise Killed

    calls: list[int] = []
    method = UnlearnRec(QUICK)
    method.resume = tmp_path
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(unlearnrec.Pretraining, "after_backward", killed)
        method.prepare(eager.preparing(original))
    assert list(tmp_path.glob("state-*.safetensors"))

    left: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            unlearnrec.Pretraining, "after_backward", lambda self, ctx: left.append(ctx.step)
        )
        made = method.prepare(eager.preparing(original))
    assert left[0] == 29
    for name in prepared:
        assert torch.equal(made[name], prepared[name]), name


def test_the_epoch_of_the_widest_gap_is_kept(
    world: World, original: Recommender, prepared: dict[str, Tensor], monkeypatch: Any
) -> None:
    gaps: list[float] = []
    states: list[Tensor] = []
    measure, after = unlearnrec.Judge.gap, unlearnrec.Pretraining.after_epoch

    def gap(self: Any, final: Tensor) -> float:
        gaps.append(measure(self, final) if len(gaps) != 3 else 100.0)
        return gaps[-1]

    def after_epoch(self: Any, ctx: Any) -> None:
        after(self, ctx)
        states.append(ctx.model.h0.detach().clone())

    monkeypatch.setattr(unlearnrec.Judge, "gap", gap)
    monkeypatch.setattr(unlearnrec.Pretraining, "after_epoch", after_epoch)
    made = UnlearnRec(QUICK).prepare(world.preparing(original))
    assert len(gaps) == QUICK.epochs and torch.equal(made["h0"], states[3])
    last = UnlearnRec(replace(QUICK, choose="last")).prepare(world.preparing(original))
    assert torch.equal(last["h0"], states[QUICK.epochs - 1])


def test_an_encoder_that_ruins_recall_is_never_chosen(
    world: World, original: Recommender, monkeypatch: Any
) -> None:
    values = iter([1.0, 0.4, 0.3])
    monkeypatch.setattr(unlearnrec.Judge, "recall", lambda self, final: next(values))
    with pytest.raises(CollapsedError, match="recall"):
        UnlearnRec(replace(QUICK, epochs=2)).prepare(world.preparing(original))


def test_recall_of_the_judge_by_brute_force(world: World, original: Recommender) -> None:
    train = world.splits.train
    assert isinstance(train, Interactions)
    simulated = Simulated(train, original, QUICK, seed=0)
    judge = unlearnrec.Judge(original, simulated, seed=0)
    edges, kept = simulated.request("judged")
    final = judge.final(free_table(original))
    scores = final[:USERS] @ final[USERS:].T
    shares = []
    for user in judge.users.tolist():
        own = set(kept.item[kept.user == user].tolist())
        top = scores[user].topk(20).indices.tolist()
        shares.append(len(own & set(top)) / min(20, len(own)))
    assert judge.recall(final) == pytest.approx(np.mean(shares), abs=1e-6)
    gone = scores[world.graph.user[edges], world.graph.item[edges]].mean()
    strangers = scores[judge.random[0], judge.random[1]].mean()
    assert judge.gap(final) == pytest.approx(float(strangers - gone), abs=1e-5)
    assert not train.known.holds(*judge.random).any()


class Odd(MatrixFactorisation):
    """Final vectors wider than the free ones."""

    def table(self) -> Tensor:
        return torch.cat([super().table(), super().table()], dim=1)


class Bare(Recommender):
    """A backbone without free embeddings."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.weight = torch.nn.Parameter(torch.zeros(graph.nodes, 2))

    def table(self) -> Tensor:
        return self.weight


@pytest.mark.parametrize(("make", "said"), [(Odd, "one width"), (Bare, "lightgcn")])
def test_other_backbones_are_refused(world: World, make: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        UnlearnRec(QUICK).prepare(world.preparing(make(world.graph)))


# ----------------------------------------------------------------------------------------- request


def test_a_request_forgets_and_keeps_utility(
    world: World, original: Recommender, retrained: Recommender, prepared: dict[str, Tensor]
) -> None:
    forget, test = world.splits.forget, world.splits.test
    assert isinstance(forget, Interactions) and isinstance(test, Interactions)
    made = unlearn(world, original, prepared)
    kept_only = copy.deepcopy(original)
    kept_only.keep(torch.from_numpy(world.splits.retain.edge))  # type: ignore[attr-defined]
    before, dropped = mean_score(original, forget), mean_score(kept_only, forget)
    after, wanted = mean_score(made, forget), mean_score(retrained, forget)
    assert after < dropped < before
    assert abs(after - wanted) < abs(before - wanted)
    assert recall(made, test) > 0.9 * recall(retrained, test)
    assert not made.kept[torch.from_numpy(forget.edge)].any()


def test_a_request_is_the_encoder_written_into_the_tables(
    world: World, original: Recommender, prepared: dict[str, Tensor]
) -> None:
    forget = world.splits.forget
    assert isinstance(forget, Interactions)
    encoder = unlearnrec.make_encoder(QUICK, free_table(original), prepared["final"])
    encoder.load_state_dict({name: prepared[name] for name in ("h0", "eta")})
    influence = InfluenceGraph(world.graph, torch.from_numpy(forget.edge))
    wanted = encoder(influence, free_table(original))
    made = unlearn(world, original, prepared)
    assert torch.allclose(free_table(made), wanted, atol=1e-6)


def test_a_request_costs_the_encoders_products_and_none_with_the_whole_graph(
    world: World, original: Recommender, prepared: dict[str, Tensor], monkeypatch: Any
) -> None:
    method = UnlearnRec(QUICK)
    method.prepared = prepared
    ctx = world.context(original, method)
    calls: list[str] = []
    product, adjacency = InfluenceGraph.product, Recommender.adjacency

    def counted(self: InfluenceGraph, x: Tensor) -> Tensor:
        calls.append("influence")
        found: Tensor = product(self, x)
        return found

    def seen(self: Recommender) -> Tensor:
        calls.append("whole")
        return adjacency(self)

    monkeypatch.setattr(InfluenceGraph, "product", counted)
    monkeypatch.setattr(Recommender, "adjacency", seen)
    made = method.run(ctx)
    assert calls == ["influence"] * QUICK.layers
    assert isinstance(made, Recommender)
    made.final()
    assert calls == ["influence"] * QUICK.layers + ["whole"]
    assert set(ctx.trainable) == {"users", "items"}
    with pytest.raises(SplitError):
        ctx.split("retain")


def test_all_edges_of_users_can_be_forgotten(
    original: Recommender, prepared: dict[str, Tensor]
) -> None:
    world = make_world(whole_users=3)  # the same data, another request
    forget, test = world.splits.forget, world.splits.test
    assert isinstance(forget, Interactions) and isinstance(test, Interactions)
    made = unlearn(world, original, prepared)
    assert torch.isfinite(made.final()).all()
    gone = np.unique(forget.user)
    adjacency = made.adjacency().to_dense()
    assert not adjacency[gone].any() and len(gone) == 3
    assert mean_score(made, forget) < 0.5 * mean_score(original, forget)
    assert recall(made, test) > 0.8 * recall(original, test)


def test_edges_never_simulated_are_withdrawn_too(world: World, original: Recommender) -> None:
    train = world.splits.train
    assert isinstance(train, Interactions)
    config = replace(QUICK, epochs=1, drop_rate=0.01, batch_size=64)
    method = UnlearnRec(config)
    made = dict(method.prepare(world.preparing(original)))
    edges = Simulated(train, original, config, 0).current()[1]
    forget = world.splits.forget
    assert isinstance(forget, Interactions)
    strange = ~np.isin(forget.item, world.graph.item[edges].numpy())
    assert strange.any()
    after = unlearn(world, original, made, config)
    assert torch.isfinite(after.final()).all()
    part = forget.select(np.nonzero(strange)[0].tolist())
    assert mean_score(after, part) < mean_score(original, part)


def test_finetuning_moves_tables_but_not_the_encoder(
    world: World, original: Recommender, prepared: dict[str, Tensor]
) -> None:
    forget = world.splits.forget
    assert isinstance(forget, Interactions)
    config = replace(QUICK, finetune_epochs=3, finetune_lr=5e-3, finetune_unlearn_weight=2.0)
    assert UnlearnRec(config).reads == {"forget", "retain"}
    assert UnlearnRec(QUICK).reads == {"forget"}
    held = {name: value.clone() for name, value in prepared.items()}
    plain, tuned = unlearn(world, original, prepared), unlearn(world, original, prepared, config)
    assert mean_score(tuned, forget) < mean_score(plain, forget)
    assert all(torch.equal(prepared[name], held[name]) for name in held)
    still = unlearn(world, original, prepared, replace(config, finetune_lr=0.0))
    assert torch.allclose(free_table(still), free_table(plain), atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"form": "paper", "eta": 0.1},
        {"train_mlp": True, "align_form": "v3"},
        {"contrast_weight": 0.0, "align_weight": 0.0},
        {"unlearn_form": "v2", "mlp_layers": 0},
    ],
)
def test_other_forms_forget_too(
    world: World, original: Recommender, changes: dict[str, Any]
) -> None:
    forget = world.splits.forget
    assert isinstance(forget, Interactions)
    config = replace(QUICK, epochs=6, **changes)
    made = dict(UnlearnRec(config).prepare(world.preparing(original)))
    after = unlearn(world, original, made, config)
    assert mean_score(after, forget) < mean_score(original, forget)


def test_matrix_factorisation_forgets_too() -> None:
    world = make_world(lambda graph: MatrixFactorisation(graph, dim=16))
    original = trained(world, world.splits.train, 0)
    made = dict(UnlearnRec(QUICK).prepare(world.preparing(original)))
    after = unlearn(world, original, made)
    forget, retain = world.splits.forget, world.splits.retain
    assert isinstance(forget, Interactions) and isinstance(retain, Interactions)
    assert mean_score(after, forget) < 0.9 * mean_score(original, forget)
    lost = mean_score(original, retain) - mean_score(after, retain)
    assert lost < mean_score(original, forget) - mean_score(after, forget)


# ------------------------------------------------------------------------------- injected edges


def brute(table: Tensor, known: Known, users: int, items: int) -> set[tuple[int, int]]:
    free = [
        [(u, i) for i in range(items) if not known.holds(torch.tensor([u]), torch.tensor([i]))]
        for u in range(users)
    ]
    scores = (table[:users] @ table[users:].T).tolist()
    every = [pair for row in free for pair in row]
    pairs = {min(row, key=lambda p: scores[p[0]][p[1]]) for row in free if row}
    for item in range(items):
        column = [pair for pair in every if pair[1] == item]
        if column:
            pairs.add(min(column, key=lambda p: scores[p[0]][p[1]]))
    return pairs


@pytest.mark.parametrize("cells", [10, 16_000_000])
def test_implausible_edges_by_brute_force(cells: int, monkeypatch: Any) -> None:
    monkeypatch.setattr("mmforget.recsys.adversarial.CELLS", cells)
    users, items = 12, 9
    rng = np.random.default_rng(0)
    table = torch.from_numpy(rng.normal(size=(users + items, 3))).float()
    taken = rng.random((users, items)) < 0.3
    taken[4] = True  # a user who knows every item
    taken[:, 2] = True  # an item that every user knows
    known_user, known_item = np.nonzero(taken)
    known = Known(known_user, known_item, items)
    user, item = implausible_edges(table, known, users, items)
    found = list(zip(user.tolist(), item.tolist(), strict=True))
    assert len(found) == len(set(found)) and found == sorted(found)
    assert set(found) == brute(table, known, users, items)
    assert not known.holds(torch.from_numpy(user), torch.from_numpy(item)).any()


def test_a_pair_that_both_ends_name_counts_once() -> None:
    table = torch.tensor([[1.0], [2.0], [-1.0], [0.5]])  # scores: -1, .5 and -2, 1
    known = Known(np.zeros(0, np.int64), np.zeros(0, np.int64), 2)
    user, item = implausible_edges(table, known, 2, 2)
    assert list(zip(user, item, strict=True)) == [(0, 0), (0, 1), (1, 0)]


def test_a_share_of_nodes_names_edges() -> None:
    rng = np.random.default_rng(1)
    table = torch.from_numpy(rng.normal(size=(500, 4))).float()
    known = Known(np.zeros(0, np.int64), np.zeros(0, np.int64), 200)
    whole = set(zip(*(x.tolist() for x in implausible_edges(table, known, 300, 200)), strict=True))
    half = implausible_edges(table, known, 300, 200, share=0.5, seed=3)
    some = set(zip(*(x.tolist() for x in half), strict=True))
    assert some < whole and 0 < len(some) <= 250
    again = implausible_edges(table, known, 300, 200, share=0.5, seed=3)
    other = implausible_edges(table, known, 300, 200, share=0.5, seed=4)
    assert np.array_equal(half, again)
    assert set(zip(*(x.tolist() for x in other), strict=True)) != some
    assert not len(implausible_edges(table, known, 300, 200, share=0.0)[0])


def test_edges_are_written_as_a_request_file(tmp_path: Path) -> None:
    write_edges(tmp_path / "edges.csv", np.array([3, 0]), np.array([5, 12]))
    assert (tmp_path / "edges.csv").read_text() == "user,item\n3,5\n0,12\n"


def test_injected_edges_are_forgotten_below_strangers() -> None:
    # The protocol's end: a model polluted by implausible edges finds them implausible again.
    clean = make_world(seed=3)
    train = clean.splits.train
    assert isinstance(train, Interactions)
    test = clean.splits.test
    assert isinstance(test, Interactions)
    known = joined([train, test], ITEMS)
    model = trained(clean, train, 1)
    user, item = implausible_edges(model.final(), known, USERS, ITEMS, 0.5, 0)
    users, items = np.concatenate([train.user, user]), np.concatenate([train.item, item])
    order = np.lexsort((items, users))
    graph = Graph(USERS, ITEMS, users[order], items[order])
    edge = np.arange(len(graph))
    injected = order >= len(train)
    every = Interactions(users[order], items[order], ITEMS, edge)
    splits = replace(
        clean.splits,
        train=every,
        forget=every.select(np.nonzero(injected)[0].tolist()),
        retain=every.select(np.nonzero(~injected)[0].tolist()),
    )
    world = replace(clean, splits=splits, graph=graph, make=lambda g: LightGCN(g, dim=16, layers=2))
    original = trained(world, every, 1)
    config = UnlearnRecConfig(epochs=20, lr=1e-2, batch_size=256)
    made = unlearn(
        world, original, dict(UnlearnRec(config).prepare(world.preparing(original))), config
    )
    rng = torch.Generator().manual_seed(0)
    stranger = torch.randint(USERS, (2000,), generator=rng)
    draws = torch.randint(ITEMS, (2000,), generator=rng)
    free = ~known.holds(stranger, draws) & ~every.known.holds(stranger, draws)
    random = Interactions(stranger[free].numpy(), draws[free].numpy(), ITEMS)
    forget = splits.forget
    assert isinstance(forget, Interactions)
    assert mean_score(original, forget) > mean_score(original, random)
    assert mean_score(made, forget) < mean_score(made, random)
    assert recall(made, test) > 0.9 * recall(model, test)
