"""Noising against diffusers, batched and partial denoising, hooks of edits, scopes by name."""

from collections.abc import Sequence
from typing import Any, ClassVar

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from mmforget.diffusion import scopes
from mmforget.diffusion.conditions import Conditions, cat
from mmforget.diffusion.edits import Edit, Step
from mmforget.diffusion.models import DiffusionModel, from_pipe
from mmforget.diffusion.noise import Noising, Sampling
from mmforget.diffusion.sampling import Image, denoise, generate, start_latents
from mmforget.errors import ConfigError, DataError
from mmforget.rng import Draws
from tests.diffusion import world

torch.set_num_threads(1)
DOG, CAT, BIRD = "a dog image in monet style", "a cat image", "a bird"
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def drawn(model: DiffusionModel, settings: Sampling, images: Sequence[Image]) -> Tensor:
    return torch.cat([part for _, part in generate(model, images, settings)])


def conditions(model: DiffusionModel, *prompts: str) -> tuple[Conditions, Conditions]:
    return model.encode(prompts), model.unconditional().repeat(len(prompts))


def rows_of(model: DiffusionModel) -> list[int]:
    """Rows of every pass of the denoiser from now on."""
    rows: list[int] = []
    model.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(args[0] if args else kwargs["hidden_states"])),
        with_kwargs=True,
    )
    return rows


# Noising ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noising_is_that_of_diffusers(kind: str) -> None:
    theirs = DDPMScheduler(**SD, prediction_type=kind)
    ours = Noising(theirs)
    assert ours.kind == kind and ours.steps == 1000
    clean, noise = torch.randn(2, 5, 4, 3, 3)
    t = torch.tensor([0, 1, 500, 998, 999])
    torch.testing.assert_close(
        ours.add(clean, noise, t), theirs.add_noise(clean, noise, t), rtol=1e-5, atol=1e-6
    )
    wanted = noise if kind == "epsilon" else theirs.get_velocity(clean, noise, t)
    torch.testing.assert_close(ours.target(clean, noise, t), wanted, rtol=1e-5, atol=1e-6)
    half = ours.add(clean.half(), noise.half(), t)
    assert half.dtype == torch.float16


def test_flow_noising_is_that_of_diffusers() -> None:
    theirs = FlowMatchEulerDiscreteScheduler()
    ours = Noising(theirs)
    assert ours.kind == "flow"
    clean, noise = torch.randn(2, 3, 4, 3, 3)
    t = torch.tensor([1.0, 250.0, 1000.0])  # times the scheduler has
    torch.testing.assert_close(
        ours.add(clean, noise, t), theirs.scale_noise(clean, t, noise), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(ours.target(clean, noise, t), noise - clean)
    assert torch.equal(ours.snr_weight(t, 5.0), torch.ones(3))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_a_perfect_prediction_leads_back_to_the_image(kind: str) -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler()
    if kind != "flow":
        scheduler = DDPMScheduler(**SD, prediction_type=kind)
    ours = Noising(scheduler)
    clean, noise = torch.randn(2, 2, 4, 3, 3, dtype=torch.float64)
    t = torch.tensor([300, 700])
    seen, target = ours.add(clean, noise, t), ours.target(clean, noise, t)
    image, level = ours.levels(t, clean)
    back = {
        "epsilon": lambda: (seen - level * target) / image,
        "v_prediction": lambda: image * seen - level * target,
        "flow": lambda: seen - level * target,
    }[kind]()
    torch.testing.assert_close(back, clean)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights(gamma: float) -> None:
    alphas = DDPMScheduler(**SD).alphas_cumprod.double()
    t = torch.tensor([0, 100, 600, 999])
    snr = alphas[t] / (1 - alphas[t])
    least = torch.minimum(snr, torch.full_like(snr, gamma))
    for kind, wanted in (("epsilon", least / snr), ("v_prediction", least / (snr + 1))):
        found = Noising(DDPMScheduler(**SD, prediction_type=kind)).snr_weight(t, gamma)
        torch.testing.assert_close(found, wanted.float())
    assert snr[0] > gamma > snr[3], "both sides of the minimum are seen"


def test_times() -> None:
    ours, flow = Noising(DDPMScheduler(**SD)), Noising(FlowMatchEulerDiscreteScheduler())
    found = ours.times(Draws(0, "t", total=4000))
    assert found.dtype == torch.int64 and 0 <= found.min() < 5 and 995 < found.max() < 1000
    assert torch.equal(found, ours.times(Draws(0, "t", total=4000)))
    times = flow.times(Draws(0, "t", total=4000))
    assert times.dtype == torch.float32 and 0 <= times.min() < 2 and 998 < times.max() < 1000
    assert (times % 1 != 0).any()
    assert abs(float(times.mean()) - 500) < 20 and abs(float(found.float().mean()) - 500) < 20


def test_sampler_errors() -> None:
    flow = Noising(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ConfigError, match="sampler=lms: a flow model has its own"):
        flow.sampler(Sampling("lms"))
    assert len(flow.sampler(Sampling("ddim", steps=7)).timesteps) == 7, "the default is let through"
    with pytest.raises(DataError, match="predicts 'sample'"):
        Noising(DDPMScheduler(prediction_type="sample"))


def test_checkpoint_is_the_own_sampler() -> None:
    ours = Noising(diffusers.PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=1))
    assert type(ours.sampler(Sampling("checkpoint", steps=5))).__name__ == "PNDMScheduler"
    made = ours.sampler(Sampling("ddim", steps=5))
    assert isinstance(made, DDIMScheduler) and len(made.timesteps) == 5
    assert not made.config.clip_sample and made.config.steps_offset == 1
    assert made.config.beta_schedule == "scaled_linear"


