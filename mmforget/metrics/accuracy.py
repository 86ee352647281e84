"""Accuracy on every split, and whether a constant prediction would do as well."""

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from mmforget.metrics.common import both, predictions, with_interval
from mmforget.metrics.ranking import Interval, wilson
from mmforget.metrics.signals import Floats, Predictions
from mmforget.record import MetricValue
from mmforget.types import Metric, Trial

_UNSEEN = ("holdout", "test", "val")
_COLLAPSED = 0.99  # share of equal predictions from which a model counts as collapsed


class Accuracy(Metric):
    """Top-1 accuracy per split: `accuracy/<split>`, in [0, 1], with Wilson 95 % intervals.

    - Multi-label: the mean over attributes, each counted as present at p > 0.5, and
      `accuracy/<split>_attribute<i>` for each. The interval counts examples, not attributes.
    - `accuracy/test_top2`: the true class is among the two most probable (more than two classes).
    - `accuracy/constant_predictor`: what the best constant prediction reaches on the test set.

    Direction: up on retain and unseen data; on forget and on probes, closer to the retrained
    model. Target: the retrained model's value. A forget accuracy below it is over-forgetting,
    which an observer can detect.

    Pitfalls: on unbalanced labels a collapsed model looks useful, so a value whose predictions are
    all but constant carries a note. Accuracy on forget says nothing about what the
    features still hold; see `representation` and `probes`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    citation: ClassVar[str] = "Choi and Na, arXiv 2311.02240, for the protocol and top-2"

    def compute(self, trial: Trial) -> Mapping[str, MetricValue]:
        """Return the values."""
        values = {}
        for split in trial.splits.names():
            direction = "up" if split in ("retain", *_UNSEEN) else "to_reference"
            own, reference = both(trial, partial(predictions, split=split))
            theirs = None if reference is None else reference.correctness.mean()
            values[f"accuracy/{split}"] = _rate(
                own.correctness, direction, theirs, collapse_note(own)
            )
            if own.multi_label:
                for head in range(own.label.shape[1]):
                    theirs = None if reference is None else reference.hits[:, head].mean()
                    values[f"accuracy/{split}_attribute{head}"] = _rate(
                        own.hits[:, head], direction, theirs
                    )
        test, reference = both(trial, partial(predictions, split="test"))
        if not test.multi_label and test.probs.shape[-1] > 2:
            theirs = None if reference is None else top_k(reference, 2).mean()
            values["accuracy/test_top2"] = _rate(top_k(test, 2), "up", theirs)
        values["accuracy/constant_predictor"] = MetricValue(
            float(class_rates(test).max(axis=1).mean()),
            "to_reference",
            n=len(test),
            note="a floor, no property of the model: the best constant prediction on the test set",
        )
        return values


def class_rates(given: Predictions) -> Floats:
    """Return how frequent each true class is, [H, C]."""
    classes = np.arange(given.probs.shape[-1])
    return np.asarray((given.label[..., None] == classes).mean(axis=0))


def top_k(given: Predictions, k: int) -> Floats:
    """Return whether the true class is among the k most probable, single-label, [N]."""
    best = np.argsort(-given.probs[:, 0], axis=-1, kind="stable")[:, :k]
    return np.asarray((best == given.label).any(axis=1), dtype=np.float64)


def collapse_note(given: Predictions) -> str:
    """Return a note when (nearly) all predictions are the same though labels differ, else ""."""
    if (given.label == given.label[0]).all():
        return ""
    classes = np.arange(given.probs.shape[-1])
    shares = (given.predicted[..., None] == classes).mean(axis=0).max(axis=1)
    if (shares < _COLLAPSED).any():
        return ""
    constant = class_rates(given).max(axis=1).mean()
    return (
        f"collapsed: {shares.min():.1%} of predictions are the same; the best constant prediction "
        f"reaches {constant:.3f}"
    )


def _rate(hits: ArrayLike, direction: str, reference: float | None, note: str = "") -> MetricValue:
    rates = np.asarray(hits, dtype=np.float64)
    found = Interval(float(rates.mean()), *wilson(float(rates.sum()), len(rates)))
    theirs = None if reference is None else float(reference)
    return with_interval(found, direction, theirs, len(rates), note)
