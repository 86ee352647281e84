"""Questions about images as tokens: one function makes what is trained on, scored and answered.

Prompts come from the processor's chat template. Where the answer begins is known by encoding the
prompt alone and comparing, so that exactly the answer and its end token carry a loss.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mmforget.errors import ConfigError, DataError
from mmforget.vlm.models import VLM

IGNORED = -100
HELD_BYTES = 1 << 30  # of preprocessed images kept in memory
HELD_TEXTS = 1 << 18  # encoded texts kept in memory
TEXTUAL = ("input_ids", "attention_mask", "assistant_masks")
# One thread reads ahead while another answers anew, by one processor: they take turns.
_TURN = threading.RLock()


@dataclass(frozen=True)
class Item:
    """A question about an image, and its answer.

    Attributes:
        id: Stable id.
        image: File; None asks without an image.
        question: Text.
        answer: What is learnt or scored.
        group: Whom or what it is about: a person, a category.
        kind: What is asked, for tables: the question of a person's record, a kind of request.
    """

    id: str
    image: Path | None
    question: str
    answer: str
    group: str = ""
    kind: str = ""


class Encoded(NamedTuple):
    """One prompt, or a prompt and its answer.

    Attributes:
        ids: Token ids, image placeholders expanded.
        start: Place of the first answer token; len(ids) for a prompt alone.
        text: What else the processor returns along tokens, [1, T, ...] each.
        image: What it returns for the image, [n, ...] each.
        cut: Answer tokens that did not fit into the window.
    """

    ids: list[int]
    start: int
    text: dict[str, Tensor]
    image: dict[str, Tensor]
    cut: int = 0


class Chat:
    """Encodes items by a model's processor and template; remembers texts and images.

    Args:
        model: Gives processor, window and the id of image placeholders.
        max_length: Longest sequence in tokens; None: the model's window.
        end_token: Keep the end token among what is learnt (False: the published LLaVA code).

    Raises:
        ConfigError: The template cannot write a dialogue, or does not begin it by its prompt and
            does not mark answers.
    """

    def __init__(self, model: VLM, max_length: int | None = None, end_token: bool = True) -> None:
        self.processor = model.processor
        self.tokenizer: Any = model.processor.tokenizer
        self.max_length = min(max_length or model.window, model.window)
        self.end_token = end_token
        config = model.base.config
        places = [getattr(config, f"image_token_{name}", None) for name in ("id", "index")]
        held = [place for place in places if place is not None]
        if not held:
            raise ConfigError(
                f"{model.source}: the config names no image token, so this family is not supported"
            )
        self.image_token = int(held[0])
        generation = getattr(model.base, "generation_config", None)
        ends = getattr(generation, "eos_token_id", None)
        found = ends if isinstance(ends, list) else [ends, self.tokenizer.eos_token_id]
        self.ends = tuple(dict.fromkeys(int(end) for end in found if end is not None))
        if not self.ends:
            raise ConfigError(f"the tokenizer of {model.source} has no end token")
        pad = self.tokenizer.pad_token_id
        self.pad = int(self.ends[0] if pad is None else pad)
        self._last: tuple[Path, Image.Image] | None = None
        self._images: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._texts: OrderedDict[Any, Encoded] = OrderedDict()
        self._processed: OrderedDict[Any, Any] = OrderedDict()
        self._begins = self._begin()

    def encode(self, item: Item) -> Encoded:
        """Return an item as tokens: prompt, answer and end token.

        The answer's end is cut where the window is too small; `cut` says by how much.

        Raises:
            DataError: The image is unreadable, or the prompt alone fills the window.
        """
        return self._encode(item.image, item.question, item.answer)

    def prompt(self, image: Path | None, question: str) -> Encoded:
        """Return a question as tokens that an answer is generated after."""
        return self._encode(image, question, None)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids, up to the first end token."""
        kept = list(ids)
        stops = [k for k, token in enumerate(kept) if token in self.ends]
        if stops:
            kept = kept[: stops[0]]
        with _TURN:
            text: str = self.tokenizer.decode(kept, skip_special_tokens=True)
        return text.strip()

    def _encode(self, image: Path | None, question: str, answer: str | None) -> Encoded:
        key = (image, question, answer)
        with _TURN:
            known = self._texts.get(key)
            if known is None:
                known = self._made(image, question, answer)
                self._texts[key] = known
                if len(self._texts) > HELD_TEXTS:
                    self._texts.popitem(last=False)
            return known._replace(image={} if image is None else self._image(image, question))

    def _begin(self) -> bool:
        """Return whether a dialogue begins by its prompt, token by token.

        Where it does not, the template must mark answers ("{% generation %}").
        """
        with _TURN:
            prompt = self._process(None, "Who?", None)["input_ids"][0].tolist()
            whole = self._process(None, "Who?", "Nobody.")["input_ids"][0].tolist()
            if whole[: len(prompt)] == prompt:
                if "Nobody" not in self.tokenizer.decode(whole[len(prompt) :]):
                    raise ConfigError(
                        "the chat template does not write the answer behind its question: "
                        f"{self.tokenizer.decode(whole)!r}. Mend it (model.template=FILE.jinja)"
                    )
                return True
            marks = self._marks(self._process(None, "Who?", "Nobody.", marked=True))
        if 1 not in marks:
            raise ConfigError(
                "the chat template begins a dialogue by other tokens than the prompt it asks with "
                f"(add_generation_prompt): {self.tokenizer.decode(prompt[-8:])!r} against "
                f"{self.tokenizer.decode(whole[len(prompt) - 8 : len(prompt)])!r}. So where an "
                "answer begins is not known: mend the template (model.template=FILE.jinja), or "
                "mark answers in it by {% generation %}"
            )
        return False

    def _marks(self, found: Mapping[str, Any]) -> list[int]:
        """Return 1 at answer tokens and 0 elsewhere; no marks where the template makes none."""
        if "endgeneration" not in str(self.processor.chat_template):
            return []
        marks: list[int] = torch.as_tensor(found["assistant_masks"])[0].tolist()
        return marks

    def _made(self, image: Path | None, question: str, answer: str | None) -> Encoded:
        if answer is None:
            return self._prompt(image, question)
        ids = self._encode(image, question, None).ids  # once for all answers
        whole = self._process(image, question, answer)
        full = whole["input_ids"][0].tolist()
        if full[: len(ids)] != ids:
            raise DataError(
                f"the answer {answer[:40]!r} changes how the end of its prompt is cut into tokens: "
                f"{self.tokenizer.decode(ids[-8:])!r} became "
                f"{self.tokenizer.decode(full[len(ids) - 8 : len(ids)])!r}"
            )
        body = self._ended(full[len(ids) :])
        room = self.max_length - len(ids)
        text = {
            name: _fitted(value, len(ids) + len(body)) for name, value in _textual(whole).items()
        }
        text = {name: value[:, : self.max_length] for name, value in text.items()}
        return Encoded(ids + body[:room], len(ids), text, {}, max(0, len(body) - room))

    def _prompt(self, image: Path | None, question: str) -> Encoded:
        if self._begins:
            found = self._process(image, question, None)
            ids = found["input_ids"][0].tolist()
        else:  # cut from a dialogue, so that it is what was trained on
            found = self._process(image, question, "?", marked=True)
            ids = found["input_ids"][0].tolist()[: self._marks(found).index(1)]
        if len(ids) >= self.max_length:
            raise DataError(
                f"the question {question[:60]!r} takes {len(ids)} tokens with its image, and the "
                f"window is {self.max_length}: raise benchmark.max_length, or take a model with a "
                f"larger window"
            )
        text = {name: value[:, : len(ids)] for name, value in _textual(found).items()}
        return Encoded(ids, len(ids), text, {})

    def _ended(self, body: list[int]) -> list[int]:
        """Return answer tokens that end in one end token, or in none if none is to be learnt."""
        ends = [k for k, token in enumerate(body) if token in self.ends]
        closing = body[ends[-1]] if ends else self.ends[-1]
        kept = body[: ends[-1]] if ends else body
        while kept and not self.tokenizer.decode([kept[-1]]).strip():
            kept = kept[:-1]  # the blank some templates put behind an answer
        return [*kept, closing] if self.end_token else kept

    def _process(
        self, image: Path | None, question: str, answer: str | None, marked: bool = False
    ) -> Mapping[str, Any]:
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if image is not None:
            content.insert(0, {"type": "image", "image": self._shown(image)})
        messages = [{"role": "user", "content": content}]
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        marks = {"return_assistant_tokens_mask": True} if marked else {}
        try:
            with _remembered(self.processor, image, self._processed):
                found: Mapping[str, Any] = self.processor.apply_chat_template(
                    [messages],
                    add_generation_prompt=answer is None,
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",
                    **marks,
                )
        except (TemplateError, TypeError) as error:
            raise ConfigError(
                f"the chat template cannot write a question ({error}). It is given messages with "
                "`role` and `content`, a list of parts with `type` image or text, and `text`: "
                "mend it (model.template=FILE.jinja)"
            ) from error
        except ValueError as error:
            about = "" if image is None else f" about {image}"
            raise DataError(
                f"the processor does not take the question {question[:60]!r}{about}: {error}"
            ) from error
        if image is not None and str(image) not in self._images:
            length = found["input_ids"].shape[1]
            self._images[str(image)] = {
                name: value
                for name, value in found.items()
                if name not in TEXTUAL and not _along(value, length)
            }
            held = [sum(v.nbytes for v in part.values()) for part in self._images.values()]
            while sum(held) > HELD_BYTES and len(held) > 1:
                self._images.popitem(last=False)
                held.pop(0)
        return found

    def _shown(self, image: Path) -> Image.Image:
        """Return an image; the last one is kept, as questions about it follow each other."""
        if self._last is None or self._last[0] != image:
            self._last = (image, read_image(image))
        return self._last[1]

    def _image(self, image: Path, question: str) -> dict[str, Tensor]:
        key = str(image)
        if key not in self._images:
            self._process(image, question, None)
        self._images.move_to_end(key)
        return self._images[key]

    def collate(
        self, rows: Sequence[Encoded], device: torch.device | str, side: str = "right"
    ) -> dict[str, Tensor]:
        """Return the model's inputs for a batch, padded on one side.

        Args:
            rows: Encoded items or prompts.
            device: Where to.
            side: "right" for losses, "left" for generation.
        """
        length = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), length), self.pad, dtype=torch.long)
        mask = torch.zeros((len(rows), length), dtype=torch.long)
        for k, row in enumerate(rows):
            span = slice(0, len(row.ids)) if side == "right" else slice(length - len(row.ids), None)
            ids[k, span] = torch.tensor(row.ids)
            mask[k, span] = 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        samples = {name: value for row in rows for name, value in row.text.items()}
        for name, sample in samples.items():
            made = torch.zeros((len(rows), length, *sample.shape[2:]), dtype=sample.dtype)
            for k, row in enumerate(rows):
                if name in row.text:  # some are there only with an image
                    value = row.text[name][0]
                    at = 0 if side == "right" else length - len(value)
                    made[k, at : at + len(value)] = value
            inputs[name] = made
        for name in {name: None for row in rows for name in row.image}:
            inputs[name] = _stacked([row.image[name] for row in rows if name in row.image])
        return {name: value.to(device, non_blocking=True) for name, value in inputs.items()}


