"""Where attacks on prompts happen: examples, judged pictures, a budget, and what was found.

An attack proposes texts; the arena draws them with the attacked model, a batch of prompts at a
time, asks the judge, counts pictures against the budget and writes each finished prompt down at
once, so that a killed attack goes on with the next prompt. Equal texts of a prompt at equal seeds
are drawn and judged once, and every random number belongs to a prompt, so that neither the batch
nor a restart changes a result.
"""

import hashlib
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mmforget.diffusion.answers import (
    Ordered,
    fill,
    fingerprint,
    picture_name,
    place_of,
    read,
    write_image,
)
from mmforget.diffusion.attacks.encoding import tables
from mmforget.diffusion.attacks.examples import Example, cut_to_length, split_by_length
from mmforget.diffusion.features import resized
from mmforget.diffusion.judges import Judge
from mmforget.diffusion.models import DiffusionModel
from mmforget.diffusion.noise import Sampling
from mmforget.diffusion.sampling import Image, generate
from mmforget.diffusion.zero_shot import JudgeConfig
from mmforget.engine import Engine
from mmforget.errors import ConfigError, DataError
from mmforget.options import option
from mmforget.progress import progress
from mmforget.record import write_text
from mmforget.rng import derive, generator

logger = logging.getLogger(__name__)

OUTCOMES = "outcomes.{rank}.jsonl"


@dataclass(frozen=True)
class PromptAttackConfig:
    """What all attacks on prompts share; the budget counts judged pictures, for all alike."""

    prompts: str | None = option(
        None, "CSV of prompts to attack in place of the benchmark's (case_number, prompt, ...)"
    )
    judge: JudgeConfig = option(JudgeConfig(), "who judges, in place of the benchmark's judge")
    limit: int | None = option(None, "only the first N prompts", low=1)
    images: int = option(
        51, "judged pictures a prompt may cost, the one of the prompt itself among them", low=1
    )
    batch_size: int = option(8, "prompts attacked together; does not change results", low=1)
    max_tokens: int = option(
        60, "longest prompt that is attacked, start and end marks counted", low=3
    )
    over_long: str = option(
        "drop",
        "longer prompts: drop (they still count), or truncate",
        choices=("drop", "truncate"),
    )
    kept: int = option(8, "prompts whose pictures are kept for the report", low=0)


class Shot(NamedTuple):
    """One picture to draw and judge.

    Attributes:
        example: The prompt it serves.
        text: What is drawn, always read anew by the tokenizer: a reported text draws its picture.
        seed: Seed of its latent.
    """

    example: Example
    text: str
    seed: int


class Ruling(NamedTuple):
    """What the judge said of a picture.

    Attributes:
        success: Whether it shows the concept.
        score: How much, by the judge's own scale.
        label: What the judge saw.
        image: uint8 [3, H, W].
    """

    success: bool
    score: float
    label: str
    image: Tensor


@dataclass(frozen=True)
class Found:
    """What an attack made of one prompt; a line of `prompts.jsonl`.

    Attributes:
        id: The example's.
        prompt: Its text before the attack.
        pre: Whether the prompt itself succeeded.
        attacked: Whether it was attacked: not if it succeeded by itself or was dropped.
        dropped: Whether it is too long for the attack.
        success: Whether any judged picture showed the concept.
        text: The text of the successful, else of the best scored picture.
        ids: Adversarial token ids, where the attack has some.
        seed: Seed of that picture.
        guidance: Classifier-free guidance it was drawn with.
        score: The judge's score of it.
        label: What the judge saw in it.
        stage: Which of the judged pictures it was; 0 is the prompt itself.
        images: Judged pictures.
        steps: Gradient steps.
        seconds: Wall seconds of its batch, divided by the prompts in it.
        sources: Names of what succeeded, where an attack tries texts of several sources.
    """

    id: str
    prompt: str
    pre: bool
    attacked: bool
    dropped: bool
    success: bool
    text: str
    ids: list[int]
    seed: int
    guidance: float
    score: float
    label: str
    stage: int
    images: int
    steps: int
    seconds: float
    sources: list[str] = field(default_factory=list)


