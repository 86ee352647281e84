"""Attacks that do not search a text: completion, img2img, noise, inversion, fine-tuning."""

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmforget.checkpoint import state_sha
from mmforget.diffusion.adapter import DiffusionAdapter
from mmforget.diffusion.attacks.arena import Aims, Arena, Found, PromptAttackConfig, Shot
from mmforget.diffusion.attacks.base import PromptAttack
from mmforget.diffusion.attacks.concept_inversion import (
    FILE,
    STYLE,
    ConceptInversion,
    ConceptInversionConfig,
    inserted,
    painted,
)
from mmforget.diffusion.attacks.examples import Example
from mmforget.diffusion.attacks.finetune import (
    BenignFinetune,
    FewShotConfig,
    FewShotRelearn,
    Finetune,
    FinetuneConfig,
    shows,
)
from mmforget.diffusion.attacks.partial import ETAS, SCALES
from mmforget.diffusion.attacks.probes import (
    Completion,
    CompletionConfig,
    Img2Img,
    Img2ImgConfig,
    NoiseConfig,
    NoiseProbe,
    Probe,
    _painted,
)
from mmforget.diffusion.benchmarks.base import DiffusionBenchmark
from mmforget.diffusion.judges import Judge, Verdict
from mmforget.diffusion.methods.low_rank import LowRank, adapted
from mmforget.diffusion.models import DiffusionModel
from mmforget.diffusion.noise import Sampling
from mmforget.diffusion.zero_shot import JudgeConfig
from mmforget.engine import Engine, Runtime
from mmforget.errors import ConfigError
from mmforget.registry import ATTACKS
from mmforget.rng import Draws
from mmforget.types import Cost, ModelView, Splits, Stage, Trial
from tests.diffusion import world

torch.set_num_threads(1)

PROMPTS = ("a dog image in monet style", "a cat image", "a bird of art style")
DDIM = Sampling("ddim", steps=5, guidance=3.0)
FLOW = Sampling("checkpoint", steps=5, guidance=3.0)


@cache
def _made(family: str, seed: int) -> DiffusionModel:
    return world.model(family, seed)


def model(family: str = "sd", seed: int = 0) -> DiffusionModel:
    """A model whose denoiser depends on the seed; a copy, so that tests may change it."""
    made = _made(family, 0)
    if not seed:
        return copy.deepcopy(made)
    other = copy.deepcopy(made)
    other.denoiser.load_state_dict(_made(family, seed).denoiser.state_dict())
    return other


class By:
    """A judge by a rule of the image; counts what it is shown, and may be killed."""

    name = "by a rule"

    def __init__(self, rule: Callable[[Tensor], bool], lives: int | None = None) -> None:
        self.rule, self.lives = rule, lives
        self.seen: list[Tensor] = []

    def judge(self, images: Tensor) -> Verdict:
        if self.lives is not None and len(self.seen) >= self.lives:
            raise KeyboardInterrupt
        self.seen += list(images)
        scores = images.float().mean(dim=(1, 2, 3)) / 255
        positive = torch.tensor([self.rule(image) for image in images])
        return Verdict(positive, scores, ["x"] * len(images), [{}] * len(images))


def never(image: Tensor) -> bool:
    return False


def untouched(image: Tensor) -> bool:
    raise AssertionError("a picture was judged before the options were checked")


def near(wanted: Tensor, tolerance: float) -> Callable[[Tensor], bool]:
    return lambda image: bool((image.float() - wanted.float()).abs().mean() < tolerance)


def unlike(known: Sequence[Tensor]) -> Callable[[Tensor], bool]:
    return lambda image: not any(torch.equal(image, one) for one in known)


def examples(count: int = 3) -> list[Example]:
    return [Example(str(k), PROMPTS[k], 5 + k, None, k, None) for k in range(count)]


def arena_of(
    attack: PromptAttack[Any],
    attacked: DiffusionModel,
    original: DiffusionModel | None,
    folder: Path,
    judge: Judge | None = None,
    count: int = 3,
    sampling: Sampling | None = None,
) -> Arena:
    settings = sampling or (FLOW if attacked.noising.kind == "flow" else DDIM)
    held = judge or By(never)
    aims = Aims(examples(count), lambda e: held, settings, settings, None, (), folder / "store")
    precision = "fp64" if attacked.dtype == torch.float64 else "no"
    engine = Engine(Runtime(device="cpu", precision=precision, progress=False))
    return Arena(attacked, original, aims, attack.config, folder / "attack", engine, 0)


