"""Losses on hand-made batches against their formulas, in probabilities of four classes."""

from math import exp, log

import numpy as np
import pytest
import torch

from mmforget.errors import ConfigError
from mmforget.methods.base import make_loss_method
from mmforget.methods.salun import largest
from mmforget.registry import METHODS
from mmforget.testing.contract import Case, check_close, check_resume, check_same, run_case
from mmforget.testing.toys import toy_world
from tests.parity.methods import Held, HeldClasses, Rows, batches, context

torch.set_num_threads(1)

# θ0 and θ: two examples a split, the probabilities of four classes each, and the true classes.
FORGET0 = [[0.7, 0.1, 0.1, 0.1], [0.2, 0.6, 0.1, 0.1]]
FORGET = [[0.4, 0.3, 0.2, 0.1], [0.5, 0.2, 0.2, 0.1]]
RETAIN0 = [[0.1, 0.1, 0.7, 0.1], [0.25, 0.25, 0.25, 0.25]]
RETAIN = [[0.2, 0.2, 0.5, 0.1], [0.1, 0.2, 0.3, 0.4]]
BAD = [[0.3, 0.3, 0.2, 0.2], [0.1, 0.4, 0.1, 0.4]]
LABELS = {"forget": [0, 1], "retain": [2, 3]}

CE_FORGET = -(log(0.4) + log(0.2)) / 2
CE_RETAIN = -(log(0.5) + log(0.4)) / 2


def kl(teacher, student, temperature=1.0):
    """Mean over rows of KL(teacher ‖ student) at a temperature, without the factor T²."""
    t, s = (np.array(p) ** (1 / temperature) for p in (teacher, student))
    t, s = t / t.sum(1, keepdims=True), s / s.sum(1, keepdims=True)
    return float((t * np.log(t / s)).sum(1).mean())


def setup(name, settings, union=False):
    """Return the method at θ, its context, and one batch of each split."""
    data = {split: Rows(split, "y", labels, "x") for split, labels in LABELS.items()}
    model = Held(forget=np.log(FORGET0), retain=np.log(RETAIN0))
    bad = Held(forget=np.log(BAD), retain=np.log(BAD))
    method = make_loss_method(name, settings, "method")
    ctx = context(method, HeldClasses(), model, data, bad)
    model.set(forget=np.log(FORGET), retain=np.log(RETAIN))
    return method, ctx, batches(ctx, data, union)


def terms(name, union=False, **settings):
    method, ctx, made = setup(name, settings, union)
    found = method.loss(ctx, made["forget"], made["retain"])
    return {key: value.item() for key, value in found.items()}


def test_finetune():
    assert terms("finetune") == pytest.approx({"retain": CE_RETAIN})


def test_grad_ascent():
    assert terms("grad_ascent") == pytest.approx({"forget": -CE_FORGET})


def test_grad_ascent_above_the_ceiling_gives_no_gradient():
    method, ctx, made = setup("grad_ascent", {"max_loss": 1.0})
    value = method.loss(ctx, made["forget"], None)["forget"]
    assert value.item() == pytest.approx(-(-log(0.4) + 1.0) / 2)
    (grad,) = ctx.gradients(value, [ctx.model.logits["forget"]])
    assert grad[0].abs().max() > 0.1
    assert torch.equal(grad[1], torch.zeros(4, dtype=torch.float64))


def test_grad_diff():
    found = terms("grad_diff", forget_weight=0.3, retain_weight=2.0)
    assert found == pytest.approx({"forget": -0.3 * CE_FORGET, "retain": 2 * CE_RETAIN})


@pytest.mark.parametrize("anchor", ["forget", "retain"])
def test_grad_diff_pulls_to_the_original_weights(anchor):
    moved = np.log(FORGET) - np.log(FORGET0), np.log(RETAIN) - np.log(RETAIN0)
    distance = sum(float((part**2).sum()) for part in moved)
    assert terms("grad_diff", pull=0.1, anchor=anchor)["pull"] == pytest.approx(0.1 * distance)


