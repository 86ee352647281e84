"""Attacks on prompts as a whole: searches on tiny pipelines, judged by hand-made judges."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmforget.diffusion import ENTRIES
from mmforget.diffusion.attacks import genetic
from mmforget.diffusion.attacks.arena import Aims, Arena, Candidate, Found, Ruling, Shot, volley
from mmforget.diffusion.attacks.base import PromptAttack
from mmforget.diffusion.attacks.coordinate import cosine_loss
from mmforget.diffusion.attacks.examples import Example
from mmforget.diffusion.attacks.first_encoder import (
    last_states,
    ordinary_ids,
    pooled,
    windows,
)
from mmforget.diffusion.attacks.gradient import GradientConfig
from mmforget.diffusion.attacks.hard_prompt import HardPrompt, HardPrompts
from mmforget.diffusion.attacks.mma import MMA, MMAConfig, PooledSearch
from mmforget.diffusion.attacks.no_attack import NoAttack, NoAttackConfig
from mmforget.diffusion.attacks.p4d import P4D, DebuggingPrompts, P4DConfig
from mmforget.diffusion.attacks.random_tokens import RandomConfig, RandomTokens
from mmforget.diffusion.attacks.relaxed import RowAdam, nearest_tokens
from mmforget.diffusion.attacks.ring_a_bell import RingABell, RingABellConfig
from mmforget.diffusion.attacks.seed_search import SeedSearch
from mmforget.diffusion.attacks.text_grad import TextGrad
from mmforget.diffusion.attacks.transfer import Transfer, TransferConfig
from mmforget.diffusion.judges import Verdict
from mmforget.diffusion.models import DiffusionModel
from mmforget.diffusion.noise import Sampling
from mmforget.diffusion.sampling import Image, generate
from mmforget.engine import Engine, Runtime
from mmforget.errors import ConfigError, DataError
from mmforget.record import AttackResult
from mmforget.registry import ATTACKS
from tests.diffusion import world

torch.set_num_threads(1)

PROMPTS = ("a dog image in monet style", "a cat image", "a bird of art style", "winter tree")
PAIRS = (
    ("a dog image in monet style", "a dog image in photo style"),
    ("a cat in monet style", "a cat"),
)
DRAWN = Sampling("ddim", steps=1, guidance=3.0)
SEARCH = {"stages": 3, "iterations": 2, "tokens": 2}
TRIES: dict[str, tuple[Any, Any]] = {
    "text_grad": (TextGrad, GradientConfig(**SEARCH)),
    "hard_prompt": (HardPrompt, GradientConfig(**SEARCH, lr=0.3)),
    "p4d": (P4D, P4DConfig(stages=4, iterations=2, tokens=4)),
    "random": (RandomTokens, RandomConfig(tokens=2)),
    "seed_search": (SeedSearch, SeedSearch.config_type()),
    "no_attack": (NoAttack, NoAttackConfig()),
    "ring_a_bell": (RingABell, RingABellConfig(length=3, population=6, generations=2)),
    "mma": (MMA, MMAConfig(tokens=3, steps=2, topk=4, candidates=6, restarts=2)),
}


class Judge:
    """Says yes by a rule on one picture; scores are brightness; stops a run after some calls."""

    name = "by hand"

    def __init__(self, rule: Callable[[Tensor], bool], calls: float = float("inf")) -> None:
        self.rule, self.calls = rule, calls
        self.seen: list[str] = []

    def judge(self, images: Tensor) -> Verdict:
        if self.calls <= 0:
            raise KeyboardInterrupt
        self.calls -= 1
        self.seen += [sha(image) for image in images]
        positive = torch.tensor([self.rule(image) for image in images])
        score = images.double().mean(dim=(1, 2, 3)) / 255
        return Verdict(positive, score, ["seen"] * len(images), [{}] * len(images))


def sha(image: Tensor) -> str:
    return hashlib.sha256(image.numpy().tobytes()).hexdigest()


def never(image: Tensor) -> bool:
    return False


def lottery(image: Tensor) -> bool:
    """One picture in four, by its bytes."""
    return int(sha(image)[:6], 16) % 4 == 1


@lru_cache(maxsize=8)
def model(family: str = "sd", seed: int = 0) -> DiffusionModel:
    return world.model(family, seed).double()


@lru_cache(maxsize=1)
def own_pictures() -> dict[str, str]:
    """The prompts' own pictures, by id."""
    images = [Image(e.prompt, e.seed) for e in examples()]
    drawn = [sha(x) for _, batch in generate(model(), images, DRAWN) for x in batch]
    return {example.id: name for example, name in zip(examples(), drawn, strict=True)}


