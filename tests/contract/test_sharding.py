"""Training cut over two processes gives the weights of one; what cannot be cut says so.

`torchrun --nproc_per_node 2 -m tests.contract.test_sharding FOLDER` trains a model of experts cut.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from mmforget.checkpoint import read_state, save_model
from mmforget.engine import Engine, Runtime
from mmforget.errors import ConfigError
from mmforget.methods.base import make_loss_method
from mmforget.sharding import blocks, check_sharding
from mmforget.testing.contract import Case, run_case
from mmforget.testing.launched import launch, leave, run_cases
from mmforget.testing.toys import toy_world
from tests.contract.test_contract import PLAIN, SETTINGS

torch.set_num_threads(1)

ODD = {"batch_size": 13, "clip_norm": 0.1}  # parts of unequal size, and a norm over all shards
RUN = ("npo", {**PLAIN, **ODD, "optimizer": "adamw", "lr": 0.01}, "tokens")
WORLDS = ("classes", "tokens", "noise")  # the graph's model is called without a batch


def cut(key):
    name, settings = SETTINGS[key]
    return not make_loss_method(name, settings, "method").whole


def case(name, settings, world, **options):
    return {"name": name, "settings": settings, "world": world, "precision": "fp64", **options}


CASES = [
    case(*SETTINGS[key], WORLDS[k % 3], fsdp=("full", "gradients")[k % 2])
    for k, key in enumerate(key for key in SETTINGS if cut(key))
]
CASES += [case(*RUN, fsdp="full", accumulation=3), case(*RUN, fsdp="gradients", accumulation=2)]
# Fewer rows than processes; batch statistics over all of them.
CASES += [case("finetune", {**PLAIN, "batch_size": 1, "max_steps": 5}, "noise", fsdp="full")]
CASES += [case("grad_diff", {**PLAIN, "norm": "train"}, "classes", fsdp="full")]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Run all cases on two processes; return the folder."""
    folder = tmp_path_factory.mktemp("launched")
    stopped = {**RUN[1], "max_steps": 2}
    run_case(Case(RUN[0], stopped, toy_world(RUN[2])), resume=folder / "one", precision="fp64")
    more = [
        case(*RUN, fsdp="full", resume=str(folder / "one")),
        case(RUN[0], stopped, RUN[2], fsdp="full", resume=str(folder / "two")),
    ]
    file = folder / "cases.json"
    file.write_text(json.dumps([*CASES, *more]))
    launch("mmforget.testing.launched", file, folder)
    assert (folder / "processes").read_text() == "2"
    return folder


def assert_same(found, wanted, what):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        far = (found[name].double() - value.double()).abs().max()
        assert far <= 1e-9, f"{what}: {name} differs by {far:.2g}"


def test_two_processes_with_cut_weights_give_those_of_one(launched, tmp_path):
    run_cases([{**each, "fsdp": "no"} for each in CASES], tmp_path)
    for index, each in enumerate(CASES):
        alone = read_state(tmp_path / f"{index}.safetensors")
        start = toy_world(each["world"]).build(0).state_dict()
        assert any(not torch.equal(alone[name], start[name]) for name in start), each
        assert_same(read_state(launched / f"{index}.safetensors"), alone, each)


def test_a_killed_run_goes_on_with_another_sharding(launched):
    world = Case(RUN[0], RUN[1], toy_world(RUN[2]))
    whole = run_case(world, precision="fp64").model.state_dict()
    assert_same(read_state(launched / f"{len(CASES)}.safetensors"), whole, "one, then two")
    found = run_case(world, resume=launched / "two", precision="fp64")
    assert_same(found.model.state_dict(), whole, "two, then one")
    assert found.ctx.engine.meter.steps > 2


class Experts(nn.Module):
    """Rows go to one of two experts by the sign of a feature, and none to the third."""

    def __init__(self, width, classes):
        super().__init__()
        self.experts = nn.ModuleDict({str(k): nn.Linear(width, classes) for k in range(3)})

    def forward(self, x):
        chosen = (x[:, 0] > 0).long()
        made = x.new_zeros(len(x), self.experts["0"].out_features)
        for k in range(2):
            rows = chosen == k
            if rows.any():
                made[rows] = self.experts[str(k)](x[rows])
        return made


def train_experts(fsdp):
    """Train with batches of two, whose rows mostly go to different experts; return model, start."""
    world = toy_world("classes")
    width, classes = world.build(0).body[0].in_features, world.build(0).head.out_features
    torch.manual_seed(0)
    start = Experts(width, classes).double()
    settings = {**PLAIN, "batch_size": 2, "weight_decay": 0.1, "max_steps": 12}
    each = Case("finetune", settings, replace(world, build=lambda seed: start))
    return run_case(each, model=start, fsdp=fsdp, precision="fp64").model, start


def test_processes_may_call_different_weights(tmp_path):
    launch("tests.contract.test_sharding", tmp_path)
    alone, start = train_experts("no")
    assert_same(read_state(tmp_path / "experts.safetensors"), alone.state_dict(), "experts")
    moved = [
        not torch.equal(a, b) for a, b in zip(alone.parameters(), start.parameters(), strict=True)
    ]
    assert moved == [True] * 4 + [False] * 2  # the third is not even decayed


@pytest.mark.parametrize("key", [key for key in SETTINGS if not cut(key)])
def test_methods_on_whole_weights_say_so(key):
    name, settings = SETTINGS[key]
    outcome = run_case(Case(name, {**settings}, toy_world("tokens")))
    outcome.ctx.engine.runtime = Runtime(fsdp="full")
    with pytest.raises(ConfigError, match=f"{name} works on whole weights.*runtime.fsdp=no"):
        check_sharding(outcome.ctx, outcome.method)


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(ConfigError, match="one process"):
        Engine(Runtime(device="cpu", fsdp="full"))


def test_outermost_lists_are_cut():
    inner = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    layer = nn.Sequential()
    layer.add_module("experts", inner)
    model = nn.Sequential()
    model.add_module("tower", nn.Sequential())
    model.tower.add_module("layers", nn.ModuleList([nn.Linear(2, 2), nn.ReLU()]))
    model.add_module("layers", nn.ModuleList([layer]))
    assert blocks(model) == [model.tower.layers[0], layer]
    assert blocks(nn.Linear(2, 2)) == []


def main(folder):
    """Train experts cut, and write them."""
    model, _ = train_experts("full")
    if os.environ["RANK"] == "0":
        save_model(model, folder / "experts.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
