import gc
import json
import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmforget.context import Context
from mmforget.engine import Engine, Runtime
from mmforget.errors import CollapsedError, ConfigError, SplitError
from mmforget.methods.base import LossMethod, make_loss_method
from mmforget.testing.toys import CLASSES, FEATURES, ClassAdapter, toy_world
from mmforget.training import count_steps, fit, learning_rate, plan_epoch
from mmforget.types import Pass, Training

torch.set_num_threads(1)

WORLD = toy_world("classes")


def quiet(**changes):
    return Engine(Runtime(device="cpu", progress=False, **changes))


def context(engine, reads=("forget", "retain"), adapter=WORLD.adapter, model=None):
    return Context(
        engine=engine,
        adapter=adapter,
        model=WORLD.build(0) if model is None else model,
        splits=WORLD.splits,
        reads=frozenset(reads),
        label="test",
        seed=0,
        fresh_model=WORLD.build,
    )


def same(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize(
    ("changes", "step", "epoch", "rate"),
    [
        ({}, 7, 0, 1.0),
        ({"schedule": "cosine"}, 0, 0, 1.0),
        ({"schedule": "cosine"}, 5, 0, 0.5),
        ({"schedule": "cosine"}, 9, 0, 0.5 * (1 + math.cos(0.9 * math.pi))),
        ({"schedule": "linear"}, 0, 0, 1.0),
        ({"schedule": "linear"}, 9, 0, 0.1),
        ({"schedule": "step", "milestones": [2, 4]}, 0, 1, 1.0),
        ({"schedule": "step", "milestones": [2, 4]}, 0, 2, 0.1),
        ({"schedule": "step", "milestones": [2, 4], "decay": 0.5}, 0, 4, 0.25),
        ({"warmup_steps": 4}, 0, 0, 0.25),
        ({"warmup_steps": 4}, 3, 0, 1.0),
        ({"warmup_steps": 4, "schedule": "linear"}, 4, 0, 1.0),
        ({"warmup_steps": 4, "schedule": "linear"}, 7, 0, 0.5),
    ],
)
def test_learning_rate(changes, step, epoch, rate):
    config = Training(lr=1.0, **changes)
    assert learning_rate(config, step, total=10, epoch=epoch) == pytest.approx(rate)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1, "lr": 0.1},
        {"optimizer": "adam", "weight_decay": 0.1},
        {"optimizer": "adamw", "weight_decay": 0.1, "schedule": "cosine"},
        {"optimizer": "sgd", "lr": 1.0, "clip_norm": 0.05},
        {"norm": "train", "lr": 0.1},
    ],
)
def test_fit_is_a_plain_loop(changes):
    """On full batches order does not matter, so the textbook loop gives the same weights."""
    config = Training(**{"lr": 0.01, "epochs": 4, "batch_size": 1000, **changes})
    data = WORLD.splits.retain
    found = fit(quiet(), WORLD.build(0), ClassAdapter(noise=0.0), data, config, seed=0)

    model, raw = WORLD.build(0), data.take(range(len(data)))
    model.train()
    model.body[1].train(config.norm == "train")
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    extra = {"momentum": config.momentum} if config.optimizer == "sgd" else {}
    optimizer = kinds[config.optimizer](
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay, **extra
    )
    for step in range(4):
        if config.schedule == "cosine":
            rate = config.lr * 0.5 * (1 + math.cos(math.pi * step / 4))
            optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        F.cross_entropy(model(raw["x"]), raw["y"]).backward()
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert not found.training