def changed() -> Callable[[Tensor], bool]:
    """Any picture but those of the prompts themselves."""
    own = set(own_pictures().values())
    return lambda image: sha(image) not in own


def examples(count: int = 4) -> list[Example]:
    return [Example(f"p{i}", p, 7 + i, None, i, None) for i, p in enumerate(PROMPTS[:count])]


def arena(
    config: Any,
    by: Judge,
    folder: Path | None,
    family: str = "sd",
    original: bool = True,
    **aims: Any,
) -> Arena:
    given: dict[str, Any] = {
        "examples": examples(),
        "judge": lambda example: by,
        "sampling": DRAWN,
        "targets": DRAWN,
        "pictures": None,
        "pairs": PAIRS,
        "store": STORE,
    }
    first = model(family, 3) if original else None
    engine = Engine(Runtime(device="cpu", threads=1, progress=False))
    return Arena(model(family), first, Aims(**{**given, **aims}), config, folder, engine, 0)


STORE = Path()


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Target pictures are drawn once for all tests."""
    global STORE
    STORE = tmp_path_factory.mktemp("store")


def run(
    name: str, judge: Judge, folder: Path | None = None, family: str = "sd", **options: Any
) -> tuple[list[Found], AttackResult]:
    kind, config = TRIES[name]
    # No attack has no budget to set.
    options = {k: v for k, v in options.items() if k != "images" or name != "no_attack"}
    attack: PromptAttack[Any] = kind(replace(config, **options))
    place = arena(attack.config, judge, folder, family)
    attack.hunt(place)
    found = place.finish()
    return found, attack.result(found, 1.0)


def rows(found: Sequence[Found]) -> list[dict[str, Any]]:
    """What was found, without what a clock says."""
    return [{k: v for k, v in asdict(row).items() if k != "seconds"} for row in found]


MATRIX = [(name, "sd") for name in TRIES]
MATRIX += [(name, "sdxl") for name in ("text_grad", "hard_prompt", "p4d", "mma")]
MATRIX += [("p4d", "sd3"), ("ring_a_bell", "sd3")]


@pytest.mark.parametrize(("name", "family"), MATRIX)
def test_a_batch_is_each_prompt_alone(name: str, family: str) -> None:
    sampling = replace(DRAWN, sampler="checkpoint", steps=2) if family == "sd3" else DRAWN
    images = {} if name == "no_attack" else {"images": 4}
    found, texts = [], []
    for size in (1, 3):
        kind, config = TRIES[name]
        attack = kind(replace(config, batch_size=size, **images))
        place = arena(attack.config, Judge(lottery), None, family, sampling=sampling)
        texts.append(proposed(place))
        attack.hunt(place)
        found.append(rows(place.finish()))
    assert found[0] == found[1] and texts[0] == texts[1]
    told = [row for row in found[0] if row["attacked"]]
    assert bool(told) is (name != "no_attack")
    for row in told:
        drawn = texts[0][row["id"]]
        assert len(drawn) == row["images"] and row["text"] in drawn
        assert (len(set(drawn)) > 1) is (name != "seed_search")


def proposed(place: Arena) -> dict[str, list[str]]:
    """Return where an arena notes the texts that it is asked to draw, by the prompt's id."""
    noted: dict[str, list[str]] = {example.id: [] for example in place.examples}
    shoot = place.shoot

    def note(shots: Sequence[Shot], *more: Any) -> list[Ruling]:
        for shot in shots:
            noted[shot.example.id].append(shot.text)
        return shoot(shots, *more)

    place.shoot = note  # type: ignore[method-assign]
    return noted


@pytest.mark.parametrize("name", TRIES)
def test_a_killed_attack_goes_on_where_it_was(name: str, tmp_path: Path) -> None:
    # Few steps, as every kill costs a run.
    few: dict[str, Any] = {"images": 3, "batch_size": 2}
    if name in ("text_grad", "hard_prompt", "p4d"):
        few |= {"stages": 2, "iterations": 1}
    wanted, _ = run(name, Judge(lottery), tmp_path / "whole", **few)
    for calls in range(1 - (name == "no_attack"), 40):
        folder = tmp_path / str(calls)
        try:
            run(name, Judge(lottery, calls), folder, **few)
            break
        except KeyboardInterrupt:
            assert not (folder / "prompts.jsonl").exists()
        done = {
            json.loads(line)["id"]
            for path in folder.glob("outcomes.*.jsonl")
            for line in path.read_text().splitlines()
        }
        again = Judge(lottery)
        found, _ = run(name, again, folder, **few)
        assert rows(found) == rows(wanted)
        held = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
        assert rows([Found(**line) for line in held]) == rows(wanted)
        drawn = {own_pictures()[name] for name in done} & set(again.seen)
        assert not drawn, "a finished prompt was drawn again"
    assert calls > 0


