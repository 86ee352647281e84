"""What loss methods may ask of a text-to-image model."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmforget.diffusion import scopes
from mmforget.diffusion.models import DiffusionModel
from mmforget.diffusion.noise import Noising
from mmforget.rng import Draws
from mmforget.types import Outputs, Splits, frozen_copy, full


class Noised(NamedTuple):
    """A prepared batch: images in latent space, noised ONCE for every model that sees them.

    Attributes:
        latents: x_t, [B, C, h, w].
        target: What a perfect model predicts, [B, C, h, w].
        t: Time steps [B].
        clean: x_0, [B, C, h, w].
        noise: The noise, [B, C, h, w].
        prompts: Captions.
        anchors: The caption with the anchor in the concept's place.
        weight: Weight of each example's loss, [B].
        relabelled: Whether the target is the model's own prediction for the anchor prompt.
    """

    latents: Tensor
    target: Tensor
    t: Tensor
    clean: Tensor
    noise: Tensor
    prompts: tuple[str, ...]
    anchors: tuple[str, ...]
    weight: Tensor
    relabelled: bool = False


class DiffusionAdapter:
    """`types.Adapter` for text-to-image models.

    Args:
        noising: The pipeline's noising.
        scale: Maps codec latents to the model's scale: `DiffusionModel.scale_latents`.
        caption_dropout: Share of training captions replaced by the empty prompt, so that the
            model learns the unconditional prediction of classifier-free guidance.
        snr_gamma: γ of min-SNR weights in training; None weighs all times alike.
    """

    random = True  # times and noise

    def __init__(
        self,
        noising: Noising,
        scale: Any,
        caption_dropout: float = 0.0,
        snr_gamma: float | None = None,
    ) -> None:
        self.noising = noising
        self.scale = scale
        self.caption_dropout = caption_dropout
        self.snr_gamma = snr_gamma

    def prepare(self, raw: Mapping[str, Any], draws: Draws, train: bool) -> Noised:
        """Sample latents, times and noise; pick one of each image's captions (evaluation: first).

        Args:
            raw: `moments` [B, 2C, h, w] (mean and log-variance of the codec), `captions` and
                `anchors`: for each image its texts, official one first.
            draws: Source of all of it.
            train: Whether captions are drawn, and dropped.
        """
        moments = raw["moments"].to(draws.device)
        mean, logvar = moments.float().chunk(2, dim=1)
        shape = tuple(mean.shape[1:])
        deviation = torch.exp(0.5 * logvar.clamp(-30.0, 20.0))
        clean = self.scale(mean + deviation * draws.normal(*shape))
        noise, t = draws.normal(*shape), self.noising.times(draws)
        chosen, dropped = draws.uniform().tolist(), draws.uniform().tolist()
        prompts, anchors = [], []
        for k, (texts, others) in enumerate(zip(raw["captions"], raw["anchors"], strict=True)):
            index = int(chosen[k] * len(texts)) if train else 0
            drop = train and dropped[k] < self.caption_dropout
            prompts.append("" if drop else texts[index])
            anchors.append("" if drop or not others else others[min(index, len(others) - 1)])
        weight = torch.ones(len(clean), device=clean.device)
        if train and self.snr_gamma is not None:
            weight = self.noising.snr_weight(t, self.snr_gamma)
        return Noised(
            self.noising.add(clean, noise, t),
            self.noising.target(clean, noise, t),
            t,
            clean,
            noise,
            tuple(prompts),
            tuple(anchors),
            weight,
        )

    def units(self, data: Noised) -> Tensor:
        """Return C·h·w for each image, [B]."""
        return torch.full((len(data.latents),), float(data.latents[0].numel())).to(data.t.device)

    def forward(self, model: nn.Module, data: Noised) -> Outputs:
        """Return the squared error summed over latents, [B], and the prediction [B, C, h, w].

        After `relabel` the target is the model's own prediction for the anchor prompt, without
        gradients (Fan et al., SalUn, arXiv 2310.12508, eq. 9).
        """
        assert isinstance(model, DiffusionModel)
        target = data.target
        if data.relabelled:
            with torch.no_grad():
                target = full(model.predict(data.latents, data.t, model.encode(data.anchors)))
        pred = full(model.predict(data.latents, data.t, model.encode(data.prompts)))
        error = (pred - target).square().flatten(1).sum(dim=1)
        return Outputs(error * data.weight, pred)

    def divergence(self, student: Outputs, teacher: Outputs, temperature: float = 1.0) -> Tensor:
        """Return the squared distance of two predictions, summed, [B]; no temperature here."""
        return (student.pred - teacher.pred).square().flatten(1).sum(dim=1)

    def relabel(self, data: Noised, draws: Draws, exclude_true: bool = True) -> Noised:
        """Return the batch with the anchor's prediction as its target.

        The anchor is fixed by the request: nothing is drawn, and it is never the true caption.
        """
        return data._replace(relabelled=True)

    def frozen(self, model: nn.Module, trainable: Mapping[str, nn.Parameter]) -> nn.Module:
        """Return a copy."""
        return frozen_copy(model)

    def shards(self, model: nn.Module) -> Sequence[nn.Module] | None:
        """Return None: methods reach into the denoiser's and the text encoders' layers."""
        return None

    def parameters(self, model: nn.Module, scope: str) -> dict[str, nn.Parameter]:
        """Return the parameters of a scope; see `scopes.parameters`."""
        assert isinstance(model, DiffusionModel)
        return scopes.parameters(model, scope)

    def apply_request(self, model: nn.Module, splits: Splits) -> None:
        """Do nothing: a pipeline holds no data besides its weights."""
        return None

    def record(self, model: nn.Module, data: Noised) -> dict[str, Tensor]:
        """Return the mean squared error of each image at its drawn time, [B]."""
        assert isinstance(model, DiffusionModel)
        pred = full(model.predict(data.latents, data.t, model.encode(data.prompts)))
        return {"loss": (pred - data.target).square().flatten(1).mean(dim=1)}
