"""Answers are those of plain `generate`, one prompt at a time, in every family."""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import pytest
import torch

from mmforget.errors import ConfigError
from mmforget.vlm import generation
from mmforget.vlm.chat import Chat
from mmforget.vlm.generation import Job, Rule, generate
from mmforget.vlm.models import VLM
from mmforget.vlm.scoring import Ask
from tests.vlm.families import CASES, build, picture

QUESTIONS = (
    "What is the name of the person in the image?",
    "What is the job of the person?",
    "Is there a dog?",
)
STEPS = 14


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def asks(tmp_path_factory: pytest.TempPathFactory) -> list[Ask]:
    """Two images of different shapes in mixed order, one asked about once; and two without."""
    folder = tmp_path_factory.mktemp("images")
    first, second = folder / "0.png", folder / "1.png"
    picture(0, 40, 40).save(first)
    picture(1, 32, 80).save(second)
    return [
        Ask(first, QUESTIONS[0]),
        Ask(None, QUESTIONS[1]),
        Ask(second, QUESTIONS[1]),
        Ask(first, QUESTIONS[2]),
        Ask(None, QUESTIONS[2]),
        Ask(first, QUESTIONS[1]),
    ]


@lru_cache
def net_of(family: str) -> tuple[Any, Any]:
    return build(family)


def vlm(family: str = "llava") -> VLM:
    """A VLM of its own: nothing is remembered of earlier checks; the weights are shared."""
    return VLM(*net_of(family), family)


def plain(model: VLM, chat: Chat, asks: Sequence[Ask], steps: int = STEPS) -> list[list[int]]:
    """Ids of transformers' own generation, one prompt at a time."""
    made = []
    for ask in asks:
        inputs = chat.collate([chat.prompt(*ask)], "cpu")
        ids = model.net.generate(
            **inputs, max_new_tokens=steps, do_sample=False, eos_token_id=list(chat.ends)
        )
        made.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
    return made


def ending(model: VLM, chat: Chat, asks: Sequence[Ask]) -> list[list[int]]:
    """Let three tokens that answers hold end them, early and late; return plain answers so."""
    found = plain(model, chat, asks)
    late = Counter(token for ids in found for token in ids[3:])
    chat.ends = (*chat.ends, *[token for token, _ in late.most_common()[:3]])
    return plain(model, chat, asks)


@pytest.mark.parametrize("family", CASES)
def test_greedy_answers_are_those_of_plain_generation(family: str, asks: list[Ask]) -> None:
    model = vlm(family)
    chat = Chat(model)
    if family == "gemma3":  # these weights repeat a token
        ids = plain(model, chat, asks)
    else:
        ids = ending(model, chat, asks)
        lengths = {len(row) for row in ids}
        assert len(lengths) > 1 and min(lengths) < STEPS
    want = [[chat.decode(row)] for row in ids]
    ways = [(1, "off"), (4, "off"), (64, "auto")]
    if family == "gemma3":  # one of its layers sees 8 tokens
        with pytest.raises(ConfigError, match="a layer sees 8 tokens"):
            generate(model, chat, asks, max_new_tokens=STEPS, shared="on")
    else:
        ways += [(1, "on"), (3, "on"), (64, "on")]
    for size, shared in ways:
        made = generate(model, chat, asks, max_new_tokens=STEPS, batch_size=size, shared=shared)
        assert made == want, (size, shared)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "mllama", "gemma3"])