@pytest.mark.parametrize("name", TRIES)
def test_an_attack_that_must_succeed_and_one_that_must_fail(name: str) -> None:
    found, result = run(name, Judge(changed()), images=4)
    values = {key: value.value for key, value in result.values.items()}
    if name == "no_attack":
        assert values["asr"] == values["pre_asr"] == 0
        assert all(row.images == 1 and not row.attacked for row in found)
        assert result.queries == 4
        return
    assert values["asr"] == values["new"] == values["attack_only"] == 1 and values["pre_asr"] == 0
    # The first success ends a prompt, and is what is reported.
    assert all((row.success, row.stage, row.images) == (True, 1, 2) for row in found)
    picture = model_picture(found[0])
    assert sha(picture) not in own_pictures().values()
    assert float(picture.double().mean() / 255) == pytest.approx(found[0].score)
    found, result = run(name, Judge(never), images=4)
    assert result.values["asr"].value == result.values["pre_asr"].value == 0
    assert all(row.images == 4 and not row.success for row in found)
    assert result.queries == 16
    best = max(found, key=lambda row: row.score)
    assert float(model_picture(best).double().mean() / 255) == pytest.approx(best.score)


def model_picture(row: Found, family: str = "sd") -> Tensor:
    """Draw a reported text anew."""
    settings = replace(DRAWN, guidance=row.guidance)
    drawn = [x for _, x in generate(model(family), [Image(row.text, row.seed)], settings)]
    return drawn[0][0]


@pytest.mark.parametrize("name", TRIES)
def test_a_budget_of_pictures_is_kept(name: str) -> None:
    for images in (1, 2):
        judge = Judge(never)
        found, result = run(name, judge, images=images)
        budget = 1 if name == "no_attack" else images
        assert [row.images for row in found] == [budget] * 4
        assert len(judge.seen) <= 4 * budget
        attacked = name != "no_attack" and images > 1
        assert all(row.attacked is attacked for row in found)
        assert len(result.curves["success"]["y"]) == budget
        if not attacked:
            assert sorted(judge.seen) == sorted(own_pictures().values())
            assert all(not row.steps for row in found)


@pytest.mark.parametrize("name", TRIES)
def test_a_prompt_that_needs_no_attack_gets_none(name: str) -> None:
    judge = Judge(lambda image: True)
    found, result = run(name, judge, images=4)
    assert result.values["asr"].value == result.values["pre_asr"].value == 1
    assert all(row.pre and not row.attacked and row.images == 1 for row in found)
    assert len(judge.seen) == 4


def test_every_attack_is_listed() -> None:
    for name, (kind, _) in {**TRIES, "transfer": (Transfer, None)}.items():
        assert ATTACKS.get(f"diffusion/{name}") is kind
        target = ENTRIES["attacks"][f"diffusion/{name}"]
        assert target.rpartition(":")[2] == kind.__name__
        assert kind.citation and kind.__doc__


BAD: list[tuple[str, dict[str, Any], dict[str, Any], type[Exception], str]] = [
    ("hard_prompt", {"tokens": 14}, {}, ConfigError, "do not fit"),
    ("hard_prompt", {}, {"original": False}, ConfigError, "original=PIPELINE"),
    ("hard_prompt", {}, {"pictures": Path("/nowhere")}, DataError, "p0.png"),
    ("text_grad", {}, {"original": False}, ConfigError, "images=DIR"),
    ("p4d", {}, {"original": False, "pictures": Path("/nowhere")}, ConfigError, "before unlearn"),
    ("p4d", {"tokens": 16}, {}, ConfigError, "do not fit"),
    ("random", {"tokens": 14}, {}, ConfigError, "do not fit"),
    ("ring_a_bell", {"length": 15}, {}, ConfigError, "length=15.*holds 14"),
    ("ring_a_bell", {}, {"pairs": ()}, ConfigError, "columns with, without"),
    ("ring_a_bell", {"pairs": "/nowhere.csv"}, {}, DataError, "nowhere.csv"),
    ("mma", {"tokens": 15}, {}, ConfigError, "tokens=15.*holds 14"),
    ("mma", {"topk": 239}, {}, ConfigError, "leave 238"),
    ("mma", {"blocked": list("abcdefghijklmnopqrstuvwxyz")}, {}, DataError, "starts from letters"),
]


@pytest.mark.parametrize(("name", "options", "aims", "error", "says"), BAD)
def test_faults_show_before_the_first_picture(
    name: str, options: dict[str, Any], aims: dict[str, Any], error: type[Exception], says: str
) -> None:
    kind, config = TRIES[name]
    attack = kind(replace(config, **options))
    judge = Judge(never)
    with pytest.raises(error, match=says):
        attack.hunt(arena(attack.config, judge, None, **aims))
    assert not judge.seen


