"""LiRA against an unlearned model: membership scores calibrated example by example."""

import time
from dataclasses import dataclass
from operator import attrgetter
from typing import ClassVar

import numpy as np

from mmforget.attacks.likelihood import calibrated, lira_offline, lira_online
from mmforget.attacks.shadows import (
    forget_rows,
    half,
    only,
    roc,
    separation,
    shadow_signals,
    take,
)
from mmforget.metrics.signals import Floats
from mmforget.options import option
from mmforget.record import AttackResult, MetricValue
from mmforget.rng import derive
from mmforget.types import Attack, Budget, ModelView, Trial

_PHI = attrgetter("phi")


@dataclass(frozen=True)
class LiRAConfig:
    """How many shadow models, and how their spread is fitted."""

    models: int = option(16, "shadow models, each on half of the training data", low=6)
    fixed_variance: bool | None = option(
        None, "one spread for all examples; null: below 64 shadow models"
    )


class LiRA(Attack[LiRAConfig]):
    """Was this example in the training data? Likelihood ratio of its logit-scaled confidence φ.

    Shadow models are trained, not unlearned, each on half of the training data; every training
    example is in exactly half of them. Two games are played:

    - `offline/...` and `calibrated/...`: forget (members) against holdout under the unlearned
      model. Holdout examples are in no shadow model, so only models WITHOUT the example are used,
      for both sides alike and equally many (for a holdout example a random half of the models):
      a rule that differed between the sides would give membership away by itself. Score: one-sided
      Gaussian tail, and φ minus the median.
    - `online/...`: forget examples under the unlearned model against the same examples under the
      retrained model, scored by log N(φ; in) - log N(φ; out). Each example is its own control, so
      distribution shift between forget and holdout plays no part; needs the retrained model.

    Values: AUC, balanced accuracy, TPR at 1 % and 0.1 % FPR, with bootstrap 95 % intervals.
    Direction: closer to the retrained model; online: 0.5 AUC, which is what it has against itself.

    Pitfalls: shadow models see half of the data, the target all of it, so φ is shifted; the score
    is compared between examples, which a common shift leaves alone. The online game compares with
    ONE retrained model, whose own noise bounds how far 0.5 can be told. This attack does not know
    that the model was unlearned; `ulira` does and is stronger.
    """

    access: ClassVar[str] = "grey"
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    citation: ClassVar[str] = "Carlini et al., arXiv 2112.03570"
    config_type: ClassVar[type] = LiRAConfig

    def budget(self) -> Budget:
        """The shadow models; no gradient steps on the attacked model."""
        return Budget(steps=0, models=self.config.models)

    def run(self, trial: Trial, budget: Budget) -> AttackResult:
        """Train the shadow models (cached) and score the target."""
        start = time.monotonic()
        models = self.config.models if budget.models is None else budget.models
        phi, held = shadow_signals(trial, _PHI, ("forget", "holdout"), models, budget.seconds)
        fixed = self.config.fixed_variance
        fixed = len(held) < 64 if fixed is None else fixed
        inside = held[:, forget_rows(trial.splits)].T
        counted = pseudo_outside(len(phi["holdout"]), len(held), trial.seed)
        outside = np.concatenate([only(phi["forget"], ~inside), only(phi["holdout"], counted)])
        trained = only(phi["forget"], inside)
        n = len(inside)

        def population(view: ModelView) -> dict[str, tuple[Floats, Floats]]:
            target = np.concatenate([take(view, s, _PHI) for s in ("forget", "holdout")])
            scores = {
                "offline": lira_offline(target, outside, fixed),
                "calibrated": calibrated(target, outside),
            }
            return {name: (score[:n], score[n:]) for name, score in scores.items()}

        def online(view: ModelView) -> Floats:
            return lira_online(take(view, "forget", _PHI), trained, outside[:n], fixed)

        found = population(trial.view)
        reference = None if trial.retrained is None else population(trial.retrained)
        values: dict[str, MetricValue] = {}
        for name, (members, others) in found.items():
            theirs = None if reference is None else reference[name]
            values |= separation(name, members, others, trial.seed, theirs)
        if trial.retrained is not None:
            own, theirs_online = online(trial.view), online(trial.retrained)
            found["online"] = (own, theirs_online)
            itself = (theirs_online, theirs_online)
            values |= separation("online", own, theirs_online, trial.seed, itself)
        return AttackResult(
            access=self.access,
            values=values,
            queries=len(outside),
            seconds=time.monotonic() - start,
            curves={f"roc/{name}": roc(*pair) for name, pair in found.items()},
            targets={
                "forget_ids": np.array(trial.splits.forget.ids),
                "holdout_ids": np.array(trial.splits.holdout.ids),
                "forget_phi": phi["forget"],
                "holdout_phi": phi["holdout"],
                "forget_inside": inside,
                **{f"forget_{name}": pair[0] for name, pair in found.items()},
            },
        )


def pseudo_outside(
    size: int, models: int, seed: int
) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    """Return which shadow models count for examples that none of them held, [size, models].

    A random half for each example, so that they are calibrated by as many models as an example
    of the training data is.
    """
    stream = derive(seed, "pseudo_outside")
    return np.stack([half(size, model, stream) for model in range(models)], axis=1)
