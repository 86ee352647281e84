"""Shadow models for calibrated attacks: random halves of the training data, and their numbers."""

import time
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from mmforget.metrics.common import predictions
from mmforget.metrics.ranking import Ranking, thin
from mmforget.metrics.signals import Floats, Ints, Predictions
from mmforget.record import MetricValue
from mmforget.rng import derive
from mmforget.types import ModelView, Splits, Trial

FPRS = (0.01, 0.001)


def half(size: int, model: int, seed: int) -> NDArray[np.bool_]:
    """Return which of `size` examples shadow model number `model` holds, [size].

    Models 2i and 2i + 1 hold a random half and its complement, so every example is in exactly
    half of any even number of models, and more models extend the same series.
    """
    chosen = np.zeros(size, dtype=np.bool_)
    order = np.random.default_rng(derive(seed, "half", model // 2)).permutation(size)
    chosen[order[: size // 2]] = True
    return chosen if model % 2 == 0 else ~chosen


def rounds(trial: Trial, models: int, seconds: float | None, least: int = 6) -> Iterator[int]:
    """Yield the numbers of the shadow models to train, in pairs.

    Args:
        trial: The trial; its processes agree on when to stop.
        models: How many at most; an odd one is left out.
        seconds: No pair is begun once these are spent, `least` models excepted; None: no limit.
        least: Models without which the attack says nothing.
    """
    start = time.monotonic()
    for model in range(models - models % 2):
        if seconds is not None and model >= least and model % 2 == 0:
            spent = time.monotonic() - start
            if trial.lab.engine.share(spent > seconds):
                return
        yield model


def forget_rows(splits: Splits) -> Ints:
    """Return the index in `splits.train` of every forget example, [n_f]."""
    place = {name: row for row, name in enumerate(splits.train.ids)}
    return np.array([place[name] for name in splits.forget.ids], dtype=np.int64)


def shadow_signals(
    trial: Trial,
    signal: Callable[[Predictions], Floats],
    splits: tuple[str, ...],
    models: int,
    seconds: float | None,
) -> tuple[dict[str, Floats], NDArray[np.bool_]]:
    """Train shadow models on halves of the training data and take one signal of each.

    Args:
        trial: The trial; shadow models come from its lab, which caches them.
        signal: What to take, [N].
        splits: Where to take it; each split is predicted once per model.
        models: Shadow models at most.
        seconds: Time limit.

    Returns:
        The signal by split, [N, M], and which training examples each model held, [M, n].
    """
    held, found = [], []
    for model in rounds(trial, models, seconds):
        held.append(half(len(trial.splits.train), model, trial.seed))
        keep = np.flatnonzero(held[-1]).tolist()
        view = trial.lab.view(trial.lab.shadow(keep, derive(trial.seed, "shadow", model)))
        found.append([take(view, split, signal) for split in splits])
    columns = zip(*found, strict=True)
    return {s: np.stack(c, axis=1) for s, c in zip(splits, columns, strict=True)}, np.stack(held)


def only(signals: Floats, counted: NDArray[np.bool_]) -> Floats:
    """Return signals [N, M] with NaN for the models that do not count."""
    return np.where(counted, signals, np.nan)


def take(view: ModelView, split: str, signal: Callable[[Predictions], Floats]) -> Floats:
    """Return one signal of a model on a split, [N]."""
    return signal(predictions(view, split))


def separation(
    name: str,
    members: Floats,
    others: Floats,
    seed: int,
    reference: tuple[Floats, Floats] | None = None,
    resamples: int = 1000,
) -> dict[str, MetricValue]:
    """Return AUC, balanced accuracy and TPR at 1 % and 0.1 % FPR of a score, with intervals.

    Args:
        name: Prefix of the values.
        members: Scores of the examples under attack, [P].
        others: Scores of non-members, [Q].
        seed: Seed of the bootstrap.
        reference: The same two for the retrained model.
        resamples: Bootstrap resamples.
    """
    theirs = None if reference is None else Ranking.of(*reference)
    retrained: dict[str, float] = {}
    if theirs is not None:
        retrained = {"auc": theirs.auc, "balanced_accuracy": theirs.balanced_accuracy}
        retrained |= {f"tpr@{fpr:g}": theirs.tpr_at(fpr) for fpr in FPRS}
    values = {}
    found = Ranking.of(members, others).intervals(FPRS, derive(seed, "bootstrap"), resamples)
    for key, interval in found.items():
        defined = not np.isnan(interval.value)
        note = "threshold chosen on the same scores" if key == "balanced_accuracy" else ""
        if not defined:
            note = f"not defined: {len(others)} non-members cannot show so low a rate"
        values[f"{name}/{key}"] = MetricValue(
            interval.value,
            "to_reference",
            retrained.get(key),
            interval.low if defined else None,
            interval.high if defined else None,
            n=len(members) + len(others),
            note=note,
        )
    return values


def roc(members: Floats, others: Floats) -> dict[str, object]:
    """Return the ROC curve of a score as a series to draw, at most 200 points, on log axes."""
    fpr, tpr = thin(*Ranking.of(members, others).curve)
    return {
        "x": fpr,
        "y": tpr,
        "x_label": "false-positive rate",
        "y_label": "true-positive rate",
        "x_scale": "log",
        "y_scale": "log",
    }
