"""RMIA against an unlearned model: confidence compared with that of population data."""

import time
from dataclasses import dataclass
from operator import attrgetter
from typing import ClassVar

import numpy as np

from mmforget.attacks.likelihood import expected_offline, rmia
from mmforget.attacks.lira import pseudo_outside
from mmforget.attacks.shadows import forget_rows, only, roc, separation, shadow_signals, take
from mmforget.metrics.signals import Floats
from mmforget.options import option
from mmforget.record import AttackResult
from mmforget.types import Attack, Budget, ModelView, Trial

_CONFIDENCE = attrgetter("confidence")
_SPLITS = ("forget", "holdout", "test")


@dataclass(frozen=True)
class RMIAConfig:
    """How many shadow models, and the two constants of the score."""

    models: int = option(16, "shadow models, each on half of the training data", low=6)
    gamma: float = option(2.0, "how many times likelier x must be than z", low=1)
    scale: float = option(0.4, "a of the offline form: .3 easy data, 1 hard data", low=0, high=1)


class RMIA(Attack[RMIAConfig]):
    """How many population points does the example beat? Pr_z[(p_θ(x)/p(x)) / (p_θ(z)/p(z)) > γ].

    p_θ is the confidence in the true label, p its mean over shadow models, z the test set, which
    nobody trained on. The shadow models and the game are those of `lira`: forget (members) against
    holdout under the unlearned model, calibrated on both sides by equally many models without the
    example, so p takes the offline form. Scores of different models are not compared: each model's
    noise on z moves all of its scores together.

    Values: `offline/auc`, balanced accuracy, TPR at 1 % and 0.1 % FPR, with bootstrap 95 %
    intervals. Direction: closer to the retrained model.

    Pitfalls: the score is a share of the test set, so a small one gives coarse scores and many
    ties. Where the benchmark publishes one set as both holdout and test, a non-member meets itself
    among z, which changes its score by at most one part in the number of z.
    """

    access: ClassVar[str] = "grey"
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    citation: ClassVar[str] = "Zarifzadeh et al., arXiv 2312.03262"
    config_type: ClassVar[type] = RMIAConfig

    def budget(self) -> Budget:
        """The shadow models; no gradient steps on the attacked model."""
        return Budget(steps=0, models=self.config.models)

    def run(self, trial: Trial, budget: Budget) -> AttackResult:
        """Train the shadow models (cached) and score the target."""
        start = time.monotonic()
        models = self.config.models if budget.models is None else budget.models
        p, held = shadow_signals(trial, _CONFIDENCE, _SPLITS, models, budget.seconds)
        inside = held[:, forget_rows(trial.splits)].T
        counted = pseudo_outside(len(p["holdout"]), len(held), trial.seed)
        without = {"forget": only(p["forget"], ~inside), "holdout": only(p["holdout"], counted)}
        expected = {s: expected_offline(part, self.config.scale) for s, part in without.items()}
        expected_z = expected_offline(p["test"], self.config.scale)

        def score(view: ModelView, split: str) -> Floats:
            x, z = (take(view, s, _CONFIDENCE) for s in (split, "test"))
            return rmia(x, expected[split], z, expected_z, self.config.gamma)

        found = score(trial.view, "forget"), score(trial.view, "holdout")
        theirs = None
        if trial.retrained is not None:
            theirs = score(trial.retrained, "forget"), score(trial.retrained, "holdout")
        return AttackResult(
            access=self.access,
            values=separation("offline", *found, trial.seed, theirs),
            queries=sum(len(p[split]) for split in _SPLITS),
            seconds=time.monotonic() - start,
            curves={"roc/offline": roc(*found)},
            targets={
                "forget_ids": np.array(trial.splits.forget.ids),
                "holdout_ids": np.array(trial.splits.holdout.ids),
                "forget_offline": found[0],
                "holdout_offline": found[1],
            },
        )
