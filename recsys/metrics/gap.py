"""One number for the distance to the retrained recommender."""

from collections.abc import Mapping
from typing import ClassVar

from mmforget.metrics.common import both
from mmforget.metrics.mia import average_gap
from mmforget.metrics.ranking import Ranking
from mmforget.record import MetricValue
from mmforget.recsys.metrics.pairs import moments, pair_scores, pairs_of, recommender
from mmforget.recsys.metrics.ranking import HEADLINE_K, split_ranking
from mmforget.types import Metric, ModelView, Trial


class Gap(Metric):
    """The average gap of the SalUn line of work, for rankings; all in percent.

    - `gap/test`, `gap/forget`, `gap/retain`: 100 · NDCG@20 on these pairs; masking as in
      `recsys/ranking`, on retain nothing is masked.
    - `gap/membership`: 100 · AUC of the score, in standard deviations of its user's, as a test of
      forgotten against holdout pairs.
    - `gap/average`: mean of the four absolute differences to the retrained model; down, 0 best.

    Direction of the four: closer to the retrained model.

    Pitfalls: the four differ in scale (NDCG on test is often a tenth of the AUC), so the average
    hides a small loss of utility: read the parts. The retrained model differs from another one
    trained with another seed by about as much as the best methods do from it.
    """

    citation: ClassVar[str] = "after Fan et al., SalUn, arXiv 2310.12508"

    def compute(self, trial: Trial) -> Mapping[str, MetricValue]:
        """Return the values; `gap/average` is left out without a retrained model."""
        own, reference = both(
            trial, lambda view: view.memo("recsys/gap", lambda known: _row(known, trial))
        )
        sizes = {"test": "test", "forget": "forget", "retain": "retain", "membership": "forget"}
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
        return values


def _row(view: ModelView, trial: Trial) -> dict[str, float]:
    row = {
        split: 100
        * split_ranking(view, trial.benchmark, trial.splits, split).mean("ndcg", HEADLINE_K)
        for split in ("test", "forget", "retain")
    }
    model = recommender(view)
    table, users = model.final(), model.graph.users
    spread = moments(table, users, pairs_of(trial.splits.retain))
    members, others = (
        spread.by_user(pair_scores(table, users, pairs), pairs)
        for pairs in (pairs_of(trial.splits.forget), pairs_of(trial.splits.holdout))
    )
    return {**row, "membership": 100 * Ranking.of(members, others).auc}
