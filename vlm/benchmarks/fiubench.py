"""FIUBench: a model learns fictitious persons by their faces, and is to forget some of them.

Ma et al., Benchmarking Vision Language Model Unlearning via Fictitious Facial Identity Dataset,
ICLR 2025, arXiv 2411.03554. Stage 1 (learn) is this benchmark's training, stage 2 the method.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from mmforget.errors import ConfigError, DataError
from mmforget.options import option
from mmforget.record import MetricValue, RunResult
from mmforget.report.section import Section
from mmforget.rng import derive
from mmforget.sources import hub_dataset, local_folder, mini_world
from mmforget.types import Dataset, Splits, Subset, Training, Trial
from mmforget.vlm import formats, page, samples
from mmforget.vlm.benchmarks.base import VLMBenchmark
from mmforget.vlm.chat import Item, capitalised
from mmforget.vlm.controls import MmeImage, PopeQuestion, read_mme, read_pope
from mmforget.vlm.formats import FIUBench as Files
from mmforget.vlm.formats import Person
from mmforget.vlm.judges import JudgeConfig
from mmforget.vlm.models import Lora

REPO = "gray311/FIUBench"
# What a question is about, by the words in it; the first that fits.
SUBJECTS: Mapping[str, str] = {
    "name": r"^(?!.*\b(?:doctor|physician|hospital|clinic|insur|medic|drug|prescri|test|"
    r"condition|disease|diagnos|crim|compan|employer|street|city|language)).*\bname\b",
    "birth date": r"\bborn\b|birth",
    "blood type": r"\bblood\b",
    "address": r"\blives?\b|\baddress\b|\breside",
    "phone": r"\bphone\b|\bcontact number\b",
    "job": r"\boccupation\b|\bjob\b|\bprofession\b|\bwork as\b",
    "income": r"\bincome\b|\bearns?\b|\bsalary\b",
    "doctor": r"\bdoctor\b|\bphysician\b",
    "insurer": r"\binsur",
    "room": r"\broom\b",
    "bill": r"\bbill|\bcost|\bamount\b|\bcharged?\b",
    "medication": r"\bmedic(?:ation|ine)|\bprescri",
    "test result": r"\btest\b|\bresults?\b",
    "condition": r"\bcondition\b|\bdiagnos|\bdisease\b|\bsuffer",
    "admission": r"\badmitted on\b|\badmission\b|\bwhen was .* admitted",
    "discharge": r"\bdischarged?\b",
    "hospital": r"\bhospital\b",
    "crime": r"\bcrim|\bconvict|\boffen[cs]e",
    "language": r"\blanguage\b",
}
FALLEN = 0.1  # ROUGE on retained persons below which a model says nothing of use


@dataclass(frozen=True)
class FIUData:
    """Where the persons come from."""

    source: str = option(
        "mini",
        "mini: fictitious persons drawn here; local: a folder; hub: the published data set",
        choices=("mini", "local", "hub"),
    )
    root: str | None = option(None, "folder of full.json, split.json, prompt.json and images")
    seed: int = option(0, "which mini world is drawn", low=0)
    persons: int = option(48, "persons of the mini world; with 400 lists are as published", low=8)
    questions: int = option(10, "questions about each person of the mini world", low=1, high=20)
    text_only: str | None = option(
        None, "file of questions that name the person; null: made from the questions"
    )
    repo: str = option(REPO, "data set id, for source=hub")
    revision: str | None = option(None, "its revision; null takes the newest")


@dataclass(frozen=True)
class FIURequest:
    """Who is to be forgotten."""

    split: str = option("forget5", "a list of split.json: forget1, forget5 or forget10")
    retain: str = option(
        "published",
        "published: persons in none of the forget lists; complement: all but the forgotten",
        choices=("published", "complement"),
    )


@dataclass(frozen=True)
class Controls:
    """Question sets that a model should answer as before; none is downloaded."""

    pope: str | None = option(None, "POPE list, such as coco_pope_random.json")
    pope_images: str | None = option(None, "folder of its images")
    mme: str | None = option(None, "folder of MME's sub-tasks")
    parser: str = option(
        "first4",
        "how an answer is read: its first four letters, or whether it contains yes (LLaVA-Phi)",
        choices=("first4", "contains_yes"),
    )


@dataclass(frozen=True)
class FIUConfig:
    """Protocol and training; defaults are those published for LLaVA-Phi-3-mini."""

    reference: bool = option(
        False,
        "the published code's quirks: lower-cased texts, no end token, a leaking label mask, "
        "losses without their first token, answers cut at the first full stop, min-k that loses "
        "weights, missing parts of the utility as 0, KL over all positions",
    )
    retained: str = option("retain5", "list of split.json that utility is measured on")
    max_length: int | None = option(512, "tokens of a sequence; null: the model's window", low=8)
    max_new_tokens: int = option(64, "tokens of a generated answer", low=1)
    eval_rows: int = option(64, "sequences scored or generated at a time", low=1)
    shared_prefix: str = option(
        "auto",
        "share the cache of an image between its questions; auto: where that is exact",
        choices=("auto", "on", "off"),
    )
    text_only: bool = option(True, "ask by name and without the image, too")
    other_face: bool = option(True, "ask the forgotten persons' questions with another face, too")
    reference_model: str | None = option(
        None, "a model that never saw the forget set, where none is trained here (epochs=0)"
    )
    floor: float | None = option(
        None,
        "natural log p that counts as nothing forgotten in forget_quality (-26.1: implied by the "
        "published table); null: the less of the original's and this run's",
        high=0,
    )
    judged: bool = option(True, "ask the judge about every answer")
    judge: JudgeConfig = option(JudgeConfig(), "who judges answers")
    controls: Controls = option(Controls(), "POPE and MME, where you have them")
    lora: Lora = option(Lora(), "what scope=lora means")
    training: Training = option(
        Training(
            epochs=10,
            lr=2e-5,
            optimizer="adamw",
            weight_decay=0.01,
            batch_size=128,
            schedule="cosine",
            clip_norm=1.0,
            scope="all",
        ),
        "stage 1: how original and retrained model learn; 0 epochs: the model is the original",
    )


class FIUBenchmark(VLMBenchmark):
    """FIUBench (arXiv 2411.03554).

    Every published person is trained on, so nobody is unseen: `holdout` are the false answers of
    the data set to the forget set's own questions, `test` the retained persons' questions in other
    words. Both are texts that no training saw.
    """

    name: ClassVar[str] = "vlm/fiubench"
    citation: ClassVar[str] = "Ma et al., FIUBench, ICLR 2025, arXiv 2411.03554"
    config_type: ClassVar[type] = FIUConfig
    data_type: ClassVar[type] = FIUData
    request_type: ClassVar[type] = FIURequest
    metrics: ClassVar[tuple[str, ...]] = ("vlm/fiubench", "cost")
    attacks: ClassVar[tuple[str, ...]] = ()
    headline: ClassVar[tuple[str, ...]] = (
        "fiubench/forget_quality",
        "fiubench/utility",
        "fiubench/em/forget",
        "fiubench/ape",
        "fiubench/ks_log_p",
        "fiubench/gap",
    )
    distance: ClassVar[str] = "fiubench/gap"

    @cached_property
    def files(self) -> Files:
        """The data as read."""
        return formats.read_fiubench(self._root())

    @cached_property
    def persons(self) -> Mapping[str, Person]:
        """Persons by id."""
        return {person.id: person for person in self.files.persons}

    @cached_property
    def forgotten(self) -> tuple[Person, ...]:
        """Persons of the request.

        Raises:
            ConfigError: The request names no forget list.
            DataError: There is no such list, or it names unknown persons.
        """
        name = self.request.split
        if not name.startswith("forget"):
            known = ", ".join(n for n in self.files.splits if n.startswith("forget"))
            raise ConfigError(f"request.split={name}: one of the forget lists is needed: {known}")
        return tuple(self.persons[i] for i in formats.ids_of(self.files, name))

    @cached_property
    def kept(self) -> tuple[Person, ...]:
        """Persons that utility is measured on, a sample of the retained ones."""
        ids = formats.ids_of(self.files, self.config.retained)
        return tuple(self.persons[i] for i in ids)

    @cached_property
    def pope(self) -> list[PopeQuestion]:
        """POPE's questions; none where `controls` names none.

        Raises:
            ConfigError: The folder of its images is not named.
            DataError: It is not in the published layout.
        """
        controls = self.config.controls
        if controls.pope is None:
            return []
        if controls.pope_images is None:
            raise ConfigError("benchmark.controls.pope needs controls.pope_images, their folder")
        return read_pope(*(Path(p).expanduser() for p in (controls.pope, controls.pope_images)))

    @cached_property
    def mme(self) -> list[MmeImage]:
        """MME's images and questions; none where `controls` names none.

        Raises:
            DataError: It is not in the published layout.
        """
        named = self.config.controls.mme
        return [] if named is None else read_mme(Path(named).expanduser())

    def splits(self) -> Splits:
        """Read the persons and split their questions; see `Benchmark.splits`."""
        forgotten, kept = self.forgotten, self.kept  # faults of the request come first
        self._check_evaluation()
        gone = {person.id for person in forgotten}
        if self.request.retain == "published":
            stay = set(formats.retain_ids(self.files.persons, self.files.splits))
        else:
            stay = self.persons.keys() - gone
        strangers = [person.id for person in kept if person.id not in stay]
        if strangers:
            raise ConfigError(
                f"benchmark.retained={self.config.retained} holds {len(strangers)} persons that "
                f"are not retained, such as {strangers[0]}"
            )
        everyone = [item for person in self.files.persons for item in self.items(person)]
        whole = self.dialogues(everyone)
        self.check_prompts(
            (person.image, text)
            for person in forgotten
            for qa in person.qa
            for text in self.worded(qa.paraphrases)
        )
        self.notes = (
            *self.files.notes,
            *self._stated(),
            *self.cut_note(whole, "all persons"),
        )
        held = self.files
        nobody = sorted(set(self.other_faces()) - {person.image for person in held.persons})
        self.look_at(nobody)
        lists = [
            dict(held.splits),
            held.idk,
            held.icd,
            nobody,
            sorted(self.named_questions.items()),
        ]
        self._revision = self.data_revision(held.persons, *lists)
        self.adapter = self.make_adapter()
        places: dict[bool, list[int]] = {True: [], False: []}
        for index, item in enumerate(everyone):
            if item.group in gone or item.group in stay:
                places[item.group in gone].append(index)
        streams: dict[str, Dataset] = {}
        if self.files.icd and all(person.caption for person in forgotten):
            streams["profiles"] = self.dialogues(self._profiles(forgotten))
        return Splits(
            forget=Subset(whole, places[True]),
            retain=Subset(whole, places[False]),
            train=whole,
            holdout=self.dialogues([i for person in forgotten for i in self._false(person)]),
            test=self.dialogues([i for person in kept for i in self._reworded(person)]),
            streams=streams,
        )

    def items(self, person: Person) -> list[Item]:
        """Return a person's questions with the answers that are trained on."""
        made = [
            Item(f"{person.id}/{k:02d}", person.image, qa.question, qa.answer, person.id, kind)
            for k, (qa, kind) in enumerate(zip(person.qa, self.kinds(person), strict=True))
        ]
        return [self._cased(item) for item in made]

    def worded(self, texts: Iterable[str]) -> list[str]:
        """Return texts as a model is given them; lists of false answers are given as they are."""
        return [text.capitalize() if self.published else text for text in texts]

    def kinds(self, person: Person) -> list[str]:
        """Return what each of a person's questions is about; "other" where no word tells."""
        return [subject(qa.question) for qa in person.qa]

    def fingerprint(self) -> Mapping[str, Any]:
        """Return data revision, window, quirks and model; after `splits`."""
        return {"data": self._revision, "model": dict(self.model_fingerprint())}

    @cached_property
    def named_questions(self) -> Mapping[tuple[str, str], str]:
        """Questions that name the person, by id and original question, where a file holds them.

        Raises:
            DataError: It is not in the form of `formats.read_text_only`.
        """
        if self.data.text_only is None:
            return {}
        found = formats.read_text_only(Path(self.data.text_only).expanduser())
        return {(each.id, each.original): each.question for each in found}

    def named(self, person: Person, item: Item) -> str | None:
        """Return a question with the name in place of the image, as a model is given it.

        None where it asks for the name itself, speaks of nobody, or `text_only` is off. The file of
        `data.text_only` comes first.
        """
        if not self.config.text_only or item.kind == "name":
            return None
        asked = person.qa[int(item.id.rpartition("/")[2])].question
        text = self.named_questions.get((person.id, asked))
        if text is None:
            try:
                text = formats.text_only_question(item.question, person.name)
            except DataError:
                return None
        return text

    def refusals(self) -> Sequence[str]:
        """Return the refusals of prompt.json."""
        return self.files.idk

    def vocabulary(self) -> Iterable[str]:
        """Return all answers of the data, true and false."""
        for person in self.files.persons:
            for qa in person.qa:
                yield from (qa.answer, qa.paraphrased_answer, *qa.wrong)

    def other_faces(self) -> list[Path]:
        """Return faces of others than the forgotten: of nobody where there are such, or of `kept`.

        The mini world draws sixteen that nobody has.
        """
        nobody = sorted((self._root() / "others").glob("*.jpg"))
        return nobody or [person.image for person in self.kept]

    def collapsed(self, metrics: Mapping[str, MetricValue]) -> str | None:
        """Return whether answers about retained persons share next to no words with the truth."""
        found = metrics.get("fiubench/rouge/retain")
        if found is None or found.value >= FALLEN:
            return None
        return (
            f"ROUGE-L recall on the retained persons is {100 * found.value:.1f} %: the model "
            f"answers nothing any more"
        )

    def samples(self, trial: Trial, folder: Path) -> None:
        """Write every evaluated question with its answer, and the faces, for the page."""
        samples.write_fiubench(trial, folder)

    @classmethod
    def sections(cls, runs: "Sequence[RunResult]") -> "Sequence[Section]":
        """Return answers, forgetting against utility, steps, leakage, text against image."""
        return page.sections(runs)

    @classmethod
    def write_mini(cls, folder: Path, seed: int) -> None:
        """Write the mini world in the published layout."""
        from mmforget.vlm import mini

        mini.write_fiubench(folder, seed)

    def _check_evaluation(self) -> None:
        """Raise faults of what evaluation alone needs before anything is trained."""
        if self.config.judged:
            self.check_judge_config()
        _ = self.pope, self.mme
        named = self.config.reference_model
        if named is not None:
            path = Path(named).expanduser()
            if not (path.parent if path.name == "model.safetensors" else path).exists():
                raise ConfigError(
                    f"benchmark.reference_model={named}: there is no such path. Give a folder of "
                    f"save_pretrained, a peft folder, or a run's folder"
                )

    def _stated(self) -> list[str]:
        if self.data.source == "mini":
            return [
                f"mini world: {len(self.forgotten)} of {len(self.persons)} persons are forgotten; "
                f"the lists' names are the published ones, their sizes are not percent"
            ]
        return []

    def _cased(self, item: Item) -> Item:
        return capitalised(item) if self.published else item

    def _false(self, person: Person) -> list[Item]:
        return [
            Item(f"{item.id}/false", item.image, item.question, qa.wrong[0], item.group, item.kind)
            for item, qa in zip(self.items(person), person.qa, strict=True)
        ]

    def _reworded(self, person: Person) -> list[Item]:
        return [
            Item(f"{item.id}/reworded", item.image, asked, item.answer, item.group, item.kind)
            for item, qa in zip(self.items(person), person.qa, strict=True)
            for asked in self.worded(qa.paraphrases[:1])
        ]

    def _profiles(self, persons: Sequence[Person]) -> list[Item]:
        """Return for every forgotten item a request for the profile, and the profile (ICD)."""
        requests = self.files.icd
        found = []
        for person in persons:
            for item in self.items(person):
                asked = requests[derive(0, "icd", item.id) % len(requests)]
                found.append(
                    Item(f"{item.id}/profile", person.image, asked, person.caption, person.id)
                )
        return found

    def _root(self) -> Path:
        if self.data.source == "local":
            return local_folder(self.data.root, "FIUBench")
        if self.data.source == "hub":
            return hub_dataset(self.data.repo, self.data.revision, "vlm")
        from mmforget.vlm import mini

        size, asked = self.data.persons, self.data.questions
        text = f"fiubench-{mini.VERSION}-{size}-{asked}-s{self.data.seed}"
        key = hashlib.sha256(text.encode()).hexdigest()[:8]
        folder = self.store / "mini" / f"fiubench-{size}x{asked}-s{self.data.seed}-{key}"
        return mini_world(
            folder,
            lambda f, s: mini.write_fiubench(f, s, persons=size, questions=asked),
            self.data.seed,
        )


def subject(question: str) -> str:
    """Return what a question is about, one of `SUBJECTS` or "other"."""
    text = question.lower()
    return next((name for name, pattern in SUBJECTS.items() if re.search(pattern, text)), "other")
