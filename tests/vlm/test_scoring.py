"""Scores are the same for batch 1, padded batches and shared prefixes, in every family."""

import logging
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mmforget.errors import CollapsedError, ConfigError, DataError
from mmforget.vlm import branches, scoring
from mmforget.vlm.branches import Tree, added, lay, packed
from mmforget.vlm.chat import Chat, Item
from mmforget.vlm.models import VLM, Lora
from mmforget.vlm.scores import TokenScores
from mmforget.vlm.scoring import Ask, score
from tests.vlm.families import CASES, build, picture

QUESTIONS = (
    "What is the name of the person in the image?",
    "What is the job of the person?",
    "Is there a dog?",
)
ANSWERS = ("Ada Moreno.", "Ada Moreno, born in Lisbon on 3 May 1984.", "no", "Lisbon")
CLOSE = 1e-4
Scores = Sequence[Sequence[TokenScores]]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{k}.png" for k in range(2)]
    for k, (path, size) in enumerate(zip(paths, ((40, 40), (32, 80)), strict=True)):
        picture(k, *size).save(path)
    return paths


@lru_cache
def net_of(family: str) -> tuple[Any, Any]:
    return build(family)


def vlm(family: str = "llava") -> VLM:
    """A VLM of its own: nothing is remembered of earlier checks; the weights are shared."""
    return VLM(*net_of(family), family)


def llava() -> VLM:
    return VLM(*build("llava"), "llava")


def world(images: Sequence[Path]) -> tuple[list[Ask], list[tuple[str, ...]]]:
    """Two images of different shapes in mixed order; one is asked about once; one has no image."""
    asks = [
        Ask(images[0], QUESTIONS[0]),
        Ask(None, QUESTIONS[1]),
        Ask(images[1], QUESTIONS[1]),
        Ask(images[0], QUESTIONS[2]),
        Ask(None, QUESTIONS[2]),
        Ask(images[0], QUESTIONS[1]),
    ]
    return asks, [ANSWERS, ANSWERS[2:], ANSWERS[:1], (), ANSWERS[:3], ANSWERS[1:3]]


def alone(model: VLM, chat: Chat, ask: Ask, text: str) -> TokenScores:
    """Scores from all logits of one row, by the definitions."""
    row = chat.encode(Item("", ask.image, ask.question, text))
    with torch.no_grad():
        logits = model.net(**chat.collate([row], "cpu")).logits[0].double()
    logs = logits.log_softmax(-1)[row.start - 1 : -1]
    tokens = torch.tensor(row.ids[row.start :])
    p = logs.exp()
    mean = (p * logs).sum(-1)
    return TokenScores(
        logs.gather(1, tokens[:, None])[:, 0].numpy(),
        mean.numpy(),
        ((p * logs**2).sum(-1) - mean**2).sqrt().numpy(),
        (logs.argmax(-1) == tokens).numpy(),
    )


def gap(first: Scores, second: Scores) -> float:
    pairs = [p for a, b in zip(first, second, strict=True) for p in zip(a, b, strict=True)]
    assert all((a.hit == b.hit).all() for a, b in pairs)
    return max(
        float(np.abs(getattr(a, name) - getattr(b, name)).max())
        for a, b in pairs
        for name in ("logp", "mean", "sigma")
    )


