"""The metric of the NeurIPS 2023 unlearning challenge: unlearned against retrained models."""

import math
import time
from dataclasses import dataclass
from operator import attrgetter
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from mmforget.attacks.shadows import forget_rows, rounds, take
from mmforget.metrics.signals import Floats, Ints
from mmforget.options import option
from mmforget.record import AttackResult, MetricValue
from mmforget.rng import derive
from mmforget.types import Attack, Budget, ModelView, Trial

_SPLITS = ("forget", "retain", "test")  # what each model is asked about
_BUFFER = 2.0  # how far double thresholds reach beyond the narrower distribution
_PEAKED = 0.01  # ratio of ranges below which the two are told apart without a rule


def challenge_epsilons(
    unlearned: ArrayLike,
    retrained: ArrayLike,
    delta: float = 1e-5,
    cap: float = 50.0,
    per_unit: int = 100,
) -> Floats:
    """Return for each example the largest ε any threshold rule shows between two sets of models.

    A rule that errs with FPR and FNR shows
    ε = max(log(1-δ-FPR) - log FNR, log(1-δ-FNR) - log FPR); it shows `cap` if it never errs, and
    nothing if only one rate is zero, as for too few models. Rules: one threshold over the joint
    range, and an interval around the narrower distribution. Rates depend on counts only, so ε is
    tabulated for all (M+1)² pairs of counts, and thresholds are counted by sorting.

    Args:
        unlearned: φ under the unlearned models, [M, N].
        retrained: φ under the retrained models, [M, N].
        delta: δ of differential privacy.
        cap: Largest ε; also given where one range is below 1 % of the other.
        per_unit: Thresholds per unit of φ.

    Returns:
        [N] in [0, cap]; NaN where no rule has two non-zero error rates or none (tiny M). Two
        constant and equal distributions give 0.
    """
    a, b = np.asarray(unlearned, dtype=np.float64), np.asarray(retrained, dtype=np.float64)
    table = _epsilon_table(len(a), delta)
    swap = np.median(b, axis=0) > np.median(a, axis=0)
    positive, negative = np.where(swap, b, a), np.where(swap, a, b)
    columns = zip(np.sort(positive, axis=0).T, np.sort(negative, axis=0).T, strict=True)
    return np.array([_epsilon(p, q, table, cap, per_unit) for p, q in columns])


def top_bucket(models: int) -> float:
    """Return the largest ε that M models can resolve, ⌈ln(M - 1)⌉; more earns no points."""
    return float(math.ceil(math.log(models - 1)))


def forget_score(epsilons: ArrayLike, models: int, bucket: float = 0.5) -> float:
    """Return the mean points over examples, in [0, 1]: 2^-k in the k-th bucket of ε.

    Args:
        epsilons: From `challenge_epsilons`; NaN earns nothing.
        models: M, models on each side.
        bucket: Width of a bucket.
    """
    values = np.asarray(epsilons, dtype=np.float64)
    buckets = math.floor(top_bucket(models) / bucket + 1e-9)
    earns = values < buckets * bucket
    return float(np.where(earns, 0.5 ** np.floor(np.where(earns, values, 0) / bucket), 0.0).mean())


def final_score(score: float, retain: tuple[float, float], test: tuple[float, float]) -> float:
    """Return the forget score times the ratios of retain and test accuracy, not cut at 1.

    Args:
        score: The forget score.
        retain: Mean accuracy of the unlearned and of the retrained models on retain.
        test: The same on test.
    """
    return score * (retain[0] / retain[1]) * (test[0] / test[1])


@dataclass(frozen=True)
class ChallengeConfig:
    """How many models on each side, and where unlearning starts."""

    models: int = option(16, "unlearned models, and as many retrained ones (published: 512)", low=8)
    fresh_originals: bool = option(
        False, "train a new original for each unlearned model, not one for all as published"
    )


