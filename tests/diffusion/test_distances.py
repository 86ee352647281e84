"""FID, KID and CMMD against closed forms and double loops; the extractors' flavours."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.models.inception as inception
from PIL import Image
from scipy import linalg
from torch import Tensor, nn
from torch.nn import functional

from mmforget.diffusion import distances, features
from mmforget.diffusion.classifiers import Classifier
from mmforget.diffusion.distances import Moments, cmmd, convention, fid, frechet, kid
from mmforget.diffusion.features import (
    CanvasInception,
    ClassifierFeatures,
    FidInception,
    checked,
    decode,
    extract,
    image_batches,
    resized,
)
from mmforget.errors import CheckpointError, DataError

torch.set_num_threads(1)


def rows(n: int, width: int, seed: int = 0, shift: float = 0.0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=draw, dtype=torch.float64)
    return torch.randn(n, width, generator=draw, dtype=torch.float64) @ mix + shift


def moments(values: Tensor, *sizes: int) -> Moments:
    found = Moments()
    for part in values.split(list(sizes) or [len(values)]):
        found.update(part)
    return found


def test_streamed_moments_are_numpy_s() -> None:
    values = rows(50, 6, shift=1e4)  # a mean far from 0 must not cost digits
    found = moments(values, 1, 20, 0, 29)
    np.testing.assert_allclose(found.mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(values.T), rtol=1e-9)
    both = moments(values[:13]).merge(moments(values[13:])).merge(Moments())
    np.testing.assert_allclose(both.covariance, np.cov(values.T), rtol=1e-9)
    assert both.n == found.n == 50


def test_fid_of_gaussians_in_one_dimension() -> None:
    def at(mean: float, std: float) -> tuple[Tensor, Tensor]:
        return torch.tensor([mean]), torch.tensor([[std**2]])

    assert frechet(*at(1, 2), *at(4, 7)) == pytest.approx((1 - 4) ** 2 + (2 - 7) ** 2)


def test_fid_agrees_with_the_matrix_root() -> None:
    a, b = rows(40, 5, 1), rows(60, 5, 2, shift=0.5)
    root = linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    wanted = (a.mean(0) - b.mean(0)).square().sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert fid(moments(a), moments(b)) == pytest.approx(float(wanted), rel=1e-9)
    assert fid(moments(b), moments(a)) == pytest.approx(float(wanted), rel=1e-9)
    shuffled = a[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    assert fid(moments(shuffled), moments(b)) == pytest.approx(float(wanted), rel=1e-9)


@pytest.mark.parametrize("n", [2, 10, 300])
def test_fid_of_equal_sets_is_zero_also_with_fewer_images_than_features(n: int) -> None:
    a = rows(n, 64)
    scale = float(moments(a).covariance.trace())
    assert fid(moments(a), moments(a.flip(0))) <= 1e-10 * scale
    # Equal covariances and a shift: the shift's square is all.
    shifted = fid(moments(a), moments(a + 0.25))
    assert shifted == pytest.approx(64 * 0.25**2, abs=1e-8 * scale)


def test_fid_of_few_images_agrees_with_the_nuclear_norm() -> None:
    a, b = rows(7, 30, 1), rows(9, 30, 2)
    ca, cb = a - a.mean(0), b - b.mean(0)
    cross = np.linalg.norm((ca @ cb.T).numpy(), "nuc") / math.sqrt(6 * 8)
    wanted = (a.mean(0) - b.mean(0)).square().sum() + ca.square().sum() / 6 + cb.square().sum() / 8
    assert fid(moments(a), moments(b)) == pytest.approx(float(wanted) - 2 * cross, rel=1e-9)


def loops(a: Tensor, b: Tensor) -> float:
    def k(x: Tensor, y: Tensor) -> float:
        return (float(x @ y) / len(x) + 1) ** 3

    def inner(s: Tensor) -> float:
        pairs = [k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j]
        return sum(pairs) / len(pairs)

    return inner(a) + inner(b) - 2 * sum(k(x, y) for x in a for y in b) / (len(a) * len(b))


def test_kid_agrees_with_a_double_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = rows(11, 4, 1), rows(8, 4, 2)
    wanted = loops(a, b)
    for block in (2048, 3):
        monkeypatch.setattr(distances, "BLOCK", block)
        assert kid(a, b).value == pytest.approx(wanted, rel=1e-10)
        assert kid(b, a.flip(0)).value == pytest.approx(wanted, rel=1e-10)
    assert math.isnan(kid(a, b).std)
    # A subset as large as the set is the set; smaller ones are decided by the seed alone.
    whole = kid(a[:8], b, subsets=3, subset_size=8)
    assert whole.value == pytest.approx(loops(a[:8], b)) and whole.std == pytest.approx(0, abs=1e-9)
    part = kid(a, b, subsets=4, subset_size=5, seed=1)
    assert part == kid(a, b, subsets=4, subset_size=5, seed=1) and part.std > 0
    assert part != kid(a, b, subsets=4, subset_size=5, seed=2)


def test_kid_of_one_distribution_is_about_zero() -> None:
    draws = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    same = kid(draws[:2000], draws[2000:]).value
    far = kid(draws[:2000], draws[2000:] + 1).value
    assert abs(same) < 0.02 < 1 < far


def test_cmmd_agrees_with_a_double_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = rows(6, 5, 1), rows(9, 5, 2)

    def mean(x: Tensor, y: Tensor) -> float:
        return float(np.mean([[math.exp(-float((u - v) @ (u - v)) / 200) for v in y] for u in x]))

    def wanted(x: Tensor, y: Tensor) -> float:
        return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))

    unit = [functional.normalize(x, dim=1) for x in (a, b)]
    for block in (2048, 4):
        monkeypatch.setattr(distances, "BLOCK", block)
        assert cmmd(a, b, normalise=False) == pytest.approx(wanted(a, b), rel=1e-9)
        assert cmmd(a, b) == pytest.approx(wanted(*unit), rel=1e-9)
        assert cmmd(b, a) == pytest.approx(wanted(*unit), rel=1e-9)
    assert cmmd(a, a.flip(0)) == pytest.approx(0, abs=1e-10)
    assert cmmd(a * 3, b) == pytest.approx(cmmd(a, b))


def test_bad_features_are_refused() -> None:
    good = rows(5, 3)
    for bad, match in (
        (good * math.nan, "not finite"),
        (good[0], r"\[N, D\]"),
        (good[:, :2], "wide"),
        (good[:1], "images"),
    ):
        with pytest.raises(DataError, match=match):
            kid(good, bad)
    with pytest.raises(DataError, match="5 and 5 images; needed are 1000"):
        kid(good, good, subsets=2)
    with pytest.raises(DataError, match="no images"):
        fid(Moments(), moments(good))
    with pytest.raises(DataError, match="2 images or more"):
        fid(moments(good[:1]), moments(good))
    with pytest.raises(DataError, match="wide"):
        moments(good).update(good[:, :2])
    with pytest.raises(DataError, match="not finite"):
        Moments().update(good / 0)


# --- images and extractors


def pictures(n: int, size: tuple[int, int] = (20, 30), seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, *size), generator=draw, dtype=torch.uint8)


def test_images_must_be_uint8() -> None:
    for bad, match in (
        (torch.full((1, 3, 4, 4), math.nan), "not finite"),
        (torch.zeros(1, 3, 4, 4), "uint8"),
        (pictures(1)[0], r"\[B, 3, H, W\]"),
        (pictures(1)[:, :1], r"\[B, 3, H, W\]"),
    ):
        with pytest.raises(DataError, match=match):
            checked(bad)


def test_images_are_read_in_order_and_grouped_by_size(tmp_path: Path) -> None:
    images = [*pictures(3), *pictures(2, (8, 8), 1), *pictures(1, seed=2)]
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    batches = list(image_batches([tmp_path / f"{i}.png" for i in range(6)], batch_size=2))
    assert [len(batch) for batch in batches] == [2, 1, 1, 1, 1]
    read = [image for batch in batches for image in batch]
    assert all(torch.equal(a, b) for a, b in zip(images, read, strict=True))
    assert torch.equal(decode((tmp_path / "4.png").read_bytes()), images[4])
    (tmp_path / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0\.png"):
        list(image_batches([tmp_path / "0.png"]))
    assert list(image_batches([])) == []


def test_resizing_is_pillow_s_as_transforms_do_it() -> None:
    from torchvision import transforms

    images = pictures(2, (45, 70))
    for size in (32, (24, 24), (90, 91)):
        for mode, flag in (
            ("bilinear", transforms.InterpolationMode.BILINEAR),
            ("bicubic", transforms.InterpolationMode.BICUBIC),
        ):
            resize = transforms.Resize(size, interpolation=flag)
            found = resized(images, size, mode)
            for image, small in zip(images, found, strict=True):
                wanted = np.asarray(resize(Image.fromarray(image.permute(1, 2, 0).numpy())))
                assert np.array_equal(small.permute(1, 2, 0), wanted)
    cut = features.centre_crop(images, (32, 41))
    wanted = transforms.CenterCrop((32, 41))(images)
    assert torch.equal(cut, wanted)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random Inception weights whose features differ, for both flavours."""
    folder = tmp_path_factory.mktemp("weights")
    for name, classes, aux in (("canvas", 1000, True), ("fid", 1008, False)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = inception.inception_v3(
                weights=None, num_classes=classes, aux_logits=aux, init_weights=False
            )
        torch.save(network.state_dict(), folder / f"{name}.pth")
    return folder


def test_the_canvas_flavour_normalises_twice_and_does_not_antialias(weights: Path) -> None:
    import cv2

    extractor = CanvasInception(weights / "canvas.pth")
    images = pictures(1, (400, 500))
    found = extractor(images)
    assert found.shape == (1, 2048) and found.dtype == torch.float32
    scaled = images[0].permute(1, 2, 0).numpy().astype(np.float32) / 255
    small = torch.from_numpy(cv2.resize(scaled, (299, 299))).permute(2, 0, 1)[None] * 2 - 1
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    # torchvision's transform_input expects [-1, 1] and turns it into ImageNet's scale.
    ready = (small * 0.5 + 0.5 - mean[:, None, None]) / std[:, None, None]
    kept: list[Tensor] = []
    handle = extractor.network.Mixed_7c.register_forward_hook(lambda _, i, out: kept.append(out))
    extractor.network.transform_input = False
    with torch.no_grad():
        extractor.network(ready)
    extractor.network.transform_input = True
    handle.remove()
    torch.testing.assert_close(found, kept[0].mean((2, 3)), rtol=1e-3, atol=1e-4)


def test_the_pytorch_fid_flavour_pools_as_the_network_of_2015(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pictures(1, (60, 50))
    found = FidInception(weights / "fid.pth")(images)
    plain: Any = inception.inception_v3(
        weights=None, num_classes=1008, aux_logits=False, init_weights=False
    )
    plain.load_state_dict(torch.load(weights / "fid.pth"))
    plain.eval()
    average, last = functional.avg_pool2d, [False]

    def pool(x: Tensor, **options: Any) -> Tensor:
        if last[0]:
            return functional.max_pool2d(x, **options)
        return average(x, **options, count_include_pad=False)

    monkeypatch.setattr(inception.F, "avg_pool2d", pool)
    kept: list[Tensor] = []
    plain.Mixed_7c.register_forward_pre_hook(lambda *_: last.__setitem__(0, True))
    plain.Mixed_7c.register_forward_hook(lambda _, i, out: kept.append(out))
    plain.Mixed_7c.register_forward_hook(lambda *_: last.__setitem__(0, False))
    small = functional.interpolate(images / 255, (299, 299), mode="bilinear", align_corners=False)
    with torch.no_grad():
        plain(small * 2 - 1)
    torch.testing.assert_close(found, kept[0].mean((2, 3)), rtol=1e-4, atol=1e-5)


def test_missing_weights_say_what_to_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(CheckpointError, match=r"checkpoints/inception_v3_google.*Download https"):
        CanvasInception()
    with pytest.raises(CheckpointError, match="pt_inception"):
        FidInception()
    with pytest.raises(CheckpointError, match=r"here\.pth"):
        CanvasInception(tmp_path / "here.pth")


def test_classifier_features_are_the_input_of_the_head() -> None:
    network = nn.Sequential(
        nn.AvgPool2d(4), nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 3)
    )
    classifier = Classifier(network, ("a", "b", "c"), size=8, name="mini", batch_size=2)
    extractor = ClassifierFeatures(classifier)
    images = pictures(5)
    found = extract(extractor, [images[:2], images[2:]])
    with torch.no_grad():
        wanted = network[:4](classifier.prepared(images))
    torch.testing.assert_close(found, wanted)
    text = convention("fid", extractor.name, 5, 6)
    assert "mini" in text and "N-1" in text and "5 and 6 images" in text
    with pytest.raises(DataError, match="no images"):
        extract(extractor, [])
