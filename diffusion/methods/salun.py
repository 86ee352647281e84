"""SalUn for text-to-image models, and the relabelling losses that image-based methods share."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from mmforget.context import Context
from mmforget.diffusion.models import DiffusionModel
from mmforget.errors import ConfigError
from mmforget.methods.base import LossMethod
from mmforget.methods.salun import SalUn, SalUnConfig
from mmforget.options import option
from mmforget.training import optimise
from mmforget.types import Batch, Pass, Splits, Training, full, subset


@dataclass(frozen=True)
class ImageTraining(Training):
    """One optimisation over images to forget, with as many to keep beside them."""

    epochs: int = option(2, "passes over the forget set", low=0)
    lr: float = option(1e-5, "learning rate", low=0)
    optimizer: str = option("adam", "optimiser", choices=("sgd", "adam", "adamw"))
    batch_size: int = option(4, "images in an effective batch of each split", low=1)
    scope: str = option("xattn", "parameters to train: a scope's name, or a regex")
    reference: bool = option(
        False,
        "UnlearnCanvas's loader: every step sees the first rows of both splits, and the surrogate "
        "prompt of a forget image is that of the retain image beside it",
    )


ConfigT = TypeVar("ConfigT", bound=ImageTraining)


class Relabelling(LossMethod[ConfigT]):
    """What Relabel, EraseDiff and ScissorHands share: two losses, and how images are met.

    By default each epoch walks through the forget set once in shuffled order, with shuffled
    retain images beside it. The published copies make their loaders anew at every step, unshuffled
    (`next(iter(loader))`): all steps see the same first rows, and an image to forget is mapped to
    the photo of another object. `reference=true` gives that, with as many steps and fresh noise.
    """

    reads: frozenset[str] = frozenset({"forget", "retain"})
    modalities = frozenset({"diffusion"})
    intent: ClassVar[str] = "removal"

    def __init__(self, config: ConfigT) -> None:
        super().__init__(config)
        self.repeats = 1  # walks through what is shown in a pass: with `reference`, its steps
        self.captions: dict[str, str] = {}  # with `reference`: forget id -> surrogate prompt

    def run(self, ctx: Context) -> nn.Module:
        """Optimise; a killed run goes on from its last step checkpoint in `resume`."""
        if not self.config.reference:
            return optimise(ctx, self)
        shown = self._first_rows(ctx)
        model = optimise(shown, self)
        ctx.trainable = shown.trainable
        return model

    def setup(self, ctx: Context) -> None:
        """Check that the loader of `reference` is in place.

        Raises:
            ConfigError: The method runs inside a wrapper.
        """
        if self.config.reference and not self.captions:
            raise ConfigError(
                "reference=true shows other images than a wrapper (salun, sam) does; leave it "
                "false in `inner`. UnlearnCanvas's copy of SalUn never applies its mask: it is "
                "method.name=diffusion/relabel with reference=true"
            )

    def passes(self, epoch: int) -> Sequence[Pass]:
        """One pass over forget with retain beside it."""
        return (Pass("joint", anchor="forget", partner="retain"),) * self.repeats

    def surrogate(self, ctx: Context, forget: Batch) -> Tensor:
        """Return the mean squared distance from the model's own anchor prediction, scalar.

        The anchor's prediction is made by the weights as they are, and passes no gradient.
        """
        data = ctx.adapter.relabel(forget.data, forget.draws("relabel"))
        if self.captions:
            data = data._replace(anchors=tuple(self.captions[i] for i in forget.ids))
        return ctx.unit_mean(ctx.forward(replace(forget, data=data)).loss, forget)

    def preserve(self, ctx: Context, retain: Batch) -> Tensor:
        """Return the mean squared error of the training objective on retain images, scalar."""
        return ctx.unit_mean(ctx.forward(retain).loss, retain)

    def _first_rows(self, ctx: Context) -> Context:
        """Return a context that holds one batch of each split: its first rows."""
        forget, retain = ctx.split("forget"), ctx.split("retain")
        rows = range(min(self.config.batch_size, len(forget), len(retain)))
        self.repeats = ceil(len(forget) / self.config.batch_size)
        beside = retain.take(rows)["captions"]
        self.captions = {forget.ids[i]: beside[i][0] for i in rows}
        few, kept = subset(forget, rows), subset(retain, rows)
        return Context(
            engine=ctx.engine,
            adapter=ctx.adapter,
            model=ctx.model,
            splits=Splits(forget=few, retain=kept, train=kept, holdout=kept, test=kept),
            reads=self.reads,
            label=ctx.label,
            seed=ctx.seed,
            target=ctx.target,
        )


@dataclass(frozen=True)
class RelabelConfig(ImageTraining):
    """Defaults of UnlearnCanvas; Fan et al. train all weights for 5 epochs, alpha 0.1 or 0.5."""

    alpha: float = option(1.0, "weight of the loss on retain", low=0)


class Relabel(Relabelling[RelabelConfig]):
    """Minimise ‖e(x_f, c_f) - sg e(x_f, c_anchor)‖² + α·L(D_r): SalUn's loss (eq. 9), no mask."""

    citation: ClassVar[str] = "Fan et al., SalUn, ICLR 2024, arXiv 2310.12508"
    config_type: ClassVar[type] = RelabelConfig

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return the terms `forget` and `retain`."""
        terms = {}
        if forget is not None:
            terms["forget"] = self.surrogate(ctx, forget)
        if retain is not None and self.config.alpha > 0:
            terms["retain"] = self.config.alpha * self.preserve(ctx, retain)
        return terms


@dataclass(frozen=True)
class DiffusionSalUnConfig(SalUnConfig):
    """How many weights may change, and which method changes them."""

    ratio: float = option(
        0.5,
        "share of weights in `mask_scope` that may change; UnlearnCanvas 0.4",
        low=0,
        high=1,
    )
    mask_scope: str = option("all", "weights that are ranked together; holds the trained ones")
    mask_batch_size: int = option(4, "effective batch of the saliency pass", low=1)
    guidance: float = option(
        7.5, "s of the prediction (1 + s)·e(c) - s·e0 whose loss measures saliency", low=0
    )
    inner: dict[str, Any] = option(
        {}, "the loss method and its settings; `inner.name` is diffusion/relabel if not given"
    )


class DiffusionSalUn(SalUn):
    """Train by the inner method where |Σ_batches ∇L(D_f)| at θ0 is among the largest (eq. 4).

    L is the error of the guided prediction (1 + s)·e(c) - s·e0. One ranking runs over
    `mask_scope`, the whole denoiser, though only the inner method's `scope` is trained. Elsewhere
    weights stay at θ0 exactly, whatever the optimiser holds.
    """

    modalities = frozenset({"diffusion"})
    inner_default: ClassVar[str] = "diffusion/relabel"
    config_type: ClassVar[type] = DiffusionSalUnConfig

    def setup(self, ctx: Context) -> None:
        """Set up the inner method; choose the weights, the model in evaluation mode.

        Raises:
            ConfigError: A trained weight is not ranked.
        """
        super().setup(ctx)
        trained = {id(weight) for weight in ctx.trainable.values()}
        for weight in ctx.model.parameters():
            weight.requires_grad_(id(weight) in trained)

    def ranked(self, ctx: Context) -> list[nn.Parameter]:
        """Return the weights of `mask_scope`, ready for gradients."""
        assert isinstance(self.config, DiffusionSalUnConfig)
        scope = self.config.mask_scope
        ranked = list(ctx.adapter.parameters(ctx.model, scope).values())
        places = {id(weight) for weight in ranked}
        lost = [name for name, weight in ctx.trainable.items() if id(weight) not in places]
        if lost:
            raise ConfigError(
                f"method.mask_scope={scope} ranks {len(lost)} of the trained weights not, such as "
                f"{lost[0]}; rank all that is trained: mask_scope=all, or as inner.scope"
            )
        for weight in ranked:
            weight.requires_grad_(True)
        return ranked

    def objective(self, ctx: Context, batch: Batch) -> Tensor:
        """Return the mean squared error of the guided prediction, scalar."""
        assert isinstance(self.config, DiffusionSalUnConfig)
        model, data = ctx.model, batch.data
        assert isinstance(model, DiffusionModel)
        with ctx.engine.autocast():
            empty = model.unconditional().rows([0] * len(batch))
            text = model.encode(data.prompts)
            found = model.guided(data.latents, data.t, text, empty, 1.0 + self.config.guidance)
        error = (full(found) - data.target).square().flatten(1).sum(dim=1)
        return ctx.unit_mean(error, batch)
