"""Concept inversion: token embeddings that make the erased model draw the concept again."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmforget.checkpoint import read_state
from mmforget.context import Context
from mmforget.diffusion.adapter import DiffusionAdapter
from mmforget.diffusion.attacks.arena import (
    Arena,
    Candidate,
    PromptAttackConfig,
    Shot,
    volley,
)
from mmforget.diffusion.attacks.base import PromptAttack, benchmark_of
from mmforget.diffusion.attacks.encoding import encode_attacked
from mmforget.diffusion.attacks.examples import Example
from mmforget.diffusion.attacks.layouts import Layout, layout
from mmforget.diffusion.concepts import Erasure
from mmforget.diffusion.conditions import Conditions
from mmforget.diffusion.data import CaptionedLatents
from mmforget.diffusion.features import resized
from mmforget.diffusion.methods.inversion import Inversion, Learned
from mmforget.diffusion.models import DiffusionModel
from mmforget.diffusion.noise import Sampling
from mmforget.diffusion.sampling import denoise, start_latents
from mmforget.errors import ConfigError
from mmforget.options import option
from mmforget.record import writing
from mmforget.rng import derive
from mmforget.training import fit
from mmforget.types import Batch, Training, Trial, full

TOKEN = "<inverted>"  # how records show what has no text
FILE = "embedding.safetensors"
OBJECT = ("a photo of a {}", "a picture of a {}", "an image of a {}", "a good photo of a {}")
STYLE = (
    "a painting in the style of {}",
    "a picture in the style of {}",
    "an image in the style of {}",
    "a work of art in the style of {}",
)


@dataclass(frozen=True)
class ConceptInversionConfig(PromptAttackConfig):
    """How embeddings are learned, and where they are put in."""

    tokens: int = option(1, "new tokens", low=1)
    init: str = option("art", "word whose embedding they start from; one token")
    location: str = option(
        "prefix_k", "where they stand in a prompt", choices=("prefix_k", "suffix_k")
    )
    templates: list[str] = option(
        [], "texts of the pictures, {} for the tokens; empty: by the kind of the request"
    )
    targets: int = option(25, "pictures learned from: targets of a concept's first prompts", low=1)
    flip: bool = option(True, "learn from mirrored pictures as often")
    steps: int = option(1000, "optimiser steps; 5000 published, 3000 by Lu et al.", low=1)
    lr: float = option(
        0.08, "learning rate (AdamW); published 5e-3, scaled by batch 4 and accumulation 4", low=0
    )
    weight_decay: float = option(1e-2, "its weight decay", low=0)
    train_batch: int = option(4, "pictures in a training step; published 4, accumulated 4", low=1)


class Slot(NamedTuple):
    """A text with a place for the tokens.

    Attributes:
        text: Without them.
        layout: Where they stand.
    """

    text: str
    layout: Layout


class ConceptInversion(PromptAttack[ConceptInversionConfig]):
    """New tokens v minimise |ε - ε_u(z_t, t, c("a photo of a v"))|² on pictures of the concept.

    Textual inversion on the erased model (eq. 2): the pictures are the original's, t is uniform,
    and nothing but the new tokens' embeddings is trained. Then every prompt is drawn with the
    tokens put in, at its own seed first and at others up to `images`. Where an erasure only cut the
    words off, the embedding finds the concept again. But inversion can teach a model something
    truly new: only a rate above the retrained model's shows knowledge that was left.

    There is one embedding for each label of the prompts (each concept of the request), unless every
    prompt shows its concept by itself. It is kept as `embedding.safetensors`, and a killed attack
    goes on with it. With two CLIP encoders (SDXL, SD3) each has rows of its own; T5 reads the text
    without them. `steps` of a prompt are those of its concept's embedding, which all its prompts
    share. Published training accumulates four batches for a step: `train_batch=16`.

    Raises:
        ConfigError: The word `init` is not one token, a template has not one place for the tokens,
            or the tokens do not fit.
    """

    citation: ClassVar[str] = (
        "Pham et al., Circumventing Concept Erasure Methods For Text-to-Image Generative Models, "
        "ICLR 2024, arXiv 2308.01508"
    )
    config_type: ClassVar[type] = ConceptInversionConfig

    def __init__(self, config: ConceptInversionConfig) -> None:
        super().__init__(config)
        self.kinds: Mapping[str, str] = {}  # of the request's concepts, by name
        for template in config.templates:
            if template.count("{}") != 1:
                raise ConfigError(f"templates: {template!r} needs one {{}} for the new tokens")

    def most_steps(self) -> int:
        """Return the optimiser steps of an embedding."""
        return self.config.steps

    def arena(self, trial: Trial) -> Arena:
        """Return where the trial's model is attacked; note what kind its concepts are."""
        targets = [stage.target for stage in benchmark_of(trial).stages(trial.splits)]
        concepts = [c for one in targets if isinstance(one, Erasure) for c in one.concepts]
        self.kinds = {concept.name: concept.kind for concept in concepts}
        return super().arena(trial)

    def hunt(self, arena: Arena) -> None:
        """Learn the embeddings, or read them back, and draw every prompt with them."""
        config = self.config
        arena.require_targets()
        word = self._word(arena)
        slots = {e.prompt: self._placed(arena, e.prompt) for e in arena.attackable}
        concepts: dict[str | None, list[Example]] = {}
        for example in arena.examples:
            concepts.setdefault(example.label, []).append(example)
        texts = {label: self._texts(arena, label) for label in concepts}
        left = torch.tensor([float(len(arena.todo()))], device=arena.engine.device)
        arena.engine.reduce_sum([left])  # processes learn together, or none does
        if not left.item():
            return
        learned = _read(arena, list(concepts))
        if not learned:
            for label, examples in concepts.items():
                learned[label] = self.learn(arena, word, examples[: config.targets], texts[label])
            _write(arena, learned)
        arena.engine.barrier()

        def painter(shots: Sequence[Shot], settings: Sampling) -> Tensor:
            # Arena.shoot draws the shots of one label together.
            held = learned[shots[0].example.label]
            return painted(arena.model, shots, settings, slots, word, held)

        def candidates(example: Example) -> list[Candidate]:
            shown = (TOKEN, example.prompt)
            text = " ".join(shown if config.location == "prefix_k" else reversed(shown))
            more = [
                derive(arena.seed, "inversion", example.id, k) for k in range(config.images - 2)
            ]
            return [Candidate(text, seed) for seed in (example.seed, *more)]

        volley(arena, candidates, type(self).__name__, config.steps, painter, "inverted")

    def learn(
        self, arena: Arena, word: int, examples: Sequence[Example], texts: Mapping[str, Slot]
    ) -> dict[str, Tensor]:
        """Return the embeddings of the new tokens by text encoder, each [tokens, D].

        Args:
            arena: Model and target pictures.
            word: Id of the token they start from.
            examples: Whose target pictures they are to explain.
            texts: Templates.
        """
        config, model = self.config, arena.model
        rows = {
            name: full(table[word]).repeat(config.tokens, 1) for name, table in arena.tables.items()
        }
        learned = Learned(
            (TOKEN,),
            {name: [vectors] for name, vectors in rows.items()},
            {name: [torch.full((config.tokens,), word)] for name in rows},
        )
        data = self._pictures(arena, examples, list(texts))
        training = Training(
            epochs=ceil(config.steps * config.train_batch / len(data)),
            max_steps=config.steps,
            lr=config.lr,
            optimizer="adamw",
            weight_decay=config.weight_decay,
            batch_size=config.train_batch,
        )
        fit(
            arena.engine,
            model,
            DiffusionAdapter(model.noising, model.scale_latents),
            data,
            training,
            derive(arena.seed, "inversion", examples[0].label or ""),
            label="concept inversion",
            method=TemplateInversion(training, learned, texts, word),
        )
        return {name: vectors[0].detach() for name, vectors in learned.vectors.items()}

    def _word(self, arena: Arena) -> int:
        """Return the id of the word that embeddings start from."""
        ids = arena.plain_ids(self.config.init)
        if len(ids) != 1 or ids[0] == arena.model.tokenizer.unk_token_id:
            raise ConfigError(
                f"init={self.config.init!r} is {len(ids)} tokens here: give a word that the "
                f"tokenizer knows as one, such as art, person or object"
            )
        return ids[0]

    def _texts(self, arena: Arena, label: str | None) -> dict[str, Slot]:
        """Return the templates of a concept's pictures."""
        own = self.kinds.get(label or "")
        style = own == "style" if own else set(self.kinds.values()) == {"style"}
        texts = self.config.templates or (STYLE if style else OBJECT)
        return {text: self._filled(arena, text) for text in texts}

    def _filled(self, arena: Arena, template: str) -> Slot:
        """Return a template with the tokens at its {}."""
        before, _, after = (part.strip() for part in template.partition("{}"))
        text = f"{before} {after}".strip()
        first, n = len(arena.plain_ids(before)), len(arena.plain_ids(text))
        k, window = self.config.tokens, int(arena.model.tokenizer.model_max_length)
        ends = layout("prefix_k", n, k, window)  # what follows the text is the same anywhere in it
        body = (*range(1, first + 1), *[-1] * k, *range(first + 1, n + 1))
        places = tuple(range(first + 1, first + k + 1))
        return Slot(text, Layout(places, (0, *body, *ends.sources[len(body) + 1 :])))

    def _placed(self, arena: Arena, prompt: str) -> Slot:
        """Return a prompt with the tokens put in."""
        n, window = len(arena.plain_ids(prompt)), int(arena.model.tokenizer.model_max_length)
        return Slot(prompt, layout(self.config.location, n, self.config.tokens, window))

    @torch.no_grad()
    def _pictures(
        self, arena: Arena, examples: Sequence[Example], texts: Sequence[str]
    ) -> CaptionedLatents:
        """Return the target pictures, and mirrored ones, in latent space: encoded once."""
        model = arena.model
        images = resized(
            arena.target_images(examples),
            model.latent_shape[1] * model.scale_factor,
            mode="bicubic",
        )
        ids = [example.id for example in examples]
        if self.config.flip:
            images = torch.cat([images, images.flip(-1)])
            ids += [f"{one} mirrored" for one in ids]
        moments = []
        for start in range(0, len(images), arena.config.batch_size):
            part = images[start : start + arena.config.batch_size]
            pixels = part.to(model.device, model.dtype) / 127.5 - 1.0
            moments.append(model.vae.encode(pixels).latent_dist.parameters.float().cpu().numpy())
        captions = [list(texts)] * len(ids)
        return CaptionedLatents(ids, ids, np.concatenate(moments), captions, [[]] * len(ids))


