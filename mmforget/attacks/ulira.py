"""U-LiRA: a membership attack that knows the model was unlearned, and by which method."""

import time
from dataclasses import dataclass
from operator import attrgetter
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mmforget.attacks.likelihood import lira_online
from mmforget.attacks.shadows import forget_rows, half, only, roc, rounds, separation, take
from mmforget.metrics.ranking import mean_interval
from mmforget.metrics.signals import Floats
from mmforget.options import option
from mmforget.record import AttackResult, MetricValue
from mmforget.rng import derive
from mmforget.types import Attack, Budget, Trial

_PHI = attrgetter("phi")


@dataclass(frozen=True)
class ULiRAConfig:
    """How many shadow models, and how their spread is fitted."""

    models: int = option(8, "shadow models, each trained on a half and unlearned", low=6)
    fixed_variance: bool | None = option(
        None, "one spread for all examples; null: below 64 shadow models"
    )


class ULiRA(Attack[ULiRAConfig]):
    """Was this forget example trained on and then unlearned, or never trained on?

    Every shadow model is trained on a random half of the training data, then unlearns, with the
    method under test, all forget examples in its half. For a forget example x the models fall
    into two populations of equal size: (A) trained with x, then unlearned with x in the forget
    set; (B) trained without x, and unlearned on other data. Gaussians are fitted to φ under A and
    under B; the likelihood ratio decides, with equal priors. One shadow model serves all examples.

    - `shadow_accuracy`, `shadow/...`: each shadow model in turn is the target and the others, but
      for its complement, give the fit. Both truths are equally frequent for every example. Tests
      the METHOD.
    - `accuracy`: the share of right verdicts over forget examples, half of them under the
      unlearned model (truth A), half under the retrained model (truth B). Tests THIS model; needs
      the retrained model. `member_rate`: verdicts A under the unlearned model.

    Direction: 0.5 is perfect, 1 is no forgetting at all. Below 0.5 by more than noise means that
    the fit does not carry over to the target.

    Pitfalls: shadow models see half of the data, so verdicts on the target carry a shift of φ,
    which a likelihood ratio with a fixed threshold feels; `shadow_accuracy` does not. A few shadow
    models give a lower bound on leakage. Intervals are over examples, not over models.
    """

    access: ClassVar[str] = "grey"
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    citation: ClassVar[str] = "Hayes et al., arXiv 2403.01218; Kurmanji et al., arXiv 2302.09880"
    config_type: ClassVar[type] = ULiRAConfig

    def budget(self) -> Budget:
        """The shadow models, each trained and unlearned once."""
        return Budget(steps=0, models=self.config.models)

    def run(self, trial: Trial, budget: Budget) -> AttackResult:
        """Train and unlearn the shadow models (cached), fit, and judge."""
        start = time.monotonic()
        models = self.config.models if budget.models is None else budget.models
        phi, with_x = self._populations(trial, models, budget.seconds)
        fixed = self.config.fixed_variance
        fixed = phi.shape[1] < 64 if fixed is None else fixed
        shadow = _left_out(phi, with_x, fixed)
        right = ((shadow > 0) == with_x).mean(axis=1)
        values = {"shadow_accuracy": _rate(right, 0.5)}
        a, b = shadow[with_x], shadow[~with_x]
        values |= separation("shadow", a, b, trial.seed)
        curves = {"roc/shadow": roc(a, b)}
        fit = (only(phi, with_x), only(phi, ~with_x), fixed)
        verdict = lira_online(take(trial.view, "forget", _PHI), *fit)
        control = None
        if trial.retrained is not None:
            control = lira_online(take(trial.retrained, "forget", _PHI), *fit)
            values["accuracy"] = _rate(((verdict > 0) + 1.0 - (control > 0)) / 2, 0.5)
        values["member_rate"] = _rate(
            verdict > 0, None if control is None else float((control > 0).mean())
        )
        return AttackResult(
            access=self.access,
            values=values,
            queries=len(phi),
            seconds=time.monotonic() - start,
            curves=curves,
            targets={
                "forget_ids": np.array(trial.splits.forget.ids),
                "forget_phi": phi,
                "forget_inside": with_x,
                "forget_score": verdict,
                "forget_shadow_accuracy": right,
            },
        )

    def _populations(
        self, trial: Trial, models: int, seconds: float | None
    ) -> tuple[Floats, NDArray[np.bool_]]:
        """Return φ of forget examples under each unlearned shadow, [n_f, M], and who is in A."""
        rows = forget_rows(trial.splits)
        forgotten = np.zeros(len(trial.splits.train), dtype=np.bool_)
        forgotten[rows] = True
        phi, with_x = [], []
        for model in rounds(trial, models, seconds):
            held = half(len(forgotten), model, trial.seed)
            trained = trial.lab.shadow(
                np.flatnonzero(held).tolist(), derive(trial.seed, "shadow", model)
            )
            unlearned = trial.lab.unlearn(
                trained,
                forget=np.flatnonzero(held & forgotten).tolist(),
                keep=np.flatnonzero(held & ~forgotten).tolist(),
                seed=derive(trial.seed, "unlearn", model),
            )
            phi.append(take(trial.lab.view(unlearned), "forget", _PHI))
            with_x.append(held[rows])
        return np.stack(phi, axis=1), np.stack(with_x, axis=1)


def _left_out(phi: Floats, with_x: NDArray[np.bool_], fixed: bool) -> Floats:
    """Return the log-likelihood ratio under each shadow model, fitted on the others, [n_f, M].

    Complementary models are left out together. One of the two is in A and one in B, whatever the
    example, so both fits keep as many models and neither is favoured by chance.
    """
    ratios = np.empty_like(phi)
    pair = np.arange(phi.shape[1]) // 2
    for model in range(phi.shape[1]):
        others = pair != pair[model]
        fit = only(phi, with_x & others), only(phi, ~with_x & others)
        ratios[:, model] = lira_online(phi[:, model], *fit, fixed)
    return ratios


def _rate(hits: Floats | NDArray[np.bool_], reference: float | None) -> MetricValue:
    found = mean_interval(hits)
    return MetricValue(found.value, "to_reference", reference, found.low, found.high, len(hits))
