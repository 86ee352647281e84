"""What loss methods get: noise drawn once, captions, relabelling, losses in closed form."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from mmforget.diffusion.adapter import DiffusionAdapter, Noised
from mmforget.diffusion.data import CaptionedLatents
from mmforget.diffusion.models import DiffusionModel
from mmforget.rng import Draws
from mmforget.types import Outputs
from tests.diffusion import world

torch.set_num_threads(1)
MONET = ("a dog image in monet style", "monet dog", "a painting")
PHOTO = ("a dog image in photo style", "photo dog", "a photo")


def raw(count: int = 6, captions: Sequence[str] = MONET) -> dict[str, Any]:
    batch = world.Pictures(["x"] * count, ["x"] * count, seed=4).take(range(count))
    return {**batch, "captions": [captions] * count, "anchors": [PHOTO] * count}


def adapted(model: DiffusionModel, **extra: Any) -> DiffusionAdapter:
    return DiffusionAdapter(model.noising, model.scale_latents, **extra)


def draws(count: int = 6, seed: int = 0, rows: Any = None) -> Draws:
    return Draws(seed, "train", "forget", 3, total=count, rows=rows)


def take(batch: dict[str, Any], rows: slice) -> dict[str, Any]:
    return {name: part[rows] for name, part in batch.items()}


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_batches_depend_on_the_draws_alone(family: str) -> None:
    model = world.model(family)
    adapter, batch = adapted(model, caption_dropout=0.3, snr_gamma=5.0), raw()
    one, two = (adapter.prepare(batch, draws(), train=True) for _ in range(2))
    other = adapter.prepare(batch, draws(seed=1), train=True)
    half = adapter.prepare(take(batch, slice(2, 5)), draws(rows=slice(2, 5)), train=True)
    for name in ("latents", "target", "t", "clean", "noise", "weight"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
        assert torch.equal(getattr(half, name), getattr(one, name)[2:5]), name
    for name in ("latents", "t", "clean", "noise"):
        assert not torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.prompts == two.prompts and half.prompts == one.prompts[2:5]
    assert half.anchors == one.anchors[2:5]


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_latents_are_noised_by_the_scheduler(family: str) -> None:
    model = world.model(family)
    adapter, batch = adapted(model), raw()
    made = adapter.prepare(batch, draws(), train=True)
    mean = batch["moments"][:, :4]
    scale, shift = model.vae.config.scaling_factor, model.vae.config.shift_factor or 0.0
    spread = (made.clean / scale + shift - mean) / np.exp(-3.0)  # log-variance is -6
    assert abs(float(spread.std()) - 1) < 0.1 and abs(float(spread.mean())) < 0.1
    torch.testing.assert_close(made.latents, model.noising.add(made.clean, made.noise, made.t))
    torch.testing.assert_close(made.target, model.noising.target(made.clean, made.noise, made.t))
    assert abs(float(made.noise.std()) - 1) < 0.1
    assert not torch.allclose(made.noise, spread, atol=0.1), "two draws"
    assert len(set(made.t.tolist())) > 3 and torch.equal(made.weight, torch.ones(6))


def test_a_wide_log_variance_is_finite() -> None:
    batch = raw()
    batch["moments"][:, 4:] = 1e4
    assert adapted(world.model()).prepare(batch, draws(), train=True).latents.isfinite().all()


def test_captions_are_drawn_in_training_only() -> None:
    adapter, count = adapted(world.model(), caption_dropout=0.5), 600
    batch = raw(count)
    seen = adapter.prepare(batch, draws(count), train=False)
    assert set(seen.prompts) == {MONET[0]} and set(seen.anchors) == {PHOTO[0]}
    made = adapter.prepare(batch, draws(count), train=True)
    shares = [made.prompts.count(caption) / count for caption in ("", *MONET)]
    assert abs(shares[0] - 0.5) < 0.06
    assert all(abs(share - 1 / 6) < 0.05 for share in shares[1:])
    pairs = dict(zip(("", *MONET), ("", *PHOTO), strict=True))
    assert made.anchors == tuple(pairs[prompt] for prompt in made.prompts), "the same caption's"


def test_without_dropout_no_caption_is_empty() -> None:
    made = adapted(world.model()).prepare(raw(200), draws(200), train=True)
    assert set(made.prompts) == set(MONET)


def test_fewer_anchors_than_captions() -> None:
    adapter, batch = adapted(world.model()), raw(60)
    batch["anchors"] = [PHOTO[:1]] * 30 + [[]] * 30
    made = adapter.prepare(batch, draws(60), train=True)
    assert made.anchors == (PHOTO[0],) * 30 + ("",) * 30


def test_min_snr_weights_training_alone() -> None:
    model = world.model()
    adapter, batch = adapted(model, snr_gamma=5.0), raw()
    made = adapter.prepare(batch, draws(), train=True)
    assert torch.equal(made.weight, model.noising.snr_weight(made.t, 5.0))
    assert torch.equal(adapter.prepare(batch, draws(), train=False).weight, torch.ones(6))


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_the_loss_is_the_squared_error(family: str) -> None:
    model = world.model(family).requires_grad_(False)
    adapter = adapted(model)
    made = adapter.prepare(raw(3), draws(3), train=False)
    made = made._replace(weight=torch.tensor([1.0, 0.5, 2.0]))
    found = adapter.forward(model, made)
    pred = model.predict(made.latents, made.t, model.encode(made.prompts))
    torch.testing.assert_close(found.pred, pred)
    wanted = (pred - made.target).pow(2).sum(dim=(1, 2, 3)) * made.weight
    torch.testing.assert_close(found.loss, wanted)
    assert torch.equal(adapter.units(made), torch.full((3,), 4.0 * 8 * 8))
    per = adapter.record(model, made)["loss"]
    torch.testing.assert_close(per, (pred - made.target).pow(2).mean(dim=(1, 2, 3)))


def test_gradients_reach_the_denoiser() -> None:
    model = world.model()
    adapter = adapted(model)
    adapter.forward(model, adapter.prepare(raw(2), draws(2), train=True)).loss.sum().backward()
    assert model.unet.conv_in.weight.grad.abs().sum() > 0


def test_relabelled_targets_are_the_models_own_for_the_anchor() -> None:
    model = world.model()
    adapter = adapted(model)
    made = adapter.prepare(raw(3), draws(3), train=False)
    relabelled = adapter.relabel(made, draws(3))
    assert relabelled.relabelled and not made.relabelled
    assert relabelled._replace(relabelled=False) is not made
    found = adapter.forward(model, relabelled)
    text, anchor = model.encode(made.prompts), model.encode(made.anchors)
    pred = model.predict(made.latents, made.t, text)
    with torch.no_grad():
        target = model.predict(made.latents, made.t, anchor)
    wanted = (pred - target).pow(2).sum(dim=(1, 2, 3))
    torch.testing.assert_close(found.loss, wanted)
    assert wanted.min() > 1e-3
    ours = torch.autograd.grad(found.loss.sum(), model.unet.conv_in.weight)[0]
    theirs = torch.autograd.grad(wanted.sum(), model.unet.conv_in.weight)[0]
    torch.testing.assert_close(ours, theirs, msg="no gradient goes through the target")
    same = relabelled._replace(anchors=relabelled.prompts)
    assert adapter.forward(model, same).loss.abs().max() < 1e-6


def test_the_divergence_is_a_squared_distance() -> None:
    adapter = adapted(world.model())
    a, b = torch.randn(2, 3, 4, 8, 8)
    student, teacher = Outputs(torch.zeros(3), a), Outputs(torch.zeros(3), b)
    wanted = (a - b).pow(2).sum(dim=(1, 2, 3))
    for temperature in (1.0, 4.0):
        torch.testing.assert_close(adapter.divergence(student, teacher, temperature), wanted)


def test_half_precision_losses_are_float32() -> None:
    model = world.model().to(torch.bfloat16)
    adapter = adapted(model)
    made = adapter.prepare(raw(2), draws(2), train=False)
    made = made._replace(latents=made.latents.bfloat16())
    found = adapter.forward(model, made)
    assert found.loss.dtype == found.pred.dtype == torch.float32
    assert adapter.record(model, made)["loss"].dtype == torch.float32


def test_scopes_and_requests() -> None:
    model = world.model()
    adapter = adapted(model)
    assert set(adapter.parameters(model, "head")) == {
        f"unet.{n}.{kind}" for n in ("conv_norm_out", "conv_out") for kind in ("weight", "bias")
    }
    before = {n: p.clone() for n, p in model.named_parameters()}
    adapter.apply_request(model, world.splits(2))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_captioned_latents_are_taken_in_the_order_asked() -> None:
    moments = np.arange(4 * 2, dtype=np.float32).reshape(4, 2, 1, 1)
    data = CaptionedLatents(
        ["a", "b", "c", "d"], list("wxyz"), moments, [["p"], ["q"], ["r"], ["s"]], [[], ["t"]] * 2
    )
    found = data.take([3, 1])
    assert len(data) == 4 and data.ids == ("a", "b", "c", "d") and data.digests[3] == "z"
    assert found["moments"][:, 0, 0, 0].tolist() == [6.0, 2.0]
    assert found["captions"] == [["s"], ["q"]] and found["anchors"] == [["t"], ["t"]]


def test_noised_is_plain() -> None:
    made = adapted(world.model()).prepare(raw(2), draws(2), train=False)
    assert isinstance(made, Noised) and not made.latents.requires_grad
