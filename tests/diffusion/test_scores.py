"""CLIP scores in their conventions, neighbours, LPIPS, and the classifiers' preprocessing."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mmforget.diffusion.canvas import OBJECTS, THEMES
from mmforget.diffusion.classifiers import Classifier, ClassifierConfig, load_classifier
from mmforget.diffusion.features import OpenClip
from mmforget.diffusion.scores import (
    Lpips,
    clip_accuracy,
    clip_score,
    clip_scores,
    cosines,
    lpips_summary,
    nearest,
)
from mmforget.errors import CheckpointError, ConfigError, DataError

torch.set_num_threads(1)
TINY = "vit_tiny_patch16_224.augreg_in21k"


def pictures(n: int, size: tuple[int, int] = (40, 50), seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, *size), generator=draw, dtype=torch.uint8)


def test_conventions_of_the_clip_score_differ() -> None:
    cosine = torch.tensor([0.5, -0.1, 0.2])
    assert clip_score(cosine, "cosine") == pytest.approx(0.2)
    assert clip_score(cosine) == clip_score(cosine, "torchmetrics") == pytest.approx(20)
    assert clip_score(cosine, "clamped") == pytest.approx(70 / 3)
    assert clip_score(cosine, "clipscore") == pytest.approx(2.5 * 0.7 / 3)
    assert clip_score(-cosine, "torchmetrics") == 0
    assert clip_score(-cosine, "cosine") == pytest.approx(-0.2)
    assert clip_scores(cosine, "clipscore").tolist() == pytest.approx([1.25, 0, 0.5])
    with pytest.raises(ConfigError, match="torchmetrics"):
        clip_score(cosine, "torchmetric")
    with pytest.raises(DataError, match="images"):
        clip_score(cosine[:0])


def test_cosines_pair_images_with_texts() -> None:
    images = torch.tensor([[3.0, 0], [0, 2], [1, 1]])
    texts = torch.tensor([[1.0, 0], [1, 0], [-5, -5]])
    assert cosines(images, texts).tolist() == pytest.approx([1, 0, -1])
    assert cosines(images, texts[:1]).tolist() == pytest.approx([1, 0, math.sqrt(0.5)])
    target, anchor = texts[:1], torch.tensor([[0.0, 1]])
    assert clip_accuracy(images, target, anchor) == pytest.approx(1 / 3)  # a tie is not nearer
    for bad in (texts[:2], texts[:, :1], texts[0]):
        with pytest.raises(DataError, match="pair up"):
            cosines(images, bad)
    with pytest.raises(DataError, match="finite"):
        cosines(images * math.nan, texts)


def test_neighbours_are_the_nearest_texts() -> None:
    angles = {"dog": 0.0, "wolf": 0.1, "cat": 0.5, "car": 2.0, "puppy": -0.05, "tie": 0.5}

    def encode(texts: Sequence[str]) -> Tensor:
        return torch.tensor([[math.cos(angles[t]), math.sin(angles[t])] for t in texts]) * 3

    found = nearest(["car", "cat", "dog", "wolf", "puppy", "wolf", "tie"], "dog", encode, 4)
    assert [text for text, _ in found] == ["puppy", "wolf", "cat", "tie"]
    assert found[1].cosine == pytest.approx(math.cos(0.1))
    with pytest.raises(DataError, match=r"k=2 .* 1"):
        nearest(["dog", "cat"], "dog", encode, 2)


@pytest.fixture(scope="module")
def lpips() -> Lpips:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Lpips("squeeze", random_backbone=True)


def test_lpips_is_a_distance_of_pairs(lpips: Lpips) -> None:
    a, b = pictures(3), pictures(3, seed=1)
    assert torch.equal(lpips(a, a), torch.zeros(3))
    found = lpips(a, b)
    assert found.shape == (3,) and bool((found > 0).all())
    torch.testing.assert_close(lpips(b, a), found)
    torch.testing.assert_close(lpips(a[1:2], b[1:2]), found[1:2])
    # Images are resized, so a picture and its smaller copy are near each other.
    assert "RANDOM" in lpips.name and "64" in lpips.name
    with pytest.raises(DataError, match="pairs"):
        lpips(a, b[:2])
    with pytest.raises(DataError, match="uint8"):
        lpips(a.float(), b)


def test_lpips_agrees_with_the_package_on_given_weights(tmp_path: Path) -> None:
    import lpips as package
    from torchvision.models import squeezenet1_1

    with torch.random.fork_rng():
        torch.manual_seed(3)
        backbone = squeezenet1_1(weights=None)
    torch.save(backbone.state_dict(), tmp_path / "net.pth")
    ours = Lpips("squeeze", weights=tmp_path / "net.pth", size=None)
    theirs: Any = package.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    for name, value in theirs.net.state_dict().items():
        value.copy_(backbone.features.state_dict()[name.partition(".")[2]])
    a, b = pictures(2, (64, 64)), pictures(2, (64, 64), 1)
    with torch.no_grad():
        wanted = theirs(a / 255, b / 255, normalize=True).flatten()
    torch.testing.assert_close(ours(a, b), wanted, rtol=1e-4, atol=1e-6)
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="does not fit"):
        Lpips("squeeze", weights=tmp_path / "bad.pth")


def test_lpips_without_its_backbone_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for net, name in (("alex", "alexnet"), ("vgg", "vgg16"), ("squeeze", "squeezenet1_1")):
        with pytest.raises(CheckpointError, match=f"{name}.*Download https"):
            Lpips(net)
    with pytest.raises(ConfigError, match="alex"):
        Lpips("alexnet")


def test_lpips_summary_is_a_difference() -> None:
    found = lpips_summary(torch.tensor([0.4, 0.6]), torch.tensor([0.1]))
    assert found == pytest.approx({"LPIPS_e": 0.5, "LPIPS_u": 0.1, "H": 0.4})
    with pytest.raises(DataError, match="LPIPS_u"):
        lpips_summary(torch.tensor([0.4]), torch.tensor([]))


# --- classifiers


def published(folder: Path, classes: int) -> tuple[Path, nn.Module]:
    """A checkpoint as UnlearnCanvas saves them, of a small network."""
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model(TINY, pretrained=False, num_classes=0)
        network.head = nn.Linear(192, classes)
    path = folder / f"style{classes}.pth"
    torch.save({"model_state_dict": network.state_dict(), "epoch": 3}, path)
    return path, network.eval()


def test_a_published_checkpoint_predicts_as_the_published_script(tmp_path: Path) -> None:
    from torchvision import transforms

    path, network = published(tmp_path, 51)
    classifier = load_classifier(
        ClassifierConfig(checkpoint=str(path), arch=TINY, batch_size=2), THEMES
    )
    images = pictures(3, (300, 200))
    found = classifier.predict(images)
    ready = transforms.Compose(
        [
            transforms.Resize((224, 224)),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    inputs = torch.stack([ready(Image.fromarray(x.permute(1, 2, 0).numpy())) for x in images])
    torch.testing.assert_close(classifier.prepared(images), inputs)
    with torch.no_grad():
        logits = network(inputs)
    torch.testing.assert_close(found.probability, logits.softmax(1), rtol=1e-4, atol=1e-6)
    assert found.index.tolist() == logits.argmax(1).tolist()
    assert found.label == [THEMES[i] for i in found.index.tolist()]
    with torch.no_grad():
        wanted = network.forward_head(network.forward_features(inputs), pre_logits=True)  # type: ignore[operator]
    torch.testing.assert_close(classifier.features(images), wanted, rtol=1e-4, atol=1e-5)
    assert classifier.predict(images[:0]).label == []


def test_a_head_of_another_width_names_both(tmp_path: Path) -> None:
    path, _ = published(tmp_path, 51)
    with pytest.raises(CheckpointError, match=r"head.*51.*20"):
        load_classifier(ClassifierConfig(checkpoint=str(path), arch=TINY), OBJECTS)
    with pytest.raises(ConfigError, match="vit_tiny"):
        load_classifier(ClassifierConfig(checkpoint=str(path), arch="vit_tiny_patch16_22"), THEMES)
    with pytest.raises(ConfigError, match="precision"):
        load_classifier(ClassifierConfig(str(path), TINY, precision="int4"), THEMES)


def test_precision_and_bad_images() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    classifier = Classifier(network, ("a", "b"), size=2, name="mini", precision="bf16")
    assert classifier.prepared(pictures(1)).dtype == torch.bfloat16
    found = classifier.predict(pictures(4))
    assert found.probability.dtype == torch.float32
    np.testing.assert_allclose(found.probability.sum(1), 1, rtol=1e-6)
    with pytest.raises(DataError, match="not finite"):
        classifier.predict(torch.full((1, 3, 8, 8), math.nan))


# --- open_clip


def test_open_clip_embeds_as_its_own_pipeline(tmp_path: Path) -> None:
    import open_clip

    shape = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 1,
        },
    }
    (tmp_path / "mini-clip.json").write_text(json.dumps(shape))
    open_clip.add_model_config(tmp_path / "mini-clip.json")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference = open_clip.create_model("mini-clip", force_quick_gelu=True).eval()
    torch.save(reference.state_dict(), tmp_path / "clip.pt")
    encoder = OpenClip("mini-clip", tmp_path / "clip.pt")
    assert "mini-clip" in encoder.name and "quick GELU" in encoder.name
    preprocess: Any = open_clip.image_transform(32, is_train=False)
    images = pictures(3, (40, 55))
    inputs = torch.stack([preprocess(Image.fromarray(x.permute(1, 2, 0).numpy())) for x in images])
    with torch.no_grad():
        wanted = reference.encode_image(inputs, normalize=True)  # type: ignore[operator]
        texts = reference.encode_text(open_clip.tokenize(["a dog", "x"]), normalize=True)  # type: ignore[operator]
    torch.testing.assert_close(encoder(images), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.texts(["a dog", "x"]), texts, rtol=1e-4, atol=1e-5)
    other = OpenClip("mini-clip", tmp_path / "clip.pt", quick_gelu=False)
    assert not torch.allclose(other(images), wanted, atol=1e-4) and "quick" not in other.name
    with pytest.raises(ConfigError, match="no model"):
        OpenClip("mini-clop", tmp_path / "clip.pt")
    with pytest.raises(CheckpointError, match="no such file"):
        OpenClip("mini-clip", tmp_path / "x.pt")
