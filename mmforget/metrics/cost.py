"""What unlearning took, beside what retraining took."""

import math
from collections.abc import Mapping
from typing import ClassVar

from mmforget.record import MetricValue
from mmforget.types import Metric, Trial


class CostMetric(Metric):
    """Time, memory and weights of the unlearning run; loading and evaluation are excluded.

    - `cost/wall_s`, `cost/device_s`: wall and device seconds, down.
    - `cost/peak_bytes`: peak memory, down. `cost/trainable`: parameters in scope, down.
    - `cost/prepare_s`: wall seconds of what was made once before any request was known (shards, an
      encoder), down; left out where there is nothing. All requests on one original share it.
    - `cost/speedup`: wall seconds of retraining over those of unlearning, up; left out without a
      retrained model.

    Pitfalls: wall time of a shared machine is noisy, and a method's extra data passes and stored
    statistics count only if it makes them inside the run. The original, which does no work, has
    no speed-up (NaN).
    """

    citation: ClassVar[str] = "run-time efficiency (RTE), as in arXiv 2304.04934"

    def compute(self, trial: Trial) -> Mapping[str, MetricValue]:
        """Return the values."""
        own, retraining = trial.cost, trial.cost_reference
        values = {
            f"cost/{name}": MetricValue(
                float(getattr(own, name)),
                "down",
                None if retraining is None else float(getattr(retraining, name)),
            )
            for name in ("wall_s", "device_s", "peak_bytes", "trainable")
        }
        if own.prepare_s > 0:
            values["cost/prepare_s"] = MetricValue(own.prepare_s, "down")
        if retraining is not None:
            speedup = retraining.wall_s / own.wall_s if own.wall_s > 0 else math.nan
            values["cost/speedup"] = MetricValue(speedup, "up", 1.0)
        return values
