"""Questions as tokens: what is learnt, where it begins, what is cut, and that images fit texts."""

import hashlib
import threading
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmforget.errors import ConfigError, DataError
from mmforget.vlm import chat as chat_module
from mmforget.vlm.chat import Chat, Encoded, Item, capitalised, read_image
from mmforget.vlm.data import Dialogues, check_images
from mmforget.vlm.models import VLM
from tests.vlm.families import CASES, FACTS, LIMIT, ask, build, picture

QUESTION = "What is the name of the person in the image?"
ANSWER = "Ada Moreno, born in Lisbon."
# What stands between a prompt and its answer.
LEADS = {"llava": " ", "llava_next": " ", "idefics3": " ", "smolvlm": " "}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@lru_cache
def built(family: str) -> VLM:
    return VLM(*build(family), "tiny")


@lru_cache
def chat_of(family: str) -> Chat:
    return Chat(built(family))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return images of three shapes."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{k}.png" for k in range(3)]
    for k, (path, shape) in enumerate(zip(paths, [(40, 40), (32, 80), (72, 40)], strict=True)):
        picture(k, *shape).save(path)
    return paths


def said(chat: Chat, row: Encoded) -> tuple[str, str]:
    """Return the texts of prompt and answer."""
    ids, start = row.ids, row.start
    return chat.tokenizer.decode(ids[:start]), chat.tokenizer.decode(ids[start:])


@pytest.mark.parametrize("family", CASES)
def test_the_answer_and_its_end_are_learnt(family: str, images: list[Path]) -> None:
    chat, words = chat_of(family), built(family).processor.tokenizer
    lead = LEADS.get(family, "")
    for image in (images[0], None):
        item = Item("", image, QUESTION, ANSWER)
        prompt, answer = said(chat, chat.encode(item))
        assert answer == f"{lead}{ANSWER}{words.eos_token}"
        assert QUESTION in prompt and ANSWER not in prompt
        without = Chat(built(family), end_token=False).encode(item)
        assert said(chat, without) == (prompt, f"{lead}{ANSWER}")
        assert without.cut == 0
    nothing = chat.encode(Item("", images[0], QUESTION, ""))
    assert said(chat, nothing)[1].strip() == words.eos_token
    bare = Chat(built(family), end_token=False).encode(Item("", images[0], QUESTION, ""))
    assert bare.start == len(bare.ids)


@pytest.mark.parametrize("family", CASES)
def test_tokens_are_the_processor_s_and_a_prompt_begins_its_dialogue(
    family: str, images: list[Path]
) -> None:
    chat, processor = chat_of(family), built(family).processor
    for path in images:
        with Image.open(path) as image:
            whole = ask(processor, image, QUESTION, ANSWER)
            prompt = ask(processor, image, QUESTION)
        row = chat.encode(Item("", path, QUESTION, ANSWER))
        asking = chat.prompt(path, QUESTION)
        size = len(row.ids)
        assert asking.ids == row.ids[: row.start] and asking.start == len(asking.ids)
        if FACTS[family].begins:
            assert asking.ids == prompt["input_ids"][0].tolist()
        else:
            assert asking.ids != prompt["input_ids"][0].tolist()[: len(asking.ids)]
        ends = whole["input_ids"][0].tolist()[size:]
        assert not processor.tokenizer.decode(ends).strip()  # a new line at most
        for made in (row, asking):
            found, length = chat.collate([made], "cpu"), len(made.ids)
            assert found.keys() == whole.keys()
            for name, value in found.items():
                along = whole[name].shape[:2] == whole["input_ids"].shape
                assert torch.equal(value, whole[name][:, :length] if along else whole[name])


@pytest.mark.parametrize("family", CASES)
def test_texts_begin_once(family: str, images: list[Path]) -> None:
    chat, token = chat_of(family), built(family).processor.tokenizer.bos_token_id
    for image in (images[0], None):
        for row in (chat.prompt(image, QUESTION), chat.encode(Item("", image, QUESTION, ANSWER))):
            if token is not None:
                assert row.ids[0] == token and row.ids.count(token) == 1


