"""Membership of pairs: which interactions did the unlearned recommender know?"""

import time
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from mmforget.attacks.likelihood import calibrated
from mmforget.attacks.lira import pseudo_outside
from mmforget.attacks.shadows import half, only, roc, rounds, separation
from mmforget.options import option
from mmforget.record import AttackResult, MetricValue
from mmforget.recsys.data import Ids, joined
from mmforget.recsys.metrics.pairs import (
    Pairs,
    interactions,
    moments,
    non_edges,
    pair_scores,
    pairs_of,
    recommender,
    view_scores,
)
from mmforget.recsys.ranking import Floats, Ints, standing
from mmforget.rng import derive
from mmforget.types import Attack, Budget, ModelView, Splits, Trial

SIDES = ("forget", "holdout", "random")


@dataclass(frozen=True)
class PairMembershipConfig:
    """How many pairs are attacked, and what may be trained for it."""

    pairs: int = option(10_000, "pairs a side; more are drawn from", low=20)
    shadows: int = option(
        2, "shadow models on halves of the training pairs, an even number; 0: none", low=0
    )
    resamples: int = option(1000, "bootstrap resamples of each interval", low=100)


class PairMembership(Attack[PairMembershipConfig]):
    """Tell forgotten pairs from pairs that were never in the graph, by their scores.

    Members are the forget set. Non-members are the holdout, pairs that users chose and the model
    never saw (`<signal>/...`), and random pairs that nobody chose (`random/<signal>/...`). The
    attacker knows the retained pairs. Signals, all with larger = more member-like:

    - `score`: the raw score.
    - `gap`: the score minus the mean score of the user's items that are not retained; `gap_z`: in
      standard deviations of these. Both exact, over all such items.
    - `rank`: share of those items that the pair's item scores above.
    - `shadow`: the score minus the median score by shadow models that did not have the pair; each
      is trained on a random half of the training pairs. Non-members are in no shadow model and are
      calibrated by a random half of them, so that both sides have equally many.

    Values per signal: `auc`, `balanced_accuracy` (best threshold on the same scores), `tpr@0.01`,
    `tpr@0.001`, with bootstrap 95 % intervals. Direction: closer to the retrained model.

    Pitfalls: against random pairs even a retrained model is separable, as forgotten pairs fit their
    users' tastes; against the holdout it is near 0.5 only where holdout pairs are drawn as the
    forgotten ones were. An AUC well below the retrained model's is over-forgetting. Shadow models
    have seen half of the data: a common shift of their scores leaves the ranks alone.
    """

    access: ClassVar[str] = "grey"
    citation: ClassVar[str] = (
        "Zhang et al., Membership Inference Attacks Against Recommender Systems, arXiv 2109.08045; "
        "calibration: Watson et al., arXiv 2111.08440"
    )
    config_type: ClassVar[type] = PairMembershipConfig

    def budget(self) -> Budget:
        """The shadow models; no steps on the attacked model."""
        return Budget(steps=0, models=self.config.shadows)

    def run(self, trial: Trial, budget: Budget) -> AttackResult:
        """Train the shadow models (cached) and score the pairs by every signal."""
        start = time.monotonic()
        sides = self._sides(trial)
        models = self.config.shadows if budget.models is None else budget.models
        outside = _shadow_scores(trial, sides, models, budget.seconds)
        found = _signals(trial.view, trial.splits, sides, outside)
        theirs = None
        if trial.retrained is not None:
            theirs = _signals(trial.retrained, trial.splits, sides, outside)
        values: dict[str, MetricValue] = {}
        curves = {}
        for other, prefix in (("holdout", ""), ("random", "random/")):
            for name, scores in found.items():
                pair = (scores["forget"], scores[other])
                reference = (
                    None if theirs is None else (theirs[name]["forget"], theirs[name][other])
                )
                values |= separation(
                    f"{prefix}{name}", *pair, trial.seed, reference, self.config.resamples
                )
                curves[f"roc/{prefix}{name}"] = roc(*pair)
        targets: dict[str, npt.NDArray[Any]] = {}
        for side, pairs in sides.items():
            targets[f"{side}_ids"] = np.array(list(Ids(*pairs)))
            targets |= {f"{side}_{name}": scores[side] for name, scores in found.items()}
        return AttackResult(
            access=self.access,
            values=values,
            queries=sum(len(pairs[0]) for pairs in sides.values()),
            seconds=time.monotonic() - start,
            curves=curves,
            targets=targets,
        )

    def _sides(self, trial: Trial) -> dict[str, Pairs]:
        """Return the pairs attacked, the same for every model."""
        splits, most = trial.splits, self.config.pairs
        sides = {}
        for split in ("forget", "holdout"):
            user, item = pairs_of(splits.get(split))
            rng = np.random.default_rng(derive(trial.seed, "membership", split))
            rows = np.sort(rng.permutation(len(user))[:most])
            sides[split] = (user[rows], item[rows])
        parts = [splits.train, splits.test, splits.holdout, splits.val or splits.test]
        chosen = joined([interactions(part) for part in parts], interactions(splits.train).items)
        users = recommender(trial.view).graph.users
        sides["random"] = non_edges(chosen, users, most, derive(trial.seed, "membership"))
        return sides


def _signals(
    view: ModelView, splits: Splits, sides: dict[str, Pairs], outside: dict[str, Floats]
) -> dict[str, dict[str, Floats]]:
    """Return the signals of a model, signal -> side -> [n]."""
    model = recommender(view)
    table, users = model.final(), model.graph.users
    retain = interactions(splits.retain)
    spread = moments(table, users, (retain.user, retain.item))
    known = joined([retain], retain.items)
    found: dict[str, dict[str, Floats]] = {
        name: {} for name in ("score", "gap", "gap_z", "rank", *(["shadow"] if outside else []))
    }
    for side, pairs in sides.items():
        scores = pair_scores(table, users, pairs)
        found["score"][side] = scores
        found["gap"][side] = scores - spread.user_mean[pairs[0]]
        found["gap_z"][side] = spread.by_user(scores, pairs)
        found["rank"][side] = 1 - standing(table, users, *pairs, known).share_above
        if outside:
            found["shadow"][side] = calibrated(scores, outside[side])
    return found


def _shadow_scores(
    trial: Trial, sides: dict[str, Pairs], models: int, seconds: float | None
) -> dict[str, Floats]:
    """Return scores by shadow models, side -> [n, models], NaN for those that do not count."""
    train = interactions(trial.splits.train)
    held, scores = [], []
    for model in rounds(trial, models, seconds, least=2):
        held.append(half(len(train), model, trial.seed))
        keep = np.flatnonzero(held[-1]).tolist()
        view = trial.lab.view(trial.lab.shadow(keep, derive(trial.seed, "shadow", model)))
        scores.append({side: view_scores(view, pairs) for side, pairs in sides.items()})
    if not held:
        return {}
    found = {}
    for side, pairs in sides.items():
        if side == "forget":
            counted = ~np.stack(held)[:, _rows(pairs, trial.splits)].T
        else:
            stream = derive(trial.seed, "outside", side)
            counted = pseudo_outside(len(pairs[0]), len(held), stream)
        found[side] = only(np.stack([part[side] for part in scores], axis=1), counted)
    return found


def _rows(pairs: Pairs, splits: Splits) -> Ints:
    """Return the index in `splits.train` of training pairs, [n]."""
    train = interactions(splits.train)
    keys = train.user * train.items + train.item
    order = np.argsort(keys)
    return np.asarray(order[np.searchsorted(keys[order], pairs[0] * train.items + pairs[1])])
