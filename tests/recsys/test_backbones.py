import copy
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmforget.errors import ConfigError, DataError
from mmforget.recsys.adapter import Pairs, rows_of
from mmforget.recsys.backbones.base import Recommender, Triples
from mmforget.recsys.backbones.build import (
    BACKBONES,
    MULTIMODAL,
    PUBLISHED,
    ModelConfig,
    build_backbone,
    foreign_state,
)
from mmforget.recsys.backbones.features import ItemFeatures, item_graph, nearest, right
from mmforget.recsys.backbones.lightgcl import LightGCL, truncated_svd
from mmforget.recsys.backbones.lightgcn import LightGCN
from mmforget.recsys.backbones.mgcn import MGCN
from mmforget.recsys.backbones.mmgcn import MMGCN, mean_matrices
from mmforget.recsys.backbones.sgl import SGL
from mmforget.recsys.graph import Graph, propagated_mean
from mmforget.recsys.training import Ranking
from mmforget.training import fit
from tests.recsys.world import ITEMS, RECIPE, World, make_world

NAMES = list(BACKBONES)
SMALL = {"dim": 16}


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


@pytest.fixture(scope="module")
def features() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(3)
    return {
        "image": torch.randn(ITEMS, 12, generator=rng),
        "text": torch.randn(ITEMS, 7, generator=rng),
    }


def build(
    name: str, world: World, features: Mapping[str, Tensor], seed: int = 0, **options: Any
) -> Recommender:
    config = ModelConfig(name=name, **(SMALL | options))
    return build_backbone(config, world.graph, features, seed)


def batch_of(graph: Graph, size: int = 24, seed: int = 0) -> Pairs:
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(graph), (size,), generator=rng)
    negative = torch.randint(graph.items, (size, 2), generator=rng)
    return Pairs(graph.user[rows], graph.item[rows], negative)


def terms(model: Recommender, pairs: Pairs, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    rows = rows_of(model, pairs)
    return model.auxiliary(Triples(*pairs, *rows, size=len(pairs.user)))


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_rows_of_the_table(name: str, world: World, features: dict[str, Tensor]) -> None:
    model = build(name, world, features)
    model.drop(torch.arange(0, len(world.graph), 7))
    for nodes in (torch.tensor([5, 100, 5, 0, 209, 100]), torch.randint(210, (300,))):
        weight = torch.randn(len(nodes), model.table().shape[1])
        found, wanted = model(nodes), model.table()[nodes]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
        ours = torch.autograd.grad((found * weight).sum(), list(model.parameters()))
        theirs = torch.autograd.grad((wanted * weight).sum(), list(model.parameters()))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_final_is_the_table_until_something_changes(
    name: str, world: World, features: dict[str, Tensor]
) -> None:
    model = build(name, world, features).eval()
    first = model.final()
    assert not first.requires_grad and model.final() is first
    torch.testing.assert_close(first, model.table())

    # A fused optimiser moves no version counter; it needs training mode, as the loop sets it.
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)
    model(torch.arange(50)).square().sum().backward()
    for step in range(2):
        optimizer.step()
        second = model.final()
        assert not torch.equal(second, first), step
        torch.testing.assert_close(second, model.table())
        first = second
    assert torch.equal(model.eval().final(), first)
    with torch.no_grad():
        model.items.add_(1.0)
    assert not torch.equal(model.final(), first)

    other = build(name, world, features, seed=1)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model.final(), other.final())

    if name not in ("mf", "vbpr"):
        before = model.final()
        model.drop(torch.arange(40))
        assert not torch.equal(model.final(), before)
        kept = model.kept.nonzero()[:, 0]
        other.keep(kept)
        torch.testing.assert_close(model.final(), other.final())
    torch.testing.assert_close(model.final(), model.table())


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_shares_graph_and_features_and_nothing_else(
    name: str, world: World, features: dict[str, Tensor]
) -> None:
    model = build(name, world, features)
    before = model.final().clone()
    twin = copy.deepcopy(model)
    assert twin.graph is model.graph and twin._made == {}
    assert getattr(twin, "features", None) is getattr(model, "features", None)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    twin.drop(torch.arange(30))
    assert bool(model.kept.all())
    assert torch.equal(model.table().detach(), before)


