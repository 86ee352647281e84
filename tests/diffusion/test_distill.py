"""Training on prompts: denoising paths, ESD, CA, AdvUnlearn, low-rank adapters, prefixes."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmforget.diffusion import checkpoints
from mmforget.diffusion.adversarial import (
    adversarial_prefix,
    encode_placed,
    random_tokens,
)
from mmforget.diffusion.concepts import Concept, Erasure
from mmforget.diffusion.conditions import Conditions
from mmforget.diffusion.edits import build_edit
from mmforget.diffusion.methods import advunlearn, ca, distill, esd
from mmforget.diffusion.methods.advunlearn import AdvUnlearn, AdvUnlearnConfig
from mmforget.diffusion.methods.ca import CA, CAConfig, scope_of, start_blocked
from mmforget.diffusion.methods.distill import Points, Prompted, Stop, Turns, draw_stops, points
from mmforget.diffusion.methods.esd import ESD, ESDConfig, esd_target, paper_eta
from mmforget.diffusion.methods.low_rank import LowRank, adapted
from mmforget.diffusion.models import DiffusionModel
from mmforget.diffusion.noise import Sampling
from mmforget.diffusion.sampling import Image, denoise, generate, start_latents
from mmforget.diffusion.scopes import parameters
from mmforget.errors import CheckpointError, CollapsedError, ConfigError
from tests.diffusion import world

torch.set_num_threads(1)
FAMILIES = ("sd", "sdxl", "sd3", "flux")
MONET, CRAYON = "monet style", "a dog image in crayon style"
SHORT = Sampling("ddim", 5, 3.0, 16, 16)
QUICK = ESDConfig(steps=2, lr=1e-3, denoise_steps=4, size=16)
ABLATE = CAConfig(steps=2, lr=1e-3, scale_lr=False, images=4, anchor_steps=2, size=16)
ADVERSARIAL = AdvUnlearnConfig(
    steps=3, lr=1e-3, warmup=1, attack_steps=3, attack_lr=1e-2, denoise_steps=4, size=16
)


def run(method: Prompted[Any], model: DiffusionModel | None = None, **settings: Any) -> Any:
    """Run a method; return its context, whose model is the result."""
    ctx = world.context(model or world.model("sd"), method, **settings)
    assert method.run(ctx) is ctx.model
    return ctx


def predicted(model: DiffusionModel, prompt: str, seed: int = 0, t: float = 500.0) -> Tensor:
    """The prediction for a prompt on fixed noise, two rows."""
    with torch.no_grad():
        latents = start_latents(model, [seed, seed + 1], 16)
        return model.predict(latents, torch.tensor([t, t]), model.encode([prompt] * 2))


def two_concepts() -> Erasure:
    dog = Concept("dog", "object", "a dog", "a cat", ("a photo of a dog",), ("a photo of a cat",))
    return replace(world.erasure(), concepts=(*world.erasure().concepts, dog))


class Killed(Exception):
    pass


def killed_after(method: Any, steps: int) -> None:
    """Make a method fail after so many steps."""
    after, left = method.after_step, [steps]

    def kill(ctx: Any) -> None:
        after(ctx)
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    method.after_step = kill


# Denoising paths ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_points_are_states_of_the_sampler(family: str) -> None:
    model = world.model(family)
    text, noise = model.encode([MONET, CRAYON]), start_latents(model, [3, 4], 16)
    stops = [Stop(0, 3, 0.5), Stop(1, 0, 0.0), Stop(0, 0, 0.9), Stop(1, 2, 0.1), Stop(0, 3, 0.1)]
    found = points(model, text, noise, stops, SHORT, "step")
    times = model.noising.sampler(SHORT, 16).timesteps
    for stop, latents, t in zip(stops, *found, strict=True):
        row = [stop.path]
        alone = denoise(
            model, noise[row], text.rows(row), model.unconditional(), SHORT, stop=stop.step
        )
        torch.testing.assert_close(latents[None], alone, rtol=1e-3, atol=1e-4)
        assert t == times[stop.step]
    one = points(model, text, noise, stops, replace(SHORT, batch_size=1), "step")
    torch.testing.assert_close(one.latents, found.latents, rtol=1e-3, atol=1e-4)


def test_paths_that_ended_cost_nothing() -> None:
    model, rows = world.model("sd"), []
    model.denoiser.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    text, noise = model.encode([MONET] * 3), start_latents(model, [0, 1, 2])
    points(model, text, noise, [Stop(0, 1, 0.0), Stop(1, 4, 0.0), Stop(2, 0, 0.0)], SHORT)
    assert rows == [4, 2, 2, 2]  # both halves of guidance; the path of step 0 never runs


def test_latents_of_a_sigma_sampler_are_scaled_for_the_model() -> None:
    model = world.model("sdxl")
    settings = replace(SHORT, sampler="euler")
    text, noise = model.encode([MONET]), start_latents(model, [0], 16)
    found = points(model, text, noise, [Stop(0, 0, 0.0), Stop(0, 2, 0.0)], settings, "step")
    scheduler = model.noising.sampler(settings)
    sigma = scheduler.sigmas[0]
    wanted = noise[0] * scheduler.init_noise_sigma / (sigma**2 + 1) ** 0.5
    torch.testing.assert_close(found.latents[0], wanted)
    raw = denoise(model, noise, text, model.unconditional(), settings, stop=2)[0]
    torch.testing.assert_close(found.latents[1], raw / (scheduler.sigmas[2] ** 2 + 1) ** 0.5)
    torch.testing.assert_close(found.t, scheduler.timesteps[[0, 2]].float())


def test_a_bin_of_training_times_holds_the_samplers_time() -> None:
    model = world.model("sd")
    settings = Sampling("ddim", 50, 1.0, 16, 16)
    text, noise = model.encode([MONET]), start_latents(model, [0])
    times = model.noising.sampler(settings).timesteps
    for step in (0, 1):
        reached = []
        for chance in (0.0, 0.5, 0.999):
            found = points(model, text, noise, [Stop(0, step, chance)], settings)
            assert found.t.dtype == torch.int64
            reached.append(int(found.t))
        low = 1000 - 20 * (step + 1)
        assert reached == [low, low + 10, low + 19]
        assert low <= int(times[step]) < low + 20
    flow = world.model("sd3")
    stop = [Stop(0, 0, 0.25)]
    found = points(flow, flow.encode([MONET]), start_latents(flow, [0]), stop, settings)
    assert found.t.tolist() == [985.0]


def test_stops_are_shared_or_one_a_path() -> None:
    shared = draw_stops(2, 3, SHORT, torch.Generator().manual_seed(0))
    assert [stop.path for stop in shared] == [0, 1, 0, 1, 0, 1]
    assert all(a[1:] == b[1:] for a, b in zip(shared[::2], shared[1::2], strict=True))
    own = draw_stops(2, 3, SHORT, torch.Generator().manual_seed(0), shared=False)
    assert [stop.path for stop in own] == [0, 1, 0]
    assert [stop.step for stop in own] == [stop.step for stop in shared[::2]]
    many = draw_stops(1, 2000, SHORT, torch.Generator().manual_seed(0))
    counts = torch.bincount(torch.tensor([stop.step for stop in many]))
    assert len(counts) == 5 and (counts - 400).abs().max() < 80


def test_concepts_come_equally_often() -> None:
    rows = Turns(12, 3)
    taken = rows.take(range(12))
    assert sorted(taken) == [(c, turn) for c in range(3) for turn in range(4)]


# ESD ---------------------------------------------------------------------------------------------


def test_esd_forms_agree() -> None:
    e0, ec, other = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(esd_target(e0, ec, 0.0), e0)
    paper = esd_target(e0, ec, paper_eta(1.5, "paper"))
    torch.testing.assert_close(paper, e0 - 1.5 * (ec - e0))
    current = esd_target(e0, ec, paper_eta(2.5, "current"))
    torch.testing.assert_close(current, ec - 2.5 * (ec - e0))
    torch.testing.assert_close(current, paper)
    for form in ("paper", "current"):
        found = esd_target(e0, ec, paper_eta(2.0, form, "anchor"), other)
        torch.testing.assert_close(found, other - 2.0 * (ec - e0))


def watched(monkeypatch: pytest.MonkeyPatch) -> list[Points]:
    """Keep the points that ESD draws."""
    seen: list[Points] = []

    def kept(*args: Any) -> Points:
        seen.append(points(*args))
        return seen[-1]

    monkeypatch.setattr(esd, "points", kept)
    return seen


@pytest.mark.parametrize(
    "settings",
    [{}, {"form": "current", "eta": 2.0}, {"erase_from": "anchor", "eta": 0.7}, {"times": 2}],
    ids=str,
)
def test_esd_is_the_plain_loop(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(monkeypatch)
    config = replace(QUICK, steps=2, batch_size=2, **settings)
    ctx = run(ESD(config))
    plain = world.model("sd")
    frozen = copy.deepcopy(plain)
    trained = parameters(plain, "esd-x")
    optimizer = torch.optim.Adam(trained.values(), lr=1e-3)
    student = "photo style" if config.erase_from == "anchor" else MONET
    for at in seen:
        loss = torch.tensor(0.0)
        for x, t in zip(at.latents, at.t, strict=True):
            args = (x[None], t[None])
            with torch.no_grad():
                e0 = frozen.predict(*args, frozen.encode([""]))
                ec = frozen.predict(*args, frozen.encode([MONET]))
                base = frozen.predict(*args, frozen.encode([student]))
            if config.form == "current" or config.erase_from == "anchor":
                target = base - config.eta * (ec - e0)
            else:
                target = e0 - config.eta * (ec - e0)
            pred = plain.predict(*args, plain.encode([student]))
            loss = loss + F.mse_loss(pred, target) / len(at.t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len(seen) == 2 and len(seen[0].t) == 2 * config.times
    for name, value in parameters(ctx.model, "esd-x").items():
        torch.testing.assert_close(value, trained[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [None, 4])
def test_esd_moves_the_concept_to_its_target(lora: int | None) -> None:
    before = world.model("sd")
    config = replace(QUICK, steps=8, batch_size=2, times=4, lr=3e-3, lora_rank=lora)
    after = run(ESD(config)).model
    gaps, moves = [], []
    for t in (300.0, 800.0):
        e0, ec = predicted(before, "", t=t), predicted(before, MONET, t=t)
        target = esd_target(e0, ec, 1.0)
        gaps.append(F.mse_loss(predicted(after, MONET, t=t), target) / F.mse_loss(ec, target))
        moves.append(F.mse_loss(predicted(after, MONET, t=t), ec))
        moves[-1] /= F.mse_loss(predicted(after, CRAYON, t=t), predicted(before, CRAYON, t=t))
    assert max(gaps) < 0.6, gaps
    assert min(moves) > 1.5, moves


@pytest.mark.parametrize("scope", ["esd-x-strict", "esd-u", "text:1", r"unet\.conv_out\.weight"])
def test_esd_changes_its_scope_alone(scope: str) -> None:
    before = world.model("sd")
    ctx = run(ESD(replace(QUICK, scope=scope)))
    names = set(parameters(before, scope))
    assert world.changed(before, ctx.model) <= names
    assert len(world.changed(before, ctx.model)) > 0.9 * len(names)
    assert set(ctx.trainable) == names
    assert ctx.engine.meter.steps == 2 and ctx.engine.meter.examples_seen == 2


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
@pytest.mark.parametrize("lora", [None, 2])
def test_esd_runs_on_every_family(family: str, lora: int | None) -> None:
    sampler = "euler" if family == "sdxl" else "ddim"
    config = replace(QUICK, sampler=sampler, lora_rank=lora, time="step", x_t="original")
    model = world.model(family)
    ctx = run(ESD(config), model)
    changed = world.changed(world.model(family), ctx.model)
    assert changed and changed <= set(ctx.trainable)
    assert not torch.equal(predicted(ctx.model, MONET), predicted(world.model(family), MONET))


def test_esd_with_no_step_changes_nothing() -> None:
    for lora in (None, 2):
        ctx = run(ESD(replace(QUICK, steps=0, lora_rank=lora)))
        assert torch.equal(predicted(ctx.model, MONET), predicted(world.model("sd"), MONET))


def test_equal_seeds_give_equal_results() -> None:
    state = torch.get_rng_state()
    first, again, other = (run(ESD(QUICK), seed=seed).model for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert not world.changed(first, again)
    assert world.changed(first, other)


PLAIN: Any = {"optimizer": "sgd", "lr": 0.1}  # Adam would enlarge rounding where gradients vanish


@pytest.mark.parametrize(
    "method",
    [
        lambda: ESD(replace(QUICK, batch_size=4, times=2, **PLAIN)),
        lambda: CA(replace(ABLATE, prior_weight=0.5, **PLAIN)),
        lambda: AdvUnlearn(replace(ADVERSARIAL, batch_size=2, steps=2, **PLAIN)),
    ],
    ids=["esd", "ca", "advunlearn"],
)
def test_splitting_a_batch_changes_nothing(method: Callable[[], Prompted[Any]]) -> None:
    whole, split = (world.context(world.model("sd"), method()) for _ in range(2))
    split.engine.runtime = replace(split.engine.runtime, accumulation=2)
    for ctx in (whole, split):
        method().run(ctx)
    start = dict(world.model("sd").named_parameters())
    for name, value in whole.model.named_parameters():
        moved = (value - start[name]).abs().max()
        other = split.model.get_parameter(name)
        torch.testing.assert_close(value, other, rtol=0.0, atol=1e-6 + 1e-2 * float(moved))
    assert world.changed(world.model("sd"), whole.model)


@pytest.mark.parametrize(
    "method",
    [
        lambda: ESD(replace(QUICK, steps=4, lora_rank=2)),
        lambda: CA(replace(ABLATE, steps=4, scope="embedding")),
        lambda: AdvUnlearn(replace(ADVERSARIAL, steps=5, attack_every=2, attack_steps=1)),
    ],
    ids=["esd", "ca", "advunlearn"],
)
def test_a_killed_run_goes_on(method: Callable[[], Prompted[Any]], tmp_path: Path) -> None:
    whole = run(method(), target=two_concepts()).model
    for place, kill in ((tmp_path, True), (tmp_path, False)):
        again = method()
        again.resume = place
        ctx = world.context(world.model("sd"), again, target=two_concepts())
        ctx.engine.runtime = replace(ctx.engine.runtime, checkpoint_every_s=0.0, log_every=1)
        if kill:
            killed_after(again, 3)
            with pytest.raises(Killed):
                again.run(ctx)
        else:
            again.run(ctx)
    assert ctx.engine.meter.steps == again.count()
    assert not world.changed(whole, ctx.model)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    with pytest.raises(CollapsedError, match="loss is"):
        run(ESD(replace(QUICK, steps=4, lr=1e30, optimizer="sgd")))


def test_esd_takes_fewer_passes_than_the_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Stop]] = []

    def kept(*args: Any, **kwargs: Any) -> list[Stop]:
        seen.append(draw_stops(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(esd, "draw_stops", kept)

    def cost(**settings: Any) -> tuple[float, float]:
        """Calls and rows of the denoiser, as shares of what the plain loop takes for each pair."""
        seen.clear()
        model, rows = world.model("sd"), []
        hook: Any = lambda _, args: rows.append(len(args[0]))  # noqa: E731
        model.denoiser.register_forward_pre_hook(hook)
        method = ESD(replace(QUICK, steps=4, denoise_steps=20, **settings))
        setup = method.setup

        def after(ctx: Any) -> None:  # the frozen copy has hooks of its own
            setup(ctx)
            rows.clear()

        method.setup = after  # type: ignore[method-assign]
        run(method, model)
        plain = sum(2 * stop.step + 3 for stops in seen for stop in stops)
        return len(rows) / plain, sum(rows) / plain

    calls, rows = cost(batch_size=4)
    assert calls < 0.2 and rows <= 1.0
    calls, rows = cost(times=4)
    assert calls < 0.3 and rows < 0.5


# Low-rank adapters -------------------------------------------------------------------------------


def adapters(model: DiffusionModel, scope: str = "esd-all", rank: int = 2) -> LowRank:
    """Adapters with random factors, added to the model."""
    made = LowRank.fresh(model, adapted(model, scope), rank, seed=1, alpha=3.0)
    with torch.no_grad():
        for up in made.up:
            up.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(up)))
    model.add_edit("lora", made)
    return made


def test_fresh_adapters_change_nothing() -> None:
    model, before = world.model("sd"), world.model("sd")
    layers = adapted(model, "esd-all")
    assert {type(model.denoiser.get_submodule(name)) for name in layers} == {nn.Linear, nn.Conv2d}
    model.add_edit("lora", LowRank.fresh(model, layers, 2, seed=1))
    assert torch.equal(predicted(model, MONET), predicted(before, MONET))
    assert any(down.any() for down in model.edits["lora"].down)  # type: ignore[union-attr]


def test_adapters_add_the_product_of_their_factors() -> None:
    torch.manual_seed(0)
    model = world.model("sd")
    made = adapters(model)
    for place, name in enumerate(made.layers):
        layer = model.denoiser.get_submodule(name)
        shape = (2, layer.weight.shape[1], 6, 6)
        x = torch.randn(shape if isinstance(layer, nn.Conv2d) else shape[:2])
        weight = layer.weight.detach() + made.product(place)
        if isinstance(layer, nn.Conv2d):
            wanted = F.conv2d(x, weight, layer.bias, layer.stride, layer.padding)
        else:
            wanted = F.linear(x, weight, layer.bias)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)


def test_merging_is_undone_bit_for_bit() -> None:
    model, before = world.model("sd"), world.model("sd")
    made = adapters(model)
    with_hooks = predicted(model, MONET)
    assert not torch.allclose(with_hooks, predicted(before, MONET), atol=1e-2)
    with made.off():
        assert torch.equal(predicted(model, MONET), predicted(before, MONET))
    made.merge(model)
    assert not model.edits
    torch.testing.assert_close(predicted(model, MONET), with_hooks, rtol=1e-3, atol=1e-4)
    made.unmerge(model)
    assert not {n for n in world.changed(before, model) if not n.startswith("edits.")}
    assert torch.equal(predicted(model, MONET), with_hooks)
    with pytest.raises(ConfigError, match="not merged"):
        made.unmerge(model)
    model.remove_edit("lora")
    with pytest.raises(ConfigError, match="no edit of the model"):
        made.merge(model)


def test_adapters_are_copied_and_rebuilt(tmp_path: Path) -> None:
    model = world.model("sd")
    made = adapters(model, "esd-x")
    made.scale = 0.5
    found = predicted(model, MONET)
    other = copy.deepcopy(model)
    assert torch.equal(predicted(other, MONET), found)
    with torch.no_grad():
        other.edits["lora"].up[0].add_(1.0)  # type: ignore[union-attr]
    assert torch.equal(predicted(model, MONET), found)
    assert not torch.equal(predicted(other, MONET), found)
    fresh = world.model("sd")
    fresh.add_edit("lora", build_edit("lora", made.config(), fresh))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(predicted(fresh, MONET), found)
    checkpoints.save(model, tmp_path / "model.safetensors", world.model("sd"))
    loaded = checkpoints.load(tmp_path / "model.safetensors", world.model("sd"))
    assert torch.equal(predicted(loaded, MONET), found)
    with pytest.raises(CheckpointError, match="another model"):
        build_edit("lora", made.config(), world.model("sd3"))


@pytest.mark.parametrize(
    ("family", "scope"), [("sd", "esd-all"), ("sdxl", "esd-x"), ("sd3", "esd-x")]
)
def test_plain_diffusers_loads_the_adapters(family: str, scope: str, tmp_path: Path) -> None:
    model = world.model(family)
    made = adapters(model, scope)
    sampler = "ddim" if family == "sd" else "checkpoint"
    settings = Sampling(sampler, 3, 4.0, 1)
    negative = model.unconditional()
    start, text = start_latents(model, [5]), model.encode([CRAYON])
    ours = denoise(model, start, text, negative, settings)
    made.save(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    pipe = world.pipeline(family)
    pipe.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {
        "prompt": CRAYON, "num_inference_steps": 3, "guidance_scale": 4.0,
        "output_type": "latent", "height": 16, "width": 16,
    }  # fmt: skip
    plain = pipe(**arguments, generator=torch.Generator().manual_seed(5)).images
    pipe.load_lora_weights(str(tmp_path))
    theirs = pipe(**arguments, generator=torch.Generator().manual_seed(5)).images
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert (plain - theirs).abs().max() > 0.05


def test_adapters_need_layers() -> None:
    with pytest.raises(ConfigError, match="low-rank"):
        run(ESD(replace(QUICK, lora_rank=2, scope="text:1")))
    with pytest.raises(ConfigError, match="go on no others"):
        LowRank.fresh(world.model("sd"), ["conv_norm_out"], 2, seed=0)


def test_a_second_request_adds_adapters_beside_the_first() -> None:
    model = run(ESD(replace(QUICK, lora_rank=2))).model
    first = predicted(model, MONET)
    run(ESD(replace(QUICK, lora_rank=2, steps=0)), model)
    assert list(model.edits) == ["esd", "esd_2"]
    assert torch.equal(predicted(model, MONET), first)
    run(ESD(replace(QUICK, lora_rank=2)), model)
    assert list(model.edits) == ["esd", "esd_2", "esd_3"]


# CA ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "gap", "distance"),
    [({"lr": 1e-4}, 0.95, 0.9), ({"lr": 1.0, "optimizer": "sgd", "weight_decay": 0.0}, 0.4, 9.0)],
)
def test_ca_moves_the_concept_to_its_anchor(
    settings: dict[str, Any], gap: float, distance: float
) -> None:
    before, prompt = world.model("sd"), "a dog image in monet style"
    concept = replace(world.erasure().concepts[0], anchor="", anchors=("",) * 3)
    target = replace(world.erasure(), concepts=(concept,))
    after = run(CA(replace(ABLATE, steps=20, **settings)), target=target).model
    assert world.changed(before, after) == set(parameters(before, "kv"))
    far = F.mse_loss(predicted(before, prompt), predicted(before, ""))
    assert F.mse_loss(predicted(after, prompt), predicted(after, "")) < gap * far
    assert F.mse_loss(predicted(after, prompt), predicted(before, "")) < distance * far


def test_anchor_images_are_what_the_model_generates() -> None:
    seen: list[Any] = []

    class Watched(CA):
        def setup(self, ctx: Any) -> None:
            super().setup(ctx)
            seen.append(self.anchors)

    run(Watched(replace(ABLATE, images=5, steps=0)), target=two_concepts())
    (first, second) = seen[0]
    assert (len(first), len(second)) == (3, 2)
    model, concept = world.model("sd"), world.erasure().concepts[0]
    settings = Sampling("ddim", 2, 6.0, 2, 16)
    images = [Image(prompt, ca.derive(0, "ca", 0, i)) for i, prompt in enumerate(concept.anchors)]
    wanted = torch.cat([batch for _, batch in generate(model, images, settings)])
    near = (model.to_images(first).int() - wanted.int()).abs()
    assert near.max() <= 1


@pytest.mark.parametrize("variant", ["model", "noise"])
@pytest.mark.parametrize("prior", [0.0, 0.5])
def test_the_loss_of_ca(variant: str, prior: float, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, ...]] = []
    model = world.model("sd")
    add = model.noising.add

    def kept(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        seen.append((clean, noise, t))
        return add(clean, noise, t)

    monkeypatch.setattr(model.noising, "add", kept)
    terms: list[dict[str, Tensor]] = []

    class Watched(CA):
        def loss(self, ctx: Any, batch: Any) -> dict[str, Tensor]:
            terms.append({k: v.detach() for k, v in super().loss(ctx, batch).items()})
            turns, concept = batch.data.turn, ctx.target.concepts[0]
            places = [turn % 4 for turn in turns]
            clean, noise, t = seen[-1]
            assert torch.equal(clean, self.anchors[0][places])
            prompts = [concept.prompts[p % 3] for p in places]
            anchors = [concept.anchors[p % 3] for p in places]
            x = add(clean, noise, t)
            with torch.no_grad():  # of the model in training: θ has moved by the second step
                anchored = ctx.model.predict(x, t, ctx.model.encode(anchors))
                pred = ctx.model.predict(x, t, ctx.model.encode(prompts))
            target = anchored if variant == "model" else noise
            torch.testing.assert_close(terms[-1]["forget"], F.mse_loss(pred, target))
            if prior:
                wanted = prior * F.mse_loss(anchored, noise)
                torch.testing.assert_close(terms[-1]["prior"], wanted)
            assert len(terms[-1]) == 1 + (prior > 0)
            return super().loss(ctx, batch)

    run(Watched(replace(ABLATE, variant=variant, prior_weight=prior)), model)
    assert len(terms) == 2


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_no_gradient_at_the_start_mark(family: str) -> None:
    model = world.model(family)
    text = model.encode([MONET])
    embeds = text.embeds.clone().requires_grad_(True)
    latents, t = start_latents(model, [0]), torch.tensor([500])
    names = parameters(model, "kv")
    weights = list(names.values())

    def gradients(blocked: bool) -> tuple[Tensor, list[Tensor]]:
        asked = replace(text, embeds=embeds)
        if blocked:
            with start_blocked(model):
                out = model.predict(latents, t, asked)
        else:
            out = model.predict(latents, t, asked)
        found = torch.autograd.grad(out.square().sum(), [embeds, *weights], allow_unused=True)
        return out, [torch.zeros(1) if g is None else g for g in found]

    free, plain = gradients(blocked=False)
    held, found = gradients(blocked=True)
    assert torch.equal(free, held)
    assert any(not torch.allclose(a, b) for a, b in zip(plain[1:], found[1:], strict=True))
    if family == "sd":  # elsewhere later layers read the start mark's own state
        assert plain[0][0, 0].any() and not found[0][0, 0].any()
    torch.testing.assert_close(gradients(blocked=False)[1][0], plain[0])


def test_groups_of_ca() -> None:
    model = world.model("sd")
    names = {group: set(parameters(model, scope_of(model, group))) for group in
             ("cross-attn", "attn", "full-weight", "embedding", "esd-u")}  # fmt: skip
    assert all(n.split(".")[-2] in ("to_k", "to_v") and "attn2" in n for n in names["cross-attn"])
    kinds = {".".join(n.split(".attn")[-1].split(".")[:2]) for n in names["attn"]}
    assert kinds == {f"{k}.to_{p}" for k in (1, 2) for p in ("q", "k", "v", "out")}
    assert names["full-weight"] == {n for n, _ in model.named_parameters() if n[:4] == "unet"}
    assert names["embedding"] == {"text_encoder.embeddings.token_embedding.weight"}
    assert names["esd-u"] == set(parameters(model, "esd-u"))


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_ca_trains_the_embeddings_of_the_names_tokens(family: str) -> None:
    model, before = world.model(family), world.model(family)
    run(CA(replace(ABLATE, scope="embedding", prior_weight=1.0)), model)
    changed = world.changed(before, model)
    assert changed == set(parameters(before, scope_of(before, "embedding")))
    (token,) = model.tokenizer("monet", add_special_tokens=False)["input_ids"]
    for name in changed:
        moved = (model.get_parameter(name) != before.get_parameter(name)).any(dim=1)
        assert moved.nonzero().flatten().tolist() == [token]


def test_the_learning_rate_of_ca() -> None:
    assert CA(CAConfig(lr=2e-6, batch_size=4)).training.lr == pytest.approx(8e-6)
    assert CA(CAConfig(lr=2e-6, batch_size=4, prior_weight=1.0)).training.lr == pytest.approx(16e-6)
    assert CA(CAConfig(lr=2e-6, scale_lr=False)).training.lr == 2e-6


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
@pytest.mark.parametrize("lora", [None, 2])
def test_ca_runs_on_every_family(family: str, lora: int | None) -> None:
    ctx = run(CA(replace(ABLATE, lora_rank=lora)), world.model(family))
    changed = world.changed(world.model(family), ctx.model)
    assert changed and changed <= set(ctx.trainable)


# Prefixes ----------------------------------------------------------------------------------------


def token(model: DiffusionModel, word: str) -> Tensor:
    """A word's embedding in the first encoder, [1, D]."""
    (number,) = model.tokenizer(word, add_special_tokens=False)["input_ids"]
    table: Tensor = model.text_encoder.get_input_embeddings().weight  # type: ignore[operator,union-attr]
    return table.detach()[[number]]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_injected_word_reads_as_if_written(family: str) -> None:
    model = world.model(family)
    plain = model.encode([MONET])
    for prompt, location, written in [
        ("monet style", "prefix_k", "winter monet style"),
        ("monet style", "mid_k", "monet winter style"),
        ("monet style", "suffix_k", "monet style winter"),
        ("monet style", "replace", "winter"),
        ("", "prefix_k", "winter"),
    ]:
        found = encode_placed(model, [prompt], token(model, "winter"), location)
        wanted = model._encode([written])
        width = world.DIM if family in ("sdxl", "sd3") else None  # the second encoder's is beside
        if family != "flux":  # whose first encoder gives the pooled text alone
            got, due = found.embeds[:, :16, :width], wanted[0][:, :16, :width]
            torch.testing.assert_close(got, due, rtol=1e-4, atol=1e-5)
        if family in ("sd3", "flux"):
            assert found.pooled is not None and wanted[1] is not None
            first, due = found.pooled[:, : world.DIM], wanted[1][:, : world.DIM]
            torch.testing.assert_close(first, due, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.encode([MONET]).embeds, plain.embeds)  # nothing was remembered
    if family == "sdxl":
        found = encode_placed(model, [MONET], token(model, "winter"))
        assert torch.equal(found.embeds[..., world.DIM :], plain.embeds[..., world.DIM :])
        assert not torch.equal(found.embeds, plain.embeds)


