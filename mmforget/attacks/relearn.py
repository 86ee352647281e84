"""Relearning: how fast a few forget examples bring the forgotten back."""

import copy
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmforget.context import Context
from mmforget.engine import epoch_order
from mmforget.options import option
from mmforget.record import AttackResult, MetricValue
from mmforget.rng import derive
from mmforget.training import Supervised, optimise
from mmforget.types import Attack, Budget, Dataset, Training, Trial, subset


@dataclass(frozen=True)
class RelearnConfig(Training):
    """The attacker's fine-tuning; its defaults hold for a small classifier."""

    examples: int = option(32, "forget examples the attacker fine-tunes on (k)", low=1)
    max_steps: int | None = option(60, "optimiser steps of the attacker", low=1)
    every: int = option(4, "steps between two points of the curve", low=1)
    lr: float = option(1e-3, "learning rate", low=0)
    momentum: float = option(0.9, "momentum of SGD", low=0, high=1)
    batch_size: int = option(32, "examples in an effective batch", low=1)
    tolerance: float = option(0.02, "how near to the original's level counts as back", low=0)


class Relearn(Attack[RelearnConfig]):
    """Fine-tune on k forget examples and watch the other forget examples come back.

    The level is the accuracy on the forget examples that the attacker does NOT hold (their mean
    loss, negated, where the modality records no labels); with k at least the size of the forget
    set it is measured on all of them. A model that never saw them learns them at the pace of the
    retrained model; one that only hides them is back after a few steps. Values, all to be read
    against the retrained model:

    - `recovered`: level after the last step.
    - `mean_level`: mean level over the curve: high means back early.
    - `steps_to_original`: steps until the level is within `tolerance` of the original model's; the
      step budget if it never is (the note says so).
    """

    access = "white"
    citation = (
        "Golatkar et al. 2020 (relearn time); Lynch et al. 2024, Eight Methods to Evaluate Robust "
        "Unlearning in LLMs, arXiv 2402.16835"
    )
    config_type = RelearnConfig

    def budget(self) -> Budget:
        """The configured steps."""
        return Budget(steps=self.config.max_steps)

    def run(self, trial: Trial, budget: Budget) -> AttackResult:
        """Fine-tune a copy of the model and return its recovery curve."""
        started = time.perf_counter()
        forget = trial.splits.forget
        order = epoch_order(len(forget), trial.seed, "relearn")
        held, others = order[: self.config.examples], order[self.config.examples :]
        rows = sorted(others or held)
        watched = subset(forget, rows)
        original = level(_rows(trial.original.numbers("forget"), rows))
        steps = min(budget.steps or 1, self.config.max_steps or 1)
        tuned = _Watched(
            replace(self.config, epochs=steps, max_steps=steps), trial, watched, self.config.every
        )
        attacker = subset(forget, held)
        ctx = Context(
            engine=trial.lab.engine,
            adapter=trial.lab.adapter,
            model=copy.deepcopy(trial.view.model),
            splits=replace(trial.splits, retain=attacker),
            reads=tuned.reads,
            label="relearn",
            seed=derive(trial.seed, "relearn"),
        )
        optimise(ctx, tuned)
        curve = tuned.curve
        reached = [step for step, value in curve if value >= original - self.config.tolerance]
        note = "" if reached else f"not reached in {steps} steps"
        n = len(watched)
        values = {
            "recovered": MetricValue(curve[-1][1], "to_reference", n=n),
            "mean_level": MetricValue(float(np.mean([v for _, v in curve])), "to_reference", n=n),
            "steps_to_original": MetricValue(
                float(reached[0] if reached else steps), "to_reference", n=n, note=note
            ),
        }
        return AttackResult(
            access=self.access,
            values=values,
            queries=n * len(curve),
            seconds=time.perf_counter() - started,
            curves={
                "recovery": {
                    "x": [step for step, _ in curve],
                    "y": [value for _, value in curve],
                    "x_label": f"fine-tuning steps on {len(held)} forget examples",
                    "y_label": "level on the other forget examples",
                    "original": original,
                }
            },
        )


class _Watched(Supervised):
    """Supervised fine-tuning that measures the level before it and every few steps."""

    def __init__(self, config: Training, trial: Trial, watched: Dataset, every: int) -> None:
        super().__init__(config)
        self.trial = trial
        self.watched = watched
        self.every = every
        self.curve: list[tuple[int, float]] = []

    def setup(self, ctx: Context) -> None:
        """Measure the start."""
        self._measure(ctx, 0)

    def after_step(self, ctx: Context, optimizer: Any) -> None:
        """Measure every few steps and at the end."""
        done = ctx.step + 1
        if done % self.every == 0 or done == ctx.steps:
            self._measure(ctx, done)

    def _measure(self, ctx: Context, step: int) -> None:
        numbers = ctx.engine.predict(ctx.model, ctx.adapter, self.watched, self.trial.seed)
        self.curve.append((step, level(numbers)))


def level(numbers: dict[str, np.ndarray[Any, Any]]) -> float:
    """Return how much of a set a model knows: accuracy, or minus the mean loss without labels."""
    if "logits" not in numbers:
        return -float(numbers["loss"].mean())
    logits, label = numbers["logits"], numbers["label"]
    if label.ndim == 1:
        return float((logits.argmax(1) == label).mean())
    return float(((logits > 0) == (label > 0.5)).mean())


def _rows(
    numbers: dict[str, np.ndarray[Any, Any]], rows: list[int]
) -> dict[str, np.ndarray[Any, Any]]:
    return {name: array[rows] for name, array in numbers.items()}