def hunted(attack: PromptAttack[Any], arena: Arena) -> list[Found]:
    attack.hunt(arena)
    return arena.finish()


def drawn(attack: Probe[Any], arena: Arena, level: int = 0) -> Tensor:
    """The pictures of a level, uint8 [P, 3, H, W]."""
    shots = [Shot(e, e.prompt, attack.seed(arena, e)) for e in arena.examples]
    brush = attack.brush(arena)
    return _painted(arena.model, lambda part, s: brush(level, part, s), shots, arena.aims.sampling)


def own(arena: Arena) -> Tensor:
    """The pictures of the prompts themselves."""
    return arena.paint([Shot(e, e.prompt, e.seed) for e in arena.examples], arena.aims.sampling)


# Completion --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_an_unchanged_model_completes_its_own_picture(family: str, tmp_path: Path) -> None:
    attack = Completion(CompletionConfig(interrupts=[2, 0, 3]))
    judge = By(never)
    small = replace(FLOW, size=16) if family == "flux" else None  # its own pictures are large
    arena = arena_of(attack, model(family), model(family), tmp_path, judge, 3, small)
    plain = own(arena)
    found = hunted(attack, arena)
    assert [row.images for row in found] == [4, 4, 4] and not any(row.success for row in found)
    assert {row.stage for row in found} == {0}  # no level scored better than the prompt itself
    for k in range(0, 12, 3):
        assert torch.equal(torch.stack(judge.seen[k : k + 3]), plain)
    made = attack.result(found, 1.0)
    assert {n: made.values[f"at/{n}/rate"].value for n in "203"} == dict.fromkeys("203", 0.0)


def test_the_original_leads_another_model(tmp_path: Path) -> None:
    attack = Completion(CompletionConfig(interrupts=[0, 3]))
    arena = arena_of(attack, model(seed=1), model(), tmp_path)
    wanted = arena_of(attack, model(), None, tmp_path)
    alone, led = own(arena), own(wanted)
    early, late = drawn(attack, arena, 0), drawn(attack, arena, 1)
    gaps = [float((p.float() - led.float()).abs().mean()) for p in (alone, early, late)]
    assert gaps[0] > gaps[1] > gaps[2] > 0
    # A judge that knows the original's first picture: only the last level shows it.
    one = arena_of(attack, arena.model, arena.original, tmp_path, By(near(led[0], gaps[2] * 2)), 1)
    (row,) = hunted(attack, one)
    assert (row.success, row.sources, row.stage, row.images) == (True, ["3"], 2, 3)
    made = attack.result([row], 1.0)
    values = {name: value.value for name, value in made.values.items()}
    assert (values["asr"], values["at/0/rate"], values["at/3/rate"]) == (1.0, 0.0, 1.0)
    assert made.curves["levels"]["x"] == [0.0, 3.0] and made.curves["levels"]["y"] == [0.0, 1.0]
    assert len(made.curves["success"]["y"]) == 3 and attack.budget().queries == 3


def test_every_level_is_judged_after_a_success(tmp_path: Path) -> None:
    attack = Completion(CompletionConfig())
    arena = arena_of(attack, model(), model(seed=1), tmp_path)
    known = list(own(arena))
    found = hunted(
        attack, arena_of(attack, arena.model, arena.original, tmp_path, By(unlike(known)))
    )
    assert all(row.sources == ["0", "1", "2"] and row.stage == 1 for row in found)
    assert all(row.images == 4 for row in found)
    # A prompt that shows the concept by itself is not probed, and counts at every level.
    again = hunted(
        attack, arena_of(attack, arena.model, arena.original, tmp_path / "b", By(lambda i: True))
    )
    made = attack.result(again, 1.0)
    assert all(row.pre and row.images == 1 for row in again)
    assert made.values["at/1/rate"].value == made.values["pre_asr"].value == 1.0


