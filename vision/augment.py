"""The published MUFAC and MUCAC training transform, for a whole batch at once on any device.

RandomHorizontalFlip, RandomAffine(0, shear=10, scale=(0.8, 1.2)), ColorJitter(0.2, 0.2, 0.2) and
ToTensor of github.com/ndb796/MachineUnlearning, with torchvision's semantics. Every example has
its own parameters, from `Draws`.

Flip and affine are one gather of bytes. Each of brightness, contrast and saturation is
y = clamp(M x + o) in the three colours of a pixel, with M [3, 3] and o of that example alone: so
three batched products apply the three in every example's own order, without a loop.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmforget.rng import Draws

SHEAR = 10.0  # degrees, along x
SCALE = 0.2
JITTER = 0.2
GREY = (0.2989, 0.587, 0.114)  # torchvision's rgb_to_grayscale
BRIGHTNESS, CONTRAST, SATURATION = range(3)
PIECE = 16  # images transformed together on a CPU


class Augmentation(NamedTuple):
    """Parameters of each example of a batch.

    Attributes:
        flip: [B] bool, mirrored left to right.
        shear: [B] degrees along x.
        scale: [B], above 1 enlarges.
        factors: [B, 3] of brightness, contrast, saturation; 1 changes nothing.
        order: [B, 3] int64, the colour operations in the order they are applied.
    """

    flip: Tensor
    shear: Tensor
    scale: Tensor
    factors: Tensor
    order: Tensor


def draw(draws: Draws) -> Augmentation:
    """Return random parameters of the published transform."""
    return Augmentation(
        flip=draws.uniform() < 0.5,
        shear=draws.uniform(low=-SHEAR, high=SHEAR),
        scale=draws.uniform(low=1 - SCALE, high=1 + SCALE),
        factors=draws.uniform(3, low=1 - JITTER, high=1 + JITTER),
        order=draws.uniform(3).argsort(dim=1),
    )


def augment(image: Tensor, chosen: Augmentation) -> Tensor:
    """Return uint8 images [B, 3, H, W], transformed, as float32 in [0, 1].

    On a CPU a few images at a time: they stay in the cache between the steps, and the memory that
    every step works in is the same, where fresh memory would cost more than the arithmetic.
    """
    result = torch.empty(image.shape, device=image.device)
    size = PIECE if image.device.type == "cpu" else max(1, len(image))
    work = torch.empty((min(size, len(image)), *image.shape[1:]), device=image.device)
    for start in range(0, len(image), size):
        rows = slice(start, start + size)
        part = Augmentation(*(values[rows] for values in chosen))
        warped = warp(image[rows], part)
        pixels = torch.mul(warped, 1.0 / 255.0, out=work[: len(warped)])
        _jitter(pixels, result[rows], part)
    return result


def warp(image: Tensor, chosen: Augmentation) -> Tensor:
    """Mirror, shear and scale about the centre: nearest pixel, black outside, dtype kept.

    A source row depends on the target row alone, because nothing is rotated and y is not sheared:
    y = v / s and x = (u + v tan(shear)) / s, in pixels from the centre.
    """
    height, width = image.shape[-2:]
    u = _centred(width, image.device)
    v = _centred(height, image.device)
    inverse = (1.0 / chosen.scale)[:, None]
    slant = torch.tan(chosen.shear * (math.pi / 180))[:, None]
    # Indices into an image with a black rim: whole numbers below 2^24, exact in float32, which
    # is computed several times faster than int64.
    y = (v * inverse).add_((height - 1) / 2).round_().clamp_(-1, height)  # [B, H]
    begin = (v * slant * inverse)[:, :, None]
    x = torch.add(begin, (u * inverse)[:, None, :])  # [B, H, W]
    x.add_((width - 1) / 2).round_().clamp_(-1, width)
    mirror = torch.where(chosen.flip, -1.0, 1.0)[:, None, None]
    first = torch.where(chosen.flip, width, 1.0)[:, None]  # the column that x = 0 is read from
    x.mul_(mirror).add_((first + (y + 1) * (width + 2))[:, :, None])
    source = x.long().flatten(1)[:, None]
    rimmed = pad(image, (1, 1, 1, 1)).flatten(2)
    return rimmed.gather(2, source.expand(-1, rimmed.shape[1], -1)).view(image.shape)


def jitter(image: Tensor, chosen: Augmentation) -> Tensor:
    """Change brightness, contrast and saturation of float images in [0, 1]; changes its argument.

    Brightness f: f x. Contrast f: f x + (1 - f) mean of the grey image. Saturation f:
    f x + (1 - f) grey(x). Each is clamped to [0, 1], as in torchvision's ColorJitter.
    """
    result = torch.empty_like(image)
    _jitter(image, result, chosen)
    return result


def _jitter(image: Tensor, result: Tensor, chosen: Augmentation) -> None:
    """Write the jittered images to `result`, going to and fro between the two."""
    grey = torch.tensor(GREY, device=image.device)
    eye = torch.eye(3, device=image.device)
    factor = chosen.factors.gather(1, chosen.order)[:, :, None, None]  # [B, turn, 1, 1]
    rest = 1 - factor
    matrix = factor * eye + ((chosen.order == SATURATION)[:, :, None, None] * rest) * grey
    share = ((chosen.order == CONTRAST)[:, :, None, None] * rest) * grey[:, None]  # of the mean
    x, spare = image.flatten(2), result.flatten(2)
    for turn in range(3):
        offset = x.mean(dim=2)[:, None] @ share[:, turn]  # [B, 1, 1]
        torch.bmm(matrix[:, turn], x, out=spare).add_(offset).clamp_(0, 1)
        x, spare = spare, x  # after the third and last turn, x is the result


def _centred(size: int, device: torch.device) -> Tensor:
    """Return pixel centres measured from the middle of a side, such as -1.5, -0.5, 0.5, 1.5."""
    return torch.arange(size, dtype=torch.float32, device=device) - (size - 1) / 2
