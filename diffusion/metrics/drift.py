"""How far pictures moved from the original model's at equal prompts and seeds."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from mmforget.diffusion.metrics import generated
from mmforget.diffusion.scores import Lpips
from mmforget.errors import CheckpointError
from mmforget.record import MetricValue
from mmforget.types import Metric, Trial


class Drift(Metric):
    """Distance of each picture to the original model's of the same prompt and seed.

    - `drift/rmse_GROUP`: root mean squared difference of pixels in [0, 1]. `drift/lpips_GROUP`:
      LPIPS, where its backbone's weights are at hand.
    - GROUP `forget` goes up when the concept is gone; every other group (`retain`) stays down when
      nothing else was touched.

    Pitfall: pixels move much for little when a composition changes, so read it beside accuracies.
    """

    citation: ClassVar[str] = "Zhang et al., CVPR 2018; LPIPS_e, LPIPS_u of arXiv 2303.07345"

    def compute(self, trial: Trial) -> Mapping[str, MetricValue]:
        """Return the values."""
        bench = generated.diffusion(trial.benchmark)
        judges = bench.judges
        try:
            device = "cpu" if bench.engine is None else bench.engine.device
            lpips = Lpips(judges.lpips, judges.lpips_weights, device=device)
        except CheckpointError:
            if judges.lpips_weights is not None:
                raise
            lpips = None
        values = {}
        for group, orders in bench.image_sets().items():
            direction = "up" if group == "forget" else "down"
            rmse: list[Tensor] = []
            far: list[Tensor] = []
            pairs = zip(
                generated.batches(trial.view, bench, orders),
                generated.batches(trial.original, bench, orders),
                strict=True,
            )
            for own, before in pairs:
                moved = (own.float() - before.float()).div(255.0).square()
                rmse.append(moved.flatten(1).mean(dim=1).sqrt())
                if lpips is not None:
                    far.append(lpips(own, before).cpu())
            for name, found, note in (
                ("rmse", rmse, "root mean square of pixels in [0, 1], mean over images"),
                ("lpips", far, "" if lpips is None else lpips.name),
            ):
                if found:
                    every = torch.cat(found)
                    values[f"drift/{name}_{group}"] = MetricValue(
                        float(every.mean()), direction, n=len(every), note=note
                    )
        return values