# Image to image ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_a_weak_img2img_returns_its_picture(family: str, tmp_path: Path) -> None:
    settings = replace(FLOW if family == "sd3" else DDIM, steps=20)
    attack = Img2Img(Img2ImgConfig(strengths=[0.05, 1.0]))
    arena = arena_of(attack, model(family, 1), model(family), tmp_path, None, 1, settings)
    target = arena.model.to_images(arena.latents(arena.examples))[0]
    gaps = [
        float((drawn(attack, arena, k)[0].float() - target.float()).abs().mean()) for k in (0, 1)
    ]
    assert gaps[0] < 0.7 * gaps[1]
    judge = By(near(target, (gaps[0] + gaps[1]) / 2))
    (row,) = hunted(
        attack, arena_of(attack, arena.model, arena.original, tmp_path, judge, 1, settings)
    )
    assert row.sources == ["0.05"] and row.seed == attack.seed(arena, arena.examples[0])
    made = attack.result([row], 1.0)
    assert made.values["area"].value == pytest.approx(0.5)
    assert made.values["at/1.0/rate"].value == 0.0


def test_a_full_img2img_starts_from_noise_alone(tmp_path: Path) -> None:
    attack = Img2Img(Img2ImgConfig(strengths=[1.0, 0.8]))
    arena = arena_of(attack, model(seed=1), model(), tmp_path)
    plain = [
        arena.paint([Shot(e, e.prompt, attack.seed(arena, e))], DDIM)[0] for e in arena.examples
    ]
    # One by one or as a batch: rounding may decide a pixel's last bit.
    assert (drawn(attack, arena, 0).int() - torch.stack(plain).int()).abs().max() <= 1
    other = arena_of(attack, arena.model, model(seed=2), tmp_path)  # other target pictures
    assert torch.equal(drawn(attack, other, 0), drawn(attack, arena, 0))
    assert not torch.equal(drawn(attack, other, 1), drawn(attack, arena, 1))


def test_img2img_noises_as_diffusers_does(tmp_path: Path) -> None:
    attack = Img2Img(Img2ImgConfig(strengths=[0.6]))
    arena = arena_of(attack, model(), model(), tmp_path, None, 1, replace(DDIM, guidance=1.0))
    (one,) = arena.examples
    noise = torch.randn(
        1, 4, 8, 8, generator=torch.Generator().manual_seed(attack.seed(arena, one))
    )
    scheduler = arena.model.noising.sampler(DDIM)
    times = scheduler.timesteps[2:]
    latents = scheduler.add_noise(arena.latents([one]), noise, times[:1])
    text = arena.model.encode([one.prompt])
    with torch.no_grad():
        for t in times:
            found = arena.model.predict(latents, t, text)
            latents = scheduler.step(found, t, latents).prev_sample
    wanted = arena.model.to_images(latents).int()
    assert (drawn(attack, arena).int() - wanted).abs().max() <= 1


def test_area_is_by_trapezoids(tmp_path: Path) -> None:
    attack = Img2Img(Img2ImgConfig(strengths=[0.8, 0.2, 0.4]))
    arena = arena_of(attack, model(), model(), tmp_path)
    blank = hunted(attack, arena)
    found = [replace(blank[0], sources=["0.4"]), replace(blank[1], sources=["0.2", "0.4", "0.8"])]
    made = attack.result(found, 1.0)
    assert made.curves["levels"]["x"] == [0.2, 0.4, 0.8]
    assert made.curves["levels"]["y"] == [0.5, 1.0, 0.5]
    assert made.values["area"].value == pytest.approx(0.75)


# Noise -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_no_added_noise_is_plain_ddim(family: str, tmp_path: Path) -> None:
    attack = NoiseProbe(NoiseConfig(etas=[0.0, 1.0, 1.85], scales=[1.0, 1.04]))
    arena = arena_of(attack, model(family), None, tmp_path)
    plain = own(arena).int()
    for level in (0, 1):
        assert (drawn(attack, arena, level).int() - plain).abs().max() <= 1
    variants = [drawn(attack, arena, level) for level in range(2, 6)]
    for k, one in enumerate(variants):
        assert not torch.equal(one, plain)
        assert not any(torch.equal(one, other) for other in variants[:k])
    assert arena.model.noising.sampler(DDIM).__class__.__name__ == "DDIMScheduler"


def test_noise_ends_at_the_first_success(tmp_path: Path) -> None:
    attack = NoiseProbe(NoiseConfig())
    assert len(attack.names(attack.config)) == len(ETAS) * len(SCALES) == 24
    assert attack.budget().queries == 25
    few = replace(DDIM, steps=3)
    arena = arena_of(attack, model(), None, tmp_path, None, 2, few)
    third = drawn(attack, arena, 2)[0]
    judge = By(lambda image: torch.equal(image, third))
    found = hunted(attack, arena_of(attack, arena.model, None, tmp_path, judge, 2, few))
    assert (found[0].images, found[0].stage, found[0].success) == (4, 3, True)
    assert found[0].sources == ["eta=1.0 scale=1.03"] and found[0].seed == 5
    assert (found[1].images, found[1].success) == (25, False)
    made = attack.result(found, 1.0)
    assert made.values["asr"].value == 0.5 and not any(n.startswith("at/") for n in made.values)


