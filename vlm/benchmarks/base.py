"""What the benchmarks of vision-language models share: models, checkpoints, judges, data sets."""

import copy
import hashlib
import json
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from mmforget.checkpoint import state_sha
from mmforget.engine import Engine
from mmforget.errors import ConfigError
from mmforget.options import option
from mmforget.sources import mini_world
from mmforget.types import Benchmark, Dataset, Splits
from mmforget.vlm import models
from mmforget.vlm.adapter import VLMAdapter
from mmforget.vlm.chat import Chat, Item
from mmforget.vlm.data import Dialogues, check_images
from mmforget.vlm.judges import Judge, JudgeConfig, Verdicts, make_judge
from mmforget.vlm.models import DTYPES, VLM, Lora

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelConfig:
    """Which model learns, or is taken as it is."""

    name: str = option(
        "mini",
        "mini: a small LLaVA, shipped, that learns in minutes; pretrained: a folder or hub id",
        choices=("mini", "pretrained"),
    )
    path: str | None = option(
        None, "for name=pretrained: folder of save_pretrained (model and processor), or hub id"
    )
    checkpoint: str | None = option(
        None, "weights put into it, such as a stage-1 model: folder, peft folder, or file"
    )
    dtype: str = option("float32", "weights when loaded", choices=tuple(DTYPES))
    template: str | None = option(None, "file with a chat template, for processors without one")
    attention: str | None = option(None, "transformers' attn_implementation; null: its choice")
    checkpointing: bool = option(False, "recompute activations in the backward pass: less memory")


