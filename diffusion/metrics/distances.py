"""FID, KID and CMMD of the generated images that should have stayed as they are."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from mmforget.diffusion.benchmarks.base import DiffusionBenchmark
from mmforget.diffusion.benchmarks.unlearncanvas import UnlearnCanvas
from mmforget.diffusion.distances import Moments, cmmd, convention, fid, kid
from mmforget.diffusion.features import (
    CanvasInception,
    ClassifierFeatures,
    Extractor,
    OpenClip,
    image_batches,
)
from mmforget.diffusion.metrics import generated
from mmforget.errors import CheckpointError
from mmforget.record import MetricValue
from mmforget.types import Metric, ModelView, Trial


class Distances(Metric):
    """Distances between image sets, without what was to be forgotten; down.

    - `distance/fid`, `distance/kid`: to real images (UnlearnCanvas: images 1 to 5 of every other
      style and object, photos included); for benchmarks without real images, to the original
      model's pictures at the same prompts and seeds.
    - `distance/cmmd`: the same by CLIP, where `judges.clip_weights` is given.

    Values are comparable only within one feature extractor and one number of images; the note says
    which. Where Inception's weights are not at hand, features are the style classifier's.
    """

    citation: ClassVar[str] = (
        "Heusel et al., NeurIPS 2017; Binkowski et al., ICLR 2018; Jayasumana et al., CVPR 2024"
    )

    def compute(self, trial: Trial) -> Mapping[str, MetricValue]:
        """Return the values."""
        bench = generated.diffusion(trial.benchmark)
        extract = _extractor(bench)
        values = {}
        if extract is not None:
            real = self._other(trial, bench, extract)
            own = _features(trial.view, bench, extract)
            for name, value in (
                ("fid", fid(Moments().update(own), Moments().update(real))),
                ("kid", kid(own, real).value),
            ):
                note = convention(name, extract.name, len(own), len(real))
                values[f"distance/{name}"] = MetricValue(value, "down", n=len(own), note=note)
        if bench.judges.clip_weights is not None:
            clip = OpenClip(bench.judges.clip, bench.judges.clip_weights, device=_device(bench))
            own, real = _features(trial.view, bench, clip), self._other(trial, bench, clip)
            note = convention("cmmd", clip.name, len(own), len(real))
            values["distance/cmmd"] = MetricValue(cmmd(own, real), "down", n=len(own), note=note)
        return values

    @staticmethod
    def _other(trial: Trial, bench: DiffusionBenchmark, extract: Extractor) -> Tensor:
        """Return features [N, D] of what generated images are compared with."""
        if not isinstance(bench, UnlearnCanvas):
            return _features(trial.original, bench, extract)
        gone = bench.targets
        chosen = [
            row.path
            for row in bench.rows
            if row.k <= bench.config.real_images
            and not any(target.holds(row.style, row.object) for target in gone)
        ]
        return _kept(trial.original, ("real", extract.name), lambda: image_batches(chosen), extract)


def _features(view: ModelView, bench: DiffusionBenchmark, extract: Extractor) -> Tensor:
    orders = bench.image_sets()["retain"]
    return _kept(
        view,
        ("features", extract.name),
        lambda: generated.batches(view, bench, orders),
        extract,
    )


def _kept(
    view: ModelView,
    key: tuple[str, str],
    batches: Callable[[], Iterator[Tensor]],
    extract: Extractor,
) -> Tensor:
    return view.memo(
        key, lambda _: torch.cat([extract(batch).float().cpu() for batch in batches()])
    )


def _extractor(bench: DiffusionBenchmark) -> Extractor | None:
    """Return Inception where its weights are, else the style classifier, else None."""
    weights = bench.judges.inception
    try:
        return CanvasInception(None if weights is None else Path(weights), _device(bench))
    except CheckpointError:
        if weights is not None:
            raise
    if isinstance(bench, UnlearnCanvas):
        return ClassifierFeatures(bench.classifiers[0])
    return None


def _device(bench: DiffusionBenchmark) -> torch.device:
    return torch.device("cpu") if bench.engine is None else bench.engine.device
