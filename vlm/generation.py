"""Answers by greedy decoding or nucleus sampling, many at a time.

The prompts about an image share its beginning, as in `mmforget.vlm.scoring`; then answers to them
grow side by side in one sequence, whose keys and values of template and image are there once for
all of them. Only the model's probabilities count: penalties in its generation config do not.
"""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from mmforget.errors import ConfigError
from mmforget.rng import generator
from mmforget.types import full
from mmforget.vlm.branches import Branches, Prefixes, Tree, lay, packed
from mmforget.vlm.chat import Chat, Encoded, Item
from mmforget.vlm.models import VLM
from mmforget.vlm.scoring import (
    ROWS,
    Ask,
    Autocast,
    Group,
    check_arguments,
    check_shared,
    evaluating,
    grouped,
    kinds,
    sharing,
)

logger = logging.getLogger(__name__)

SIDE_BY_SIDE = 16  # answers in one sequence: more share an image, and each sees more that is masked
ROOM = 32  # tokens of each answer that there is room for at first
EVERY = {"cpu": 1, "cuda": 8}  # steps between looks at what is finished; a GPU waits for them


class Job(NamedTuple):
    """An answer to make.

    Attributes:
        ask: Place of the question.
        sample: Which of its answers.
        limit: Most tokens.
    """

    ask: int
    sample: int
    limit: int


class Rule:
    """How tokens are chosen and where an answer ends.

    Args:
        chat: Knows the end tokens.
        steps: Most tokens of an answer.
        temperature: 0: the most probable token.
        top_p: Least probability of the tokens drawn from, together.
        seed: Seed of the draws.
        stop_at_sentence: End an answer at its first full stop, too.
    """

    def __init__(
        self,
        chat: Chat,
        steps: int,
        temperature: float,
        top_p: float,
        seed: int,
        stop_at_sentence: bool,
    ) -> None:
        self.steps = steps
        self.temperature = temperature
        self.top_p = top_p
        self.seed = seed
        self.ends = list(chat.ends)
        if stop_at_sentence:
            words = chat.tokenizer.get_vocab()
            self.ends += [id for word, id in words.items() if "." in word and id not in chat.ends]

    def draws(self, jobs: Sequence[Job], device: torch.device) -> Tensor | None:
        """Return uniform numbers [jobs, steps], each of its seed, question, sample and step."""
        if self.temperature == 0:
            return None
        rows = [generator(self.seed, "answer", job.ask, job.sample) for job in jobs]
        return torch.stack([torch.rand(self.steps, generator=row) for row in rows]).to(device)

    def pick(self, logits: Tensor, drawn: Tensor | None) -> Tensor:
        """Return tokens [...] of logits [..., V]: the best, or where a number in [0, 1) falls.

        The nucleus is the fewest tokens whose probabilities add up to `top_p`, and all that are as
        probable as its last.
        """
        if drawn is None:
            return logits.argmax(-1)
        p = (full(logits) / self.temperature).softmax(-1)
        if self.top_p < 1:
            ranked = p.sort(dim=-1, descending=True).values
            above = ranked.cumsum(-1) - ranked
            least = ranked.masked_fill(above >= self.top_p, torch.inf).amin(-1, keepdim=True)
            p = torch.where(p >= least, p, 0.0)
        upto = p.cumsum(-1)
        total = upto[..., -1:]
        below = torch.nextafter(total, torch.zeros_like(total))  # rounding must not reach the end
        aim = torch.minimum(drawn.to(p.dtype)[..., None] * total, below)
        return (upto <= aim).sum(-1).clamp(max=p.shape[-1] - 1)


