"""UNSIR: spoil the model with noise fitted against what it must forget, then repair it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mmforget.context import Context
from mmforget.errors import ConfigError
from mmforget.methods.base import LossMethod
from mmforget.options import option
from mmforget.rng import generator
from mmforget.training import set_mode
from mmforget.types import Batch, Pass, Training


@dataclass(frozen=True)
class UNSIRConfig(Training):
    """Defaults: two epochs of which the second repairs, noise as in the original."""

    epochs: int = option(2, "epochs of impairing and repairing together", low=0)
    repair_epochs: int = option(1, "how many of them, the last ones, repair", low=0)
    lr: float = option(1e-3, "learning rate; `schedule=step` lowers it for the repair", low=0)
    variant: str = option(
        "outputs",
        "`outputs`: noise against outputs on D_f, for people; `class`: against whole classes",
        choices=("outputs", "class"),
    )
    noise_steps: int = option(40, "Adam steps on the noise (MU*AC: 5)", low=0)
    noise_lr: float = option(0.1, "learning rate on the noise (MU*AC: 0.01)", low=0)
    noise_weight: float = option(1.0, "weight of the loss on noise beside that on retain", low=0)
    noise_penalty: float = option(0.1, "class variant: weight of the noise's squared norm", low=0)
    noise_batch_size: int = option(32, "class variant: noise images for each class", low=1)
    retain_fraction: float = option(1.0, "share of the retain set that is used", low=0, high=1)
    reference: bool = option(
        False, "outputs variant: drive noise away from the outputs, as the MU*AC code does"
    )


class UNSIR(LossMethod[UNSIRConfig]):
    """Impair: minimise CE(retain) + w·CE(noise, target). Repair: minimise CE(retain).

    Variant `outputs` (MU*AC, for people, whose classes the retain set shares): beside every
    forget batch noise from N(0, 1) is fitted so that the model's outputs on it are those on the
    batch, clamped to [0, 1], and then trained with labels of a retain batch. So what looks like
    D_f to the model loses its meaning. The MU*AC code says so in words, but has the opposite sign:
    it drives the noise AWAY from these outputs. `reference` does that.

    Variant `class` (original, where a request names whole classes: these must not occur in the
    retain set): for every class in D_f noise is fitted once to θ0 by minimising
    -CE(model(noise), class) + λ·mean ‖noise‖², and trained with that class as label. Every retain
    image is joined by one noise image drawn from all of it, where the published code repeats the
    noise in one shuffled set; `noise_weight` is their ratio.

    Noise is fitted in evaluation mode, so it moves no batch-norm statistics.

    Raises:
        ConfigError: No epoch is left to impair, or classes are asked for where labels are
            attributes.
    """

    reads: frozenset[str] = frozenset({"forget", "retain"})
    modalities = frozenset({"vision"})
    intent: ClassVar[str] = "removal"
    holds: ClassVar[str] = "a batch of noise (class variant: one for every class in D_f)"
    citation: ClassVar[str] = (
        "Tarun et al., Fast Yet Effective Machine Unlearning, TNNLS 2023, arXiv 2111.08947; "
        "variant `outputs`: Choi & Na, arXiv 2311.02240"
    )
    coupled: ClassVar[bool] = True  # noise made for forget takes the place of retain images
    whole: bool = True
    config_type: ClassVar[type] = UNSIRConfig

    def __init__(self, config: UNSIRConfig) -> None:
        if config.repair_epochs >= config.epochs > 0:
            raise ConfigError(
                f"method.repair_epochs={config.repair_epochs} of method.epochs={config.epochs} "
                f"leave no epoch that impairs; epochs counts both"
            )
        super().__init__(config)

    def setup(self, ctx: Context) -> None:
        """Fit the noise of every class in the forget set, in the class variant."""
        if self.config.variant == "class":
            self.noise, self.label = self._class_noise(ctx)

    def passes(self, epoch: int) -> Sequence[Pass]:
        """Impair beside forget batches (or noise of classes), then repair on retain alone."""
        share = self.config.retain_fraction
        if epoch >= self.config.epochs - self.config.repair_epochs:
            return (Pass("repair", anchor="retain", fraction=share),)
        if self.config.variant == "class":
            return (Pass("impair", anchor="retain", fraction=share),)
        return (Pass("impair", anchor="forget", partner="retain", fraction=share),)

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return the term `retain` and, while impairing, `forget`: the loss on noise."""
        if retain is None:
            return {}
        terms = {"retain": ctx.mean(ctx.forward(retain).loss, retain)}
        if ctx.phase == "impair" and self.config.variant == "class":
            rows = retain.draws("noise").integers(len(self.noise))
            terms["forget"] = self._spoil(ctx, retain, self.noise[rows], self.label[rows])
        elif ctx.phase == "impair" and forget is not None:
            noise = self.output_noise(ctx, forget)
            terms["forget"] = self._spoil(ctx, retain, noise, retain.data.label)
        return terms

    def _spoil(self, ctx: Context, retain: Batch, image: Tensor, label: Tensor) -> Tensor:
        """Return the weighted loss on noise that takes the place of a retain batch's images."""
        data = retain.data._replace(image=image, label=label)
        loss = ctx.forward(replace(retain, data=data)).loss
        return self.config.noise_weight * ctx.mean(loss, retain)

    def output_noise(self, ctx: Context, forget: Batch) -> Tensor:
        """Return noise [B, 3, S, S] in [0, 1] for a forget batch."""
        ctx.model.eval()
        with torch.no_grad():
            wanted = ctx.forward(forget).pred
        scale = (-1.0 if self.config.reference else 1.0) / (forget.total * wanted.shape[1])

        def distance(noise: Tensor) -> Tensor:
            given = replace(forget, data=forget.data._replace(image=noise))
            return scale * (ctx.forward(given).pred - wanted).square().sum()

        start = forget.draws("noise").normal(*forget.data.image.shape[1:])
        noise = fit_noise(start, distance, self.config.noise_steps, self.config.noise_lr)
        set_mode(ctx.model, self.config.norm)
        return noise.clamp(0, 1)

    def _class_noise(self, ctx: Context) -> tuple[Tensor, Tensor]:
        """Return noise [K·n, 3, S, S] and its labels [K·n] for the K classes in the forget set."""
        counts, shape = None, None
        for batch in ctx.batches("forget", self.config.batch_size):
            data = batch.data
            if data.label.is_floating_point():
                raise ConfigError(
                    "method.variant=class needs one class per image; the labels here are "
                    "attributes. Use method.variant=outputs"
                )
            if counts is None:
                with torch.no_grad():
                    counts = torch.zeros_like(ctx.forward(batch).pred[0])
                shape = (self.config.noise_batch_size, *data.image.shape[1:])
            counts += torch.bincount(data.label, minlength=len(counts))
        assert counts is not None and shape is not None
        ctx.engine.reduce_sum([counts])
        fitted = []
        classes = counts.nonzero().flatten()
        for label in classes.tolist():
            rng = generator(ctx.seed, "unsir", label)
            start = torch.randn(shape, generator=rng).to(data.image)
            target = torch.full((len(start),), label, device=start.device)

            def error(noise: Tensor, target: Tensor = target) -> Tensor:
                outputs = ctx.adapter.forward(ctx.model, data._replace(image=noise, label=target))
                return class_objective(outputs.loss, noise, self.config.noise_penalty)

            fitted.append(fit_noise(start, error, self.config.noise_steps, self.config.noise_lr))
        return torch.cat(fitted), classes.repeat_interleave(self.config.noise_batch_size)


def class_objective(loss: Tensor, noise: Tensor, penalty: float) -> Tensor:
    """Return what noise of a class minimises: -mean loss + penalty·mean ‖noise‖² (eq. 3).

    Args:
        loss: Losses of the noise with the class as label, [B].
        noise: [B, 3, S, S].
        penalty: Weight of the squared norm, summed over an image.
    """
    return -loss.mean() + penalty * noise.square().flatten(1).sum(dim=1).mean()


def fit_noise(
    start: Tensor, objective: Callable[[Tensor], Tensor], steps: int, lr: float
) -> Tensor:
    """Return noise [B, 3, S, S] after some Adam steps down an objective; no weight changes."""
    noise = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([noise], lr=lr)
    for _ in range(steps):
        (noise.grad,) = torch.autograd.grad(objective(noise), noise)
        optimizer.step()
    return noise.detach()
