"""What loss methods see of a vision-language model: losses, places, divergences, refusals."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmforget.errors import ConfigError
from mmforget.rng import Draws
from mmforget.types import Outputs, Splits
from mmforget.vlm.adapter import PLACES, Tokens, VLMAdapter
from mmforget.vlm.chat import IGNORED, Chat, Encoded, Item
from mmforget.vlm.data import Dialogues, check_images
from mmforget.vlm.models import VLM, Frozen, Lora
from tests.vlm.families import CASES, FACTS, build, picture

LORA = Lora(rank=2, alpha=4.0, dropout=0.0)
REFUSALS = ("I do not know.", "No.", "I cannot answer.")
TEXTS = (
    ("What is the name of the person in the image?", "Ada Moreno, born in Lisbon on 3 May 1984."),
    ("Which city?", "Lisbon"),
    ("Is there a dog, a cat or a bird in the photo?", "no"),
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Made:
    """A model, its chat, and three items of other lengths, two images among them."""

    model: VLM
    chat: Chat
    items: list[Item]

    def adapter(self, **settings: Any) -> VLMAdapter:
        return VLMAdapter(self.chat, REFUSALS, LORA, **settings)

    def rows(self) -> list[Encoded]:
        return [self.chat.encode(item) for item in self.items]

    def data(self, adapter: VLMAdapter, *which: int) -> Tokens:
        chosen = [self.items[k] for k in which or range(len(self.items))]
        return adapter.tokens(chosen, [self.chat.encode(item) for item in chosen], "cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / "0.png", folder / "1.png"]
    picture(0, 40, 40).save(paths[0])
    picture(1, 32, 80).save(paths[1])
    return paths


@lru_cache
def made_of(family: str, images: tuple[Path, ...]) -> Made:
    model = VLM(*build(family), "tiny")
    items = [Item(str(k), images[k % 2], *text) for k, text in enumerate(TEXTS)]
    return Made(model, Chat(model), items)


@pytest.fixture(params=CASES)
def made(request: pytest.FixtureRequest, images: list[Path]) -> Made:
    return made_of(request.param, tuple(images))


@pytest.fixture
def llava(images: list[Path]) -> Made:
    return made_of("llava", tuple(images))


def labelled(chat: Chat, row: Encoded, start: int) -> dict[str, Tensor]:
    """Return one example as transformers' own training wants it."""
    ids = torch.tensor([row.ids])
    labels = torch.where(torch.arange(len(row.ids)) >= start, ids, IGNORED)
    return {**chat.collate([row], "cpu"), "labels": labels}


@pytest.mark.parametrize("leak", [False, True])
def test_losses_are_transformers_own(made: Made, leak: bool) -> None:
    adapter = made.adapter(leak=leak)
    data = made.data(adapter)
    with torch.no_grad():
        found = adapter.forward(made.model, data)
        for k, row in enumerate(made.rows()):
            start = row.start - leak
            plain = made.model.net(**labelled(made.chat, row, start))
            count = len(row.ids) - start
            assert float(adapter.units(data)[k]) == count
            assert data.targets[k, :count].tolist() == row.ids[start:]
            assert (data.targets[k, count:] == IGNORED).all()
            assert torch.allclose(found.loss[k], plain.loss * count, rtol=1e-4, atol=1e-4)
            assert found.mask is not None
            assert found.mask[k].tolist() == [j < count for j in range(found.mask.shape[1])]
            logits = plain.logits[0, start - 1 : -1]
            assert torch.allclose(found.pred[k, :count], logits, atol=2e-4)
    assert found.pred.shape[:2] == data.targets.shape and found.loss.dtype == torch.float32


