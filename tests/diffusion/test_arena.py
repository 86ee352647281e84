"""The arena's own rules: long prompts, foreign tokenizers, whose outcomes are resumed, memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmforget.diffusion.attacks.arena import Aims, Arena, PromptAttackConfig
from mmforget.diffusion.attacks.encoding import tables
from mmforget.diffusion.attacks.examples import Example
from mmforget.diffusion.attacks.gradient import GradientConfig
from mmforget.diffusion.attacks.no_attack import NoAttack, NoAttackConfig
from mmforget.diffusion.attacks.text_grad import TextGrad
from mmforget.diffusion.judges import Verdict
from mmforget.diffusion.noise import Sampling
from mmforget.engine import Engine, Runtime
from mmforget.errors import DataError, ResourceError
from tests.diffusion import world

torch.set_num_threads(1)

SETTINGS = Sampling("ddim", steps=2, guidance=3.0)
PROMPTS = ["a dog", "a cat image in the style of the dog", "a bird"]


class Never:
    """Finds nothing in any picture."""

    name = "never"

    def __init__(self) -> None:
        self.seen = 0

    def judge(self, images: Tensor) -> Verdict:
        self.seen += len(images)
        nothing = torch.zeros(len(images))
        return Verdict(nothing > 0, nothing, [""] * len(images), [{}] * len(images))


def arena(folder: Path, config: Any, judge: Any, **changed: Any) -> Arena:
    examples = [Example(str(i), text, 7 + i, None, i, None) for i, text in enumerate(PROMPTS)]
    aims = Aims(examples, lambda _: judge, SETTINGS, SETTINGS, None, (), folder / "store")
    aims = replace(aims, **changed)
    place, engine = folder / "attack", Engine(Runtime())
    return Arena(world.model("sd"), world.model("sd", 3), aims, config, place, engine, 0)


def test_long_prompts_are_dropped_and_still_counted(tmp_path: Path) -> None:
    config = NoAttackConfig(max_tokens=6)
    where, attack = arena(tmp_path, config, Never()), NoAttack(config)
    assert where.dropped == {"1"} and [e.id for e in where.attackable] == ["0", "2"]
    attack.hunt(where)
    found = where.finish()
    assert [(row.id, row.dropped, row.attacked) for row in found] == [
        ("0", False, False),
        ("1", True, False),
        ("2", False, False),
    ]
    result = attack.result(found, 1.0)
    assert result.values["asr"].n == 3
    assert "1 too long, counted as they are" in result.values["asr"].note


def test_long_prompts_are_cut_if_asked(tmp_path: Path) -> None:
    where = arena(tmp_path, PromptAttackConfig(max_tokens=6, over_long="truncate"), Never())
    assert not where.dropped
    assert where.examples[1].prompt == "a cat image in"


def test_a_tokenizer_of_another_pipeline_is_refused() -> None:
    model = world.model("sd")
    model.text_encoder.resize_token_embeddings(len(model.tokenizer) - 5)  # type: ignore[operator, union-attr]
    with pytest.raises(DataError, match="belong to different pipelines"):
        tables(model)


def test_only_the_same_attack_is_resumed(tmp_path: Path) -> None:
    config, judge = NoAttackConfig(), Never()
    attack = NoAttack(config)
    attack.hunt(arena(tmp_path, config, judge))
    assert judge.seen == 3
    attack.hunt(arena(tmp_path, config, judge))
    assert judge.seen == 3  # nothing is left to do
    attack.hunt(arena(tmp_path, config, judge, targets=replace(SETTINGS, steps=3)))
    assert judge.seen == 6  # other target pictures: another attack


def test_running_out_of_memory_names_the_knob(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GradientConfig(stages=1, iterations=1, images=2)
    attack = TextGrad(config)
    monkeypatch.setattr(attack, "arena", lambda trial: arena(tmp_path, config, Never()))

    def out(_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(attack, "hunt", out)
    with pytest.raises(ResourceError, match=r"attack\.NAME\.batch_size"):
        attack.run(None, attack.budget())  # type: ignore[arg-type]
