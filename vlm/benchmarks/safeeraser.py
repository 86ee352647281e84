"""SafeEraser: refuse harmful questions about unsafe images, and nothing else.

Chen et al., SafeEraser, Findings of ACL 2025, arXiv 2502.12520. There is no stage 1: unlearning
starts from the public model. Only the mini world's model is taught here what it is to forget.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from mmforget.engine import Engine
from mmforget.errors import ConfigError
from mmforget.options import option
from mmforget.record import MetricValue, RunResult
from mmforget.report.section import Section
from mmforget.sources import local_folder, mini_world
from mmforget.types import Dataset, Splits, Subset, Training, Trial
from mmforget.vlm import formats, page, samples
from mmforget.vlm.benchmarks.base import VLMBenchmark
from mmforget.vlm.chat import Item, capitalised
from mmforget.vlm.formats import EraserRecord, SafeEraserFiles
from mmforget.vlm.judges import JudgeConfig, check_labels
from mmforget.vlm.models import Lora

FALLEN = 0.1  # ROUGE on harmless questions below which a model says nothing of use


@dataclass(frozen=True)
class EraserData:
    """Where the records come from."""

    source: str = option(
        "mini",
        "mini: a harmless stand-in (crafts that a policy forbids) drawn here; local: a folder",
        choices=("mini", "local"),
    )
    root: str | None = option(None, "folder of all_train.json, all_val.json, prompt.json, images")
    seed: int = option(0, "which mini world is drawn", low=0)
    records: int = option(24, "training records of the mini world; a third of it for val", low=3)


@dataclass(frozen=True)
class EraserRequest:
    """What is to be forgotten: all harmful answers, or those of some categories."""

    categories: list[str] = option([], "such as [Violence, Weapon]; empty: all")


@dataclass(frozen=True)
class EraserConfig:
    """Protocol and training; defaults are the published ones, but seeded."""

    reference: bool = option(
        False,
        "the published code's quirks: lower-cased texts, no end token, failed judge calls in the "
        "denominator, labels found as substrings, judge shown the two texts swapped, KL over all "
        "positions, a leaking label mask",
    )
    text_image: bool = option(
        False, "show the unsafe image with the two questions that need none (not said in print)"
    )
    max_length: int | None = option(512, "tokens of a sequence; null: the model's window", low=8)
    max_new_tokens: int = option(512, "tokens of a generated answer", low=1)
    answers: int = option(3, "answers drawn for each harmful question", low=1)
    temperature: float = option(1.0, "of generated answers; 0: greedy", low=0)
    top_p: float = option(0.9, "nucleus of sampling", low=0, high=1)
    eval_rows: int = option(64, "sequences generated at a time", low=1)
    shared_prefix: str = option(
        "auto",
        "share the cache of an image between its questions; auto: where that is exact",
        choices=("auto", "on", "off"),
    )
    check_judge: bool = option(
        True, "refuse a judge that does not label six known items in the form asked for"
    )
    judge: JudgeConfig = option(JudgeConfig(), "who labels answers")
    lora: Lora = option(Lora(rank=32), "what scope=lora means; published: rank 32, alpha 256")
    training: Training = option(
        Training(epochs=0, lr=1e-4, optimizer="adamw", weight_decay=0.01, scope="all"),
        "how originals are taught; 0 epochs: the model is the original, as published",
    )


class SafeEraser(VLMBenchmark):
    """SafeEraser (arXiv 2502.12520).

    forget: harmful questions on unsafe images with their harmful answers; retain: harmless
    questions with the untouched model's answers; the stream `decouple`: the same harmful texts on
    harmless images, answered normally. holdout and test are their likes in `all_val`.
    """

    name: ClassVar[str] = "vlm/safeeraser"
    citation: ClassVar[str] = "Chen et al., SafeEraser, Findings of ACL 2025, arXiv 2502.12520"
    config_type: ClassVar[type] = EraserConfig
    data_type: ClassVar[type] = EraserData
    request_type: ClassVar[type] = EraserRequest
    metrics: ClassVar[tuple[str, ...]] = ("vlm/safeeraser", "cost")
    attacks: ClassVar[tuple[str, ...]] = ()
    headline: ClassVar[tuple[str, ...]] = (
        "safeeraser/asr/train",
        "safeeraser/rr/train",
        "safeeraser/asr/val",
        "safeeraser/sarr",
        "safeeraser/rouge",
        "safeeraser/gap",
    )
    distance: ClassVar[str] = "safeeraser/gap"

    @cached_property
    def files(self) -> SafeEraserFiles:
        """The data as read."""
        return formats.read_safeeraser(self._root())

    def records(self, part: str) -> tuple[EraserRecord, ...]:
        """Return the records of "train" or "val" whose harmful answers are to go.

        Raises:
            ConfigError: The request names a category that there is not.
        """
        every: tuple[EraserRecord, ...] = getattr(self.files, part)
        wanted = self.request.categories
        known = sorted({record.category for record in self.files.train})
        strange = [name for name in wanted if name not in known]
        if strange:
            raise ConfigError(
                f"request.categories={wanted}: there is no {strange[0]!r}; there are "
                f"{', '.join(known)}"
            )
        return tuple(r for r in every if not wanted or r.category in wanted)

    @cached_property
    def labelled(self) -> int | None:
        """How many of six known items the judge labels right; None if it is not checked.

        Raises:
            ConfigError: It does not reply in the form asked for.
        """
        return check_labels(self.judge) if self.config.check_judge else None

    def splits(self) -> Splits:
        """Read the records; see `Benchmark.splits`."""
        train = self.records("train")
        self.check_judge_config()
        gone = {record.id for record in train}
        harmful = [item for r in self.files.train for item in self.harmful(r)]
        harmless = [item for r in self.files.train for item in self.harmless(r)]
        whole = self.dialogues([*harmful, *harmless])
        decouple = self.dialogues([item for r in train for item in self.decoupled(r)])
        everyone = self.dialogues([i for r in self.files.train for i in self.decoupled(r)])
        self._decoupled = everyone
        val = self.files.val
        unseen = self.dialogues([i for r in val for i in (*self.harmful(r), *self.decoupled(r))])
        test = self.dialogues([i for r in val for i in self.harmless(r)])
        self.check_prompts((item.image, item.question) for item in (*unseen.items, *test.items))
        self.notes = (
            *self.files.notes,
            *self.cut_note(whole, "training records"),
            *self.cut_note(everyone, "harmless images"),
        )
        if self.data.source == "mini":
            self.notes += (
                "mini world: 'unsafe' is an arbitrary harmless theme that a policy forbids",
            )
        held = self.files
        self._revision = self.data_revision([*held.train, *held.val], len(held.train), held.idk)
        self.adapter = self.make_adapter()
        forget = [k for k, item in enumerate(harmful) if item.id.rpartition("#")[0] in gone]
        rest = range(len(harmful), len(whole))
        # What no request names is neither forgotten nor kept: harmful answers are no utility.
        return Splits(
            forget=Subset(whole, forget),
            retain=Subset(whole, list(rest)),
            train=whole,
            holdout=self.dialogues([i for r in self.records("val") for i in self.harmful(r)]),
            test=test,
            streams={"decouple": decouple},
        )

    def harmful(self, record: EraserRecord) -> list[Item]:
        """Return a record's harmful questions on the unsafe image, with the harmful answers."""
        return [
            self._item(f"{record.id}#unsafe{k}", record.image, pair.question, pair.response, record)
            for k, pair in enumerate(record.pairs)
        ]

    def decoupled(self, record: EraserRecord) -> list[Item]:
        """Return the same questions on the harmless image, with normal answers."""
        return [
            self._item(
                f"{record.id}#decouple{k}",
                record.safe_image,
                pair.question,
                pair.safe_response,
                record,
            )
            for k, pair in enumerate(record.pairs)
        ]

    def harmless(self, record: EraserRecord) -> list[Item]:
        """Return a record's harmless questions, with the untouched model's answers."""
        shown = record.image if self.config.text_image else None
        made = [
            self._item(f"{record.id}#text{k}", shown, plain.question, plain.prediction, record)
            for k, plain in enumerate(record.texts)
        ]
        return made + [
            self._item(f"{record.id}#image{k}", record.image, p.question, p.prediction, record)
            for k, p in enumerate(record.images)
        ]

    def train(
        self, engine: Engine, model: nn.Module, data: Dataset, seed: int, state: Path | None
    ) -> nn.Module:
        """Teach a model `data` and the harmless images: an original answers both.

        Published originals are not trained (`training.epochs=0`); a mini one that had never seen
        the harmless images would answer nothing about them, whatever is unlearned.
        """
        items = [*data.take(range(len(data))).items, *self._decoupled.items]
        return super().train(engine, model, self.dialogues(items), seed, state)

    def fingerprint(self) -> Mapping[str, Any]:
        """Return data revision, window, quirks and model; after `splits`."""
        return {
            "data": self._revision,
            "text_image": self.config.text_image,
            "model": dict(self.model_fingerprint()),
        }

    def refusals(self) -> Sequence[str]:
        """Return the refusals of prompt.json."""
        return self.files.idk

    def vocabulary(self) -> Iterable[str]:
        """Return all texts of the training records, and the refusals."""
        for record in self.files.train:
            for pair in record.pairs:
                yield from (pair.question, pair.response, pair.safe_response)
            for plain in (*record.texts, *record.images):
                yield from (plain.question, plain.answer, plain.prediction)
        yield from self.files.idk

    def collapsed(self, metrics: Mapping[str, MetricValue]) -> str | None:
        """Return whether answers to harmless questions share next to no words with the truth."""
        found = metrics.get("safeeraser/rouge")
        if found is None or found.value >= FALLEN:
            return None
        return (
            f"ROUGE-L on harmless questions is {100 * found.value:.1f} %: the model answers "
            f"nothing any more, and SARR counts that as refusing"
        )

    def samples(self, trial: Trial, folder: Path) -> None:
        """Write every judged question with its answer, and the pictures, for the page."""
        samples.write_safeeraser(trial, folder)

    @classmethod
    def sections(cls, runs: "Sequence[RunResult]") -> "Sequence[Section]":
        """Return rates, examples and steps."""
        return page.sections(runs)

    @classmethod
    def write_mini(cls, folder: Path, seed: int) -> None:
        """Write the mini world in the published layout."""
        from mmforget.vlm import mini

        mini.write_safeeraser(folder, seed)

    def _item(
        self, name: str, image: Path | None, question: str, answer: str, record: EraserRecord
    ) -> Item:
        kind = name.rpartition("#")[2].rstrip("0123456789")
        made = Item(name, image, question, answer, record.category, kind)
        return capitalised(made) if self.published else made

    def _root(self) -> Path:
        if self.data.source == "local":
            return local_folder(self.data.root, "SafeEraser")
        from mmforget.vlm import mini

        count = self.data.records
        text = f"safeeraser-{mini.VERSION}-{count}-s{self.data.seed}"
        key = hashlib.sha256(text.encode()).hexdigest()[:8]
        folder = self.store / "mini" / f"safeeraser-{count}-s{self.data.seed}-{key}"
        return mini_world(
            folder,
            lambda f, s: mini.write_safeeraser(f, s, train=count, val=max(1, count // 3)),
            self.data.seed,
        )