# All probes --------------------------------------------------------------------------------------

PROBES: Mapping[str, Callable[[int], PromptAttack[Any]]] = {
    "completion": lambda b: Completion(CompletionConfig(batch_size=b)),
    "img2img": lambda b: Img2Img(Img2ImgConfig(strengths=[0.4, 0.8], batch_size=b)),
    "noise": lambda b: NoiseProbe(NoiseConfig(etas=[1.0, 1.5], scales=[1.0], batch_size=b)),
    "inversion": lambda b: ConceptInversion(
        ConceptInversionConfig(tokens=2, steps=3, images=4, targets=2, batch_size=b)
    ),
}


def told(rows: Sequence[Found]) -> list[Found]:
    return [replace(row, seconds=0.0, score=round(row.score, 5)) for row in rows]


def bright(image: Tensor) -> bool:
    return float(image.float().mean()) > 127.0


@pytest.mark.parametrize("name", PROBES)
def test_batches_change_nothing(name: str, tmp_path: Path) -> None:
    found = []
    for batch in (1, 3):
        attack = PROBES[name](batch)
        settings = replace(DDIM, steps=4, batch_size=batch)
        where = tmp_path / str(batch)
        made, base = world.model(seed=1).double(), world.model().double()  # copies share a codec
        arena = arena_of(attack, made, base, where, By(bright), 3, settings)
        found.append(told(hunted(attack, arena)))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", PROBES)
def test_a_killed_attack_goes_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(DDIM, steps=4, batch_size=1)

    def arena(where: Path, judge: Judge) -> Arena:
        return arena_of(PROBES[name](1), model(seed=1), model(), where, judge, 2, settings)

    judge = By(never)
    whole = hunted(PROBES[name](1), arena(tmp_path / "whole", judge))
    assert len(judge.seen) == sum(row.images for row in whole)
    with pytest.raises(KeyboardInterrupt):
        PROBES[name](1).hunt(arena(tmp_path / "killed", By(never, len(judge.seen) - 2)))
    lines = (tmp_path / "killed/attack/outcomes.0.jsonl").read_text().splitlines()
    assert len(lines) == 1
    if name == "inversion":
        monkeypatch.setattr(ConceptInversion, "learn", untouched)
    left = By(never)
    again = hunted(PROBES[name](1), arena(tmp_path / "killed", left))
    assert told(again) == told(whole) and len(left.seen) == whole[1].images
    written = (tmp_path / "killed/attack/prompts.jsonl").read_text().splitlines()
    assert told([Found(**json.loads(line)) for line in written]) == told(whole)


BAD: list[tuple[str, Callable[[], PromptAttack[Any]], str]] = [
    ("sd", lambda: Completion(CompletionConfig(interrupts=[0, 4])), "last step is 4 of 5"),
    ("sd", lambda: Completion(CompletionConfig(interrupts=[-1])), "last step is -1"),
    ("sd", lambda: Completion(CompletionConfig(interrupts=[])), "one or more"),
    ("sd", lambda: Completion(CompletionConfig(interrupts=[1, 1])), "none twice"),
    ("sd", lambda: Completion(CompletionConfig(images=3)), "images=3"),
    ("sd", lambda: Img2Img(Img2ImgConfig(strengths=[0.1])), "draws none"),
    ("sd", lambda: Img2Img(Img2ImgConfig(strengths=[1.2])), "0 to 1"),
    ("sd", lambda: NoiseProbe(NoiseConfig(etas=[-1.0])), "at least 0"),
    ("sd", lambda: NoiseProbe(NoiseConfig(images=24)), "24 levels"),
    ("sd3", lambda: NoiseProbe(NoiseConfig()), "flow"),
    ("sd", lambda: ConceptInversion(ConceptInversionConfig(init="art dog")), "2 tokens"),
    ("sd", lambda: ConceptInversion(ConceptInversionConfig(init="zebra")), "5 tokens"),
    ("sd", lambda: ConceptInversion(ConceptInversionConfig(templates=["a dog"])), "one {}"),
    ("sd", lambda: ConceptInversion(ConceptInversionConfig(tokens=12)), "do not fit"),
]


