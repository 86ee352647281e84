import copy
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmforget.errors import CollapsedError
from mmforget.recsys.adapter import Pairs
from mmforget.recsys.backbones.lightgcn import LightGCN
from mmforget.recsys.backbones.mf import MatrixFactorisation
from mmforget.recsys.data import Interactions
from mmforget.recsys.methods.mmrecun import MMRecUn, MMRecUnConfig
from mmforget.types import Batch
from tests.recsys.world import World, make_world

FAST: dict[str, Any] = {"batch_size": 256, "lr": 0.01}


def with_validation(world: World) -> World:
    test = world.splits.test
    assert isinstance(test, Interactions)
    every = list(range(len(test)))
    splits = replace(world.splits, val=test.select(every[::2]), test=test.select(every[1::2]))
    return replace(world, splits=splits)


@pytest.fixture(scope="module")
def trained() -> tuple[World, nn.Module, nn.Module]:
    """Return a world with a validation set, its original and its retrained model."""
    world = with_validation(make_world(lambda graph: LightGCN(graph, dim=16, layers=2)))
    original = world.train(world.build(0), world.splits.train, 0)
    return world, original, world.train(world.build(0), world.splits.retain, 0)


def level(world: World, model: nn.Module, split: str, name: str) -> float:
    numbers = world.engine.predict(model, world.adapter, world.splits.get(split), 0)
    return float(numbers[name].mean())


def run(world: World, model: nn.Module, **options: Any) -> tuple[nn.Module, MMRecUn, int]:
    method = MMRecUn(MMRecUnConfig(**FAST | options))
    world.engine.meter.steps = 0
    found = method.run(world.context(model, method))
    return found, method, world.engine.meter.steps