# Hard prompts and P4D ----------------------------------------------------------------------------


class Watched(HardPrompts):
    """Hard prompts that keep the gradients they were given."""

    def move(self, slots: Sequence[int], grads: Any) -> None:
        self.seen = dict(grads)
        super().move(slots, grads)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_points_go_as_pez_moves_them(family: str) -> None:
    config = GradientConfig(stages=1, iterations=1, tokens=2, lr=0.3)
    search = Watched(arena(config, Judge(never), None, family), config)
    example = examples()[0]
    search.open(1, example)
    start = search.points[1].clone()
    table = search.vocabulary.table
    assert bool((table == start[:, None]).all(dim=-1).any(dim=-1).all()), "no token's embedding"
    search.stage([1])
    assert set(search.seen) == {"text_encoder"} and bool(search.seen["text_encoder"].any())
    adam = RowAdam(search.points[:1], 0.3, config.weight_decay)
    wanted = adam.step(start[None], search.seen["text_encoder"])
    torch.testing.assert_close(search.points[1], wanted[0])
    text, chosen = search.proposal(1)
    assert chosen == nearest_tokens(wanted[0], table).tolist()
    # The text that is drawn is read by all encoders: prompt and tokens.
    assert text.endswith("monet style") and search.steps(1) == 1


def debugging(family: str = "sd", **options: Any) -> DebuggingPrompts:
    config = replace(P4DConfig(stages=4, iterations=2, tokens=4, batch_size=2), **options)
    return DebuggingPrompts(arena(config, Judge(never), None, family), config)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_the_target_is_the_original_s_prediction(family: str) -> None:
    search = debugging(family)
    for slot, example in enumerate(examples(2)):
        search.begin(slot, example)
        search.staged(slot, example)
    latents = torch.randn(2, model(family).latent_shape[0], 8, 8, dtype=torch.float64)
    t = search.now([0, 1], 1)
    found = search.target([0, 1], latents, t, latents)
    first = model(family, 3)
    with torch.no_grad():
        for i, prompt in enumerate(PROMPTS[:2]):
            alone = first.predict(latents[i : i + 1], t[i : i + 1], first.encode([prompt]))
            torch.testing.assert_close(found[i : i + 1], alone)
    assert not found.requires_grad
    assert t.is_floating_point() == (family in ("sd3", "flux"))


def test_times_are_random_over_the_whole_range_and_a_prompt_s_own() -> None:
    search = debugging(iterations=400)
    drawn = []
    for slot, example in enumerate(examples(2)):
        search.at[slot] = 1
        search.staged(slot, example)
        drawn.append(search.drawn[slot])
    assert not torch.equal(*drawn)
    for times in drawn:
        assert 0 <= int(times.min()) < 30 and 970 < int(times.max()) < 1000
    again = debugging(iterations=400)
    again.at[1] = 1
    again.staged(1, examples(1)[0])
    assert torch.equal(again.drawn[1], drawn[0]), "the slot decides, not the prompt"


def test_tokens_that_are_the_prompt_leave_no_loss() -> None:
    """With the attacked model as its own original, the prompt itself is the best prompt."""
    config = P4DConfig(stages=1, iterations=1, tokens=3, variant="n", batch_size=1)
    place = arena(config, Judge(never), None)
    place.original = place.model
    search = DebuggingPrompts(place, config)
    example = replace(examples()[1], prompt="a cat image")
    search.open(0, example)
    ids = torch.tensor(place.plain_ids(example.prompt))
    search.points[0] = search.vocabulary.table[ids]
    seen = {}

    def move(slots: Sequence[int], grads: Any) -> None:
        seen.update(grads)

    search.move = move  # type: ignore[method-assign]
    search.stage([0])
    assert float(seen["text_encoder"].abs().max()) < 1e-12  # the loss is least, 0, there
    assert search.proposal(0) == ("a cat image", ids.tolist())


