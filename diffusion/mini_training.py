"""Train what the mini world ships: its autoencoder and its two classifiers.

    python -m mmforget.diffusion.mini_training --out diffusion/assets/mini.safetensors --seed 0

About 15 minutes on one core. They are trained on drawings of other worlds than the one that a
benchmark draws (data.seed 0), and know nothing of a request; denoiser and text encoder are trained
by the benchmark itself.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from mmforget.diffusion import mini
from mmforget.diffusion.drawings import draw, paint
from mmforget.diffusion.mini_model import PIXELS, make_autoencoder, make_classifier
from mmforget.progress import progress
from mmforget.rng import derive, generator

logger = logging.getLogger(__name__)

WORLDS = (1001, 1002, 1003)  # seeds of the drawings that are trained on
HELD_OUT = 2001
CODEC_STEPS, CODEC_BATCH, CODEC_LR = 1500, 24, 3e-3
CLASSIFIER_STEPS, CLASSIFIER_BATCH, CLASSIFIER_LR = 400, 96, 4e-3


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
) -> None:
    """Train autoencoder and classifiers, write them in half precision, say how good they are."""
    torch.set_num_threads(1)  # the same sums in the same order on every machine
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
    half = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in state.items()
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(half, out, {"seed": str(seed), "steps": str(steps)})
    typer.echo(f"{out}: {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    typer.run(main)
