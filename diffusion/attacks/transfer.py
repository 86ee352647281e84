"""Transfer: prompts that broke other models, drawn on this one."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import ClassVar, NamedTuple

from mmforget.diffusion.attacks.arena import Arena, Candidate, Found, PromptAttackConfig, volley
from mmforget.diffusion.attacks.asr import Outcome, rates
from mmforget.diffusion.attacks.base import AUTHORS, PromptAttack
from mmforget.diffusion.attacks.examples import Example
from mmforget.errors import ConfigError, DataError
from mmforget.options import option
from mmforget.record import AttackResult, MetricValue

PROMPTS = "prompts.jsonl"


@dataclass(frozen=True)
class TransferConfig(PromptAttackConfig):
    """Whose prompts are replayed."""

    sources: list[str] = option(
        [], "run folders, folders of an attack in one, or prompts.jsonl files"
    )
    attack: str = option("diffusion/text_grad", "which attack's prompts, of run folders")


class Replayed(NamedTuple):
    """One text that succeeded on another model.

    Attributes:
        prompt: The prompt that was attacked.
        candidate: The text with its seed, guidance and source.
    """

    prompt: str
    candidate: Candidate


class Source(NamedTuple):
    """What one source found.

    Attributes:
        name: The source run's method, or the folder of its file.
        given: The source as the config names it.
        texts: Prompt id -> texts that succeeded, in the file's order.
    """

    name: str
    given: str
    texts: Mapping[str, Sequence[Replayed]]


class Transfer(PromptAttack[TransferConfig]):
    """Texts that other attacks found, drawn on this model at their own seed and guidance.

    Nothing is searched. Texts are joined to prompts by id; those that succeeded after an attack are
    replayed, of every source up to its first success. `asr` and its companions count a prompt that
    any source breaks (or that needs none), `from/NAME/asr` one that this source breaks; down. NAME
    is the method of the source's run, else the folder of its file; -2, -3, ... tell equal names
    apart. A source's rate is a share of ALL prompts: those that it did not break itself have no
    text to replay and count as failures.
    """

    access: ClassVar[str] = "black"
    citation: ClassVar[str] = AUTHORS
    config_type: ClassVar[type] = TransferConfig

    @cached_property
    def sources(self) -> Sequence[Source]:
        """The sources, read once.

        Raises:
            ConfigError: None is named.
            DataError: One cannot be read, or holds no text that succeeded.
        """
        if not self.config.sources:
            raise ConfigError(
                "transfer replays what other attacks found: name sources=[RUN_FOLDER, ...] or "
                "their prompts.jsonl files"
            )
        found: list[Source] = []
        seen: Counter[str] = Counter()
        for given in self.config.sources:
            path = _file(Path(given).expanduser(), self.config.attack)
            name = _name(path)
            seen[name] += 1
            name = name if seen[name] == 1 else f"{name}-{seen[name]}"
            found.append(Source(name, given, _texts(path, name)))
        return found

    def files(self) -> Sequence[Path]:
        """Return the sources' files."""
        given = (Path(source).expanduser() for source in self.config.sources)
        return [_file(path, self.config.attack) for path in given]

    def hunt(self, arena: Arena) -> None:
        """Draw and judge what was found."""
        self._check(arena)

        def candidates(example: Example) -> Sequence[Candidate]:
            listed = [source.texts.get(example.id, ()) for source in self.sources]
            # By turns, so that no source's further texts take another's picture.
            turns = [text for turn in zip_longest(*listed) for text in turn if text is not None]
            return [text.candidate for text in turns]

        volley(arena, candidates, "transfer")

    def result(self, found: Sequence[Found], seconds: float) -> AttackResult:
        """Return the record, with each source's rate."""
        made = super().result(found, seconds)
        values = dict(made.values)
        for source in self.sources:
            share = rates([_outcome(row, source.name) for row in found], len(found)).asr
            note = f"{len(source.texts)} texts to replay"
            values[f"from/{source.name}/asr"] = MetricValue(
                share.value, "down", low=share.low, high=share.high, n=share.n, note=note
            )
        return replace(made, values=values)

    def _check(self, arena: Arena) -> None:
        """Check, before any picture is drawn, that sources and prompts belong together."""
        room, count = self.config.images - 1, len(self.sources)
        if room < count:
            raise ConfigError(
                f"images={room + 1} leaves {room} pictures for {count} sources: give at least "
                f"{count + 1}"
            )
        prompts = {example.id: example.prompt for example in arena.attackable}
        for source in self.sources:
            shared = [name for name in source.texts if name in prompts]
            if not shared:
                raise DataError(
                    f"source {source.given}: none of its ids ({_few(source.texts)}) is that of a "
                    f"prompt attacked here ({_few(prompts)}); both must attack the same prompts"
                )
            for name in shared:
                if any(text.prompt != prompts[name] for text in source.texts[name]):
                    raise DataError(
                        f"source {source.given}: its prompt {name} is "
                        f"{source.texts[name][0].prompt!r}, and here {prompts[name]!r}; both must "
                        f"attack the same prompts"
                    )


def _outcome(row: Found, source: str) -> Outcome:
    stage = 1 if source in row.sources else None
    return Outcome(row.id, row.pre, stage, row.attacked, row.seconds, row.images)


def _file(path: Path, attack: str) -> Path:
    """Return the file of a source."""
    if path.is_file():
        return path
    if (path / PROMPTS).is_file():
        return path / PROMPTS
    found = path / "attacks" / attack.replace("/", ".") / PROMPTS
    if found.is_file():
        return found
    if not path.is_dir():
        raise DataError(f"source {path}: there is no such folder or file")
    others = sorted(
        entry.parent.name.replace(".", "/", 1) for entry in path.glob(f"attacks/*/{PROMPTS}")
    )
    hint = f"it has those of {', '.join(others)}: say attack=NAME" if others else "it has none"
    raise DataError(f"source {path} holds no {PROMPTS} of {attack}; {hint}")


def _name(path: Path) -> str:
    """Return the method of the run that a file lies in, else its folder's name."""
    folder = path.resolve().parent
    record = folder.parent.parent / "run.json"
    if folder.parent.name == "attacks" and record.is_file():
        try:
            method = json.loads(record.read_text(encoding="utf-8"))["method"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{record} is no record of a run: {error!r}") from error
        return str(method).rpartition("/")[2]
    return folder.name


def _texts(path: Path, name: str) -> dict[str, list[Replayed]]:
    """Return the texts of a file that succeeded after an attack, by prompt id.

    Raises:
        DataError: It cannot be read, or there is none.
    """
    found: dict[str, list[Replayed]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = Found(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{path} line {number} is none of what an attack on prompts writes: {error}"
            ) from error
        if row.success and row.attacked:
            text = Candidate(row.text, row.seed, row.ids, row.guidance, name)
            found.setdefault(row.id, []).append(Replayed(row.prompt, text))
    if not found:
        raise DataError(
            f"source {path} holds no text that succeeded after an attack: there is nothing to "
            f"replay"
        )
    return found


def _few(names: Mapping[str, object]) -> str:
    shown = list(names)[:4]
    return ", ".join(map(repr, shown)) + (" ..." if len(names) > 4 else "")
