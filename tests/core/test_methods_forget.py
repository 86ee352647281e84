"""Every removal method brings a model that memorised closer to one retrained without forget."""

import pytest
import torch

from mmforget.engine import Engine, Runtime
from mmforget.testing.contract import Case, run_case
from mmforget.testing.toys import toy_world
from mmforget.training import fit
from mmforget.types import Training

torch.set_num_threads(1)

WORLD = toy_world("classes")
RECIPE = Training(epochs=120, lr=0.01, optimizer="adam", batch_size=32, norm="train")


@pytest.fixture(scope="module")
def trained():
    engine = Engine(Runtime(device="cpu", progress=False))
    splits, adapter = WORLD.splits, WORLD.adapter
    original = fit(engine, WORLD.build(0), adapter, splits.train, RECIPE, seed=0)
    retrained = fit(engine, WORLD.build(0), adapter, splits.retain, RECIPE, seed=0)
    return original, retrained


def loss(model, split):
    with torch.no_grad():
        dataset = WORLD.splits.get(split)
        data = dataset.take(range(len(dataset)))
        return float(WORLD.adapter.forward(model.eval(), data).loss.mean())


def test_the_original_memorised_what_the_retrained_never_saw(trained):
    original, retrained = trained
    assert loss(original, "forget") < 0.2
    assert loss(retrained, "forget") > 1.0
    assert loss(retrained, "retain") < 0.2


STEPS = {"batch_size": 24, "lr": 0.01, "optimizer": "adam"}
SETTINGS = {
    "finetune": {**STEPS, "epochs": 100, "lr": 0.02},
    "grad_ascent": {**STEPS, "epochs": 7, "max_loss": 2.0},
    "grad_diff": {**STEPS, "epochs": 25, "max_loss": 2.0},
    "kl_retain": {**STEPS, "epochs": 25, "max_loss": 2.0},
    "random_label": {**STEPS, "epochs": 15},
    "npo": {**STEPS, "epochs": 20, "beta": 1.0},
    "simnpo": {**STEPS, "epochs": 20, "beta": 1.0, "forget_weight": 1.0},
    "scrub": {"epochs": 6, "max_epochs": 3, "lr": 0.01, "forget_batch_size": 12, "weight_decay": 0},
    "bad_teacher": {**STEPS, "epochs": 15, "retain_fraction": 1.0},
    "l1_sparse": {**STEPS, "epochs": 60, "gamma": 1e-3},
    "salun": {"inner": {**STEPS, "epochs": 15}},
    "sam": {"inner": {**STEPS, "epochs": 20, "beta": 1.0}},
    "task_vector": {**STEPS, "epochs": 10, "strength": 1.5},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_forgetting_moves_towards_the_retrained_model(name, trained):
    original, retrained = trained
    outcome = run_case(Case(name, SETTINGS[name], WORLD), model=original)
    before, after, goal = (loss(m, "forget") for m in (original, outcome.model, retrained))
    assert before < after
    assert abs(after - goal) < 0.8 * abs(before - goal), (before, after, goal)
    if "retain" in outcome.method.reads:
        assert loss(outcome.model, "retain") < 0.5
