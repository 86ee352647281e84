"""Boundary shrink: give each forgotten face the nearest other class."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmforget.context import Context
from mmforget.methods.base import LossMethod
from mmforget.options import option
from mmforget.types import Adapter, Batch, Pass, Training
from mmforget.vision.adapter import Faces

LEVELS = 255  # adversarial images are rounded to what an 8-bit image can hold


@dataclass(frozen=True)
class BoundaryShrinkConfig(Training):
    """Defaults of the SalUn repository; its authors search `lr` upwards from 1e-8."""

    epochs: int = option(10, "passes over the forget set", low=0)
    lr: float = option(1e-5, "learning rate; the result depends on it strongly", low=0)
    momentum: float = option(0.9, "momentum of SGD", low=0, high=1)
    weight_decay: float = option(5e-4, "weight decay", low=0)
    bound: float = option(0.1, "step of the adversarial example, in pixel values of [0, 1]", low=0)


class BoundaryShrink(LossMethod[BoundaryShrinkConfig]):
    """Minimise the loss on D_f with the label that θ0 gives to an adversarial neighbour.

    The neighbour is one FGSM step x + bound·sign(∇ₓL) away, clipped to [0, 1]. Its label may be
    the true one still: then the example is learnt again, as in the published code. The retain set
    is not used, so utility is lost as the learning rate grows.
    """

    reads: frozenset[str] = frozenset({"forget"})
    modalities = frozenset({"vision"})
    intent: ClassVar[str] = "removal"
    holds: ClassVar[str] = "a frozen copy of the original model"
    citation: ClassVar[str] = "Chen et al., Boundary Unlearning, CVPR 2023"
    whole: bool = True
    config_type: ClassVar[type] = BoundaryShrinkConfig

    def setup(self, ctx: Context) -> None:
        """Keep the original model."""
        self.original = ctx.frozen_copy()

    def passes(self, epoch: int) -> Sequence[Pass]:
        """One pass over the forget set."""
        return (Pass("forget", anchor="forget"),)

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return the mean loss on the forget batch with its neighbours' labels."""
        if forget is None:
            return {}
        with ctx.engine.autocast():
            near = neighbours(ctx.adapter, self.original, forget.data, self.config.bound)
            label = predicted(ctx.adapter, self.original, near)
        relabelled = replace(forget, data=forget.data._replace(label=label))
        return {"forget": ctx.mean(ctx.forward(relabelled).loss, forget)}


def neighbours(adapter: Adapter, model: nn.Module, data: Faces, bound: float) -> Faces:
    """Return the batch one FGSM step up the loss, its images in [0, 1] and rounded to 1/255.

    Args:
        adapter: Says what the loss is.
        model: Frozen.
        data: The batch, images [B, 3, S, S] in [0, 1].
        bound: Size of the step in every pixel.
    """
    image = data.image.detach().requires_grad_()
    loss = adapter.forward(model, data._replace(image=image)).loss.sum()
    (gradient,) = torch.autograd.grad(loss, image)
    moved = (data.image + bound * gradient.sign()).clamp(0, 1)
    return data._replace(image=(moved * LEVELS).round() / LEVELS)


@torch.no_grad()
def predicted(adapter: Adapter, model: nn.Module, data: Faces) -> Tensor:
    """Return the label the model gives: the likeliest class [B], or attributes [B, A] in {0, 1}."""
    logits = adapter.forward(model, data).pred
    if data.label.is_floating_point():
        return (logits > 0).to(data.label.dtype)
    return logits.argmax(dim=1)
