"""What every attack on prompts does around its own search: examples, judge, rates, record."""

import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch

from mmforget.diffusion.attacks.arena import Aims, Arena, Found, PromptAttackConfig
from mmforget.diffusion.attacks.asr import Outcome, Rate, rates, success_curve
from mmforget.diffusion.attacks.examples import read_examples
from mmforget.diffusion.benchmarks.base import DiffusionBenchmark
from mmforget.diffusion.models import DiffusionModel
from mmforget.diffusion.zero_shot import JudgeConfig
from mmforget.errors import ConfigError, ResourceError
from mmforget.record import AttackResult, MetricValue
from mmforget.types import Attack, Budget, Trial

ConfigT = TypeVar("ConfigT", bound=PromptAttackConfig)

AUTHORS = (
    "Zhang et al., To Generate or Not? Safety-Driven Unlearned Diffusion Models Are Still Easy To "
    "Generate Unsafe Images ... For Now, ECCV 2024, arXiv 2310.11868"
)


class PromptAttack(Attack[ConfigT]):
    """An attack on prompts. A subclass writes `hunt`.

    Values, shares of all N prompts with Wilson 95 % intervals, joined by prompt id:

    - `asr`: prompts whose picture shows the concept, with the attack or without; down. Published
      as ASR or Post-ASR.
    - `pre_asr`: prompts that need no attack; down. `new`: the difference; down.
    - `attack_only`: successes of the prompts that were attacked; down.
    - `seconds_per_prompt`, `images_per_prompt`, `steps_per_prompt`: of attacked prompts; up.

    A success rate means nothing without its budget of judged pictures: compare attacks at equal
    `images`, and with `random` and `seed_search`, which spend them without any gradient.
    """

    access: ClassVar[str] = "white"
    citation: ClassVar[str] = AUTHORS
    config_type: ClassVar[type] = PromptAttackConfig
    judged: str = ""  # names of the judges, for notes

    def budget(self) -> Budget:
        """The judged pictures of a prompt, and the attack's own steps."""
        return Budget(queries=self.config.images, steps=self.most_steps())

    def most_steps(self) -> int:
        """Return the gradient steps a prompt may cost."""
        return 0

    @abstractmethod
    def hunt(self, arena: Arena) -> None:
        """Attack every prompt of `arena.todo()` and settle it."""

    def run(self, trial: Trial, budget: Budget) -> AttackResult:
        """Attack all prompts, or those that an earlier, killed attack left."""
        began = time.perf_counter()
        arena = self.arena(trial)
        self.judged = ", ".join(arena.judges())
        try:
            self.hunt(arena)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ResourceError(
                f"out of memory with {self.config.batch_size} prompts at a time; what was finished "
                f"is kept. Lower attack.NAME.batch_size or benchmark.sampling.batch_size, or set "
                f"runtime.precision=bf16, and run the same command again"
            ) from error
        found = arena.finish()
        return self.result(found, time.perf_counter() - began)

    def arena(self, trial: Trial) -> Arena:
        """Return where the trial's model is attacked."""
        model, original = trial.view.model, trial.original.model
        assert isinstance(model, DiffusionModel) and isinstance(original, DiffusionModel)
        aims = self.aims(benchmark_of(trial))
        engine = trial.lab.engine
        seed = trial.seed
        return Arena(model, original, aims, self.config, trial.folder, engine, seed)

    def aims(self, benchmark: DiffusionBenchmark) -> Aims:
        """Return the benchmark's examples and judge, or those that the options name."""
        config = self.config
        made = aims_of(benchmark, config.prompts, config.judge, config.limit)
        return replace(made, files=self.files())

    def files(self) -> Sequence[Path]:
        """Return further files that decide what is found, for resuming."""
        return ()

    def result(self, found: Sequence[Found], seconds: float) -> AttackResult:
        """Return the record of what was found."""
        outcomes = [outcome(row) for row in found]
        share = rates(outcomes, len(found))
        attacked = [row for row in found if row.attacked]
        dropped = sum(row.dropped for row in found)
        note = f"{len(attacked)} of {len(found)} attacked, {self.config.images} pictures each"
        if dropped:
            note += f"; {dropped} too long, counted as they are"
        if self.judged:
            note += f"; judge: {self.judged}"
        values = {
            "asr": _value(share.asr, note),
            "pre_asr": _value(share.pre, ""),
            "new": _value(share.new, ""),
            "attack_only": _value(share.attack_only, ""),
        }
        for name in ("seconds", "images", "steps"):
            if attacked:
                mean = float(np.mean([getattr(row, name) for row in attacked]))
                values[f"{name}_per_prompt"] = MetricValue(mean, "up", n=len(attacked))
        curve = success_curve(outcomes, self.config.images - 1)
        return AttackResult(
            access=self.access,
            values=values,
            queries=sum(row.images for row in found),
            seconds=seconds,
            curves={
                "success": {
                    "x": list(range(len(curve))),
                    "y": curve,
                    "x_label": "judged pictures of a prompt, beside its own",
                    "y_label": "share of prompts that showed the concept",
                }
            },
            targets=_columns(found),
        )


def benchmark_of(trial: Trial) -> DiffusionBenchmark:
    """Return the trial's benchmark as one of this modality.

    Raises:
        ConfigError: It is none.
    """
    if not isinstance(trial.benchmark, DiffusionBenchmark):
        raise ConfigError("attacks on prompts need a benchmark of the diffusion modality")
    return trial.benchmark


def aims_of(
    benchmark: DiffusionBenchmark, prompts: str | None, judge: JudgeConfig, limit: int | None
) -> Aims:
    """Return the benchmark's examples and judge, or those that options name.

    Args:
        benchmark: The benchmark.
        prompts: File of prompts in place of the benchmark's; None: the benchmark's.
        judge: Judge in place of the benchmark's; its kind is None: the benchmark's.
        limit: Only the first so many prompts; None: all.
    """
    aims = benchmark.aims(judge)
    if prompts is not None:
        aims = replace(aims, examples=read_examples(Path(prompts).expanduser(), limit))
    return replace(aims, examples=list(aims.examples)[:limit])


def outcome(row: Found) -> Outcome:
    """Return a prompt's outcome as rates count it."""
    return Outcome(
        id=row.id,
        pre=row.pre,
        stage=row.stage if row.success and row.attacked else None,
        attacked=row.attacked,
        seconds=row.seconds,
        images=row.images,
    )


def _value(rate: Rate, note: str) -> MetricValue:
    return MetricValue(rate.value, "down", low=rate.low, high=rate.high, n=rate.n, note=note)


def _columns(found: Sequence[Found]) -> dict[str, np.ndarray[Any, Any]]:
    """Return what was found of each prompt as arrays."""
    names = ("id", "pre", "attacked", "success", "stage", "score", "images", "steps", "seconds")
    return {name: np.array([getattr(row, name) for row in found]) for name in names}
