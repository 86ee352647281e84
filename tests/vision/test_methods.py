"""Vision-only methods on a small world of faces: contract, and forgetting towards the retrained."""

import copy
import os
import subprocess
import sys
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from mmforget.context import Context
from mmforget.engine import Engine, Runtime
from mmforget.errors import ConfigError
from mmforget.registry import METHODS
from mmforget.rng import Draws, generator
from mmforget.schema import instantiate
from mmforget.testing.contract import (
    Case,
    check_accumulation,
    check_metadata,
    check_moves,
    check_resume,
    check_same,
    check_scope,
    check_terms,
    check_zero_rate,
    run_case,
)
from mmforget.testing.toys import ToyData, ToyWorld
from mmforget.training import fit
from mmforget.types import Splits, Subset, Training
from mmforget.vision.adapter import FaceAdapter, Faces
from mmforget.vision.methods import per_example
from mmforget.vision.methods.boundary_expand import widened
from mmforget.vision.methods.boundary_shrink import neighbours, predicted
from mmforget.vision.methods.fisher import FisherConfig, deviation, measure, variance
from mmforget.vision.methods.ssd import importances
from mmforget.vision.methods.unsir import UNSIR, UNSIRConfig

torch.set_num_threads(1)

CLASSES = 3
PEOPLE, IMAGES, FORGOTTEN, UNSEEN = 30, 6, 6, 6
SIDE = 8