@pytest.mark.parametrize("name", NAMES)
def test_building_is_a_function_of_the_seed(
    name: str, world: World, features: dict[str, Tensor]
) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, same, other = (build(name, world, features, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.final(), same.final())
    assert not torch.equal(one.final(), other.final())


@pytest.mark.parametrize("name", NAMES)
def test_a_forgotten_edge_gives_the_model_that_never_had_it(
    name: str, world: World, features: dict[str, Tensor]
) -> None:
    # The same weights on a graph without the edges: nothing of them may be left anywhere.
    gone = torch.from_numpy(np.concatenate([world.splits.forget.edge, np.arange(12)]))
    model = build(name, world, features)
    model.final(), terms(model, batch_of(world.graph))  # fills what is computed once
    model.drop(gone)
    kept = model.kept
    user, item = world.graph.user[kept].numpy(), world.graph.item[kept].numpy()
    clean = build_backbone(
        ModelConfig(name=name, **SMALL), Graph(world.graph.users, ITEMS, user, item), features, 3
    )
    state = {k: v for k, v in model.state_dict().items() if k != "kept"}
    clean.load_state_dict(state | {"kept": clean.kept})
    torch.testing.assert_close(model.final(), clean.final())
    if name != "sgl":  # which draws one number an edge, also for those that are gone
        pairs = batch_of(clean.graph)
        ours, theirs = terms(model, pairs), terms(clean, pairs)
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_every_backbone_learns(name: str, features: dict[str, Tensor]) -> None:
    # In a world this small a batch holds every node, and the published weight of a contrast would
    # push apart those of one taste.
    weight = {"ssl_weight": 0.02} if "ssl_weight" in PUBLISHED[name] else {}
    config = ModelConfig(name=name, **SMALL, **weight)
    world = make_world(lambda graph: build_backbone(config, graph, features, 0))
    model = world.build(0)
    assert isinstance(model, Recommender)
    start = recall(world, model)
    # A second or two each.
    recipe = replace(RECIPE, epochs=20)
    data, method = world.splits.train, Ranking(recipe)
    fit(world.engine, model, world.adapter, data, recipe, 0, method=method)
    assert recall(world, model) > max(0.5, start + 0.15)


def recall(world: World, model: Recommender, cut: int = 20) -> float:
    """Return Recall@20 on test, a mean over users, training pairs left out of the ranking."""
    users = world.graph.users
    table = model.final()
    scores = table[:users] @ table[users:].T
    scores[world.splits.train.user, world.splits.train.item] = -torch.inf
    hits = torch.zeros_like(scores).scatter_(1, scores.topk(cut).indices, 1.0)
    wanted = torch.zeros_like(scores)
    wanted[world.splits.test.user, world.splits.test.item] = 1.0
    per_user = (hits * wanted).sum(1) / wanted.sum(1).clamp(min=1)
    return float(per_user[wanted.sum(1) > 0].mean())


CHANGES: dict[str, Any] = {
    "dim": 8,
    "layers": 1,
    "std": 0.7,
    "decay": 0.5,
    "l2": "norm",
    "combine": "sum",
    "layer0": None,  # the other than the default
    "ssl_weight": 0.9,
    "temperature": 0.7,
    "contrast": "all",
    "drop_rate": 0.5,
    "drop": "entries",
    "views": "epoch",
    "noise": 0.9,
    "rank": 2,
    "hops": 2,
    "neighbours": 3,
    "train_features": False,
}


@pytest.mark.parametrize("name", NAMES)
def test_every_option_changes_something(
    name: str, world: World, features: dict[str, Tensor]
) -> None:
    pairs = batch_of(world.graph)

    def what(**options: Any) -> list[Tensor]:
        model = build(name, world, features, **options)
        if options.get("l2") or options.get("decay"):
            model.decay = options.get("decay", 0.5)
        extra = terms(model, pairs)
        again = terms(model, pairs, seed=1)
        trained = torch.tensor(sum(p.numel() for p in model.parameters()))
        return [model.final(), trained, *extra.values(), *again.values()]

    base = what()
    assert PUBLISHED[name].keys() <= CHANGES.keys()
    for option in PUBLISHED[name]:
        value = CHANGES[option] if option != "layer0" else not PUBLISHED[name]["layer0"]
        if option == "l2":
            base_l2 = what(l2=PUBLISHED[name]["l2"])
            values = {"half_squared", "norm", "mean_squares", "all_parameters"}
            for form in values - {PUBLISHED[name]["l2"]}:
                assert differs(what(l2=form), base_l2), form
            continue
        assert value != PUBLISHED[name][option]
        assert differs(what(**{option: value}), base), option


def differs(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) != len(theirs) or any(
        a.shape != b.shape or not torch.allclose(a, b, rtol=1e-3)
        for a, b in zip(ours, theirs, strict=True)
    )


def test_every_field_of_the_config_reaches_a_backbone() -> None:
    known = set().union(*(defaults for defaults in PUBLISHED.values()))
    assert {item.name for item in fields(ModelConfig)} - {"name", "checkpoint"} == known
    assert PUBLISHED["lightgcn"]["layers"] == 3 and PUBLISHED["lightgcl"]["layers"] == 2
    assert PUBLISHED["simgcl"]["layer0"] is False and PUBLISHED["mgcn"]["neighbours"] == 10


@pytest.mark.parametrize("name", NAMES)
def test_options_of_other_backbones_are_refused(
    name: str, world: World, features: dict[str, Tensor]
) -> None:
    for option, value in CHANGES.items():
        value = True if value is None else value
        if option not in PUBLISHED[name]:
            with pytest.raises(ConfigError, match=f"model.{option}"):
                build(name, world, features, **{option: value})


def test_wrong_configs_say_what_is_wrong(world: World, features: dict[str, Tensor]) -> None:
    with pytest.raises(ConfigError, match="accepted: mf, lightgcn"):
        build("bpr", world, features)
    for name in MULTIMODAL:
        with pytest.raises(ConfigError, match="needs image or text"):
            build(name, world, {})
        with pytest.raises(ConfigError, match="audio"):
            build(name, world, {"audio": features["image"]})
        with pytest.raises(DataError, match="120 rows"):
            build(name, world, {"image": features["image"][:-1]})
        with pytest.raises(DataError, match="finite"):
            build(name, world, {"text": features["text"] * torch.inf})
    with pytest.raises(ConfigError, match="l2='l1'"):
        build("mf", world, {}, l2="l1")
    with pytest.raises(ConfigError, match="layer0"):
        LightGCN(world.graph, layers=0, layer0=False)
    for option in ("drop", "views", "contrast"):
        with pytest.raises(ConfigError, match=option):
            build("sgl", world, {}, **{option: "no"})


@pytest.mark.parametrize("name", MULTIMODAL)
@pytest.mark.parametrize("kind", ["image", "text"])
def test_one_kind_of_feature_is_enough(
    name: str, kind: str, world: World, features: dict[str, Tensor]
) -> None:
    model = build(name, world, {kind: features[kind]})
    assert terms(model, batch_of(world.graph))["l2"].isfinite()
    assert model.final().isfinite().all()


def test_scopes_of_parameters_are_users_and_items(
    world: World, features: dict[str, Tensor]
) -> None:
    for name in NAMES:
        model = build(name, world, features)
        users = world.adapter.parameters(model, "users")
        items = world.adapter.parameters(model, "items")
        assert "users" in users and "items" in items
        assert all(len(p) == world.graph.users for p in users.values())
        assert all(len(p) == ITEMS for p in items.values())


def test_the_l2_term_is_each_published_form(world: World) -> None:
    pairs = batch_of(world.graph)
    model = LightGCN(world.graph, 4, 2, decay=0.5)
    free = [model.users[pairs.user], model.items[pairs.item], model.items[pairs.negative]]
    final = [part.detach() for part in rows_of(model, pairs)]
    size = len(pairs.user)
    wanted = {
        "half_squared": sum((x**2).sum() for x in free) / 2 / size,
        "norm": sum((x**2).sum().sqrt() for x in free) / size,
        "final_half_squared": sum((x**2).sum() for x in final) / 2 / size,
        "mean_squares": (free[0] ** 2).mean()
        + torch.cat([free[1][:, None], free[2]], 1).square().mean(),
        "all_parameters": (model.users**2).sum() + (model.items**2).sum(),
    }
    for form, value in wanted.items():
        model.l2 = form
        torch.testing.assert_close(terms(model, pairs)["l2"], 0.5 * value)
    model.decay = 0.0
    assert terms(model, pairs) == {}


def test_few_nodes_take_the_path_of_single_rows(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmforget.recsys.backbones import lightgcn

    asked = []
    original = lightgcn.propagated_sum

    def spy(matrix: Tensor, x: Tensor, layers: int, first: int = 0, nodes: Any = None) -> Tensor:
        asked.append(nodes is not None)
        return original(matrix, x, layers, first, nodes)

    monkeypatch.setattr(lightgcn, "propagated_sum", spy)
    model = LightGCN(world.graph, 4, 3)
    model(torch.tensor([3, 3, 199]))
    model(torch.arange(world.graph.nodes))
    assert asked == [True, False]


def test_sgl_drops_the_share_it_says_and_normalises_anew(world: World) -> None:
    graph = world.graph
    model = SGL(graph, 4, drop_rate=0.3)
    model.drop(torch.arange(50))
    torch.manual_seed(0)
    (first, same), (second, _) = model.dropped_views(8)
    assert first is same and not torch.equal(first.values(), second.values())
    dense = first.to_dense()
    assert torch.equal(dense, dense.T)
    on = dense[graph.user, graph.users + graph.item] > 0
    assert not on[:50].any()  # a dropped edge never comes back
    assert on[50:].float().mean().item() == pytest.approx(0.7, abs=0.05)
    torch.testing.assert_close(dense, graph.adjacency(on).to_dense())


def test_sgl_entries_are_dropped_one_by_one_and_scaled_up(world: World) -> None:
    graph = world.graph
    model = SGL(graph, 4, drop_rate=0.25, drop="entries")
    torch.manual_seed(0)
    matrix, transposed = model.dropped_views(8)[0]
    dense, whole = matrix.to_dense(), graph.adjacency().to_dense()
    torch.testing.assert_close(transposed.to_dense(), dense.T)
    assert not torch.equal(dense, dense.T)
    on = dense > 0
    torch.testing.assert_close(dense[on], whole[on] / 0.75)
    assert (on.sum() / (whole > 0).sum()).item() == pytest.approx(0.75, abs=0.04)


def test_sgl_views_of_an_epoch_last_an_epoch_and_survive_a_restart(world: World) -> None:
    torch.manual_seed(0)
    model = SGL(world.graph, 4, views="epoch")
    size = int(model.kept.sum())
    first = model.dropped_views(size // 2)
    torch.manual_seed(9)  # the step's seed does not matter
    assert model.dropped_views(size // 4) is first
    twin = SGL(world.graph, 4, views="epoch")
    twin.load_state_dict(model.state_dict())
    again = twin.dropped_views(size)
    assert torch.equal(again[0][0].values(), first[0][0].values())
    model.dropped_views(size)  # ends the epoch
    later, follow = model.dropped_views(1), twin.dropped_views(1)
    assert not torch.equal(later[0][0].values(), first[0][0].values())
    assert torch.equal(later[1][0].values(), follow[1][0].values())


def test_noise_keeps_to_the_orthant_and_its_length(world: World) -> None:
    model = build("simgcl", world, {}, layers=1, noise=0.3)
    torch.manual_seed(0)
    clean, disturbed = model.table(), model.view(model.start())
    moved = disturbed - clean
    has = clean.abs().sum(1) > 0
    torch.testing.assert_close(moved[has].norm(dim=1), torch.full((int(has.sum()),), 0.3))
    assert (moved * clean >= -1e-9).all()


def test_the_low_rank_view_is_the_best_and_follows_the_edges(world: World) -> None:
    model = build("lightgcl", world, {}, rank=4)
    assert isinstance(model, LightGCL)
    old = model.decomposition()[1].clone()
    model.drop(torch.arange(0, len(world.graph), 2))
    left, size, right_side = model.decomposition()
    assert not torch.allclose(size, old, rtol=1e-3)
    block = world.graph.block(model.kept)[0].to_dense()
    values = torch.linalg.svdvals(block)
    torch.testing.assert_close(size, values[:4])
    error = (block - (left * size) @ right_side.T).norm()
    torch.testing.assert_close(error, values[4:].norm(), rtol=1e-3, atol=1e-5)


def test_a_large_decomposition_is_nearly_exact_and_leaves_the_generator() -> None:
    rng = np.random.default_rng(0)
    taste = rng.integers(8, size=(2, 700))
    liked = rng.random((700, 700)) < np.where(taste[0][:, None] == taste[1], 0.2, 0.005)
    graph = Graph(700, 700, *np.nonzero(liked))
    kept = torch.ones(len(graph), dtype=torch.bool)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    left, size, turned = truncated_svd(graph, kept, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(truncated_svd(graph, kept, 5)[0], left)
    values = torch.linalg.svdvals(graph.block()[0].to_dense())
    torch.testing.assert_close(size, values[:5], rtol=1e-3, atol=0.0)
    assert left.shape == turned.shape == (700, 5)


def test_what_forward_attached_is_what_auxiliary_would_compute(
    world: World, features: dict[str, Tensor]
) -> None:
    pairs = batch_of(world.graph)
    for name in ("lightgcl", "mgcn"):
        model = build(name, world, features)
        rows = rows_of(model, pairs)
        loose = [row.clone() for row in rows]  # cut off from what forward attached
        kept = model.auxiliary(Triples(*pairs, *rows, size=24))
        again = model.auxiliary(Triples(*pairs, *loose, size=24))
        assert torch.equal(kept["ssl"], again["ssl"])
        weights = list(model.parameters())
        ours = torch.autograd.grad(kept["ssl"], weights, allow_unused=True)
        theirs = torch.autograd.grad(again["ssl"], weights, allow_unused=True)
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                torch.testing.assert_close(a, b)


def test_neighbours_are_exact_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmforget.recsys.backbones import features as module

    values = torch.randn(30, 4)
    values[3] = 0.0
    monkeypatch.setattr(module, "CELLS", 90)  # blocks of three rows
    near, found = nearest(values, 5)
    unit = torch.nn.functional.normalize(values)
    wanted = (unit @ unit.T).topk(5)
    torch.testing.assert_close(found, wanted.values)
    rows = [k for k in range(30) if k != 3]
    assert torch.equal(near[rows], wanted.indices[rows])
    assert nearest(values, 99)[0].shape == (30, 30)
    assert right(values, near, found)
    for fault in (near.roll(1, 0), near.flip(1), near + 29):
        assert not right(values, fault, found)


def test_withdrawn_items_leave_the_graph_of_items() -> None:
    values = torch.rand(12, 3) + 0.1
    near, found = nearest(values, 4)
    gone = torch.zeros(12, dtype=torch.bool)
    gone[[2, 7]] = True
    matrix, transposed = (part.to_dense() for part in item_graph(near, found, gone))
    assert matrix[gone].abs().sum() == 0 and matrix[:, gone].abs().sum() == 0
    torch.testing.assert_close(transposed, matrix.T)
    weights = torch.zeros(12, 12).scatter_(1, near, found)
    weights[gone], weights[:, gone] = 0, 0
    scale = torch.where(weights.sum(1) > 0, weights.sum(1), torch.inf).rsqrt()
    torch.testing.assert_close(matrix, scale[:, None] * weights * scale)


def test_a_withdrawn_items_features_stop_spreading(world: World) -> None:
    rng = torch.Generator().manual_seed(0)
    image = torch.randn(ITEMS, 6, generator=rng)
    item = 5
    image[item + 1] = image[item]  # near in the graph of items
    edges = (world.graph.item == item).nonzero()[:, 0]
    changed = image.clone()
    changed[item] = -3.0
    found = []
    for values in (image, changed):
        model = MGCN(world.graph, {"image": image}, 8, train_features=True)
        model.load_state_dict(MGCN_state(world.graph, image) | {"raw.image": values})
        before = model.final()[90 + item + 1].clone()
        model.drop(edges)
        found.append((before, model.final()))
    assert not torch.allclose(found[0][0], found[1][0])  # its features reach its neighbour
    others = torch.arange(210) != 90 + item
    assert torch.equal(found[0][1][others], found[1][1][others])


def MGCN_state(graph: Graph, image: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return MGCN(graph, {"image": image}, 8).state_dict()


def test_features_are_kept_once() -> None:
    held = ItemFeatures({"text": torch.rand(9, 3)}, 9)
    first = held.neighbours("text", 2, torch.device("cpu"))
    assert copy.deepcopy(held) is held
    assert held.neighbours("text", 2, torch.device("cpu"))[0] is first[0]
    assert held.names == ("text",) and held.width("text") == 3


def test_mmgcn_averages_over_neighbours(world: World, features: dict[str, Tensor]) -> None:
    adjacency = world.graph.adjacency()
    straight, transposed = (part.to_dense() for part in mean_matrices(adjacency))
    pattern = (adjacency.to_dense() > 0).float()
    torch.testing.assert_close(straight, pattern / pattern.sum(1, keepdim=True).clamp(min=1))
    torch.testing.assert_close(transposed, straight.T)
    model = build("mmgcn", world, features)
    assert isinstance(model, MMGCN)
    untrained = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert untrained == []  # the port's preferences and ids never move
    model.final_loss = model(torch.arange(210)).square().sum()
    model.final_loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_mgcn_is_lightgcn_plus_a_side_part(world: World, features: dict[str, Tensor]) -> None:
    model = build("mgcn", world, features)
    assert isinstance(model, MGCN)
    content, side = model.parts()
    start = torch.cat([model.users, model.items])
    torch.testing.assert_close(content, propagated_mean(world.graph.adjacency(), start, 2))
    views = [model.modality(name) for name in ("image", "text")]
    item = model.items * torch.sigmoid(
        model.purify["image"](model.project["image"](features["image"]))
    )
    item = model.item_graph("image")[0].to_dense() @ item
    torch.testing.assert_close(views[0][90:], item)
    torch.testing.assert_close(views[0][:90], world.graph.block()[0].to_dense() @ item)
    scores = torch.cat([model.query(view) for view in views], 1).softmax(1)
    common = scores[:, :1] * views[0] + scores[:, 1:] * views[1]
    total = common
    for name, view in zip(("image", "text"), views, strict=True):
        total = total + torch.sigmoid(model.prefer[name](content)) * (view - common)
    torch.testing.assert_close(side, total / 3)


def test_weights_of_other_code_bases_are_renamed(world: World) -> None:
    users, items = torch.randn(90, 16), torch.randn(ITEMS, 16)
    for pair in (
        ("embedding_user.weight", "embedding_item.weight"),
        ("user_embedding.weight", "item_id_embedding.weight"),
        ("users", "items"),
    ):
        state = foreign_state(dict(zip(pair, (users, items), strict=True)))
        model = build("lightgcn", world, {})
        model.load_state_dict({**state, "kept": model.kept})
        assert torch.equal(model.users, users) and torch.equal(model.items, items)


def test_mgcn_weights_of_mmrec_fit(world: World, features: dict[str, Tensor]) -> None:
    model = build("mgcn", world, features)
    theirs = {
        "user_embedding.weight": model.users,
        "item_id_embedding.weight": model.items,
        "image_embedding.weight": model.raw["image"],
        "text_embedding.weight": model.raw["text"],
        "query_common.0.weight": model.query[0].weight,
        "query_common.0.bias": model.query[0].bias,
        "query_common.2.weight": model.query[2].weight,
    }
    for short, long in (("image", "v"), ("text", "t")):
        for part in ("weight", "bias"):
            theirs[f"{short}_trs.{part}"] = getattr(model.project[short], part)
            theirs[f"gate_{long}.0.{part}"] = getattr(model.purify[short], part)
            theirs[f"gate_{short}_prefer.0.{part}"] = getattr(model.prefer[short], part)
    found = foreign_state(theirs)
    assert found.keys() == model.state_dict().keys() - {"kept"}
    other = build("mgcn", world, features, seed=4)
    other.load_state_dict({**found, "kept": model.kept})
    assert torch.equal(other.final(), model.final())


def test_the_config_is_frozen_and_can_be_replaced() -> None:
    config = ModelConfig(name="sgl")
    assert replace(config, drop_rate=0.2).drop_rate == 0.2 and config.drop_rate is None
