"""What metrics share: the same number for the model under test and for the retrained one."""

import math
from collections.abc import Callable
from typing import TypeVar

from mmforget.metrics.ranking import Interval
from mmforget.metrics.signals import Predictions
from mmforget.record import MetricValue
from mmforget.types import ModelView, Trial

T = TypeVar("T")


def both(trial: Trial, compute: Callable[[ModelView], T]) -> tuple[T, T | None]:
    """Return `compute` of the model under test, and of the retrained model if there is one."""
    return compute(trial.view), None if trial.retrained is None else compute(trial.retrained)


def predictions(view: ModelView, split: str) -> Predictions:
    """Return a model's predictions on a split, made once for all metrics and attacks."""
    return view.memo(("predictions", split), lambda own: Predictions.read(own.numbers(split)))


def with_interval(
    found: Interval,
    direction: str,
    reference: float | None = None,
    n: int | None = None,
    note: str = "",
) -> MetricValue:
    """Return a value that carries its interval, left out where it is not defined."""
    low, high = (None if math.isnan(end) else end for end in (found.low, found.high))
    return MetricValue(found.value, direction, reference, low, high, n, note)
