"""The forgetting score of MUFAC and MUCAC, and NoMUS, which weighs it against utility."""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import numpy as np

from mmforget.metrics.common import both, predictions
from mmforget.metrics.mia import SimpleMIA, nomus, simple_mia
from mmforget.record import MetricValue
from mmforget.types import Metric, ModelView, Trial

_MINIMUM = 10  # below it, a test part of 10 % cannot hold both classes


class Forgetting(Metric):
    """Simple membership attack between forget and holdout, and the scores made of it.

    - `forgetting/mia_accuracy`: cross-validated accuracy of a logistic regression on the loss;
      direction: closer to the retrained model, not to 0.5.
    - `forgetting/score`: |accuracy - 0.5|, in [0, 0.5], down. Published tables print THIS in the
      row named "MIA".
    - `forgetting/nomus`: (test accuracy + 1 - 2·score) / 2, in [0, 1], up.

    Pitfalls: an accuracy below 0.5 is not better than 0.5, it shows over-forgetting. Where forget
    and holdout come from different people the retrained model's score is not 0 either: read the
    value beside its reference. One attack for all examples overstates privacy; see `ulira`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"loss", "logits"})
    citation: ClassVar[str] = "Choi and Na, arXiv 2311.02240"

    def compute(self, trial: Trial) -> Mapping[str, MetricValue]:
        """Return the values; NaN with a note where a loss is not finite or a side has under 10."""
        sizes = [len(trial.splits.get(split)) for split in ("forget", "holdout")]
        own, reference = both(trial, lambda view: view.memo("forgetting", _attack))
        values = {}
        for name, direction in (
            ("mia_accuracy", "to_reference"),
            ("score", "down"),
            ("nomus", "up"),
        ):
            theirs = None if reference is None else reference[name]
            values[f"forgetting/{name}"] = MetricValue(own[name], direction, theirs, n=sum(sizes))
        if np.isnan(own["score"]):
            note = f"not defined: a loss is not finite, or a side has under {_MINIMUM} examples"
            return {name: replace(value, note=note) for name, value in values.items()}
        return values


def _attack(view: ModelView) -> dict[str, float]:
    forget, holdout = (np.asarray(view.numbers(s)["loss"]) for s in ("forget", "holdout"))
    utility = float(predictions(view, "test").correctness.mean())
    usable = min(len(forget), len(holdout)) >= _MINIMUM
    if usable and np.isfinite(forget).all() and np.isfinite(holdout).all():
        found = simple_mia(forget, holdout)
    else:
        found = SimpleMIA(np.empty(0), np.array([np.nan]))
    return {
        "mia_accuracy": found.accuracy,
        "score": found.forgetting_score,
        "nomus": float(nomus(utility, found.accuracy)),
    }