# Conditions ---------------------------------------------------------------------------------------


def test_rows_of_conditions() -> None:
    model = world.model("sdxl")
    made = model.encode([DOG, CAT, BIRD])
    some = made.rows([2, 0, 0])
    assert some.prompts == (BIRD, DOG, DOG) and len(some) == 3
    assert torch.equal(some.embeds, made.embeds[[2, 0, 0]])
    assert some.pooled is not None and made.pooled is not None
    assert torch.equal(some.pooled, made.pooled[[2, 0, 0]])
    assert torch.equal(some.ids, made.ids[[2, 0, 0]])
    assert made.repeat(2).prompts == (DOG, DOG, CAT, CAT, BIRD, BIRD)
    joined = cat([some, made])
    assert joined.prompts == (BIRD, DOG, DOG, DOG, CAT, BIRD) and len(joined) == 6
    assert joined.pooled is not None and torch.equal(joined.pooled[3:], made.pooled)
    assert made.embeds.requires_grad and not made.detach().embeds.requires_grad


# Denoising ----------------------------------------------------------------------------------------


def test_start_latents_are_those_of_each_seed() -> None:
    model = world.model()
    found = start_latents(model, [5, 9])
    for k, seed in enumerate((5, 9)):
        wanted = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(found[k : k + 1], wanted)


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_batch_size_and_order_change_no_picture(family: str) -> None:
    model = world.model(family)
    images = [Image(DOG, 1), Image(CAT, 1), Image(DOG, 2), Image(BIRD, 3), Image(CAT, 1)]

    def draw(size: int, order: Sequence[Image]) -> Tensor:
        settings = Sampling("checkpoint", steps=2, guidance=3.0, batch_size=size, size=16)
        return drawn(model, settings, order).int()

    found = draw(5, images)
    assert (found - draw(2, images)).abs().max() <= 1
    assert (found - draw(3, images[::-1]).flip(0)).abs().max() <= 1
    assert (found[1] - found[4]).abs().max() <= 1, "equal prompt and seed"
    assert (found[0] - found[2]).abs().max() > 5, "another seed"
    assert (found[0] - found[1]).abs().max() > 5, "another prompt"


def test_places_of_generated_images() -> None:
    model, settings = world.model(), Sampling("ddim", steps=1, batch_size=2, size=16)
    parts = list(generate(model, [Image(DOG, s) for s in range(5)], settings))
    assert [rows for rows, _ in parts] == [range(0, 2), range(2, 4), range(4, 5)]
    assert [len(pixels) for _, pixels in parts] == [2, 2, 1]
    assert list(generate(model, [], settings)) == []


def test_a_negative_prompt() -> None:
    model, settings = world.model(), Sampling("ddim", steps=2, guidance=4.0, size=16)
    images = [Image(DOG, 1)]
    text = model.encode([DOG])
    latents = denoise(model, start_latents(model, [1], 16), text, model.encode([CAT]), settings)
    found = torch.cat([p for _, p in generate(model, images, settings, negative=CAT)])
    assert torch.equal(found, model.to_images(latents))
    assert not torch.equal(found, drawn(model, settings, images))


