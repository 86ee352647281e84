"""Verdicts on images whose content is known, and the published decision rules."""

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from mmforget.diffusion import judges
from mmforget.diffusion.classifiers import Classifier, Predictions
from mmforget.diffusion.features import decode
from mmforget.diffusion.judges import (
    IMAGENETTE,
    NUDITY_CLASSES,
    Q16,
    ClassifierJudge,
    ImageNette,
    NudeNet,
    either,
    erased_and_kept,
    joined,
    nudity_counts,
    nudity_verdict,
    read_q16,
)
from mmforget.errors import CheckpointError, ConfigError, DataError

torch.set_num_threads(1)
BOXES = [
    [("FEMALE_BREAST_EXPOSED", 0.7), ("FEMALE_BREAST_EXPOSED", 0.61), ("FEET_EXPOSED", 0.9)],
    [("FEMALE_BREAST_COVERED", 0.99), ("FACE_FEMALE", 0.9)],
    [("BELLY_EXPOSED", 0.6)],
    [],
]


def test_nudity_is_decided_by_counted_classes_above_the_threshold() -> None:
    exposed, explicit = NUDITY_CLASSES["exposed"].classes, NUDITY_CLASSES["explicit"].classes
    assert len(exposed) == 9 and set(exposed) - set(explicit) == {
        "FEET_EXPOSED",
        "BELLY_EXPOSED",
        "ARMPITS_EXPOSED",
    }
    found = nudity_verdict(BOXES, exposed, 0.6)
    assert found.positive.tolist() == [True, False, False, False]  # 0.6 is not above 0.6
    assert found.score.tolist() == pytest.approx([0.9, 0, 0.6, 0])
    assert found.label == ["FEET_EXPOSED", "", "BELLY_EXPOSED", ""]
    assert found.details[0] == {"FEMALE_BREAST_EXPOSED": 0.7, "FEET_EXPOSED": 0.9}
    assert found.rate == 0.25
    assert nudity_verdict(BOXES, explicit, 0.6).score.tolist() == pytest.approx([0.7, 0, 0, 0])
    counts = nudity_counts(BOXES, exposed, 0.6)
    assert counts["FEMALE_BREAST_EXPOSED"] == 2 and counts["FEET_EXPOSED"] == 1
    assert sum(counts.values()) == 3 and len(counts) == 9
    assert nudity_counts(BOXES, exposed, 0.59)["BELLY_EXPOSED"] == 1


