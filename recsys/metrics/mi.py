"""MI-BF and MI-NG of UnlearnRec: how far the scores of forgotten pairs fell, and below what."""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import numpy as np
from scipy.special import expit

from mmforget.errors import ConfigError
from mmforget.metrics.common import both
from mmforget.record import MetricValue
from mmforget.recsys.data import joined
from mmforget.recsys.metrics.pairs import (
    interactions,
    non_edges,
    pairs_of,
    recommender,
    view_scores,
)
from mmforget.recsys.ranking import Floats
from mmforget.types import Metric, ModelView, Trial

KINDS = ("probability", "score")
EPSILON = 1e-10  # added to both means by the public code, which takes raw scores
CAP = 1_000_000  # random pairs at most; their mean is then known to a thousandth of its spread


class Found(NamedTuple):
    """Scores of one model: of forgotten pairs before and after, and of random pairs after."""

    before: Floats
    after: Floats
    random: Floats


class MI(Metric):
    """How low the scores of forgotten pairs are: against before, and against random pairs.

    MI-BF is the mean over forgotten pairs before unlearning over their mean after it. MI-NG is the
    mean over random pairs that are no training edges over that of forgotten pairs, both after it.

    - `mi_bf/probability`, `mi_ng/probability`: of sigmoid(score); always defined, up.
    - `mi_bf/score`, `mi_ng/score`: of raw scores, as the public forks compute them; up; NaN where
      a mean is not positive, as a ratio then says nothing.
    - `mi/forget_probability`, `mi/random_probability`: the means after unlearning.
    - `mi/margin`: mean score of random pairs minus that of forgotten ones, the published choice of
      checkpoints. These three: closer to the retrained model.

    "Before" is the original model. Random pairs: as many as training pairs, a million at most,
    uniform without training edges or repeats, the same for all models.

    Pitfalls: pushing every score down inflates MI-BF without forgetting anything: read it beside
    Recall and NDCG on test. Higher than the retrained model's is over-forgetting, which singles the
    forgotten pairs out. The paper's tables and its exact definition of "probability" could not be
    read; two public forks agree on the ratios and on their direction.
    """

    citation: ClassVar[str] = "UnlearnRec, arXiv 2505.22649"

    def compute(self, trial: Trial) -> Mapping[str, MetricValue]:
        """Return the values."""
        train = interactions(trial.splits.train)
        forgotten = pairs_of(trial.splits.forget)
        users = recommender(trial.original).graph.users
        random = non_edges(joined([train], train.items), users, min(len(train), CAP), trial.seed)
        before = view_scores(trial.original, forgotten)

        def found(view: ModelView) -> Found:
            return Found(before, view_scores(view, forgotten), view_scores(view, random))

        own, theirs = both(trial, lambda view: _values(found(view)))
        n = len(forgotten[0])
        values = {}
        for name, value in own.items():
            direction = "to_reference" if name.startswith("mi/") else "up"
            reference = None if theirs is None else theirs[name]
            note = "not defined: a mean score is not positive" if np.isnan(value) else ""
            values[name] = MetricValue(value, direction, reference, n=n, note=note)
        return values


def mi_bf(before: Floats, after: Floats, kind: str = "probability") -> float:
    """Return MI-BF, the mean over forgotten pairs before unlearning over the mean after it.

    Args:
        before: Raw scores of the original model, [n].
        after: Raw scores of the unlearned model, [n].
        kind: "probability" (sigmoid of the score), or "score" as published, which may be negative
            or explode near zero.

    Raises:
        ConfigError: There is no such kind.
    """
    return _ratio(before, after, kind)


def mi_ng(random: Floats, after: Floats, kind: str = "probability") -> float:
    """Return MI-NG, the mean over random non-edges over the mean over forgotten pairs.

    Args:
        random: Raw scores of random non-edges, after unlearning, [m].
        after: Raw scores of the forgotten pairs, after unlearning, [n].
        kind: As for `mi_bf`.

    Raises:
        ConfigError: There is no such kind.
    """
    return _ratio(random, after, kind)


def margin(random: Floats, after: Floats) -> float:
    """Return the mean raw score of random non-edges minus that of forgotten pairs."""
    return float(random.mean() - after.mean())


def _ratio(upper: Floats, lower: Floats, kind: str) -> float:
    if kind not in KINDS:
        raise ConfigError(f"unknown kind {kind!r} of MI. Accepted: {', '.join(KINDS)}")
    if kind == "probability":
        return float(expit(upper).mean() / expit(lower).mean())
    return float((upper.mean() + EPSILON) / (lower.mean() + EPSILON))


def _values(found: Found) -> dict[str, float]:
    before, after, random = found
    values = {}
    for name, function, upper in (("mi_bf", mi_bf, before), ("mi_ng", mi_ng, random)):
        values[f"{name}/probability"] = function(upper, after)
        positive = upper.mean() > 0 and after.mean() > 0
        values[f"{name}/score"] = function(upper, after, "score") if positive else float("nan")
    values["mi/forget_probability"] = float(expit(after).mean())
    values["mi/random_probability"] = float(expit(random).mean())
    values["mi/margin"] = margin(random, after)
    return values
