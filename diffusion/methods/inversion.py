"""Textual inversion: token embeddings, learned on images, that stand in a concept's place.

Nothing is added to tokenizers, which copies of a pipeline share, and no table grows: while prompts
are encoded, the embeddings of the concept's own tokens are exchanged for the learned ones.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmforget.context import Context
from mmforget.diffusion.concepts import Concept
from mmforget.diffusion.conditions import Conditions
from mmforget.diffusion.models import DiffusionModel
from mmforget.errors import DataError
from mmforget.methods.base import LossMethod
from mmforget.options import option
from mmforget.training import optimise
from mmforget.types import Batch, Dataset, Pass, Training, full

CHUNK = 64  # images read together when captions are looked at


@dataclass(frozen=True)
class InversionConfig:
    """How embeddings are learned; defaults of Forget-Me-Not."""

    steps: int = option(500, "optimiser steps; 0: the concept's own embeddings", low=0)
    lr: float = option(1e-4, "learning rate (AdamW)", low=0)
    batch_size: int = option(1, "images in an effective batch", low=1)


@dataclass
class Learned:
    """Embeddings of concepts.

    Attributes:
        names: The texts they stand for.
        vectors: Text encoder -> for each name its embeddings [tokens, D].
        ids: Text encoder -> for each name its token ids, [tokens].
    """

    names: tuple[str, ...]
    vectors: dict[str, list[Tensor]]
    ids: dict[str, list[Tensor]]

    def tensors(self) -> dict[str, Tensor]:
        """Return all embeddings by a name of their own."""
        return {
            f"{encoder}.{k}": vector
            for encoder, vectors in self.vectors.items()
            for k, vector in enumerate(vectors)
        }


class Inversion(LossMethod[Training]):
    """Minimise the training loss over the embeddings of concepts alone (Gal et al., eq. 2).

    Args:
        config: The optimisation.
        learned: Embeddings, changed in place.
        concepts: Whose they are.
        owners: Image id -> which concept it shows.
    """

    reads: frozenset[str] = frozenset({"retain"})
    modalities = frozenset({"diffusion"})
    intent: ClassVar[str] = "reference"
    trains: ClassVar[str] = "token embeddings that are no part of the model"
    citation: ClassVar[str] = "Gal et al., An Image is Worth One Word, ICLR 2023, arXiv 2208.01618"
    config_type: ClassVar[type] = Training

    def __init__(
        self,
        config: Training,
        learned: Learned,
        concepts: Sequence[Concept],
        owners: Mapping[str, int],
    ) -> None:
        super().__init__(config)
        self.learned = learned
        self.concepts = concepts
        self.owners = owners

    def setup(self, ctx: Context) -> None:
        """Train nothing of the model."""
        ctx.model.requires_grad_(False)
        tensors = self.learned.tensors()
        for vector in tensors.values():
            vector.requires_grad_(True)
        ctx.trainable = tensors  # type: ignore[assignment]

    def passes(self, epoch: int) -> Sequence[Pass]:
        """One pass over the images."""
        return (Pass("inversion", anchor="retain"),)

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return the mean squared error of the images, each with its concept's prompt."""
        if retain is None:
            return {}
        model, data = ctx.model, retain.data
        assert isinstance(model, DiffusionModel)
        prompts = [self.concepts[self.owners[i]].text for i in retain.ids]
        with ctx.engine.autocast():
            found = model.predict(data.latents, data.t, encode(model, prompts, self.learned))
        error = (full(found) - data.target).square().flatten(1).sum(dim=1)
        return {"inversion": ctx.unit_mean(error, retain)}

    def finish(self, ctx: Context) -> nn.Module:
        """Hold the embeddings fixed."""
        for vector in self.learned.tensors().values():
            vector.requires_grad_(False)
        return ctx.model

    def state(self) -> dict[str, Any]:
        """Return the embeddings, which are no part of the model."""
        return {name: vector.detach() for name, vector in self.learned.tensors().items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Take them back."""
        for name, vector in self.learned.tensors().items():
            vector.copy_(state[name])


def invert(
    ctx: Context,
    concepts: Sequence[Concept],
    images: Dataset,
    config: InversionConfig,
    state: Path | None = None,
) -> Learned:
    """Learn the token embeddings with which the model draws images of concepts.

    They begin as the embeddings of each concept's own name. The model stays as it is; its
    parameters are left without gradients.

    Args:
        ctx: The run.
        concepts: What the images show.
        images: Images whose captions name them, in latent space.
        config: Steps, learning rate, batch.
        state: Folder for step checkpoints; None: none.

    Raises:
        DataError: A caption names none of several concepts.
        CollapsedError: The loss is not finite.
    """
    model = ctx.model
    assert isinstance(model, DiffusionModel)
    learned = initial(model, [phrase(model, concept) for concept in concepts])
    training = Training(
        epochs=ceil(config.steps * config.batch_size / len(images)),
        max_steps=config.steps,
        lr=config.lr,
        optimizer="adamw",
        batch_size=config.batch_size,
    )
    method = Inversion(training, learned, concepts, owners(images, concepts))
    method.resume = state
    optimise(ctx.within(model, images), method)
    return learned


@torch.no_grad()
def initial(model: DiffusionModel, names: Sequence[str]) -> Learned:
    """Return the embeddings that texts have, as tensors of their own."""
    ids: dict[str, list[Tensor]] = {}
    vectors: dict[str, list[Tensor]] = {}
    for encoder, module in model.text_encoders.items():
        tokenizer = model.shared.parts[encoder.replace("text_encoder", "tokenizer")]
        table: Any = module.get_input_embeddings()  # type: ignore[operator]
        rows = [tokenizer(name, add_special_tokens=False)["input_ids"] for name in names]
        ids[encoder] = [torch.tensor(row, device=table.weight.device) for row in rows]
        vectors[encoder] = [table.weight[row].detach().clone() for row in ids[encoder]]
    return Learned(tuple(names), vectors, ids)


def encode(model: DiffusionModel, prompts: Sequence[str], learned: Learned) -> Conditions:
    """Return the conditions of prompts, learned embeddings in the place of the texts they name.

    Gradients reach the embeddings, and no weight; the model's memory of prompts stays as it is.
    """
    with _exchanged(model, learned), torch.enable_grad():
        return model.encode(prompts)


@contextmanager
def _exchanged(model: DiffusionModel, learned: Learned) -> Iterator[None]:
    """Exchange embeddings inside the block."""
    handles, tables = [], []
    for encoder, module in model.text_encoders.items():
        table: Any = module.get_input_embeddings()  # type: ignore[operator]
        rows = list(zip(learned.ids[encoder], learned.vectors[encoder], strict=True))
        handles.append(table.register_forward_hook(_exchange(rows)))
        tables.append((table.weight, table.weight.requires_grad))
        table.weight.requires_grad_(True)  # so that `encode` keeps nothing of what it makes
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for weight, trained in tables:
            weight.requires_grad_(trained)


def _exchange(rows: Sequence[tuple[Tensor, Tensor]]) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        made = output.detach()  # the table itself is never trained here
        for ids, vector in rows:
            found, place = occurrences(args[0], ids)
            made = torch.where(found[..., None], vector.to(made.dtype)[place], made)
        return made

    return hook


def occurrences(ids: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return where a sequence of tokens occurs, bool [B, T], and which of its tokens, [B, T].

    Args:
        ids: Token ids of prompts, int64 [B, T].
        wanted: The sequence, int64 [n]; every one of its occurrences counts.
    """
    found = torch.zeros_like(ids, dtype=torch.bool)
    place = torch.zeros_like(ids)
    size = len(wanted)
    if 0 < size <= ids.shape[1]:
        starts = (ids.unfold(1, size, 1) == wanted.to(ids.device)).all(dim=2)
        for k in range(size):
            here = slice(k, k + starts.shape[1])
            place[:, here] = torch.where(starts, k, place[:, here])
            found[:, here] |= starts
    return found, place


def phrase(model: DiffusionModel, concept: Concept) -> str:
    """Return the part of a concept's short text that names it: its name, or else the whole."""
    made = model.tokenizer(concept.name, add_special_tokens=False)["input_ids"]
    found, _ = occurrences(model.tokens([concept.text]), torch.tensor(made, dtype=torch.int64))
    return concept.name if bool(found.any()) else concept.text


def owners(images: Dataset, concepts: Sequence[Concept]) -> dict[str, int]:
    """Return for every image, by id, which of the concepts it shows, by its official caption.

    Raises:
        DataError: A caption names none of several concepts.
    """
    if len(concepts) == 1:
        return dict.fromkeys(images.ids, 0)
    made: dict[str, int] = {}
    for start in range(0, len(images), CHUNK):
        rows = range(start, min(start + CHUNK, len(images)))
        for i, texts in zip(rows, images.take(rows)["captions"], strict=True):
            made[images.ids[i]] = _named(texts[0], concepts)
    return made


def _named(caption: str, concepts: Sequence[Concept]) -> int:
    """Return the concept whose prompt a caption is, or whose name, the longest, it holds."""
    exact = [k for k, concept in enumerate(concepts) if caption in concept.prompts]
    named = [k for k, c in enumerate(concepts) if c.name.lower() in caption.lower()]
    if not exact and not named:
        raise DataError(
            f"the caption {caption!r} names none of the request's concepts "
            f"({', '.join(concept.name for concept in concepts)})"
        )
    return exact[0] if exact else max(named, key=lambda k: len(concepts[k].name))
