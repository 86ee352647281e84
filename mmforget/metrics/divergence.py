"""Distance of predictions to those of the retrained model, and to those of a random one."""

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

from mmforget.metrics.common import both, predictions, with_interval
from mmforget.metrics.ranking import Interval, mean_interval, wilson
from mmforget.metrics.signals import Predictions
from mmforget.metrics.similarity import activation_distance, js_divergence, zrf
from mmforget.record import MetricValue
from mmforget.rng import derive
from mmforget.types import Metric, ModelView, Trial

_SPLITS = ("forget", "retain", "test")


class Divergence(Metric):
    """Mean distance of output distributions to the retrained model's, example by example.

    - `divergence/js_<split>`: Jensen-Shannon divergence in nats, in [0, ln 2]; multi-label: mean
      over attributes.
    - `divergence/activation_<split>`: L2 distance of the probability vectors, at most √2 for one
      label.

    Direction: down. Target: 0, or better the distance between two retrained models of different
    seeds, which is not 0. Left out without a retrained model. Intervals are normal, for the mean.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    citation: ClassVar[str] = "Chundawat et al., Bad Teacher, arXiv 2205.08096"

    def compute(self, trial: Trial) -> Mapping[str, MetricValue]:
        """Return the values."""
        values = {}
        for split in _SPLITS if trial.retrained is not None else ():
            own, theirs = _pair(trial, split)
            js = js_divergence(own.probs, theirs.probs).mean(axis=1)
            distance = activation_distance(own.vector, theirs.vector)
            for name, found in (("js", js), ("activation", distance)):
                values[f"divergence/{name}_{split}"] = with_interval(
                    mean_interval(found), "down", 0.0, len(found)
                )
        return values


class Agreement(Metric):
    """Share of equal predictions of the model and the retrained one: `agreement/<split>`.

    In [0, 1], with Wilson 95 % intervals; multi-label: mean over attributes. Direction: up.
    Target: the agreement of two retrained models of different seeds, which is below 1. Left out
    without a retrained model. Two models can agree on the class while one remembers: see `lira`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    citation: ClassVar[str] = "share of equal predictions; no single source"

    def compute(self, trial: Trial) -> Mapping[str, MetricValue]:
        """Return the values."""
        values = {}
        for split in _SPLITS if trial.retrained is not None else ():
            own, theirs = _pair(trial, split)
            equal = (own.predicted == theirs.predicted).mean(axis=1)
            found = Interval(float(equal.mean()), *wilson(float(equal.sum()), len(equal)))
            values[f"agreement/{split}"] = with_interval(found, "up", 1.0, len(equal))
        return values


class ZRF(Metric):
    """Zero-retrain forgetting: `zrf/forget` = 1 - mean JS divergence to a random model on forget.

    In [1 - ln 2, 1]; 1 means predictions like those of a model that learned nothing. The random
    model is the benchmark's architecture, freshly initialised (a benchmark that starts from
    pretrained weights keeps those). Direction: closer to the retrained model, which generalises
    to the forget set and is far from random.

    `zrf/published` uses the divergence of the published code, which divides by the number of
    classes and reverses KL: it presses every model towards 1.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    citation: ClassVar[str] = "Chundawat et al., Bad Teacher, arXiv 2205.08096"

    def compute(self, trial: Trial) -> Mapping[str, MetricValue]:
        """Return the values."""
        fresh = trial.lab.view(trial.benchmark.build(derive(trial.seed, "zrf")))
        random = predictions(fresh, "forget")
        values = {}
        for name, reference, note in (
            ("forget", False, ""),
            ("published", True, "with the divergence of the published code"),
        ):
            own, theirs = both(trial, partial(_zrf, random=random, reference=reference))
            values[f"zrf/{name}"] = MetricValue(
                own, "to_reference", theirs, n=len(random), note=note
            )
        return values


def _zrf(view: ModelView, random: Predictions, reference: bool) -> float:
    return zrf(predictions(view, "forget").probs, random.probs, reference)


def _pair(trial: Trial, split: str) -> tuple[Predictions, Predictions]:
    assert trial.retrained is not None
    return predictions(trial.view, split), predictions(trial.retrained, split)
