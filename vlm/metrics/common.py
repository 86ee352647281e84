"""What the metrics of both benchmarks share: means of what is known, and distances."""

from collections.abc import Mapping, Sequence

import numpy as np

from mmforget.metrics.common import with_interval
from mmforget.metrics.ranking import mean_interval
from mmforget.metrics.signals import Floats
from mmforget.record import MetricValue
from mmforget.types import ModelView


def asked(view: ModelView) -> set[str]:
    """Return what a model was asked so far, by names that metrics add.

    Samples are written of answers that are known: a run whose metrics ask nothing generates
    nothing, and no process waits for others that write no samples.
    """
    return view.memo("vlm asked", lambda _: set[str]())


def mean(values: Floats, direction: str, note: str = "") -> MetricValue:
    """Return the mean of the values that are not NaN, with its interval; NaN if none is known."""
    known = values[~np.isnan(values)]
    return with_interval(mean_interval(known), direction, n=len(known), note=note)


def gap(
    own: Mapping[str, MetricValue], other: Mapping[str, MetricValue], names: Sequence[str]
) -> dict[str, MetricValue]:
    """Return `gap`, the mean distance to the retrained model over some metrics, in points.

    Metrics that are missing or NaN for either model are left out, and the note says which were
    taken; without any there is no gap.

    Args:
        own: Values of the model under test, in [0, 1].
        other: Values of the retrained model.
        names: The metrics.
    """
    pairs = {
        name: (own[name].value, other[name].value)
        for name in names
        if name in own and name in other
    }
    found = {name: abs(a - b) for name, (a, b) in pairs.items() if not np.isnan(a - b)}
    if not found:
        return {}
    note = f"mean distance to the retrained model over {', '.join(found)}; points"
    return {"gap": MetricValue(100.0 * sum(found.values()) / len(found), "down", 0.0, note=note)}
