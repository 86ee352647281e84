"""RMIA against an unlearned model: confidence compared with that of population data."""

import time
from dataclasses import dataclass
from operator import attrgetter
from typing import ClassVar

import numpy as np

from mmforget.attacks.likelihood import expected_offline, expected_online, rmia
from mmforget.attacks.lira import pseudo_outside
from mmforget.attacks.shadows import forget_rows, only, roc, separation, shadow_signals, take
from mmforget.metrics.signals import Floats
from mmforget.options import option
from mmforget.record import AttackResult, MetricValue
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
    nobody trained on. The same shadow models and the same two games as `lira`: `offline/...`
    (forget against holdout, only models without the example, equally many on both sides) and
    `online/...` (forget under the unlearned against forget under the retrained model). p(z) always
    takes the offline form, because no shadow model holds a test example.

    Values: AUC, balanced accuracy, TPR at 1 % and 0.1 % FPR, with bootstrap 95 % intervals.
    Direction: closer to the retrained model; online: 0.5 AUC.

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
        scale, gamma = self.config.scale, self.config.gamma
        offline = {split: expected_offline(part, scale) for split, part in without.items()}
        online = expected_online(only(p["forget"], inside), without["forget"])
        expected_z = expected_offline(p["test"], scale)

        def score(view: ModelView, split: str, expected: Floats) -> Floats:
            z = take(view, "test", _CONFIDENCE)
            return rmia(take(view, split, _CONFIDENCE), expected, z, expected_z, gamma)

        def population(view: ModelView) -> tuple[Floats, Floats]:
            return tuple(score(view, s, offline[s]) for s in without)  # type: ignore[return-value]

        found = {"offline": population(trial.view)}
        theirs = None if trial.retrained is None else population(trial.retrained)
        values: dict[str, MetricValue] = separation(
            "offline", *found["offline"], trial.seed, theirs
        )
        if trial.retrained is not None:
            control = score(trial.retrained, "forget", online)
            found["online"] = (score(trial.view, "forget", online), control)
            values |= separation("online", *found["online"], trial.seed, (control, control))
        return AttackResult(
            access=self.access,
            values=values,
            queries=sum(len(p[split]) for split in _SPLITS),
            seconds=time.monotonic() - start,
            curves={f"roc/{name}": roc(*pair) for name, pair in found.items()},
            targets={
                "forget_ids": np.array(trial.splits.forget.ids),
                "holdout_ids": np.array(trial.splits.holdout.ids),
                "holdout_offline": found["offline"][1],
                **{f"forget_{name}": pair[0] for name, pair in found.items()},
            },
        )
