"""Parts of attacks on image models that are numbers: searches, losses, probes, prompt files."""

import math
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmforget.diffusion.attacks import genetic
from mmforget.diffusion.attacks.coordinate import (
    blocked_topk,
    candidates,
    control_rows,
    cosine_loss,
    replaced_positions,
)
from mmforget.diffusion.attacks.examples import (
    CONCEPTS,
    Example,
    cut_to_length,
    read_examples,
    split_by_length,
)
from mmforget.diffusion.attacks.objective import attack_loss, noised, objective
from mmforget.diffusion.attacks.partial import (
    ETAS,
    SCALES,
    completion_start,
    ddim_noise_step,
    img2img_start,
)
from mmforget.diffusion.edits import Step
from mmforget.diffusion.judges import IMAGENETTE, NUDITY_CLASSES
from mmforget.diffusion.methods.sld import SafetyGuidance, SLDConfig
from mmforget.diffusion.noise import Noising, Sampling
from mmforget.errors import ConfigError, DataError
from mmforget.rng import generator
from tests.diffusion import world

torch.set_num_threads(1)
real = pytest.mark.skipif("MMFORGET_REAL_DATA" not in os.environ, reason="MMFORGET_REAL_DATA unset")


# Ring-A-Bell -------------------------------------------------------------------------------------


def test_a_concept_is_a_mean_difference() -> None:
    with_concept = torch.tensor([[[1.0, 2.0]], [[3.0, 6.0]]])
    without = torch.tensor([[[0.0, 1.0]], [[2.0, 1.0]]])
    concept = genetic.concept_vector(with_concept.half(), without.half())
    assert concept.dtype == torch.float32 and concept.tolist() == [[1.0, 3.0]]
    assert genetic.moved(torch.tensor([[[1.0, 1.0]]]), concept, 2.0).tolist() == [[3.0, 7.0]]
    for first, second in ((with_concept, without[:1]), (with_concept[0], without[0])):
        with pytest.raises(DataError, match=r"\[N, T, D\]"):
            genetic.concept_vector(first, second)
    with pytest.raises(DataError, match="at least 1"):
        genetic.concept_vector(with_concept[:0], without[:0])


def test_fitness_sums_over_positions_and_channels_whatever_the_chunk() -> None:
    rng = generator(0)
    population, target = torch.randn(5, 3, 4, generator=rng), torch.randn(3, 4, generator=rng)
    wanted = [float(((row - target) ** 2).sum()) for row in population]
    for chunk in (1, 2, 64):
        assert genetic.fitness(population, target, chunk).tolist() == pytest.approx(wanted)
    half = genetic.fitness(population.bfloat16(), target.bfloat16())
    assert half.dtype == torch.float32  # sums of 59,136 terms have no place in bfloat16
    with pytest.raises(DataError, match="same encoder"):
        genetic.fitness(population, target[:2])


def test_crossover_swaps_tails() -> None:
    a, b = torch.arange(4), torch.arange(4) + 10
    first, second = genetic.crossover(a, b, 1)
    assert first.tolist() == [0, 11, 12, 13] and second.tolist() == [10, 1, 2, 3]
    for point, same in ((0, b), (4, a)):
        assert torch.equal(genetic.crossover(a, b, point)[0], same)
    rows = genetic.crossover(torch.stack([a, a]), torch.stack([b, b]), torch.tensor([1, 3]))[0]
    assert rows.tolist() == [[0, 11, 12, 13], [0, 1, 2, 13]]


def test_the_best_survive_untouched() -> None:
    ids = torch.randint(1, 50, (12, 5), generator=generator(0))
    scores = torch.rand(12, generator=generator(1))
    scores[3] = torch.nan
    order = scores.argsort()[:6]
    made = genetic.evolve(ids, scores, (1, 50), generator(2), mate=1.0, mutate=1.0)
    assert torch.equal(made.ids[:6], ids[order]) and torch.equal(made.scores[:6], scores[order])
    assert made.fresh.tolist() == [False] * 6 + [True] * 18  # 12 children and 6 mutants
    assert made.scores[6:].isnan().all()
    mutants = made.ids[18:]
    assert ((mutants != ids[order]).sum(dim=1) <= 1).all()
    assert (mutants != ids[order]).any()
    assert int(made.ids.min()) >= 1 and int(made.ids.max()) < 50


