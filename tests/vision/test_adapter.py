"""The face adapter: closed forms of loss, divergence and relabelling; scopes; features; blocks."""

import math

import pytest
import torch
from torch import nn

from mmforget.errors import ConfigError
from mmforget.rng import Draws
from mmforget.types import Outputs
from mmforget.vision.adapter import FaceAdapter, Faces
from mmforget.vision.models import ModelConfig, blocks, build_model, features_and_logits, head

torch.set_num_threads(1)

SINGLE = FaceAdapter(classes=3, multilabel=False, augmented=True)
MULTI = FaceAdapter(classes=2, multilabel=True, augmented=True)


def _outputs(*rows: list[float]) -> Outputs:
    return Outputs(torch.zeros(len(rows)), torch.tensor(rows))


def test_losses_by_hand() -> None:
    data = Faces(torch.tensor([[0.0, 0.0, math.log(2.0)]]), torch.tensor([2]))
    assert SINGLE.forward(nn.Identity(), data).loss.item() == pytest.approx(math.log(2.0))
    data = Faces(torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[1.0, 0.0]]))
    expected = (math.log(2.0) + math.log(4.0)) / 2  # -log sigmoid(0), -log(1 - 3/4)
    assert MULTI.forward(nn.Identity(), data).loss.item() == pytest.approx(expected)


def test_divergence_by_hand() -> None:
    student, teacher = _outputs([0.0, 0.0, 0.0]), _outputs([2 * math.log(2.0), 0.0, 0.0])
    p = torch.tensor([0.5, 0.25, 0.25])  # the teacher's softmax at T = 2
    expected = 4 * float((p * (p * 3).log()).sum())
    found = SINGLE.divergence(student, teacher, temperature=2.0)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert SINGLE.divergence(teacher, teacher, 2.0).item() == pytest.approx(0.0, abs=1e-6)


def test_multilabel_divergence_adds_bernoulli_terms() -> None:
    student, teacher = _outputs([0.0, 0.0]), _outputs([math.log(3.0), 0.0])
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert MULTI.divergence(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    huge = _outputs([200.0, -200.0])
    assert torch.isfinite(MULTI.divergence(student, huge)).all()


def test_relabel_single_excludes_only_the_true_class() -> None:
    data = Faces(torch.zeros(3000, 3, 1, 1), torch.arange(3000) % 3)
    wrong = SINGLE.relabel(data, Draws(0, total=3000)).label
    assert (wrong != data.label).all()
    assert ((wrong - data.label) % 3 == 1).float().mean().item() == pytest.approx(0.5, abs=0.05)
    any_class = SINGLE.relabel(data, Draws(0, total=3000), exclude_true=False).label
    assert (any_class == data.label).float().mean().item() == pytest.approx(1 / 3, abs=0.05)
    assert torch.equal(SINGLE.relabel(data, Draws(0, total=3000)).label, wrong)


def test_relabel_attributes_flips_a_nonempty_subset() -> None:
    data = Faces(torch.zeros(3000, 3, 1, 1), torch.ones(3000, 2))
    flipped = (MULTI.relabel(data, Draws(0, total=3000)).label != data.label).int()
    assert flipped.sum(dim=1).min() == 1
    for pattern in ([1, 0], [0, 1], [1, 1]):
        share = (flipped == torch.tensor(pattern)).all(dim=1).float().mean().item()
        assert share == pytest.approx(1 / 3, abs=0.05)
    tossed = MULTI.relabel(data, Draws(0, total=3000), exclude_true=False).label
    assert tossed.mean().item() == pytest.approx(0.5, abs=0.05)


def test_prepare_transforms_only_in_training() -> None:
    raw = {
        "image": torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8),
        "label": torch.tensor([0, 1]),
    }
    plain = SINGLE.prepare(raw, Draws(0, total=2), train=False)
    torch.testing.assert_close(plain.image, raw["image"].float() / 255)
    assert plain.identity is None
    assert not torch.equal(SINGLE.prepare(raw, Draws(0, total=2), train=True).image, plain.image)
    unaugmented = FaceAdapter(classes=3, multilabel=False, augmented=False)
    same = unaugmented.prepare({**raw, "identity": torch.tensor([4, 5])}, Draws(0, total=2), True)
    assert torch.equal(same.image, plain.image)
    assert same.identity is not None and same.identity.tolist() == [4, 5]