def test_answers_are_marked_where_no_prompt_begins_its_dialogue(images: list[Path]) -> None:
    model = built("llava_onevision")
    chat = chat_of("llava_onevision")
    prompt, answer = said(chat, chat.encode(Item("", images[0], QUESTION, ANSWER)))
    assert prompt.endswith("<|im_start|>assistant \n")  # not the prompt's own "assistant\n"
    assert answer == f"{ANSWER}<|im_end|>"
    other = VLM(*build("llava_onevision"), "tiny")
    text = model.processor.chat_template
    for mark in ("{%- generation -%}", "{%- endgeneration -%}"):
        assert mark in text
        text = text.replace(mark, "")
    other.processor.chat_template = text
    with pytest.raises(ConfigError, match=r"begins a dialogue by other tokens.*\{% generation %\}"):
        Chat(other)


def templated(before: str, behind: str, prompt: str, marked: str = "") -> VLM:
    """Return the tiny LLaVA with a template of its own.

    Args:
        before: What stands before an answer.
        behind: What stands behind it.
        prompt: What a prompt ends in.
        marked: What of an answer is marked, with ANSWER for its text; nothing by default.
    """
    model = VLM(*build("llava"), "tiny")
    text = "{{ message.content[0].text }}"
    answer = (
        "{% generation %}" + marked.replace("ANSWER", text) + "{% endgeneration %}"
        if marked
        else text
    )
    model.processor.chat_template = (
        "{% for message in messages %}{% if message.role == 'user' %}USER: "
        "{% for part in message.content %}"
        "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
        f"{{% else %}}{before}{answer}{behind}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    )
    return model


@pytest.mark.parametrize(
    ("before", "behind", "prompt", "marked"),
    [
        (" A:", "</s>", " A:", ""),
        (" A:", " ", " A:", ""),  # published templates of LLaVA-1.5 end in a blank and no token
        (" A:", "", " A:", ""),
        (" A:", "</s>\\n", " A:", ""),
        (" A:", " \\n</s>", " A:", ""),
        (" A:", "</s>\\n", " B:", "ANSWER"),
        (" A:", "", " B:", "ANSWER</s>\\n"),
        (" A:", "", " B:", "ANSWER</s>\\n\\n"),
        (" A:", "\\n", " B:", "ANSWER "),
        (" A:", "", " B:", "ANSWER"),
    ],
)
def test_one_end_token_whatever_stands_behind_an_answer(
    before: str, behind: str, prompt: str, marked: str, images: list[Path]
) -> None:
    model = templated(before, behind.replace("\\n", "\n"), prompt, marked.replace("\\n", "\n"))
    for keeping, end in ((True, "</s>"), (False, "")):
        chat = Chat(model, end_token=keeping)
        for answer in (ANSWER, "no"):
            begun, learnt = said(chat, chat.encode(Item("", images[0], QUESTION, answer)))
            assert learnt == f"{answer}{end}" and begun.endswith(f"{QUESTION} A:")
            assert (
                chat.prompt(images[0], QUESTION).ids
                == chat.tokenizer(begun.removeprefix("<s>")).input_ids
            )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "cannot write a question"),
        ("{{ raise_exception('only text') }}", r"cannot write a question \(only text\)"),
        ("{% for m in messages %}{{ 'x' + m.content }}{% endfor %}", "cannot write a question"),
        ("USER: {{ messages[0].content[-1].text }}", "does not write the answer"),
    ],
)
def test_templates_that_write_no_dialogue(template: str, message: str) -> None:
    model = VLM(*build("llava"), "tiny")
    model.processor.chat_template = template
    with pytest.raises(ConfigError, match=rf"{message}.*model\.template=FILE\.jinja"):
        Chat(model)


def test_prompts_that_the_processor_or_the_answer_spoils(images: list[Path]) -> None:
    model = templated(" A:", "</s>", " A:")
    model.processor.chat_template = model.processor.chat_template.replace("'<image>'", "''")
    with pytest.raises(DataError, match=rf"does not take the question 'Who\?' about {images[0]}"):
        Chat(model).encode(Item("", images[0], "Who?", ANSWER))
    glued = Chat(templated(" i", "</s>", " i"))
    assert said(glued, glued.encode(Item("", None, "Who?", "Nobody.")))[1] == "Nobody.</s>"
    with pytest.raises(DataError, match="'mage' changes how the end of its prompt is cut"):
        glued.encode(Item("", None, "Who?", "mage"))


