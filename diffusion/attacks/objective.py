"""What an attack on the prompt minimises: how badly the erased model explains a target image.

UnlearnDiffAtk (Zhang et al., To Generate or Not?, ECCV 2024, eq. 5): |ε - ε_u(z_t, t, c(p + d))|²,
the erased model as its own classifier. P4D (Chin et al., Prompting4Debugging, ICML 2024, eq. 5):
the original model's prediction for the plain prompt takes the noise's place.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mmforget.diffusion.noise import Noising
from mmforget.errors import ConfigError, DataError, unknown
from mmforget.types import full

LOSSES = ("l2", "l1")

# A model with its conditions: the prediction for noised latents [P, C, h, w] at t [P].
Predict = Callable[[Tensor, Tensor], Tensor]


class Noised(NamedTuple):
    """Noised target images.

    Attributes:
        latents: What the model is shown, [P, C, h, w].
        target: What a perfect model predicts: noise, velocity or flow, [P, C, h, w].
    """

    latents: Tensor
    target: Tensor


def noised(noising: Noising, clean: Tensor, noise: Tensor, t: Tensor) -> Noised:
    """Noise latents as the model was trained on them, whatever sampler draws its images.

    A sampler's own `add_noise` may give other latents (z + σ·ε from LMS and Euler), which the model
    has never seen.

    Args:
        noising: The model's.
        clean: Scaled latents of target images, [P, C, h, w].
        noise: Standard normal, of the same shape.
        t: Time steps [P], or one for all [1], in training units.

    Raises:
        DataError: Latents and noise differ in shape.
    """
    if clean.shape != noise.shape:
        raise DataError(
            f"latents {list(clean.shape)} and noise {list(noise.shape)}: the same shape is needed"
        )
    return Noised(noising.add(clean, noise, t), noising.target(clean, noise, t))


def attack_loss(pred: Tensor, target: Tensor, kind: str = "l2") -> Tensor:
    """Return the mean error over the latent entries of each prompt, [P], float32 or wider.

    Args:
        pred: The erased model's prediction, [P, C, h, w], of any precision.
        target: Of the same shape; see `noised`, or the original model's prediction (P4D).
        kind: "l2" (all published attacks) or "l1".

    Raises:
        ConfigError: No such kind.
        DataError: The shapes differ.
    """
    if kind not in LOSSES:
        raise ConfigError(unknown("attack loss", kind, LOSSES, "objective.LOSSES"))
    if pred.shape != target.shape:
        raise DataError(
            f"a prediction {list(pred.shape)} and its target {list(target.shape)}: the same shape "
            f"is needed"
        )
    gap = full(pred) - full(target)
    return (gap.square() if kind == "l2" else gap.abs()).flatten(1).mean(dim=1)


def objective(
    attacked: Predict,
    noising: Noising,
    clean: Tensor,
    noise: Tensor,
    t: Tensor,
    *,
    base: Predict | None = None,
    kind: str = "l2",
) -> Tensor:
    """Return the loss of each attacked prompt, [P]; gradients flow to what `attacked` closes over.

    Args:
        attacked: The erased model under the attacked prompts.
        noising: Its noising.
        clean: Latents of the target images; see `noised`.
        noise: See `noised`.
        t: Time steps [P].
        base: The original model under the plain prompts: P4D's target. None: UnlearnDiffAtk's.
        kind: See `attack_loss`.
    """
    shown = noised(noising, clean, noise, t)
    target = shown.target
    if base is not None:
        with torch.no_grad():
            target = base(shown.latents, t)
    return attack_loss(attacked(shown.latents, t), target, kind)