@pytest.mark.parametrize("sampler", ["ddim", "euler", "flow", "ancestral"])
def test_partial_denoising_goes_on_where_it_stopped(sampler: str) -> None:
    pipe = world.pipeline("sd3" if sampler == "flow" else "sd")
    if sampler == "ancestral":
        pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(
            pipe.scheduler.config
        )
    model = from_pipe(pipe)
    name = sampler if sampler in ("ddim", "euler") else "checkpoint"
    settings = Sampling(name, steps=5, guidance=3.0)
    (text, empty), seeds = conditions(model, DOG, CAT), [3, 4]
    start = start_latents(model, seeds)
    steps: list[int] = []

    def part(latents: Tensor, first: int, last: int | None) -> Tensor:
        return denoise(
            model,
            latents,
            text,
            empty,
            settings,
            start=first,
            stop=last,
            seeds=seeds,
            watch=lambda step, _: steps.append(step.index),
        )

    whole = part(start, 0, None)
    assert steps == [0, 1, 2, 3, 4]
    for k in (1, 3):
        torch.testing.assert_close(part(part(start, 0, k), k, None), whole, rtol=1e-4, atol=1e-4)
    assert torch.equal(part(start, 0, 0), start) == (sampler in ("ddim", "flow"))  # Euler scales it
    assert (part(start, 0, 3) - whole).abs().max() > 0.01


def test_one_pass_a_step() -> None:
    model = world.model()
    rows = rows_of(model)
    text, empty = conditions(model, DOG, CAT)
    start = start_latents(model, [1, 2])
    denoise(model, start, text, empty, Sampling("ddim", steps=3, guidance=1.0))
    assert rows == [2, 2, 2], "no guidance: conditional rows only"
    rows.clear()
    denoise(model, start, text, empty, Sampling("ddim", steps=3, guidance=2.0))
    assert rows == [4, 4, 4], "both halves together"
    rows.clear()
    flux = world.model("flux")
    rows = rows_of(flux)
    text, empty = conditions(flux, DOG, CAT)
    denoise(
        flux, start_latents(flux, [1, 2], 16), text, empty, Sampling("checkpoint", 3, guidance=2.0)
    )
    assert rows == [2, 2, 2], "guidance is an input"


def test_ddim_by_hand() -> None:
    model = world.model()
    settings = Sampling("ddim", steps=2, guidance=3.0)
    text, empty = conditions(model, DOG)
    scheduler = model.noising.sampler(settings)
    latents = start_latents(model, [1])
    alphas = scheduler.alphas_cumprod
    for now, then in ((501, 1), (1, None)):
        t = torch.tensor(now)
        with torch.no_grad():
            bare, full = model.predict(latents, t, empty), model.predict(latents, t, text)
        noise = bare + 3.0 * (full - bare)
        clean = (latents - (1 - alphas[now]).sqrt() * noise) / alphas[now].sqrt()
        after = scheduler.final_alpha_cumprod if then is None else alphas[then]
        latents = after.sqrt() * clean + (1 - after).sqrt() * noise
    found = denoise(model, start_latents(model, [1]), text, empty, settings)
    torch.testing.assert_close(found, latents, rtol=1e-3, atol=1e-3)


class Noted(Edit):
    """Adds a third prompt to every step, and leaves it out of the result."""

    kind: ClassVar[str] = "noted"
    citation: ClassVar[str] = "none"

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.owners: list[tuple[str, ...]] = []

    def config(self) -> dict[str, Any]:
        return {}

    def before_predict(self, model: DiffusionModel, owner: Conditions) -> None:
        self.owners.append(owner.prompts)

    def extra(self, model: DiffusionModel, text: Conditions) -> Conditions:
        return model.encode([BIRD]).repeat(len(text))

    def before_step(self, model: DiffusionModel, step: Step, text: Conditions) -> Conditions:
        self.steps.append(step)
        return text

    def guide(
        self, step: Step, unconditional: Tensor, conditional: Tensor, extra: Tensor | None
    ) -> Tensor:
        assert extra is not None and extra.shape == conditional.shape
        return unconditional + 2.0 * (extra - unconditional)