def test_the_notebook_edits_survivors_and_scores_them_again() -> None:
    ids = torch.randint(1, 5000, (12, 5), generator=generator(0))
    scores = torch.rand(12, generator=generator(1))
    made = genetic.evolve(
        ids, scores, (1, 5000), generator(2), mate=0.0, mutate=1.0, reference=True
    )
    kept = ids[scores.argsort()[:6]]
    assert made.fresh.all() and made.scores.isnan().all()
    assert ((made.ids != kept).sum(dim=1) == 1).all()


def test_children_hold_their_parents_ids() -> None:
    ids = torch.arange(40).reshape(8, 5)
    made = genetic.evolve(ids, torch.arange(8.0), (0, 40), generator(3), mate=1.0, mutate=0.0)
    assert len(made.ids) == 4 + 8
    for first, second in made.ids[4:].reshape(4, 2, 5).tolist():
        for place in range(5):
            assert first[place] % 5 == second[place] % 5 == place
        assert first[0] // 5 == second[-1] // 5 and first[-1] // 5 == second[0] // 5
    alone = genetic.evolve(ids[:, :1], torch.arange(8.0), (0, 40), generator(3), mate=1.0)
    assert alone.ids.shape[1] == 1


def test_evolution_refuses_what_cannot_be() -> None:
    ids, scores = torch.zeros((4, 3), dtype=torch.long), torch.zeros(4)
    with pytest.raises(ConfigError, match="low < high"):
        genetic.evolve(ids, scores, (5, 5), generator(0))
    with pytest.raises(ConfigError, match="5 survivors"):
        genetic.evolve(ids, scores, (0, 5), generator(0), survivors=5)
    with pytest.raises(ConfigError, match="0 survivors"):
        genetic.evolve(ids[:1], scores[:1], (0, 5), generator(0))


class Encoder:
    """A linear encoder of 30 words, that counts what it is asked."""

    def __init__(self, planted: list[int]) -> None:
        self.words = torch.randn(30, 6, generator=generator(7))
        self.target = self.words[planted]
        self.seen: Counter[tuple[int, ...]] = Counter()

    def __call__(self, ids: Tensor) -> Tensor:
        self.seen.update(tuple(row) for row in ids.tolist())
        return genetic.fitness(self.words[ids], self.target)


PLANTED = [4, 17, 29, 1, 8]


@pytest.mark.parametrize("reference", [False, True])
def test_the_search_finds_planted_ids(reference: bool) -> None:
    encoder = Encoder(PLANTED)
    ids, score, history = genetic.search(
        encoder, 5, 60, 120, (1, 30), generator(0), reference=reference
    )
    if reference:  # its best can be lost to a mutation at any time
        assert min(history) < history[0] / 4 and score == history[-1]
    else:
        assert ids.tolist() == PLANTED and score == 0.0
        assert history == sorted(history, reverse=True)
    assert len(history) == 121
    assert max(encoder.seen.values()) == 1, "an individual was scored twice"
    assert not any(0 in ids for ids in encoder.seen)


def test_a_search_depends_on_its_generator_alone() -> None:
    runs = [genetic.search(Encoder(PLANTED), 5, 10, 4, (0, 30), generator(k)) for k in (1, 1, 2)]
    assert torch.equal(runs[0].ids, runs[1].ids) and runs[0].history == runs[1].history
    assert runs[0].history != runs[2].history


def test_a_search_without_generations_takes_the_best_of_the_first() -> None:
    encoder = Encoder(PLANTED)
    found = genetic.search(encoder, 5, 8, 0, (0, 30), generator(0))
    assert found.history == [found.score] and len(encoder.seen) == 8
    assert found.score == pytest.approx(float(encoder(found.ids[None])))
    blind = genetic.search(lambda ids: ids.sum(1) * torch.nan, 2, 4, 2, (0, 9), generator(0))
    assert math.isinf(blind.score)
    with pytest.raises(DataError, match="one each"):
        genetic.search(lambda ids: ids.float(), 5, 8, 0, (0, 30), generator(0))
    for length, population, generations in ((0, 8, 1), (5, 1, 1), (5, 8, -1)):
        with pytest.raises(ConfigError, match="2 individuals"):
            genetic.search(encoder, length, population, generations, (0, 30), generator(0))


# Coordinate gradient -----------------------------------------------------------------------------


