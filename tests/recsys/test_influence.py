import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmforget.errors import CollapsedError, ConfigError, SplitError
from mmforget.recsys.backbones.base import Recommender
from mmforget.recsys.backbones.lightgcn import LightGCN
from mmforget.recsys.backbones.mf import MatrixFactorisation
from mmforget.recsys.data import Interactions
from mmforget.recsys.graph import Graph
from mmforget.recsys.influence import (
    LOSSES,
    Curvature,
    Examples,
    InfluenceConfig,
    Pointwise,
    Problem,
    Sums,
    Vectors,
    adam,
    conjugate_gradients,
    gradient,
    largest,
    lissa,
    selected_rows,
)
from mmforget.recsys.methods.gif import GIF, GIFConfig
from mmforget.recsys.methods.ifru import IFRU, IFRUConfig
from mmforget.recsys.methods.scif import SCIF, SCIFConfig, mean_labelled
from tests.recsys.world import World, make_world

USERS, ITEMS, DIM, LAYERS, DECAY = 5, 6, 3, 2, 0.1
KINDS = {
    "mf": lambda graph: MatrixFactorisation(graph, dim=16),
    "lightgcn": lambda graph: LightGCN(graph, dim=16, layers=2),
}


def tiny_graph() -> Graph:
    rng = np.random.default_rng(1)
    user, item = np.nonzero(rng.random((USERS, ITEMS)) < 0.5)
    return Graph(USERS, ITEMS, user, item)


def tiny(layers: int) -> Recommender:
    torch.manual_seed(0)
    model = LightGCN(tiny_graph(), dim=DIM, layers=layers, std=1.0, decay=DECAY)
    if not layers:
        model = MatrixFactorisation(tiny_graph(), dim=DIM, std=1.0, decay=DECAY)
    return model


def tiny_examples(count: int = 9, columns: int = 3) -> Examples:
    torch.manual_seed(3)
    item = torch.randint(ITEMS, (count, columns))
    item[0] = item[1]  # pairs that occur twice
    user = torch.randint(USERS, (count,))
    user[0] = user[1]
    return Examples(user, item, torch.rand(count, columns))


def dense_map(model: Recommender) -> Tensor:
    """Return P as a dense matrix: the mean of the powers of the adjacency."""
    nodes = model.graph.nodes
    layers = getattr(model, "layers", 0)
    adjacency = model.adjacency().to_dense()
    powers = [torch.eye(nodes)]
    for _ in range(layers):
        powers.append(powers[-1] @ adjacency)
    return torch.stack(powers).mean(0)


def scores_of(free: Tensor, matrix: Tensor, examples: Examples) -> Tensor:
    final = matrix @ free
    return (final[examples.user][:, None] * final[USERS + examples.item]).sum(-1)


def plain_loss(free: Tensor, matrix: Tensor, examples: Examples, loss: str) -> Tensor:
    """Return the summed loss as it is written in a book."""
    scores = scores_of(free, matrix, examples)
    norms = (free[examples.user].square().sum() + free[USERS + examples.item].square().sum()) * (
        DECAY / 2
    )
    if loss == "bce":
        return norms + F.binary_cross_entropy_with_logits(scores, examples.label, reduction="sum")
    return norms + F.softplus(scores[:, 1:] - scores[:, :1]).mean(1).sum()


