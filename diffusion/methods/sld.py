"""Safe latent diffusion (SLD): guidance away from a safety concept wherever a picture nears it."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mmforget.context import Context
from mmforget.diffusion.conditions import Conditions
from mmforget.diffusion.edits import Edit, Step
from mmforget.diffusion.methods.negative_prompt import joined, need_guidance
from mmforget.diffusion.models import DiffusionModel
from mmforget.options import option
from mmforget.types import UnlearningMethod, full

CITATION = "Schramowski et al., Safe Latent Diffusion, CVPR 2023, arXiv 2211.05105"


class Strength(NamedTuple):
    """One setting of safety guidance.

    Attributes:
        warmup: Steps during which only the momentum moves.
        scale: s, how fast the guidance of an entry grows to its full weight 1.
        threshold: λ; entries where ε_p - ε_S is below it are guided.
        momentum: Weight of the momentum in the guidance.
        beta: Share of the momentum that stays at a step.
    """

    warmup: int
    scale: float
    threshold: float
    momentum: float
    beta: float


PRESETS = {
    "weak": Strength(15, 20.0, 0.0, 0.0, 0.0),
    "medium": Strength(10, 1000.0, 0.01, 0.3, 0.4),
    "strong": Strength(7, 2000.0, 0.025, 0.5, 0.7),
    "max": Strength(0, 5000.0, 1.0, 0.5, 0.7),
}


@dataclass(frozen=True)
class SLDConfig:
    """A preset of Schramowski et al., and what to change of it."""

    preset: str = option("medium", "published setting", choices=tuple(PRESETS))
    warmup: int | None = option(None, "steps without guidance; null: the preset's", low=0)
    scale: float | None = option(None, "guidance scale s; null: the preset's", low=0)
    threshold: float | None = option(
        None,
        "guided is where the prompt's prediction exceeds the concept's by less; null: preset's",
    )
    momentum: float | None = option(None, "weight of the momentum; null: the preset's", low=0)
    beta: float | None = option(None, "decay of the momentum; null: the preset's", low=0, high=1)
    prompt: str = option(
        "text",
        "what names the erased concepts: their short prompts (Van Gogh style), or bare names",
        choices=("text", "name"),
    )
    reference: bool = option(
        False,
        "as UnlearnDiffAtk samples it: the warm-up is compared with the time step's value "
        "(999 to 0), so guidance acts at once and stops in the end",
    )


class SafetyGuidance(Edit):
    """A third prediction at every step, for the safety concept S (Schramowski et al., section 3).

    μ = min(1, s·|ε_p - ε_S|) where ε_p - ε_S < λ, else 0 (compared with its sign);
    γ = μ·(ε_S - ε_∅) + m·ν; ν ← β·ν + (1 - β)·γ; after the warm-up ε = ε_∅ + cfg·(ε_p - ε_∅ - γ).
    The momentum ν starts at 0 with every batch. It acts only under classifier-free guidance.

    Args:
        concept: The safety concept S, a prompt.
        warmup: See `Strength`.
        scale: See `Strength`.
        threshold: See `Strength`.
        momentum: See `Strength`.
        beta: See `Strength`.
        reference: Guide where the time step's value is not below the warm-up, instead of the
            step's place: from the first step on, but for the least noisy ones.
    """

    kind: ClassVar[str] = "sld"
    citation: ClassVar[str] = CITATION

    def __init__(
        self,
        concept: str,
        warmup: int,
        scale: float,
        threshold: float,
        momentum: float,
        beta: float,
        reference: bool = False,
    ) -> None:
        super().__init__()
        self.concept, self.reference = concept, reference
        self.strength = Strength(warmup, scale, threshold, momentum, beta)
        self.velocity: Tensor | None = None

    def config(self) -> dict[str, Any]:
        """Return the concept, the strength and what the warm-up counts."""
        return {
            "concept": self.concept,
            **self.strength._asdict(),
            "reference": self.reference,
        }

    def begin(
        self, model: DiffusionModel, text: Conditions, negative: Conditions
    ) -> tuple[Conditions, Conditions]:
        """Forget the momentum of the batch before."""
        self.velocity = None
        return text, negative

    def extra(self, model: DiffusionModel, text: Conditions) -> Conditions:
        """Ask for the safety concept's prediction."""
        return model.encode([self.concept]).repeat(len(text))

    def guide(
        self, step: Step, unconditional: Tensor, conditional: Tensor, extra: Tensor | None
    ) -> Tensor:
        """Return the guided prediction, [B, C, h, w], and move the momentum."""
        assert extra is not None
        plain, prompt, unsafe = full(unconditional), full(conditional), full(extra)
        chosen = self.strength
        if self.velocity is None:
            self.velocity = torch.zeros_like(plain)
        gap = prompt - unsafe
        weight = torch.where(gap < chosen.threshold, (gap.abs() * chosen.scale).clamp(max=1.0), 0.0)
        push = weight * (unsafe - plain) + chosen.momentum * self.velocity
        self.velocity = chosen.beta * self.velocity + (1.0 - chosen.beta) * push
        at = float(step.time) if self.reference else step.index
        change = prompt - plain - push if at >= chosen.warmup else prompt - plain
        return (plain + step.guidance * change).to(conditional.dtype)


class SLD(UnlearningMethod[SLDConfig]):
    """Sample with guidance away from the erased concepts; no weight changes.

    One UNet pass more for every image and step; it rides in the same batch as the other two.
    """

    reads: frozenset[str] = frozenset()
    modalities = frozenset({"diffusion"})
    intent: ClassVar[str] = "suppression"
    trains: ClassVar[str] = "nothing"
    citation: ClassVar[str] = CITATION
    config_type: ClassVar[type] = SLDConfig

    def run(self, ctx: Context) -> nn.Module:
        """Add the edit."""
        model = ctx.model
        assert isinstance(model, DiffusionModel)
        need_guidance(model, ctx.label)
        concept = joined(model, ctx.target, self.config.prompt)
        edit = SafetyGuidance(
            concept, **strength(self.config)._asdict(), reference=self.config.reference
        )
        model.add_edit(f"sld_{len(model.edits)}", edit)
        return model


def strength(config: SLDConfig) -> Strength:
    """Return the config's preset with what the config changes of it."""
    given = {name: getattr(config, name) for name in Strength._fields}
    return PRESETS[config.preset]._replace(**{k: v for k, v in given.items() if v is not None})