@pytest.mark.parametrize("reference", [False, True])
def test_kl_retain(reference):
    found = terms("kl_retain", forget_weight=0.5, retain_weight=3.0, reference=reference)
    wanted = {"forget": -0.5 * CE_FORGET, "retain": 3 * kl(RETAIN0, RETAIN)}
    assert found == pytest.approx(wanted)


def test_npo():
    beta = 0.4
    ratios = [0.4 / 0.7, 0.2 / 0.6]  # p / p_original; -log σ(-β·log r) = log(1 + r^β)
    wanted = 2 / beta * sum(log(1 + ratio**beta) for ratio in ratios) / 2
    found = terms("npo", beta=beta, forget_weight=2.0)
    assert found == pytest.approx({"forget": 2 * wanted, "retain": CE_RETAIN})
    assert terms("npo", beta=beta, ratio="mean")["forget"] == pytest.approx(wanted)


def test_npo_towards_zero_beta_is_gradient_ascent():
    method, ctx, made = setup("npo", {"beta": 1e-6})
    (found,) = ctx.gradients(method.loss(ctx, made["forget"], None)["forget"], _forget(ctx))
    method, ctx, made = setup("grad_ascent", {})
    (wanted,) = ctx.gradients(method.loss(ctx, made["forget"], None)["forget"], _forget(ctx))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def _forget(ctx):
    return [ctx.model.logits["forget"]]


def test_npo_retain_terms():
    assert terms("npo", retain="kl")["retain"] == pytest.approx(kl(RETAIN0, RETAIN))
    assert "retain" not in terms("npo", retain_weight=0.0)


@pytest.mark.parametrize(("paper", "margin"), [(False, 2.0 * 0.3), (True, 0.3)])
def test_simnpo(paper, margin):
    found = terms("simnpo", beta=2.0, delta=0.3, paper_margin=paper, forget_weight=0.5)
    wanted = sum(log(1 + exp(-(-2.0 * log(p) - margin))) for p in (0.4, 0.2)) / 2
    assert found == pytest.approx({"forget": 0.5 * wanted, "retain": CE_RETAIN})


def test_scrub():
    found = terms("scrub", gamma=0.9, alpha=0.2, temperature=2.0)
    wanted = {
        "forget": -kl(FORGET0, FORGET, 2.0) * 4,
        "retain": 0.9 * CE_RETAIN,
        "retain_kl": 0.2 * kl(RETAIN0, RETAIN, 2.0) * 4,
    }
    assert found == pytest.approx(wanted)


def test_scrub_ends_every_epoch_with_a_min_step():
    method = make_loss_method("scrub", {"max_epochs": 2}, "method")
    names = [[run.name for run in method.passes(epoch)] for epoch in range(3)]
    assert names == [["max", "min"], ["max", "min"], ["min"]]
    sizes = {run.anchor: run.batch_size for run in method.passes(0)}
    assert sizes == {"forget": 64, "retain": 32}


@pytest.mark.parametrize(("reference", "share"), [(False, 1.0), (True, 0.25)])
def test_bad_teacher(reference, share):
    found = terms("bad_teacher", union=True, temperature=2.0, reference=reference)
    wanted = {"forget": kl(BAD, FORGET, 2.0) / 2, "retain": kl(RETAIN0, RETAIN, 2.0) / 2}
    assert found == pytest.approx({key: share * value for key, value in wanted.items()})


def test_bad_teachers_random_network_is_another_one():
    case = Case("bad_teacher", {"epochs": 1}, toy_world("classes"))
    outcome = run_case(case)
    random, original = outcome.method.incompetent, outcome.method.competent
    check_same(original, case.world.build(0), "the competent teacher")
    assert not torch.equal(random.head.weight, original.head.weight)


@pytest.mark.parametrize(("epoch", "factor"), [(0, 1.0), (3, 0.25), (4, 0.0)])
def test_l1_sparse(epoch, factor):
    method, ctx, made = setup("l1_sparse", {"epochs": 5, "free_epochs": 1, "gamma": 0.01})
    ctx.epoch = epoch
    found = method.loss(ctx, None, made["retain"])
    norm = float(np.abs(np.log(FORGET)).sum() + np.abs(np.log(RETAIN)).sum())
    assert found["retain"].item() == pytest.approx(CE_RETAIN)
    assert ("l1" in found) == (factor > 0)
    if factor > 0:
        assert found["l1"].item() == pytest.approx(0.01 * factor * norm)


