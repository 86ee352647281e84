"""Training of the last blocks of a classifier alone: what CF-k and EU-k share."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmforget.context import Context
from mmforget.errors import ConfigError
from mmforget.options import option
from mmforget.training import Supervised
from mmforget.types import Batch, Training
from mmforget.vision.adapter import last_blocks
from mmforget.vision.models import head


@dataclass(frozen=True)
class LastBlocksConfig(Training):
    """Which blocks are trained; `scope` follows from it."""

    k: int = option(3, "blocks to train, the head among them (MU*AC: layer3, layer4, fc)", low=1)
    reference: bool = option(
        False, "leave the head as it was and take the k blocks before it, as the SCRUB notebook"
    )


class LastBlocks(Supervised):
    """Minimise the mean loss on the retain set over the last k blocks; the others stay at θ0.

    Batch-norm statistics of the others stay too, also with `norm=train`.

    Raises:
        ConfigError: `scope` is given, or the model has fewer blocks than k.
    """

    config: LastBlocksConfig
    modalities = frozenset({"vision"})
    whole: bool = True

    def __init__(self, config: LastBlocksConfig) -> None:
        if config.scope != "all":
            raise ConfigError(
                f"method.scope={config.scope!r}: this method trains the last blocks; set method.k"
            )
        super().__init__(config)

    @property
    def training(self) -> Training:
        """The config, its scope narrowed to the last blocks."""
        return replace(self.config, scope=f"last_k:{self.config.k + self.config.reference}")

    def setup(self, ctx: Context) -> None:
        """Find what must stay: statistics before the last blocks and, if so asked, the head."""
        blocks = last_blocks(ctx.model, self.training.scope)
        top = head(ctx.model)[1] if self.config.reference else None
        self.fixed = [] if top is None else [(p, p.detach().clone()) for p in top.parameters()]
        self.blocks = blocks[:-1] if self.config.reference else blocks
        self.resting = [
            module
            for name, module in ctx.model.named_modules()
            if isinstance(module, nn.modules.batchnorm._NormBase) and not self.covers(name)
        ]

    def covers(self, name: str) -> bool:
        """Return whether a module, parameter or buffer of this name is in the trained blocks."""
        return any(block.holds(name) for block in self.blocks)

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return the mean loss on the retain batch; statistics of the other blocks rest."""
        for module in self.resting:
            module.eval()
        return super().loss(ctx, forget, retain)

    @torch.no_grad()
    def after_step(self, ctx: Context, optimizer: Any) -> None:
        """Put a head that must stay back to what it was."""
        for weight, start in self.fixed:
            weight.copy_(start)