class SmallNet(nn.Module):
    """Four blocks with batch norm: stem, layer1, layer2, fc."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.layer1 = nn.Sequential(
            nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True)
        )
        self.layer2 = nn.Sequential(
            nn.Conv2d(12, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        )
        self.fc = nn.Linear(64, outputs)

    def forward(self, image: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.stem(image)))
        return self.fc(x.flatten(1))


@cache
def faces(multilabel: bool = False) -> ToyWorld:
    """People with a pattern each and labels drawn at random: only a person's images teach them."""
    rng = generator(0, "faces")
    count = PEOPLE * IMAGES
    pattern = torch.rand(PEOPLE, 3, SIDE, SIDE, generator=rng).repeat_interleave(IMAGES, 0)
    image = pattern + 0.15 * torch.randn(count, 3, SIDE, SIDE, generator=rng)
    if multilabel:
        label = torch.randint(2, (PEOPLE, CLASSES), generator=rng).float()
    else:
        label = torch.randint(CLASSES, (PEOPLE,), generator=rng)
    data = ToyData(
        "face",
        {
            "image": (image.clamp(0, 1) * 255).to(torch.uint8),
            "label": label.repeat_interleave(IMAGES, 0),
        },
    )
    person = [i // IMAGES for i in range(count)]
    kept = range(FORGOTTEN, PEOPLE - UNSEEN)
    rows = {
        "forget": [i for i in range(count) if person[i] < FORGOTTEN],
        "retain": [i for i in range(count) if person[i] in kept and i % IMAGES],
        "test": [i for i in range(count) if person[i] in kept and not i % IMAGES],
        "holdout": [i for i in range(count) if person[i] >= PEOPLE - UNSEEN],
    }
    train = Subset(data, rows["forget"] + rows["retain"])

    def build(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return SmallNet(CLASSES)

    splits = {name: Subset(data, chosen) for name, chosen in rows.items()}
    adapter = FaceAdapter(CLASSES, multilabel, augmented=False)
    return ToyWorld("faces", adapter, Splits(train=train, **splits), build)


def engine() -> Engine:
    return Engine(Runtime(device="cpu", progress=False))


@cache
def trained(split: str, multilabel: bool = False) -> nn.Module:
    """Return a model trained on `train` (the original) or on `retain` (the reference)."""
    world = faces(multilabel)
    recipe = Training(epochs=8, lr=0.03, momentum=0.9, batch_size=32, norm="train")
    data = world.splits.get(split)
    return fit(engine(), world.build(1), world.adapter, data, recipe, seed=1)


def context(name: str, model: nn.Module, multilabel: bool = False) -> Context:
    world = faces(multilabel)
    return Context(
        engine=engine(),
        adapter=world.adapter,
        model=copy.deepcopy(model),
        splits=world.splits,
        reads=METHODS.get(name).reads,
        label=name,
        seed=0,
        fresh_model=world.build,
    )


def unlearn(
    name: str, multilabel: bool = False, start: nn.Module | None = None, **settings: Any
) -> nn.Module:
    cls = METHODS.get(name)
    method = cls(instantiate(cls.config_type, settings, "method"))
    start = start or trained("train", multilabel)
    return method.run(context(name, start, multilabel)).eval()


def numbers(model: nn.Module, split: str, multilabel: bool = False) -> dict[str, Any]:
    world = faces(multilabel)
    return engine().predict(model, world.adapter, world.splits.get(split), seed=0)


def loss(model: nn.Module, split: str, multilabel: bool = False) -> float:
    return float(numbers(model, split, multilabel)["loss"].mean())


def accuracy(model: nn.Module, split: str) -> float:
    found = numbers(model, split)
    return float((found["logits"].argmax(1) == found["label"]).mean())


PLAIN: dict[str, Any] = {"epochs": 2, "lr": 0.05, "batch_size": 12, "momentum": 0.9}
MUAC_NOISE = {"noise_steps": 5, "noise_lr": 0.01, "batch_size": 12}
LOSS_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "cf_k": ("vision/cf_k", {**PLAIN, "k": 2}),
    "cf_k_headless": ("vision/cf_k", {**PLAIN, "k": 1, "reference": True}),
    "eu_k": ("vision/eu_k", {**PLAIN, "k": 2, "norm": "frozen"}),
    "unsir": ("vision/unsir", {**PLAIN, "noise_steps": 3}),
    "unsir_reference": ("vision/unsir", {**PLAIN, "noise_steps": 3, "reference": True}),
    "unsir_class": ("vision/unsir", {**PLAIN, "variant": "class", "noise_steps": 3}),
    "boundary_shrink": ("vision/boundary_shrink", PLAIN),
    "boundary_expand": ("vision/boundary_expand", PLAIN),
    # Wrappers see the weights of the wider head, which exist after set-up only.
    "salun": ("salun", {"inner": {"name": "vision/boundary_expand", **PLAIN}}),
    "sam": ("sam", {"rho": 0.01, "inner": {"name": "vision/cf_k", "k": 2, **PLAIN}}),
}


@pytest.mark.parametrize("key", LOSS_METHODS)
def test_contract(key, tmp_path):
    name, settings = LOSS_METHODS[key]
    case = Case(name, settings, faces(), partial=key in ("cf_k_headless", "salun"))
    check_metadata(case)
    first = run_case(case)
    check_moves(case, first)
    check_same(run_case(case).model, first.model, f"{key}: a second run of one seed")
    if "_k" not in key and key != "sam":  # these derive their scope from k
        check_scope(case)
    if key != "eu_k":  # a learning rate of 0 leaves its fresh blocks
        check_zero_rate(case)
    check_accumulation(case, first)
    check_terms(case)
    check_resume(case, first, tmp_path)


SLOW_PUSH = {"batch_size": 12, "epochs": 5, "momentum": 0.0}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("cf_k", {"k": 3, "lr": 0.1, "weight_decay": 1e-2, "batch_size": 16}),
        ("eu_k", {"k": 3, "epochs": 15, "lr": 0.05, "batch_size": 32}),
        ("unsir", {"epochs": 5, "lr": 0.01, "noise_weight": 5.0, "batch_size": 12}),
        ("unsir", {"epochs": 6, "repair_epochs": 2, "lr": 0.02, "reference": True, **MUAC_NOISE}),
        ("boundary_shrink", {"lr": 3e-4, **SLOW_PUSH}),
        ("boundary_expand", {"lr": 3e-4, **SLOW_PUSH}),
        ("fisher", {"alpha": 1e-5}),
        ("fisher", {"alpha": 3e-5, "reference": True}),
        ("influence", {"alpha": 3.0}),
        ("influence", {"alpha": 3.0, "reference": True}),
        ("ssd", {"alpha": 2.0, "importance_batch_size": 8}),
        ("ssd", {"alpha": 1.2, "importance": "lfssd", "importance_batch_size": 8}),
    ],
)
def test_forgets_towards_the_retrained(name, settings):
    original, reference = trained("train"), trained("retain")
    result = unlearn(f"vision/{name}", **settings)
    start, goal, found = (loss(model, "forget") for model in (original, reference, result))
    assert goal > start + 1, "the world is no test: the retrained model knows the forget set"
    assert found > start + 0.02 * (goal - start)
    assert abs(found - goal) < goal - start
    assert accuracy(result, "test") > accuracy(original, "test") - 0.2


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("cf_k", {"epochs": 1}),
        ("eu_k", {"epochs": 1}),
        ("unsir", {"epochs": 2, "noise_steps": 2}),
        ("boundary_shrink", {"epochs": 1}),
        ("fisher", {"alpha": 1e-5}),
        ("fisher", {"form": "simple"}),
        ("fisher", {"reference": True}),
        ("influence", {}),
        ("influence", {"reference": True}),
        ("ssd", {"alpha": 1.0}),
        ("ssd", {"alpha": 1.0, "importance": "lfssd"}),
    ],
)
def test_attributes(name, settings):
    result = unlearn(f"vision/{name}", multilabel=True, **settings)
    before = trained("train", multilabel=True).state_dict()
    state = result.state_dict()
    assert all(torch.isfinite(value).all() for value in state.values())
    assert any(not torch.equal(value, before[key]) for key, value in state.items())


