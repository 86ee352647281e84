"""Scores of drawn images: CLIP score and accuracy, LPIPS, and the concepts near a target."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mmforget.checkpoint import read_state
from mmforget.diffusion.features import cached_weights, checked, resized
from mmforget.errors import CheckpointError, ConfigError, DataError, MissingDependencyError, unknown

# Published tables hold all of them under the name "CLIP score".
CLIP_SCORES: Mapping[str, str] = {
    "cosine": "mean cosine of image and prompt (AdvUnlearn's leaderboard, about 0.31)",
    "torchmetrics": "max(100·mean cosine, 0) (torchmetrics; its default is ViT-L/14)",
    "clamped": "mean of 100·max(cosine, 0)",
    "clipscore": "mean of 2.5·max(cosine, 0) (Hessel et al. 2021, on ViT-B/32)",
}
LPIPS_WEIGHTS = {
    "alex": "AlexNet_Weights",
    "vgg": "VGG16_Weights",
    "squeeze": "SqueezeNet1_1_Weights",
}


def cosines(images: Tensor, texts: Tensor) -> Tensor:
    """Return the cosine of each image and its text.

    Args:
        images: Embeddings [N, D].
        texts: Embeddings [N, D], or [1, D] for one text of all images.

    Returns:
        [N], in [-1, 1].

    Raises:
        DataError: The shapes do not pair up, or values are not finite.
    """
    pairs = images.ndim == texts.ndim == 2 and len(texts) in (1, len(images))
    if not pairs or images.shape[1] != texts.shape[1]:
        raise DataError(
            f"embeddings of images {list(images.shape)} and of texts {list(texts.shape)} do not "
            f"pair up: give one text for each image, or one for all"
        )
    found = functional.cosine_similarity(images, texts.to(images), dim=1)
    if not bool(torch.isfinite(found).all()):
        raise DataError("embeddings hold values that are not finite")
    return found


def clip_scores(cosine: Tensor, convention: str = "torchmetrics") -> Tensor:
    """Return the score of each image; `torchmetrics` is clamped in the mean alone.

    Args:
        cosine: [N].
        convention: One of `CLIP_SCORES`.

    Raises:
        ConfigError: No such convention.
    """
    if convention not in CLIP_SCORES:
        raise ConfigError(unknown("CLIP score", convention, CLIP_SCORES, "scores.CLIP_SCORES"))
    if convention == "cosine":
        return cosine
    if convention == "torchmetrics":
        return 100 * cosine
    return cosine.clamp(min=0) * (100 if convention == "clamped" else 2.5)


def clip_score(cosine: Tensor, convention: str = "torchmetrics") -> float:
    """Return the CLIP score of a set of images.

    Args:
        cosine: [N]; see `cosines`.
        convention: One of `CLIP_SCORES`; print its text, and the CLIP's name, with the score.

    Raises:
        DataError: There are no images.
        ConfigError: No such convention.
    """
    if not len(cosine):
        raise DataError("a CLIP score needs images")
    mean = float(clip_scores(cosine, convention).double().mean())
    return max(mean, 0.0) if convention == "torchmetrics" else mean


def clip_accuracy(images: Tensor, target: Tensor, anchor: Tensor) -> float:
    """Return the share of images nearer to the erased text than to the anchor's; down is better.

    Kumari et al., ICCV 2023 (CA), section 4; also SPM.

    Args:
        images: Embeddings [N, D].
        target: Of the prompts with the erased concept, [N, D] or [1, D].
        anchor: Of the prompts with what should take its place, [N, D] or [1, D].
    """
    if not len(images):
        raise DataError("a CLIP accuracy needs images")
    return float((cosines(images, target) > cosines(images, anchor)).double().mean())


class Neighbour(NamedTuple):
    """A concept near another.

    Attributes:
        text: It.
        cosine: Cosine of the text embeddings, in [-1, 1].
    """

    text: str
    cosine: float


def nearest(
    texts: Sequence[str], target: str, encode: Callable[[Sequence[str]], Tensor], k: int
) -> list[Neighbour]:
    """Return the k texts nearest to a target, nearest first: whom erasing it may damage.

    Args:
        texts: Candidates; the target itself and repeated texts are left out.
        target: The erased concept.
        encode: Text embeddings [N, D] of N texts, such as `OpenClip.texts`.
        k: How many; equal cosines stay in the order of `texts`.

    Raises:
        DataError: There are fewer candidates.
    """
    unique = [text for text in dict.fromkeys(texts) if text != target]
    if not 0 < k <= len(unique):
        raise DataError(f"k={k} neighbours of {len(unique)} different candidates")
    embedded = encode([target, *unique])
    found = cosines(embedded[1:], embedded[:1])
    order = found.argsort(descending=True, stable=True)[:k].tolist()
    return [Neighbour(unique[place], float(found[place])) for place in order]


class Lpips:
    """Perceptual distance of image pairs (Zhang et al., CVPR 2018), version 0.1.

    Images are first resized to `size` x `size` pixels (antialiased bilinear). Papers on erasing
    compare the original's and the edited model's image of one prompt and seed, AlexNet, 64 pixels.

    Args:
        net: "alex", "vgg" or "squeeze".
        weights: File of the backbone's ImageNet weights, as torchvision publishes them; None: the
            one in torch's cache. The heads ship with the package.
        size: Side in pixels; None leaves images as they are.
        random_backbone: Take a backbone of random weights: for tests alone, means nothing.
        device: Where it runs.

    Raises:
        ConfigError: No such network.
        MissingDependencyError: lpips is not installed.
        CheckpointError: The backbone's weights are not there, or do not fit.
    """

    def __init__(
        self,
        net: str = "alex",
        weights: str | Path | None = None,
        size: int | None = 64,
        random_backbone: bool = False,
        device: str | torch.device = "cpu",
    ) -> None:
        if net not in LPIPS_WEIGHTS:
            raise ConfigError(unknown("LPIPS network", net, LPIPS_WEIGHTS, "scores.Lpips"))
        try:
            import lpips
        except ImportError as error:
            raise MissingDependencyError("lpips", "diffusion") from error
        path = None if random_backbone else _backbone(net, weights)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torchvision")  # of the package's old calls
            # The package would download the backbone's weights if it was to load them itself.
            self.network: Any = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        if path is not None:
            _fill(self.network.net, path)
        self.network.eval().requires_grad_(False).to(device)
        self.size, self.device = size, device
        source = "RANDOM backbone" if path is None else path.name
        self.name = f"LPIPS 0.1, {net} ({source}), {size or 'full'} pixels"

    @torch.no_grad()
    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the distance of each pair of images uint8 [B, 3, H, W], float32 [B], at least 0.

        Raises:
            DataError: They are no such images, or do not pair up.
        """
        ready = []
        for images in (first, second):
            small = checked(images)
            if self.size is not None:
                small = resized(small, (self.size, self.size))
            ready.append(small.to(self.device).float().div_(127.5).sub_(1))
        if ready[0].shape != ready[1].shape:
            raise DataError(f"LPIPS compares pairs: {list(first.shape)} and {list(second.shape)}")
        found: Tensor = self.network(ready[0], ready[1])
        return found.flatten().cpu()


