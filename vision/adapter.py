"""What loss methods may ask of a face classifier, with one label or several attributes."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    kl_div,
    log_softmax,
    logsigmoid,
)

from mmforget.errors import ConfigError
from mmforget.rng import Draws
from mmforget.types import Outputs, Splits, frozen_copy, full
from mmforget.vision.augment import augment, draw
from mmforget.vision.images import to_float
from mmforget.vision.models import Block, blocks, features_and_logits, head

SHOWN = 4  # parameter names listed in an error


class Faces(NamedTuple):
    """A prepared batch.

    Attributes:
        image: float32 [B, 3, S, S] in [0, 1].
        label: Class int64 [B], or attributes float32 [B, A] in {0, 1}.
        identity: Person int64 [B]; None where persons are not known.
    """

    image: Tensor
    label: Tensor
    identity: Tensor | None = None


class FaceAdapter:
    """`types.Adapter` for image classifiers.

    Args:
        classes: Outputs of the model: classes, or attributes.
        multilabel: Labels are independent attributes (sigmoid) instead of one class (softmax).
        augmented: Use the published training transform; otherwise that of evaluation.
    """

    def __init__(self, classes: int, multilabel: bool, augmented: bool) -> None:
        self.classes = classes
        self.multilabel = multilabel
        self.augmented = augmented

    @property
    def random(self) -> bool:
        """Whether photos are augmented."""
        return self.augmented

    def prepare(self, raw: Mapping[str, Tensor], draws: Draws, train: bool) -> Faces:
        """Put a batch of `ImageData` on the device, transformed to float32 in [0, 1]."""
        moved = {name: t.to(draws.device, non_blocking=True) for name, t in raw.items()}
        image = moved.pop("image")
        transformed = augment(image, draw(draws)) if train and self.augmented else to_float(image)
        return Faces(transformed, **moved)

    def units(self, data: Faces) -> Tensor:
        """Return ones, [B]: an image has one loss."""
        return torch.ones(len(data.image), device=data.image.device)

    def forward(self, model: nn.Module, data: Faces) -> Outputs:
        """Return cross-entropy [B] and logits [B, C] (attributes: mean over them, [B, A])."""
        logits = full(model(data.image))
        return Outputs(self._loss(logits, data.label), logits)

    def divergence(self, student: Outputs, teacher: Outputs, temperature: float = 1.0) -> Tensor:
        """Return KL(teacher || student) at temperature T, times T², [B].

        Attributes: the sum over independent Bernoulli variables. (The published code takes a
        softmax over the attributes, which are no alternatives.)
        """
        s, t = student.pred / temperature, teacher.pred / temperature
        if self.multilabel:
            on = torch.sigmoid(t) * (logsigmoid(t) - logsigmoid(s))
            off = torch.sigmoid(-t) * (logsigmoid(-t) - logsigmoid(-s))
            found = on + off
        else:
            found = kl_div(log_softmax(s, 1), log_softmax(t, 1), reduction="none", log_target=True)
        return found.sum(dim=1) * temperature**2

    def relabel(self, data: Faces, draws: Draws, exclude_true: bool = True) -> Faces:
        """Return the batch with random labels.

        One label: uniform over the classes, without the true one if `exclude_true`. Attributes:
        each is a coin toss; with `exclude_true` a random non-empty subset of them is flipped.
        """
        if not self.multilabel:
            if exclude_true:
                label = (data.label + 1 + draws.integers(self.classes - 1)) % self.classes
            else:
                label = draws.integers(self.classes)
        elif exclude_true:
            subset = 1 + draws.integers(2**self.classes - 1)  # a bit for each attribute, not all 0
            bits = torch.arange(self.classes, device=subset.device)
            label = (data.label - ((subset[:, None] >> bits) & 1)).abs()
        else:
            label = draws.integers(2, self.classes).to(data.label.dtype)
        return data._replace(label=label)

    def frozen(self, model: nn.Module, trainable: Mapping[str, nn.Parameter]) -> nn.Module:
        """Return a copy."""
        return frozen_copy(model)

    def shards(self, model: nn.Module) -> Sequence[nn.Module] | None:
        """Return the model: it is called as a whole."""
        return (model,)

    def parameters(self, model: nn.Module, scope: str) -> dict[str, nn.Parameter]:
        """Return parameters by scope: all, head, last_k:N (last N blocks), or a regex (fullmatch).

        Raises:
            ConfigError: The scope matches nothing.
        """
        named = dict(model.named_parameters())
        if scope == "all":
            return named
        if scope == "head":
            place = head(model)[0]
            return {n: p for n, p in named.items() if n.startswith(f"{place}.")}
        if scope.startswith("last_k:"):
            kept = last_blocks(model, scope)
            return {n: p for n, p in named.items() if any(block.holds(n) for block in kept)}
        try:
            chosen = {n: p for n, p in named.items() if re.fullmatch(scope, n)}
        except re.error as error:
            raise ConfigError(f"scope {scope!r} is no regular expression: {error}") from error
        if not chosen:
            shown = [name for name in named if name.endswith("weight")]
            step = max(1, len(shown) // SHOWN)
            raise ConfigError(
                f"scope {scope!r} matches no parameter. Accepted: all, head, last_k:N, or a "
                f"regular expression for whole names, such as {', '.join(shown[::step][:SHOWN])}"
            )
        return chosen

    def apply_request(self, model: nn.Module, splits: Splits) -> None:
        """Do nothing: a classifier holds no data besides its weights."""
        return None

    def record(self, model: nn.Module, data: Faces) -> dict[str, Tensor]:
        """Return loss [B], logits [B, C], label, features [B, D] and, if known, identity [B]."""
        features, logits = features_and_logits(model, data.image)
        logits = full(logits)
        numbers = {
            "loss": self._loss(logits, data.label),
            "logits": logits,
            "label": data.label,
            "features": full(features),
        }
        return numbers if data.identity is None else {**numbers, "identity": data.identity}

    def _loss(self, logits: Tensor, label: Tensor) -> Tensor:
        if self.multilabel:
            return binary_cross_entropy_with_logits(logits, label, reduction="none").mean(dim=1)
        return cross_entropy(logits, label, reduction="none")


def last_blocks(model: nn.Module, scope: str) -> list[Block]:
    """Return the blocks that a scope "last_k:N" names: the head and the N - 1 before it.

    Raises:
        ConfigError: N is no number from 1 to the number of blocks.
    """
    every = blocks(model)
    count = scope.partition(":")[2]
    if not count.isdecimal() or not 1 <= int(count) <= len(every):
        names = ", ".join(block.name for block in every)
        raise ConfigError(
            f"scope {scope!r}: N is 1 to {len(every)}; the blocks of this model are {names}"
        )
    return every[-int(count) :]