@pytest.mark.parametrize("layers", [0, LAYERS])
@pytest.mark.parametrize("loss", ["bce", "bpr"])
def test_gradient_and_products_are_those_of_autograd(layers: int, loss: str) -> None:
    model, examples = tiny(layers), tiny_examples()
    matrix, vectors = dense_map(model), Vectors(model)

    def objective(free: Tensor) -> Tensor:
        return plain_loss(free, matrix, examples, loss)

    free = vectors.free.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(objective(free), free)
    found = gradient(vectors, examples, LOSSES[loss])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)

    hessian = torch.autograd.functional.hessian(objective, vectors.free)
    for rows in (torch.arange(USERS + ITEMS), torch.tensor([1, 3, 7])):
        product = Curvature(vectors, examples, LOSSES[loss], rows, exact=True, scale=2.0)
        direction = torch.randn(len(rows), DIM)
        part = hessian[rows][:, :, rows]
        wanted = 2 * torch.einsum("adbe,be->ad", part, direction)
        torch.testing.assert_close(product(direction), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", [0, LAYERS])
@pytest.mark.parametrize("loss", ["bce", "bpr"])
def test_gauss_newton_is_the_hessian_less_the_bend_of_the_score(layers: int, loss: str) -> None:
    model, examples = tiny(layers), tiny_examples()
    matrix, vectors = dense_map(model), Vectors(model)
    jacobian = torch.autograd.functional.jacobian(
        lambda free: scores_of(free, matrix, examples).reshape(-1), vectors.free
    ).flatten(1)

    def outer(flat: Tensor) -> Tensor:
        scores = flat.view(examples.item.shape)
        if loss == "bce":
            return F.binary_cross_entropy_with_logits(scores, examples.label, reduction="sum")
        return F.softplus(scores[:, 1:] - scores[:, :1]).mean(1).sum()

    scores = scores_of(vectors.free, matrix, examples).reshape(-1)
    curved = jacobian.T @ torch.autograd.functional.hessian(outer, scores) @ jacobian
    count = torch.bincount(examples.user, minlength=USERS + ITEMS)
    count = count + torch.bincount(examples.item.reshape(-1) + USERS, minlength=USERS + ITEMS)
    curved += torch.diag((DECAY * count).repeat_interleave(DIM))
    product = Curvature(vectors, examples, LOSSES[loss], torch.arange(USERS + ITEMS))
    direction = torch.randn(USERS + ITEMS, DIM)
    wanted = (curved @ direction.reshape(-1)).view_as(direction)
    torch.testing.assert_close(product(direction), wanted, rtol=1e-4, atol=1e-4)
    assert (torch.linalg.eigvalsh(curved) > -1e-4).all()


def test_sums_of_no_examples_are_zero() -> None:
    sums = Sums(tiny_graph(), tiny_examples().where(torch.zeros(9, dtype=torch.bool)))
    table = torch.randn(USERS + ITEMS, DIM)
    scores = sums.scores(table[:USERS], table[USERS:])
    assert scores.shape == (0, 3)
    assert (sums.spread(scores, table) == 0).all()


def positive(size: int = 12) -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    root = torch.randn(size, size, dtype=torch.float64)
    return root @ root.T / size, torch.randn(size, dtype=torch.float64)


def test_solvers_agree_with_the_exact_solution() -> None:
    matrix, g = positive()
    damping = 0.3
    wanted = torch.linalg.solve(matrix + damping * torch.eye(12, dtype=g.dtype), g)
    direct = conjugate_gradients(lambda x: matrix @ x, g, damping, 100, 1e-10)
    torch.testing.assert_close(direct.x, wanted, rtol=1e-8, atol=1e-9)
    assert direct.residual <= 1e-10 and direct.steps <= 20
    slow = lissa(lambda x: matrix @ x, g, damping, 2000, 1e-8)
    torch.testing.assert_close(slow.x, wanted, rtol=1e-6, atol=1e-7)
    # Published form: s <- v + (1 - damp) s - Hs / scale, the result over scale.
    scale, steps = 6.0, 7
    s = g.clone()
    for _ in range(steps - 1):
        s = g + (1 - damping / scale) * s - matrix @ s / scale
    short = lissa(lambda x: matrix @ x, g, damping, steps, 0.0, scale=scale)
    torch.testing.assert_close(short.x, s / scale)
    assert short.steps == steps
    damped = matrix + damping * torch.eye(12, dtype=g.dtype)
    walked = adam(
        lambda x: damped @ x,
        g,
        lr=1e-2,
        iterations=20_000,
        tolerance=2e-3,
        patience=10,
        quality=None,
    )
    torch.testing.assert_close(walked.x, wanted, rtol=1e-2, atol=1e-2)
    assert walked.residual <= 2e-3 and walked.steps < 20_000


def test_nothing_to_solve_is_solved_at_once() -> None:
    matrix, g = positive()
    found = conjugate_gradients(lambda x: matrix @ x, torch.zeros_like(g), 0.1, 10, 1e-3)
    assert found.steps == 0 and found.residual == 0 and (found.x == 0).all()
    assert lissa(lambda x: matrix @ x, torch.zeros_like(g), 0.1, 10, 1e-3, 5.0).steps == 0


def test_solvers_say_when_there_is_no_minimum_or_they_diverge() -> None:
    matrix, g = positive()
    with pytest.raises(CollapsedError, match="gauss_newton"):
        conjugate_gradients(lambda x: -(matrix @ x), g, 0.1, 50, 1e-6)
    with pytest.raises(CollapsedError, match="scale"):
        lissa(lambda x: matrix @ x, g, 0.1, 500, 1e-6, scale=0.3)
    with pytest.raises(CollapsedError, match="not finite"):
        conjugate_gradients(lambda x: x * math.nan, g, 0.1, 50, 1e-6)


def test_largest_bounds_the_spectrum_for_lissa() -> None:
    matrix, _ = positive(12)
    top = float(torch.linalg.eigvalsh(matrix)[-1]) + 0.2
    found, steps = largest(lambda x: matrix @ x, torch.zeros(12, 1, dtype=torch.float64), 0.2)
    assert 0.9 * top < found < 1.3 * top
    assert steps > 0


def test_adam_returns_the_best_by_quality_and_stops_after_patience() -> None:
    matrix, g = positive()
    seen: list[Tensor] = []

    def quality(x: Tensor) -> float:
        seen.append(x.clone())
        return -abs(len(seen) - 4.0)

    found = adam(
        lambda x: matrix @ x,
        g,
        lr=0.1,
        iterations=100,
        tolerance=0.0,
        patience=10,
        quality=quality,
    )
    assert torch.equal(found.x, seen[3]) and found.steps == 15
    assert len(seen) == 4 + 11  # the published rule: more than `patience` in a row


def test_a_convex_step_is_close_to_retraining() -> None:
    # Items fixed and an L2 term: strictly convex in the users' rows.
    rng = np.random.default_rng(0)
    users, items, each = 4, 40, 30
    user = np.repeat(np.arange(users), each)
    item = np.concatenate([np.sort(rng.permutation(items)[:each]) for _ in range(users)])
    graph = Graph(users, items, user, item)
    torch.manual_seed(1)
    model = MatrixFactorisation(graph, dim=4, std=1.0, decay=0.05).double()
    label = torch.from_numpy(rng.integers(0, 2, (len(user), 1))).double()
    train = Examples(torch.from_numpy(user), torch.from_numpy(item)[:, None], label)
    gone = torch.zeros(len(user), dtype=torch.bool)
    gone[::15] = True
    rows = torch.arange(users)

    def fitted(examples: Examples) -> Tensor:
        """Return the users' rows at the minimum, by Newton's method on autograd's Hessian."""
        fixed = model.items.detach()

        def objective(free: Tensor) -> Tensor:
            scores = (free[examples.user] * fixed[examples.item[:, 0]]).sum(1)
            loss = F.binary_cross_entropy_with_logits(scores, examples.label[:, 0], reduction="sum")
            return loss + 0.025 * free[examples.user].square().sum()

        free = torch.zeros(users, 4, dtype=torch.float64)
        for _ in range(12):
            hessian = torch.autograd.functional.hessian(objective, free).reshape(users * 4, -1)
            slope = torch.autograd.functional.jacobian(objective, free).reshape(-1)
            free = free - torch.linalg.solve(hessian, slope).view_as(free)
        return free

    best, wanted = fitted(train), fitted(train.where(~gone))
    with torch.no_grad():
        model.users.copy_(best)
    vectors = Vectors(model)
    assert gradient(vectors, train, Pointwise)[rows].abs().max() < 1e-8  # it is a minimum
    g = gradient(vectors, train.where(gone), Pointwise)[rows]
    product = Curvature(vectors, train, Pointwise, rows)
    step = conjugate_gradients(product, g, 0.0, 200, 1e-12).x
    truth = wanted - best
    assert truth.norm() > 0.1
    assert (best + step - wanted).norm() < 0.25 * truth.norm()
    cosine = torch.dot(step.reshape(-1), truth.reshape(-1)) / (step.norm() * truth.norm())
    assert cosine > 0.98


def test_rows_are_chosen_as_written() -> None:
    graph = tiny_graph()
    model = MatrixFactorisation(graph, dim=2)
    model.drop(torch.tensor([0]))
    edges = [(int(u), int(i)) for u, i in zip(graph.user[1:], graph.item[1:], strict=True)]
    removed = [edges[0], edges[1], edges[5]]
    item = torch.tensor([[i, 0] for _, i in removed])  # negatives count for nothing
    forget = Examples(torch.tensor([u for u, _ in removed]), item, torch.zeros(3, 2))
    nodes = USERS + ITEMS
    neighbours: dict[int, list[int]] = {node: [node] for node in range(nodes)}
    for u, i in edges:
        neighbours[u].append(USERS + i)
        neighbours[USERS + i].append(u)
    count = [0] * nodes
    for u, i in removed:
        count[u] += 1
        count[USERS + i] += 1
    weight = [
        sum(count[s] / len(neighbours[s]) for s in neighbours[t]) / len(neighbours[t])
        for t in range(nodes)
    ]
    bound = np.quantile([w for w in weight if w > 0], 0.4)
    above = [t for t in range(nodes) if weight[t] > bound]
    touched = [t for t in range(nodes) if count[t]]
    assert 0 < len(above) < nodes

    def chosen(rows: str, **options: Any) -> list[int]:
        return selected_rows(model, forget, rows, 0.4, **options).tolist()

    assert chosen("touched") == touched
    assert chosen("users") == [t for t in touched if t < USERS]
    assert chosen("all") == list(range(nodes))
    assert chosen("neighbours", forgotten=False) == above
    assert chosen("neighbours") == sorted({*above, *touched})


def test_mean_labels_are_those_of_the_user_else_of_the_item_else_of_all() -> None:
    kept = Examples(
        torch.tensor([0, 0, 2]),
        torch.tensor([[0, 1], [2, 1], [3, 0]]),
        torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.5]]),
    )
    forget = Examples(torch.tensor([0, 1, 4]), torch.tensor([[5], [0], [9]]), torch.ones(3, 1))
    found = mean_labelled(forget, kept).label[:, 0]
    torch.testing.assert_close(found, torch.tensor([3 / 4, (1 + 0.5) / 2, 3.5 / 6]))
    both = mean_labelled(Examples(forget.user, forget.item.expand(3, 2), torch.zeros(3, 2)), kept)
    assert (both.label[:, 1] == 0).all()  # negatives keep theirs


