"""Images that metrics look at: generated once for each model, kept on disk, read a batch at a time.

Every metric of generated images asks here, so that a model draws an image once, whichever metrics,
runs or processes need it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmforget.diffusion.answers import Ordered, fill, fingerprint, place_of, read
from mmforget.diffusion.benchmarks.base import DiffusionBenchmark
from mmforget.diffusion.models import DiffusionModel
from mmforget.errors import ConfigError
from mmforget.types import Benchmark, ModelView

BATCH = 64  # images read at a time


def diffusion(benchmark: Benchmark) -> DiffusionBenchmark:
    """Return the benchmark as one of this modality.

    Raises:
        ConfigError: It is none.
    """
    if not isinstance(benchmark, DiffusionBenchmark):
        raise ConfigError("metrics of generated images need a benchmark of the diffusion modality")
    return benchmark


def folder(view: ModelView, benchmark: DiffusionBenchmark) -> Path:
    """Return the folder of a model's images, generating those that are not there yet."""

    def make(own: ModelView) -> Path:
        model = own.model
        assert isinstance(model, DiffusionModel)
        made = fingerprint(model, benchmark.sampling)
        place = place_of(benchmark.store, made)
        engine = benchmark.engine
        share = (0, 1) if engine is None else (engine.rank, engine.world)
        orders = [order for group in benchmark.image_sets().values() for order in group]
        fill(place, model, orders, benchmark.sampling, share=share, made=made)
        if engine is not None:
            engine.barrier()
        return place

    return view.memo("generated images", make)


def batches(
    view: ModelView, benchmark: DiffusionBenchmark, orders: Sequence[Ordered]
) -> Iterator[Tensor]:
    """Yield a model's images uint8 [B, 3, H, W] in the given order."""
    place = folder(view, benchmark)
    for start in range(0, len(orders), BATCH):
        yield read(place, [order.name for order in orders[start : start + BATCH]])


def images(view: ModelView, benchmark: DiffusionBenchmark, orders: Sequence[Ordered]) -> Tensor:
    """Return a model's images uint8 [N, 3, H, W]: for few of them."""
    return torch.cat(list(batches(view, benchmark, orders)))
