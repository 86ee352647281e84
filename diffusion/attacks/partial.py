"""Probes that leave the prompt alone: start late, continue another model's picture, add more noise.

Lu et al., When Are Concepts Erased From Diffusion Models?, arXiv 2505.17013. They show what an
erased model still draws once it is shown the way.
"""

import math

from torch import Tensor

from mmforget.errors import ConfigError, unknown

ETAS = (1.0, 1.17, 1.34, 1.51, 1.68, 1.85)
SCALES = (1.0, 1.02, 1.03, 1.04)
PREDICTIONS = ("epsilon", "v_prediction")


def img2img_start(steps: int, strength: float) -> int:
    """Return the first step of a sampler that starts from a noised image (SDEdit).

    n - int(n·s), as diffusers' Stable Diffusion pipelines; those of SD3 and FLUX round the start
    down instead, which is one step more where n·s is no whole number.

    Args:
        steps: n, steps of the sampler.
        strength: s, share of them that is denoised, in [0, 1].

    Returns:
        From 0 (all steps) to n (none: the image stays).

    Raises:
        ConfigError: There are no steps, or the strength is outside [0, 1].
    """
    if steps < 1 or not 0 <= strength <= 1:
        raise ConfigError(
            f"steps={steps}, strength={strength}: at least 1 step, and a strength from 0 to 1"
        )
    return steps - min(int(steps * strength), steps)


def completion_start(steps: int, last: int) -> int:
    """Return the first step of the erased model after the original one ran steps 0 to `last`.

    The erased model goes on with `timesteps[last + 1:]`: `sampling.denoise(stop=start)` with the
    original, then `sampling.denoise(start=start)` with the erased model.

    Args:
        steps: Steps of the sampler.
        last: The original model's last step, from 0 (published: 0, 1 and 2 of 50).

    Raises:
        ConfigError: No step is left to the erased model, or none goes to the original one.
    """
    if not 0 <= last < steps - 1:
        raise ConfigError(
            f"the original model's last step is {last} of {steps}: give 0 to {steps - 2}, so that "
            f"the erased model has steps of its own"
        )
    return last + 1


def ddim_noise_step(
    sample: Tensor,
    model_output: Tensor,
    noise: Tensor,
    alpha_t: float | Tensor,
    alpha_prev: float | Tensor,
    eta: float = 1.0,
    scale: float = 1.0,
    kind: str = "epsilon",
) -> Tensor:
    """Return the latents after one DDIM step with more noise than it takes away.

    Song et al., Denoising Diffusion Implicit Models, eqs. 12 and 16. Above η = 1 the direction's
    1 - ᾱ_prev - σ² can be negative; its magnitude is taken, as published. The scale is that of the
    added noise alone. Published: 24 images a prompt, η of `ETAS` with each scale of `SCALES`; count
    them against as many plain seeds.

    Args:
        sample: Latents at t, [B, C, h, w].
        model_output: The guided prediction, of the same shape.
        noise: Standard normal, of the same shape.
        alpha_t: ᾱ at t, in (0, 1).
        alpha_prev: ᾱ at the next, less noisy step, from ᾱ_t to 1.
        eta: η, at least 0; 0 adds no noise, 1 as much as DDPM.
        scale: Factor of the added noise.
        kind: "epsilon" or "v_prediction".

    Raises:
        ConfigError: A value is outside its range, or the model predicts something else (flow).
    """
    if kind not in PREDICTIONS:
        raise ConfigError(unknown("prediction of a DDIM step", kind, PREDICTIONS, "partial.py"))
    now, after = float(alpha_t), float(alpha_prev)
    if not 0 < now < 1 or not now <= after <= 1 or eta < 0:
        raise ConfigError(
            f"alpha_t={now}, alpha_prev={after}, eta={eta}: 0 < alpha_t < 1, alpha_t <= alpha_prev "
            f"<= 1 and eta >= 0 are needed"
        )
    image, level = math.sqrt(now), math.sqrt(1 - now)
    if kind == "epsilon":
        epsilon, clean = model_output, (sample - level * model_output) / image
    else:
        epsilon = image * model_output + level * sample
        clean = image * sample - level * model_output
    sigma = eta * math.sqrt((1 - after) / (1 - now) * (1 - now / after))
    direction = math.sqrt(abs(1 - after - sigma**2))
    return math.sqrt(after) * clean + direction * epsilon + scale * sigma * noise