def problem_of(world: World, model: nn.Module, loss: str, **options: Any) -> Problem:
    config = InfluenceConfig(**options)
    return Problem(world.context(model, GIF(GIFConfig())), config, loss)


@pytest.mark.parametrize("loss", ["bce", "bpr"])
def test_spill_over_is_the_change_of_the_kept_pairs_gradient(loss: str) -> None:
    world = make_world(lambda graph: LightGCN(graph, dim=4, layers=1, decay=0.0), forget=0.02)
    model = world.build(0)
    problem = problem_of(world, model, loss)
    parts = [gradient(side, problem.retain, LOSSES[loss]) for side in (problem.old, problem.new)]
    torch.testing.assert_close(problem.spilled(), parts[0] - parts[1], rtol=1e-4, atol=1e-5)
    assert problem.spilled().norm() > 1e-2
    # The old graph is the original's, the new one lacks the request's edges.
    assert torch.equal(problem.old.final, model.table())
    assert not torch.equal(problem.new.final, problem.old.final)


def test_nothing_spills_over_without_propagation() -> None:
    world = make_world(KINDS["mf"])
    problem = problem_of(world, world.build(0), "bpr")
    assert (problem.spilled() == 0).all()
    assert problem.removed().norm() > 0


def test_what_leaves_the_loss() -> None:
    world = make_world(KINDS["mf"])
    size, kept = len(world.splits.forget), len(world.splits.retain)
    pairwise = problem_of(world, world.build(0), "bpr", negatives=3)
    assert pairwise.forget.item.shape == (size, 4) and pairwise.retain.item.shape == (kept, 4)
    pointwise = problem_of(world, world.build(0), "bce", negatives=3)
    assert pointwise.forget.item.shape == (size, 1) and (pointwise.forget.label == 1).all()
    assert len(pointwise.retain.user) == 4 * kept + 3 * size
    assert pointwise.retain.label.sum() == kept
    train = world.splits.train
    assert isinstance(train, Interactions)
    negative = pairwise.train.item[:, 1:]
    assert not train.known.holds(pairwise.train.user[:, None], negative).any()