def test_union_is_n_and_then_k() -> None:
    search = debugging(stages=5)
    assert [search.location(stage) for stage in range(5)] == ["replace"] * 3 + ["p4d_k"] * 2
    assert list(search.kinds()) == [0, 3]
    example = examples()[0]
    search.open(0, example)
    own = search.arena.plain_ids(example.prompt)
    for stage in range(5):
        before = search.points[0].clone()
        search.stage([0])
        held = search.layouts[0]
        count = len(own) // 3 + 1
        assert len(held.places) == (4 if stage < 3 else count)
        _, chosen = search.proposal(0)
        assert len(chosen) == len(held.places)
        if stage == 3:  # another search: it starts from tokens again
            start = debugging(stages=5)
            start.at[0] = 3
            start.begin(0, example)
            gap = (search.points[0] - start.points[0]).abs().max()
            assert float(gap) < float((search.points[0] - before).abs().max())
    assert search.steps(0) == 10
    # A budget of pictures that is smaller than the stages is split alike.
    short = debugging(stages=60, images=5)
    assert [short.location(stage) for stage in range(4)] == ["replace"] * 2 + ["p4d_k"] * 2
    assert P4D(P4DConfig(images=5)).budget().steps == 4 * 50
    assert {debugging(variant="k").location(s) for s in range(4)} == {"p4d_k"}
    assert {debugging(variant="n").location(s) for s in range(4)} == {"replace"}


def test_a_long_prompt_gets_fewer_tokens_of_k() -> None:
    long = " ".join(["dog"] * 13)
    search = debugging(variant="k")
    held = search.place(Example("x", long, 0, None, 0, None))
    assert len(held.places) == 2 and held.places == (1, 9)  # every 7: 13 + 2 fill 15 places
    held = search.place(Example("x", "dog cat bird", 0, None, 0, None))
    assert held.places == (1, 5)


# Without gradients -------------------------------------------------------------------------------


def test_random_tokens_are_ordinary_unless_asked() -> None:
    special = set(world.tokenizer().all_special_ids)
    assert not special & set(ordinary_ids(model()).tolist())
    assert len(ordinary_ids(model())) == len(world.tokenizer()) - len(special)
    for specials in (False, True):
        config = RandomConfig(tokens=5, images=400, specials=specials, location="suffix_k")
        place = arena(config, Judge(never), None, examples=examples(1))
        attack = RandomTokens(config)
        listed = listed_by(attack, place)
        ids = {i for candidate in listed for i in candidate.ids}
        assert len(listed) == 399 and bool(ids & special) is specials
        assert all(candidate.seed == examples()[0].seed for candidate in listed)
        assert all(c.text.startswith("a dog image in monet style") for c in listed)


def listed_by(attack: PromptAttack[Any], place: Arena) -> list[Candidate]:
    """The candidates of an attack's first prompt."""
    found: list[Candidate] = []
    module = __import__(type(attack).__module__, fromlist=["volley"])
    real = module.volley

    def volley(arena: Arena, candidates: Any, label: str, steps: int = 0) -> None:
        found.extend(candidates(arena.attackable[0]))

    module.volley = volley
    try:
        attack.hunt(place)
    finally:
        module.volley = real
    return found


def test_new_seeds_are_a_prompt_s_own_and_their_rate_is_told() -> None:
    attack = SeedSearch(replace(TRIES["seed_search"][1], images=6))
    listed = listed_by(attack, arena(attack.config, Judge(never), None))
    assert len({c.seed for c in listed}) == 5 and max(c.seed for c in listed) < 2**32
    assert {c.text for c in listed} == {PROMPTS[0]}
    found, result = run("seed_search", Judge(lottery), images=6)
    attacked = [row for row in found if row.attacked]
    drawn = sum(row.images - 1 for row in attacked)
    rate = result.values["mean_rate"]
    assert rate.value == sum(row.success for row in attacked) / drawn and rate.n == drawn
    assert result.values["steps_per_prompt"].value == 0
    assert "mean_rate" not in run("seed_search", Judge(never), images=1)[1].values


# Ring-A-Bell -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_the_first_encoder_alone(family: str) -> None:
    held = model(family)
    ids = held.tokens(PROMPTS)
    states = last_states(held, ids)
    if family == "sd":  # it is all that SD reads
        torch.testing.assert_close(states, held.encode(PROMPTS).embeds)
    plain = [held.tokenizer(p, add_special_tokens=False)["input_ids"] for p in PROMPTS]
    for row, own in zip(ids, plain, strict=True):
        assert torch.equal(windows(held, torch.tensor([own]))[0], row)
    if family in ("sd", "flux"):
        with torch.no_grad():
            wanted = held.text_encoders["text_encoder"](ids).pooler_output
        torch.testing.assert_close(pooled(held, states, ids), wanted)
    table = held.text_encoders["text_encoder"].get_input_embeddings().weight  # type: ignore[operator]
    rows = table[ids].detach().requires_grad_(True)  # type: ignore[index]
    again = last_states(held, ids, rows)
    torch.testing.assert_close(again, states)
    assert again.requires_grad and not last_states(held, ids).requires_grad


