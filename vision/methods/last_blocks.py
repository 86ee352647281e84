"""Training of the last blocks of a classifier alone: what CF-k and EU-k share."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from mmforget.context import Context
from mmforget.errors import ConfigError
from mmforget.options import option
from mmforget.training import Supervised
from mmforget.types import Batch, Training
from mmforget.vision.adapter import last_blocks
from mmforget.vision.models import Block


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
    reads: frozenset[str] = frozenset({"retain"})
    modalities = frozenset({"vision"})

    def __init__(self, config: LastBlocksConfig) -> None:
        if config.scope != "all":
            raise ConfigError(
                f"method.scope={config.scope!r}: this method trains the last blocks; set method.k"
            )
        super().__init__(config)
        self.blocks: Sequence[Block] = ()

    @property
    def training(self) -> Training:
        """The config, its scope narrowed to the chosen blocks."""
        members = [re.escape(member) for block in self.blocks for member in block.members]
        return replace(self.config, scope=rf"(?:{'|'.join(members)})(?:\..*)?")

    def run(self, ctx: Context) -> nn.Module:
        """Choose the blocks and train them."""
        k = self.config.k
        if self.config.reference:
            self.blocks = last_blocks(ctx.model, f"last_k:{k + 1}")[:-1]
        else:
            self.blocks = last_blocks(ctx.model, f"last_k:{k}")
        self.resting = [
            module
            for name, module in ctx.model.named_modules()
            if isinstance(module, nn.modules.batchnorm._NormBase) and not self.covers(name)
        ]
        return super().run(ctx)

    def covers(self, name: str) -> bool:
        """Return whether a module, parameter or buffer of this name is in the chosen blocks."""
        return any(block.holds(name) for block in self.blocks)

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return the mean loss on the retain batch; statistics of the other blocks rest."""
        for module in self.resting:
            module.eval()
        return super().loss(ctx, forget, retain)