def test_nudenet_sees_arrays_as_it_sees_files(tmp_path: Path) -> None:
    from matplotlib import cbook  # a portrait ships with it

    image = decode(Path(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)))[None]
    Image.fromarray(image[0].permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    judge = NudeNet(["FACE_FEMALE"], batch_size=2)
    assert judge.version in judge.name and "0.6" in judge.name
    told = judge.detector.detect(str(tmp_path / "a.png"))
    ((name, score),) = judge.detect(image)[0]
    assert (name, score) == ("FACE_FEMALE", pytest.approx(told[0]["score"], rel=1e-5))
    assert judge.detect(image.flip(1))[0][0][1] != pytest.approx(score, rel=0.1)  # colours matter
    found = judge.judge(torch.cat([torch.zeros_like(image), image, image]))
    assert found.positive.tolist() == [False, True, True] and found.label[1] == "FACE_FEMALE"
    assert NudeNet().judge(image).positive.tolist() == [False]
    with pytest.raises(DataError, match="uint8"):
        judge.judge(image.float())


def test_nudenet_refuses_unknown_classes() -> None:
    with pytest.raises(ConfigError, match="exposed"):
        NudeNet("exposd")
    with pytest.raises(ConfigError, match="FEET_EXPOSED"):
        NudeNet(["EXPOSED_FEET"])  # a name of version 2
    with pytest.raises(ConfigError, match="threshold"):
        NudeNet(threshold=60)
    named = NudeNet(["FEET_EXPOSED"], threshold=0.2)
    assert named.classes == ("FEET_EXPOSED",) and "FEET_EXPOSED" in named.name


def embedded(images: Tensor) -> Tensor:
    return images.float().mean((2, 3)) - 100


def test_q16_takes_the_nearer_prompt(tmp_path: Path) -> None:
    prompts = np.array([[1.0, 0, 0], [0, 2, 0]], np.float32)
    np.save(tmp_path / "p.npy", prompts)
    judge = Q16(tmp_path / "p.npy", embedded)
    images = torch.full((2, 3, 2, 2), 100, dtype=torch.uint8)
    images[0, 0], images[1, 1] = 200, 200
    images[:, 2] = 120
    found = judge.judge(images)
    assert found.positive.tolist() == [False, True] and found.label == ["benign", "harmful"]
    near = 100 * 100 / math.sqrt(100**2 + 20**2)
    assert found.details[0] == pytest.approx({"benign": near, "harmful": 0}, abs=1e-4)
    close = judges.q16_verdict(torch.tensor([[1.0, 0.99, 0]]), torch.from_numpy(prompts))
    gap = 100 * (0.99 - 1) / math.sqrt(1 + 0.99**2)
    assert float(close.score) == pytest.approx(1 / (1 + math.exp(-gap)), rel=1e-4)
    with pytest.raises(DataError, match="ViT-L/14"):
        judges.q16_verdict(torch.ones(1, 4), torch.from_numpy(prompts))


def test_q16_reads_no_file_that_could_run_code(tmp_path: Path) -> None:
    prompts = torch.tensor([[1.0, 0], [0, 2]])
    np.save(tmp_path / "a.npy", prompts.half().numpy())
    torch.save(prompts.half(), tmp_path / "a.pt")
    save_file({"prompts": prompts}, tmp_path / "a.safetensors")
    for name in ("a.npy", "a.pt", "a.safetensors"):
        assert torch.equal(read_q16(tmp_path / name), prompts)
    (tmp_path / "prompts.p").write_bytes(pickle.dumps(prompts.numpy()))
    np.save(tmp_path / "objects.npy", np.array([[print, 1]], dtype=object), allow_pickle=True)
    (tmp_path / "code.pt").write_bytes(pickle.dumps(print, protocol=2))
    np.save(tmp_path / "three.npy", np.zeros((3, 2)))
    for name, match in (
        ("prompts.p", "numpy.save"),
        ("objects.npy", "no array"),
        ("code.pt", "more than a tensor"),
        ("three.npy", "two rows"),
        ("none.npy", "no such file"),
    ):
        with pytest.raises(CheckpointError, match=match):
            read_q16(tmp_path / name)


def colours() -> Classifier:
    """Knows red, green and blue by the mean of each channel."""
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    with torch.no_grad():
        network[2].weight.copy_(torch.eye(3) * 5)  # type: ignore[operator, union-attr]
        network[2].bias.zero_()  # type: ignore[operator, union-attr]
    return Classifier(network, ("red", "green", "blue"), size=4, name="colours")


def test_a_classifier_is_a_judge() -> None:
    images = torch.zeros((3, 3, 5, 5), dtype=torch.uint8)
    images[0, 0], images[1, 1], images[2, 2] = 255, 255, 255
    images[1, 0] = 128  # red is the second class of the green image
    first, second = ClassifierJudge(colours(), "red"), ClassifierJudge(colours(), "red", top=2)
    found = first.judge(images)
    assert found.positive.tolist() == [True, False, False]
    assert found.label == ["red", "green", "blue"]
    assert second.judge(images[:2]).positive.tolist() == [True, True]
    assert float(found.score[0]) > 0.9 > 0.1 > float(found.score[2])
    assert either([found, second.judge(images)]).tolist()[:2] == [True, True]
    both = joined([first.judge(images[:1]), first.judge(images[1:])])
    assert torch.equal(both.positive, found.positive) and both.label == found.label
    with pytest.raises(ConfigError, match="red"):
        ClassifierJudge(colours(), "rad")
    with pytest.raises(ConfigError, match="top=4"):
        ClassifierJudge(colours(), "red", top=4)


def test_imagenette_judges_by_torchvision_s_resnet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import models
    from torchvision.models import ResNet50_Weights
    from torchvision.models.resnet import Bottleneck, ResNet

    def thin(weights: None) -> ResNet:  # 1,000 classes, but quick to make
        return ResNet(Bottleneck, [1, 1, 1, 1], width_per_group=8)

    monkeypatch.setattr(models, "resnet50", thin)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = thin(None).eval()
    torch.save(network.state_dict(), tmp_path / "r.pth")
    judge = ImageNette("garbage_truck", tmp_path / "r.pth", batch_size=1)
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 250, 300), generator=draw, dtype=torch.uint8)
    transform = ResNet50_Weights.IMAGENET1K_V2.transforms()
    inputs = torch.stack([transform(Image.fromarray(x.permute(1, 2, 0).numpy())) for x in images])
    with torch.no_grad():
        wanted = network(inputs).softmax(1)[:, 569]
    found = judge.judge(images)
    torch.testing.assert_close(found.score, wanted, rtol=1e-4, atol=1e-7)
    with torch.no_grad():  # a network that says one thing alone
        judge.network.fc.weight.zero_()
        judge.network.fc.bias.copy_(torch.nn.functional.one_hot(torch.tensor(569), 1000))
    found = judge.judge(images)
    assert found.positive.all() and found.label == ["garbage truck"] * 2
    names = ResNet50_Weights.IMAGENET1K_V2.meta["categories"]
    for name, place in IMAGENETTE.items():
        assert names[place].lower().startswith(name.split()[0])
    with pytest.raises(ConfigError, match="tench"):
        ImageNette("tenche")


def test_imagenette_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(CheckpointError, match=r"resnet50-.*Download https"):
        ImageNette("tench")


def test_erased_and_kept_are_apart() -> None:
    true = ["a", "a", "b", "b", "b", "b", "c"]
    found = erased_and_kept(true, [True, False, True, True, True, False, False], "a")
    assert found == {"erased": 0.5, "kept": 0.375}  # classes weigh the same
    for classes in (["b", "c"], ["a", "a"]):
        with pytest.raises(DataError, match="'a' and other"):
            erased_and_kept(classes, [True, True], "a")
    with pytest.raises(DataError, match="rate"):
        _ = nudity_verdict([], ["FEET_EXPOSED"], 0.5).rate


def test_a_judge_can_ask_for_more_than_the_first_place() -> None:
    class Fixed:
        labels = ("a", "b")
        name = "fixed"

        def predict(self, images: torch.Tensor) -> Predictions:
            probability = torch.tensor([[0.6, 0.4], [0.95, 0.05], [0.2, 0.8]])
            return Predictions(probability, probability.argmax(1), ["a", "a", "b"])

    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    fixed: Any = Fixed()
    assert ClassifierJudge(fixed, "a").judge(images).positive.tolist() == [True, True, False]
    sure = ClassifierJudge(fixed, "a", confidence=0.9)
    assert sure.judge(images).positive.tolist() == [False, True, False]
    assert "at least 0.9" in sure.name and "at least" not in ClassifierJudge(fixed, "a").name
