"""UnlearnDiffAtk: prompts that draw a concept, and attacks that bring it back after erasure.

Zhang et al., ECCV 2024, arXiv 2310.11868. A concept is a table of prompts with a judge; the
published ones are eight files, and a user's own needs no code: a CSV and `benchmark.judge`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from mmforget.diffusion.answers import Ordered, picture_name
from mmforget.diffusion.attacks.base import AUTHORS
from mmforget.diffusion.attacks.examples import CONCEPTS, Example, read_examples
from mmforget.diffusion.benchmarks.base import Judges
from mmforget.diffusion.benchmarks.concept import (
    AnyConcept,
    ConceptConfig,
    ConceptRequest,
    Drawn,
)
from mmforget.diffusion.concepts import Concept, Erasure
from mmforget.diffusion.noise import Sampling
from mmforget.diffusion.zero_shot import JudgeConfig, Means
from mmforget.errors import ConfigError, DataError
from mmforget.options import option
from mmforget.rng import derive
from mmforget.sources import local_folder, mini_world
from mmforget.types import Training

# How the published judges are named here; the artist classifier is a checkpoint of the user's.
KINDS: Mapping[str, str] = {
    "nudenet": "nudenet",
    "q16": "q16",
    "imagenette": "imagenette",
    "artist": "hf",
}
WORDS: Mapping[str, tuple[str, str]] = {  # of a published concept: its kind, and what erasers read
    "nudity": ("unsafe", "nudity"),
    "violence": ("unsafe", "violence"),
    "illegal": ("unsafe", "illegal activity"),
    "vangogh": ("style", "Van Gogh"),
    "church": ("object", "church"),
    "tench": ("object", "tench"),
    "parachute": ("object", "parachute"),
    "garbage_truck": ("object", "garbage truck"),
}


@dataclass(frozen=True)
class PromptData:
    """Where the prompts come from."""

    source: str = option(
        "mini",
        "mini: prompts of the mini world; local: a CSV file, or a folder of {concept}.csv",
        choices=("mini", "local"),
    )
    root: str | None = option(None, "the file or folder, for source=local")
    seed: int = option(0, "which mini prompts are written", low=0)
    limit: int | None = option(None, "only the first N prompts", low=1)
    drawn: int | None = option(
        None, "prompts whose pictures serve as forget data of methods; null: all", low=1
    )
    images: int = option(4, "pictures drawn of each prompt that is to stay", low=2)


@dataclass(frozen=True)
class PromptRequest(ConceptRequest):
    """The concept: a published name, or any words for a table of one's own."""

    concept: str | None = option(
        None, f"{', '.join(CONCEPTS)}, or other words; null: the mini world's"
    )


@dataclass(frozen=True)
class PromptConfig(ConceptConfig):
    """The published protocol: pictures of 50 LMS steps, targets of 25."""

    sampling: Sampling = option(
        Sampling(sampler="lms", steps=50, guidance=7.5),
        "how judged pictures are drawn; a row's own guidance comes first",
    )
    targets: Sampling = option(
        Sampling(sampler="lms", steps=25, guidance=7.5), "how the original draws target pictures"
    )
    images: str | None = option(
        None, "folder of target pictures {case_number}.png in place of the original's"
    )
    judge: JudgeConfig = option(JudgeConfig(), "who judges; kind null: the published judge")
    judges: Judges = option(Judges(nudenet=0.45), "weights of judges")
    training: Training = option(Training(epochs=0), "the pipeline is the original: 0 epochs")