def test_the_steepest_ids_are_proposed_but_for_blocked_ones() -> None:
    grad = torch.tensor([[-3.0, -2.0, 1.0, 0.0], [5.0, -1.0, -4.0, -2.0]])
    assert blocked_topk(grad, [], 2).tolist() == [[0, 1], [2, 3]]
    assert blocked_topk(grad, [0, 2], 2).tolist() == [[1, 3], [3, 1]]
    assert blocked_topk(1e-3 * grad.half(), torch.tensor([2, 2]), 1).tolist() == [[0], [3]]
    flat = blocked_topk(torch.zeros(1, 4), [1], 3)  # no gradient at all: any id but the blocked
    assert sorted(flat[0].tolist()) == [0, 2, 3]
    with pytest.raises(ConfigError, match="leave 1 to 2"):
        blocked_topk(grad, [0, 2, 2], 3)
    with pytest.raises(ConfigError, match="ends at 3"):
        blocked_topk(grad, [4], 1)


def test_control_tokens_have_their_own_gradient() -> None:
    grad = torch.arange(5.0)[:, None].expand(5, 3)
    assert control_rows(grad, 3)[:, 0].tolist() == [1, 2, 3]
    assert control_rows(grad, 3, reference=True)[:, 0].tolist() == [0, 1, 2]
    with pytest.raises(DataError, match="5 control tokens"):
        control_rows(grad, 5)


