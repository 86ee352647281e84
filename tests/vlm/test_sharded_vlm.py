"""A vision-language model whose weights are cut over two processes is trained like a whole one.

`torchrun --nproc_per_node 2 -m tests.vlm.test_sharded_vlm FOLDER` runs the cases cut.
"""

import copy
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmforget.checkpoint import read_state, save_model
from mmforget.context import Context
from mmforget.engine import Engine, Runtime
from mmforget.errors import ConfigError
from mmforget.methods.base import make_loss_method
from mmforget.sharding import gathered, sharded
from mmforget.testing.contract import Case, run_case
from mmforget.testing.launched import launch, leave
from mmforget.training import make_optimizer
from mmforget.types import Training, subset
from tests.vlm.test_methods import PLAIN, RMU_PLAIN, Made, make_world

torch.set_num_threads(1)

LOW = {**PLAIN, "scope": "lora"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "adapters alone": ("npo", LOW),
    "adapters, and the original with them off": ("kl_retain", {**LOW, "clip_norm": 0.1}),
    "all weights, and a second model": ("vlm/undial", {**PLAIN, "retain_weight": 1.0}),
    "a third stream": ("vlm/idkpd", {"inner": LOW}),
    "hidden states": ("vlm/rmu", {**RMU_PLAIN, "scope": "language"}),
    "hidden states of adapters": ("vlm/rmu", {**RMU_PLAIN, "scope": "lora", "lr": 0.05}),
    "a mask": ("salun", {"inner": {"name": "npo", **LOW}}),
}


def run(made: Made, fsdp: str) -> dict[str, nn.Module]:
    return {
        key: run_case(Case(name, settings, made.world), fsdp=fsdp, precision="fp64").model
        for key, (name, settings) in CASES.items()
    }


def held(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors on this process."""
    local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return sum(weight.numel() * weight.element_size() for weight in local)


def measure(made: Made) -> dict[str, Any]:
    """Return what this process holds of the model, and what mixed batches raise."""
    method = make_loss_method("npo", PLAIN, "method")
    model = copy.deepcopy(made.start)
    ctx = Context(
        engine=Engine(Runtime(device="cpu", fsdp="full", progress=False)),
        adapter=made.adapter,
        model=model,
        splits=made.world.splits,
        reads=method.reads,
        label="npo",
        seed=0,
    )
    ctx.scope("all")
    whole = held(model.parameters())
    with sharded(ctx):
        cut, empty = held(ctx.model.parameters()), held(model.parameters())
        inside = ctx.model.sharded
        optimizer = make_optimizer(Training(optimizer="adam", lr=0.0), list(ctx.trainable.values()))
        for weight in ctx.trainable.values():
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        moments = held(
            value
            for kept in optimizer.state.values()
            for value in kept.values()
            if isinstance(value, Tensor) and value.dim()
        )
        saved = gathered(optimizer.state_dict()["state"], keep=ctx.engine.is_main)
        first = saved[0]["exp_avg"]
        trained = held(ctx.trainable.values())
        bare = [replace(item, image=None) for item in made.world.splits.forget.items[:2]]  # type: ignore[attr-defined]
        batch = next(iter(ctx.batches("forget", 2)))
        try:
            ctx.adapter.forward(ctx.model, made.adapter.answered(batch.data, bare))
            said = ""
        except ConfigError as error:
            said = str(error)
        rows = ctx.engine.predict(ctx.model, ctx.adapter, subset(ctx.split("forget"), [0]), 0)
    same = all(
        torch.equal(a, b) for a, b in zip(model.parameters(), made.start.parameters(), strict=True)
    )
    return {
        "whole": whole,
        "cut": cut,
        "empty": empty,
        "moments": moments / trained,
        "saved": None if first is None else type(first) is Tensor and first.device.type == "cpu",
        "inside": inside,
        "after": ctx.model.sharded or ctx.model is not model,
        "same": same,
        "said": said,
        "rows": len(rows["loss"]),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("sharded")
    launch("tests.vlm.test_sharded_vlm", made)
    return made


def test_two_processes_with_cut_weights_give_those_of_one(folder: Path, tmp_path: Path) -> None:
    made = make_world(tmp_path)
    for index, (key, model) in enumerate(run(made, "no").items()):
        cut = read_state(folder / f"{index}.safetensors")
        state = model.state_dict()
        assert cut.keys() == state.keys()
        start = made.start.state_dict()
        moved = [n for n, v in state.items() if n not in start or not torch.equal(v, start[n])]
        assert moved, key
        for name, value in state.items():
            far = float((cut[name] - value).abs().max())
            assert far <= 1e-9, f"{key}: {name} differs by {far:.2g}"


def test_a_process_holds_its_part_and_gives_the_whole_back(folder: Path) -> None:
    for rank in range(2):
        found = json.loads((folder / f"{rank}.json").read_text())
        assert 0.45 < found["cut"] / found["whole"] < 0.6 and found["empty"] == 0
        assert found["moments"] == 2
        assert found["saved"] is (True if rank == 0 else None)
        assert found["inside"] and not found["after"] and found["same"]
        assert "an image in every item" in found["said"]
        assert found["rows"] == 1  # fewer batches than processes


def main(folder: Path) -> None:
    """Run the cases cut, and write models and measures."""
    rank = int(os.environ["RANK"])
    pictures = folder / f"pictures {rank}"
    pictures.mkdir()
    made = make_world(pictures)
    for index, model in enumerate(run(made, "full").values()):
        if rank == 0:
            save_model(model, folder / f"{index}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(measure(made)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
