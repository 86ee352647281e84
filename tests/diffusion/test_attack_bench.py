"""The plain loop that text_grad is timed against takes the same steps."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmforget.diffusion.answers import write_image
from mmforget.diffusion.attacks.examples import Example
from mmforget.diffusion.attacks.gradient import GradientConfig
from mmforget.diffusion.judges import Verdict
from mmforget.diffusion.noise import Sampling
from mmforget.diffusion.sampling import Image, generate
from mmforget.engine import Engine, Runtime
from tests.bench.diffusion_attacks import EXACT, Brightness, World, agreed, our_attack, plain_attack
from tests.diffusion import world

torch.set_num_threads(1)

CONFIG = GradientConfig(tokens=2, stages=3, iterations=5, lr=0.05, images=4, batch_size=2)


class Level:
    """Says yes to pictures that are lighter than some level, or darker."""

    name = "by hand"

    def __init__(self, level: float, lighter: bool) -> None:
        self.level, self.lighter = level, lighter

    def judge(self, images: Tensor) -> Verdict:
        found = Brightness().judge(images)
        return replace(found, positive=(found.score > self.level) == self.lighter)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("pictures")
    made = world.model().double().requires_grad_(False)
    rng = torch.Generator().manual_seed(0)
    prompts = ("a dog image in monet style", "winter tree")
    examples = [Example(f"{k}", p, 5 + k, None, k, None) for k, p in enumerate(prompts)]
    for example in examples:
        image = torch.randint(256, (3, 16, 16), generator=rng, dtype=torch.uint8)
        write_image(folder / f"{example.id}.png", image)
    engine = Engine(Runtime(device="cpu", threads=1, progress=False))
    sampling = Sampling("ddim", steps=2, guidance=3.0)
    return World(made, made, examples, folder, Brightness(), sampling, engine)


def test_both_sides_find_the_same_texts(place: World) -> None:
    plain, ours = plain_attack(place, CONFIG, EXACT), our_attack(place, CONFIG)
    assert dict(plain.texts) == dict(ours.texts) and agreed(plain, ours) == 2
    assert all(len(said) == 4 and len(set(said)) > 2 for said in plain.texts.values())
    assert (plain.steps, plain.judged) == (ours.steps, ours.judged) == (30, 8)
    # Other steps give other texts: the comparison can fail.
    other = plain_attack(place, replace(CONFIG, weight_decay=0.0, lr=0.01), EXACT)
    assert agreed(other, ours) == 0


def test_both_sides_end_at_the_same_success(place: World) -> None:
    texts = our_attack(place, CONFIG).texts
    example = place.examples[0]
    images = [Image(text, example.seed) for text in texts[example.id][:3]]
    drawn = torch.cat([pixels for _, pixels in generate(place.model, images, place.sampling)])
    before, *stages = Brightness().judge(drawn).score.tolist()
    level = (before + stages[1]) / 2
    judge = Level(level, stages[1] > before)
    hit = 1 if judge.judge(drawn[1:2]).positive else 2
    part = replace(place, judge=judge)
    plain, ours = plain_attack(part, CONFIG, EXACT), our_attack(part, CONFIG)
    assert dict(plain.texts) == dict(ours.texts)
    assert plain.outcomes[0].stage == hit and not plain.outcomes[0].pre
    ends = [[(o.id, o.pre, o.hit, o.images) for o in run.outcomes] for run in (plain, ours)]
    assert ends[0] == ends[1]
