"""How a pipeline's scheduler noises images in training, and which samplers draw from it.

A model predicts noise ("epsilon"), velocity ("v_prediction") or flow ("flow"); every loss and every
target of an unlearning method is a combination of such predictions, so that one code serves all.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmforget.errors import ConfigError, DataError
from mmforget.options import option
from mmforget.rng import Draws

SAMPLERS = ("ddim", "checkpoint", "lms", "euler", "dpmsolver")


@dataclass(frozen=True)
class Sampling:
    """How images are generated; recorded with every figure, because figures depend on it."""

    sampler: str = option(
        "ddim",
        "ddim, lms, euler, dpmsolver; checkpoint: the pipeline's own (flow models: always)",
        choices=SAMPLERS,
    )
    steps: int = option(100, "denoising steps", low=1)
    guidance: float = option(9.0, "classifier-free guidance; 1 is none", low=0)
    batch_size: int = option(8, "images denoised together; does not change them", low=1)
    size: int | None = option(None, "side of images, pixels; null takes the pipeline's own", low=8)


class Noising:
    """Noising of training, from a diffusers scheduler.

    Args:
        scheduler: The pipeline's scheduler; only its config is used.
        even: Whether images are drawn at σ = 1 - k/steps, as FLUX does, instead of at the
            scheduler's own levels.

    Attributes:
        kind: "epsilon", "v_prediction" or "flow".
        steps: Training time steps (1000).

    Raises:
        DataError: The scheduler's prediction type is none of these.
    """

    def __init__(self, scheduler: Any, even: bool = False) -> None:
        config = scheduler.config
        self.even = even
        self.config = config
        self.name = type(scheduler).__name__
        self.steps = int(config.num_train_timesteps)
        self.kind = "flow" if self.name.startswith("FlowMatch") else str(config.prediction_type)
        if self.kind not in ("epsilon", "v_prediction", "flow"):
            raise DataError(
                f"the pipeline's scheduler predicts {self.kind!r}; epsilon, v_prediction and flow "
                f"matching are accepted"
            )
        self._alphas: Tensor | None = None
        if self.kind != "flow":
            from diffusers import DDPMScheduler

            self._alphas = DDPMScheduler.from_config(config).alphas_cumprod.double()

    def times(self, draws: Draws) -> Tensor:
        """Draw time steps uniformly, [B]: int64 below `steps`, or float32 in [0, steps) of flow."""
        return draws.uniform() * self.steps if self.kind == "flow" else draws.integers(self.steps)

    def levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of image and noise at t, each [B, 1, 1, 1] in the dtype of `like`."""
        if self._alphas is None:
            sigma = (t.to(like.device, like.dtype) / self.steps).reshape(-1, 1, 1, 1)
            return 1.0 - sigma, sigma
        self._alphas = self._alphas.to(like.device)
        alpha = self._alphas[t.long().to(like.device)].reshape(-1, 1, 1, 1)
        return alpha.sqrt().to(like.dtype), (1.0 - alpha).sqrt().to(like.dtype)

    def add(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return latents [B, C, h, w] noised to time t [B]."""
        image, level = self.levels(t, clean)
        return image * clean + level * noise

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what a perfect model predicts at t, [B, C, h, w]."""
        if self.kind == "epsilon":
            return noise
        if self.kind == "flow":
            return noise - clean
        image, level = self.levels(t, clean)
        return image * noise - level * clean

    def snr_weight(self, t: Tensor, gamma: float) -> Tensor:
        """Return min(SNR, γ)/SNR of each example, [B]; velocities: over SNR + 1; flow: ones.

        Hang et al., Efficient Diffusion Training via Min-SNR Weighting, ICCV 2023, eq. 4.
        """
        if self._alphas is None:
            return torch.ones(len(t), device=t.device)
        alpha = self._alphas.to(t.device)[t.long()]
        snr = alpha / (1.0 - alpha)
        weight = snr.clamp(max=gamma) / (snr if self.kind == "epsilon" else snr + 1.0)
        return weight.float()

    def sampler(self, settings: Sampling, image_tokens: int = 0) -> Any:
        """Return a diffusers scheduler, set to the settings' steps.

        Args:
            settings: Sampler and steps.
            image_tokens: Tokens of an image, for flow models that shift time by resolution.

        Raises:
            ConfigError: A noise sampler was asked of a flow model.
        """
        import diffusers

        if self.kind == "flow" or settings.sampler == "checkpoint":
            if settings.sampler not in ("checkpoint", "ddim"):
                raise ConfigError(
                    f"sampler={settings.sampler}: a flow model has its own; say sampler=checkpoint"
                )
            made = getattr(diffusers, self.name).from_config(self.config)
            extra: dict[str, Any] = {"num_inference_steps": settings.steps}
            if self.even and not made.config.get("use_flow_sigmas"):
                extra = {"sigmas": [1.0 - k / settings.steps for k in range(settings.steps)]}
            if made.config.get("use_dynamic_shifting"):
                from diffusers.pipelines.flux.pipeline_flux import calculate_shift

                named = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
                extra["mu"] = calculate_shift(image_tokens, *(made.config[name] for name in named))
            made.set_timesteps(**extra)
            return made
        else:
            classes = {
                "ddim": "DDIMScheduler",
                "lms": "LMSDiscreteScheduler",
                "euler": "EulerDiscreteScheduler",
                "dpmsolver": "DPMSolverMultistepScheduler",
            }
            # Latents have no range; a config of another scheduler does not tell DDIM so.
            free = {"clip_sample": False} if settings.sampler == "ddim" else {}
            made = getattr(diffusers, classes[settings.sampler]).from_config(self.config, **free)
        made.set_timesteps(settings.steps)
        return made