@pytest.mark.parametrize(
    ("name", "settings"), [("boundary_expand", {}), ("unsir", {"variant": "class"})]
)
def test_methods_of_classes_refuse_attributes(name, settings):
    with pytest.raises(ConfigError, match="attributes"):
        unlearn(f"vision/{name}", multilabel=True, **settings)


# Batches that leave fewer rows than processes, and samples that end inside a batch, among them.
SPLIT_OVER_PROCESSES: list[tuple[str, dict[str, Any]]] = [
    ("cf_k", {"k": 2, "epochs": 1, "batch_size": 13}),
    ("unsir", {"noise_steps": 2, "batch_size": 5}),
    ("unsir", {"noise_steps": 2, "batch_size": 5, "variant": "class"}),
    ("boundary_shrink", {"epochs": 1, "batch_size": 5}),
    ("boundary_expand", {"epochs": 1, "batch_size": 5}),
    ("fisher", {"batch_size": 13}),
    ("fisher", {"batch_size": 7, "reference": True}),
    ("fisher", {"batch_size": 1, "form": "simple"}),
    ("influence", {"batch_size": 13, "samples": 20}),
    ("influence", {"batch_size": 13, "samples": 20, "reference": True}),
    ("ssd", {"alpha": 1.0, "importance_batch_size": 5}),
]


def write_results(folder: Path) -> int:
    """Run every case from the weights in `folder`; return the number of processes."""
    start = faces().build(0)
    start.load_state_dict(torch.load(folder / "start.pt", weights_only=True))
    for index, (name, settings) in enumerate(SPLIT_OVER_PROCESSES):
        result = unlearn(f"vision/{name}", start=start, **settings)
        if engine().is_main:
            torch.save(result.state_dict(), folder / f"{index}.pt")
    return engine().world