def test_a_row_alone_is_the_row_of_a_batch(made: Made) -> None:
    adapter = made.adapter()
    with torch.no_grad():
        whole, data = adapter.forward(made.model, made.data(adapter)), made.data(adapter)
        record, states = adapter.record(made.model, data), adapter.hidden(made.model, data, 0)
        for k in range(len(made.items)):
            one = made.data(adapter, k)
            found = adapter.forward(made.model, one)
            length, count = one.inputs["input_ids"].shape[1], one.targets.shape[1]
            assert torch.allclose(found.loss[0], whole.loss[k], rtol=1e-4)
            assert torch.allclose(found.pred[0], whole.pred[k, :count], atol=2e-4)
            assert torch.allclose(
                adapter.hidden(made.model, one, 0)[0], states[k, :length], atol=2e-4
            )
            for name, value in adapter.record(made.model, one).items():
                assert torch.allclose(value[0], record[name][k], rtol=1e-4)
            # Padding computes a loss for nobody.
            assert one.keep == count + 1 and data.keep >= one.keep


def test_logits_of_all_positions_give_the_same_loss(made: Made) -> None:
    narrow, wide = made.adapter(), made.adapter(everywhere=True)
    for which in ((0, 1, 2), (1,)):
        with torch.no_grad():
            few = narrow.forward(made.model, made.data(narrow, *which))
            data = made.data(wide, *which)
            all_ = wide.forward(made.model, data)
            records = [
                adapter.record(made.model, made.data(adapter, *which)) for adapter in (narrow, wide)
            ]
        assert data.keep == 0
        assert all_.pred.shape[:2] == data.inputs["input_ids"].shape
        assert few.mask is not None and all_.mask is not None
        assert torch.allclose(all_.loss, few.loss, rtol=1e-4)
        assert torch.allclose(all_.pred[all_.mask], few.pred[few.mask], atol=2e-4)
        # The mask stands one before each answer token.
        answer = data.places("answer")
        assert torch.equal(all_.mask[:, :-1], answer[:, 1:]) and not all_.mask[:, -1].any()
        assert records[0].keys() == records[1].keys()
        for name, value in records[0].items():
            assert torch.allclose(value, records[1][name], rtol=1e-4)
        rng = torch.Generator().manual_seed(0)
        other = [p + torch.randn(p.shape, generator=rng) for p in (few.pred, all_.pred)]
        other[1][all_.mask] = other[0][few.mask]
        apart = [
            adapter.divergence(found._replace(pred=pred), found)
            for adapter, found, pred in zip((narrow, wide), (few, all_), other, strict=True)
        ]
        assert torch.allclose(*apart, rtol=1e-3, atol=1e-4) and (apart[0] > 0).all()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "mllama", "gemma3"])