Key = tuple[str, int, float, str]  # of a picture: text, seed, guidance, what a painter adds
Painter = Callable[[Sequence[Shot], Sampling], Tensor]


@dataclass(frozen=True)
class Aims:
    """What of a benchmark is attacked.

    Attributes:
        examples: Prompts that the original model draws the concept for.
        judge: The judge of an example's pictures.
        sampling: How judged pictures are drawn; an example's own guidance comes before it.
        targets: How the original draws an example's target picture.
        pictures: Folder of target pictures `{id}.png` or `.jpg`, in place of the original's.
        pairs: Prompts with the concept and the same without, for attacks on text embeddings.
        store: Folder for drawn pictures shared by all runs.
        files: Further files whose content decides what an attack finds.
    """

    examples: Sequence[Example]
    judge: Callable[[Example], Judge]
    sampling: Sampling
    targets: Sampling
    pictures: Path | None
    pairs: Sequence[tuple[str, str]]
    store: Path
    files: Sequence[Path] = ()


class Arena:
    """The attacked model, its examples and the budget.

    Args:
        model: The attacked model; it gets no gradients.
        original: What draws target pictures; None where there are only the pictures' files.
        aims: Examples and judge.
        config: The attack's options.
        folder: Where what was found is kept; None keeps nothing.
        engine: Device and processes: each process attacks every n-th prompt.
        seed: Seed of the attack.

    Raises:
        ConfigError: There is no example.
        DataError: Tokenizer and text encoder do not belong together.
    """

    def __init__(
        self,
        model: DiffusionModel,
        original: DiffusionModel | None,
        aims: Aims,
        config: PromptAttackConfig,
        folder: Path | None,
        engine: Engine,
        seed: int,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.original = original
        self.aims = aims
        self.config = config
        self.folder = folder
        self.engine = engine
        self.seed = seed
        self.tables = tables(model)
        examples = list(aims.examples)[: config.limit]
        if not examples:
            raise ConfigError("there is no prompt to attack; give some (attack.NAME.prompts=CSV)")
        if config.over_long == "truncate":
            examples = cut_to_length(
                examples, self.plain_ids, self.decode, limit=self._longest(config.max_tokens)
            )
        kept, dropped = split_by_length(
            examples, model.count_tokens, self._longest(config.max_tokens)
        )
        self.examples = examples
        self.dropped = {example.id for example in dropped}
        if dropped:
            logger.info("%d of %d prompts are too long to attack", len(dropped), len(examples))
        self.attackable = kept
        self._made: dict[str, Any] | None = None
        self.found: dict[str, Found] = self._read()
        self.queries = 0
        # By the example's id first: what was drawn for it is dropped when it is settled.
        self._memo: dict[str, dict[Key, Ruling]] = {}
        self._latents: dict[str, Tensor] = {}

    # Texts --------------------------------------------------------------------------------------

    def plain_ids(self, text: str) -> list[int]:
        """Return the token ids of a text, without start and end marks."""
        found: list[int] = self.model.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, as a user would type it."""
        text: str = self.model.tokenizer.decode(list(ids), skip_special_tokens=False)
        marks = (self.model.tokenizer.bos_token, self.model.tokenizer.eos_token)
        for mark in marks:
            text = text.replace(mark, " ")
        return " ".join(text.split())

    def rng(self, example: Example, *stream: str | int) -> torch.Generator:
        """Return a source of random numbers of one example's own."""
        return generator(self.seed, "attack", example.id, *stream)

    # Pictures -----------------------------------------------------------------------------------

    def guidance(self, example: Example) -> float:
        """Return an example's classifier-free guidance."""
        own = example.guidance
        return self.aims.sampling.guidance if own is None else own

    def paint(self, shots: Sequence[Shot], settings: Sampling) -> Tensor:
        """Draw texts as every picture is drawn; uint8 [N, 3, H, W]."""
        images = [Image(shot.text, shot.seed) for shot in shots]
        return torch.cat([pixels for _, pixels in generate(self.model, images, settings)])

    def shoot(
        self, shots: Sequence[Shot], painter: Painter | None = None, key: str = ""
    ) -> list[Ruling]:
        """Draw and judge pictures; what was drawn for an example before is not drawn again.

        Args:
            shots: What to draw.
            painter: Draws them from something else than text and seed; None: `paint`.
            key: Names what a painter adds to text and seed; equal keys give equal pictures.
        """
        keys = [(s.text, s.seed, self.guidance(s.example), key) for s in shots]
        memos = [self._memo.setdefault(s.example.id, {}) for s in shots]
        first: dict[tuple[str, Key], Shot] = {}
        for k, memo, shot in zip(keys, memos, shots, strict=True):
            if k not in memo:
                first.setdefault((shot.example.id, k), shot)
        groups: dict[tuple[float, str], list[tuple[str, Key]]] = {}
        for named, shot in first.items():
            groups.setdefault((named[1][2], shot.example.label or ""), []).append(named)
        for (strength, _), members in groups.items():
            todo = [first[named] for named in members]
            settings = replace(self.aims.sampling, guidance=strength)
            with self.engine.autocast():
                images = (painter or self.paint)(todo, settings)
            verdict = self.aims.judge(todo[0].example).judge(images)
            self.queries += len(todo)
            rows = zip(
                members,
                verdict.positive.tolist(),
                verdict.score.tolist(),
                verdict.label,
                images,
                strict=True,
            )
            for (name, k), positive, score, label, image in rows:
                self._memo[name][k] = Ruling(bool(positive), float(score), label, image)
        return [memo[k] for k, memo in zip(keys, memos, strict=True)]

    def latents(self, examples: Sequence[Example]) -> Tensor:
        """Return the examples' target pictures as clean latents, float32 [P, C, h, w].

        The mean of the codec's posterior. Pictures are the original model's, drawn once and kept.

        Raises:
            ConfigError: There is neither an original nor a folder of pictures.
            DataError: A picture is missing.
        """
        new = [example for example in examples if example.id not in self._latents]
        if new:
            images = self._targets(new)
            side = self.model.latent_shape[1] * self.model.scale_factor
            images = resized(images, side, mode="bicubic").float() / 127.5 - 1.0
            images = images.to(self.model.device, self.model.dtype)
            for start in range(0, len(new), self.config.batch_size):
                part = images[start : start + self.config.batch_size]
                found = self.model.to_latents(part).float()
                for example, row in zip(new[start:], found, strict=False):
                    self._latents[example.id] = row
        return torch.stack([self._latents[example.id] for example in examples])

    def target_images(self, examples: Sequence[Example]) -> Tensor:
        """Return the examples' target pictures, uint8 [P, 3, H, W]."""
        return self._targets(examples)

    def require_targets(self) -> None:
        """Check, before any picture is drawn, that there are target pictures or can be.

        Raises:
            ConfigError: There is neither an original nor a folder of pictures.
            DataError: A picture is missing.
        """
        if self.aims.pictures is not None:
            for example in self.attackable:
                _picture(self.aims.pictures, example)
        elif self.original is None:
            raise ConfigError(
                "this attack needs pictures of the concept: name the model that was unlearned "
                "(original=PIPELINE), or a folder of pictures named by case number (images=DIR)"
            )

    def _targets(self, examples: Sequence[Example]) -> Tensor:
        if self.aims.pictures is not None:
            folder = self.aims.pictures
            names = [_picture(folder, example) for example in examples]
            return read(folder, names)
        self.require_targets()
        assert self.original is not None
        wanted = replace(self.aims.targets, size=None)
        orders = [Ordered(picture_name(e.prompt, e.seed), e.prompt, e.seed) for e in examples]
        made = self._painted()
        place = place_of(self.aims.store, made)
        fill(place, self.original, orders, wanted, label="target pictures", made=made)
        return read(place, [order.name for order in orders])

    # The attack ---------------------------------------------------------------------------------

    def todo(self) -> list[Example]:
        """Return this process's prompts that are still to be attacked, the others settled.

        Every prompt is drawn and judged as it is first: one that succeeds, or is too long, is not
        attacked.
        """
        mine = self.examples[self.engine.rank :: self.engine.world]
        new = [example for example in mine if example.id not in self.found]
        waiting = []
        for start in range(0, len(new), self.aims.sampling.batch_size):
            part = new[start : start + self.aims.sampling.batch_size]
            began = time.perf_counter()
            rulings = self.shoot([Shot(e, e.prompt, e.seed) for e in part])
            each = (time.perf_counter() - began) / len(part)
            for example, ruling in zip(part, rulings, strict=True):
                dropped = example.id in self.dropped
                if ruling.success or dropped:
                    run = Hunt(example, ruling, self.guidance(example), each, dropped)
                    self.settle(run)
                else:
                    waiting.append(example)
        return waiting

    def settle(self, hunt: "Hunt") -> None:
        """Write down what became of a prompt, and drop its pictures."""
        found = hunt.found()
        self.found[found.id] = found
        self._memo.pop(found.id, None)
        if self.folder is None:
            return
        if self.config.kept > self.examples.index(hunt.example):
            for kind, ruling in (("before", hunt.before), ("after", hunt.best)):
                place = picture_path(self.folder, found.id, kind)
                place.parent.mkdir(parents=True, exist_ok=True)
                write_image(place, ruling.image)
        path = self.folder / OUTCOMES.format(rank=self.engine.rank)
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(found)) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def finish(self) -> list[Found]:
        """Return what was found of every example by all processes; write `prompts.jsonl`."""
        self.engine.barrier()
        if self.engine.world > 1:
            if self.folder is None:
                raise ConfigError("several processes need a run folder to share what they found")
            self.found |= self._read()
        rows = [self.found[example.id] for example in self.examples]
        if self.folder is not None and self.engine.is_main:
            text = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
            write_text(self.folder / "prompts.jsonl", text)
        self.engine.barrier()
        return rows

    def hunt(self, example: Example) -> "Hunt":
        """Return a new hunt for an example whose own picture has been judged."""
        own = (example.prompt, example.seed, self.guidance(example), "")
        before = self._memo[example.id][own]
        return Hunt(example, before, self.guidance(example), 0.0, False)

    def _longest(self, limit: int) -> int:
        return min(limit, self.model.window + 2)

    def _read(self) -> dict[str, Found]:
        """Return what an earlier, killed attack had finished; a torn last line is left out."""
        if self.folder is None:
            return {}
        self.folder.mkdir(parents=True, exist_ok=True)
        said = self.folder / "attack.json"
        own = json.dumps(self._identity(), sort_keys=True)
        if said.is_file() and said.read_text() != own:
            for path in self.folder.glob("outcomes.*.jsonl"):
                path.unlink()
            said.unlink()
        if not said.is_file():
            write_text(said, own)
        known = {example.id for example in self.examples}
        found = {}
        for path in sorted(self.folder.glob("outcomes.*.jsonl")):
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            if len(whole) < len(lines):
                write_text(path, "".join(whole))
            for line in whole:
                row = Found(**json.loads(line))
                if row.id in known:
                    found[row.id] = row
        return found

    def _identity(self) -> dict[str, Any]:
        """Return what decides the outcomes: another attack's are not taken for this one's."""
        options = asdict(self.config)
        for name in ("batch_size", "kept"):
            del options[name]
        said = [[e.id, e.prompt, e.seed, e.guidance, e.label] for e in self.examples]
        targets: Any = None
        if self.aims.pictures is not None:
            folder = self.aims.pictures
            held = sorted(path for path in folder.iterdir() if path.is_file())
            targets = {path.name: _digest(path) for path in held}
        elif self.original is not None:
            targets = self._painted()
        return {
            "options": options,
            "model": fingerprint(self.model, self.aims.sampling),
            "targets": targets,
            "examples": hashlib.sha256(json.dumps(said).encode()).hexdigest(),
            "files": [_digest(path) for path in self.aims.files],
            "judges": self.judges(),
            "seed": self.seed,
        }

    def judges(self) -> list[str]:
        """Return the names of the judges of all examples."""
        return sorted({self.aims.judge(example).name for example in self.examples})

    def _painted(self) -> dict[str, Any]:
        """Return the fingerprint of target pictures, made once: it hashes all weights."""
        assert self.original is not None
        if self._made is None:
            self._made = fingerprint(self.original, replace(self.aims.targets, size=None))
        return self._made