@pytest.mark.slow  # three imports of torch
def test_two_processes_give_the_weights_of_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        torch.save(trained("train").state_dict(), folder / "start.pt")
    write_results(one)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    done = subprocess.run(
        [sys.executable, *launch, str(two)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert (two / "processes").read_text() == "2"
    for index, case in enumerate(SPLIT_OVER_PROCESSES):
        single = torch.load(one / f"{index}.pt", weights_only=True)
        double = torch.load(two / f"{index}.pt", weights_only=True)
        for name, value in single.items():
            assert torch.allclose(value.float(), double[name].float(), atol=1e-5), (case, name)


# The last blocks.


def test_cf_k_leaves_statistics_of_other_blocks():
    before, after = trained("train").state_dict(), unlearn("vision/cf_k", k=2, norm="train")
    changed = {k for k, v in after.state_dict().items() if not torch.equal(v, before[k])}
    assert {name.partition(".")[0] for name in changed} == {"layer2", "fc"}
    assert "layer2.1.running_mean" in changed


@pytest.mark.parametrize("reference", [False, True])
def test_eu_k_starts_afresh(reference):
    k = 1 if reference else 2
    result = unlearn("vision/eu_k", k=k, reference=reference, epochs=0).state_dict()
    fresh, before = faces().build(0).state_dict(), trained("train").state_dict()
    new = ("layer2.",) if reference else ("layer2.", "fc.")
    for name, value in result.items():
        assert torch.equal(value, (fresh if name.startswith(new) else before)[name]), name
    assert not torch.equal(fresh["layer2.1.running_mean"], before["layer2.1.running_mean"])


@pytest.mark.parametrize("name", ["vision/cf_k", "vision/eu_k"])
def test_last_blocks_keep_the_head_if_asked(name):
    result = unlearn(name, k=1, reference=True, epochs=2).state_dict()
    before = trained("train").state_dict()
    changed = {key for key, value in result.items() if not torch.equal(value, before[key])}
    assert {key.partition(".")[0] for key in changed} == {"layer2"}


def test_last_blocks_name_what_is_wrong():
    with pytest.raises(ConfigError, match=r"method\.k"):
        unlearn("vision/cf_k", scope="head")
    with pytest.raises(ConfigError, match="stem, layer1, layer2, fc"):
        unlearn("vision/cf_k", k=9)


# Boundary methods.


def test_widened_head():
    layer = nn.Linear(5, 3)
    state = torch.get_rng_state()
    wide = widened(layer, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(wide.weight[:3], layer.weight) and torch.equal(wide.bias[:3], layer.bias)
    assert wide.weight.shape == (4, 5) and float(wide.weight[3].detach().abs().max()) <= 5**-0.5
    assert torch.equal(widened(layer, seed=3).weight, wide.weight)
    assert widened(nn.Linear(5, 3, bias=False), seed=0).bias is None


def test_boundary_expand_keeps_the_architecture():
    result = unlearn("vision/boundary_expand", epochs=1, lr=1e-3)
    assert isinstance(result.fc, nn.Linear) and result.fc.out_features == CLASSES
    assert not torch.equal(result.fc.weight, trained("train").fc.weight)


def test_neighbours_of_attributes():
    """A linear model: the step is the sign of (σ(z) - y)·w, and labels are the signs of logits."""
    weight = torch.tensor([[1.0, -1.0, 2.0], [0.5, 1.0, -1.0]])
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 2, bias=False)).requires_grad_(False)
    model[1].weight.copy_(weight)
    image = torch.tensor([[0.5, 0.95, 0.02]]).view(1, 3, 1, 1)
    label = torch.tensor([[1.0, 0.0]])
    data = Faces(image, label)
    logits = image.flatten(1) @ weight.T
    step = ((logits.sigmoid() - label) @ weight).sign()
    expected = (image.flatten(1) + 0.1 * step).clamp(0, 1)
    adapter = FaceAdapter(2, multilabel=True, augmented=False)
    near = neighbours(adapter, model, data, 0.1)
    assert torch.allclose(near.image.flatten(1), expected, atol=0.5 / 255 + 1e-6)
    assert torch.equal(predicted(adapter, model, near), (expected @ weight.T > 0).float())


# Fisher, influence and dampening against plain loops.


def one_by_one(model: nn.Module, split: str, count: int, multilabel: bool = False) -> Any:
    """Yield losses and logits of single examples, with their graph."""
    world = faces(multilabel)
    for i in range(count):
        raw = world.splits.get(split).take([i])
        data = world.adapter.prepare(raw, Draws(0, total=1), train=False)
        yield world.adapter.forward(model, data)


def gradient(value: Tensor, model: nn.Module) -> Tensor:
    found = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
    return torch.cat([part.reshape(-1) for part in found])


def flat(named: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.reshape(-1) for value in named.values()])