class TemplateInversion(Inversion):
    """Textual inversion whose pictures have one of several texts, drawn at each step.

    Args:
        config: The optimisation.
        learned: One row of embeddings for each text encoder, changed in place.
        texts: The templates by what data call them.
        word: Id that encoders read that have no embeddings of their own.
    """

    def __init__(
        self, config: Training, learned: Learned, texts: Mapping[str, Slot], word: int
    ) -> None:
        super().__init__(config, learned, (), {})
        self.texts = texts
        self.word = word

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return the mean squared error of the pictures, each with its text."""
        if retain is None:
            return {}
        model, data = ctx.model, retain.data
        assert isinstance(model, DiffusionModel)
        vectors = {name: rows[0] for name, rows in self.learned.vectors.items()}
        with ctx.engine.autocast():
            text = inserted(model, [self.texts[key] for key in data.prompts], self.word, vectors)
            found = model.predict(data.latents, data.t, text)
        error = (full(found) - data.target).square().flatten(1).sum(dim=1)
        return {"inversion": ctx.unit_mean(error, retain)}


def inserted(
    model: DiffusionModel, slots: Sequence[Slot], word: int, vectors: Mapping[str, Tensor]
) -> Conditions:
    """Return the conditions of texts with the tokens put in; gradients flow to the embeddings.

    Args:
        model: The model.
        slots: B texts.
        word: Id that stands in their places, for encoders without embeddings.
        vectors: Embeddings by text encoder, [tokens, D].
    """
    texts = [slot.text for slot in slots]
    count = len(next(iter(vectors.values())))
    return encode_attacked(
        model,
        texts,
        [slot.layout for slot in slots],
        model.tokens(texts),
        torch.full((len(texts), count), word),
        {name: rows.expand(len(texts), -1, -1) for name, rows in vectors.items()},
    )


@torch.no_grad()
def painted(
    model: DiffusionModel,
    shots: Sequence[Shot],
    settings: Sampling,
    slots: Mapping[str, Slot],
    word: int,
    vectors: Mapping[str, Tensor],
) -> Tensor:
    """Draw shots with the tokens put in their examples' prompts; uint8 [N, 3, H, W].

    Args:
        model: The model.
        shots: What to draw; their texts are those of records.
        settings: How.
        slots: Where the tokens stand, by prompt.
        word: See `inserted`.
        vectors: See `inserted`.
    """
    parts = []
    for start in range(0, len(shots), settings.batch_size):
        part = shots[start : start + settings.batch_size]
        seeds = [shot.seed for shot in part]
        text = inserted(model, [slots[shot.example.prompt] for shot in part], word, vectors)
        noise = start_latents(model, seeds, settings.size)
        negative = model.unconditional().repeat(len(part))
        latents = denoise(model, noise, text, negative, settings, seeds=seeds)
        parts.append(model.to_images(latents).cpu())
    return torch.cat(parts)


def _write(arena: Arena, learned: Mapping[str | None, Mapping[str, Tensor]]) -> None:
    """Keep embeddings, with what decides them."""
    if arena.folder is None or not arena.engine.is_main:
        return
    held = {
        f"{k}.{name}": rows.cpu().contiguous()
        for k, vectors in enumerate(learned.values())
        for name, rows in vectors.items()
    }
    header = {"attack": _digest(arena), "labels": json.dumps(list(learned))}
    with writing(arena.folder / FILE) as temporary:
        save_file(held, temporary, header)


def _read(arena: Arena, labels: Sequence[str | None]) -> dict[str | None, dict[str, Tensor]]:
    """Return the embeddings of this very attack by label; none if there are none."""
    path = None if arena.folder is None else arena.folder / FILE
    if path is None or not path.is_file():
        return {}
    with safe_open(str(path), "pt") as opened:
        header = opened.metadata() or {}
    if header.get("attack") != _digest(arena):
        return {}
    state = read_state(path)
    return {
        label: {name: state[f"{k}.{name}"].to(arena.model.device) for name in arena.tables}
        for k, label in enumerate(labels)
    }


def _digest(arena: Arena) -> str:
    """Return a hash of what decides the attack's outcomes, as its folder says it."""
    assert arena.folder is not None
    return hashlib.sha256((arena.folder / "attack.json").read_bytes()).hexdigest()