class Hunt:
    """One prompt under attack: what was judged so far.

    Attributes:
        example: The prompt.
        before: The ruling on the prompt itself.
        best: The ruling on the successful, else on the best scored picture.
        steps: Gradient steps so far.
        seconds: Seconds so far.
    """

    def __init__(
        self, example: Example, before: Ruling, guidance: float, seconds: float, dropped: bool
    ) -> None:
        self.example = example
        self.before = self.best = before
        self.guidance = guidance
        self.seconds = seconds
        self.dropped = dropped
        self.steps = 0
        self.images = 1
        self.success = before.success
        self.text, self.seed = example.prompt, example.seed
        self.ids: list[int] = []
        self.stage = 0
        self.attacked = False
        self.sources: list[str] = []

    def saw(self, shot: Shot, ruling: Ruling, ids: Iterable[int] = (), source: str = "") -> None:
        """Count a judged picture of the attack, and its source; the first success stays."""
        self.attacked = True
        if not self.success and (ruling.success or ruling.score > self.best.score):
            self.best, self.stage = ruling, self.images
            self.text, self.seed, self.ids = shot.text, shot.seed, list(ids)
            if shot.example.guidance is not None:  # a candidate's own may be another
                self.guidance = shot.example.guidance
        if ruling.success and source not in self.sources:
            self.sources.append(source)
        self.success = self.success or ruling.success
        self.images += 1

    def found(self) -> Found:
        """Return it as a line of `prompts.jsonl`."""
        return Found(
            id=self.example.id,
            prompt=self.example.prompt,
            pre=self.before.success,
            attacked=self.attacked,
            dropped=self.dropped,
            success=self.success,
            text=self.text,
            ids=self.ids,
            seed=self.seed,
            guidance=self.guidance,
            score=self.best.score,
            label=self.best.label,
            stage=self.stage,
            images=self.images,
            steps=self.steps,
            seconds=self.seconds,
            sources=[name for name in self.sources if name],
        )


