"""Edits: SPM, Receler, SLD, negative prompt, SEOT, SAeUron."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmforget.context import Context
from mmforget.diffusion import attention
from mmforget.diffusion.concepts import Concept, Erasure
from mmforget.diffusion.conditions import Conditions
from mmforget.diffusion.edits import KINDS, Edit, Step, build_edit
from mmforget.diffusion.methods import receler, sae, seot, spm
from mmforget.diffusion.methods.negative_prompt import (
    NegativePromptConfig,
    NegativePrompting,
)
from mmforget.diffusion.methods.receler import Erasers, Receler, RecelerConfig
from mmforget.diffusion.methods.sae import FeatureEdit, SAeUron, SAeUronConfig, SparseCoder
from mmforget.diffusion.methods.seot import SEOT, SEOTConfig, Suppression
from mmforget.diffusion.methods.sld import PRESETS, SLD, SafetyGuidance, SLDConfig, strength
from mmforget.diffusion.methods.spm import SPM, Membrane, SPMConfig
from mmforget.diffusion.models import DiffusionModel
from mmforget.diffusion.noise import Sampling
from mmforget.diffusion.sampling import denoise, start_latents
from mmforget.errors import CheckpointError, ConfigError
from mmforget.types import UnlearningMethod
from tests.diffusion import world

torch.set_num_threads(1)
MONET, DOG = "a bird image in monet style", "a dog image in crayon style"
SPM_TINY = SPMConfig(
    steps=3, warmup_steps=0, batch_size=2, denoise_steps=2, anchors=2, lr=0.05, restarts=1
)
RECELER_TINY = RecelerConfig(
    steps=3,
    batch_size=2,
    rank=8,
    denoise_steps=2,
    adversarial_tokens=3,
    adversarial_steps=2,
    lr=0.05,
)
SAE_TINY = SAeUronConfig(
    object_layer="up_blocks.1.attentions.0",
    style_layer="up_blocks.1.attentions.1",
    expansion=2,
    k=4,
    prompts=4,
    rounds=2,
    images=4,
    steps=3,
    batch_size=64,
    guidance=2.0,
    percentile=90.0,
    lr=0.01,
)
SEOT_TINY = SEOTConfig(iterations=2, start=0.25, stop=0.75)


def predicted(model: DiffusionModel, *prompts: str) -> Tensor:
    latents = start_latents(model, range(len(prompts)))
    with torch.no_grad():
        return model.predict(latents, torch.tensor(500), model.encode(prompts))


def sampled(
    model: DiffusionModel, *prompts: str, guidance: float = 3.0, steps: int = 4, **extra: Any
) -> Tensor:
    text, empty = model.encode(prompts), model.unconditional().repeat(len(prompts))
    latents = start_latents(model, range(len(prompts)))
    return denoise(model, latents, text, empty, Sampling("ddim", steps, guidance), **extra)


def run(method: UnlearningMethod[Any], family: str = "sd", **extra: Any) -> DiffusionModel:
    model = world.model(family)
    made = method.run(world.context(model, method, **extra))
    assert made is model
    return model


def prepared(config: SAeUronConfig, family: str = "sd") -> tuple[SAeUron, DiffusionModel]:
    method, model = SAeUron(config), world.model(family)
    ctx = world.context(model, method)
    ctx._reads = frozenset({"train"})
    method.prepared = method.prepare(ctx)
    return method, model


def calls(model: DiffusionModel) -> list[int]:
    """Rows of every pass from now on."""
    rows: list[int] = []
    model.denoiser.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    return rows


def two() -> Erasure:
    made = world.erasure()
    other = Concept(
        "winter", "style", "winter style", "", ("a dog image in winter style",), ("a dog image",)
    )
    return replace(made, concepts=(*made.concepts, other))


# Every edit --------------------------------------------------------------------------------------


@lru_cache
def built(kind: str) -> DiffusionModel:
    return build(kind)


def build(kind: str) -> DiffusionModel:
    if kind == "sae":
        method, model = prepared(SAE_TINY)
        method.run(world.context(model, method))
        return model
    made: dict[str, UnlearningMethod[Any]] = {
        "spm": SPM(SPM_TINY),
        "receler": Receler(RECELER_TINY),
        "sld": SLD(SLDConfig(preset="max")),
        "negative_prompt": NegativePrompting(NegativePromptConfig()),
        "seot": SEOT(SEOT_TINY),
    }
    return run(made[kind])


ALL = ("spm", "receler", "sld", "negative_prompt", "seot", "sae")


@pytest.mark.parametrize("kind", ALL)
def test_an_edit_changes_images_only_and_comes_back(kind: str) -> None:
    original, model = world.model(), copy.deepcopy(built(kind))
    changed = world.changed(original, model)
    assert all(name.startswith("edits.") for name in changed)
    (name,) = model.edits
    edit = model.edits[name]
    assert isinstance(edit, Edit) and KINDS[kind].endswith(f":{type(edit).__name__}")
    after = sampled(model, MONET, DOG)
    assert not torch.equal(after[0], sampled(original, MONET, DOG)[0])

    fresh = world.model()
    fresh.add_edit(name, build_edit(edit.kind, edit.config(), fresh))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(sampled(fresh, MONET, DOG), after)

    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in edit.parameters():
            parameter.zero_()
    model.remove_edit(name)
    assert torch.equal(sampled(twin, MONET, DOG), after)
    assert torch.equal(sampled(model, MONET, DOG), sampled(original, MONET, DOG))
    with twin.without_edits():
        assert torch.equal(sampled(twin, MONET, DOG), sampled(original, MONET, DOG))
    assert torch.equal(sampled(twin, MONET, DOG), after)


@pytest.mark.parametrize("kind", ALL)
def test_edits_work_in_mixed_precision(kind: str) -> None:
    model = built(kind)
    wanted = sampled(model, MONET, DOG, steps=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = sampled(model, MONET, DOG, steps=2)
    near = F.cosine_similarity(found.float().flatten(1), wanted.flatten(1), dim=1)
    assert torch.isfinite(found).all() and near.min() > 0.95


@pytest.mark.parametrize("kind", ["receler", "sae"])
def test_equal_seeds_give_equal_tensors(kind: str) -> None:
    one, other = built(kind).state_dict(), build(kind).state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("method", [SEOT(SEOT_TINY), Receler(RECELER_TINY), SAeUron(SAE_TINY)])
def test_methods_of_cross_attention_refuse_transformers(
    family: str, method: UnlearningMethod[Any]
) -> None:
    with pytest.raises(ConfigError, match=f"{family} transformer"):
        run(method, family)


@pytest.mark.parametrize(
    "method",
    [SLD(SLDConfig("max")), NegativePrompting(NegativePromptConfig())],
    ids=["sld", "negative"],
)
def test_guidance_is_refused_where_it_is_distilled(method: UnlearningMethod[Any]) -> None:
    with pytest.raises(ConfigError, match="distilled"):
        run(method, "flux")
    for family in ("sdxl", "sd3"):
        model = run(method, family)
        assert not torch.equal(sampled(model, MONET), sampled(world.model(family), MONET))


def test_a_checkpoint_of_another_model_is_refused() -> None:
    membrane = run(SPM(replace(SPM_TINY, steps=0))).active_edits()[0]
    erasers = run(Receler(replace(RECELER_TINY, steps=0))).active_edits()[0]
    other = world.model("sd3")
    with pytest.raises(CheckpointError, match="another model"):
        build_edit("spm", membrane.config(), other)
    with pytest.raises(CheckpointError, match="another model"):
        other.add_edit("receler", build_edit("receler", erasers.config(), other))


# Negative prompt and SLD -------------------------------------------------------------------------


def test_negative_prompt_replaces_the_empty_one() -> None:
    plain = world.model()
    model = run(NegativePrompting(NegativePromptConfig(prompt="name")), target=two())
    latents, text = start_latents(plain, [0, 1]), plain.encode([MONET, DOG])
    wanted = denoise(
        plain, latents, text, plain.encode(["monet, winter"] * 2), Sampling("ddim", 4, 3.0)
    )
    assert torch.equal(sampled(model, MONET, DOG), wanted)
    assert torch.equal(sampled(model, MONET, guidance=1.0), sampled(plain, MONET, guidance=1.0))


def test_concepts_that_do_not_fit_the_window_are_refused() -> None:
    concept = world.erasure().concepts[0]
    many = Erasure(tuple(replace(concept, text=f"style {k} " + "dog " * 5) for k in range(4)))
    with pytest.raises(ConfigError, match="text encoder takes"):
        run(SLD(SLDConfig()), target=many)


def guided(edit: SafetyGuidance, index: int, *parts: Tensor) -> Tensor:
    return edit.guide(Step(index, 50, torch.tensor(1), parts[0], 7.5), *parts)


def test_sld_by_hand() -> None:
    rng = torch.Generator().manual_seed(0)
    edit = SafetyGuidance("", 1, 30.0, 0.02, 0.3, 0.4)
    velocity = [0.0] * 12
    for index in range(3):
        e0, ep, es = (torch.randn(3, 4, 1, 1, generator=rng) / 20 for _ in range(3))
        found = guided(edit, index, e0, ep, es).flatten().tolist()
        rows = zip(e0.flatten().tolist(), ep.flatten().tolist(), es.flatten().tolist(), strict=True)
        for k, (a, p, s) in enumerate(rows):
            mu = min(1.0, abs(p - s) * 30.0) if p - s < 0.02 else 0.0
            push = mu * (s - a) + 0.3 * velocity[k]
            velocity[k] = 0.4 * velocity[k] + 0.6 * push
            wanted = a + 7.5 * (p - a - (push if index >= 1 else 0.0))
            assert found[k] == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_sld_without_scale_or_before_the_warm_up_is_plain_guidance() -> None:
    plain = sampled(world.model(), MONET, DOG)
    for config in (SLDConfig("max", scale=0.0), SLDConfig("max", warmup=4)):
        model = run(SLD(config))
        rows = calls(model)
        assert torch.allclose(sampled(model, MONET, DOG), plain, atol=1e-5)
        assert rows == [6] * 4  # one pass a step, over 3B rows
        edit = model.active_edits()[0]
        assert isinstance(edit, SafetyGuidance) and edit.velocity is not None
        assert bool(edit.velocity.any()) == (config.scale is None)


def test_sld_forgets_its_momentum_between_batches() -> None:
    model = run(SLD(SLDConfig("max")))
    first = sampled(model, MONET)
    assert torch.equal(sampled(model, MONET), first)
    assert not torch.equal(first, sampled(world.model(), MONET))


def test_sld_presets_can_be_changed() -> None:
    assert strength(SLDConfig("strong")) == PRESETS["strong"] == (7, 2000.0, 0.025, 0.5, 0.7)
    assert strength(SLDConfig("weak", momentum=0.1)) == (15, 20.0, 0.0, 0.1, 0.0)


# SEOT --------------------------------------------------------------------------------------------


def test_positions_come_from_the_tokenizer() -> None:
    model = world.model()
    ids = model.tokens(
        ["a Monet tree image", "monet winter monet", "a dogs image", "winter monet x"]
    )
    found = seot.positions(model, ids, ["monet", "winter monet"])
    places = [torch.nonzero(row).flatten().tolist() for row in found]
    assert places == [[2], [1, 2, 3], [], [1, 2]]
    split = model.count_tokens("zebra")
    assert split > 1  # a word of several tokens
    (row,) = seot.positions(model, model.tokens(["a zebra dog"]), ["zebra"])
    assert torch.nonzero(row).flatten().tolist() == list(range(2, 2 + split))
    assert seot.lengths(model, ids).tolist()[:2] == [6, 5]
    assert seot.words_of(torch.tensor([4]), 6).tolist() == [
        [False, True, True, False, False, False]
    ]


def test_soft_weight_shrinks_singular_values() -> None:
    embeds = torch.randn(9, 12, generator=torch.Generator().manual_seed(0)).double()
    targets, rows = torch.tensor([2, 3]), [2, 3, 6, 7, 8]
    before = torch.linalg.svdvals(embeds[rows])
    made = seot.soften(embeds, targets, 7, 0.3)
    wanted = (before * torch.exp(-0.3 * before)).sort(descending=True).values
    assert torch.allclose(torch.linalg.svdvals(made[rows]), wanted)
    assert torch.equal(made[[0, 1, 4, 5]], embeds[[0, 1, 4, 5]])
    assert torch.allclose(seot.soften(embeds, targets, 7, 0.0), embeds)


def test_attention_loss_by_hand() -> None:
    rng = torch.Generator().manual_seed(1)
    cross, own, cross2, own2 = (torch.rand(2, 9, size, generator=rng) for size in (5, 9, 5, 9))
    others = torch.tensor([[0, 1, 0, 1, 0], [0, 1, 1, 0, 0]]).bool()
    targets = torch.tensor([[0, 0, 1, 0, 0], [0, 0, 0, 1, 0]]).bool()
    found = seot.attention_loss((cross, own), (cross2, own2), others, targets, 0.7, 0.4)

    def distance(a: Tensor, b: Tensor) -> float:
        return 1.0 - float(a @ b / (a.norm() * b.norm()))

    for row in range(2):
        wanted = 0.0
        for token in range(5):
            weight = 0.7 * float(others[row, token]) - 0.4 * float(targets[row, token])
            wanted += weight * distance(cross[row, :, token], cross2[row, :, token])
            share = 0.85 if targets[row, token] else 0.95
            for pixel in range(9):
                if cross[row, pixel, token] >= share * cross[row, :, token].max():
                    wanted += weight * distance(own[row, :, pixel], own2[row, :, pixel])
        assert float(found[row]) == pytest.approx(wanted, abs=1e-5)


def test_seot_touches_prompts_and_steps_that_it_names() -> None:
    model, plain = run(SEOT(SEOT_TINY)), world.model()
    both, before = sampled(model, MONET, DOG), sampled(plain, MONET, DOG)
    assert not torch.equal(both[0], before[0])
    assert torch.allclose(both[1], before[1], atol=1e-5)
    assert torch.equal(sampled(model, MONET, stop=1), sampled(plain, MONET, stop=1))
    assert torch.allclose(sampled(model, MONET, DOG)[:1], sampled(model, MONET), atol=1e-4)
    late = run(SEOT(replace(SEOT_TINY, start=1.0)))
    assert torch.equal(sampled(late, MONET, DOG), before)


def test_seot_counts_its_passes() -> None:
    model = run(SEOT(SEOT_TINY))
    rows = calls(model)
    sampled(model, MONET, DOG)
    # Steps 1 and 2 of 4: at the first a pass that finds the grid; the original, two with gradients.
    assert rows == [4] + [1] + [1] * 3 + [4] + [1] * 3 + [4] + [4]


def test_seot_optimises_what_it_says() -> None:
    model = run(SEOT(replace(SEOT_TINY, iterations=5, step_size=0.5)))
    edit, text = model.active_edits()[0], model.encode([MONET])
    assert isinstance(edit, Suppression)
    edit.begin(model, text, text)
    latents, time = start_latents(model, [3]), torch.tensor(300)
    step = Step(1, 4, time, latents, 3.0)
    names = seot.near_layers(model, latents, time, text, 16)
    assert {name.rpartition(".")[2] for name in names} == {"attn1", "attn2"}
    assert edit.soft is not None and edit.targets is not None
    targets = edit.targets
    others = seot.words_of(seot.lengths(model, text.ids), 16) & ~targets

    def loss(embeds: Tensor) -> float:
        with torch.no_grad(), seot.maps_of(model, names) as maps:
            model.predict(latents, time, text)
            original = seot.summaries(maps)
            model.predict(latents, time, replace(text, embeds=embeds))
            now = seot.summaries(maps)
            return float(seot.attention_loss(original, now, others, targets, 1.0, 0.5))

    with torch.no_grad():
        made = edit.before_step(model, step, text)
    assert loss(made.embeds) < loss(edit.soft)
    assert original_processors(model)


def original_processors(model: DiffusionModel) -> bool:
    found = attention.layers(model, "attn1") | attention.layers(model, "attn2")
    return all(not isinstance(m.processor, attention.Recorder) for m in found.values())


def test_near_layers_takes_one_grid() -> None:
    model = world.model()
    latents, text = start_latents(model, [0]), model.encode([MONET])
    large = seot.near_layers(model, latents, torch.tensor(1), text, 16)
    small = seot.near_layers(model, latents, torch.tensor(1), text, 3)
    assert large and small and not set(large) & set(small)
    assert all("down_blocks.0" in name or "up_blocks.1" in name for name in large)


def test_seot_needs_prompts_that_name_the_concept() -> None:
    concept = replace(world.erasure().concepts[0], name="claude")
    with pytest.raises(ConfigError, match="claude"):
        run(SEOT(SEOT_TINY), target=Erasure((concept,)))


def test_seot_works_on_sdxl() -> None:
    model = run(SEOT(SEOT_TINY), "sdxl")
    both, before = sampled(model, MONET, DOG), sampled(world.model("sdxl"), MONET, DOG)
    assert not torch.equal(both[0], before[0])
    assert torch.allclose(both[1], before[1], atol=1e-4)


# SAeUron -----------------------------------------------------------------------------------------


def coder(width: int = 6, features: int = 10, k: int = 3) -> SparseCoder:
    made = SparseCoder(width, features, k)
    made.start(torch.randn(20, width, generator=torch.Generator().manual_seed(2)), 0)
    with torch.no_grad():
        made.bias.normal_(generator=torch.Generator().manual_seed(3))
    return made


def test_codes_are_the_largest_responses() -> None:
    made = coder()
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(4))
    values, features = made.codes(x)
    for row in range(7):
        responses = made.encoder @ (x[row] - made.center) + made.bias
        top = responses.clamp_min(0).sort(descending=True).values[:3]
        assert torch.allclose(values[row].sort(descending=True).values, top, atol=1e-6)
        again = responses[features[row]].clamp_min(0)
        assert torch.allclose(values[row], again, atol=1e-6)
    assert torch.allclose(made.decoder.norm(dim=1), torch.ones(10))


def test_loss_of_the_autoencoder_by_hand() -> None:
    made = coder()
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(4))
    dead = torch.arange(10) >= 8
    terms, fired = made.loss(x, dead, 0.5)
    spread = (x - x.mean(dim=0)).square().sum()
    explained = torch.zeros_like(x)
    hit: set[int] = set()
    rest = torch.zeros_like(x)
    for row in range(7):
        responses = (made.encoder @ (x[row] - made.center) + made.bias).clamp_min(0)
        for feature in responses.argsort(descending=True)[:3].tolist():
            explained[row] += responses[feature] * made.decoder[feature]
            hit |= {feature} if responses[feature] > 0 else set()
        error = x[row] - explained[row] - made.center
        rest[row] = error - sum(responses[f] * made.decoder[f] for f in (8, 9))
    assert terms["error"].item() == pytest.approx(
        float((x - explained - made.center).detach().square().sum() / spread), rel=1e-4
    )
    share = 2 / 3  # two dead features of the three that the term asks for
    assert terms["aux"].item() == pytest.approx(
        0.5 * share * float(rest.square().sum() / spread), rel=1e-4
    )
    assert set(torch.nonzero(fired).flatten().tolist()) == hit
    assert set(made.loss(x, None, 0.5)[0]) == {"error"}


def test_project_keeps_norms_at_first_order() -> None:
    made = coder()
    made.decoder.grad = torch.randn(made.decoder.shape)
    made.project()
    along = (made.decoder.grad * made.decoder).sum(dim=1)
    assert torch.allclose(along, torch.zeros(10), atol=1e-6)


@pytest.mark.parametrize("reference", [False, True])
def test_intervention_by_hand(reference: bool) -> None:
    made = coder()
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(5))
    values, features = made.codes(x)
    floor, scale = torch.full((10,), math.inf), torch.ones(10)
    floor[[1, 4, 6]], scale[[1, 4, 6]] = 0.1, torch.tensor([-2.0, 0.0, -0.5])
    found = sae.intervene(
        x, values, features, made.decoder, made.center, floor[features], scale[features], reference
    )
    dense = torch.zeros(2, 5, 10).scatter(2, features, values)
    after = torch.where(dense > floor, dense * scale, dense)
    assert not torch.equal(dense, after)
    before, now = dense @ made.decoder + made.center, after @ made.decoder + made.center
    wanted = now + (before - x if reference else x - before)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_training_explains_more_and_is_shared_by_requests() -> None:
    method, model = prepared(replace(SAE_TINY, rounds=0))
    trained, _ = prepared(replace(SAE_TINY, rounds=8))
    assert set(trained.prepared) == {
        f"{layer}.{part}"
        for layer in ("up_blocks.1.attentions.0", "up_blocks.1.attentions.1")
        for part in sae.PARTS
    }
    ctx = world.context(model, method)
    layer = SAE_TINY.style_layer
    rows = sae.gathered(ctx, model, [layer], [MONET, DOG], (9, 9), SAE_TINY)[layer]
    assert rows.shape == (2 * 2 * 3 * 64, 16)  # images, both halves of guidance, steps, pixels
    errors = [
        float(m._edit(ctx, model, layer).coder.loss(rows, None, 0)[0]["error"])
        for m in (method, trained)
    ]
    assert errors[1] < 0.8 * errors[0]
    norms = trained.prepared[f"{layer}.decoder"].norm(dim=1)
    assert torch.allclose(norms, torch.ones(32), atol=1e-5)


def test_gathered_keeps_some_places() -> None:
    method, model = SAeUron(SAE_TINY), world.model()
    ctx, layer = world.context(model, method), SAE_TINY.style_layer
    config = replace(SAE_TINY, places=5)
    assert sae.gathered(ctx, model, [layer], [DOG], (0, 0), config)[layer].shape == (2 * 3 * 5, 16)


def test_the_edit_takes_down_the_concepts_features_and_no_others() -> None:
    method, model = prepared(replace(SAE_TINY, multiplier=0.0, rounds=6))
    ctx = world.context(model, method)
    method.run(ctx)
    (edit,) = model.active_edits()
    assert isinstance(edit, FeatureEdit) and edit.layer == SAE_TINY.style_layer
    chosen = torch.isfinite(edit.floor)
    assert int(chosen.sum(dim=1).min()) >= 1 and int(chosen.sum(dim=1).max()) <= 4  # 10 % of 32
    assert (edit.scale[~chosen] == 1).all() and (edit.scale[chosen] == 0).all()
    sampler = model.noising.sampler(Sampling("ddim", 3))
    assert edit.times.tolist() == sampler.timesteps.tolist()
    groups = {"monet": world.erasure().concepts[0].prompts}
    with model.without_edits():
        before, _ = sae.measure(ctx, model, edit, groups, SAE_TINY)
    edit.coder.float()
    after, _ = sae.measure(ctx, model, edit, groups, SAE_TINY)
    taken = (after["monet"] * chosen).sum() / (before["monet"] * chosen).sum()
    assert taken < 0.7
    nothing = prepared(replace(SAE_TINY, percentile=100.0))
    nothing[0].run(world.context(nothing[1], nothing[0]))
    assert torch.equal(predicted(nothing[1], MONET, DOG), predicted(world.model(), MONET, DOG))


def test_the_edit_uses_the_nearest_time_of_each_row() -> None:
    method, model = prepared(SAE_TINY)
    method.run(world.context(model, method))
    (edit,) = model.active_edits()
    assert isinstance(edit, FeatureEdit)
    edit.times.copy_(torch.tensor([900.0, 500.0, 100.0]))
    text, latents = model.encode([MONET, DOG]), start_latents(model, [0, 1])
    with torch.no_grad():
        both = model.predict(latents, torch.tensor([720, 120]), text)
        assert edit.now is not None and edit.now.tolist() == [0, 2]
        alone = model.predict(latents[1:], torch.tensor(120), text.rows([1]))
    assert torch.allclose(both[1:], alone, atol=1e-5)


def test_prompts_are_sorted_by_what_stands_in_the_names_place() -> None:
    concept = Concept(
        "Van Gogh", "style", "Van Gogh style", "", ("A dog image in Van Gogh style",), ("",)
    )
    retain = [
        "A dog image in Monet style",
        "A dog image in Ink Art style",
        "A cat image in Monet style",
        "A dog image in Monet style",
        "An image of dog",
    ]
    assert sae.sorted_prompts([concept], retain) == {
        "Monet": [retain[0], retain[3]],
        "Ink Art": [retain[1]],
        "": [retain[2], retain[4]],
    }


def test_measured_features_are_means_over_conditional_rows() -> None:
    method, model = prepared(SAE_TINY)
    ctx, layer = world.context(model, method), SAE_TINY.style_layer
    edit = method._edit(ctx, model, layer)
    one, counts = sae.measure(ctx, model, edit, {"x": [MONET, DOG]}, replace(SAE_TINY, images=8))
    assert counts == {"x": 2}
    seen: list[Tensor] = []
    with sae.watched(model, [layer], lambda name, x: seen.append(x.clone())):
        sae._make(ctx, model, [MONET, DOG], ("sae", "score", "x", 0), SAE_TINY)
    for step, x in enumerate(seen):
        values, features = edit.coder.codes(x[2:])
        dense = torch.zeros(2, 64, 32).scatter(2, features, values)
        assert torch.allclose(one["x"][step], dense.mean(dim=(0, 1)), atol=1e-6)


def test_sae_names_blocks_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"up_blocks\.1\.attentions\.1"):
        prepared(SAeUronConfig())
    method, model = prepared(SAE_TINY)
    with pytest.raises(ConfigError, match="retains no prompts"):
        method.run(world.context(model, method, target=replace(world.erasure(), retain=())))


def test_two_concepts_share_an_edit_and_sdxl_works() -> None:
    method, model = prepared(SAE_TINY, "sdxl")
    method.run(world.context(model, method, target=two()))
    (edit,) = model.active_edits()
    assert isinstance(edit, FeatureEdit) and torch.isfinite(edit.floor).any()
    assert not torch.equal(predicted(model, MONET), predicted(world.model("sdxl"), MONET))


# SPM ---------------------------------------------------------------------------------------------


def membrane(model: DiffusionModel, scale: float = 0.3, **extra: Any) -> Membrane:
    settings = {"prompts": ["monet"], "rank": 1, "alpha": 1.0, "gate": "once"}
    settings |= {"match": "clipcos_tokenuni"} | extra
    made = Membrane(spm.adapted_layers(model), **settings)
    made.start(0)
    with torch.no_grad():
        for k, up in enumerate(made.up.values()):
            up.normal_(0, scale, generator=torch.Generator().manual_seed(k))
    return made


def test_adapters_are_on_all_layers_of_transformer_blocks() -> None:
    model = world.model()
    names = set(spm.adapted_layers(model))
    assert all(".attentions." in name for name in names)
    wanted = {
        name
        for name, layer in model.denoiser.named_modules()
        if ".attentions." in name and isinstance(layer, (nn.Linear, nn.Conv2d))
    }
    assert names == wanted and any(name.endswith("proj_in") for name in names)
    assert set(spm.adapted_layers(model, "kv")) == {
        f"{name}.{side}" for name in attention.layers(model) for side in ("to_k", "to_v")
    }
    flux = spm.adapted_layers(world.model("flux"))
    assert any(name.startswith("single_transformer_blocks.0.") for name in flux)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_a_membrane_without_gate_or_without_training_does_nothing(family: str) -> None:
    model = world.model(family)
    before = predicted(model, MONET, DOG)
    edit = membrane(model)
    model.add_edit("spm", edit)
    assert not torch.allclose(predicted(model, MONET, DOG), before)
    with edit.held(0.0):
        assert torch.equal(predicted(model, MONET, DOG), before)
    fresh = Membrane(spm.adapted_layers(model), ["monet"], 2, 1.0, "once", "allone")
    fresh.start(1)
    model.remove_edit("spm")
    model.add_edit("spm", fresh)
    assert torch.equal(predicted(model, MONET, DOG), before)


def test_the_gate_is_each_rows_own_and_that_of_its_owner() -> None:
    model = world.model()
    edit = membrane(model)
    model.add_edit("spm", edit)
    both = predicted(model, MONET, DOG)
    assert edit.rows is not None and edit.rows[0] == 1.0 and 0 < edit.rows[1] < 1
    gate = float(edit.rows[1])
    latents, text, time = start_latents(model, [0, 1])[1:], model.encode([DOG]), torch.tensor(500)
    with torch.no_grad(), edit.held(gate):
        assert torch.allclose(model.predict(latents, time, text), both[1:], atol=1e-5)
    with torch.no_grad():
        guided = model.guided(latents, time, text, model.unconditional(), 3.0)
        assert torch.allclose(edit.rows, torch.tensor([gate, gate]))
        with edit.held(gate):
            wanted = model.guided(latents, time, text, model.unconditional(), 3.0)
    assert torch.allclose(guided, wanted, atol=1e-5)


def test_the_reference_gate_is_squared() -> None:
    model = world.model()
    edits = [membrane(model, gate=gate) for gate in ("once", "reference")]
    for edit in edits:
        edit.before_predict(model, model.encode([MONET, DOG]))
    assert edits[0].rows is not None and edits[1].rows is not None
    assert torch.allclose(edits[0].rows.square(), edits[1].rows)


def test_matches_by_hand() -> None:
    model = world.model()
    prompts, erased = [MONET, DOG, "", "monet monet"], ["monet winter winter", "a dog"]
    text, other = model.encode(prompts), model.encode(erased)
    special = model.tokenizer.all_special_ids
    parts = {
        match: spm.similarity(text.ids, text.embeds, other.ids, other.embeds, special, match)
        for match in spm.MATCHES
    }
    for i, prompt in enumerate(prompts):
        for j, gone in enumerate(erased):
            a, b = text.embeds[i].flatten(), other.embeds[j].flatten()
            assert float(parts["clipcos"][i, j]) == pytest.approx(
                float(F.cosine_similarity(a, b, dim=0)), abs=1e-5
            )
            held, words = set(prompt.split()), set(gone.split())
            share = len(held & words) / len(words)
            assert float(parts["tokenuni"][i, j]) == pytest.approx(share)
    assert torch.equal(
        parts["clipcos_tokenuni"], torch.maximum(parts["clipcos"], parts["tokenuni"])
    )
    assert (parts["allone"] == 1).all()


def test_a_membrane_exports_as_plain_lora() -> None:
    model = world.model()
    edit = membrane(model, rank=2, alpha=3.0, match="allone")
    model.add_edit("spm", edit)
    wanted = predicted(model, MONET, DOG)
    model.remove_edit("spm")
    layers = dict(model.denoiser.named_modules())
    with torch.no_grad():
        for name, (down, up) in edit.lora_layers().items():
            product = (up.flatten(1) @ down.flatten(1)).reshape(layers[name].weight.shape)
            layers[name].weight.add_(product)
    assert torch.allclose(predicted(model, MONET, DOG), wanted, atol=1e-4)


def test_random_texts_have_the_targets_norm() -> None:
    for family in ("sd", "sdxl"):
        text = world.model(family).encode(["monet"])
        made = spm.random_texts(text, 200, torch.Generator().manual_seed(0))
        ratio = made.embeds.flatten(1).norm(dim=1) / text.embeds.norm()
        assert 0.8 <= ratio.min() < 0.82 and 1.18 < ratio.max() <= 1.2
        assert (made.pooled is None) == (family == "sd")
    # In one dimension the rule is plain: the target's own direction is never taken.
    line = Conditions(torch.ones(1, 1, 1), None, torch.zeros(1, 1).long(), ("",))
    assert (spm.random_texts(line, 50, torch.Generator().manual_seed(0)).embeds < 0).all()


def test_restarts_are_those_of_diffusers() -> None:
    from diffusers.optimization import get_cosine_with_hard_restarts_schedule_with_warmup

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, 5, 35, 3)
    for step in range(35):
        wanted = optimizer.param_groups[0]["lr"]
        assert spm.restarts(step, 35, 5, 3) == pytest.approx(wanted, abs=1e-9)
        optimizer.step()
        schedule.step()


def test_shortened_steps_are_steps_at_the_schedules_rate() -> None:
    method = SPM(replace(SPM_TINY, steps=8, warmup_steps=2, restarts=2))
    torch.manual_seed(0)
    one = nn.Parameter(torch.randn(5))
    other = nn.Parameter(one.detach().clone())
    method.weights, method.before = [one], [one.detach().clone()]
    held = torch.optim.AdamW([one], lr=0.1, weight_decay=0.1)
    moved = torch.optim.AdamW([other], lr=0.1, weight_decay=0.1)
    for step in range(8):
        gradient = torch.randn(5)
        one.grad, other.grad = gradient.clone(), gradient.clone()
        moved.param_groups[0]["lr"] = 0.1 * spm.restarts(step, 8, 2, 2)
        held.step()
        method.after_step(SimpleNamespace(step=step))  # type: ignore[arg-type]
        moved.step()
    assert torch.allclose(one, other, atol=1e-6)


def errors(
    model: DiffusionModel, original: DiffusionModel, eta: float = 1.0
) -> tuple[float, float]:
    """How far the concept's prediction is from its target, and a kept prompt's from before."""
    latents, time = start_latents(model, range(8)), torch.tensor(500)

    def at(which: DiffusionModel, prompt: str) -> Tensor:
        with torch.no_grad():
            return which.predict(latents, time, which.encode([prompt] * 8))

    e0, ec = at(original, ""), at(original, "monet")
    target = e0 - eta * (ec - e0)
    return (
        float(F.mse_loss(at(model, "monet"), target) / F.mse_loss(ec, target)),
        float(F.mse_loss(at(model, DOG), at(original, DOG)) / F.mse_loss(ec, target)),
    )


def test_spm_moves_the_concept_and_holds_the_rest() -> None:
    config = replace(SPM_TINY, steps=12, lr=0.03, batch_size=4, anchor_weight=0.1)
    original, model = world.model(), run(SPM(config))
    forget, retain = errors(model, original)
    assert forget < 0.7 and retain < 0.5 * (1 - forget)
    stiff = run(SPM(replace(config, anchor_weight=1000.0)))
    assert errors(stiff, original)[0] > forget


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_spm_trains_on_every_family(family: str) -> None:
    model = run(SPM(replace(SPM_TINY, steps=1, neutral="anchor", prompt="prompts")), family)
    (edit,) = model.active_edits()
    assert isinstance(edit, Membrane) and len(edit.prompts) == 3
    assert any(bool(up.any()) for up in edit.up.values())


def test_membranes_of_several_concepts_are_trained_alone_and_added() -> None:
    alone, both = run(SPM(SPM_TINY)), run(SPM(SPM_TINY), target=two())
    one, first, second = (*alone.active_edits(), *both.active_edits())
    assert isinstance(first, Membrane) and isinstance(second, Membrane)
    assert second.prompts == ["winter"]
    state = one.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items())
    trainable = [name for name, p in both.named_parameters() if p.requires_grad]
    assert trainable == [name for name, _ in both.named_parameters() if name.startswith("edits.")]
    with first.held(0.0), second.held(0.0):
        assert torch.equal(predicted(both, MONET), predicted(world.model(), MONET))


def test_no_steps_leave_the_model_as_it_was() -> None:
    for method in (SPM(replace(SPM_TINY, steps=0)), Receler(replace(RECELER_TINY, steps=0))):
        assert torch.equal(predicted(run(method), MONET), predicted(world.model(), MONET))


@pytest.mark.parametrize("make", [lambda: SPM(SPM_TINY), lambda: Receler(RECELER_TINY)])
def test_a_killed_run_goes_on_where_it_was(
    make: Callable[[], UnlearningMethod[Any]], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(make()).state_dict()
    from mmforget import training

    original = training.StepLog.add

    def killed(self: Any, step: int, *args: Any, **kwargs: Any) -> str:
        if step == 3:
            raise KeyboardInterrupt
        return original(self, step, *args, **kwargs)

    def start() -> tuple[UnlearningMethod[Any], Context]:
        method, model = make(), world.model()
        method.resume = tmp_path
        ctx = world.context(model, method)
        runtime = replace(ctx.engine.runtime, checkpoint_every_s=0, log_every=1)
        ctx.engine.runtime = runtime
        return method, ctx

    monkeypatch.setattr(training.StepLog, "add", killed)
    method, ctx = start()
    with pytest.raises(KeyboardInterrupt):
        method.run(ctx)
    monkeypatch.setattr(training.StepLog, "add", original)
    method, ctx = start()
    made = method.run(ctx).state_dict()
    assert ctx.engine.meter.steps == 3
    assert all(torch.equal(value, made[name]) for name, value in whole.items())


# Receler -----------------------------------------------------------------------------------------


def test_erasers_start_as_nothing_and_can_be_switched_off() -> None:
    model = world.model()
    before = predicted(model, MONET)
    widths = {name: layer.to_out[0].out_features for name, layer in attention.layers(model).items()}
    edit = Erasers(widths, 4)
    edit.start(0)
    model.add_edit("receler", edit)
    assert torch.equal(predicted(model, MONET), before)
    with torch.no_grad():
        for eraser in edit.stack:
            eraser[2].weight.normal_()  # type: ignore[index]
    with edit.kept() as outputs:
        assert not torch.allclose(predicted(model, MONET), before)
    assert set(outputs) == set(widths)
    with edit.off():
        assert torch.equal(predicted(model, MONET), before)


def test_the_eraser_reads_the_output_of_cross_attention() -> None:
    model = world.model()
    name, layer = next(iter(attention.layers(model).items()))
    edit = Erasers({name: layer.to_out[0].out_features}, 4)
    edit.start(0)
    with torch.no_grad():
        edit.stack[0][2].weight.normal_()  # type: ignore[index]
    x, text = torch.randn(1, 64, 16), model.encode([MONET]).embeds
    with torch.no_grad():
        before = layer(x, encoder_hidden_states=text)
        model.add_edit("receler", edit)
        after = layer(x, encoder_hidden_states=text)
        first, _, last = edit.stack[0]  # type: ignore[misc]
        wanted = before + last(F.gelu(first(before)))
    assert torch.allclose(after, wanted, atol=1e-6)


def test_the_mask_by_hand() -> None:
    rng = torch.Generator().manual_seed(0)
    maps = attention.Maps({"a": torch.rand(2, 2, 16, 5, generator=rng)})
    maps.probs["b"] = torch.rand(2, 2, 16, 5, generator=rng)
    maps.probs["c"] = torch.rand(2, 2, 64, 5, generator=rng)
    words = torch.tensor([[0.0, 1.0, 1.0, 0.0, 0.0]])
    found = receler.concept_mask(maps, words, 5, 0.3)
    mean = torch.stack([maps.probs["a"][1], maps.probs["b"][1]]).mean(dim=(0, 1))
    seen = mean[:, 1:3].mean(dim=1)
    wanted = (seen - seen.min()) / (seen.max() - seen.min()) >= 0.3
    assert torch.equal(found, wanted.reshape(1, 4, 4)) and 0 < wanted.sum() < 16

    on = torch.tensor([[[True, False], [False, False]]])
    outputs = {"a": torch.randn(1, 16, 3, generator=rng), "b": torch.randn(1, 4, 2, generator=rng)}
    grid = on.repeat_interleave(2, 1).repeat_interleave(2, 2).reshape(16)
    wanted_a = outputs["a"][0].square().mean(dim=1)[~grid].mean()
    wanted_b = outputs["b"][0].square().mean(dim=1)[~on.reshape(4)].mean()
    strayed = receler.off_mask(outputs, on, (4, 4))
    assert torch.allclose(strayed, ((wanted_a + wanted_b) / 2)[None])
    everywhere = receler.off_mask(outputs, torch.ones_like(on), (4, 4))
    assert torch.equal(everywhere, torch.zeros(1))


@pytest.mark.parametrize("inject", ["encoded", "token"])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_adversarial_embeddings_enter_the_prompt(inject: str, family: str) -> None:
    config = replace(RECELER_TINY, inject=inject, steps=0)
    method = Receler(config)
    model = run(method, family, target=two())
    text = model.encode(["monet", "winter", "monet"])
    made = method._worst(model, text, [0, 1, 0])
    start, stop = 2, 5
    if inject == "encoded":
        assert torch.equal(made.embeds[0, start:stop], method.attacks[0])
        assert torch.equal(made.embeds[1, start:stop], method.attacks[1])
        kept = [k for k in range(16) if not start <= k < stop]
        assert torch.equal(made.embeds[:, kept], text.embeds[:, kept])
    else:  # the text encoder is causal: what comes before is as it was
        assert torch.allclose(made.embeds[:, :start], text.embeds[:, :start], atol=1e-5)
        plain = model.encode([f"{word} a a a" for word in ("monet", "winter", "monet")])
        assert (made.embeds[:, start:] - plain.embeds[:, start:]).abs().amax() > 1e-2
    assert torch.allclose(made.embeds[0], made.embeds[2])
    gradients = torch.autograd.grad(made.embeds.square().sum(), method.attacks)
    assert all(bool(gradient.any()) for gradient in gradients)
    assert torch.equal(model.encode(["monet"]).embeds[0], text.embeds[0])


@pytest.mark.parametrize("inject", ["encoded", "token"])
def test_the_attack_brings_the_concept_back(inject: str) -> None:
    found = []
    for steps in (0, 15):
        config = replace(RECELER_TINY, steps=1, lr=0.0, adversarial_steps=steps, inject=inject)
        method = Receler(config)
        model = run(method)
        latents, time = start_latents(model, [0, 1]), torch.tensor(400)
        text = model.encode(["monet"] * 2)
        with torch.no_grad():
            wanted = model.predict(latents, time, text)
            now = model.predict(latents, time, method._worst(model, text, [0, 0]))
        found.append(float(F.mse_loss(now, wanted)))
    assert found[1] < found[0]


def test_receler_moves_the_concept() -> None:
    config = replace(RECELER_TINY, steps=15, batch_size=4, lr=0.015)
    original, model = world.model(), run(Receler(config))
    forget, _ = errors(model, original)
    assert forget < 0.8


def test_the_mask_term_holds_erasers_down() -> None:
    sizes = []
    for weight in (0.0, 1000.0):
        model = run(Receler(replace(RECELER_TINY, steps=5, mask_weight=weight, threshold=1.0)))
        (edit,) = model.active_edits()
        assert isinstance(edit, Erasers)
        with edit.kept() as outputs:
            predicted(model, MONET)
        sizes.append(sum(float(output.square().mean()) for output in outputs.values()))
    assert sizes[1] < 0.5 * sizes[0]


@pytest.mark.parametrize("inject", ["encoded", "token"])
def test_receler_trains_on_sdxl_and_several_concepts(inject: str) -> None:
    method = Receler(replace(RECELER_TINY, inject=inject, prompt="text"))
    before = world.model("sdxl")
    model = run(method, "sdxl", target=two())
    changed = world.changed(before, model)
    assert changed and all(name.startswith("edits.receler_0.") for name in changed)


def test_receler_checks_its_room_and_scope() -> None:
    with pytest.raises(ConfigError, match="window leaves"):
        run(Receler(RecelerConfig(steps=1)))
    with pytest.raises(ConfigError, match="no cross-attention"):
        run(Receler(replace(RECELER_TINY, scope="selfattn")))
    model = run(Receler(replace(RECELER_TINY, steps=0, scope=r".*mid_block.*attn2.*")))
    (edit,) = model.active_edits()
    assert isinstance(edit, Erasers) and all("mid_block" in name for name in edit.widths)


def test_prompt_methods_open_no_split() -> None:
    for method in (SPM, Receler, SLD, NegativePrompting, SEOT, SAeUron):
        assert method.reads == frozenset() and method.modalities == frozenset({"diffusion"})
