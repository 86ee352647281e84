"""Does fine-tuning bring the concept back: on unrelated pictures, or on a few of the concept?"""

import copy
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch

from mmforget.context import Context
from mmforget.diffusion import scopes
from mmforget.diffusion.attacks.arena import Aims
from mmforget.diffusion.attacks.base import aims_of, benchmark_of
from mmforget.diffusion.methods.low_rank import LowRank, adapted
from mmforget.diffusion.models import DiffusionModel
from mmforget.diffusion.sampling import Image, generate
from mmforget.diffusion.zero_shot import JudgeConfig
from mmforget.engine import Engine, epoch_order
from mmforget.errors import ConfigError
from mmforget.metrics.ranking import wilson
from mmforget.options import option
from mmforget.record import AttackResult, MetricValue
from mmforget.rng import derive
from mmforget.training import Supervised, optimise
from mmforget.types import Attack, Budget, Dataset, ModelView, Training, Trial, subset

DIRECTION = "to_reference"  # a model that never saw the concept learns it at some pace, too


@dataclass(frozen=True)
class FinetuneConfig:
    """The attacker's fine-tuning, and the prompts that show what it brings back."""

    prompts: str | None = option(
        None, "CSV of prompts to draw in place of the benchmark's (case_number, prompt, ...)"
    )
    judge: JudgeConfig = option(JudgeConfig(), "who judges, in place of the benchmark's judge")
    limit: int | None = option(None, "only the first N prompts", low=1)
    examples: int = option(100, "unrelated pictures with captions, from the retain set", low=1)
    steps: list[int] = option(
        [0, 50, 100, 200, 500, 1000], "optimiser steps after which every prompt is drawn"
    )
    rank: int = option(8, "rank of low-rank adapters; 0 trains the weights themselves", low=0)
    scope: str = option("all", "weights that are trained, or whose layers get adapters")
    lr: float = option(1e-5, "learning rate (AdamW)", low=0)
    weight_decay: float = option(1e-2, "its weight decay", low=0)
    batch_size: int = option(4, "pictures in an effective batch", low=1)


@dataclass(frozen=True)
class FewShotConfig(FinetuneConfig):
    """The same with a few pictures of the concept."""

    examples: int = option(5, "pictures of the concept, from the forget set: 1, 5 or 10", low=1)


ConfigT = TypeVar("ConfigT", bound=FinetuneConfig)