def test_edits_see_each_step_and_may_combine_predictions() -> None:
    model, edit = world.model(), Noted()
    text, empty = conditions(model, DOG, CAT)
    bird, start = model.encode([BIRD, BIRD]), start_latents(model, [1, 2])
    settings = Sampling("ddim", steps=2, guidance=2.0)
    wanted = denoise(model, start, bird, empty, settings)
    model.add_edit("noted", edit)
    rows = rows_of(model)
    found = denoise(model, start, text, empty, settings)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert rows == [6, 6]
    assert [(s.index, s.count, s.guidance, int(s.time)) for s in edit.steps] == [
        (0, 2, 2.0, 501),
        (1, 2, 2.0, 1),
    ]
    assert edit.owners == [(DOG, CAT) * 3] * 2, "every row names the prompt whose image it serves"
    with torch.no_grad():
        model.guided(start, torch.tensor(3), text, empty, 2.0)
    assert edit.owners[-1] == (DOG, CAT) * 2


# Scopes -------------------------------------------------------------------------------------------


def names(model: DiffusionModel, scope: str) -> set[str]:
    return set(scopes.parameters(model, scope))


def test_scopes_of_a_unet() -> None:
    model = world.model()
    unet = {f"unet.{n}" for n, _ in model.unet.named_parameters()}
    text = {f"text_encoder.{n}" for n, _ in model.text_encoder.named_parameters()}
    assert names(model, "all") == names(model, "full") == unet
    assert names(model, "text") == text and names(model, "pipeline") == unet | text
    assert names(model, "head") == {
        f"unet.{n}.{kind}" for n in ("conv_norm_out", "conv_out") for kind in ("weight", "bias")
    }
    kv = {n for n in unet if ".attn2.to_k." in n or ".attn2.to_v." in n}
    assert names(model, "kv") == names(model, "esd-x-strict") == kv and len(kv) == 14
    cross = {n for n in unet if ".attn2." in n}
    assert names(model, "esd-x") == names(model, "xattn") == cross > kv
    assert names(model, "selfattn") == {n for n in unet if ".attn1." in n}
    wide = {
        f"unet.{n}.{inner}"
        for n, layer in model.unet.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
        for inner, _ in layer.named_parameters()
    }
    assert names(model, "esd-all") == wide
    assert names(model, "esd-u") == names(model, "noxattn") == wide - cross
    assert names(model, r"unet\.conv_in\..*") == {"unet.conv_in.weight", "unet.conv_in.bias"}


def test_scopes_of_text_layers() -> None:
    model = world.model()
    text = names(model, "text")
    norm = {n for n in text if "final_layer_norm" in n}
    first = {n for n in text if ".layers.0." in n}
    assert names(model, "text:0") == norm and len(norm) == 2
    assert names(model, "text:1") == norm | first
    assert names(model, "text:12") == norm | {n for n in text if ".layers." in n}
    both = world.model("sdxl")
    assert names(both, "text:1") == names(model, "text:1"), "of the first encoder only"
    assert {n.partition(".")[0] for n in names(both, "text")} == {"text_encoder", "text_encoder_2"}


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_scopes_of_joint_attention(family: str) -> None:
    model = world.model(family)
    kv, cross = names(model, "kv"), names(model, "esd-x")
    assert kv and all(".attn.add_k_proj." in n or ".attn.add_v_proj." in n for n in kv)
    assert kv < cross and any(".attn.to_q." in n for n in cross)
    assert not any("norm" in n.rpartition("attn")[2] for n in cross)
    assert not cross & names(model, "esd-u")
    assert cross | names(model, "esd-u") == names(model, "esd-all")
    assert all(n.startswith("transformer.") for n in names(model, "head"))
    if family == "flux":
        assert any("single_transformer_blocks.0.proj_out." in n for n in cross)


@pytest.mark.parametrize(
    ("scope", "said"),
    [
        ("edits", "'edits' matches no parameter. Accepted: all"),
        ("unet.no_such", "matches no parameter"),
        ("conv_in", "whole names"),
        ("(", "no regular expression"),
        ("text:", "text:N takes a number"),
        ("text:-1", "text:N takes a number"),
        ("text:two", "such as text:12"),
    ],
)
def test_scopes_that_are_none(scope: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        scopes.parameters(world.model(), scope)


def test_the_scope_of_edits() -> None:
    model, edit = world.model(), Noted()
    edit.gate = nn.Parameter(torch.zeros(2))
    model.add_edit("noted", edit)
    assert names(model, "edits") == {"edits.noted.gate"}
    assert "edits.noted.gate" not in names(model, "pipeline")


def test_sdxl_leaves_embeddings_alone() -> None:
    model = world.model("sdxl")
    trained = names(model, "esd-u")
    assert trained and not any("emb" in n for n in trained)
    assert all("block" in n for n in trained)