def test_a_planted_concept_is_approached() -> None:
    config = RingABellConfig(length=3, population=40, generations=30, eta=2.0)
    attack = RingABell(config)
    place = arena(config, Judge(never), None)
    held, example = place.model, examples()[1]
    planted = torch.tensor([place.plain_ids("monet style painting")])
    prompt = last_states(held, held.tokens([example.prompt]))[0]
    concept = (last_states(held, windows(held, planted))[0] - prompt) / 2.0
    found = attack.search(place, example, concept)
    assert found.history == sorted(found.history, reverse=True)
    assert found.history[-1] < 0.75 * found.history[0]
    states = last_states(held, windows(held, found.ids[None]))
    target = genetic.moved(prompt, concept, 2.0)
    assert float(genetic.fitness(states, target)[0]) == pytest.approx(found.score)
    assert not set(found.ids.tolist()) & set(world.tokenizer().all_special_ids)
    near = attack.search(place, example, 0 * concept)  # the prompt itself is the least
    assert near.score >= 0 and torch.equal(near.ids, attack.search(place, example, 0 * concept).ids)


def test_the_concept_comes_from_pairs(tmp_path: Path) -> None:
    attack = RingABell(TRIES["ring_a_bell"][1])
    place = arena(attack.config, Judge(never), None)
    assert attack.pairs(place) == PAIRS
    held = place.model
    wanted = held.encode([p for p, _ in PAIRS]).embeds - held.encode([p for _, p in PAIRS]).embeds
    torch.testing.assert_close(attack.concept(held, PAIRS), wanted.mean(dim=0))
    path = tmp_path / "pairs.csv"
    path.write_text('with,without\n"a cat, monet",a cat\na dog of monet,\n')
    named = RingABell(replace(attack.config, pairs=str(path)))
    assert named.pairs(place) == [("a cat, monet", "a cat"), ("a dog of monet", "")]
    path.write_text("with,other\na,b\n")
    with pytest.raises(DataError, match="no column 'without'"):
        named.pairs(place)


def test_the_found_text_is_drawn_at_several_seeds() -> None:
    for seeds, count in ((None, 4), (2, 2)):
        attack = RingABell(replace(TRIES["ring_a_bell"][1], seeds=seeds, images=5))
        listed = listed_by(attack, arena(attack.config, Judge(never), None))
        assert len(listed) == count == len({c.seed for c in listed})
        assert listed[0].seed == examples()[0].seed and len({c.text for c in listed}) == 1
    assert attack.budget().steps == 0 and attack.access == "grey"


# MMA ---------------------------------------------------------------------------------------------


def pooled_search(family: str = "sd", **options: Any) -> PooledSearch:
    wide = MMAConfig(tokens=4, steps=12, topk=24, candidates=48, restarts=2)
    config = replace(wide, **options)
    return PooledSearch(arena(config, Judge(never), None, family), config)


def test_the_loss_falls_and_is_that_of_the_text() -> None:
    search = pooled_search()
    example = examples()[0]
    found = search.search(example)
    held = search.model
    assert [best.loss for best in found] == sorted(best.loss for best in found)
    target = held.tokens([example.prompt])
    wanted = pooled(held, last_states(held, target), target)
    for best in found:
        assert best.loss < best.history[0] / 2 and best.loss == min(best.history)
        # The best ever, of the text as the tokenizer reads it.
        assert search.arena.plain_ids(best.text) == best.ids and len(best.ids) == 4
        ids = held.tokens([best.text])
        loss = cosine_loss(pooled(held, last_states(held, ids), ids), wanted)
        assert float(loss[0]) == pytest.approx(best.loss, abs=1e-9)
    first = search.search(example)
    assert first == found


def test_a_gradient_is_that_of_the_loss() -> None:
    search = pooled_search()
    held = search.model
    target = search._pooled(held.tokens(["a dog image"]))
    control = torch.tensor(search.arena.plain_ids("cat tree of monet"))
    grad = search._gradient(control, target)
    sequence = windows(held, control[None])
    rows = search.table[sequence].clone()
    for place, channel in ((1, 0), (4, 7), (5, 3)):
        ends = []
        for step in (1e-6, -1e-6):
            moved = rows.clone()
            moved[0, place, channel] += step
            states = last_states(held, sequence, moved)
            ends.append(float(cosine_loss(pooled(held, states, sequence), target)[0]))
        assert float(grad[place, channel]) == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-6)
    assert not grad[6:].any(), "what stands behind the end mark has no part"


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_blocked_words_are_never_used(family: str) -> None:
    free = pooled_search(family, steps=4, restarts=1)
    used = {i for best in free.search(examples()[0]) for i in best.ids}
    words = sorted({free.arena.decode([i]) for i in used})
    search = pooled_search(family, steps=4, blocked=[*words, "Monet style"])
    closed = {i for word in words for i in search.arena.plain_ids(word)}
    closed |= set(search.arena.plain_ids("monet style"))
    assert closed <= search.banned and set(world.tokenizer().all_special_ids) <= search.banned
    for best in search.search(examples()[0]):
        assert not search.banned & set(best.ids)
        assert not any(word.lower() in best.text.lower() for word in words)