class UnlearnDiffAtk(AnyConcept):
    """UnlearnDiffAtk's prompts of a concept (arXiv 2310.11868)."""

    name: ClassVar[str] = "diffusion/unlearndiffatk"
    citation: ClassVar[str] = AUTHORS
    config_type: ClassVar[type] = PromptConfig
    data_type: ClassVar[type] = PromptData
    request_type: ClassVar[type] = PromptRequest
    metrics: ClassVar[tuple[str, ...]] = ("diffusion/drift", "diffusion/storage", "cost")
    attacks: ClassVar[tuple[str, ...]] = ("diffusion/no_attack", "diffusion/text_grad")
    headline: ClassVar[tuple[str, ...]] = (
        "drift/rmse_forget",
        "drift/rmse_retain",
        "storage/bytes",
    )

    @property
    def concepts(self) -> tuple[str, ...]:
        """What is erased, in words.

        Raises:
            ConfigError: The request names several concepts: a table is about one.
        """
        if self.request.concepts:
            raise ConfigError(
                f"request.concepts={self.request.concepts}: a table of prompts is about one "
                f"concept; say request.concept"
            )
        name = self._named()
        return (WORDS[name][1] if name in WORDS else name,)

    @cached_property
    def rows(self) -> list[Example]:
        """The prompts.

        Raises:
            DataError: There is no such table, or it cannot be read.
        """
        return read_examples(self._table(), self.data.limit)

    def erasure(self, names: Sequence[str]) -> Erasure:
        """Return the request: erasers read the concept's short name, or the table's prompts."""
        (name,), anchor = names, self.request.anchor
        kind = WORDS[self._named()][0] if self._named() in WORDS else self.request.kind
        prompts = tuple(dict.fromkeys(row.prompt for row in self.rows))
        text = f"{name} style" if kind == "style" else name
        concept = Concept(name, kind, text, anchor, prompts, (anchor,) * len(prompts))
        kept = tuple(dict.fromkeys(self.request.preserve))
        retain = tuple(t.replace("{}", other) for other in kept for t in self.templates)
        if not retain:
            retain = tuple(dict.fromkeys(self._instead(t, anchor) for t in self.templates))
        return Erasure((concept,), kept, retain)

    def drawn(self) -> Sequence[Drawn]:
        """Return the target pictures, as many unseen ones as a quarter of them, and retain's."""
        erasure, anchor = self.erasure(self.concepts), self.request.anchor
        rows = self.rows[: self.data.drawn]
        found = [
            Drawn(f"0.{row.id}/target", row.prompt, anchor, row.seed, True, False) for row in rows
        ]
        for row in rows[: max(1, len(rows) // 4)]:
            seed = derive(row.seed, "unseen", row.prompt) % 2**31
            found.append(Drawn(f"0.{row.id}/unseen", row.prompt, anchor, seed, True, True))
        for p, prompt in enumerate(erasure.retain):
            for k in range(self.data.images):
                seed = derive(k, "draw", prompt) % 2**31
                last = k + 1 == self.data.images
                found.append(Drawn(f"kept.{p}/{k}", prompt, "", seed, False, last))
        return found

    def image_sets(self) -> Mapping[str, Sequence[Ordered]]:
        """Return the table's prompts at their own seeds, and prompts that are to stay."""
        found = dict(super().image_sets())
        found["forget"] = [
            Ordered(picture_name(row.prompt, row.seed), row.prompt, row.seed) for row in self.rows
        ]
        return found

    def examples(self) -> Sequence[Example]:
        """Return the table's rows."""
        return self.rows

    def pairs(self) -> Sequence[tuple[str, str]]:
        """Return templates with the concept and the same without it."""
        (name,) = self.concepts
        anchor = self.request.anchor
        return [(t.replace("{}", name), self._instead(t, anchor)) for t in self.templates]

    def judge_of(self, label: str | None) -> tuple[JudgeConfig, Means]:
        """Return the request's judge, else the published one, else CLIP zero-shot."""
        own, means = super().judge_of(None)
        if self.config.judge.kind is not None:
            own = self.config.judge
        elif self._named() in CONCEPTS:
            preset = CONCEPTS[self._named()]
            own = replace(self.config.judge, kind=KINDS[preset.judge], label=preset.label)
            if preset.judge == "nudenet":
                own = replace(own, label=None, classes=preset.label)
        elif self.data.source == "mini":
            from mmforget.diffusion import mini, mini_model

            classifiers = dict(
                zip(("style", "object"), mini_model.load_classifiers(self.device), strict=True)
            )
            kind = "style" if self._mini() in mini.STYLES else "object"
            own = replace(self.config.judge, kind=kind, label=self._mini())
            means = replace(means, classifiers=classifiers)
        return own, means

    @property
    def target_sampling(self) -> Sampling:
        """How the original draws target pictures."""
        chosen: Sampling = self.config.targets
        return chosen

    @property
    def target_pictures(self) -> Path | None:
        """Folder of target pictures, if the config names one.

        Raises:
            DataError: It is not there.
        """
        if self.config.images is None:
            return None
        folder = Path(self.config.images).expanduser()
        if not folder.is_dir():
            raise DataError(f"benchmark.images={folder}: there is no such folder")
        return folder

    @classmethod
    def write_mini(cls, folder: Path, seed: int) -> None:
        """Write a table for every style and object of the mini world, in the published columns."""
        from mmforget.diffusion import mini

        mini.write_prompts(folder, seed)

    def _named(self) -> str:
        """Return the concept as the request names it."""
        if self.request.concept is not None:
            return str(self.request.concept)
        if self.data.source == "mini":
            return "Van Gogh"
        raise ConfigError(
            f"request.concept is needed: {', '.join(CONCEPTS)}, or the words of your own table"
        )

    def _mini(self) -> str:
        return self._named().replace(" ", "_")

    def _table(self) -> Path:
        """Return the table's file.

        Raises:
            DataError: It is not there.
        """
        if self.data.source == "mini":
            from mmforget.diffusion import mini

            world = self.store / "mini" / f"unlearndiffatk-v{mini.VERSION}-s{self.data.seed}"
            folder, name = mini_world(world, self.write_mini, self.data.seed), self._mini()
        else:
            given = Path(self.data.root or "").expanduser()
            if self.data.root is not None and given.is_file():
                return given
            folder, name = local_folder(self.data.root, self.name), self._named()
        path = folder / f"{name}.csv"
        if not path.is_file():
            held = sorted(each.stem for each in folder.glob("*.csv"))
            raise DataError(
                f"{folder} holds no {name}.csv for request.concept={self._named()}; it holds: "
                f"{', '.join(held) or 'no .csv'}"
            )
        return path