@pytest.mark.parametrize("family", CASES)
def test_all_ways_give_the_scores_of_rows_alone(
    family: str, images: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    model = vlm(family)
    chat = Chat(model)
    asks, answers = world(images)
    want = [
        [alone(model, chat, ask, text) for text in texts]
        for ask, texts in zip(asks, answers, strict=True)
    ]
    assert len({len(each.logp) for row in want for each in row}) > 3
    for size in (1, 4):
        assert gap(score(model, chat, asks, answers, batch_size=size, shared="off"), want) < CLOSE
    if family == "gemma3":  # one of its layers sees 8 tokens
        with pytest.raises(ConfigError, match="a layer sees 8 tokens"):
            score(model, chat, asks, answers, shared="on")
    else:
        for size in (1, 3, 64):
            assert gap(score(model, chat, asks, answers, batch_size=size, shared="on"), want) < 2e-5
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        assert gap(score(model, chat, asks, answers), want) < CLOSE
    assert len(caplog.records) == (family == "gemma3")  # said once
    # The image matters by far more than the tolerances.
    other = [Ask(ask.image and images[ask.image == images[0]], ask.question) for ask in asks]
    assert gap_of_logp(score(model, chat, other, answers)[0], want[0]) > 0.01


def gap_of_logp(first: Sequence[TokenScores], second: Sequence[TokenScores]) -> float:
    return max(float(np.abs(a.logp - b.logp).max()) for a, b in zip(first, second, strict=True))


def test_layers_with_windows_that_hold_all_share(images: list[Path]) -> None:
    net, processor = build("gemma3")
    text = net.config.text_config
    text.sliding_window = 60
    for layer in net.model.language_model.layers:
        if layer.self_attn.is_sliding:
            layer.self_attn.sliding_window = 60
    model = VLM(net, processor, "gemma3")
    chat = Chat(model)
    asks, answers = world(images)
    answers = [each[:1] for each in answers]
    on = score(model, chat, asks, answers, shared="on")
    assert gap(on, score(model, chat, asks, answers, shared="off")) < CLOSE
    with pytest.raises(ConfigError, match="60 tokens"):
        score(model, chat, asks[:1], [["Lisbon " * 40]], shared="on")


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "mllama"])
def test_eager_attention(family: str, images: list[Path]) -> None:
    net, processor = build(family)
    asks, answers = world(images)
    model = VLM(net, processor, family)
    chat = Chat(model)
    want = score(model, chat, asks, answers, shared="off")
    net.set_attn_implementation("eager")
    assert gap(score(model, chat, asks, answers, shared="on"), want) < CLOSE
    net.config.get_text_config()._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="takes no mask of its own"):
        score(model, chat, asks, answers, shared="on")