class Branching(SmallNet):
    """The same model, its forward pass deciding by a value: vmap cannot follow."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image if float(image.detach().sum()) >= 0 else -image)


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("kind", ["vectorised", "chunked", "one by one"])
def test_fisher_is_the_expectation_over_labels(kind, multilabel, monkeypatch, caplog):
    model = copy.deepcopy(trained("train", multilabel))
    if kind == "chunked":
        monkeypatch.setattr(per_example, "HELD", 7 * 5 * sum(p.numel() for p in model.parameters()))
    elif kind == "one by one":
        model.__class__ = Branching
    ctx = context("vision/fisher", model, multilabel)
    ctx.model.requires_grad_(True)
    found = measure(ctx, ctx.scope("all"), FisherConfig(batch_size=17))
    assert ("one example at a time" in caplog.text) == (kind == "one by one")

    count = len(faces(multilabel).splits.retain)
    expected = torch.zeros(len(flat(found)))
    for outputs in one_by_one(ctx.model, "retain", count, multilabel):
        if multilabel:
            p = outputs.pred[0].sigmoid()
            for a in range(CLASSES):  # E_y (∂ log p_y)² of one attribute is p(1 - p)(∂z)²
                z = gradient(outputs.pred[0, a], ctx.model)
                expected += (p[a] * (1 - p[a])).detach() * z.square() / count
        else:
            log_p = outputs.pred[0].log_softmax(0)
            for y in range(CLASSES):
                g = gradient(log_p[y], ctx.model)
                expected += log_p[y].detach().exp() * g.square() / count
    assert torch.allclose(flat(found), expected, rtol=1e-3, atol=1e-4 * float(expected.max()))


def test_fisher_noise():
    alpha_zero = unlearn("vision/fisher", alpha=0.0)
    check_same(alpha_zero, trained("train"), "alpha = 0")
    check_same(unlearn("vision/fisher", alpha=0.0, form="simple"), trained("train"), "alpha = 0")
    again = unlearn("vision/fisher", alpha=1e-5)
    check_same(unlearn("vision/fisher", alpha=1e-5), again, "the same seed")

    information = torch.tensor([[1.0, 3.0], [0.0, 1e9]])
    expected = torch.tensor([[2 / 3, 2 / 3], [500.0, 500.0]]) * 1e-6
    assert torch.allclose(variance(information, 1e-6, is_head=False), expected)
    head = torch.tensor([[2 / 3, 2 / 3], [50.0, 50.0]]) * 1e-5
    assert torch.allclose(variance(information, 1e-6, is_head=True), head)
    assert torch.allclose(
        variance(information[0], 1e-6, is_head=False), information[0] ** -1 * 1e-5
    )
    simple = FisherConfig(alpha=1e-6, form="simple")
    found = deviation(torch.tensor([0.0, 1.0, 1e4]), simple, is_head=False)
    assert torch.allclose(found, torch.tensor([1e-3, 1e-3, 1e-5]))


@pytest.mark.parametrize("samples", [7, 1000])
def test_influence_is_the_published_recursion(samples):
    """The recursion over whole vectors, written out, against the one over two numbers a sample."""
    alpha = 2.0
    model = copy.deepcopy(trained("train")).requires_grad_(True)
    splits = faces().splits
    n_f, n_r = len(splits.forget), len(splits.retain)
    forget, retain = (
        torch.stack([gradient(out.loss[0], model) for out in one_by_one(model, name, count)])
        for name, count in (("forget", n_f), ("retain", n_r))
    )
    v = (forget.mean(0) - retain.mean(0)) * n_f / (n_f + n_r)
    k, o = v.clone(), retain[0].clone()
    for s in retain[1 : samples + 2]:
        t = o @ s
        k -= (k @ s) / (samples + t) * o
        o -= t / (samples + t) * o
    settings = {"alpha": alpha, "samples": samples, "batch_size": 4}
    result = unlearn("vision/influence", reference=True, **settings)
    start = flat(dict(trained("train").named_parameters()))
    moved = (flat(dict(result.named_parameters())) - start) / alpha
    assert torch.allclose(moved, k, rtol=1e-3, atol=1e-4 * float(k.abs().max()))

    used = retain[: samples + 2].double()
    gram = used @ used.T + samples * torch.eye(len(used), dtype=torch.float64)
    exact = v - (used.T @ torch.linalg.solve(gram, used @ v.double())).float()
    result = unlearn("vision/influence", iterations=50, **settings)
    moved = (flat(dict(result.named_parameters())) - start) / alpha
    assert torch.allclose(moved, exact, rtol=1e-2, atol=1e-3 * float(exact.abs().max()))


def test_influence_of_no_length_changes_nothing():
    check_same(unlearn("vision/influence", alpha=0.0), trained("train"), "alpha = 0")


@pytest.mark.parametrize("importance", ["ssd", "lfssd"])
def test_dampening_at_its_ends(importance):
    start = trained("train")
    same = unlearn("vision/ssd", alpha=float("inf"), importance=importance)
    check_same(same, start, "alpha = infinity")
    gone = unlearn("vision/ssd", alpha=0.0, dampening=0.0, importance=importance)
    ctx = context("vision/ssd", start)
    ctx.model.eval()
    weights = list(ctx.scope("all").values())
    forget = importances(ctx, "forget", weights, 64, importance)
    for before, after, i_f in zip(start.parameters(), gone.parameters(), forget, strict=True):
        assert torch.equal(after, torch.where(i_f > 0, 0.0, before))


def test_dampening_without_labels():
    ctx = context("vision/ssd", trained("train"))
    ctx.model.eval()
    weights = list(ctx.scope("all").values())
    found = importances(ctx, "forget", weights, 8, "lfssd")
    values = faces().splits.forget.dataset.values
    kept, values["label"] = values["label"], (values["label"] + 1) % CLASSES
    try:
        relabelled = importances(ctx, "forget", weights, 8, "lfssd")
    finally:
        values["label"] = kept
    assert all(torch.equal(a, b) for a, b in zip(found, relabelled, strict=True))


# UNSIR.


@pytest.mark.parametrize("reference", [False, True])
def test_output_noise_is_fitted_towards_or_away(reference):
    """Fitted noise is nearer to the forget outputs than its start, or in the reference farther."""
    ctx = context("vision/unsir", trained("train"))
    batch = next(ctx.batches("forget", 12))
    wanted = ctx.forward(batch, ctx.model).pred

    def distance(steps: int) -> float:
        method = UNSIR(UNSIRConfig(noise_steps=steps, noise_lr=0.01, reference=reference))
        noise = method.output_noise(ctx, batch)
        assert float(noise.min()) >= 0 and float(noise.max()) <= 1
        with torch.no_grad():
            return float((ctx.model(noise) - wanted).square().mean())

    assert (distance(20) > distance(0)) == reference


def test_class_noise_maximises_the_error_of_its_class():
    ctx = context("vision/unsir", trained("train"))
    method = UNSIR(UNSIRConfig(variant="class", noise_batch_size=6, noise_penalty=1e-4))
    method.setup(ctx)
    labels = faces().splits.forget.take(range(36))["label"].unique()
    assert torch.equal(method.label, labels.repeat_interleave(6))
    with torch.no_grad():
        p = ctx.model(method.noise).softmax(1)[range(len(method.label)), method.label]
    assert float(p.max()) < 0.01


def test_unsir_forgets_a_class():
    """All of one class is forgotten: its accuracy falls, that of the others stays."""
    world = faces()
    data = world.splits.train
    labels = data.take(range(len(data)))["label"]
    forget = Subset(data, (labels == 0).nonzero().flatten().tolist())
    retain = Subset(data, (labels != 0).nonzero().flatten().tolist())
    ctx = context("vision/unsir", trained("train"))
    ctx._splits = Splits(forget, retain, data, world.splits.holdout, world.splits.test)
    settings: dict[str, Any] = {"epochs": 6, "repair_epochs": 4, "lr": 0.01, "batch_size": 16}
    result = UNSIR(UNSIRConfig(variant="class", noise_weight=0.5, **settings)).run(ctx)

    def right(part: Subset) -> float:
        found = engine().predict(result, world.adapter, part, seed=0)
        return float((found["logits"].argmax(1) == found["label"]).mean())

    assert right(forget) < 0.2
    assert right(retain) > 0.9


def test_unsir_needs_an_epoch_that_impairs():
    with pytest.raises(ConfigError, match="no epoch that impairs"):
        unlearn("vision/unsir", epochs=1)


# Published settings.

PRESETS = sorted(Path(str(files("mmforget.configs"))).glob("preset/vision/mu?ac/*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_presets_set_what_differs(path):
    text = path.read_text()
    assert text.startswith("# @package _global_\n# ")
    settings = yaml.safe_load(text)["method"]
    cls = METHODS.get(path.stem, "vision")
    cls(instantiate(cls.config_type, settings, "method"))
    default = cls.config_type()
    assert [key for key, value in settings.items() if getattr(default, key) == value] == []


def test_presets_exist():
    names = {(path.parent.name, path.stem) for path in PRESETS}
    methods = {"finetune", "cf_k", "grad_ascent", "grad_diff", "unsir", "scrub"}
    assert {(data, name) for data in ("mufac", "mucac") for name in methods} <= names


if __name__ == "__main__":
    (Path(sys.argv[1]) / "processes").write_text(str(write_results(Path(sys.argv[1]))))