def generate(
    model: VLM,
    chat: Chat,
    asks: Sequence[Ask],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    samples: int = 1,
    seed: int = 0,
    stop_at_sentence: bool = False,
    shared: str = "auto",
    autocast: Autocast = nullcontext,
) -> list[list[str]]:
    """Return `samples` answers to each question, without end token.

    What is drawn depends on the seed, the place of the question, the sample and the step alone.

    Args:
        model: The model; evaluated without dropout.
        chat: Its encoder.
        asks: Questions.
        max_new_tokens: Longest answer; fewer where the window leaves less room.
        batch_size: Answers that grow at a time.
        temperature: 0: greedy, and all samples are alike.
        top_p: Sample from the fewest tokens that together have this probability.
        samples: Answers to each question.
        seed: Seed of sampling.
        stop_at_sentence: End an answer at its first full stop, "Dr." and "3.5" included, as
            evaluations that read the first sentence alone may.
        shared: See `scoring.score`.
        autocast: See there.

    Raises:
        ConfigError: An argument is out of its range, or sharing is asked for and impossible.
        DataError: A prompt fills the window.
    """
    check_arguments(batch_size, shared)
    for name, value, fits, accepted in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "1 and more"),
        ("samples", samples, samples >= 1, "1 and more"),
        ("temperature", temperature, temperature >= 0, "0 and more"),
        ("top_p", top_p, 0 < top_p <= 1, "numbers above 0, up to 1"),
    ):
        if not fits:
            raise ConfigError(f"{name}={value}; accepted are {accepted}")
    rule = Rule(chat, max_new_tokens, temperature, top_p, seed, stop_at_sentence)
    prompts = [chat.prompt(ask.image, ask.question) for ask in asks]
    room = [min(max_new_tokens, chat.max_length - len(row.ids)) for row in prompts]
    short = sum(each < max_new_tokens for each in room)
    if short:
        logger.warning("%d answers have fewer than %d tokens of room", short, max_new_tokens)
    drawn = samples if temperature > 0 else 1
    found: dict[int, list[str]] = {}
    with evaluating(model, autocast):
        for chosen in kinds(asks):
            rows = {k: prompts[k] for k in chosen}
            jobs = {k: [Job(k, s, room[k]) for s in range(drawn)] for k in chosen}
            found |= sharing(
                model,
                shared,
                partial(
                    _generate_shared,
                    model,
                    chat,
                    asks,
                    rows,
                    jobs,
                    rule,
                    batch_size,
                    shared == "auto",
                ),
                partial(_generate_plain, model, chat, rows, jobs, rule, batch_size),
            )
    return [found[k] * (samples // drawn) for k in range(len(asks))]


class _Picked(LogitsProcessor):
    """Leaves the token that a rule picks, so that greedy search takes it."""

    def __init__(self, rule: Rule, draws: Tensor | None) -> None:
        self.rule = rule
        self.draws = draws
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = None if self.draws is None else self.draws[:, self.step]
        self.step += 1
        chosen = self.rule.pick(scores, drawn)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def _generate_plain(
    model: VLM,
    chat: Chat,
    rows: dict[int, Encoded],
    jobs: dict[int, list[Job]],
    rule: Rule,
    batch_size: int,
) -> dict[int, list[str]]:
    """Generate by transformers in batches padded on the left, each row with its own image."""
    order = [job for k in sorted(rows, key=lambda k: len(rows[k].ids)) for job in jobs[k]]
    found: dict[int, list[str]] = {k: [""] * len(jobs[k]) for k in rows}
    base = model.base
    own, base.generation_config = base.generation_config, GenerationConfig()
    try:
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            inputs = chat.collate([rows[job.ask] for job in batch], model.device, side="left")
            steps = max(job.limit for job in batch)
            settings = GenerationConfig(
                max_new_tokens=steps,
                do_sample=False,
                eos_token_id=rule.ends,
                pad_token_id=chat.ends[0],
            )
            picked = _Picked(rule, rule.draws(batch, model.device))
            made = base.generate(**inputs, generation_config=settings, logits_processor=[picked])
            made = made[:, inputs["input_ids"].shape[1] :].tolist()
            for job, ids in zip(batch, made, strict=True):
                found[job.ask][job.sample] = chat.decode(ids[: job.limit])
    finally:
        base.generation_config = own
    return found


def _generate_shared(
    model: VLM,
    chat: Chat,
    asks: Sequence[Ask],
    rows: dict[int, Encoded],
    jobs: dict[int, list[Job]],
    rule: Rule,
    batch_size: int,
    check: bool,
) -> dict[int, list[str]]:
    """Generate behind shared prefixes.

    Raises:
        Unshared: This model or these prompts do not allow it, or the check found a difference.
    """
    groups = grouped(chat, asks, rows)
    if check:
        _check(model, chat, asks, groups[0])
    longest = max(len(rows[k].ids) + jobs[k][0].limit for k in rows)
    found: dict[int, list[str]] = {k: [""] * len(jobs[k]) for k in rows}
    sizes = [sum(len(jobs[k]) for k in group.rows) for group in groups]
    for lot in packed(groups, sizes, batch_size):
        prefixes = Prefixes(model, chat, [group.head(rows) for group in lot], longest)
        width = min(SIDE_BY_SIDE, batch_size)
        units = []
        for place, group in enumerate(lot):
            wanted = [job for k in group.rows for job in jobs[k]]
            units += [(place, wanted[at : at + width]) for at in range(0, len(wanted), width)]
        for part in packed(units, [len(unit) for _, unit in units], batch_size):
            trees = []
            for place, unit in part:
                rest = [rows[job.ask].ids[lot[place].length :] for job in unit]
                trees.append(Tree(rest, [len(ids) - 1 for ids in rest]))
            places = [place for place, _ in part]
            for job, ids in _grow(
                prefixes, places, trees, [unit for _, unit in part], rule, chat
            ).items():
                found[job.ask][job.sample] = chat.decode(ids)
    return found


def _check(model: VLM, chat: Chat, asks: Sequence[Ask], group: Group) -> None:
    """Ask the model both ways; what the answers say does not matter."""
    rows = {
        k: chat.encode(Item("", asks[k].image, asks[k].question, asks[k].question or "?"))
        for k in group.rows[:ROWS]
    }
    check_shared(model, chat, grouped(chat, asks, rows)[0], rows)


def _grow(
    prefixes: Prefixes,
    places: Sequence[int],
    trees: Sequence[Tree],
    units: Sequence[Sequence[Job]],
    rule: Rule,
    chat: Chat,
) -> dict[Job, list[int]]:
    """Return the tokens of all answers, those of a unit grown behind one prefix.

    Args:
        prefixes: What was run.
        places: The prefix of each unit.
        trees: The rest of the prompts of each unit.
        units: The answers to make.
        rule: Chooses tokens.
        chat: Knows the end tokens.
    """
    device = prefixes.real.device
    order = [job for unit in units for job in unit]
    row = {job: k for k, job in enumerate(order)}
    steps = max(job.limit for job in order)
    width = max(len(unit) for unit in units)
    forest = lay(trees, chat.pad)
    branches = Branches(prefixes, places, forest.length + width * min(steps, ROOM))

    # Slots [B, R] of answers. Those that a unit lacks ask its first question, are finished, and
    # write behind all rows.
    filled = [[*unit, *([unit[0]] * (width - len(unit)))] for unit in units]
    last = [
        [int(tree.paths[unit.index(job)][-1]) for job in slots]
        for tree, unit, slots in zip(trees, units, filled, strict=True)
    ]
    at = torch.tensor(
        [forest.slots[b][nodes].tolist() for b, nodes in enumerate(last)], device=device
    )
    depth = torch.tensor(
        [(tree.depth[nodes] + 1).tolist() for tree, nodes in zip(trees, last, strict=True)],
        device=device,
    )
    owner = torch.tensor([[row[job] for job in slots] for slots in filled], device=device)
    limit = torch.tensor([[job.limit for job in slots] for slots in filled], device=device)
    done = torch.tensor([[k >= len(unit) for k in range(width)] for unit in units], device=device)
    owner = torch.where(done, len(order), owner)
    draws = rule.draws([*order, order[0]], device)

    seen = branches.seen(forest)
    logits = branches.forward(forest, seen, forest.keep)
    logits = _along(logits, at - (forest.length - forest.keep))
    seen = _along(seen, at)  # [B, R, all]: an answer sees what its prompt's last token saw
    ends = torch.zeros(logits.shape[-1], dtype=torch.bool, device=device)
    ends[torch.tensor([end for end in rule.ends if end < len(ends)], device=device)] = True
    made = torch.full((len(order) + 1, steps), chat.ends[0], device=device)
    every = EVERY.get(device.type, 4)
    for step in range(steps):
        tokens = rule.pick(logits, None if draws is None else draws[owner, step])
        made[owner, step] = torch.where(done, chat.ends[0], tokens)
        done = done | ends[tokens] | (step + 1 >= limit)
        if step + 1 == steps:
            break
        if (step + 1) % every == 0:
            alive = (~done).sum(1).tolist()
            if not any(alive):
                break
            if 2 * sum(map(bool, alive)) * max(alive) <= done.numel():
                chosen, slots, columns = _living(done, seen, alive)
                branches.select(chosen, columns, slots.shape[1] * min(steps - step, ROOM))
                seen = _along(seen[chosen], slots).gather(
                    2, columns[:, None].expand(-1, slots.shape[1], -1)
                )
                tokens, done, owner, limit, depth = (
                    each[chosen].gather(1, slots) for each in (tokens, done, owner, limit, depth)
                )
        eye = torch.eye(tokens.shape[1], dtype=torch.bool, device=device)
        seen = torch.cat([seen, eye.expand(len(seen), -1, -1)], dim=2)
        logits = branches.step(tokens, depth, seen, tokens.shape[1])
        depth = depth + 1
    return dict(zip(order, made.tolist(), strict=False))


def _living(done: Tensor, seen: Tensor, alive: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return units with unfinished answers [B'], their slots [B', R'] and tokens seen [B', K'].

    Slots and tokens are filled up where a unit has fewer: finished slots, tokens none of them sees.
    """
    chosen = torch.tensor([b for b, count in enumerate(alive) if count], device=done.device)
    slots = done[chosen].long().argsort(dim=1, stable=True)[:, : max(alive)]
    used = (seen[chosen] & ~done[chosen][:, :, None]).any(1)
    columns = (~used).long().argsort(dim=1, stable=True)[:, : int(used.sum(1).max())]
    return chosen, slots, columns


def _along(values: Tensor, places: Tensor) -> Tensor:
    """Return values [B, R, N] at places [B, R] of their second axis [B, S, N]."""
    return values.gather(1, places[:, :, None].expand(-1, -1, values.shape[2]))