def test_images_and_common_tokens_are_computed_once(images: list[Path]) -> None:
    model = llava()
    chat = Chat(model)
    asks, answers = world(images)
    seen = {"images": 0, "tokens": 0}

    def count(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen["tokens"] += int(kwargs["input_ids"].numel())
        pixels = kwargs.get("pixel_values")
        seen["images"] += 0 if pixels is None else len(pixels)

    model.net.register_forward_pre_hook(count, with_kwargs=True)
    score(model, chat, asks, answers, shared="on")
    assert seen["images"] == 2
    # About one image: each distinct beginning of a row, but for whole rows, which predict nothing.
    mine = [k for k, ask in enumerate(asks) if ask.image == images[0]]
    rows = [
        chat.encode(Item("", *asks[k], text)).ids  # type: ignore[arg-type]
        for k in mine
        for text in answers[k]
    ]
    asks, answers = [asks[k] for k in mine], [answers[k] for k in mine]
    seen.update(images=0, tokens=0)
    score(model, chat, asks, answers, shared="on")
    distinct = {tuple(row[:k]) for row in rows for k in range(1, len(row))}
    assert seen == {"images": 1, "tokens": len(distinct)}
    seen.update(images=0, tokens=0)
    score(model, chat, asks, answers, shared="off")
    assert seen["images"] == len(rows) and seen["tokens"] > 3 * len(distinct)


def test_many_rows_are_cut_into_trees(images: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = vlm()
    chat = Chat(model)
    asks, answers = world(images)
    want = score(model, chat, asks, answers, shared="off")
    for size in (1, 20):
        monkeypatch.setattr(scoring, "TREE", size)
        assert gap(score(model, chat, asks, answers, shared="on"), want) < CLOSE
    monkeypatch.setitem(scoring.HEAD, "cpu", 1)  # logits are scored one by one
    assert gap(score(model, chat, asks, answers, shared="on"), want) < CLOSE


def test_a_tree_holds_each_beginning_once() -> None:
    rows = [[7, 8, 9], [7, 8, 5, 6], [4]]
    tree, other = Tree(rows, [2, 3, 0]), Tree([[3, 3]], [0])
    # In sorted order: 4 | 7 8 5 6 | 9.
    assert tree.ids.tolist() == [4, 7, 8, 5, 6, 9]
    assert tree.depth.tolist() == [0, 0, 1, 2, 3, 2]
    assert tree.ends.tolist() == [1, 6, 6, 5, 5, 6]
    assert [path.tolist() for path in tree.paths] == [[1, 2, 5], [1, 2, 3, 4], [0]]
    assert tree.wanted.tolist() == [True, False, False, False, True, True]
    forest = lay([tree, other], pad=1)
    # Wanted nodes stand last: 7 8 5 | 4 6 9, and of the other tree 1 1 1 1 | 3 3.
    assert forest.ids.tolist() == [[7, 8, 5, 4, 6, 9], [1, 1, 1, 1, 3, 3]]
    assert forest.depth.tolist() == [[0, 1, 2, 0, 3, 2], [0, 0, 0, 0, 0, 1]]
    assert forest.keep == 3 and forest.length == 6
    assert forest.logit(0, np.array([0, 4, 5])).tolist() == [0, 1, 2]
    assert forest.logit(1, np.array([0, 1])).tolist() == [4, 5]
    own = forest.own(torch.device("cpu")).int()
    assert own[0].tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [1, 1, 1, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]
    assert own[1].tolist() == [
        [1, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]
    assert added([[4], [7, 8, 5, 6], [7, 8, 9], [7, 8, 9]]).tolist() == [1, 4, 1, 0]
    assert list(packed("abcd", [2, 2, 9, 1], 4)) == [["a", "b"], ["c"], ["d"]]
    assert list(packed([], [], 4)) == []


@pytest.mark.parametrize("shared", ["on", "off"])
def test_a_model_that_knows_nothing(shared: str, images: list[Path]) -> None:
    model = llava()
    nn.init.zeros_(model.net.lm_head.weight)
    width = model.net.lm_head.out_features
    asks, answers = world(images)
    for row in score(model, Chat(model), asks, answers, shared=shared):
        for each in row:
            assert np.allclose(each.logp, -math.log(width), atol=1e-5)
            assert np.allclose(each.mean, -math.log(width), atol=1e-5)
            assert np.allclose(each.sigma, 0, atol=1e-5)
            assert each.logp.dtype == np.float64 and each.hit.dtype == np.bool_
    nn.init.constant_(model.net.lm_head.weight, math.nan)
    with pytest.raises(CollapsedError, match="not finite"):
        score(model, Chat(model), asks, answers, shared=shared)


@pytest.mark.parametrize("shared", ["on", "off"])
def test_end_token_and_window(
    shared: str, images: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    model = vlm()
    asks, answers = [Ask(images[0], QUESTIONS[0])], [ANSWERS[:2]]
    row = Chat(model).encode(Item("", images[0], QUESTIONS[0], ANSWERS[1]))
    (whole,) = score(model, Chat(model), asks, answers, shared=shared)
    (bare,) = score(model, Chat(model, end_token=False), asks, answers, shared=shared)
    for with_end, without in zip(whole, bare, strict=True):
        assert len(with_end.logp) == len(without.logp) + 1
        assert np.allclose(with_end.logp[:-1], without.logp, atol=1e-5)
    assert len(whole[1].logp) == len(row.ids) - row.start
    assert not caplog.records
    (cut,) = score(model, Chat(model, len(row.ids) - 3), asks, answers, shared=shared)
    assert np.allclose(cut[1].logp, whole[1].logp[:-3], atol=1e-5)
    assert np.allclose(cut[0].logp, whole[0].logp, atol=1e-5)
    assert "1 answers are cut" in caplog.text
    with pytest.raises(DataError, match="window"):
        score(model, Chat(model, row.start), asks, answers, shared=shared)
    with pytest.raises(DataError, match="no tokens"):
        score(model, Chat(model, end_token=False), asks, [[""]], shared=shared)


def test_a_model_that_differs_the_shared_way_is_found_out(
    images: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = vlm()
    chat = Chat(model)
    asks, answers = world(images)
    want = score(model, chat, asks, answers, shared="off")
    step = branches.Branches.step

    def shifted(self: Any, ids: Any, depth: Any, seen: Any, keep: int) -> torch.Tensor:
        return step(self, ids, depth + 2, seen, keep)

    monkeypatch.setattr(branches.Branches, "step", shifted)
    assert gap_of_logp(score(model, chat, asks, answers, shared="on")[0], want[0]) > 0.01
    for _ in range(2):
        assert gap(score(model, chat, asks, answers), want) < CLOSE
    assert len(caplog.records) == 2  # once with images, once without
    assert "padded batches" in caplog.text and "would differ by" in caplog.text

    def failing(self: Any, *args: Any) -> torch.Tensor:
        raise RuntimeError("no such mask")

    monkeypatch.setattr(branches.Branches, "step", failing)
    fresh = vlm()
    assert gap(score(fresh, chat, asks, answers), want) < CLOSE
    assert "RuntimeError: no such mask" in caplog.text


def test_text_before_the_image_is_not_shared(
    images: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    model = llava()
    template = model.processor.chat_template
    model.processor.chat_template = (
        "{%- for message in messages -%}{%- for item in message.content if item.type == 'text' -%}"
        "{{- item.text -}}{%- endfor -%}{%- for item in message.content if item.type == 'image' -%}"
        "<image>{%- endfor -%}{%- if message.role == 'assistant' -%}</s>{%- endif -%}"
        "{%- endfor -%}"
    )
    chat = Chat(model)
    asks = [Ask(images[0], question) for question in QUESTIONS]
    answers = [ANSWERS[:2]] * 3
    want = [[alone(model, chat, ask, text) for text in ANSWERS[:2]] for ask in asks]
    assert gap(score(model, chat, asks, answers), want) < CLOSE
    assert "image does not stand before the text" in caplog.text
    with pytest.raises(ConfigError, match="does not stand before"):
        score(model, chat, asks, answers, shared="on")
    model.processor.chat_template = template


def test_adapters_and_modes(images: list[Path]) -> None:
    model = llava()
    chat = Chat(model)
    asks, answers = world(images)
    before = score(model, chat, asks, answers)
    model.attach(Lora(rank=4, alpha=8.0, dropout=0.5))
    model.train()
    model.vision.eval()  # type: ignore[union-attr]
    assert gap(score(model, chat, asks, answers, shared="on"), before) < CLOSE
    assert model.training and model.layers.training
    assert model.vision is not None and not model.vision.training
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3)
    on = score(model, chat, asks, answers, shared="on")
    assert gap_of_logp(on[0], before[0]) > 0.01
    assert gap(on, score(model, chat, asks, answers, shared="off")) < CLOSE
    # What was scored can be trained on afterwards.
    row = chat.encode(Item("", images[0], QUESTIONS[0], ANSWERS[0]))
    model.logits(chat.collate([row], "cpu")).sum().backward()


def test_half_precision_shares(images: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    model = vlm()
    chat = Chat(model)
    asks, answers = world(images)
    want = score(model, chat, asks, answers)

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    rough = score(model, chat, asks, answers, autocast=autocast)
    assert not caplog.records
    gaps = [
        np.abs(a.logp - b.logp)
        for p, q in zip(rough, want, strict=True)
        for a, b in zip(p, q, strict=True)
    ]
    assert 1e-4 < np.concatenate(gaps).mean() < 0.05  # it did compute in half precision


def test_arguments_and_empty_lists(images: list[Path]) -> None:
    model = vlm()
    chat = Chat(model)
    assert score(model, chat, [], []) == []
    assert score(model, chat, [Ask(images[0], QUESTIONS[0])], [[]]) == [[]]
    with pytest.raises(ConfigError, match="batch_size=0"):
        score(model, chat, [], [], batch_size=0)
    with pytest.raises(ConfigError, match="shared='maybe'; accepted are auto, on, off"):
        score(model, chat, [], [], shared="maybe")
    with pytest.raises(DataError, match="1 questions and 0 lists"):
        score(model, chat, [Ask(None, QUESTIONS[0])], [])