def read_image(path: Path) -> Image.Image:
    """Return an image in RGB.

    Raises:
        DataError: There is no such file, or it cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such image") from error
    except (
        OSError,
        UnidentifiedImageError,
        Image.DecompressionBombError,
        SyntaxError,
        ValueError,
    ) as error:
        raise DataError(f"{path} cannot be read as an image: {error}") from error


def capitalised(item: Item) -> Item:
    """Return an item as the published code writes it: first letter large, all others small."""
    return replace(item, question=item.question.capitalize(), answer=item.answer.capitalize())


class _Remembering:
    """An image processor that keeps what it made of each image."""

    def __init__(self, inner: Any, key: str | None, kept: "OrderedDict[Any, Any]") -> None:
        self._inner = inner
        self._key = key
        self._kept = kept

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = (self._key, repr(sorted(kwargs.items(), key=lambda pair: pair[0])))
        if self._key is None or key not in self._kept:
            self._kept[key] = self._inner(*args, **kwargs)
            if len(self._kept) > 64:
                self._kept.popitem(last=False)
        return type(self._kept[key])(dict(self._kept[key]))


class _remembered:
    """Within the block, a processor prepares an image once, however many texts ask about it."""

    def __init__(self, processor: Any, image: Path | None, kept: "OrderedDict[Any, Any]") -> None:
        self.processor = processor
        self.inner = processor.image_processor
        self.made = _Remembering(self.inner, None if image is None else str(image), kept)

    def __enter__(self) -> None:
        self.processor.__dict__["image_processor"] = self.made

    def __exit__(self, *error: object) -> None:
        self.processor.__dict__["image_processor"] = self.inner


def _along(value: Any, length: int) -> bool:
    """Return whether a processor's output runs along tokens."""
    return isinstance(value, Tensor) and value.dim() >= 2 and tuple(value.shape[:2]) == (1, length)


def _textual(found: Mapping[str, Any]) -> dict[str, Tensor]:
    length = found["input_ids"].shape[1]
    return {
        name: value
        for name, value in found.items()
        if name not in TEXTUAL and _along(value, length)
    }


def _fitted(value: Tensor, length: int) -> Tensor:
    """Return values along tokens, cut or with their last one repeated."""
    short = length - value.shape[1]
    if short <= 0:
        return value[:, :length]
    return torch.cat([value, value[:, -1:].expand(-1, short, *value.shape[2:])], dim=1)


def _stacked(values: Sequence[Tensor]) -> Tensor:
    """Return image tensors one below the other; other dimensions are filled up with zeros."""
    shape = [max(sizes) for sizes in zip(*(v.shape[1:] for v in values), strict=True)]
    if all(list(value.shape[1:]) == shape for value in values):
        return torch.cat(list(values))
    made = torch.zeros((sum(len(v) for v in values), *shape), dtype=values[0].dtype)
    at = 0
    for value in values:
        made[(slice(at, at + len(value)), *(slice(0, n) for n in value.shape[1:]))] = value
        at += len(value)
    return made