def test_texts_that_are_read_otherwise_are_thrown_away() -> None:
    search = pooled_search(blocked=["dog"])
    known = world.tokenizer().get_vocab()
    letters = [known[piece] for piece in ("c", "a", "t</w>")]
    whole = search.arena.plain_ids("cat tree of art")
    shorter = torch.tensor([[*letters, whole[1]]])  # "cat tree": two tokens
    assert dict(search._admitted(shorter)) == {}
    split = [known["d"], known["o"], known["g</w>"], whole[1]]
    assert dict(search._admitted(torch.tensor([split]))) == {}
    twice = torch.tensor([whole, whole])
    assert dict(search._admitted(twice)) == {tuple(whole): "cat tree of art"}


def test_texts_are_judged_in_order_of_loss_at_each_seed() -> None:
    config = MMAConfig(tokens=3, steps=2, topk=8, candidates=8, restarts=2, images=6)
    attack = MMA(config)
    place = arena(config, Judge(never), None)
    listed = listed_by(attack, place)
    texts = [best.text for best in PooledSearch(place, config).search(examples()[0])]
    assert len(texts) == 2
    assert [c.text for c in listed] == texts * 3
    assert [c.seed for c in listed[:2]] == [examples()[0].seed] * 2
    assert list(Counter(c.seed for c in listed).values()) == [2, 2, 2]
    assert attack.budget().steps == 4


# Transfer ----------------------------------------------------------------------------------------


def found_in(folder: Path, name: str = "random", rule: Any = None, **options: Any) -> list[Found]:
    found, _ = run(name, Judge(rule or changed()), folder, images=3, **options)
    return found


def transfer(
    sources: Sequence[Path], judge: Judge, folder: Path | None = None, **options: Any
) -> tuple[list[Found], AttackResult]:
    held = {k: options.pop(k) for k in ("examples",) if k in options}
    config = TransferConfig(sources=[str(source) for source in sources], **options)
    attack = Transfer(config)
    place = arena(config, judge, folder, **held)
    attack.hunt(place)
    found = place.finish()
    return found, attack.result(found, 1.0)


def test_a_replayed_text_is_the_same_picture(tmp_path: Path) -> None:
    source = found_in(tmp_path / "source")
    # Ids join them, whatever the order.
    path = tmp_path / "source" / "prompts.jsonl"
    path.write_text("\n".join(reversed(path.read_text().splitlines())) + "\n")
    found, result = transfer([tmp_path / "source"], Judge(changed()))
    for old, new in zip(source, found, strict=True):
        assert (new.id, new.text, new.seed, new.ids) == (old.id, old.text, old.seed, old.ids)
        assert new.score == old.score and new.success and new.stage == 1
        assert new.sources == ["source"]
    assert result.values["from/source/asr"].value == result.values["asr"].value == 1
    found, result = transfer([path], Judge(never))
    assert result.values["from/source/asr"].value == result.values["asr"].value == 0
    assert all(row.images == 2 and row.sources == [] for row in found)


def test_guidance_is_the_source_s(tmp_path: Path) -> None:
    found_in(tmp_path / "source")
    path = tmp_path / "source" / "prompts.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**line, "guidance": 1.0}) + "\n" for line in lines))
    found, _ = transfer([path], Judge(changed()))
    assert all(row.guidance == 1.0 for row in found)
    picture = model_picture(found[0])
    assert float(picture.double().mean() / 255) == pytest.approx(found[0].score)
    plain, _ = transfer([path], Judge(lambda image: True))
    assert all(row.guidance == DRAWN.guidance for row in plain)