class Challenge(Attack[ChallengeConfig]):
    """Can M unlearned models be told from M retrained ones by their φ on a forget example?

    - `forget_score`: mean points over forget examples, up, 1 best; `final_score`: times the ratios
      of retain and test accuracy to the retrained models, up.
    - `epsilon/median`: median of the examples' ε, down.
    - `half/forget_score`: the same from half of the models on each side; its reference is one half
      of the retrained models against the other. That floor is NOT 1: ε is a maximum over many
      rules on few models. Compare with it before believing any forget score.

    Pitfalls: M models resolve ε up to ln(M - 1) only, so scores of different M do not compare, and
    16 models are no stand-in for the 512 of the competition. Unlearned models all start from the
    same original, as published: their spread is that of unlearning, not of training; see
    `fresh_originals`.
    """

    access: ClassVar[str] = "grey"
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    citation: ClassVar[str] = "Triantafillou et al., arXiv 2406.09073"
    config_type: ClassVar[type] = ChallengeConfig

    def budget(self) -> Budget:
        """Both sides are models to train."""
        return Budget(steps=0, models=2 * self.config.models)

    def run(self, trial: Trial, budget: Budget) -> AttackResult:
        """Make the models (cached) and compare them."""
        start = time.monotonic()
        models = self.config.models if budget.models is None else budget.models // 2
        forget = forget_rows(trial.splits)
        retain = np.setdiff1d(np.arange(len(trial.splits.train)), forget)
        unlearned, retrained = [], []
        for model in rounds(trial, models, budget.seconds, least=8):
            unlearned.append(_measure(self._unlearned(trial, model, forget, retain)))
            reference = trial.lab.shadow(retain.tolist(), derive(trial.seed, "retrain", model))
            retrained.append(_measure(trial.lab.view(reference)))
        a, b = (np.stack([phi for phi, *_ in side]) for side in (unlearned, retrained))
        retain_rates, test_rates = (
            (float(np.mean([m[i] for m in unlearned])), float(np.mean([m[i] for m in retrained])))
            for i in (1, 2)
        )
        epsilons = challenge_epsilons(a, b)
        score = forget_score(epsilons, len(a))
        n, middle = a.shape[1], len(a) // 2
        halves, floor = (
            forget_score(challenge_epsilons(side[:middle], b[middle : 2 * middle]), middle)
            for side in (a, b)
        )
        note = f"{len(a)} models on each side: ε is resolved up to {math.log(len(a) - 1):.2f}"
        return AttackResult(
            access=self.access,
            values={
                "forget_score": MetricValue(score, "up", n=n, note=note),
                "final_score": MetricValue(
                    final_score(score, retain_rates, test_rates), "up", n=n, note=note
                ),
                "epsilon/median": MetricValue(float(np.nanmedian(epsilons)), "down", n=n),
                "half/forget_score": MetricValue(
                    halves, "to_reference", floor, n=n, note=f"{middle} models on each side"
                ),
            },
            queries=len(a) * sum(len(trial.splits.get(split)) for split in _SPLITS),
            seconds=time.monotonic() - start,
            targets={"forget_ids": np.array(trial.splits.forget.ids), "epsilon": epsilons},
        )

    def _unlearned(self, trial: Trial, model: int, forget: Ints, retain: Ints) -> ModelView:
        original = trial.original.model
        if self.config.fresh_originals:
            everything = list(range(len(trial.splits.train)))
            original = trial.lab.shadow(everything, derive(trial.seed, "original", model))
        seed = derive(trial.seed, "unlearn", model)
        return trial.lab.view(trial.lab.unlearn(original, forget.tolist(), retain.tolist(), seed))


def _measure(view: ModelView) -> tuple[Floats, float, float]:
    """Return φ on forget, [N], and accuracy on retain and on test."""
    correct = attrgetter("correctness")
    return (
        take(view, "forget", attrgetter("phi")),
        float(take(view, "retain", correct).mean()),
        float(take(view, "test", correct).mean()),
    )


def _epsilon_table(models: int, delta: float) -> Floats:
    """Return ε by counts of false negatives and false positives, [M+1, M+1]; NaN: no evidence."""
    rate = np.arange(models + 1) / models
    with np.errstate(divide="ignore", invalid="ignore"):
        missed, false = np.log(rate)[:, None], np.log(rate)[None]
        kept = np.log(1 - delta - rate)  # NaN at rate 1, where the other term decides
        shown: Floats = np.fmax(kept[None] - missed, kept[:, None] - false)
    table = np.fmax(shown, 0.0)
    table[0, :] = table[:, 0] = np.nan
    table[0, 0] = np.inf
    return table


def _epsilon(p: Floats, q: Floats, table: Floats, cap: float, per_unit: int) -> float:
    """Return ε of one example from sorted φ of the positive and the negative side, [M] each."""
    widths = p[-1] - p[0], q[-1] - q[0]
    if max(widths) == 0:
        return 0.0 if p[0] == q[0] else cap
    if min(widths) / max(widths) < _PEAKED:
        return cap
    low, high = min(p[0], q[0]), max(p[-1], q[-1])
    single = np.linspace(low, high, math.ceil((high - low) * per_unit))
    found = [_best(table, np.searchsorted(p, single), len(q) - np.searchsorted(q, single))]
    narrow, wide = (q, p) if widths[0] >= widths[1] else (p, q)
    width = min(widths)
    first, last = narrow[0] + width - _BUFFER, narrow[-1] + _BUFFER
    right = np.linspace(first, last, math.ceil((last - first) * per_unit))
    offsets = np.linspace(-width - _BUFFER, -width + _BUFFER, math.ceil(2 * _BUFFER * per_unit))
    left = right[:, None] + offsets
    inside = [
        np.searchsorted(side, right, side="right")[:, None] - np.searchsorted(side, left)
        for side in (narrow, wide)
    ]
    hit, false = (np.maximum(count, 0) for count in inside)
    found.append(_best(table, len(narrow) - hit, false))
    best = np.fmax(found[0], found[1])
    return float(np.minimum(best, cap))


def _best(table: Floats, missed: Ints, false: Ints) -> float:
    """Return the largest ε over rules; NaN if none shows anything."""
    shown = table[missed, false]
    return float(np.fmax.reduce(shown, axis=None, initial=np.nan))
