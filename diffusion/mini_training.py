"""Train what the mini world ships: text encoder, autoencoder and its two classifiers.

    python -m mmforget.diffusion.mini_training --out diffusion/assets/mini.safetensors --seed 0

About 15 minutes on one core (`--only text` replaces the text encoder of an existing file in
seconds). Images are drawings of other worlds than the one that a benchmark draws (data.seed 0), and
nothing here knows of a request; the denoiser is trained by the benchmark itself.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, normalize

from mmforget.diffusion import mini
from mmforget.diffusion.drawings import draw, paint
from mmforget.diffusion.mini_model import (
    PIXELS,
    WIDTH,
    make_autoencoder,
    make_classifier,
    make_text_encoder,
    make_tokenizer,
)
from mmforget.progress import progress
from mmforget.rng import derive, generator

logger = logging.getLogger(__name__)

WORLDS = (1001, 1002, 1003)  # seeds of the drawings that are trained on
HELD_OUT = 2001
CODEC_STEPS, CODEC_BATCH, CODEC_LR = 1500, 24, 3e-3
CLASSIFIER_STEPS, CLASSIFIER_BATCH, CLASSIFIER_LR = 400, 96, 4e-3
TEXT_STEPS, TEXT_BATCH, TEXT_LR = 200, 64, 2e-3
WORD_WEIGHT = 1.0  # of telling words apart; 0 would make synonyms one and the same to the denoiser


@dataclass(frozen=True)
class Drawings:
    """Drawings of some worlds at the model's size.

    Attributes:
        images: float32 [N, 3, 32, 32] in [-1, 1].
        style: Index in `mini.THEMES`, int64 [N].
        object: Index in `mini.OBJECTS`, int64 [N].
    """

    images: Tensor
    style: Tensor
    object: Tensor


def drawings(worlds: tuple[int, ...], count: int = mini.IMAGES) -> Drawings:
    """Return the drawings of some worlds, as `mini.write_canvas` draws them, before JPEG.

    Args:
        worlds: Their seeds.
        count: Images of each style and object.
    """
    images, styles, objects = [], [], []
    for seed in worlds:
        for o, name in enumerate(mini.OBJECTS):
            for k in range(1, count + 1):
                scene = draw(name, np.random.default_rng(derive(seed, "scene", name, k)))
                for s, theme in enumerate(mini.THEMES):
                    rng = np.random.default_rng(derive(seed, "paint", name, k, theme))
                    images.append(np.asarray(paint(scene, theme, rng)).transpose(2, 0, 1))
                    styles.append(s)
                    objects.append(o)
    large = torch.from_numpy(np.stack(images)).float() / 127.5 - 1.0
    small = interpolate(large, size=PIXELS, mode="area")
    return Drawings(small, torch.tensor(styles), torch.tensor(objects))


@dataclass(frozen=True)
class Reading:
    """Captions, and what has been named at each of their tokens.

    Attributes:
        ids: int64 [N, T].
        named: For "style" and "object" the concept named so far, int64 [N, T]; 0 is none.
        words: The same for the very word that named it.
    """

    ids: Tensor
    named: Mapping[str, Tensor]
    words: Mapping[str, Tensor]


def reading(tokenizer: Any) -> Reading:
    """Return every caption of the mini world as the text encoder reads it."""
    lines = sorted(
        {text for s in mini.THEMES for o in mini.OBJECTS for text in mini.captions(s, o)}
    )
    ids = torch.tensor(tokenizer(lines, padding="max_length", truncation=True)["input_ids"])
    kinds = {"style": mini.THEMES, "object": mini.OBJECTS}
    named, words = {}, {}
    for kind, names in kinds.items():
        concept = torch.zeros(len(tokenizer), dtype=torch.int64)
        word = torch.zeros(len(tokenizer), dtype=torch.int64)
        for k, name in enumerate(names):
            for said in mini.SYNONYMS[name]:
                (*_, last) = tokenizer(said, add_special_tokens=False)["input_ids"]
                concept[last], word[last] = k + 1, int(word.max()) + 1
        said_here = concept[ids] > 0
        place = torch.where(said_here, torch.arange(ids.shape[1]), 0).cummax(dim=1).values
        so_far = ids.gather(1, place)  # the last word of this kind up to here
        named[kind], words[kind] = concept[so_far], word[so_far]
    return Reading(ids, named, words)


def train_text_encoder(steps: int, seed: int) -> Any:
    """Train the text encoder to tell at each token which style and object have been named so far.

    As CLIP's, it has learned what words mean before any image is drawn, and stays as it is when the
    denoiser is trained. It tells synonyms of a concept from each other too, so that they are near
    but not the same: an edit that forgets one of them need not reach the others.

    Args:
        steps: Optimiser steps.
        seed: Seed of weights and order.
    """
    torch.manual_seed(derive(seed, "text") % 2**63)
    rng = generator(seed, "text", "order")
    tokenizer = make_tokenizer()
    held = reading(tokenizer)
    made: Any = make_text_encoder(tokenizer, trained=False).train()
    heads = nn.ModuleList()
    targets: list[tuple[nn.Module, Tensor, float]] = []
    for found, weight in ((held.named, 1.0), (held.words, WORD_WEIGHT)):
        for target in found.values():
            head = nn.Linear(WIDTH, int(target.max()) + 1)
            heads.append(head)
            targets.append((head, target, weight))
    weights = [*made.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=TEXT_LR)
    for _, rows in _steps(optimizer, len(held.ids), TEXT_BATCH, steps, rng, "text encoder"):
        hidden = made(held.ids[rows]).last_hidden_state
        losses = [
            weight * cross_entropy(head(hidden).flatten(0, 1), target[rows].flatten())
            for head, target, weight in targets
        ]
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return made.eval()


@torch.no_grad()
def likeness(encoder: Any) -> tuple[float, float]:
    """Return how alike prompts of one style are, and of two: mean cosines about the mean."""
    tokenizer = make_tokenizer()
    texts = [
        [mini.OFFICIAL.format(object="Cats", style=said) for said in mini.SYNONYMS[style]]
        for style in mini.STYLES
    ]
    flat = [text for row in texts for text in row]
    ids = torch.tensor(tokenizer(flat, padding="max_length")["input_ids"])
    found = encoder(ids).last_hidden_state.flatten(1)
    unit = normalize(found - found.mean(dim=0), dim=1)
    cosine = unit @ unit.T
    group = torch.arange(len(flat)) // len(texts[0])
    same = (group[:, None] == group[None]) & ~torch.eye(len(flat), dtype=torch.bool)
    other = group[:, None] != group[None]
    return float(cosine[same].mean()), float(cosine[other].mean())


def train_autoencoder(data: Drawings, steps: int, seed: int) -> Any:
    """Train the autoencoder on absolute error, with small noise on its latents.

    Args:
        data: Drawings.
        steps: Optimiser steps.
        seed: Seed of weights, order and noise.
    """
    torch.manual_seed(derive(seed, "codec") % 2**63)
    rng = generator(seed, "codec", "order")
    fresh: Any = make_autoencoder(trained=False)
    made = fresh.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(
        made.parameters(), lr=CODEC_LR, betas=(0.9, 0.95), weight_decay=1e-4, fused=True
    )
    for step, rows in _steps(optimizer, len(data.images), CODEC_BATCH, steps, rng, "autoencoder"):
        images = data.images[rows].contiguous(memory_format=torch.channels_last)
        images = images.flip(-1) if step % 2 else images
        found = made.encode(images).latent_dist
        latents = found.mean + 0.05 * torch.randn(found.mean.shape, generator=rng)
        error = (made.decode(latents).sample - images).abs().mean()
        # Keeps latents near 1 and the posterior narrow; it is sampled in training.
        spread = found.mean.square().mean() + (found.logvar + 6.0).square().mean()
        (error + 1e-3 * spread).backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
    return made.eval()


def train_classifier(
    data: Drawings, label: Tensor, classes: int, codec: Any, steps: int, seed: int
) -> nn.Module:
    """Train a classifier on drawings and on what the codec makes of them, blurred and noised.

    Generated images pass through the codec, so a fair judge has seen its traces.

    Args:
        data: Drawings.
        label: Class of each, int64 [N].
        classes: Number of classes.
        codec: The trained autoencoder.
        steps: Optimiser steps.
        seed: Seed of weights, order and noise.
    """
    torch.manual_seed(derive(seed, "classifier", classes) % 2**63)
    rng = generator(seed, "classifier", classes)
    made = make_classifier(classes).train()
    again = reconstructed(codec, data.images)
    optimizer = torch.optim.AdamW(made.parameters(), lr=CLASSIFIER_LR, weight_decay=0.05)
    name = f"classifier of {classes}"
    for step, rows in _steps(optimizer, len(again), CLASSIFIER_BATCH, steps, rng, name):
        images = (again if step % 3 else data.images)[rows]
        images = images.flip(-1) if step % 2 else images
        if step % 4 == 3:  # generated pictures are softer than drawn ones
            images = interpolate(interpolate(images, scale_factor=0.5, mode="area"), size=PIXELS)
        images = images + 0.1 * torch.randn(images.shape, generator=rng)
        loss = cross_entropy(made(images), label[rows], label_smoothing=0.05)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
    return made.eval()


@torch.no_grad()
def reconstructed(codec: Any, images: Tensor) -> Tensor:
    """Return images [N, 3, 32, 32] after a round trip through the codec, in [-1, 1]."""
    found = [
        codec.decode(codec.encode(part).latent_dist.mean).sample for part in torch.split(images, 64)
    ]
    return torch.cat(found).clamp(-1.0, 1.0)


@torch.no_grad()
def latent_scale(codec: Any, images: Tensor) -> float:
    """Return 1 over the standard deviation of the latents of images."""
    found = [codec.encode(part).latent_dist.mean for part in torch.split(images, 64)]
    return 1.0 / float(torch.cat(found).std())


def _steps(
    optimizer: torch.optim.Optimizer,
    size: int,
    batch: int,
    total: int,
    rng: torch.Generator,
    label: str,
) -> Iterator[tuple[int, Tensor]]:
    """Yield (step, rows) with a warmed-up cosine rate and gradients cleared."""
    peak = [group["lr"] for group in optimizer.param_groups]
    with progress(label, total) as advance:
        for step in range(total):
            factor = min(1.0, (step + 1) / 50) * 0.5 * (1.0 + math.cos(math.pi * step / total))
            for group, rate in zip(optimizer.param_groups, peak, strict=True):
                group["lr"] = rate * max(0.02, factor)
            optimizer.zero_grad()
            yield step, torch.randint(size, (batch,), generator=rng)
            advance(1)


def main(
    out: Annotated[Path, typer.Option(help="The file to write.")],
    seed: Annotated[int, typer.Option(help="Seed of all of it.")] = 0,
    steps: Annotated[float, typer.Option(help="Share of the full training, for trials.")] = 1.0,
    only: Annotated[str, typer.Option(help="`text`: train the text encoder alone, into OUT.")] = "",
) -> None:
    """Train what is shipped, write it in half precision, and say how good it is."""
    torch.set_num_threads(1)  # the same sums in the same order on every machine
    if only not in ("", "text"):
        raise typer.BadParameter(f"--only {only}: accepted is text")
    state: dict[str, Tensor] = {}
    if only:
        kept = load_file(out).items()
        state |= {name: value for name, value in kept if not name.startswith("text_encoder.")}
    else:
        state |= _seeing(steps, seed)
    encoder = train_text_encoder(max(1, round(steps * TEXT_STEPS)), seed)
    same, other = likeness(encoder)
    typer.echo(f"text encoder: cosine {same:.2f} of words of one style, {other:.2f} of two styles")
    state |= {f"text_encoder.{name}": value for name, value in encoder.state_dict().items()}
    half = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in state.items()
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(half, out, {"seed": str(seed), "steps": str(steps)})
    typer.echo(f"{out}: {out.stat().st_size / 1e6:.2f} MB")


def _seeing(steps: float, seed: int) -> dict[str, Tensor]:
    """Train autoencoder and classifiers; return their weights."""
    data, unseen = drawings(WORLDS), drawings((HELD_OUT,), 5)
    codec = train_autoencoder(data, max(1, round(steps * CODEC_STEPS)), seed)
    error = float((reconstructed(codec, unseen.images) - unseen.images).abs().mean())
    typer.echo(f"autoencoder: absolute error {error:.4f} of a range of 2 on unseen drawings")
    state = {f"autoencoder.{name}": value for name, value in codec.state_dict().items()}
    state["autoencoder.scaling_factor"] = torch.tensor(latent_scale(codec, data.images))
    again = reconstructed(codec, unseen.images)
    for name, label, truth, labels in (
        ("style", data.style, unseen.style, mini.THEMES),
        ("object", data.object, unseen.object, mini.OBJECTS),
    ):
        count = max(1, round(steps * CLASSIFIER_STEPS))
        made = train_classifier(data, label, len(labels), codec, count, seed)
        with torch.no_grad():
            right = [
                float((made(x).argmax(1) == truth).float().mean()) for x in (unseen.images, again)
            ]
        typer.echo(f"{name}: {right[0]:.3f} of unseen drawings, {right[1]:.3f} after the codec")
        state |= {f"{name}.{key}": value for key, value in made.state_dict().items()}
    return state


if __name__ == "__main__":
    typer.run(main)