@pytest.mark.parametrize("exclude", [False, True])
def test_random_label(exclude):
    method, ctx, made = setup("random_label", {"exclude_true": exclude})
    found = method.loss(ctx, made["forget"], made["retain"])
    forget = made["forget"]
    wrong = ctx.adapter.relabel(forget.data, forget.draws("relabel"), exclude)["y"].tolist()
    wanted = -(log(FORGET[0][wrong[0]]) + log(FORGET[1][wrong[1]])) / 2
    assert found["forget"].item() == pytest.approx(wanted)
    assert found["retain"].item() == pytest.approx(CE_RETAIN)
    assert forget.data["y"].tolist() == LABELS["forget"]  # relabelling returns a copy


def test_random_labels_are_drawn_anew_and_all_of_them():
    world = toy_world("classes")
    drawn = []
    relabel = world.adapter.relabel

    def note(data, draws, exclude_true):
        made = relabel(data, draws, exclude_true)
        drawn.append((data["y"], made["y"]))
        return made

    world.adapter.relabel = note
    for exclude in (False, True):
        drawn.clear()
        settings = {"epochs": 8, "batch_size": 24, "exclude_true": exclude, "lr": 0.0}
        run_case(Case("random_label", settings, world))
        true, wrong = (torch.cat(part) for part in zip(*drawn, strict=True))
        assert len({tuple(part.tolist()) for _, part in drawn}) == 8
        assert (true == wrong).any() != exclude
        assert set(wrong.tolist()) == {0, 1, 2, 3}


def test_random_label_ends_with_retain_steps():
    method = make_loss_method("random_label", {}, "method")
    assert [run.anchor for run in method.passes(0)] == ["forget", "retain"]


STEPS = {"epochs": 2, "lr": 0.05, "batch_size": 12, "momentum": 0.9, "weight_decay": 0.1}


def delta(model, start):
    return {name: value - start[name] for name, value in model.state_dict().items()}


def test_task_vector_goes_the_other_way():
    world = toy_world("classes")
    start = world.build(0).state_dict()
    runs = {
        strength: run_case(Case("task_vector", {**STEPS, "strength": strength}, world)).model
        for strength in (0.0, 1.0, 2.0)
    }
    check_same(runs[0.0], world.build(0), "a strength of 0")
    one, two = delta(runs[1.0], start), delta(runs[2.0], start)
    for name, value in one.items():
        torch.testing.assert_close(two[name], 2 * value, rtol=1e-4, atol=1e-6)
    loss = {s: mean_loss(world, model, "forget") for s, model in runs.items()}
    assert loss[0.0] < loss[1.0] < loss[2.0]


def test_task_vector_keeps_the_buffers():
    world = toy_world("classes")
    model = run_case(Case("task_vector", {**STEPS, "norm": "train"}, world)).model
    for name, buffer in world.build(0).named_buffers():
        assert torch.equal(model.get_buffer(name), buffer)


def mean_loss(world, model, split, shift=0.0):
    with torch.no_grad():
        dataset = world.splits.get(split)
        data = dataset.take(range(len(dataset)))
        return float(world.adapter.forward(model.eval(), data).loss.mean())


def test_largest_ranks_all_tensors_together():
    values = [torch.tensor([[3.0, -1.0], [0.0, 2.0]]), torch.tensor([-5.0, 2.0])]
    masks = largest(values, 0.5)
    assert [mask.tolist() for mask in masks] == [[[True, False], [False, True]], [True, False]]
    assert sum(int(mask.sum()) for mask in largest(values, 0.99)) == 5  # floor(0.99 · 6)
    assert not any(mask.any() for mask in largest(values, 0.0))


