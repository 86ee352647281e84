"""Changes of a pipeline that are no change of its weights: adapters, gates, guidance, text.

An edit is a module of the model: its tensors are saved with the model, its `config` in the header
of the file, so that a checkpoint rebuilds it. It acts at the hooks below and, by forward hooks or
attention processors set in `attach`, inside the denoiser.
"""

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from mmforget.diffusion.conditions import Conditions
from mmforget.errors import CheckpointError, unknown

if TYPE_CHECKING:
    from mmforget.diffusion.models import DiffusionModel

# Kind of an edit, as checkpoints name it -> where its class lives.
KINDS = {
    "lora": "mmforget.diffusion.methods.low_rank:LowRank",
    "spm": "mmforget.diffusion.methods.spm:Membrane",
    "receler": "mmforget.diffusion.methods.receler:Erasers",
    "sld": "mmforget.diffusion.methods.sld:SafetyGuidance",
    "negative_prompt": "mmforget.diffusion.methods.negative_prompt:NegativePrompt",
    "seot": "mmforget.diffusion.methods.seot:Suppression",
    "sae": "mmforget.diffusion.methods.sae:FeatureEdit",
}


@dataclass(frozen=True)
class Step:
    """One denoising step of a batch of B images, as edits see it.

    Attributes:
        index: Its place, from 0.
        count: Steps in all.
        time: The scheduler's time step, a scalar.
        latents: [B, C, h, w], before the step, scaled for the model's input.
        guidance: Classifier-free guidance.
    """

    index: int
    count: int
    time: Tensor
    latents: Tensor
    guidance: float


class Edit(nn.Module, ABC):
    """One change; every hook does nothing unless overridden.

    Attributes:
        kind: Its key in `KINDS`.
        citation: Where it comes from.
    """

    kind: ClassVar[str]
    citation: ClassVar[str]

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return JSON values from which `build` makes the edit again, its tensors apart."""

    @classmethod
    def build(cls, config: dict[str, Any], model: "DiffusionModel") -> "Edit":
        """Make the edit of a saved config for a model; its tensors are loaded afterwards."""
        return cls(**config)

    def attach(self, model: "DiffusionModel") -> None:
        """Set forward hooks or attention processors; undone by `detach`."""
        return None

    def detach(self, model: "DiffusionModel") -> None:
        """Take away what `attach` set."""
        return None

    def export(self, folder: Path) -> None:
        """Write the edit as a file that other tools read, where there is such a format."""
        return None

    def before_predict(self, model: "DiffusionModel", owner: Conditions) -> None:
        """Look at the prompts before a forward pass.

        Args:
            model: The model.
            owner: For every row of the pass, the prompt whose image it serves (for the
                unconditional row of a guided step too).
        """
        return None

    def begin(
        self, model: "DiffusionModel", text: Conditions, negative: Conditions
    ) -> tuple[Conditions, Conditions]:
        """Change the conditions of a batch before its first step; both hold B rows."""
        return text, negative

    def extra(self, model: "DiffusionModel", text: Conditions) -> Conditions | None:
        """Return further conditions, B rows, predicted at every step beside the usual two."""
        return None

    def before_step(self, model: "DiffusionModel", step: Step, text: Conditions) -> Conditions:
        """Change the text conditions of one step."""
        return text

    def guide(
        self, step: Step, unconditional: Tensor, conditional: Tensor, extra: Tensor | None
    ) -> Tensor | None:
        """Return the combined prediction [B, C, h, w] of a step; None leaves plain guidance."""
        return None


def build_edit(kind: str, config: dict[str, Any], model: "DiffusionModel") -> Edit:
    """Return the edit that a checkpoint names.

    Raises:
        CheckpointError: This version knows no such edit.
    """
    if kind not in KINDS:
        raise CheckpointError(unknown("edit in the checkpoint:", kind, KINDS, "mmforget list"))
    module, _, name = KINDS[kind].partition(":")
    cls: type[Edit] = getattr(importlib.import_module(module), name)
    return cls.build(config, model)
