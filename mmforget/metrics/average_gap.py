"""UA, RA, TA, MIA and their average gap to the retrained model, as SalUn and others tabulate."""

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import numpy as np

from mmforget.metrics.common import both, predictions
from mmforget.metrics.mia import average_gap, svc_mia
from mmforget.record import MetricValue
from mmforget.rng import derive
from mmforget.types import Metric, ModelView, Trial


class AverageGap(Metric):
    """The table of the SalUn line of work; all but run time in percent.

    - `gap/ua`: 100 - accuracy on forget. `gap/ra`, `gap/ta`: accuracy on retain and on test.
    - `gap/mia`: share of forget that an SVC on the confidence, trained on retain against test,
      takes for non-members ("MIA-efficacy"; higher means more forgotten).
    - `gap/average`: mean of the four absolute differences to the retrained model; down, 0 best.
    - `gap/rte_minutes`: wall minutes of unlearning; no part of the average.

    Direction of the four: closer to the retrained model. More UA or more MIA is not better.

    Departures: members for the SVC are drawn from retain at random, as many as there are test
    examples or the reverse, so that both sides are equal and no class order matters (published:
    the first ones). Class-wise requests published TA on the remaining classes only; here it is
    the benchmark's test set.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    citation: ClassVar[str] = "Fan et al., SalUn, arXiv 2310.12508"

    def compute(self, trial: Trial) -> Mapping[str, MetricValue]:
        """Return the values; `gap/average` is left out without a retrained model."""
        key = ("average_gap", trial.seed)
        row = partial(_row, seed=trial.seed)
        own, reference = both(trial, lambda view: view.memo(key, row))
        sizes = {"ua": "forget", "ra": "retain", "ta": "test", "mia": "forget"}
        values = {
            f"gap/{name}": MetricValue(
                value,
                "to_reference",
                None if reference is None else reference[name],
                n=len(trial.splits.get(sizes[name])),
            )
            for name, value in own.items()
        }
        if reference is not None:
            values["gap/average"] = MetricValue(average_gap(own, reference)[1], "down", 0.0)
        retraining = trial.cost_reference
        values["gap/rte_minutes"] = MetricValue(
            trial.cost.wall_s / 60, "down", None if retraining is None else retraining.wall_s / 60
        )
        return values


def _row(view: ModelView, seed: int) -> dict[str, float]:
    forget, retain, test = (predictions(view, split) for split in ("forget", "retain", "test"))
    rng = np.random.default_rng(derive(seed, "average_gap"))
    size = min(len(retain), len(test))
    members, others = (part[rng.permutation(len(part))[:size]] for part in (retain, test))
    return {
        "ua": 100 - 100 * float(forget.correctness.mean()),
        "ra": 100 * float(retain.correctness.mean()),
        "ta": 100 * float(test.correctness.mean()),
        "mia": 100 * svc_mia(members, others, forget)["confidence"],
    }