def test_a_share_of_the_pairs_gives_a_curvature_of_the_same_size() -> None:
    world = make_world(KINDS["mf"])
    model = world.build(0)
    whole, half = (problem_of(world, model, "bpr", share=share).curvature() for share in (1.0, 0.5))
    direction = torch.randn(world.graph.nodes, 16)
    sizes = [float((direction * product(direction)).sum()) for product in (whole, half)]
    assert sizes[0] != sizes[1]
    assert abs(sizes[1] / sizes[0] - 1) < 0.2


class Curved(MatrixFactorisation):
    def table(self) -> Tensor:
        return F.normalize(super().table(), dim=1)


class Wider(MatrixFactorisation):
    def __init__(self, graph: Graph) -> None:
        super().__init__(graph, dim=2)
        self.extra = nn.Linear(2, 2)


@pytest.mark.parametrize("make", [lambda graph: Curved(graph, dim=2), Wider])
def test_other_backbones_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match="lightgcn"):
        Vectors(make(tiny_graph()))


def level(world: World, model: nn.Module, split: str, name: str) -> float:
    numbers = world.engine.predict(model, world.adapter, world.splits.get(split), 0)
    return float(numbers[name].mean())


class Trained:
    """Originals and retrained models, each trained once for all tests."""

    def __init__(self) -> None:
        self.made: dict[str, tuple[World, nn.Module, nn.Module, nn.Module]] = {}

    def __call__(self, kind: str) -> tuple[World, nn.Module, nn.Module, nn.Module]:
        if kind not in self.made:
            world = make_world(KINDS[kind])
            original = world.train(world.build(0), world.splits.train, 0)
            gold = world.train(world.build(0), world.splits.retain, 0)
            dropped = copy.deepcopy(original)
            world.adapter.apply_request(dropped, world.splits)
            self.made[kind] = (world, original, dropped, gold)
        return self.made[kind]