def lpips_summary(erased: Tensor, kept: Tensor) -> dict[str, float]:
    """Return `LPIPS_e` (up), `LPIPS_u` (down) and `H` = their difference (up).

    Args:
        erased: Distances of the original's and the edited model's images of erased concepts, [N].
        kept: The same of other concepts, [M].
    """
    if not len(erased) or not len(kept):
        raise DataError("LPIPS_e and LPIPS_u need images of erased and of other concepts")
    e, u = float(erased.double().mean()), float(kept.double().mean())
    return {"LPIPS_e": e, "LPIPS_u": u, "H": e - u}


def _backbone(net: str, weights: str | Path | None) -> Path:
    from torchvision import models

    url = getattr(models, LPIPS_WEIGHTS[net]).IMAGENET1K_V1.url
    return cached_weights(url, weights, f"LPIPS's backbone {net}")


def _fill(backbone: Any, path: Path) -> None:
    """Copy torchvision's weights `features.3.weight` into lpips's `slice2.3.weight`."""
    state, wanted = read_state(path), backbone.state_dict()
    names = {name: f"features.{name.partition('.')[2]}" for name in wanted}
    wrong = [
        theirs
        for ours, theirs in names.items()
        if theirs not in state or state[theirs].shape != wanted[ours].shape
    ]
    if wrong:
        raise CheckpointError(f"{path} does not fit the backbone: {', '.join(wrong[:4])}")
    with torch.no_grad():
        for ours, theirs in names.items():
            wanted[ours].copy_(state[theirs])