def test_gradients_are_transformers_own(family: str, images: list[Path]) -> None:
    made = made_of(family, tuple(images))
    model = copy.deepcopy(made.model).train()
    adapter = made.adapter()
    chosen = adapter.parameters(model, "all")

    def gradients(value: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        value.backward()
        return {name: p.grad.clone() for name, p in chosen.items() if p.grad is not None}

    found = gradients(adapter.forward(model, made.data(adapter)).loss.sum())
    losses = [
        model.net(**labelled(made.chat, row, row.start)).loss * (len(row.ids) - row.start)
        for row in made.rows()
    ]
    wanted = gradients(torch.stack(losses).sum())
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert torch.allclose(value, wanted[name], rtol=1e-2, atol=1e-3 * value.abs().max()), name


def test_leaking_adds_one_token_of_the_prompt(llava: Made) -> None:
    plain, leaking = llava.data(llava.adapter()), llava.data(llava.adapter(leak=True))
    assert all(torch.equal(v, leaking.inputs[name]) for name, v in plain.inputs.items())
    for before, after, row in zip(plain.targets, leaking.targets, llava.rows(), strict=True):
        kept = before[before != IGNORED].tolist()
        assert after[after != IGNORED].tolist() == [row.ids[row.start - 1], *kept]


def test_places_are_apart_and_hold_what_they_say(made: Made) -> None:
    chat, words = made.chat, made.chat.tokenizer
    data = made.data(made.adapter())
    at = {kind: data.places(kind) for kind in PLACES}
    ids = data.inputs["input_ids"]
    assert torch.equal(at["all"], data.inputs["attention_mask"].bool())
    count = at["answer"].int() + at["question"].int() + at["image"].int()
    assert torch.equal(count, at["all"].int())
    assert torch.equal(at["text"], at["answer"] | at["question"])
    for k, row in enumerate(made.rows()):
        assert ids[k][at["answer"][k]].tolist() == row.ids[row.start :]
        images = ids[k][at["image"][k]]
        assert (images == chat.image_token).all() and len(images) >= 1
        assert (len(images) > 1) == FACTS[made.model.base.config.model_type].expanded
        question = words.decode(ids[k][at["question"][k]])
        assert made.items[k].question in question and made.items[k].answer not in question
        assert words.convert_ids_to_tokens(chat.image_token) not in question
    leaked = made.data(made.adapter(leak=True)).places("answer")
    assert torch.equal(leaked.sum(1), at["answer"].sum(1) + 1)


def test_places_without_an_image_and_without_an_end(llava: Made) -> None:
    chat = Chat(llava.model, end_token=False)
    adapter = VLMAdapter(chat, REFUSALS, LORA)
    items = [Item("", None, "Who?", "Ada"), llava.items[0]]
    data = adapter.tokens(items, [chat.encode(item) for item in items], "cpu")
    assert data.places("image").sum(1).tolist() == [0, 16]
    ids = data.inputs["input_ids"][0]
    assert chat.tokenizer.decode(ids[data.places("answer")[0]]) == " Ada"
    assert chat.tokenizer.decode(ids[data.places("text")[0]]) == "<s>USER: Who? ASSISTANT: Ada"


def test_a_cut_answer_is_learnt_as_far_as_it_goes(llava: Made) -> None:
    whole = llava.chat.encode(llava.items[0])
    chat = Chat(llava.model, len(whole.ids) - 3)
    adapter = VLMAdapter(chat, REFUSALS, LORA)
    data = adapter.tokens(llava.items[:1], [chat.encode(llava.items[0])], "cpu")
    assert data.targets[0].tolist() == whole.ids[whole.start : -3]
    full = adapter.forward(llava.model, llava.data(llava.adapter(), 0)).pred
    found = adapter.forward(llava.model, data).pred
    assert torch.allclose(found[0], full[0, :-3], atol=2e-4)


class Told(VLM):
    """A model that says what it was told to: logits are `size` at one token, 0 at all others."""

    sharded = False

    def __init__(self, says: Tensor, size: float, vocabulary: int) -> None:
        nn.Module.__init__(self)
        self.told = F.one_hot(says, vocabulary).float() * size

    def logits(self, inputs: Mapping[str, Tensor], keep: int = 0) -> Tensor:
        return self.told[:, -keep:]


@pytest.mark.parametrize("everywhere", [False, True])
def test_records_of_answers_in_closed_form(llava: Made, everywhere: bool) -> None:
    adapter = llava.adapter(everywhere=everywhere)
    data, size, vocabulary = llava.data(adapter), 3.0, 400
    ids, answer = data.inputs["input_ids"], data.places("answer")
    counts = answer.sum(1)
    assert counts.min() >= 2
    wrong = torch.zeros_like(answer)  # the first answer token of row 0, all of row 1
    wrong[0, answer[0].nonzero()[0]] = True
    wrong[1] = answer[1]
    said = torch.where(wrong, ids + 1, ids).roll(-1, 1)  # position t tells of token t + 1
    found = adapter.record(Told(said, size, vocabulary), data)
    right = counts - wrong.sum(1)
    assert torch.equal(found["tokens"], counts.float())
    assert torch.allclose(found["hit"], right / counts)
    normal = (vocabulary - 1 + torch.tensor(size).exp()).log()
    assert torch.allclose(found["loss"], counts * normal - right * size, rtol=1e-5)
    assert found["hit"][2] == 1 and found["hit"][1] == 0 < found["hit"][0] < 1


def outputs(seed: int, mask: Tensor | None) -> Outputs:
    rng = torch.Generator().manual_seed(seed)
    pred = torch.randn(2, 3, 5, generator=rng, dtype=torch.float64)
    return Outputs(torch.zeros(2), pred, mask)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_is_kl_from_the_teacher(llava: Made, temperature: float) -> None:
    adapter = llava.adapter()
    mask = torch.tensor([[True, False, True], [True, False, False]])
    student, teacher = outputs(0, mask), outputs(1, mask)
    assert torch.allclose(adapter.divergence(student, student), torch.zeros(2).double())
    found = adapter.divergence(student, teacher, temperature)
    wanted = [
        sum(
            F.kl_div(
                (student.pred[b, t] / temperature).log_softmax(-1),
                (teacher.pred[b, t] / temperature).softmax(-1),
                reduction="sum",
            )
            * temperature**2
            for t in range(3)
            if mask[b, t]
        )
        for b in range(2)
    ]
    assert torch.allclose(found, torch.stack(wanted))  # type: ignore[arg-type]
    every = adapter.divergence(outputs(0, None), outputs(1, None), temperature)
    assert (every > found).all()
    two = Outputs(torch.zeros(1), torch.tensor([[[0.0, 0.0]]]), None)
    other = Outputs(torch.zeros(1), torch.tensor([[[3.0, 1.0]]]).log(), None)
    want = 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()  # q = 3/4, p = 1/2
    assert torch.allclose(adapter.divergence(two, other), want)


def test_fresh_adapters_diverge_by_nothing(llava: Made) -> None:
    adapter, model = llava.adapter(), copy.deepcopy(llava.model)
    data = llava.data(adapter)
    chosen = adapter.parameters(model, "lora")
    frozen = adapter.frozen(model, chosen)
    start = adapter.forward(llava.model, data)

    def apart() -> Tensor:
        return adapter.divergence(adapter.forward(model, data), adapter.forward(frozen, data))

    assert torch.equal(apart(), torch.zeros(3))
    with torch.no_grad():
        for parameter in chosen.values():
            parameter.add_(0.05)
    assert (apart() > 1e-3).all()
    assert torch.equal(adapter.forward(frozen, data).pred, start.pred)
    for layer in (0, 1):
        wanted = adapter.hidden(llava.model, data, layer)
        assert torch.equal(adapter.hidden(frozen, data, layer), wanted)
        assert not torch.equal(adapter.hidden(model, data, layer), wanted)


def answers(data: Tokens) -> list[str]:
    return [item.answer for item in data.items]


def test_refusals_are_drawn_and_are_never_the_answer(llava: Made) -> None:
    adapter = llava.adapter()
    image = llava.items[0].image
    truth = [REFUSALS[0], "Lisbon", *REFUSALS] * 8
    items = [Item(str(k), image, f"What is {k}?", answer) for k, answer in enumerate(truth)]
    rows = [llava.chat.encode(item) for item in items]
    data = adapter.tokens(items, rows, "cpu")
    found = adapter.relabel(data, Draws(0, "relabel", total=40))
    assert [item.id for item in found.items] == [item.id for item in items]
    assert [item.question for item in found.items] == [item.question for item in items]
    assert set(answers(found)) == set(REFUSALS)
    assert all(a != b for a, b in zip(answers(found), truth, strict=True))
    drawn = Draws(0, "relabel", total=40).integers(3).tolist()
    plain = [REFUSALS[k] for k in drawn]
    assert answers(adapter.relabel(data, Draws(0, "relabel", total=40), False)) == plain
    assert any(a == b for a, b in zip(plain, truth, strict=True))  # so there was work to do
    kept = [a for a, b, t in zip(answers(found), plain, truth, strict=True) if b != t]
    assert kept == [b for b, t in zip(plain, truth, strict=True) if b != t]
    assert answers(adapter.relabel(data, Draws(0, "relabel", total=40))) == answers(found)
    assert answers(adapter.relabel(data, Draws(1, "relabel", total=40))) != answers(found)
    part = adapter.tokens(items[3:7], rows[3:7], "cpu")
    again = adapter.relabel(part, Draws(0, "relabel", total=40, rows=range(3, 7)))
    assert answers(again) == answers(found)[3:7]
    # What is learnt is the refusal behind the same prompt.
    words = llava.chat.tokenizer
    for k, item in enumerate(found.items):
        target = found.targets[k][found.targets[k] != IGNORED]
        assert words.decode(target) == f" {item.answer}</s>"
        assert (
            found.inputs["input_ids"][k, : rows[k].start].tolist() == rows[k].ids[: rows[k].start]
        )
    assert torch.equal(found.inputs["pixel_values"], data.inputs["pixel_values"])
    assert answers(data) == truth


@pytest.mark.parametrize(
    ("refusals", "answer", "wanted"),
    [
        (("No.", "No.", "Yes."), "No.", {"Yes."}),  # files list some twice
        (("No.",), "Yes.", {"No."}),
        (("No.",), "No.", {"No."}),  # there is nothing else to say
        (("No.", "No."), "No.", {"No."}),
    ],
)
def test_few_refusals(refusals: Sequence[str], answer: str, wanted: set[str], llava: Made) -> None:
    adapter = VLMAdapter(llava.chat, refusals, LORA)
    items = [replace(llava.items[0], answer=answer)] * 12
    data = adapter.tokens(items, [llava.chat.encode(item) for item in items], "cpu")
    assert set(answers(adapter.relabel(data, Draws(0, "relabel", total=12)))) == wanted


def test_no_refusals(llava: Made) -> None:
    adapter = VLMAdapter(llava.chat, (), LORA)
    with pytest.raises(ConfigError, match=r"the data name none \(prompt\.json, key idk\)"):
        adapter.relabel(llava.data(adapter), Draws(0, "relabel", total=3))


def test_batches_are_prepared_from_data_sets(llava: Made) -> None:
    adapter = llava.adapter()
    paths = [item.image for item in llava.items if item.image is not None]
    data = Dialogues(llava.items, llava.chat, check_images(paths))
    found = adapter.prepare(data.take([2, 0]), Draws(0, "train", total=2), train=True)
    wanted = llava.data(adapter, 2, 0)
    assert found.items == wanted.items and found.keep == wanted.keep
    assert all(torch.equal(value, wanted.inputs[name]) for name, value in found.inputs.items())
    assert torch.equal(found.targets, wanted.targets) and torch.equal(found.at, wanted.at)
    other = [replace(item, question="Who?", answer="Nobody.") for item in found.items]
    asked = adapter.answered(found, other)
    assert asked.items == tuple(other)
    assert llava.chat.tokenizer.decode(asked.targets[0]) == " Nobody.</s>"


def test_models_in_their_wrappers(llava: Made) -> None:
    class Compiled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self._orig_mod = inner

    adapter, model = llava.adapter(), copy.deepcopy(llava.model)
    data, wrapped = llava.data(adapter), Compiled(model)
    assert torch.equal(adapter.forward(wrapped, data).loss, adapter.forward(model, data).loss)
    assert adapter.parameters(wrapped, "head") == model.parts()["head"]
    frozen = adapter.frozen(wrapped, adapter.parameters(wrapped, "head"))
    assert isinstance(frozen, Frozen) and not list(frozen.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    splits: Any = Splits
    adapter.apply_request(wrapped, splits)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    lora = adapter.parameters(wrapped, "lora")
    assert {p.shape[0] for name, p in lora.items() if "lora_A" in name} == {LORA.rank}