def test_models_without_what_is_needed() -> None:
    model = VLM(*build("llava"), "tiny")
    model.base.generation_config.eos_token_id = None
    assert Chat(model).ends == (model.processor.tokenizer.eos_token_id,)
    model.processor.tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="tokenizer of tiny has no end token"):
        Chat(model)
    model = VLM(*build("llava"), "tiny")
    config = model.base.config
    model.base.config = type("Text", (), {"get_text_config": lambda self: config.text_config})()
    with pytest.raises(ConfigError, match="tiny: the config names no image token"):
        Chat(model)


@pytest.mark.parametrize("family", CASES)
def test_the_window_cuts_answers_and_counts(family: str, images: list[Path]) -> None:
    model = built(family)
    whole = chat_of(family).encode(Item("", images[0], QUESTION, ANSWER))
    size = len(whole.ids)
    for room, keeping in ((size, True), (size - 3, True), (size - 3, False), (size - 1, False)):
        chat = Chat(model, room, end_token=keeping)
        assert chat.max_length == room
        row = chat.encode(Item("", images[0], QUESTION, ANSWER))
        length = size - (not keeping)
        assert row.ids == whole.ids[: min(room, length)] and row.start == whole.start
        assert row.cut == max(0, length - room)
        assert all(value.shape[1] == len(row.ids) for value in row.text.values())
        found = chat.collate([row], "cpu")
        with torch.no_grad():
            assert model.logits(found).isfinite().all()
    narrow = Chat(model, whole.start)
    for fails in (
        lambda: narrow.encode(Item("", images[0], QUESTION, ANSWER)),
        lambda: narrow.prompt(images[0], QUESTION),
    ):
        with pytest.raises(DataError, match=rf"takes {whole.start} .*window is {whole.start}: rai"):
            fails()
    assert len(Chat(model, whole.start + 1).prompt(images[0], QUESTION).ids) == whole.start


def test_no_window_is_wider_than_the_model_s() -> None:
    assert chat_of("llava").max_length == Chat(built("llava"), LIMIT + 1).max_length == LIMIT


def test_lengths_of_a_data_set(images: list[Path]) -> None:
    model, item = built("llava"), Item("", images[0], QUESTION, ANSWER)
    size = len(chat_of("llava").encode(item).ids)
    items = [Item("a", images[0], QUESTION, ANSWER), Item("b", images[1], QUESTION, "no")]
    data = Dialogues(items, Chat(model, size - 4), check_images(images))
    lengths, cut = data.lengths()
    assert lengths[0] == size - 4 and lengths[1] < size - 4 and cut == [4, 0]


def test_generated_ids_are_read_up_to_their_end() -> None:
    chat, words = chat_of("mllama"), built("mllama").processor.tokenizer
    ids = words(" Ada Moreno", add_special_tokens=False).input_ids
    end = words.eos_token_id
    assert chat.decode([*ids, end, *ids]) == chat.decode(ids) == "Ada Moreno"
    assert chat.decode([words.pad_token_id, *ids]) == "Ada Moreno"
    assert chat.decode([]) == chat.decode([end, *ids]) == ""


def test_published_case() -> None:
    item = Item("1", None, "What is Ada's CITY?", "she lives in Lisbon. Yes.", "g", "k")
    wanted = Item("1", None, "What is ada's city?", "She lives in lisbon. yes.", "g", "k")
    assert capitalised(item) == wanted


class Counting:
    """An image processor that counts its calls and may take its time."""

    def __init__(self, inner: Any, seconds: float = 0.0) -> None:
        self.inner, self.seconds, self.calls = inner, seconds, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        time.sleep(self.seconds)
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("family", CASES)
def test_an_image_is_processed_once(family: str, images: list[Path]) -> None:
    model = VLM(*build(family), "tiny")
    counting = Counting(model.processor.image_processor)
    model.processor.image_processor = counting
    chat = Chat(model)
    for question in ("Who?", "Where?", "When?"):
        chat.prompt(images[0], question)
        for answer in ("Ada", "Lisbon"):
            chat.encode(Item("", images[0], question, answer))
    assert counting.calls == 1
    other = chat.encode(Item("", images[1], "Who?", "Ada"))
    assert counting.calls == 2
    first, again = (chat.encode(Item("", images[0], "Who?", "Ada")) for _ in range(2))
    assert counting.calls == 2 and model.processor.image_processor is counting
    assert first == again and not torch.equal(
        first.image["pixel_values"], other.image["pixel_values"]
    )
    wanted = chat_of(family).encode(Item("", images[0], "Who?", "Ada"))
    assert first.ids == wanted.ids
    assert all(torch.equal(first.image[name], value) for name, value in wanted.image.items())


