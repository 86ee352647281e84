"""The batched training transform against torchvision, example by example."""

import pytest
import torch
import torchvision.transforms.v2.functional as reference
from torch import Tensor

from mmforget.rng import Draws
from mmforget.vision import augment as own
from mmforget.vision.images import to_float

torch.set_num_threads(1)

COLOUR = (reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation)


def _images(count: int, height: int = 40, width: int = 40) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, 3, height, width), generator=rng, dtype=torch.uint8)


@pytest.mark.parametrize("shape", [(40, 40), (33, 48)])
def test_warp_equals_torchvision(shape: tuple[int, int]) -> None:
    image, chosen = _images(48, *shape), own.draw(Draws(3, "warp", total=48))
    assert 0 < chosen.flip.sum() < 48
    found = own.warp(image, chosen)
    for i in range(len(image)):
        one = reference.horizontal_flip(image[i]) if chosen.flip[i] else image[i]
        expected = reference.affine(
            one,
            angle=0.0,
            translate=[0, 0],
            scale=float(chosen.scale[i]),
            shear=[float(chosen.shear[i]), 0.0],
        )
        assert torch.equal(found[i], expected)


def test_jitter_equals_torchvision_in_every_order() -> None:
    image, chosen = to_float(_images(48)), own.draw(Draws(4, "jitter", total=48))
    assert len({tuple(row) for row in chosen.order.tolist()}) == 6
    found = own.jitter(image.clone(), chosen)
    for i in range(len(image)):
        expected = image[i]
        for kind in chosen.order[i].tolist():
            expected = COLOUR[kind](expected, float(chosen.factors[i, kind]))
        torch.testing.assert_close(found[i], expected, rtol=0, atol=2e-6)


def test_neutral_parameters_change_nothing() -> None:
    image = _images(3)
    neutral = own.Augmentation(
        flip=torch.zeros(3, dtype=torch.bool),
        shear=torch.zeros(3),
        scale=torch.ones(3),
        factors=torch.ones(3, 3),
        order=torch.arange(3).expand(3, 3),
    )
    assert torch.equal(own.warp(image, neutral), image)
    torch.testing.assert_close(own.augment(image, neutral), to_float(image), rtol=0, atol=1e-6)


def test_flip_alone_mirrors() -> None:
    image = _images(2)
    mirrored = own.Augmentation(
        torch.ones(2, dtype=torch.bool),
        torch.zeros(2),
        torch.ones(2),
        torch.ones(2, 3),
        torch.arange(3).expand(2, 3),
    )
    assert torch.equal(own.warp(image, mirrored), image.flip(-1))


def test_ranges_and_independence_of_the_batch_split() -> None:
    whole = own.draw(Draws(5, "x", total=400))
    assert whole.shear.abs().max() <= own.SHEAR and whole.shear.abs().max() > 0.9 * own.SHEAR
    assert 0.8 <= whole.scale.min() < 0.82 and 1.18 < whole.scale.max() <= 1.2
    assert whole.factors.min() >= 0.8 and whole.factors.max() <= 1.2
    part = own.draw(Draws(5, "x", total=400, rows=range(100, 200)))
    for one, other in zip(part, whole, strict=True):
        assert torch.equal(one, other[100:200])