class Search(Protocol):
    """A search that proposes one text a stage, for several prompts in lock-step.

    Every prompt has a slot, in which its state lives; a slot is used again when its prompt is
    done.
    """

    def ready(self, examples: Sequence[Example]) -> None:
        """Make what all prompts need, together, before the first is opened."""
        ...

    def open(self, slot: int, example: Example) -> None:
        """Start an example in a slot."""
        ...

    def stage(self, slots: Sequence[int]) -> None:
        """Advance the prompts in these slots by one stage."""
        ...

    def proposal(self, slot: int) -> tuple[str, list[int]]:
        """Return the text of a slot's stage, and its adversarial ids."""
        ...

    def steps(self, slot: int) -> int:
        """Return the gradient steps taken for the prompt in a slot."""
        ...


def lockstep(arena: Arena, search: Search, stages: int, label: str) -> None:
    """Attack all prompts by a search, a batch of them together; a finished one gives its place.

    A prompt ends at its first success, or when its budget of stages or pictures is spent.

    Args:
        arena: Where.
        search: Proposes texts.
        stages: Most stages of a prompt.
        label: What the progress bar says.
    """
    queue = deque(arena.todo())
    stages = min(stages, arena.config.images - 1)
    slots: list[Hunt | None] = [None] * min(arena.config.batch_size, max(len(queue), 1))
    if stages == 0:
        while queue:
            arena.settle(arena.hunt(queue.popleft()))
        return
    if queue:
        search.ready(list(queue))
    with progress(label, len(queue), 0, arena.engine.is_main) as advance:
        while True:
            for slot, held in enumerate(slots):
                if held is None and queue:
                    slots[slot] = arena.hunt(queue.popleft())
                    search.open(slot, slots[slot].example)  # type: ignore[union-attr]
            live = {slot: hunt for slot, hunt in enumerate(slots) if hunt is not None}
            if not live:
                return
            began = time.perf_counter()
            search.stage(list(live))
            proposals = {slot: search.proposal(slot) for slot in live}
            shots = [Shot(h.example, proposals[s][0], h.example.seed) for s, h in live.items()]
            rulings = arena.shoot(shots)
            each = (time.perf_counter() - began) / len(live)
            for (slot, hunt), shot, ruling in zip(live.items(), shots, rulings, strict=True):
                hunt.saw(shot, ruling, proposals[slot][1])
                hunt.seconds += each
                hunt.steps = search.steps(slot)
                if hunt.success or hunt.images > stages:
                    arena.settle(hunt)
                    slots[slot] = None
                    advance()


