"""Loss methods: hooks over one shared training loop (`mmforget.training.optimise`)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from mmforget.context import Context
from mmforget.registry import METHODS
from mmforget.schema import instantiate
from mmforget.types import Batch, Pass, Training, UnlearningMethod

ConfigT = TypeVar("ConfigT")


class Part(NamedTuple):
    """The parts of one micro-batch that this process holds; None for those the pass lacks."""

    forget: Batch | None = None
    retain: Batch | None = None
    extra: Batch | None = None

    def sides(self) -> "list[Part]":
        """Return each batch as a part of its own."""
        found = [Part(forget=self.forget), Part(retain=self.retain), Part(extra=self.extra)]
        return [part for part in found if any(part)]


class LossMethod(UnlearningMethod[ConfigT]):
    """A method that minimises a loss with an optimiser.

    A subclass writes `loss`, and what it needs of the other hooks. They are called in this order:
    `setup`, then for every epoch and every pass of `passes` and every step: `backward` (which
    calls `loss`), `after_backward`, the optimiser, `after_step`; `after_epoch`; and last `finish`.

    The contract of `loss`: forget or retain may be None, and then their terms are left out; the
    shared `backward` asks for one side at a time. A term's name begins with the split it acts on
    (`forget`, `retain`), or with neither if it acts on weights; wrappers such as SAM tell terms
    apart by that. Terms are already scaled by `ctx.mean` and the like, so that their sum over
    micro-batches is the loss.

    Attributes:
        coupled: A term needs the forget and the retain batch of a step at once.
        whole: Weights or gradients are read or changed here, so that they cannot be cut over
            processes (`Runtime.fsdp`).
    """

    coupled: ClassVar[bool] = False
    whole: bool = False

    @property
    def training(self) -> Training:
        """The optimisation's config; by default the method's own config is one."""
        assert isinstance(self.config, Training)
        return self.config

    def setup(self, ctx: Context) -> None:
        """Make what stays fixed: frozen reference, saliency mask, teacher. `ctx.model` is θ0."""
        return None

    def passes(self, epoch: int) -> Sequence[Pass]:
        """Return the passes of an epoch; by default one over forget with retain beside it."""
        return (Pass("joint", anchor="forget", partner="retain"),)

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return the loss of one micro-batch as named terms that are summed."""
        raise TypeError(f"{type(self).__name__} defines neither loss nor backward")

    def extra_loss(self, ctx: Context, extra: Batch) -> dict[str, Tensor]:
        """Return the terms of the third split of a pass that has one (`Pass.extra`)."""
        raise TypeError(f"{type(self).__name__} has passes with an extra split, and no loss for it")

    def terms(self, ctx: Context, part: Part) -> dict[str, Tensor]:
        """Return all terms of one micro-batch."""
        terms = self.loss(ctx, part.forget, part.retain)
        return terms if part.extra is None else terms | self.extra_loss(ctx, part.extra)

    def backward(self, ctx: Context, parts: Sequence[Part]) -> dict[str, Tensor]:
        """Accumulate the gradient of one optimiser step; return the terms' values for the log."""
        logged: dict[str, Tensor] = {}
        for whole in parts:
            # One graph at a time: activations are most of the memory.
            for part in [whole] if self.coupled else whole.sides():
                terms = self.terms(ctx, part)
                if terms:
                    ctx.engine.accelerator.backward(torch.stack(list(terms.values())).sum())
                add_terms(logged, terms)
        return logged

    def after_backward(self, ctx: Context) -> None:
        """Mask or project `parameter.grad`, which is summed over processes by now."""
        return None

    def after_step(self, ctx: Context, optimizer: Any) -> None:
        """Correct weights or optimiser state after a step."""
        return None

    def after_epoch(self, ctx: Context) -> None:
        """Look at the model after an epoch."""
        return None

    def finish(self, ctx: Context) -> nn.Module:
        """Return the result; by default the model as trained."""
        return ctx.model

    def state(self) -> dict[str, Any]:
        """Return what a step checkpoint must keep besides model and optimiser."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned; called after `setup`."""
        return None

    def run(self, ctx: Context) -> nn.Module:
        """Optimise; a killed run goes on from its last step checkpoint in `resume`."""
        from mmforget.training import optimise

        return optimise(ctx, self)


class Wrapper(LossMethod[ConfigT]):
    """A loss method around another one, named by the config's `inner` (`method.inner.name=npo`).

    Every hook goes to the inner method; a subclass overrides what it changes.

    Attributes:
        inner_default: The inner method if none is named.
    """

    inner_default: ClassVar[str]
    adds_reads: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: ConfigT) -> None:
        super().__init__(config)
        section = dict(config.inner)  # type: ignore[attr-defined]
        name = section.pop("name", self.inner_default)
        self.inner = make_loss_method(name, section, "method.inner")
        self.reads = self.inner.reads | self.adds_reads
        self.whole = self.whole or self.inner.whole

    @property
    def training(self) -> Training:
        """The inner method's."""
        return self.inner.training

    def setup(self, ctx: Context) -> None:
        """Set up the inner method."""
        self.inner.setup(ctx)

    def passes(self, epoch: int) -> Sequence[Pass]:
        """Return the inner method's passes."""
        return self.inner.passes(epoch)

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return the inner method's terms."""
        return self.inner.loss(ctx, forget, retain)

    def extra_loss(self, ctx: Context, extra: Batch) -> dict[str, Tensor]:
        """Return the inner method's terms of a third split."""
        return self.inner.extra_loss(ctx, extra)

    def backward(self, ctx: Context, parts: Sequence[Part]) -> dict[str, Tensor]:
        """Accumulate the inner method's gradient."""
        return self.inner.backward(ctx, parts)

    def after_backward(self, ctx: Context) -> None:
        """Let the inner method change gradients."""
        self.inner.after_backward(ctx)

    def after_step(self, ctx: Context, optimizer: Any) -> None:
        """Let the inner method correct weights."""
        self.inner.after_step(ctx, optimizer)

    def after_epoch(self, ctx: Context) -> None:
        """Let the inner method look at the model."""
        self.inner.after_epoch(ctx)

    def finish(self, ctx: Context) -> nn.Module:
        """Return the inner method's result."""
        return self.inner.finish(ctx)

    def state(self) -> dict[str, Any]:
        """Return the inner method's state."""
        return self.inner.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Give the inner method its state back."""
        self.inner.load_state(state)


def make_loss_method(name: str, section: Mapping[str, Any], path: str) -> LossMethod[Any]:
    """Return a loss method by registry name, its config checked.

    Raises:
        ConfigError: Unknown name or key, wrong type, or a method that is no loss method.
    """
    from mmforget.errors import ConfigError

    cls = METHODS.get(name)
    if not issubclass(cls, LossMethod):
        raise ConfigError(f"{path}.name={name}: a wrapper needs a loss method, such as npo")
    return cls(instantiate(cls.config_type, section, path))


def add_terms(logged: dict[str, Tensor], terms: Mapping[str, Tensor]) -> None:
    """Add the detached terms of a micro-batch to those of its step."""
    for name, value in terms.items():
        detached = value.detach().float()
        logged[name] = logged[name] + detached if name in logged else detached