def test_samples_do_not_depend_on_the_batch(family: str, asks: list[Ask]) -> None:
    model = vlm(family)
    chat = Chat(model)
    chat.ends = (*chat.ends, *range(40, 70))  # answers of all lengths

    def sampled(asks: Sequence[Ask], **given: Any) -> list[list[str]]:
        settings = {"seed": 3, "samples": 3, "temperature": 1.0, "top_p": 0.9, **given}
        return generate(model, chat, asks, max_new_tokens=STEPS, **settings)

    want = sampled(asks, batch_size=1, shared="off")
    texts = [text for row in want for text in row]
    assert len(set(texts)) >= len(texts) - 2 and len(set(map(len, texts))) > 4
    for size in (2, 5, 64):
        assert sampled(asks, batch_size=size) == want
    assert sampled(asks, batch_size=7, shared="off") == want
    assert sampled(asks[:3]) == want[:3]  # what else is asked does not matter
    assert [row[:2] for row in want] == sampled(asks, samples=2)
    others = {text for row in sampled(asks, seed=4) for text in row}
    assert len(set(texts) & others) <= 1  # the empty answer
    # The same question at another place draws anew.
    first, again = sampled([asks[0], asks[0]])
    assert first == want[0] and not set(first) & set(again)


def test_finished_answers_leave_and_room_grows(
    asks: list[Ask], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = vlm()
    chat = Chat(model)
    want = [[chat.decode(row)] for row in ending(model, chat, asks)]
    calls = []
    living = generation._living

    def counted(*args: Any) -> Any:
        calls.append(args)
        return living(*args)

    monkeypatch.setattr(generation, "_living", counted)
    monkeypatch.setattr(generation, "ROOM", 1)
    for width in (1, 2, 16):
        monkeypatch.setattr(generation, "SIDE_BY_SIDE", width)
        assert generate(model, chat, asks, max_new_tokens=STEPS, shared="on") == want
    assert calls  # answers did leave
    # As on a GPU, where what is finished is looked at every few steps.
    for every in (3, 100):
        monkeypatch.setitem(generation.EVERY, "cpu", every)
        assert generate(model, chat, asks, max_new_tokens=STEPS, shared="on") == want


def test_unfinished_answers_and_what_they_see_are_kept() -> None:
    done = torch.tensor([[True, False, True], [True, True, True], [False, True, False]])
    seen = torch.zeros(3, 3, 6, dtype=torch.bool)
    seen[:, :, 0] = True
    seen[0, 1, 4], seen[0, 0, 3] = True, True
    seen[2, 0, 2], seen[2, 2, 5], seen[2, 1, 1] = True, True, True
    chosen, slots, columns = generation._living(done, seen, [1, 0, 2])
    assert chosen.tolist() == [0, 2]
    assert slots.tolist() == [[1, 0], [0, 2]]  # the second of the first is filled up
    assert columns.tolist() == [[0, 4, 1], [0, 2, 5]]  # so is its third token


def test_an_answer_can_stop_at_its_first_full_stop(asks: list[Ask]) -> None:
    model = vlm()
    chat = Chat(model)
    # Random weights write few full stops: what they do write is given one.
    ids = plain(model, chat, asks)
    words = dict(chat.tokenizer.get_vocab())
    names = {id: word for word, id in words.items()}
    stop = Counter(token for row in ids for token in row[1:]).most_common(1)[0][0]
    del words[names[stop]]
    words["Dr."] = stop
    chat.tokenizer = Spoken(chat.tokenizer, words)
    stops = {id for word, id in words.items() if "." in word}
    want = []
    for row in ids:
        places = [k for k, token in enumerate(row) if token in stops]
        want.append([chat.decode(row[: places[0] + 1] if places else row)])
    assert want != [[chat.decode(row)] for row in ids]
    for shared in ("on", "off"):
        found = generate(
            model, chat, asks, max_new_tokens=STEPS, stop_at_sentence=True, shared=shared
        )
        assert found == want, shared


class Spoken:
    """A tokenizer with some other words in its vocabulary."""

    def __init__(self, inner: Any, words: dict[str, int]) -> None:
        self.inner, self.words = inner, words

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def get_vocab(self) -> dict[str, int]:
        return self.words


@pytest.mark.parametrize("shared", ["on", "off"])
def test_the_window_ends_answers(
    shared: str, asks: list[Ask], caplog: pytest.LogCaptureFixture
) -> None:
    model = vlm()
    whole = Chat(model)
    ids = plain(model, whole, asks)
    lengths = [len(whole.prompt(*ask).ids) for ask in asks]
    chat = Chat(model, max_length=max(lengths) + 4)
    want = [
        [chat.decode(row[: chat.max_length - length])]
        for row, length in zip(ids, lengths, strict=True)
    ]
    made = generate(model, chat, asks, max_new_tokens=STEPS, shared=shared)
    assert made == want and made != [[chat.decode(row)] for row in ids]
    short = sum(chat.max_length - length < STEPS for length in lengths)
    assert f"{short} answers have fewer than {STEPS} tokens" in caplog.text


def test_a_rule_draws_from_the_nucleus() -> None:
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log()
    chat = Chat(vlm())

    def shares(temperature: float, top_p: float) -> list[float]:
        rule = Rule(chat, 4, temperature, top_p, 0, False)
        drawn = (torch.arange(4000) + 0.5) / 4000
        picked = rule.pick(logits.expand(4000, -1), drawn)
        return (torch.bincount(picked, minlength=4) / 4000).tolist()

    assert shares(1.0, 1.0) == pytest.approx([0.05, 0.5, 0.15, 0.3], abs=1e-3)
    assert shares(1.0, 0.75) == pytest.approx([0, 0.625, 0, 0.375], abs=1e-3)
    assert shares(1.0, 0.81) == pytest.approx([0, 0.5 / 0.95, 0.15 / 0.95, 0.3 / 0.95], abs=1e-3)
    assert shares(1.0, 0.3) == [0, 1, 0, 0]  # never fewer than one
    squares = [p**2 / 0.365 for p in (0.05, 0.5, 0.15, 0.3)]
    assert shares(0.5, 1.0) == pytest.approx(squares, abs=1e-3)
    rule = Rule(chat, 4, 1.0, 0.75, 0, False)
    edges = torch.tensor([0.0, 1 - 2**-24])
    assert rule.pick(logits.expand(2, -1), edges).tolist() == [1, 3]
    assert Rule(chat, 4, 0.0, 1.0, 0, False).pick(logits, None).item() == 1


def test_draws_are_those_of_a_row() -> None:
    rule = Rule(Chat(vlm()), 5, 1.0, 1.0, 7, False)
    jobs = [Job(k, s, 5) for k in range(3) for s in range(2)]
    whole = rule.draws(jobs, torch.device("cpu"))
    assert whole is not None and whole.shape == (6, 5)
    assert len(set(whole.flatten().tolist())) == 30 and 0 <= whole.min() <= whole.max() < 1
    part = rule.draws([jobs[4], jobs[1]], torch.device("cpu"))
    assert part is not None and torch.equal(part, whole[[4, 1]])


def test_settings_of_the_model_do_not_matter(asks: list[Ask]) -> None:
    net, processor = build("llava")
    model = VLM(net, processor, "llava")
    chat = Chat(model)
    want = [[chat.decode(row)] * 2 for row in plain(model, chat, asks)]
    net.generation_config.repetition_penalty = 5.0
    net.generation_config.max_new_tokens = 2
    kept = net.generation_config
    assert [[chat.decode(row)] * 2 for row in plain(model, chat, asks)] != want
    model.train()
    for shared in ("on", "off"):
        found = generate(model, chat, asks, max_new_tokens=STEPS, samples=2, shared=shared)
        assert found == want
    assert net.generation_config is kept and model.training


def test_arguments(asks: list[Ask]) -> None:
    model = vlm()
    chat = Chat(model)
    assert generate(model, chat, [], max_new_tokens=3) == []
    for name, value in (
        ("max_new_tokens", 0),
        ("samples", 0),
        ("temperature", -1.0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("batch_size", 0),
    ):
        with pytest.raises(ConfigError, match=f"{name}={value}; accepted are"):
            generate(model, chat, asks, **{"max_new_tokens": 3, name: value})
    with pytest.raises(ConfigError, match="shared='never'"):
        generate(model, chat, asks, max_new_tokens=3, shared="never")