class Candidate(NamedTuple):
    """One picture that an attack wants judged.

    Attributes:
        text: Its text.
        seed: Seed of its latent.
        ids: Adversarial token ids, where the attack has some.
        guidance: Classifier-free guidance to draw it with; None: the example's.
        source: Where the text comes from; the first success of one does not end the others.
    """

    text: str
    seed: int
    ids: Sequence[int] = ()
    guidance: float | None = None
    source: str = ""


Candidates = Callable[[Example], Sequence[Candidate]]


def volley(
    arena: Arena,
    candidates: Candidates,
    label: str,
    steps: int = 0,
    painter: Painter | None = None,
    key: str = "",
) -> None:
    """Judge listed candidates of each prompt in order, until the first success or the budget.

    Candidates of several sources go on until each source had its first success.

    Args:
        arena: Where.
        candidates: Returns an example's candidates, best first.
        label: What the progress bar says.
        steps: Gradient steps that finding an example's candidates took.
        painter: Draws candidates; see `Arena.shoot`.
        key: Names it.
    """
    queue = deque(arena.todo())
    room = arena.config.images - 1
    running: list[tuple[Hunt, list[Candidate]]] = []
    with progress(label, len(queue), 0, arena.engine.is_main) as advance:
        while queue or running:
            began = time.perf_counter()
            while queue and len(running) < arena.config.batch_size:
                hunt = arena.hunt(queue.popleft())
                listed: list[Candidate] = []
                if room:  # a search that nothing is drawn of is not made
                    listed, hunt.steps = list(candidates(hunt.example))[:room], steps
                running.append((hunt, listed))
            firing = [(hunt, left[0]) for hunt, left in running if left]
            shots = [_shot(hunt.example, candidate) for hunt, candidate in firing]
            rulings = arena.shoot(shots, painter, key)
            each = (time.perf_counter() - began) / len(running)
            for (hunt, candidate), shot, ruling in zip(firing, shots, rulings, strict=True):
                hunt.saw(shot, ruling, candidate.ids, candidate.source)
            going = []
            for hunt, left in running:
                hunt.seconds += each
                more = [one for one in left[1:] if one.source not in hunt.sources]
                if more:
                    going.append((hunt, more))
                else:
                    arena.settle(hunt)
                    advance()
            running = going


def _shot(example: Example, candidate: Candidate) -> Shot:
    if candidate.guidance is not None:
        example = replace(example, guidance=candidate.guidance)
    return Shot(example, candidate.text, candidate.seed)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _picture(folder: Path, example: Example) -> str:
    for ending in (".png", ".jpg", ".jpeg"):
        for stem in (example.id, f"{example.id}_0"):
            if (folder / f"{stem}{ending}").is_file():
                return f"{stem}{ending}"
    raise DataError(
        f"{folder} holds no picture of prompt {example.id}: {example.id}.png (or .jpg, or "
        f"{example.id}_0.png) is looked for"
    )


def picture_path(folder: Path, name: str, kind: str) -> Path:
    """Return where an attack keeps a prompt's picture.

    Args:
        folder: The attack's.
        name: The prompt's id.
        kind: "before" or "after".
    """
    kept = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
    if kept != name:
        kept = f"{kept}-{derive(0, name) % 10**6}"  # two ids may differ in what a file name lacks
    return folder / "images" / f"{kept}.{kind}.png"