def test_a_killed_training_writes_each_event_once_and_ends_the_same(tmp_path):
    config = Training(epochs=3, batch_size=24, lr=0.05, momentum=0.9)

    def train(state, events, kill=None):
        engine = quiet(checkpoint_every_s=0.0, log_every=2)
        adapter = Mortal(kill)
        with engine.recording("fit", {}, events):
            return fit(engine, WORLD.build(0), adapter, WORLD.splits.retain, config, 0, state)

    whole = train(None, tmp_path / "whole.jsonl")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "state", tmp_path / "cut.jsonl", kill=6)
    rest = train(tmp_path / "state", tmp_path / "cut.jsonl")
    assert same(whole, rest)
    assert (tmp_path / "cut.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    events = [json.loads(line) for line in (tmp_path / "whole.jsonl").open()]
    assert [event["step"] for event in events] == list(range(1, 10))
    assert all(event["loss"] == event["retain"] and event["lr"] == 0.05 for event in events)
    assert events[-1]["loss"] < events[0]["loss"]


class Mortal(ClassAdapter):
    """Is interrupted in its n-th forward pass."""

    def __init__(self, kill):
        super().__init__()
        self.left = kill

    def forward(self, model, data):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return super().forward(model, data)


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.head(self.body(x))


def test_dropout_depends_on_the_seed_alone(tmp_path):
    config = Training(epochs=3, batch_size=24, lr=0.05)
    torch.manual_seed(0)
    start = Dropping().state_dict()

    def train(seed, state=None, kill=None):
        model = Dropping()
        model.load_state_dict(start)
        engine = quiet(checkpoint_every_s=0.0, log_every=1)
        return fit(engine, model, Mortal(kill), WORLD.splits.retain, config, seed, state)

    whole = train(0)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        train(0, tmp_path, kill=5)
    again = train(0, tmp_path)
    assert same(whole, again)
    assert not same(whole, train(1))
    torch.manual_seed(123)
    assert torch.equal(before, torch.get_rng_state())


def test_global_random_numbers_are_put_back():
    before = torch.get_rng_state()
    model = Dropping()
    torch.set_rng_state(before)
    fit(quiet(), model, WORLD.adapter, WORLD.splits.retain, Training(lr=0.1), 0)
    assert torch.equal(before, torch.get_rng_state())


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    config = Training(epochs=50, lr=1e12, batch_size=24)
    with pytest.raises(CollapsedError, match=r"step \d+.*method\.lr"):
        fit(quiet(), WORLD.build(0), WORLD.adapter, WORLD.splits.retain, config, 0, tmp_path)


def test_looking_at_the_model_does_not_wake_frozen_norms():
    engine, model = quiet(), WORLD.build(0)
    model.train()
    model.body[1].eval()
    engine.predict(model, WORLD.adapter, WORLD.splits.val, seed=0)
    assert model.training
    assert not model.body[1].training


def test_models_are_freed_after_training():
    engine, model = quiet(), WORLD.build(0)
    held = weakref.ref(model)
    fit(engine, model, WORLD.adapter, WORLD.splits.retain, Training(), 0)
    del model
    gc.collect()
    assert held() is None


def test_plans_walk_the_anchor_once_and_cycle_the_partner():
    ctx = context(quiet())
    method = make_loss_method("grad_diff", {"batch_size": 7, "anchor": "retain"}, "method")
    plan = plan_epoch(ctx, method, 0)
    assert len(plan) == count_steps(ctx, method, 0) == math.ceil(72 / 7)
    assert [step.index for step in plan] == list(range(len(plan)))
    assert sorted(i for step in plan for i in step.rows["retain"]) == list(range(72))
    forget = [i for step in plan for i in step.rows["forget"]]
    assert sorted(forget[:24]) == sorted(forget[24:48]) == sorted(forget[48:]) == list(range(24))
    assert all(len(step.rows["forget"]) == len(step.rows["retain"]) for step in plan)
    assert plan != plan_epoch(ctx, method, 1)
    assert plan == plan_epoch(ctx, method, 0)


def test_a_union_holds_a_fixed_share_of_retain():
    ctx = context(quiet())
    method = make_loss_method("bad_teacher", {"batch_size": 10}, "method")
    chosen = []
    for epoch in (0, 1):
        plan = plan_epoch(ctx, method, epoch)
        assert len(plan) == count_steps(ctx, method, epoch) == math.ceil((24 + 22) / 10)
        sizes = [sum(len(rows) for rows in step.rows.values()) for step in plan]
        assert sizes == [10, 10, 10, 10, 6]
        forget = [i for step in plan for i in step.rows.get("forget", [])]
        assert sorted(forget) == list(range(24))
        chosen.append(sorted(i for step in plan for i in step.rows.get("retain", [])))
    assert len(set(chosen[0])) == 22  # round(0.3 · 72)
    assert chosen[0] == chosen[1]
    tiny = make_loss_method("bad_teacher", {"retain_fraction": 0.001}, "method")
    with pytest.raises(ConfigError, match="leaves none"):
        count_steps(ctx, tiny, 0)


@pytest.mark.parametrize("steps", [0, 1, 4, 5, 100])
def test_max_steps(steps):
    engine = quiet()
    config = Training(epochs=3, batch_size=24, max_steps=steps)
    fit(engine, WORLD.build(0), WORLD.adapter, WORLD.splits.retain, config, 0)
    assert engine.meter.steps == min(steps, 9)


@pytest.mark.parametrize(("total", "accumulation"), [(10, 1), (10, 4), (3, 4)])
def test_shares_of_a_batch_add_up(total, accumulation):
    world = toy_world("tokens")
    engine = quiet()
    rows = list(range(total))
    parts = engine.load(
        world.adapter,
        {"retain": (world.splits.retain, rows)},
        seed=0,
        stream=("t",),
        train=True,
        accumulation=accumulation,
    )
    batches = [part["retain"] for part in parts]
    ctx = context(engine)
    one = torch.tensor(1.0)
    assert sum(len(batch) for batch in batches) == total
    assert sum(ctx.once(one, b).item() for b in batches) == pytest.approx(1.0)
    assert sum(ctx.mean(torch.ones(len(b)), b).item() for b in batches) == pytest.approx(1.0)
    assert sum(ctx.unit_mean(b.units, b).item() for b in batches) == pytest.approx(1.0)


def test_only_declared_splits_open():
    ctx = context(quiet(), reads=("forget",))
    assert len(ctx.split("forget")) == 24
    with pytest.raises(SplitError, match="test opened the retain split"):
        ctx.split("retain")


def test_a_pass_outside_the_loop_is_counted_and_in_order():
    engine = quiet()
    ctx = context(engine)
    ids = [i for batch in ctx.batches("forget", 10) for i in batch.ids]
    assert ids == list(WORLD.splits.forget.ids)
    assert engine.meter.examples_seen == 24


def test_passes_may_have_their_own_batch_sizes():
    method = make_loss_method("grad_diff", {"batch_size": 8}, "method")
    run = Pass("joint", anchor="forget", partner="retain", batch_size=6, partner_batch_size=9)
    method.passes = lambda epoch: (run,)
    plan = plan_epoch(context(quiet()), method, 0)
    assert [(len(s.rows["forget"]), len(s.rows["retain"])) for s in plan] == [(6, 9)] * 4


def test_predictions_do_not_depend_on_the_batch_size():
    model = WORLD.build(0)
    found = [
        quiet(eval_batch_size=size).predict(model, WORLD.adapter, WORLD.splits.val, seed=0)
        for size in (5, 24)
    ]
    assert found[0]["ids"].tolist() == list(WORLD.splits.val.ids)
    np.testing.assert_array_equal(found[0]["ids"], found[1]["ids"])
    np.testing.assert_allclose(found[0]["logits"], found[1]["logits"], atol=1e-6)


def test_weights_that_no_loss_uses_stay_as_they_are():
    model = WORLD.build(0)
    model.unused = nn.Parameter(torch.ones(3))
    config = replace(Training(), optimizer="adamw", weight_decay=0.5, epochs=2)
    fit(quiet(), model, WORLD.adapter, WORLD.splits.retain, config, 0)
    assert torch.equal(model.unused, torch.ones(3))


class Beside(LossMethod[Training]):
    """Learns wrong targets of forget, with retain in the same mean and a third split beside it."""

    reads = frozenset({"forget", "retain", "beside"})

    def __init__(self, aligned=False):
        super().__init__(Training(epochs=1, batch_size=6))
        self.aligned = aligned
        self.seen = []

    def passes(self, epoch):
        more = {"relabel": True, "together": True, "extra": "beside", "aligned": self.aligned}
        return (Pass("joint", anchor="forget", partner="retain", **more),)

    def backward(self, ctx, parts):
        self.seen += parts
        return super().backward(ctx, parts)

    def loss(self, ctx, forget, retain):
        assert forget is None or retain is None  # a graph at a time
        if forget is None:
            return {}
        return {"forget": ctx.unit_mean(ctx.forward(forget).loss, forget)}

    def extra_loss(self, ctx, extra):
        return {"beside": ctx.unit_mean(ctx.forward(extra).loss, extra)}


@pytest.mark.parametrize("aligned", [False, True])
def test_a_pass_may_have_wrong_targets_a_common_mean_and_a_third_split(aligned):
    world = toy_world("tokens")
    method = Beside(aligned)
    ctx = Context(
        engine=quiet(),
        adapter=world.adapter,
        model=world.build(0),
        splits=replace(world.splits, streams={"beside": world.splits.holdout}),
        reads=method.reads,
        label="beside",
        seed=0,
    )
    method.run(ctx)
    assert len(method.seen) == 4
    known = dict(zip(world.splits.forget.ids, range(24), strict=True))
    places = dict(zip(world.splits.holdout.ids, range(24), strict=True))
    third = [[places[i] for i in extra.ids] for _, _, extra in method.seen]
    first = [[known[i] for i in forget.ids] for forget, _, _ in method.seen]
    assert (third == first) is aligned
    assert sorted(i for row in third for i in row) == list(range(24))
    for forget, retain, extra in method.seen:
        true = world.splits.forget.take([known[i] for i in forget.ids])["labels"]
        answer = true != -100
        assert not (forget.data["labels"] == true)[answer].any()
        whole = float(forget.units.sum() + retain.units.sum())
        assert forget.total_units == retain.total_units == pytest.approx(whole)
        assert forget.total == retain.total == 12
        assert extra.total_units == pytest.approx(float(extra.units.sum()))


def test_losses_at_the_start_are_kept_only_where_nothing_is_drawn():
    world = toy_world("tokens")
    ctx = context(quiet(), adapter=world.adapter, model=world.build(0))
    ctx._splits = world.splits
    kept = ctx.start_losses("forget")
    (batch,) = ctx.batches("forget", 24)
    wanted = ctx.forward(batch).loss.detach()
    assert [kept[i] for i in batch.ids] == pytest.approx(wanted.tolist(), rel=1e-6)
    assert context(quiet()).start_losses("forget") is None


def test_the_stop_rule_ends_a_run_after_the_step_that_passes_it(tmp_path):
    world = toy_world("tokens")

    def run(**settings):
        engine = quiet(log_every=3)
        method = make_loss_method(
            "grad_ascent", {"epochs": 4, "batch_size": 8, "lr": 0.5, **settings}, "method"
        )
        ctx = context(engine, adapter=world.adapter, model=world.build(0))
        ctx._splits = world.splits
        events = tmp_path / f"{settings}.jsonl"
        with engine.recording("stop", {}, events):
            model = method.run(ctx)
        return model, [json.loads(line) for line in events.read_text().splitlines()]

    _, whole = run()
    losses = [event["forget"] for event in whole]
    assert len(losses) == 12
    level = (losses[4] + losses[5]) / 2
    first = next(k for k, loss in enumerate(losses, 1) if loss < level)
    stopped, events = run(stop_below=level)
    assert [e["forget"] for e in events if "forget" in e] == losses[:first]
    assert events[-1] == {"step": first, "stopped": 1.0}
    assert same(stopped, run(max_steps=first)[0])
    assert not same(stopped, run()[0])