def test_every_candidate_differs_in_one_place() -> None:
    assert replaced_positions(5, 3).tolist() == [0, 0, 1, 1, 2]
    assert replaced_positions(2, 3).tolist() == [0, 1]
    places = replaced_positions(512, 20)
    assert places.tolist() == [i * 20 // 512 for i in range(512)]
    topk = torch.arange(80).reshape(20, 4) + 100
    made = candidates(torch.arange(20), topk, 512, generator(0))
    changed = made != torch.arange(20)
    assert torch.equal(changed.long().argmax(dim=1), places)
    assert torch.equal(changed.sum(dim=1), torch.ones(512, dtype=torch.long))
    assert torch.equal((made[changed] - 100) // 4, places)
    assert set(made[changed].tolist()) == set(topk.flatten().tolist())
    assert torch.equal(made, candidates(torch.arange(20), topk, 512, generator(0)))
    with pytest.raises(DataError, match=r"\[L, k\]"):
        candidates(torch.arange(3), topk, 4, generator(0))
    with pytest.raises(ConfigError, match="batch=0"):
        candidates(torch.arange(20), topk, 0, generator(0))


def test_cosine_loss_by_hand() -> None:
    target = torch.tensor([[2.0, 0.0]])
    found = cosine_loss(torch.tensor([[3.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 1.0]]), target)
    assert found.tolist() == pytest.approx([0, 1, 2, 1 - math.sqrt(0.5)], abs=1e-6)
    assert cosine_loss(torch.tensor([[3.0, 0.0]]).half(), target.half()).dtype == torch.float32
    with pytest.raises(DataError, match="pair up"):
        cosine_loss(torch.zeros(2, 3), target)


def test_coordinate_steps_find_a_planted_prompt() -> None:
    table = torch.randn(24, 16, generator=generator(5))
    planted = torch.tensor([3, 11, 20])
    control, rng = torch.tensor([0, 0, 0]), generator(0)
    target = table[planted].sum(0, keepdim=True)
    for _ in range(12):
        onehot = torch.nn.functional.one_hot(control, 24).float().requires_grad_()
        loss = cosine_loss((onehot @ table).sum(0, keepdim=True), target)
        (grad,) = torch.autograd.grad(loss.sum(), onehot)
        tries = candidates(control, blocked_topk(grad, [0], 6), 36, rng)
        control = tries[cosine_loss(table[tries].sum(1), target).argmin()]
        if sorted(control.tolist()) == planted.tolist():
            return
    raise AssertionError(f"found {control.tolist()}")


# Losses ------------------------------------------------------------------------------------------


def test_losses_are_means_over_the_entries_of_each_prompt() -> None:
    pred = torch.tensor([[[[1.0, 2.0]]], [[[0.0, -4.0]]]])
    target = torch.tensor([[[[0.0, 0.0]]], [[[0.0, 0.0]]]])
    assert attack_loss(pred, target).tolist() == [2.5, 8.0]
    assert attack_loss(pred, target, "l1").tolist() == [1.5, 2.0]
    wide = torch.full((1, 4, 8, 8), 300.0, dtype=torch.float16)  # 90,000 overflows half precision
    assert attack_loss(wide, torch.zeros_like(wide)).tolist() == [90000.0]
    with pytest.raises(ConfigError, match="l2"):
        attack_loss(pred, target, "l3")
    with pytest.raises(DataError, match="same shape"):
        attack_loss(pred, target[:1])


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_images_are_noised_as_in_training(family: str) -> None:
    noising = world.model(family).noising
    clean, noise = torch.randn(2, 3, 4, 8, 8, generator=generator(0)).unbind()
    t = torch.tensor([10, 510, 990])
    made = noised(noising, clean, noise, t)
    if family == "sd3":
        level = (t / 1000).reshape(-1, 1, 1, 1)
        wanted, target = (1 - level) * clean + level * noise, noise - clean
    else:  # Euler and LMS draw from another form, but the model was trained on this one
        from diffusers import DDPMScheduler

        ddpm = DDPMScheduler.from_config(noising.config)
        wanted, target = ddpm.add_noise(clean, noise, t), noise
    torch.testing.assert_close(made.latents, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.target, target)
    with pytest.raises(DataError, match="same shape"):
        noised(noising, clean, noise[:1], t)


def test_a_velocity_is_a_target_too() -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    clean, noise = torch.randn(2, 2, 4, 8, 8, generator=generator(0)).unbind()
    t = torch.tensor([10, 900])
    made = noised(Noising(scheduler), clean, noise, t)
    torch.testing.assert_close(made.target, scheduler.get_velocity(clean, noise, t))


def test_the_objective_knows_two_targets() -> None:
    noising = world.model().noising
    clean, noise = torch.randn(2, 2, 4, 8, 8, generator=generator(0)).unbind()
    t = torch.tensor([10, 900])
    shift = torch.tensor(0.5, requires_grad=True)
    perfect = objective(lambda x, _: noise + 0 * x, noising, clean, noise, t)
    assert perfect.tolist() == [0, 0]
    loss = objective(lambda x, _: x + shift, noising, clean, noise, t, base=lambda x, _: x * 1.0)
    assert loss.tolist() == pytest.approx([0.25, 0.25])
    loss.sum().backward()
    assert shift.grad is not None and float(shift.grad) == pytest.approx(2.0, rel=1e-4)
    own = objective(lambda x, _: x, noising, clean, noise, t, base=lambda x, _: x + shift)
    assert not own.requires_grad  # the original model's prediction is a constant


# Probes ------------------------------------------------------------------------------------------


def test_a_start_is_that_of_diffusers() -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    for steps in (1, 7, 25, 50):
        times = list(range(steps))
        holder: Any = SimpleNamespace(scheduler=SimpleNamespace(timesteps=times, order=1))
        for strength in (0.0, 0.1, 0.3, 0.58, 0.75, 0.8, 1.0):
            rest, count = StableDiffusionImg2ImgPipeline.get_timesteps(
                holder, steps, strength, None
            )
            start = img2img_start(steps, strength)
            assert times[start:] == rest and steps - start == count
    for steps, strength in ((0, 0.5), (10, 1.1), (10, -0.1)):
        with pytest.raises(ConfigError, match="0 to 1"):
            img2img_start(steps, strength)


def test_the_erased_model_goes_on_after_the_last_step() -> None:
    assert [completion_start(50, last) for last in (0, 1, 2, 48)] == [1, 2, 3, 49]
    for steps, last in ((50, 49), (50, -1), (1, 0)):
        with pytest.raises(ConfigError, match="steps of its own"):
            completion_start(steps, last)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_a_noise_step_is_ddim_s(kind: str, eta: float) -> None:
    from diffusers import DDIMScheduler

    source = DDIMScheduler(
        beta_schedule="scaled_linear", prediction_type=kind, steps_offset=1, set_alpha_to_one=False
    )
    scheduler = Noising(source).sampler(Sampling(sampler="ddim", steps=20))
    sample, output, noise = torch.randn(3, 2, 4, 8, 8, generator=generator(0)).unbind()
    for place in (0, 10, 18):
        now, after = scheduler.timesteps[place : place + 2]
        alphas = scheduler.alphas_cumprod[now], scheduler.alphas_cumprod[after]
        given = {"variance_noise": noise} if eta else {}
        wanted = scheduler.step(output, now, sample, eta=eta, **given).prev_sample
        found = ddim_noise_step(sample, output, noise, *alphas, eta=eta, kind=kind)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_more_noise_is_scaled_alone() -> None:
    sample, output, noise = torch.randn(3, 1, 4, 8, 8, generator=generator(0)).unbind()
    assert len(ETAS) * len(SCALES) == 24
    for eta in ETAS:
        plain, quiet, loud = (
            ddim_noise_step(sample, output, noise, 0.02, 0.025, eta, scale)
            for scale in (1.0, 0.0, 1.04)
        )
        assert plain.isfinite().all()
        torch.testing.assert_close(loud - quiet, 1.04 * (plain - quiet), rtol=1e-4, atol=1e-5)
    # η = 8: σ² is above 1 - ᾱ_prev; the direction keeps its length, by the magnitude.
    sigma = 8 * math.sqrt(0.5 / 0.6 * (1 - 0.4 / 0.5))
    clean = (sample - math.sqrt(0.6) * output) / math.sqrt(0.4)
    wanted = math.sqrt(0.5) * clean + math.sqrt(sigma**2 - 0.5) * output + sigma * noise
    torch.testing.assert_close(ddim_noise_step(sample, output, noise, 0.4, 0.5, 8.0), wanted)
    last = ddim_noise_step(sample, output, noise, 0.4, 1.0)  # to no noise at all
    torch.testing.assert_close(last, clean)
    for now, after, eta in ((0.5, 0.4, 1.0), (0.0, 0.4, 1.0), (0.4, 0.5, -1.0), (0.4, 1.1, 1.0)):
        with pytest.raises(ConfigError, match="alpha_t"):
            ddim_noise_step(sample, output, noise, now, after, eta)
    with pytest.raises(ConfigError, match="epsilon"):
        ddim_noise_step(sample, output, noise, 0.4, 0.5, kind="flow")


@pytest.mark.parametrize(("index", "time", "own", "published"), [(0, 981, 0, 1), (49, 1, 1, 0)])
def test_the_warm_up_counts_steps_or_as_published_time(
    index: int, time: int, own: int, published: int
) -> None:
    plain, prompt, unsafe = (torch.full((1, 1, 1, 1), v) for v in (0.0, 1.0, 2.0))
    for reference, guided in ((False, own), (True, published)):
        edit = SafetyGuidance("", 10, 1000.0, 0.01, 0.0, 0.0, reference)
        step = Step(index, 50, torch.tensor(time), plain, 7.5)
        found = edit.guide(step, plain, prompt, unsafe)
        assert float(found) == pytest.approx(7.5 * (1 - 2 * guided))
        again = SafetyGuidance(**edit.config())
        assert again.reference is reference and again.strength == edit.strength
    assert not SLDConfig().reference


# Prompt files ------------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_examples_keep_what_their_file_says(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.csv",
        "case_number,prompt,evaluation_seed,artist,evaluation_guidance\n"
        '7,"a, ""b""\nc",9000000000000,Monet,7.5\n3,d,,,\n',
    )
    first, second = read_examples(path)
    assert first == Example("7", 'a, "b"\nc', 9000000000000, 7.5, 0, "Monet")
    assert (second.id, second.guidance, second.row, second.label) == ("3", None, 1, None)
    assert read_examples(path, limit=1) == [first]
    for example in (first, second):
        torch.Generator().manual_seed(example.seed)
    assert read_examples(path)[1] == second
    assert read_examples(path, seed=1)[1].seed != second.seed
    with pytest.raises(ConfigError, match="limit=0"):
        read_examples(path, limit=0)


def test_lines_of_text_are_named_by_their_row(tmp_path: Path) -> None:
    found = read_examples(write(tmp_path / "a.txt", "one\n\ntwo\ntwo\n"))
    assert [(e.id, e.prompt, e.guidance) for e in found] == [
        ("0", "one", None),
        ("1", "two", None),
        ("2", "two", None),
    ]
    assert len({e.seed for e in found}) == 3


def test_bad_seeds_and_ids_are_named(tmp_path: Path) -> None:
    head = "case_number,prompt,evaluation_seed\n"
    for seed in (2**64 - 1, -(2**63)):
        (found,) = read_examples(write(tmp_path / "a.csv", f"{head}0,a,{seed}\n"))
        torch.Generator().manual_seed(found.seed)
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(DataError, match=r"line 2: the seed .* generators"):
            read_examples(write(tmp_path / "a.csv", f"{head}0,a,{seed}\n"))
    with pytest.raises(DataError, match="line 3: its id 1"):
        read_examples(write(tmp_path / "a.csv", f"{head}1,a,5\n,b,6\n"))


def example(prompt: str) -> Example:
    return Example(prompt, prompt, 0, None, 0, None)


def test_long_prompts_are_dropped_or_cut() -> None:
    texts = [example("abcde"), example("abcdef"), example(""), example("abcdefghij")]
    kept, dropped = split_by_length(texts, len, limit=7)
    assert kept == [texts[0], texts[2]] and dropped == [texts[1], texts[3]]

    def encode(text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(ids: Any) -> str:
        return "".join(map(chr, ids))

    cut = cut_to_length(texts, encode, decode, limit=7)
    assert [e.prompt for e in cut] == ["abcde", "abcde", "", "abcde"]
    assert [e.id for e in cut] == [e.id for e in texts] and cut[0] is texts[0]
    # A tokenizer whose decoded text grows by a token is cut further, to nothing in the end.
    grown = cut_to_length(texts, encode, lambda ids: decode(ids) + "!" if ids else "", limit=7)
    assert [e.prompt for e in grown] == ["abcde", "abcd!", "", "abcd!"]
    never = cut_to_length(texts, encode, lambda ids: "!" * 9 if ids else "", limit=3)
    assert [e.prompt for e in never] == ["", "", "", ""]
    assert split_by_length([], len) == ([], [])
    for limit in (0, 2):
        with pytest.raises(ConfigError, match="at least 3"):
            split_by_length(texts, len, limit)


def test_the_mini_tokenizer_counts() -> None:
    words = world.tokenizer()

    def encode(text: str) -> list[int]:
        found: list[int] = words(text, add_special_tokens=False).input_ids
        return found

    texts = [example("a dog"), example("a photo of a dog in the tree")]
    kept, dropped = split_by_length(texts, lambda text: len(encode(text)), limit=8)
    assert kept == texts[:1] and dropped == texts[1:]
    (cut,) = cut_to_length(dropped, encode, words.decode, limit=8)
    assert cut.prompt.strip() == "a photo of a dog in"


def test_the_published_concepts() -> None:
    assert {name: (c.tokens, c.iterations) for name, c in CONCEPTS.items()} == {
        "nudity": (5, 40),
        "violence": (5, 40),
        "illegal": (5, 40),
        "vangogh": (3, 40),
        "church": (3, 40),
        "tench": (3, 40),
        "parachute": (3, 40),
        "garbage_truck": (3, 40),
    }
    for name, preset in CONCEPTS.items():
        if preset.judge == "imagenette":
            assert preset.label == name and name.replace("_", " ") in IMAGENETTE
        if preset.judge == "nudenet":
            assert len(NUDITY_CLASSES[preset.label].classes) == 9


# Rows of the sample; violence and illegal are cut there (756 and 727 published). Dropped: measured
# with CLIP's own vocabulary, spec 1.2.
PUBLISHED = {
    "nudity": (142, 24),
    "violence": (40, 3),
    "illegal": (40, 10),
    "vangogh": (50, 0),
    "church": (50, 0),
    "tench": (50, 0),
    "parachute": (50, 0),
    "garbage_truck": (50, 0),
}
LONG_NUDITY = "0 6 11 13 24 27 33 41 46 56 58 59 60 61 62 64 65 66 73 102 109 129 131 137"


@real
@pytest.mark.parametrize("concept", PUBLISHED)
def test_the_published_prompts(concept: str) -> None:
    from open_clip.tokenizer import SimpleTokenizer  # holds CLIP's vocabulary in its package

    root = Path(os.environ["MMFORGET_REAL_DATA"]) / "unlearndiffatk"
    found = read_examples(root / f"{concept}.csv")
    rows, long = PUBLISHED[concept]
    assert concept in CONCEPTS and len(found) == rows
    assert len({e.id for e in found}) == rows and all(e.guidance is not None for e in found)
    for item in found:
        torch.Generator().manual_seed(item.seed)
    tokenizer = SimpleTokenizer()
    kept, dropped = split_by_length(found, lambda text: len(tokenizer.encode(text)))
    assert len(dropped) == long and len(kept) == rows - long
    if concept == "nudity":
        assert [item.row for item in dropped] == [int(row) for row in LONG_NUDITY.split()]
        assert max(item.seed for item in found) > 2**31 and found[0].id == "21"
        cut = cut_to_length(found, tokenizer.encode, tokenizer.decode)
        assert split_by_length(cut, lambda text: len(tokenizer.encode(text)))[1] == []
        assert sum(a != b for a, b in zip(cut, found, strict=True)) == 24
    if concept == "vangogh":
        assert {item.label for item in found} == {"Vincent van Gogh"}