def test_an_injected_word_stands_in_every_prompt() -> None:
    model = world.model("sd")
    both = encode_placed(model, [MONET, "a dog"], token(model, "winter"))
    wanted = model._encode(["winter monet style", "winter a dog"])[0]
    torch.testing.assert_close(both.embeds, wanted, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_table_of_an_encoder_in_training() -> None:
    model = world.model("sd")
    table = model.text_encoder.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    text = encode_placed(model, [MONET], token(model, "winter"))
    (found,) = torch.autograd.grad(text.embeds.square().sum(), [table])
    named = model.tokenizer(MONET, add_special_tokens=False)["input_ids"]
    assert (found[named].abs().sum(dim=1) > 0).all()


def test_gradients_reach_injected_words_and_hooks_go_away() -> None:
    model = world.model("sd")
    embeds = token(model, "winter").repeat(2, 1).requires_grad_(True)
    text = encode_placed(model, [MONET], embeds)
    out = model.predict(start_latents(model, [0]), torch.tensor([500]), text)
    (found,) = torch.autograd.grad(out.square().sum(), [embeds])
    assert (found.abs().sum(dim=1) > 0).all()
    with pytest.raises(ConfigError, match="do not fit"):
        encode_placed(model, [MONET], embeds.repeat(8, 1))
    encoder: Any = model.text_encoder
    table = encoder.get_input_embeddings()
    assert not encoder._forward_pre_hooks and not table._forward_hooks


def test_a_prefix_follows_adam() -> None:
    model = world.model("sd")
    start = random_tokens(model, 2, torch.Generator().manual_seed(0))
    wanted = model.encode(["winter monet style"]).embeds.detach()

    def objective(step: int, text: Conditions) -> Tensor:
        return (text.embeds - wanted).square().mean()

    def loss(prefix: Tensor) -> Tensor:
        return objective(0, encode_placed(model, [MONET], prefix))

    for sign in (False, True):
        one = adversarial_prefix(model, [MONET], start, objective, steps=1, lr=0.01, sign=sign)
        torch.testing.assert_close(
            (one - start).abs(), torch.full_like(one, 0.01), rtol=1e-2, atol=1e-5
        )
        for reference in (False, True):
            found = adversarial_prefix(
                model, [MONET], start, objective,
                steps=4, lr=0.01, sign=sign, reference=reference,
            )  # fmt: skip
            plain = start.clone().requires_grad_(True)
            adam = torch.optim.Adam([plain], lr=0.01)
            for _ in range(3 if reference else 4):
                if not reference:
                    adam.zero_grad()
                loss(plain).backward()
                if sign:
                    plain.grad.sign_()  # type: ignore[union-attr]
                adam.step()
            torch.testing.assert_close(found, plain.detach(), rtol=1e-4, atol=1e-6)
            assert loss(found) < loss(start)
    assert adversarial_prefix(model, [MONET], start, objective, steps=0) is not start
    assert start.shape == (2, world.DIM)


# AdvUnlearn --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_advunlearn_trains_layers_of_the_first_encoder(family: str) -> None:
    before, model = world.model(family), world.model(family)
    ctx = run(AdvUnlearn(replace(ADVERSARIAL, steps=2, attack_steps=1, scope="text:1")), model)
    changed = world.changed(before, model)
    assert changed and changed <= set(parameters(before, "text:1")) == set(ctx.trainable)
    assert all("layers.0." in name or "final_layer_norm" in name for name in changed)
    assert any("layers.0." in name for name in changed)


def test_the_denoiser_of_advunlearn_is_its_own_original() -> None:
    quick = replace(ADVERSARIAL, steps=2, attack_steps=1)
    method = AdvUnlearn(quick)
    ctx = run(method)
    kept = method._copy
    assert kept is not None and kept.denoiser is ctx.model.denoiser
    assert not world.changed(world.model("sd"), kept)
    whole = AdvUnlearn(replace(quick, scope="kv"))
    ctx = run(whole)
    assert whole._copy is not None and whole._copy.denoiser is not ctx.model.denoiser
    assert not world.changed(world.model("sd"), whole._copy)
    assert world.changed(world.model("sd"), ctx.model) == set(parameters(ctx.model, "kv"))


def test_the_attack_brings_the_concept_back(monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[list[float]] = []

    def kept(model: Any, prompts: Any, start: Tensor, objective: Any, **settings: Any) -> Tensor:
        found = adversarial_prefix(model, prompts, start, objective, **settings)
        with torch.no_grad():
            pair = [
                sum(
                    float(objective(k, encode_placed(model, prompts, prefix)))
                    for k in range(settings["steps"])
                )
                for prefix in (start, found)
            ]
        losses.append(pair)
        return found

    monkeypatch.setattr(advunlearn, "adversarial_prefix", kept)
    config = replace(ADVERSARIAL, steps=3, attack_steps=8, attack_lr=0.03, attack_paths=2)
    method = AdvUnlearn(replace(config, attack_start="random"))
    run(method)
    assert len(losses) == 2
    assert all(after < before for before, after in losses), losses
    assert method.prefixes[0].shape == (1, world.DIM)


@pytest.mark.parametrize("location", ["suffix_k", "mid_k", "replace", "add"])
def test_advunlearn_attacks_at_other_places(location: str) -> None:
    quick = replace(ADVERSARIAL, steps=2, warmup=0, attack_steps=2, tokens=2, prompt="text")
    config = replace(quick, location=location)
    method = AdvUnlearn(config)
    run(method)
    count = world.model("sd").count_tokens(MONET) if location == "add" else 2
    assert method.prefixes[0].shape == (count, world.DIM)


def test_advunlearn_erases_behind_the_prefix() -> None:
    before = world.model("sd")
    config = replace(
        ADVERSARIAL, steps=8, warmup=5, lr=3e-3, batch_size=2, attack_paths=1, prompt="text"
    )
    after = run(AdvUnlearn(config)).model
    target = esd_target(predicted(before, ""), predicted(before, MONET), 1.0)
    far = F.mse_loss(predicted(before, MONET), target)
    assert F.mse_loss(predicted(after, MONET), target) < 0.7 * far
    moved = F.mse_loss(predicted(after, MONET), predicted(before, MONET))
    kept = F.mse_loss(predicted(after, CRAYON), predicted(before, CRAYON))
    assert kept < 0.7 * moved
    fresh = after.encode([MONET]).embeds  # nothing is remembered of the untrained encoder
    torch.testing.assert_close(fresh, after._encode([MONET])[0])


def test_retain_terms_beside_and_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Tensor]] = []
    loss = AdvUnlearn.loss

    def kept(self: Any, ctx: Any, batch: Any) -> dict[str, Tensor]:
        seen.append(loss(self, ctx, batch))
        return seen[-1]

    monkeypatch.setattr(AdvUnlearn, "loss", kept)
    quick = replace(ADVERSARIAL, steps=2, attack_steps=1)
    for changes, wanted in [
        ({"retain": "reg"}, [{"forget", "retain"}] * 2),
        ({"retain": "iter"}, [{"forget"}, {"retain"}] * 2),
        ({"retain_weight": 0.0}, [{"forget"}] * 2),
    ]:
        seen.clear()
        ctx = run(AdvUnlearn(replace(quick, **changes)))  # type: ignore[arg-type]
        assert [set(terms) for terms in seen] == wanted
        assert ctx.engine.meter.steps == len(wanted)
        if changes == {"retain": "reg"}:  # at θ0 nothing has moved yet
            assert seen[0]["retain"] < 1e-10 < seen[1]["retain"]