class VLMBenchmark(Benchmark):
    """A benchmark of questions about images.

    A subclass reads data and requests; its config has `training`, `lora`, `judge` and
    `max_length`.
    """

    model_type: ClassVar[type] = ModelConfig
    allow_shared_content: ClassVar[bool] = True

    @cached_property
    def base(self) -> VLM:
        """The model as it is opened, before any training; copy it before changing it."""
        made = models.open_model(
            self._source(), DTYPES[self.model.dtype], self.model.template, self.model.attention
        )
        if self.model.checkpoint is not None:
            made = models.load(Path(self.model.checkpoint).expanduser(), made)
            made.merge()
        if self.model.checkpointing:
            made.base.gradient_checkpointing_enable({"use_reentrant": False})
        return made

    @cached_property
    def chat(self) -> Chat:
        """Encodes items for the model."""
        return Chat(self.base, self.config.max_length, end_token=not self.published)

    @property
    def published(self) -> bool:
        """Whether the published code's quirks are wanted."""
        return bool(getattr(self.config, "reference", False))

    @property
    def lora(self) -> Lora:
        """What the scope "lora" means."""
        chosen: Lora = self.config.lora
        return chosen

    @property
    def autocast(self) -> Callable[[], AbstractContextManager[Any]]:
        """What evaluation runs in: the engine's mixed precision."""
        return nullcontext if self.engine is None else self.engine.autocast

    @property
    def device(self) -> torch.device:
        """Where models run."""
        return torch.device("cpu") if self.engine is None else self.engine.device

    @abstractmethod
    def refusals(self) -> Sequence[str]:
        """Return answers that refuse; empty if the data name none."""

    @abstractmethod
    def vocabulary(self) -> Iterable[str]:
        """Return texts whose words heuristic judges take for known."""

    def make_adapter(self) -> VLMAdapter:
        """Return the modality's adapter for this benchmark's model and refusals."""
        return VLMAdapter(
            self.chat, self.refusals(), self.lora, everywhere=self.published, leak=self.published
        )

    def dialogues(self, items: Sequence[Item]) -> Dialogues:
        """Return items as a data set; every image is decoded once, on first use.

        Raises:
            DataError: An image cannot be read, or a prompt fills the window.
        """
        self.look_at(item.image for item in items if item.image is not None)
        return Dialogues(items, self.chat, self._digests)

    def look_at(self, images: Iterable[Path]) -> None:
        """Decode images that were not seen yet, and remember what they hold.

        Raises:
            DataError: One cannot be read.
        """
        self._digests.update(check_images(sorted(set(images) - self._digests.keys())))

    @cached_property
    def _digests(self) -> dict[Path, str]:
        return {}

    def check_prompts(self, asked: Iterable[tuple[Path | None, str]]) -> None:
        """Encode questions that only evaluation asks; they are kept for it.

        Raises:
            DataError: One fills the window with its image: known before anything is trained.
        """
        for image, question in asked:
            self.chat.prompt(image, question)

    def cut_note(self, data: Dialogues, name: str) -> list[str]:
        """Return a note on answers that the window cuts, none if there are none."""
        lengths, cut = data.lengths()
        short = [count for count in cut if count]
        if not short:
            return []
        return [
            f"{len(short)} of {len(lengths)} answers of {name} are longer than the window of "
            f"{self.chat.max_length} tokens with image and question, and lose "
            f"{sum(short)} tokens: they are learnt and scored without their end"
        ]

    @cached_property
    def judge(self) -> Judge:
        """The judge of generated text."""
        config: JudgeConfig = self.config.judge
        return make_judge(config, self.refusals(), self.vocabulary(), self.device)

    @cached_property
    def verdicts(self) -> Verdicts:
        """The judge with all it has said so far, kept for every run and model."""
        return Verdicts(self.judge, self.store / "judged" / "verdicts.jsonl")

    def check_judge_config(self) -> None:
        """Raise what is wrong with the judge's config, before anything is trained.

        Raises:
            ConfigError: Something is missing or out of range, such as the variable with the key.
        """
        config: JudgeConfig = self.config.judge
        if config.kind in ("rouge", "endpoint") or not config.model:  # else weights are opened
            _ = self.judge

    def data_revision(self, records: Sequence[Any], *lists: Any) -> str:
        """Return a hash of all that is learnt or evaluated, wherever it lies.

        Args:
            records: Dataclasses; in place of each image, which was looked at, stands its content.
            lists: What else there is, of JSON values and images.
        """
        content = [[asdict(record) for record in records], *lists]
        text = json.dumps(content, default=self._digests.__getitem__)
        return hashlib.sha256(text.encode()).hexdigest()

    def model_fingerprint(self) -> Mapping[str, Any]:
        """Return what of the model decides trained weights."""
        return {
            "model": state_sha(self.base),
            "config": hashlib.sha256(self.base.base.config.to_json_string().encode()).hexdigest(),
            "template": hashlib.sha256(str(self.chat.processor.chat_template).encode()).hexdigest(),
            "words": hashlib.sha256(
                repr(sorted(self.chat.tokenizer.get_vocab().items())).encode()
            ).hexdigest(),
            "dtype": self.model.dtype,
            "max_length": self.chat.max_length,
            "reference": self.published,
            "lora": asdict(self.lora) if self.training.scope == "lora" else None,
        }

    def build(self, seed: int) -> nn.Module:
        """Return a copy of the pretrained model: nothing of it is drawn from the seed."""
        return copy.deepcopy(self.base).train(False)

    def train(
        self, engine: Engine, model: nn.Module, data: Dataset, seed: int, state: Path | None
    ) -> nn.Module:
        """Train by the recipe; see `Benchmark.train`."""
        made = super().train(engine, model, data, seed, state)
        assert isinstance(made, VLM)
        made.merge()  # a recipe may train adapters; the original is one plain model
        return made.requires_grad_(False)

    def observed(self, splits: Splits) -> Sequence[str]:
        """Record losses of forgotten and unseen answers: what membership attacks read."""
        return ("forget", "holdout")

    def save(self, model: nn.Module, folder: Path, start: nn.Module) -> None:
        """Write peft's files where adapters were trained, else a `save_pretrained` folder."""
        assert isinstance(model, VLM)
        models.save(model, folder)

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write a `save_pretrained` folder, which `model.path` reads back."""
        assert isinstance(model, VLM)
        plain = copy.deepcopy(model)
        plain.merge()
        models.save(plain, folder)

    def rebuild(self, path: Path, start: nn.Module) -> nn.Module:
        """Return the model that a folder or file holds; see `models.load`."""
        assert isinstance(start, VLM)
        return models.load(path, start)

    def _source(self) -> str:
        """Return the model's folder or hub id; the mini one is made when first needed."""
        if self.model.name == "pretrained":
            if self.model.path is None:
                raise ConfigError(
                    "model.name=pretrained needs model.path: a folder written by save_pretrained, "
                    "or a hub id"
                )
            return str(self.model.path)
        from mmforget.vlm import mini_model

        folder = self.store / "mini" / f"vlm-v{mini_model.VERSION}"
        return str(mini_world(folder, lambda path, _: mini_model.write_base(path), 0))