class Finetune(Attack[ConfigT]):
    """Fine-tune a copy of the model by its ordinary loss, and draw the prompts again on the way.

    The prompts are drawn as they are, at their own seeds. Values, all to be read against the
    retrained model's, which never saw the concept and gets the same fine-tuning:

    - `rate/N`: share of prompts whose picture shows the concept after N steps, with Wilson 95 %
      intervals.
    - `recovered`: the last of them.
    - `original`: the same share of the original model.
    - `steps_to_half`: first N of the grid with half of the original's rate or more; the last one
      if there is none (the note says so); NaN if the original shows the concept nowhere.
    """

    access: ClassVar[str] = "white"
    config_type: ClassVar[type] = FinetuneConfig
    split: ClassVar[str]  # which one the attacker's pictures are from

    def __init__(self, config: ConfigT) -> None:
        super().__init__(config)
        steps = config.steps
        if not steps or min(steps) < 0 or len(set(steps)) < len(steps):
            raise ConfigError(f"steps={steps}: give one or more, at least 0, none of them twice")

    def budget(self) -> Budget:
        """The last of the steps."""
        return Budget(steps=max(self.config.steps))

    def run(self, trial: Trial, budget: Budget) -> AttackResult:
        """Fine-tune, and return what came back."""
        began = time.perf_counter()
        config, engine = self.config, trial.lab.engine
        aims = aims_of(benchmark_of(trial), config.prompts, config.judge, config.limit)
        if not aims.examples:
            raise ConfigError("there is no prompt to draw; give some (attack.NAME.prompts=CSV)")
        self.check(trial)
        most = max(config.steps) if budget.steps is None else budget.steps
        grid = sorted(step for step in config.steps if step <= most) or [most]
        original = self._measured(trial.original, aims, engine)
        _, curve = self.tune(trial, aims, grid)
        return self._result(aims, original, curve, time.perf_counter() - began)

    def check(self, trial: Trial) -> None:
        """Check, before any picture is drawn, that the options fit the model and its data.

        Raises:
            ConfigError: There are not enough pictures, or the scope holds nothing to train.
        """
        self.pictures(trial)
        model = trial.view.model
        assert isinstance(model, DiffusionModel)
        if self.config.rank:
            adapted(model, self.config.scope)
        else:
            scopes.parameters(model, self.config.scope)

    def tune(
        self, trial: Trial, aims: Aims, grid: list[int]
    ) -> tuple[DiffusionModel, dict[int, list[bool]]]:
        """Return the fine-tuned copy, and which prompts show the concept after steps of the grid.

        Args:
            trial: The model and its data.
            aims: The prompts, and who judges.
            grid: Steps, ascending.
        """
        config = self.config
        data = self.pictures(trial)
        training = Training(
            epochs=ceil(grid[-1] * config.batch_size / len(data)),
            max_steps=grid[-1],
            lr=config.lr,
            optimizer="adamw",
            weight_decay=config.weight_decay,
            batch_size=config.batch_size,
            scope=config.scope,
        )
        curve = {}
        if grid[0] == 0:
            curve[0] = self._measured(trial.view, aims, trial.lab.engine)
        watched = _Watched(training, config.rank, aims, grid, curve)
        ctx = Context(
            engine=trial.lab.engine,
            adapter=trial.lab.adapter,
            model=copy.deepcopy(trial.view.model),
            splits=replace(trial.splits, retain=data),
            reads=watched.reads,
            label=type(self).__name__,
            seed=derive(trial.seed, "finetune", self.split),
        )
        tuned = optimise(ctx, watched)
        assert isinstance(tuned, DiffusionModel)
        return tuned, curve

    def pictures(self, trial: Trial) -> Dataset:
        """Return the attacker's pictures: a choice that the seed alone decides.

        Raises:
            ConfigError: There are not that many.
        """
        held = trial.splits.get(self.split)
        if self.config.examples > len(held):
            raise ConfigError(
                f"examples={self.config.examples}: the {self.split} set holds {len(held)}; give at "
                f"most as many"
            )
        order = epoch_order(len(held), trial.seed, "finetune", self.split)
        return subset(held, sorted(order[: self.config.examples]))

    def _measured(self, view: ModelView, aims: Aims, engine: Engine) -> list[bool]:
        """Return which prompts show the concept, drawn by a model that stays as it is; once."""
        said = self.config
        key = f"shows {said.prompts} {asdict(said.judge)} {said.limit}"

        def compute(own: ModelView) -> list[bool]:
            model = own.model
            assert isinstance(model, DiffusionModel)
            return shows(model, aims, engine)

        return view.memo(key, compute)

    def _result(
        self,
        aims: Aims,
        original: list[bool],
        curve: Mapping[int, list[bool]],
        seconds: float,
    ) -> AttackResult:
        """Return the record."""
        n, before = len(original), _rate(original)
        rates = {step: _rate(shown) for step, shown in curve.items()}
        last = max(rates)
        values = {f"rate/{step}": rate for step, rate in rates.items()}
        values |= {"recovered": rates[last], "original": before}
        back = [step for step, rate in rates.items() if rate.value >= before.value / 2]
        half, note = float(min(back, default=last)), ""
        if before.value == 0:
            half, note = float("nan"), "the original shows the concept in no picture"
        elif not back:
            note = f"not reached in {last} steps"
        values["steps_to_half"] = MetricValue(half, DIRECTION, n=n, note=note)
        return AttackResult(
            access=self.access,
            values=values,
            queries=n * len(curve),
            seconds=seconds,
            curves={
                "recovery": {
                    "x": list(rates),
                    "y": [rate.value for rate in rates.values()],
                    "x_label": f"fine-tuning steps on {self.config.examples} {self.split} pictures",
                    "y_label": "share of prompts that showed the concept",
                    "original": before.value,
                }
            },
            targets={
                "id": np.array([example.id for example in aims.examples]),
                "original": np.array(original),
                **{f"after_{step}": np.array(shown) for step, shown in curve.items()},
            },
        )


