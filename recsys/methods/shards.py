"""What methods that retrain shards share: training one, going on after a kill, naming its state."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mmforget.checkpoint import fit_state, load_state, save_state
from mmforget.context import Context
from mmforget.recsys.backbones.base import Recommender
from mmforget.recsys.data import Interactions
from mmforget.rng import derive


def pairs_of(ctx: Context, name: str) -> Interactions:
    """Return a split as pairs of user and item."""
    found = ctx.split(name)
    assert isinstance(found, Interactions)
    return found


def fresh_shard(ctx: Context, shard: int) -> Recommender:
    """Return the untrained model of a shard; its initial weights depend on seed and shard alone."""
    model = ctx.fresh_model(derive(ctx.seed, "shard", shard))
    assert isinstance(model, Recommender)
    return model


def train_shard(
    ctx: Context,
    model: Recommender,
    data: Interactions,
    shard: int,
    stage: int = 0,
    resume: Path | None = None,
) -> Recommender:
    """Train a shard's model on its pairs by the benchmark's own recipe, and return it.

    Order and draws depend on the run's seed, the shard and the stage alone, so that a shard without
    forgotten pairs is what it would be had they never been there. Shards are trained one after
    another. As one batched model (a block-diagonal graph) they would take fewer and larger steps of
    equal total work: on a CPU nothing is gained, and equal bits would be lost.

    Args:
        ctx: The run.
        model: Changed in place.
        data: The shard's pairs; with none the model stays as it is, on a graph without edges.
        shard: The shard.
        stage: The stage of its training.
        resume: Folder for checkpoints of this run's shards; one that was finished is loaded.
    """
    folder = None if resume is None else resume / f"shard-{shard}-{stage}"
    done = load_state(folder / "finished") if folder is not None else None
    if folder is not None and done is not None:
        tensors, scalars = done
        fit_state(model, tensors, folder)
        ctx.engine.meter.load_state(scalars["cost"])
        return model.eval()
    if not len(data):
        model.keep(torch.empty(0, dtype=torch.int64))
        return model.eval()
    trained = ctx.train(model, data, derive(ctx.seed, "shard", shard, "stage", stage), folder)
    assert isinstance(trained, Recommender)
    if folder is not None:
        if ctx.engine.is_main:
            cost = ctx.engine.meter.state()
            save_state(folder / "finished", state_of(trained), {"cost": cost})
        ctx.engine.barrier()
    return trained


def state_of(model: Recommender, prefix: str = "") -> dict[str, Tensor]:
    """Return copies of a model's weights and persistent buffers, with a prefix to their names."""
    return {prefix + name: value.detach().clone() for name, value in model.state_dict().items()}


def below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
