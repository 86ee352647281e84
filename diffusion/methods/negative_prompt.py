"""Negative prompt: the erased concept takes the place of the empty prompt in guidance."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from mmforget.context import Context
from mmforget.diffusion.concepts import Erasure, check_texts
from mmforget.diffusion.conditions import Conditions
from mmforget.diffusion.edits import Edit
from mmforget.diffusion.models import DiffusionModel
from mmforget.errors import ConfigError
from mmforget.options import option
from mmforget.types import UnlearningMethod

CITATION = (
    "Ho and Salimans, Classifier-Free Diffusion Guidance, arXiv 2207.12598; ours: erasure by it"
)


@dataclass(frozen=True)
class NegativePromptConfig:
    """What the negative prompt is made of."""

    prompt: str = option(
        "text",
        "what names the erased concepts: their short prompts (Van Gogh style), or bare names",
        choices=("text", "name"),
    )


class NegativePrompt(Edit):
    """Guidance away from a prompt instead of away from the empty one.

    ε = ε(prompt) + cfg·(ε(text) - ε(prompt)); a negative prompt that the caller gave is replaced.
    Without classifier-free guidance (cfg 1) it does nothing.

    Args:
        prompt: The negative prompt.
    """

    kind: ClassVar[str] = "negative_prompt"
    citation: ClassVar[str] = CITATION

    def __init__(self, prompt: str) -> None:
        super().__init__()
        self.prompt = prompt

    def config(self) -> dict[str, Any]:
        """Return the prompt."""
        return {"prompt": self.prompt}

    def begin(
        self, model: DiffusionModel, text: Conditions, negative: Conditions
    ) -> tuple[Conditions, Conditions]:
        """Replace the unconditional half."""
        return text, model.encode([self.prompt]).repeat(len(negative))


class NegativePrompting(UnlearningMethod[NegativePromptConfig]):
    """Sample with the erased concepts as the negative prompt; no weight changes."""

    reads: frozenset[str] = frozenset()
    modalities = frozenset({"diffusion"})
    intent: ClassVar[str] = "suppression"
    trains: ClassVar[str] = "nothing"
    citation: ClassVar[str] = CITATION
    config_type: ClassVar[type] = NegativePromptConfig

    def run(self, ctx: Context) -> nn.Module:
        """Add the edit."""
        model = ctx.model
        assert isinstance(model, DiffusionModel)
        need_guidance(model, ctx.label)
        prompt = joined(model, ctx.target, self.config.prompt)
        model.add_edit(f"negative_prompt_{len(model.edits)}", NegativePrompt(prompt))
        return model


def need_guidance(model: DiffusionModel, label: str) -> None:
    """Check that a model has an unconditional prediction to steer.

    Raises:
        ConfigError: Its guidance is distilled into it.
    """
    if model.family == "flux":
        raise ConfigError(
            f"{label} steers classifier-free guidance, and FLUX.1 (dev, schnell) has none: its "
            f"guidance is distilled into the weights. It works for sd, sdxl and sd3; for FLUX take "
            f"a method that trains, such as esd"
        )


def joined(model: DiffusionModel, target: Erasure, prompt: str) -> str:
    """Return one prompt that names all erased concepts.

    Args:
        model: Its tokenizer says what fits.
        target: The request.
        prompt: "text" or "name".

    Raises:
        ConfigError: The text encoder's window is too short for them.
    """
    named = (concept.name if prompt == "name" else concept.text for concept in target.concepts)
    made = ", ".join(dict.fromkeys(named))
    check_texts((made,), model.count_tokens, model.window)
    return made