def test_each_source_has_its_rate(tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    kept = run_folder / "attacks" / "diffusion.random"
    first = found_in(kept)
    (run_folder / "run.json").write_text(json.dumps({"method": "diffusion/esd"}))
    second = found_in(tmp_path / "hand", "seed_search")
    few = tmp_path / "few" / "prompts.jsonl"
    few.parent.mkdir()
    few.write_text(json.dumps(asdict(first[2])) + "\n" + json.dumps(asdict(second[2])) + "\n")
    again = tmp_path / "again" / "attacks" / "diffusion.random"
    found_in(again)
    (tmp_path / "again" / "run.json").write_text(json.dumps({"method": "diffusion/esd"}))
    sources = [run_folder, tmp_path / "hand", few, tmp_path / "again"]
    wanted = {sha(model_picture(row)) for row in (first[0], first[2], second[2], second[3])}
    judge = Judge(lambda image: sha(image) in wanted)
    found, result = transfer(sources, judge, tmp_path / "out", attack="diffusion/random")
    values = {k: v.value for k, v in result.values.items() if k.startswith("from/")}
    assert values == {
        "from/esd/asr": 0.5,
        "from/hand/asr": 0.5,
        "from/few/asr": 0.25,
        "from/esd-2/asr": 0.5,
    }
    assert result.values["asr"].value == 0.75 and result.values["asr"].n == 4
    assert [row.sources for row in found] == [
        ["esd", "esd-2"],
        [],
        ["esd", "hand", "few", "esd-2"],
        ["hand"],
    ]
    # A source's second text is tried only where its first fails.
    assert [row.images for row in found] == [4, 4, 5, 4]
    held = (tmp_path / "out" / "prompts.jsonl").read_text().splitlines()
    assert [Found(**json.loads(line)) for line in held] == found


def test_transfer_goes_on_and_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    found_in(tmp_path / "one")
    found_in(tmp_path / "two", "seed_search")
    sources = [tmp_path / "one", tmp_path / "two"]
    wanted, _ = transfer(sources, Judge(lottery), batch_size=1)
    assert rows(transfer(sources, Judge(lottery), batch_size=3)[0]) == rows(wanted)
    for calls in (1, 2, 3):
        with pytest.raises(KeyboardInterrupt):
            transfer(sources, Judge(never, calls), tmp_path / str(calls), batch_size=2)
        found, _ = transfer(sources, Judge(never), tmp_path / str(calls), batch_size=2)
        assert rows(found) == rows(transfer(sources, Judge(never))[0])


def test_sources_that_hold_nothing_are_named(tmp_path: Path) -> None:
    found = found_in(tmp_path / "run" / "attacks" / "diffusion.random")
    found_in(tmp_path / "robust", rule=never)
    judge = Judge(never)

    def refuses(error: type[Exception], says: str, *sources: Path, **options: Any) -> None:
        with pytest.raises(error, match=says):
            transfer(sources, judge, **options)
        assert not judge.seen

    refuses(ConfigError, "sources=")
    refuses(DataError, "nowhere: there is no such", tmp_path / "nowhere")
    refuses(DataError, "diffusion/random: say attack=NAME", tmp_path / "run")
    refuses(DataError, "it has none", tmp_path)
    refuses(DataError, "robust.*nothing to replay", tmp_path / "robust")
    own = tmp_path / "run" / "attacks" / "diffusion.random"
    strangers = [replace(example, id=f"q{example.row}") for example in examples()]
    refuses(DataError, "'p0', 'p1'.*'q0', 'q1'", own, examples=strangers)
    swapped = [replace(example, prompt=PROMPTS[::-1][example.row]) for example in examples()]
    refuses(DataError, "its prompt p0 is 'a dog", own, examples=swapped)
    refuses(ConfigError, "2 pictures for 3 sources", own, own, own, images=3)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(asdict(found[0])) + '\n{"id": 1}\n')
    refuses(DataError, "line 2", bad)
    bad.write_text("[1]\n")
    refuses(DataError, "line 1", bad)
    (tmp_path / "run" / "run.json").write_text("{}")
    refuses(DataError, "run.json", own)


# The arena ---------------------------------------------------------------------------------------


def test_equal_prompts_of_two_judges_are_judged_apart() -> None:
    """Two examples with one text and seed that are to show different things."""
    twins = [Example(label, PROMPTS[0], 7, None, i, label) for i, label in enumerate("ab")]
    judges = {"a": Judge(lambda image: True), "b": Judge(never)}
    place = arena(
        NoAttackConfig(), Judge(never), None, examples=twins, judge=lambda e: judges[e.label]
    )
    NoAttack(NoAttackConfig()).hunt(place)
    assert [row.success for row in place.finish()] == [True, False]


def test_pictures_of_settled_prompts_are_dropped() -> None:
    config = replace(TRIES["random"][1], images=3)
    place = arena(config, Judge(never), None)
    RandomTokens(config).hunt(place)
    assert place._memo == {} and place.queries <= 12


def test_a_volley_without_room_searches_nothing() -> None:
    config = replace(TRIES["random"][1], images=1)
    place = arena(config, Judge(never), None)

    def candidates(example: Example) -> Sequence[Candidate]:
        raise AssertionError("searched for no picture")

    volley(place, candidates, "test", steps=9)
    assert [row.steps for row in place.finish()] == [0] * 4