def batch(split: str, data: Pairs, total: int) -> Batch:
    return Batch(
        split=split,
        ids=[str(i) for i in range(len(data.user))],
        data=data,
        units=torch.ones(len(data.user)),
        total=total,
        total_units=float(total),
        weight=1.0,
        draws=lambda *stream: None,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("columns", [(2, 2), (1, 3)])
def test_loss_is_the_weighted_sum_of_both_rankings(
    reduction: str, columns: tuple[int, int]
) -> None:
    world = make_world(lambda graph: LightGCN(graph, dim=4, layers=1, std=1.0, decay=0.1))
    model = world.build(0)
    method = MMRecUn(MMRecUnConfig(alpha=0.3, reduction=reduction))
    ctx = world.context(model, method)
    torch.manual_seed(0)
    parts = [
        Pairs(torch.randint(90, (n,)), torch.randint(120, (n,)), torch.randint(120, (n, m)))
        for n, m in zip((3, 5), columns, strict=True)
    ]
    forget, retain = (batch("", part, 2 * len(part.user)) for part in parts)  # half is held here
    terms = method.loss(ctx, forget, retain)
    table = ctx.model.table()

    def margins(part: Pairs) -> torch.Tensor:
        items = table[90:]
        chosen = (table[part.user] * items[part.item]).sum(1, keepdim=True)
        return chosen - (table[part.user][:, None] * items[part.negative]).sum(2)

    sizes = (6.0, 10.0) if reduction == "sum" else (1.0, 1.0)
    wanted = 0.3 * sizes[0] * F.softplus(margins(parts[0])).mean(1).sum() / 6
    torch.testing.assert_close(terms["forget"], wanted)
    wanted = 0.7 * sizes[1] * F.softplus(-margins(parts[1])).mean(1).sum() / 10
    torch.testing.assert_close(terms["retain"], wanted)
    rows = [ctx.model.users[parts[1].user]]
    rows += [ctx.model.items[part] for part in parts[1][1:]]
    norms = sum(part.square().sum() for part in rows)
    wanted = 0.7 * sizes[1] * 0.5 * 0.1 * norms / 5 * 0.5
    torch.testing.assert_close(terms["retain_l2"], wanted)
    assert set(terms) == {"forget", "retain", "retain_l2"}
    assert set(method.loss(ctx, forget, None)) == {"forget"}
    assert set(method.loss(ctx, None, retain)) == {"retain", "retain_l2"}


def test_both_parts_share_one_propagation() -> None:
    world = make_world(lambda graph: LightGCN(graph, dim=4, layers=1))
    method = MMRecUn(MMRecUnConfig())
    ctx = world.context(world.build(0), method)
    part = Pairs(torch.tensor([1, 2]), torch.tensor([3, 4]), torch.tensor([[5], [6]]))
    calls = []
    model = ctx.model
    inner = model.forward
    model.forward = lambda nodes: calls.append(1) or inner(nodes)
    method.loss(ctx, batch("forget", part, 2), batch("retain", part, 2))
    assert len(calls) == 1


def test_forgotten_scores_fall_to_those_of_retraining(
    trained: tuple[World, nn.Module, nn.Module],
) -> None:
    world, original, gold = trained
    dropped = copy.deepcopy(original)
    world.adapter.apply_request(dropped, world.splits)
    found, _, steps = run(world, original, stop="never", epochs=3)
    scores = [level(world, model, "forget", "score") for model in (dropped, found, gold)]
    assert scores[1] < scores[0] - 0.3
    assert abs(scores[1] - scores[2]) < abs(scores[0] - scores[2])
    before, after = (level(world, model, "test", "loss") for model in (original, found))
    assert after < 1.15 * before
    assert level(world, found, "retain", "loss") < 0.12
    assert steps == 3 * -(-len(world.splits.retain) // 256)


def test_alpha_weighs_forgetting_against_keeping() -> None:
    # With plain gradient steps: Adam would hide the weights' size.
    world = make_world(lambda graph: MatrixFactorisation(graph, dim=16))
    original = world.train(world.build(0), world.splits.train, 0)
    options: dict[str, Any] = {"stop": "never", "epochs": 2, "optimizer": "sgd", "lr": 20.0}
    found = [run(world, original, alpha=alpha, **options)[0] for alpha in (0.0, 0.3, 0.9)]
    scores = [level(world, model, "forget", "score") for model in found]
    assert scores[0] > scores[1] > scores[2]
    assert level(world, found[0], "retain", "loss") < level(world, found[2], "retain", "loss")


def wins(world: World, model: nn.Module, split: str) -> float:
    """Return how often a pair scores above items of which no data set knows anything."""
    data = world.splits.get(split)
    assert isinstance(data, Interactions)
    table = model.final()
    every = world.splits.test
    assert isinstance(every, Interactions)
    shares = []
    for user, item in zip(data.user.tolist(), data.item.tolist(), strict=True):
        scores = table[90:] @ table[user]
        free = torch.ones(120, dtype=torch.bool)
        free[every.known.of_user(user)] = False
        shares.append(float((scores[item] > scores[free]).float().mean()))
    return sum(shares) / len(shares)


def test_it_stops_where_forgotten_pairs_are_as_if_unseen(
    trained: tuple[World, nn.Module, nn.Module],
) -> None:
    world, original, _ = trained
    options: dict[str, Any] = {"stop": "validation", "tolerance": 1.0, "epochs": 60}
    found, method, steps = run(world, original, **options)
    per_epoch = -(-len(world.splits.retain) // 256)
    epochs = steps // per_epoch
    assert 1 < epochs < 60 and method.stopped
    assert wins(world, original, "forget") > wins(world, original, "val") + 0.05
    assert abs(wins(world, found, "forget") - wins(world, found, "val")) < 0.05
    # One epoch less is not enough: it stops at the first epoch at which it may.
    _, shorter, taken = run(world, original, **options | {"epochs": epochs - 1})
    assert taken == (epochs - 1) * per_epoch and not shorter.stopped


def test_an_epoch_that_costs_too_much_is_taken_back(
    trained: tuple[World, nn.Module, nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    world, original, _ = trained
    options: dict[str, Any] = {"stop": "validation", "tolerance": 0.01, "epochs": 30}
    with caplog.at_level(logging.WARNING):
        found, method, steps = run(world, original, **options)
    assert "taken back" in caplog.text and method.stopped
    epochs = steps // -(-len(world.splits.retain) // 256)
    good, _, _ = run(world, original, **options | {"epochs": epochs - 1})
    assert torch.equal(found.users, good.users)
    assert wins(world, found, "val") > wins(world, original, "val") - 0.03


def test_without_validation_random_pairs_are_the_level(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = make_world(lambda graph: MatrixFactorisation(graph, dim=16))
    original = world.train(world.build(0), world.splits.train, 0)
    options: dict[str, Any] = {"epochs": 60, "alpha": 0.9, "lr": 0.02}
    with caplog.at_level(logging.WARNING):
        found, method, steps = run(world, original, stop="validation", **options)
    assert "stop=unseen" in caplog.text
    assert method.stopped and steps < 60 * -(-len(world.splits.retain) // 256)
    assert wins(world, found, "forget") < 0.55
    same, _, _ = run(world, original, stop="unseen", **options)
    assert torch.equal(found.users, same.users)


def test_what_was_never_learnt_needs_no_step() -> None:
    world = make_world(lambda graph: MatrixFactorisation(graph, dim=16))
    model = world.build(0)
    with torch.no_grad():
        model.users.zero_()
    found, _, steps = run(world, model, stop="unseen")
    assert steps == 0
    assert torch.equal(found.items, model.items)


def test_a_resumed_run_knows_that_it_had_stopped() -> None:
    world = with_validation(make_world(lambda graph: MatrixFactorisation(graph, dim=16)))
    first, second = (MMRecUn(MMRecUnConfig(**FAST)) for _ in range(2))
    model = world.train(world.build(0), world.splits.train, 0)
    ctx = world.context(model, first)
    for method in (first, second):
        method.setup(ctx)
    assert len(second.passes(0)) == 1
    first.stopped = True
    second.load_state(first.state())
    assert second.passes(1) == ()
    assert second.before == first.before and set(second.kept) == {"users", "items"}
    never = MMRecUn(MMRecUnConfig(stop="never"))
    never.setup(world.context(model, never))
    assert never.state() == {} and never.reads == {"forget", "retain"}


def test_broken_scores_are_reported() -> None:
    world = make_world(lambda graph: MatrixFactorisation(graph, dim=16))
    model = world.build(0)
    with torch.no_grad():
        model.items[0, 0] = float("inf")
    with pytest.raises(CollapsedError, match="not finite"):
        run(world, model, stop="unseen")