def test_a_request_without_retain_prompts_is_refused() -> None:
    target = replace(world.erasure(), retain=())
    with pytest.raises(ConfigError, match="prompts to retain"):
        run(AdvUnlearn(ADVERSARIAL), target=target)
    run(AdvUnlearn(replace(ADVERSARIAL, retain_weight=0.0, steps=1)), target=target)


def test_every_concept_is_attacked_from_its_last_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Tensor, Tensor]] = []

    def kept(model: Any, prompts: Any, start: Tensor, *args: Any, **settings: Any) -> Tensor:
        found = adversarial_prefix(model, prompts, start, *args, **settings)
        calls.append((prompts[0], start, found))
        return found

    monkeypatch.setattr(advunlearn, "adversarial_prefix", kept)
    config = replace(ADVERSARIAL, steps=7, attack_steps=1, retain_weight=0.0, denoise_steps=2)
    run(AdvUnlearn(config), target=two_concepts())
    assert {name for name, _, _ in calls} == {"monet", "dog"} and len(calls) == 6
    last: dict[str, Tensor] = {}
    for name, start, found in calls:
        if name in last:
            assert torch.equal(start, last[name])
        last[name] = found
    calls.clear()
    run(AdvUnlearn(replace(config, attack_start="random", attack_every=3)))
    assert len(calls) == 3  # windows 0 (after the warm-up), 1 and 2
    assert not torch.equal(calls[1][1], calls[0][2])


def test_texts_of_a_concept() -> None:
    concept = world.erasure().concepts[0]
    assert distill.text_of(concept, 0, "text") == ("monet style", "photo style")
    assert distill.text_of(concept, 0, "name") == ("monet", "photo style")
    assert distill.text_of(concept, 4, "prompts") == (concept.prompts[1], concept.anchors[1])