@pytest.fixture(scope="module")
def trained() -> Trained:
    return Trained()


METHODS = {
    "ifru": (IFRU, IFRUConfig),
    "scif": (SCIF, SCIFConfig),
    "gif": (GIF, GIFConfig),
}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", list(METHODS))
def test_scores_of_forgotten_pairs_move_to_those_of_retraining(
    trained: Trained, kind: str, name: str
) -> None:
    world, original, dropped, gold = trained(kind)
    method, config = METHODS[name]
    ctx = world.context(original, method(config()))
    found = method(config()).run(ctx)
    assert found is ctx.model
    scores = [level(world, model, "forget", "score") for model in (dropped, found, gold)]
    assert scores[1] < scores[0] - 0.1
    assert abs(scores[1] - scores[2]) < abs(scores[0] - scores[2])
    before, after = (level(world, model, "test", "loss") for model in (original, found))
    assert after < 1.1 * before
    assert level(world, found, "retain", "loss") < 0.1
    assert not found.kept[torch.from_numpy(world.splits.forget.edge)].any()


@pytest.mark.parametrize("name", list(METHODS))
def test_only_chosen_rows_change_and_the_seed_decides(trained: Trained, name: str) -> None:
    world, original, _, _ = trained("lightgcn")
    method, config = METHODS[name]
    found = [
        method(config(rows="users")).run(world.context(original, method(config()), seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(found[0].users, found[1].users)
    assert not torch.equal(found[0].users, found[2].users)
    assert torch.equal(found[0].items, original.items)
    changed = (found[0].users != original.users).any(dim=1).nonzero()[:, 0]
    assert set(changed.tolist()) == set(np.unique(world.splits.forget.user).tolist())


@pytest.mark.parametrize("name", ["ifru", "gif", "scif", "scif_left"])
def test_a_strongly_damped_step_follows_the_written_gradient(name: str) -> None:
    world = make_world(lambda graph: LightGCN(graph, dim=4, layers=1, std=0.5, decay=0.0))
    original, damping = world.build(0), 1e3
    pointwise = name.startswith("scif")
    options: dict[str, Any] = {"damping": damping, "rows": "all", "tolerance": 1e-5}
    if pointwise:
        options["stationary"] = name == "scif"
    method, config = METHODS[name.removesuffix("_left")]
    made = method(config(**options))
    problem = problem_of(world, original, "bce" if pointwise else "bpr")
    mean = mean_labelled(problem.forget, problem.kept)

    def total(model: nn.Module, examples: Examples) -> Tensor:
        table = model.table()
        rows, items = table[examples.user][:, None], table[world.graph.users + examples.item]
        scores = (rows * items).sum(-1)
        if pointwise:
            return F.binary_cross_entropy_with_logits(scores, examples.label, reduction="sum")
        return F.softplus(scores[:, 1:] - scores[:, :1]).mean(1).sum()

    ctx = world.context(original, made)
    new = copy.deepcopy(ctx.model)
    sides = [
        (original, total(original, problem.forget) + total(original, problem.retain)),
        (new, total(new, problem.retain) + (total(new, mean) if pointwise else 0)),
    ]
    if name == "scif_left":
        sides[0] = (original, 0 * total(original, problem.forget))
    slopes = [torch.autograd.grad(value, [side.users, side.items]) for side, value in sides]
    wanted = [(old - after) / damping for old, after in zip(*slopes, strict=True)]
    found = made.run(ctx)
    for after, before, step in (
        (found.users, original.users, wanted[0]),
        (found.items, original.items, wanted[1]),
    ):
        assert ((after - before) - step).norm() < 0.05 * step.norm()


def test_solvers_agree_on_a_model(trained: Trained) -> None:
    world, original, _, _ = trained("lightgcn")
    options: dict[str, Any] = {"damping": 1.0, "tolerance": 1e-4, "iterations": 2000}
    found = [
        GIF(config).run(world.context(original, GIF(config)))
        for config in (GIFConfig(**options), GIFConfig(solver="lissa", **options))
    ]
    step = [(model.users - original.users).detach() for model in found]
    assert step[0].norm() > 1e-3
    assert (step[0] - step[1]).norm() < 1e-2 * step[0].norm()


def with_validation(world: World) -> World:
    test = world.splits.test
    assert isinstance(test, Interactions)
    every = list(range(len(test)))
    splits = replace(world.splits, val=test.select(every[::2]), test=test.select(every[1::2]))
    return replace(world, splits=splits)


@pytest.mark.parametrize("name", ["ifru", "scif"])
def test_published_solver_stops_by_validation(trained: Trained, name: str) -> None:
    world, original, _, _ = trained("lightgcn")
    world = with_validation(world)
    method, config = METHODS[name]
    made = method(config(reference=True, lr=20.0))
    assert made.reads == {"forget", "retain", "val"}
    world.engine.meter.steps = 0
    found = made.run(world.context(original, made))
    taken = world.engine.meter.steps
    assert 1 <= taken <= 5000
    assert not torch.equal(found.users, original.users)
    assert level(world, found, "test", "loss") < 1.2 * level(world, original, "test", "loss")


def test_published_solver_without_validation_reaches_the_solution() -> None:
    # With users' rows alone the Hessian of cross-entropy is convex, so Adam has a limit.
    world = make_world(lambda graph: MatrixFactorisation(graph, dim=2, std=0.5, decay=0.2))
    original = world.build(0)
    config = IFRUConfig(loss="bce", rows="users", tolerance=1e-3)
    method = IFRU(replace(config, reference=True, lr=5.0, steps=20_000))
    ctx = world.context(original, method)
    found = method.run(ctx)
    direct = IFRU(replace(config, curvature="hessian", damping=0.0, tolerance=1e-6))
    wanted = direct.run(world.context(original, direct))
    step, truth = ((model.users - original.users).detach() for model in (found, wanted))
    assert truth.norm() > 0.01
    assert (step - truth).norm() < 0.05 * truth.norm()


def test_reference_scif_climbs_where_the_default_descends(trained: Trained) -> None:
    # Each as far as it sees the left-over gradient of the training loss.
    world, original, _, _ = trained("mf")
    config = SCIFConfig(stationary=False, damping=1e3)
    with_it = SCIF(config).run(world.context(original, SCIF(config)))
    without = SCIF(SCIFConfig(damping=1e3))
    base = without.run(world.context(original, without))
    problem = problem_of(world, original, "bce")
    slope = gradient(problem.old, problem.train, Pointwise)[: world.graph.users]
    moved = (with_it.users - base.users).detach()
    touched = (moved != 0).any(dim=1)
    assert float((moved * slope)[touched].sum()) < 0
    published = SCIFConfig(reference=True, lr=1e-2, steps=3)
    climbed = SCIF(published).run(world.context(original, SCIF(published)))
    change = (climbed.users - original.users).detach()
    assert float((change * slope)[touched].sum()) > 0


def test_broken_weights_are_reported_and_nothing_is_written() -> None:
    world = make_world(KINDS["mf"])
    model = world.build(0)
    with torch.no_grad():
        model.users[3, 0] = math.nan
    ctx = world.context(model, GIF(GIFConfig()))
    before = ctx.model.items.clone()
    with pytest.raises(CollapsedError, match="not finite"):
        GIF(GIFConfig()).run(ctx)
    assert torch.equal(before, ctx.model.items)


def test_methods_open_only_what_they_declare() -> None:
    world = make_world(KINDS["mf"])
    for method, config in METHODS.values():
        made = method(config())
        assert made.reads == {"forget", "retain"}
        with pytest.raises(SplitError):
            world.context(world.build(0), made).split("test")