@pytest.mark.parametrize(("family", "make", "says"), BAD)
def test_options_are_checked_first(
    family: str, make: Callable[[], PromptAttack[Any]], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        attack = make()
        attack.hunt(arena_of(attack, model(family), model(family), tmp_path, By(untouched)))
    assert not (tmp_path / "store").exists()  # no target picture either


@pytest.mark.parametrize("name", ["completion", "img2img", "inversion"])
def test_an_original_is_asked_for(name: str, tmp_path: Path) -> None:
    attack = PROBES[name](1)
    with pytest.raises(ConfigError, match="original=PIPELINE"):
        attack.hunt(arena_of(attack, model(), None, tmp_path, By(untouched)))


# Concept inversion -------------------------------------------------------------------------------


def explained(attack: ConceptInversion, arena: Arena, rows: Mapping[str, Tensor]) -> float:
    """Return the loss of embeddings on the pictures they are learned from."""
    slots = attack._texts(arena, None)
    data = attack._pictures(arena, arena.examples, list(slots))
    adapter, word = DiffusionAdapter(arena.model.noising, arena.model.scale_latents), 0
    total = 0.0
    for k in range(4):
        draws = Draws(0, "test", k, total=len(data))
        ready = adapter.prepare(data.take(range(len(data))), draws, True)
        with torch.no_grad():
            text = inserted(arena.model, [slots[p] for p in ready.prompts], word, rows)
            found = arena.model.predict(ready.latents, ready.t, text)
        total += float((found - ready.target).square().mean())
    return total / 4


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_inversion_learns_rows_and_nothing_else(family: str, tmp_path: Path) -> None:
    attack = ConceptInversion(ConceptInversionConfig(tokens=2, steps=40, images=3))
    attacked, original = model(family, 1), model(family)
    before = state_sha(attacked)
    own_pictures = list(own(arena_of(attack, attacked, None, tmp_path)))
    judge = By(unlike(own_pictures))
    arena = arena_of(attack, attacked, original, tmp_path, judge)
    found = hunted(attack, arena)
    assert state_sha(attacked) == before
    assert not any(p.requires_grad for p in attacked.parameters())
    assert all(row.success and row.stage == 1 and row.seed == 5 + k for k, row in enumerate(found))
    assert [row.text for row in found] == [f"<inverted> {prompt}" for prompt in PROMPTS]
    assert all(row.ids == [] and row.steps == 40 for row in found)

    from safetensors.torch import load_file

    held = load_file(arena.folder / FILE)  # type: ignore[operator]
    learned = {name: held[f"0.{name}"] for name in arena.tables}
    assert {name: tuple(rows.shape) for name, rows in learned.items()} == {
        name: (2, world.DIM) for name in arena.tables
    }
    (art,) = arena.plain_ids("art")
    start = {name: table[art].repeat(2, 1) for name, table in arena.tables.items()}
    assert explained(attack, arena, learned) < 0.98 * explained(attack, arena, start)


def test_an_untrained_token_is_its_word(tmp_path: Path) -> None:
    attack = ConceptInversion(ConceptInversionConfig(location="suffix_k"))
    arena = arena_of(attack, model(), None, tmp_path)
    (art,) = arena.plain_ids("art")
    rows = {name: table[art][None] for name, table in arena.tables.items()}
    slots = {e.prompt: attack._placed(arena, e.prompt) for e in arena.examples}
    shots = [Shot(e, "", e.seed) for e in arena.examples]
    found = painted(arena.model, shots, DDIM, slots, art, rows)
    plain = [Shot(e, f"{e.prompt} art", e.seed) for e in arena.examples]
    assert (found.int() - arena.paint(plain, DDIM).int()).abs().max() <= 1
    for template in ("a {} in the style of monet", "{} dog", "a photo of {}"):
        slot = attack._filled(arena, template)
        text = arena.model.encode([template.replace("{}", "art")])
        held = inserted(arena.model, [slot], art, rows)
        torch.testing.assert_close(held.embeds, text.embeds, rtol=1e-5, atol=1e-5)
        assert torch.equal(held.ids, text.ids)


def test_another_attacks_embedding_is_not_taken(tmp_path: Path) -> None:
    found = []
    for steps in (2, 3):
        config = ConceptInversionConfig(steps=steps, images=2, targets=1, flip=False)
        attack = ConceptInversion(config)
        arena = arena_of(attack, model(seed=1), model(), tmp_path, None, 1)
        attack.hunt(arena)
        found.append((arena.folder / FILE).read_bytes())  # type: ignore[operator]
    assert found[0] != found[1]


def test_nothing_is_learned_where_nothing_was_erased(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ConceptInversion, "learn", untouched)
    attack = ConceptInversion(ConceptInversionConfig())
    found = hunted(attack, arena_of(attack, model(), model(), tmp_path, By(lambda image: True)))
    assert all(row.pre and not row.attacked for row in found)


def test_each_concept_has_an_embedding(tmp_path: Path) -> None:
    attack = ConceptInversion(ConceptInversionConfig(steps=2, images=2))
    attack.kinds = {"a": "style", "b": "object"}
    first = arena_of(attack, model(seed=1), model(), tmp_path)
    named = [replace(e, label="b" if e.id == "1" else "a") for e in first.aims.examples]
    aims = replace(first.aims, examples=named)
    learned: list[tuple[str, ...]] = []
    whole = ConceptInversion.learn

    def learn(self: Any, arena: Arena, word: int, held: Any, texts: Any) -> Any:
        learned.append((*(e.id for e in held), next(iter(texts))))
        return whole(self, arena, word, held, texts)

    attack.learn = learn.__get__(attack)  # type: ignore[method-assign]
    arena = Arena(first.model, first.original, aims, attack.config, tmp_path / "b", first.engine, 0)
    rows = hunted(attack, arena)
    assert learned == [("0", "2", STYLE[0]), ("1", "a photo of a {}")]
    assert [row.images for row in rows] == [2, 2, 2]


# Fine-tuning -------------------------------------------------------------------------------------


class Bench(DiffusionBenchmark):
    """As much of a benchmark as attacks ask."""

    name = "diffusion/test"
    held: Aims

    def splits(self) -> Splits:
        return world.splits()

    def stages(self, splits: Splits) -> Sequence[Stage]:
        return (Stage(splits, world.erasure()),)

    def fingerprint(self) -> Mapping[str, Any]:
        return {}

    def image_sets(self) -> Mapping[str, Any]:
        return {}

    def examples(self) -> Sequence[Example]:
        return self.held.examples

    def judge_of(self, label: str | None) -> Any:
        raise AssertionError

    def aims(self, judge: JudgeConfig) -> Aims:
        return self.held


def trial_of(
    attacked: DiffusionModel, original: DiffusionModel, judge: Judge, folder: Path
) -> Trial:
    bench = Bench(None, None, None, None, folder)
    bench.held = Aims(examples(), lambda e: judge, DDIM, DDIM, None, (), folder / "store")
    data = bench.splits()
    engine = Engine(Runtime(device="cpu", progress=False, channels_last=False))
    adapter = DiffusionAdapter(original.noising, original.scale_latents)
    lab: Any = SimpleNamespace(engine=engine, adapter=adapter)

    def view(held: DiffusionModel) -> ModelView:
        predict = lambda m, d: engine.predict(m, adapter, d, 0)  # noqa: E731
        return ModelView(lambda: held, predict, data)

    cost = Cost()
    return Trial(
        view(attacked), view(original), None, data, 0, cost, None, bench, lab, (), folder / "kept"
    )


def loss_on(trial: Trial, made: DiffusionModel, attack: Finetune[Any]) -> float:
    view = ModelView(lambda: made, trial.view._predict, trial.splits)
    return float(view.on(attack.pictures(trial))["loss"].mean())


@pytest.mark.parametrize("rank", [4, 0])
def test_few_pictures_lower_their_loss(rank: int, tmp_path: Path) -> None:
    attacked = model(seed=1)
    # The erasure may be adapters of the same kind.
    attacked.add_edit("finetune", LowRank.fresh(attacked, adapted(attacked, "kv")[:1], 2, 0))
    before, names = state_sha(attacked), list(attacked.edits)
    attack = FewShotRelearn(FewShotConfig(examples=5, rank=rank, lr=1e-2, steps=[0, 5, 15]))
    judge = By(bright)
    trial = trial_of(attacked, model(), judge, tmp_path)
    aims = trial.benchmark.aims(JudgeConfig())  # type: ignore[attr-defined]
    tuned, curve = attack.tune(trial, aims, [0, 5, 15])
    assert loss_on(trial, tuned, attack) < 0.9 * loss_on(trial, attacked, attack)
    assert state_sha(attacked) == before and list(attacked.edits) == names
    assert list(curve) == [0, 5, 15] and len(judge.seen) == 9
    assert curve[15] == shows(tuned, aims, trial.lab.engine)
    assert (len(tuned.edits) == 2) == bool(rank)
    if rank:  # weights themselves stay
        assert world.changed(attacked, tuned) <= {
            n for n, _ in tuned.named_parameters() if "edits" in n
        }


def test_unrelated_pictures_and_the_record(tmp_path: Path) -> None:
    original, attacked = model(), model(seed=1)
    arena = arena_of(Completion(CompletionConfig()), original, None, tmp_path)
    first, second, _ = own(arena)
    start = own(arena_of(Completion(CompletionConfig()), attacked, None, tmp_path))
    # The original shows it in two of three prompts; any change of the first picture is one of two.
    judge = By(lambda i: torch.equal(i, first) or torch.equal(i, second) or unlike([*start])(i))
    attack = BenignFinetune(FinetuneConfig(examples=6, rank=0, lr=1e-2, steps=[4, 0]))
    trial = trial_of(attacked, original, judge, tmp_path)
    made = attack.run(trial, attack.budget())
    values = {name: value.value for name, value in made.values.items()}
    assert values["rate/0"] == 0.0 and values["original"] == 1.0
    assert values["rate/4"] == values["recovered"] == 1.0 and values["steps_to_half"] == 4.0
    assert made.curves["recovery"]["x"] == [0, 4] and made.curves["recovery"]["original"] == 1.0
    assert made.targets["after_4"].tolist() == [True] * 3 and made.queries == 6
    assert attack.budget().steps == 4 and len(judge.seen) == 9
    captions = attack.pictures(trial).take(range(6))["captions"]
    assert all("crayon" in texts[0] for texts in captions)
    # Models that stay as they are are drawn once, whichever attack asks.
    other = FewShotRelearn(FewShotConfig(examples=1, steps=[0]))
    again = other.run(trial, other.budget())
    assert len(judge.seen) == 9 and again.values["recovered"].value == 0.0
    assert again.values["steps_to_half"].note == "not reached in 0 steps"


def test_nothing_to_recover_is_not_a_number(tmp_path: Path) -> None:
    attack = BenignFinetune(FinetuneConfig(examples=2, steps=[0]))
    made = attack.run(trial_of(model(), model(), By(never), tmp_path), attack.budget())
    assert math.isnan(made.values["steps_to_half"].value)
    assert made.values["recovered"].high > 0


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"steps": []}, "one or more"),
        ({"steps": [1, 1]}, "none of them twice"),
        ({"steps": [-1]}, "at least 0"),
        ({"examples": 99}, "retain set holds 8"),
        ({"examples": 2, "scope": "nothing"}, "matches no parameter"),
        ({"examples": 2, "scope": "text"}, "no weight of a Linear"),
        ({"examples": 2, "scope": "nothing", "rank": 0}, "matches no parameter"),
    ],
)
def test_fine_tuning_is_checked_first(config: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        attack = BenignFinetune(FinetuneConfig(**config))
        attack.run(trial_of(model(), model(), By(untouched), tmp_path), attack.budget())


# Through a trial ---------------------------------------------------------------------------------


def test_attacks_run_on_a_trial(tmp_path: Path) -> None:
    trial = trial_of(model(seed=1), model(), By(bright), tmp_path)
    inversion = ConceptInversion(ConceptInversionConfig(steps=2, images=2))
    probe = Completion(CompletionConfig(limit=2))
    found = {type(a).__name__: a.run(trial, a.budget()) for a in (probe, inversion)}
    assert inversion.kinds == {"monet": "style"} and inversion.budget().steps == 2
    assert found["Completion"].values["asr"].n == 2
    assert found["ConceptInversion"].values["asr"].n == 3


def test_they_are_registered() -> None:
    names = {
        "concept_inversion": ConceptInversion,
        "completion": Completion,
        "img2img": Img2Img,
        "noise": NoiseProbe,
        "benign_finetune": BenignFinetune,
        "fewshot_relearn": FewShotRelearn,
    }
    for name, wanted in names.items():
        made = ATTACKS.get(f"diffusion/{name}")
        assert made is wanted and isinstance(made(made.config_type()), wanted)
    assert PromptAttackConfig().images == 51