def test_what_is_remembered_is_bounded(images: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_module, "HELD_BYTES", 0)
    monkeypatch.setattr(chat_module, "HELD_TEXTS", 2)
    chat = Chat(built("qwen2_5_vl"))
    asked = [Item("", path, question, "Ada") for question in ("Who?", "A?") for path in images]
    for item in [*asked, *asked]:
        row = chat.encode(item)
        wanted = chat_of("qwen2_5_vl").encode(item)
        assert row.ids == wanted.ids and torch.equal(
            row.image["pixel_values"], wanted.image["pixel_values"]
        )
        assert len(chat._images) == 1 and len(chat._texts) <= 2
    size = max(sum(v.nbytes for v in part.values()) for part in chat_of("llava")._images.values())
    monkeypatch.setattr(chat_module, "HELD_BYTES", 2 * size)
    chat = Chat(built("llava"))
    for k in (0, 1, 0, 2):  # what was not asked about for the longest time goes first
        chat.prompt(images[k], "Who?")
    assert list(chat._images) == [str(images[0]), str(images[2])]


def test_a_text_is_encoded_once(images: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("llava")
    chat = Chat(model)
    made: list[int] = []
    real = model.processor.apply_chat_template

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(model.processor, "apply_chat_template", counted)
    items = [Item(str(k), images[k % 2], QUESTION, ANSWER) for k in range(4)]
    data = Dialogues(items, chat, check_images(images))
    data.lengths()
    count = len(made)
    assert count == 4  # a prompt and a dialogue for each of the two
    data.take([0, 1, 2, 3])
    assert len(made) == count


def test_threads_that_encode_together_get_their_own_images(images: list[Path]) -> None:
    model = VLM(*build("qwen2_5_vl"), "tiny")
    model.processor.image_processor = Counting(model.processor.image_processor, 0.002)
    held = model.processor.image_processor
    asked = [Item(str(k), images[k % 3], f"Who is {k}?", "Ada") for k in range(9)]
    wanted = [chat_of("qwen2_5_vl").encode(item) for item in asked]
    chats = [Chat(model), Chat(model)]  # benchmarks share a processor
    faults: list[Any] = []

    def work(chat: Chat, order: list[int]) -> None:
        for k in order:
            row = chat.encode(asked[k])
            image = row.image["pixel_values"]
            if row.ids != wanted[k].ids or not torch.equal(image, wanted[k].image["pixel_values"]):
                faults.append(k)

    threads = [
        threading.Thread(target=work, args=(chats[n % 2], [*range(n, 9), *range(n)]))
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and model.processor.image_processor is held
    for chat in chats:
        for row, item in zip(wanted, asked, strict=True):
            found = chat.encode(item).image["pixel_values"]
            assert torch.equal(found, row.image["pixel_values"])


def broken(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.jpg"
    if kind == "truncated":
        picture(0, 64, 64).save(path)
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "text":
        path.write_text("no image")
    elif kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "bomb":  # a header that asks for more memory than Pillow allows
        picture(0, 8, 8).save(path, "BMP")
        content = bytearray(path.read_bytes())
        content[18:26] = (200_000).to_bytes(4, "little") * 2
        path.write_bytes(content)
    return path


@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "folder", "bomb", "missing"])
def test_images_that_cannot_be_read(kind: str, tmp_path: Path, images: list[Path]) -> None:
    path = broken(tmp_path, kind)
    what = "there is no such image" if kind == "missing" else "cannot be read as an image"
    for fails in (
        lambda: read_image(path),
        lambda: chat_of("llava").encode(Item("", path, QUESTION, ANSWER)),
        lambda: chat_of("llava").prompt(path, QUESTION),
        lambda: check_images([images[0], path]),
    ):
        with pytest.raises(DataError, match=rf"{kind}\.jpg:? {what}"):
            fails()
    # The processor works on.
    assert chat_of("llava").encode(Item("", images[0], QUESTION, ANSWER)).image
    with pytest.raises(DataError, match=r"\(and 2 more\). Copy or download"):
        check_images([path, tmp_path / "a", images[0], tmp_path / "b", tmp_path / "a"])


def test_images_are_read_in_rgb(tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "P", "CMYK"):
        picture(0).convert(mode).save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
        path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
        assert read_image(path).mode == "RGB" and read_image(path).size == (40, 40)


def test_contents_of_a_data_set(images: list[Path], tmp_path: Path) -> None:
    copied = tmp_path / "copy.png"
    copied.write_bytes(images[0].read_bytes())
    digests = check_images([*images, copied, images[0]])
    assert digests == {
        path: hashlib.sha256(path.read_bytes()).hexdigest() for path in [*images, copied]
    }
    items = [
        Item("a", images[0], "Who?", "Ada"),
        Item("b", copied, "Who?", "Ada", "group", "kind"),
        Item("c", images[1], "Who?", "Ada"),
        Item("d", images[0], "Where?", "Ada"),
        Item("e", images[0], "Who?", "Eve"),
        Item("f", None, "Who?", "Ada"),
        Item("g", None, "Who?Ada", ""),
    ]
    data = Dialogues(items, chat_of("llava"), digests)
    assert len(data) == 7 and data.ids == list("abcdefg")
    assert data.digests[0] == data.digests[1] and len(set(data.digests)) == 6
    read = data.take([4, 0])
    assert read.items == (items[4], items[0])
    assert [said(data.chat, row)[1].strip() for row in read.encoded] == ["Eve</s>", "Ada</s>"]


@pytest.mark.parametrize("family", CASES)
def test_batches_of_rows_with_other_images_and_without(family: str, images: list[Path]) -> None:
    model, chat = built(family), chat_of(family)
    items = [
        Item("", images[0], "Which city was this person born in?", "Lisbon, on 3 May 1984"),
        Item("", None, "Is there a dog?", "no"),
        Item("", images[1], QUESTION, "Ada"),
        Item("", None, "Answer yes or no: is there a dog, a cat or a bird?", "I do not know."),
        Item("", images[2], "Who?", ANSWER),
    ]
    rows = [chat.encode(item) for item in items]
    with torch.no_grad():
        alone = [model.logits(chat.collate([row], "cpu"))[0] for row in rows]
        states = [model.hidden(chat.collate([row], "cpu"), 0)[0] for row in rows]
        for order in ([0, 2], [1, 3], [0, 1, 2, 3, 4], [3, 4, 1, 0]):
            for side in ("right", "left"):
                inputs = chat.collate([rows[k] for k in order], "cpu", side)
                kept = inputs["attention_mask"].bool()
                assert kept[:, -1].all() == (side == "left")
                found, hidden = model.logits(inputs), model.hidden(inputs, 0)
                assert found.shape[:2] == kept.shape
                for place, k in enumerate(order):
                    ids = inputs["input_ids"][place]
                    assert ids[kept[place]].tolist() == rows[k].ids
                    assert (ids[~kept[place]] == chat.pad).all()
                    assert torch.allclose(found[place, kept[place]], alone[k], atol=2e-4)
                    assert torch.allclose(hidden[place, kept[place]], states[k], atol=2e-4)
                few = model.logits(inputs, 3)
                assert torch.allclose(few[kept[:, -3:]], found[:, -3:][kept[:, -3:]], atol=2e-4)


def test_images_of_other_sizes_are_filled_up_with_zeros() -> None:
    rows = [
        Encoded([1, 2], 1, {}, {"pixels": torch.ones(1, 2, 3), "count": torch.tensor([2])}),
        Encoded([1], 1, {}, {}),
        Encoded([3], 1, {}, {"pixels": 2 * torch.ones(2, 1, 4), "count": torch.tensor([1])}),
    ]
    found = chat_of("llava").collate(rows, "cpu")
    wanted = torch.zeros(3, 2, 4)
    wanted[0, :, :3], wanted[1:, :1] = 1, 2
    assert torch.equal(found["pixels"], wanted) and found["count"].tolist() == [2, 1]
    assert found["attention_mask"].tolist() == [[1, 1], [1, 0], [1, 0]]
