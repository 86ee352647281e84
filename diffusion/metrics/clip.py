"""CLIP score and CLIP accuracy of generated images."""

from collections.abc import Mapping
from typing import ClassVar

import torch

from mmforget.diffusion.features import OpenClip
from mmforget.diffusion.metrics import generated
from mmforget.diffusion.scores import CLIP_SCORES, clip_score, cosines
from mmforget.errors import ConfigError
from mmforget.record import MetricValue
from mmforget.types import Metric, Trial

CONVENTION = "cosine"  # the mean cosine: the one convention without a constant


class ClipScore(Metric):
    """Mean cosine of each image and its own prompt, by group: `clip/score_GROUP`.

    Down for `forget` (the picture no longer shows what the prompt names), up for the others. The
    note names model and weights; torchmetrics prints 100 times this value, the original CLIPScore
    2.5 times the mean positive part.
    """

    citation: ClassVar[str] = "Hessel et al., CLIPScore, EMNLP 2021"

    def compute(self, trial: Trial) -> Mapping[str, MetricValue]:
        """Return the values.

        Raises:
            ConfigError: No CLIP weights are named.
        """
        bench = generated.diffusion(trial.benchmark)
        judges = bench.judges
        if judges.clip_weights is None:
            raise ConfigError(
                "metric diffusion/clip needs benchmark.judges.clip_weights: a file of "
                f"{judges.clip}'s weights (open_clip)"
            )
        device = "cpu" if bench.engine is None else bench.engine.device
        clip = OpenClip(judges.clip, judges.clip_weights, device=device)
        values = {}
        for group, orders in bench.image_sets().items():
            seen = torch.cat([clip(b).cpu() for b in generated.batches(trial.view, bench, orders)])
            texts = clip.texts([order.prompt for order in orders]).cpu()
            score = clip_score(cosines(seen, texts), CONVENTION)
            values[f"clip/score_{group}"] = MetricValue(
                score,
                "down" if group == "forget" else "up",
                n=len(orders),
                note=f"{CLIP_SCORES[CONVENTION]}; {clip.name}",
            )
        return values