def test_salun_leaves_masked_weights_at_the_start_despite_momentum_and_decay():
    world = toy_world("classes")
    outcome = run_case(Case("salun", {"ratio": 0.3, "inner": STEPS}, world))
    start, kept, changed = world.build(0).state_dict(), 0, 0
    masks = zip(outcome.ctx.trainable.items(), outcome.method.masks, strict=True)
    for (name, weight), mask in masks:
        assert torch.equal(weight[~mask], start[name][~mask])
        kept += int(mask.sum())
        changed += int((weight != start[name]).sum())
    assert kept == int(0.3 * 412)
    assert changed > 0.9 * kept


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_salun_with_every_weight_is_the_inner_method(optimizer):
    world, inner = toy_world("classes"), {**STEPS, "optimizer": optimizer, "lr": 0.01}
    salun = run_case(Case("salun", {"ratio": 1.0, "inner": inner}, world))
    plain = run_case(Case("random_label", inner, world))
    check_same(salun.model, plain.model, "a full mask")
    none = run_case(Case("salun", {"ratio": 0.0, "inner": inner}, world))
    check_same(none.model, world.build(0), "an empty mask")


def test_sam_without_a_radius_is_the_inner_method():
    world, inner = toy_world("tokens"), {"name": "grad_diff", "pull": 0.1, **STEPS}
    sam = run_case(Case("sam", {"rho": 0.0, "inner": inner}, world))
    plain = run_case(Case("grad_diff", {k: v for k, v in inner.items() if k != "name"}, world))
    check_close(sam.model, plain.model, "a radius of 0")
    wide = run_case(Case("sam", {"rho": 1.0, "inner": inner}, world))
    with pytest.raises(AssertionError):
        check_close(wide.model, plain.model, "a radius of 1")


def test_sam_evaluates_forget_twice_and_retain_once():
    world = toy_world("classes")
    seen = []
    forward = world.adapter.forward

    def note(model, data):
        seen.append(len(data["y"]))
        return forward(model, data)

    world.adapter.forward = note
    inner = {"name": "grad_diff", "max_steps": 1, "batch_size": 5, "anchor": "retain"}
    run_case(Case("sam", {"inner": {**inner, "scope": "head"}}, world))
    assert seen == [5, 5, 5]


def test_sam_restores_every_bit():
    world = toy_world("classes")
    outcome = run_case(Case("sam", {"rho": 1.0, "inner": {"lr": 0.0, "epochs": 1}}, world))
    check_same(outcome.model, world.build(0), "looking at radius 1")


def test_scrub_rewinds_to_the_epoch_closest_to_validation(tmp_path):
    world = toy_world("classes")
    settings = {**STEPS, "schedule": "constant", "optimizer": "sgd", "weight_decay": 0.0}
    settings |= {"max_epochs": 4, "forget_batch_size": 6, "retain_batch_size": 36}
    epochs = [run_case(Case("scrub", {**settings, "epochs": n}, world)).model for n in range(1, 6)]
    losses = [mean_loss(world, model, "forget") for model in epochs]
    target = mean_loss(world, epochs[-1], "val")
    best = int(np.argmin([abs(loss - target) for loss in losses]))
    case = Case("scrub", {**settings, "epochs": 5, "rewind": True}, world)
    rewound = run_case(case)
    check_same(rewound.model, epochs[best], "rewinding")
    assert best != 4  # or the test would show nothing
    assert rewound.method.reads == {"forget", "retain", "val"}
    check_resume(case, rewound, tmp_path)


def test_original_and_retrain():
    world = toy_world("classes")
    asked = []

    class Stub:
        model = world.build(0)

        def retrain(self, seed):
            asked.append(seed)
            return world.build(9)

    for settings in ({}, {"seed": 4}):
        cls = METHODS.get("retrain")
        made = cls(cls.config_type(**settings)).run(Stub())
        check_same(made, world.build(9), "retraining")
    assert asked == [None, 4]
    cls = METHODS.get("original")
    assert cls(cls.config_type()).run(Stub()) is Stub.model


def test_wrappers_want_a_loss_method():
    with pytest.raises(ConfigError, match=r"method\.inner\.name=original"):
        make_loss_method("salun", {"inner": {"name": "original"}}, "method")
    with pytest.raises(ConfigError, match=r"method\.inner\.betta"):
        make_loss_method("sam", {"inner": {"betta": 1}}, "method")
