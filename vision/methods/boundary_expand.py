"""Boundary expand: send the forgotten faces to a class of their own, then drop that class."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from mmforget.context import Context
from mmforget.errors import ConfigError
from mmforget.methods.base import LossMethod
from mmforget.options import option
from mmforget.rng import derive
from mmforget.types import Batch, Pass, Training
from mmforget.vision.models import head


@dataclass(frozen=True)
class BoundaryExpandConfig(Training):
    """Defaults of the SalUn repository; its authors search `lr` upwards from 1e-8."""

    epochs: int = option(10, "passes over the forget set", low=0)
    lr: float = option(1e-5, "learning rate; the result depends on it strongly", low=0)
    momentum: float = option(0.9, "momentum of SGD", low=0, high=1)
    weight_decay: float = option(5e-4, "weight decay", low=0)


class BoundaryExpand(LossMethod[BoundaryExpandConfig]):
    """Add one output to the head, train D_f towards it, and take it away again.

    The published code evaluates with the extra output still there, which counts every example
    sent to it as forgotten whatever the other outputs say. Here the result has the architecture
    of the original, as a saved and deployed model must.

    Raises:
        ConfigError: The labels are attributes, which have no further class.
    """

    reads: frozenset[str] = frozenset({"forget"})
    modalities = frozenset({"vision"})
    intent: ClassVar[str] = "removal"
    citation: ClassVar[str] = "Chen et al., Boundary Unlearning, CVPR 2023"
    config_type: ClassVar[type] = BoundaryExpandConfig

    def setup(self, ctx: Context) -> None:
        """Give the model the wider head."""
        self.place, self.narrow = head(ctx.model)
        seed = derive(ctx.seed, "boundary_expand")
        ctx.model.set_submodule(self.place, widened(self.narrow, seed))
        ctx.scope(self.config.scope)

    def passes(self, epoch: int) -> Sequence[Pass]:
        """One pass over the forget set."""
        return (Pass("forget", anchor="forget"),)

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return the mean loss on the forget batch with the extra class as label."""
        if forget is None:
            return {}
        label = forget.data.label
        if label.is_floating_point():
            raise ConfigError(
                "method vision/boundary_expand needs one class per image; attributes have no "
                "further class. Use method=boundary_shrink"
            )
        data = forget.data._replace(label=torch.full_like(label, self.narrow.out_features))
        return {"forget": ctx.mean(ctx.forward(replace(forget, data=data)).loss, forget)}

    @torch.no_grad()
    def finish(self, ctx: Context) -> nn.Module:
        """Return the model with its own head, the old outputs as trained."""
        wide = ctx.model.get_submodule(self.place)
        for kept, trained in zip(self.narrow.parameters(), wide.parameters(), strict=True):
            kept.copy_(trained[:-1])
        ctx.model.set_submodule(self.place, self.narrow)
        return ctx.model


def widened(layer: nn.Linear, seed: int) -> nn.Linear:
    """Return a linear layer with one more output: old rows copied, the new one initialised.

    Args:
        layer: [C, D], left as it is.
        seed: Seed of the new row, uniform in ±1/√D as torch initialises a linear layer.
    """
    made = skip_init(  # type: ignore[no-untyped-call]
        nn.Linear,
        layer.in_features,
        layer.out_features + 1,
        layer.bias is not None,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
    )
    rng = torch.Generator().manual_seed(seed)
    reach = 1 / math.sqrt(layer.in_features)
    with torch.no_grad():
        for new, old in zip(made.parameters(), layer.parameters(), strict=True):
            row = torch.empty(old.shape[1:]).uniform_(-reach, reach, generator=rng)
            new.copy_(torch.cat([old, row[None].to(old)]))
    return cast(nn.Linear, made)
