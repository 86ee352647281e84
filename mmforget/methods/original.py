"""No unlearning at all: the row that every other method is compared with."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mmforget.context import Context
from mmforget.types import UnlearningMethod


@dataclass(frozen=True)
class OriginalConfig:
    """Nothing to choose."""


class Original(UnlearningMethod[OriginalConfig]):
    """Return the original model unchanged."""

    reads: frozenset[str] = frozenset()
    intent: ClassVar[str] = "reference"
    trains: ClassVar[str] = "nothing"
    citation: ClassVar[str] = "none: the model before unlearning"
    config_type: ClassVar[type] = OriginalConfig

    def run(self, ctx: Context) -> nn.Module:
        """Return `ctx.model`."""
        return ctx.model
