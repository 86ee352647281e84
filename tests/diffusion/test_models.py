"""Pipelines as modules: the pictures of plain diffusers, copies, text, broken folders."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from mmforget.diffusion import attention
from mmforget.diffusion.methods.negative_prompt import NegativePrompt
from mmforget.diffusion.methods.sld import PRESETS, SafetyGuidance
from mmforget.diffusion.models import DiffusionModel, from_pipe, open_pipeline
from mmforget.diffusion.noise import Sampling
from mmforget.diffusion.sampling import Image, generate, start_latents
from mmforget.errors import ConfigError, DataError
from tests.diffusion import world

torch.set_num_threads(1)
FAMILIES = ("sd", "sdxl", "sd3", "flux")
DOG, CAT = "a dog image in monet style", "a cat image in crayon style"


def drawn(model: DiffusionModel, settings: Sampling, *images: Image) -> Tensor:
    return torch.cat([part for _, part in generate(model, images, settings)])


def plainly(pipe: Any, image: Image, settings: Sampling) -> Tensor:
    """What diffusers itself draws, uint8 [3, H, W]."""
    pipe.set_progress_bar_config(disable=True)
    made = pipe(
        image.prompt,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        height=settings.size,
        width=settings.size,
        output_type="pt",
        generator=torch.Generator().manual_seed(image.seed),
    )
    return (made.images[0] * 255).round().to(torch.uint8)


def apart(a: Tensor, b: Tensor) -> int:
    """The largest difference in levels of 255."""
    return int((a.int() - b.int()).abs().max())


def passes(model: DiffusionModel) -> list[int]:
    """Prompts of every pass of the first text encoder from now on."""
    rows: list[int] = []

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        rows.append(len(args[0] if args else kwargs["input_ids"]))

    model.text_encoder.register_forward_pre_hook(hook, with_kwargs=True)
    return rows


# Pictures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_are_those_of_plain_diffusers(family: str) -> None:
    model, image = world.model(family), Image(DOG, 7)
    settings = Sampling("checkpoint", steps=3, guidance=4.0, size=16)
    found = drawn(model, settings, image)
    assert found.shape == (1, 3, 16, 16) and found.dtype == torch.uint8
    assert found.float().std() > 5
    assert apart(found[0], plainly(world.pipeline(family), image, settings)) <= 1
    assert apart(found[0], drawn(model, settings, Image(CAT, 7))[0]) > 3, "the prompt matters"


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("sampler", ["ddim", "lms", "euler", "dpmsolver"])
def test_samplers_are_those_of_diffusers(sampler: str, guidance: float) -> None:
    classes = {
        "ddim": "DDIMScheduler",
        "lms": "LMSDiscreteScheduler",
        "euler": "EulerDiscreteScheduler",
        "dpmsolver": "DPMSolverMultistepScheduler",
    }
    pipe, image = world.pipeline("sd"), Image(DOG, 3)
    settings = Sampling(sampler, steps=4, guidance=guidance, size=16)
    found = drawn(from_pipe(pipe), settings, image)
    pipe.scheduler = getattr(diffusers, classes[sampler]).from_config(pipe.scheduler.config)
    assert apart(found[0], plainly(pipe, image, settings)) <= 1


def test_ddim_does_not_clip_latents_of_a_pipeline_with_another_scheduler() -> None:
    pipe, image = world.pipeline("sdxl"), Image(DOG, 3)  # an Euler config says nothing of clipping
    settings = Sampling("ddim", steps=4, guidance=5.0, size=16)
    found = drawn(from_pipe(pipe), settings, image)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    assert apart(found[0], plainly(pipe, image, settings)) <= 1


@pytest.mark.parametrize("name", ["EulerAncestralDiscreteScheduler", "DDPMScheduler"])
def test_samplers_that_draw_noise_go_on_from_the_start_latents(name: str) -> None:
    pipe, images = world.pipeline("sd"), [Image(DOG, 3), Image(DOG, 4)]
    config = {**pipe.scheduler.config, "clip_sample": False}
    pipe.scheduler = getattr(diffusers, name).from_config(config)
    settings = Sampling("checkpoint", steps=4, guidance=3.0, size=16)
    found = drawn(from_pipe(pipe), settings, *images)
    for k, image in enumerate(images):
        assert apart(found[k], plainly(pipe, image, settings)) <= 1


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize(
    "settings",
    [{"shift": 3.0}, {"use_dynamic_shifting": True, "base_shift": 0.2, "max_shift": 0.9}],
)
def test_flow_schedules(family: str, settings: dict[str, Any]) -> None:
    pipe, image = world.pipeline(family), Image(DOG, 5)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**settings)
    sampling = Sampling("checkpoint", steps=3, guidance=4.0, size=16)
    model = from_pipe(pipe)
    ours = model.noising.sampler(sampling, image_tokens=16)
    assert apart(drawn(model, sampling, image)[0], plainly(pipe, image, sampling)) <= 1
    torch.testing.assert_close(ours.timesteps, pipe.scheduler.timesteps)
    torch.testing.assert_close(ours.sigmas, pipe.scheduler.sigmas)


def test_flux_without_guidance_ignores_it() -> None:
    pipe, image = world.pipeline("flux"), Image(DOG, 5)
    torch.manual_seed(1)
    config = {**pipe.transformer.config, "guidance_embeds": False}
    pipe.transformer = world._awake(diffusers.FluxTransformer2DModel.from_config(config))
    settings = Sampling("checkpoint", steps=2, guidance=4.0, size=16)
    assert apart(drawn(from_pipe(pipe), settings, image)[0], plainly(pipe, image, settings)) <= 1


def test_the_empty_prompt_of_sdxl_is_what_the_pipeline_says() -> None:
    for zeros in (True, False):
        pipe = world.pipeline("sdxl")
        pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
        model, image = from_pipe(pipe), Image(DOG, 5)
        empty = model.unconditional()
        assert empty.pooled is not None and bool(empty.embeds.any()) != zeros
        assert bool(empty.pooled.any()) != zeros
        settings = Sampling("checkpoint", steps=2, guidance=4.0, size=16)
        assert apart(drawn(model, settings, image)[0], plainly(pipe, image, settings)) <= 1
        assert model.unconditional("a dog").embeds.any()
        assert model.pipe.config.force_zeros_for_empty_prompt is zeros, "written by save_pretrained"


def test_velocity_models(tmp_path: Path) -> None:
    pipe, image = world.pipeline("sd"), Image(DOG, 5)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, prediction_type="v_prediction"
    )
    model = from_pipe(pipe)
    assert model.noising.kind == "v_prediction"
    settings = Sampling("ddim", steps=3, guidance=4.0, size=16)
    assert apart(drawn(model, settings, image)[0], plainly(pipe, image, settings)) <= 1
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="sample")
    with pytest.raises(DataError, match="predicts 'sample'; epsilon, v_prediction and flow"):
        from_pipe(pipe)


def test_broken_weights_are_no_pictures() -> None:
    model = world.model()
    with torch.no_grad():
        model.unet.conv_in.weight.fill_(float("nan"))
    with pytest.raises(DataError, match="not finite"):
        drawn(model, Sampling("ddim", steps=1, size=16), Image(DOG, 0))


@pytest.mark.parametrize(("family", "unit"), [("sd", 2), ("sd3", 4), ("flux", 4)])
def test_sizes(family: str, unit: int) -> None:
    model = world.model(family)
    assert model.scale_factor == 2
    shape = start_latents(model, [0], 12 * unit).shape
    assert shape == (1, 4, 6 * unit, 6 * unit)
    with pytest.raises(ConfigError, match=f"multiple of {unit}"):
        start_latents(model, [0], 12 * unit + unit // 2)
    wanted = (4, 128, 128) if family == "flux" else (4, 8, 8)
    assert model.latent_shape == wanted


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_images_to_latents_and_back(family: str) -> None:
    model = world.model(family)
    config, images = model.vae.config, torch.rand(2, 3, 16, 16) * 2 - 1
    found = model.to_latents(images)
    mean = model.vae.encode(images).latent_dist.mean
    shift = config.shift_factor or 0.0
    torch.testing.assert_close(found, (mean - shift) * config.scaling_factor)
    noise = torch.randn_like(found)
    spread = model.vae.encode(images).latent_dist.std
    torch.testing.assert_close(
        model.to_latents(images, noise), found + noise * spread * config.scaling_factor
    )
    pixels = model.vae.decode(mean).sample
    expected = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round()
    assert apart(model.to_images(found), expected) <= 1


# Predictions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_guided_is_the_formula_and_one_pass(family: str) -> None:
    model = world.model(family)
    latents = start_latents(model, [1, 2], 16)
    text = model.encode([DOG, CAT])
    negative = model.unconditional().repeat(2)
    t = torch.tensor([500, 20])
    rows: list[int] = []
    model.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(args[0] if args else kwargs["hidden_states"])),
        with_kwargs=True,
    )
    with torch.no_grad():
        found = model.guided(latents, t, text, negative, 3.0)
        assert rows == [4]
        plain, bare = model.predict(latents, t, text), model.predict(latents, t, negative)
        torch.testing.assert_close(found, bare + 3.0 * (plain - bare), rtol=1e-4, atol=1e-4)
        rows.clear()
        torch.testing.assert_close(model.guided(latents, t, text, negative, 1.0), plain)
        assert rows == [2]
    assert (plain - bare).abs().mean() > 1e-3


def test_recorded_attention_changes_no_prediction() -> None:
    model = world.model()
    latents, t, text = start_latents(model, [1, 2]), torch.tensor(500), model.encode([DOG, CAT])
    with torch.no_grad():
        before = model.predict(latents, t, text)
        with attention.recorded(model) as maps:
            torch.testing.assert_close(
                model.predict(latents, t, text), before, rtol=1e-4, atol=1e-5
            )
        assert len(maps.probs) == len(attention.layers(model)) == 7
        for probs in maps.probs.values():
            assert probs.shape[0] == 2 and probs.shape[-1] == 16
            torch.testing.assert_close(probs.sum(-1), torch.ones(probs.shape[:-1]))
        layers = [p for p in maps.probs.values() if p.shape[2] == 16]
        torch.testing.assert_close(maps.mean(4), torch.stack([p.mean(1) for p in layers]).mean(0))
        with pytest.raises(ConfigError, match=r"grid of 5; there are \[4, 8\]"):
            maps.mean(5)
        with attention.recorded(model, "both", keep=lambda name: "mid_block" in name) as some:
            model.predict(latents, t, text)
        assert [p.shape[-1] for p in some.probs.values()] == [16, 16] and len(some.probs) == 2
        maps.clear()
        model.predict(latents, t, text)
        assert not maps.probs, "processors are put back"
    with pytest.raises(ConfigError, match="sd3 transformer has joint attention"):
        attention.layers(world.model("sd3"))


# Copies -------------------------------------------------------------------------------------------


def test_copies_have_their_own_weights_and_share_the_codec() -> None:
    model = world.model()
    model.encode([DOG])
    other = copy.deepcopy(model)
    assert other.vae is model.vae and other.tokenizer is model.tokenizer
    assert other.noising is model.noising and other.training == model.training
    assert not world.changed(model, other)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert world.changed(model, other) == set(before)
    assert not any(n.startswith("vae") for n in before)
    assert other.pipe.unet is other.unet and other.pipe.vae is model.vae


def test_copies_keep_edits_that_work_apart() -> None:
    model = world.model()
    image, settings = Image(DOG, 1), Sampling("ddim", steps=2, guidance=4.0, size=16)
    bare = drawn(model, settings, image)
    model.add_edit("away", NegativePrompt("a monet painting"))
    edited = drawn(model, settings, image)
    assert apart(bare, edited) > 0
    other = copy.deepcopy(model)
    assert [e.kind for e in other.active_edits()] == ["negative_prompt"]
    assert other.edits["away"] is not model.edits["away"]
    assert apart(drawn(other, settings, image), edited) == 0
    model.remove_edit("away")
    assert apart(drawn(model, settings, image), bare) == 0
    assert apart(drawn(other, settings, image), edited) == 0
    other.add_edit("safe", SafetyGuidance("monet", **PRESETS["max"]._asdict()))
    with other.without_edits():
        assert not other.active_edits() and apart(drawn(other, settings, image), bare) == 0
    assert list(other.edits) == ["away", "safe"], "in their order"


# Text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_remembered_text_is_what_the_pipeline_encodes(family: str) -> None:
    model = world.model(family)
    with torch.no_grad():
        kept = model.encode([DOG, CAT, DOG, ""])
        fresh = copy.deepcopy(model)._encode([DOG, CAT, DOG, ""])
    torch.testing.assert_close(kept.embeds, fresh[0])
    assert torch.equal(kept.ids, fresh[2]) and kept.prompts == (DOG, CAT, DOG, "")
    assert (kept.pooled is None) == (family == "sd")
    if kept.pooled is not None and fresh[1] is not None:
        torch.testing.assert_close(kept.pooled, fresh[1])
    assert torch.equal(kept.embeds[0], kept.embeds[2])
    assert (kept.embeds[0] - kept.embeds[1]).abs().max() > 1e-3


def test_each_prompt_is_encoded_once() -> None:
    model = world.model()
    model.text_encoder.requires_grad_(False)
    rows = passes(model)
    model.encode([DOG, CAT, DOG])
    assert rows == [2]
    model.encode([CAT, "a bird", DOG, "a bird"])
    assert rows == [2, 1]
    settings = Sampling("ddim", steps=1, size=16, batch_size=2)
    drawn(model, settings, *[Image(p, s) for s in range(3) for p in (DOG, CAT)])
    assert rows == [2, 1, 1], "only the empty prompt is new"


def test_many_prompts_are_encoded_in_parts() -> None:
    model = world.model()
    model.text_encoder.requires_grad_(False)
    rows = passes(model)
    prompts = [f"a {a} {b} {c}" for a in world.WORDS for b in world.WORDS for c in "xy"][:150]
    found = model.encode(prompts)
    assert sum(rows) == 150 and max(rows) <= 64
    torch.testing.assert_close(found.embeds[149:], model._encode(prompts[149:])[0])


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_a_change_of_any_text_encoder_is_seen(family: str) -> None:
    model = world.model(family).requires_grad_(False)
    for name, encoder in model.text_encoders.items():
        before = model.encode([DOG])
        with torch.no_grad():
            next(p for n, p in encoder.named_parameters() if "embed" in n or "shared" in n).mul_(2)
        after = model.encode([DOG])
        moved = (after.embeds - before.embeds).abs().max()
        if family == "flux" and name == "text_encoder":  # only its pooled text is used
            assert after.pooled is not None and before.pooled is not None
            moved = (after.pooled - before.pooled).abs().max()
        assert moved > 1e-3, name


def test_loading_and_optimiser_steps_are_seen() -> None:
    model, other = world.model(), world.model(seed=3)
    model.requires_grad_(False)
    model.encode([DOG])
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model.encode([DOG]).embeds, other.encode([DOG]).embeds)
        before = other.encode([DOG]).embeds
    optimiser = torch.optim.Adam(other.text_encoder.parameters(), lr=0.01)
    other.encode([DOG]).embeds.square().sum().backward()
    optimiser.step()
    with torch.no_grad():
        assert (other.encode([DOG]).embeds - before).abs().max() > 1e-3


def test_moving_a_model_moves_its_text_and_codec() -> None:
    model = world.model().requires_grad_(False)
    model.encode([DOG])
    model.double()
    assert model.encode([DOG]).embeds.dtype == torch.float64
    assert next(model.vae.parameters()).dtype == torch.float64
    assert model.dtype == torch.float64 and model.device.type == "cpu"


def test_text_kept_under_inference_mode_serves_training() -> None:
    model = world.model()
    model.text_encoder.requires_grad_(False)
    with torch.inference_mode():
        model.encode([DOG])
    text = model.encode([DOG])
    latents = start_latents(model, [0])
    model.predict(latents, torch.tensor(3), text).square().mean().backward()
    key = next(p for n, p in model.unet.named_parameters() if "attn2.to_k" in n)
    assert key.grad is not None and key.grad.abs().sum() > 0


def test_gradients_flow_through_text_encoders_that_train() -> None:
    model = world.model("sdxl")
    with torch.no_grad():
        model.encode([DOG])  # what is remembered must not stand in
    model.predict(
        start_latents(model, [0]), torch.tensor(3), model.encode([DOG])
    ).square().mean().backward()
    for name, encoder in model.text_encoders.items():
        first = next(p for n, p in encoder.named_parameters() if "q_proj.weight" in n)
        assert first.grad is not None and first.grad.abs().sum() > 0, name
    with torch.no_grad():
        assert not model.encode([DOG]).embeds.requires_grad
    model.requires_grad_(False)
    assert not model.encode([DOG]).embeds.requires_grad


def test_what_is_kept_has_no_dropout_and_full_precision() -> None:
    model = world.model("flux").requires_grad_(False)
    wanted = model.encode([DOG]).embeds
    model._memo.clear()
    model.train()
    assert torch.equal(model.encode([DOG]).embeds, wanted), "T5 has dropout in training"
    assert model.text_encoder_2.training, "modes are put back"
    sd = world.model().requires_grad_(False)
    wanted = copy.deepcopy(sd).encode([DOG]).embeds
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sd.encode([DOG])
    assert torch.equal(sd.encode([DOG]).embeds, wanted)


def test_tokens() -> None:
    model = world.model()
    ids = model.tokens([DOG, ""])
    assert ids.shape == (2, 16) and ids.dtype == torch.int64
    assert model.count_tokens(DOG) == 6 and model.count_tokens("") == 0
    assert model.count_tokens("dog " * 40) == 40, "however many they are"
    assert model.window == 14
    start, end = model.tokenizer.bos_token_id, model.tokenizer.eos_token_id
    assert ids[0, 0] == start and ids[0, 7] == end and ids[1, 1] == end


# Folders ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "sd"
    world.pipeline("sd").save_pretrained(folder)
    return folder


def test_a_saved_pipeline_opens_with_the_same_weights(saved: Path) -> None:
    model = open_pipeline(str(saved))
    assert model.family == "sd" and not model.training
    assert not world.changed(world.model(), model)
    settings, image = Sampling("ddim", steps=2, size=16), Image(DOG, 1)
    assert apart(drawn(model, settings, image), drawn(world.model(), settings, image)) == 0
    assert open_pipeline(str(saved), torch.bfloat16).dtype == torch.bfloat16


def unindexed(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def unscheduled(folder: Path) -> None:
    shutil.rmtree(folder / "scheduler")


def torn(folder: Path) -> None:
    (folder / "model_index.json").write_text('{"_class_name": "StableDiff')


def listed(folder: Path) -> None:
    (folder / "model_index.json").write_text("[1, 2]")


def named(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        index = folder / "model_index.json"
        index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": name}))

    return change


def unlisted(folder: Path) -> None:
    index = folder / "model_index.json"
    content = json.loads(index.read_text())
    del content["vae"]
    index.write_text(json.dumps(content))


def weightless(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()


def truncated(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def cut_text(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def wordless(folder: Path) -> None:
    for path in (folder / "tokenizer").iterdir():
        path.write_text("no tokenizer")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (unindexed, "no model_index.json but"),
        (unscheduled, "no folder scheduler"),
        (torn, "is no JSON"),
        (listed, "names None; supported are StableDiffusionPipeline"),
        (named("AudioLDMPipeline"), "names AudioLDMPipeline; supported are"),
        (unlisted, "lists no vae"),
        (weightless, "cannot be opened"),
        (truncated, "cannot be opened"),
        (cut_text, "cannot be opened"),
        (wordless, "cannot be opened"),
    ],
    ids=lambda value: getattr(value, "__name__", "")[:12] or None,
)
def test_broken_folders(
    saved: Path, tmp_path: Path, harm: Callable[[Path], None], said: str
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(saved, folder)
    harm(folder)
    with pytest.raises(DataError, match=said):
        open_pipeline(str(folder))


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be opened"):
        open_pipeline(str(tmp_path / "nothing"))


def test_pipelines_of_other_kinds() -> None:
    class Other:
        pass

    with pytest.raises(DataError, match="a Other is not supported"):
        from_pipe(Other())