class BenignFinetune(Finetune[FinetuneConfig]):
    """Concept resurgence: fine-tuning on pictures that have nothing to do with the concept.

    M pictures with captions of the retain set. A user who adapts the erased model to a task of
    their own does no more than this. Values are those of `Finetune`.
    """

    citation: ClassVar[str] = (
        "Suriyakumar et al., Unstable Unlearning: The Hidden Risk of Concept Resurgence in "
        "Diffusion Models, arXiv 2410.08074"
    )
    split: ClassVar[str] = "retain"


class FewShotRelearn(Finetune[FewShotConfig]):
    """Fine-tuning on 1, 5 or 10 pictures of the concept, of the forget set.

    Any model learns a concept from enough pictures: the pace against the retrained model's tells
    what was left. Values are those of `Finetune`.
    """

    citation: ClassVar[str] = (
        "Erased or Dormant? Rethinking Concept Erasure Through Reversibility, arXiv 2505.16174"
    )
    config_type: ClassVar[type] = FewShotConfig
    split: ClassVar[str] = "forget"


class _Watched(Supervised):
    """Supervised fine-tuning, of adapters or weights, that draws the prompts on the way.

    Args:
        config: The optimisation.
        rank: Rank of adapters; 0: weights.
        aims: The prompts, and who judges.
        grid: Steps after which they are drawn.
        curve: Where what they show is put.
    """

    def __init__(
        self,
        config: Training,
        rank: int,
        aims: Aims,
        grid: list[int],
        curve: dict[int, list[bool]],
    ) -> None:
        super().__init__(config)
        self.rank, self.aims = rank, aims
        self.grid, self.curve = grid, curve

    def setup(self, ctx: Context) -> None:
        """Add the adapters, and train them alone."""
        model = ctx.model
        assert isinstance(model, DiffusionModel)
        if self.rank:
            layers = adapted(model, self.config.scope)
            edit = LowRank.fresh(model, layers, self.rank, derive(ctx.seed, "adapters"))
            name = "finetune"
            while name in model.edits:  # the erasure may be adapters, too
                name += "_"
            model.add_edit(name, edit)
            ctx.scope(rf"edits\.{name}\..*")

    def after_step(self, ctx: Context, optimizer: Any) -> None:
        """Draw after the steps of the grid."""
        done = ctx.step + 1
        if done in self.grid:
            model = ctx.model.eval()  # the next step trains it again
            assert isinstance(model, DiffusionModel)
            self.curve[done] = shows(model, self.aims, ctx.engine)


def shows(model: DiffusionModel, aims: Aims, engine: Engine) -> list[bool]:
    """Return whether the picture of each example's own prompt and seed shows the concept.

    Args:
        model: What draws; in evaluation mode.
        aims: Examples and judge.
        engine: Device and processes, among which examples are divided.
    """
    examples = aims.examples
    groups: dict[tuple[float, str | None], list[int]] = {}
    for k in range(engine.rank, len(examples), engine.world):
        own = examples[k].guidance
        strength = aims.sampling.guidance if own is None else own
        groups.setdefault((strength, examples[k].label), []).append(k)
    hits = torch.zeros(len(examples), device=engine.device)
    for (strength, _), rows in groups.items():
        judge = aims.judge(examples[rows[0]])
        images = [Image(examples[k].prompt, examples[k].seed) for k in rows]
        settings = replace(aims.sampling, guidance=strength)
        with engine.autocast():
            for part, pixels in generate(model, images, settings):
                held = torch.tensor([rows[i] for i in part], device=engine.device)
                hits[held] = judge.judge(pixels).positive.to(hits)
    engine.reduce_sum([hits])
    return [bool(hit) for hit in hits.tolist()]


def _rate(shown: list[bool]) -> MetricValue:
    n, hits = len(shown), sum(shown)
    low, high = wilson(hits, n)
    return MetricValue(hits / n, DIRECTION, low=low, high=high, n=n)