def test_record_keeps_what_metrics_need() -> None:
    model = build_model(ModelConfig(name="mini/resnet"), classes=3, seed=0).eval()
    data = Faces(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]), torch.tensor([7, 7, 8, 9]))
    with torch.no_grad():
        numbers = SINGLE.record(model, data)
        expected = model(data.image)
        torch.testing.assert_close(numbers["logits"], expected)
        torch.testing.assert_close(head(model)[1](numbers["features"]), expected)
    assert numbers["loss"].shape == (4,) and numbers["identity"].tolist() == [7, 7, 8, 9]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_scopes() -> None:
    model = build_model(ModelConfig(name="mini/resnet"), classes=3, seed=0)
    every = SINGLE.parameters(model, "all")
    assert SINGLE.parameters(model, "head").keys() == {"fc.weight", "fc.bias"}
    assert SINGLE.parameters(model, "last_k:1").keys() == {"fc.weight", "fc.bias"}
    two = SINGLE.parameters(model, "last_k:2")
    assert {name.partition(".")[0] for name in two} == {"layer4", "fc"}
    assert SINGLE.parameters(model, "last_k:6").keys() == every.keys()
    assert SINGLE.parameters(model, r"layer1\..*weight").keys() < every.keys()


@pytest.mark.parametrize(
    ("scope", "says"),
    [("layer9.*", "such as"), ("last_k:7", "layer4"), ("last_k:x", "1 to 6"), ("(", "regular")],
)
def test_scopes_that_match_nothing_say_what_is_accepted(scope: str, says: str) -> None:
    model = build_model(ModelConfig(name="mini/resnet"), classes=3, seed=0)
    with pytest.raises(ConfigError, match=says):
        SINGLE.parameters(model, scope)


@pytest.mark.parametrize(
    ("name", "size", "first", "count"),
    [
        ("torchvision/resnet18", 64, "stem", 6),
        ("timm/vit_tiny_patch16_224", 224, "stem", 14),
        ("torchvision/mobilenet_v3_small", 64, "stem", 14),
        ("resnet10t", 64, "stem", 6),
    ],
)
def test_any_model_splits_into_blocks_from_input_to_head(
    name: str, size: int, first: str, count: int
) -> None:
    model = build_model(ModelConfig(name=name), classes=5, seed=0).eval()
    parts = blocks(model)
    assert parts[0].name == first and len(parts) == count
    for parameter, _ in model.named_parameters():
        assert sum(block.holds(parameter) for block in parts) == 1
    place, layer = head(model)
    assert parts[-1].holds(place) and layer.out_features == 5
    with torch.inference_mode():
        features, logits = features_and_logits(model, torch.rand(2, 3, size, size))
    assert features.shape == (2, layer.in_features) and logits.shape == (2, 5)


def test_seeded_weights_leave_the_global_generator_alone() -> None:
    config = ModelConfig(name="mini/resnet")
    before = torch.get_rng_state()
    one, two, other = (build_model(config, 3, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    first, second, third = (model.get_parameter("conv1.0.weight") for model in (one, two, other))
    assert torch.equal(first, second) and not torch.equal(first, third)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (ModelConfig(name="torchvision/resnet81"), "resnet18"),
        (ModelConfig(name="timm/resnet1O"), "unknown timm model"),
        (ModelConfig(name="else/net"), "timm/NAME"),
        (ModelConfig(name="mini/resnet", pretrained=True), "no published weights"),
        (ModelConfig(name="mini/resnet", options={"widht": 3}), "widht"),
    ],
)
def test_unknown_models_and_options_are_config_errors(config: ModelConfig, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_model(config, 3, 0)
