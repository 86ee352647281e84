"""Scores of given answers, with every distinct token computed once.

What is asked about an image begins with the same tokens: template and image. This beginning is run
once (`Prefixes`), so each image is encoded once, and nothing of it is copied for each answer. What
follows is a tree: questions, and answers that share their first words. It is run as one sequence
whose tokens see their own ancestors alone (`Branches`). Generation goes on from the same state.

A model is asked both ways before it is trusted with this, and goes the plain way (`shared="off"`,
padded batches) if the answers differ.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from mmforget.errors import ConfigError, DataError
from mmforget.vlm.branches import (
    CROSS,
    Branches,
    Integers,
    Prefixes,
    Tree,
    Unshared,
    added,
    lay,
    packed,
)
from mmforget.vlm.chat import Chat, Encoded, Item
from mmforget.vlm.models import VLM
from mmforget.vlm.scores import TokenScores

logger = logging.getLogger(__name__)

SHARED = ("auto", "on", "off")
# Tokens of a tree, and how many for each token of its prefix: larger trees share more, and their
# tokens see more that is masked.
TREE, SPREAD = 192, 2
HEAD = {"cpu": 1 << 18, "cuda": 1 << 26}  # logits that are scored at a time
ROWS = 4  # answers by which a model is asked both ways
# Largest difference of log p between the two ways; in half precision the mean, rounding decides.
EXACT = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

Autocast = Callable[[], AbstractContextManager[Any]]
_CHECKED: "WeakKeyDictionary[VLM, dict[Any, str]]" = WeakKeyDictionary()


class Ask(NamedTuple):
    """A question about an image; without one, the question alone."""

    image: Path | None
    question: str


def score(
    model: VLM,
    chat: Chat,
    asks: Sequence[Ask],
    answers: Sequence[Sequence[str]],
    *,
    batch_size: int = 64,
    shared: str = "auto",
    autocast: Autocast = nullcontext,
) -> list[list[TokenScores]]:
    """Return the scores of every answer's tokens, end token included (see `Chat.encode`).

    Args:
        model: The model; evaluated without dropout.
        chat: Its encoder.
        asks: N questions.
        answers: Answers to each.
        batch_size: Answers computed at a time. Results do not depend on it beyond rounding.
        shared: "auto": share what prompts begin with, if the model gives the same numbers so (1e-4
            in single precision); "on": or fail; "off": padded batches.
        autocast: Makes the context of mixed precision: `Engine.autocast`.

    Raises:
        ConfigError: An argument is out of its range, or sharing is asked for and impossible.
        DataError: An answer has no tokens, or a prompt alone fills the window.
        CollapsedError: A log-probability is not finite.
    """
    check_arguments(batch_size, shared)
    if len(asks) != len(answers):
        raise DataError(f"{len(asks)} questions and {len(answers)} lists of answers")
    owners = [ask for ask, texts in zip(asks, answers, strict=True) for _ in texts]
    texts = [text for each in answers for text in each]
    rows = [_encoded(chat, ask, text) for ask, text in zip(owners, texts, strict=True)]
    cut = sum(row.cut > 0 for row in rows)
    if cut:
        logger.warning("%d answers are cut: they reach beyond %d tokens", cut, chat.max_length)
    found: dict[int, TokenScores] = {}
    with evaluating(model, autocast):
        for chosen in kinds(owners):
            jobs = {k: rows[k] for k in chosen}
            found |= sharing(
                model,
                shared,
                partial(_score_shared, model, chat, owners, jobs, batch_size, shared == "auto"),
                partial(_score_plain, model, chat, jobs, batch_size),
            )
    made = iter(found[k] for k in range(len(rows)))
    return [[next(made) for _ in each] for each in answers]


def check_arguments(batch_size: int, shared: str) -> None:
    """Check what scoring and generation are both given.

    Raises:
        ConfigError: A value is out of its range.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}; accepted are 1 and more")
    if shared not in SHARED:
        raise ConfigError(f"shared={shared!r}; accepted are {', '.join(SHARED)}")


@contextmanager
def evaluating(model: VLM, autocast: Autocast) -> Iterator[None]:
    """Within the block, compute without gradients and dropout."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode(), autocast():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def kinds(asks: Sequence[Ask]) -> list[list[int]]:
    """Return the places of asks with an image, and of those without; they share no batch."""
    found = [[k for k, ask in enumerate(asks) if (ask.image is None) == bare] for bare in (0, 1)]
    return [chosen for chosen in found if chosen]


def sharing(
    model: VLM,
    shared: str,
    fast: Callable[[], dict[int, Any]],
    plain: Callable[[], dict[int, Any]],
) -> dict[int, Any]:
    """Return what the fast way gives; where it is not possible, the plain one, with a warning.

    Raises:
        ConfigError: `shared` is "on" and it is not possible.
    """
    if shared == "off":
        return plain()
    try:
        return fast()
    except Unshared as why:
        name = type(model.base).__name__
        if shared == "on":
            raise ConfigError(
                f"prompts of {name} share no beginning: {why}. Use shared=auto"
            ) from why
        known = _CHECKED.setdefault(model, {})
        if str(why) not in known:  # say it once
            known[str(why)] = ""
            logger.warning("%s is asked in padded batches, which takes longer: %s", name, why)
        return plain()


def _encoded(chat: Chat, ask: Ask, text: str) -> Encoded:
    made = chat.encode(Item("", ask.image, ask.question, text))
    if made.start == len(made.ids):
        raise DataError(f"an answer to {ask.question[:60]!r} has no tokens to score: {text!r}")
    return made


def _score_plain(
    model: VLM, chat: Chat, jobs: dict[int, Encoded], batch_size: int
) -> dict[int, TokenScores]:
    """Score padded batches, each row with its own prompt and image."""
    found: dict[int, TokenScores] = {}
    order = sorted(jobs, key=lambda k: len(jobs[k].ids))
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        rows = [jobs[k] for k in batch]
        inputs = chat.collate(rows, model.device)
        length = inputs["input_ids"].shape[1]
        keep = length - min(row.start for row in rows) + 1
        logits = model.logits(inputs, keep)
        places = [
            b * keep - 1 - (length - keep) + np.arange(row.start, len(row.ids))
            for b, row in enumerate(rows)
        ]
        tokens = [row.ids[row.start :] for row in rows]
        found |= zip(batch, _scores(logits, places, tokens), strict=True)
    return found


def _score_shared(
    model: VLM,
    chat: Chat,
    asks: Sequence[Ask],
    jobs: dict[int, Encoded],
    batch_size: int,
    check: bool,
) -> dict[int, TokenScores]:
    """Score trees behind prefixes.

    Raises:
        Unshared: This model or these prompts do not allow it, or the check found a difference.
    """
    groups = grouped(chat, asks, jobs)
    if check:
        check_shared(model, chat, groups[0], jobs)
    longest = max(len(row.ids) for row in jobs.values())
    found: dict[int, TokenScores] = {}
    for lot in packed(groups, [len(group.rows) for group in groups], batch_size):
        prefixes = Prefixes(model, chat, [group.head(jobs) for group in lot], longest)
        parts: list[tuple[int, list[int], Tree]] = []
        for place, group in enumerate(lot):
            parts += [(place, *part) for part in _trees(group, jobs, batch_size)]
        parts.sort(key=lambda part: len(part[2].ids))
        for chosen in packed(parts, [len(part[1]) for part in parts], batch_size):
            forest = lay([tree for _, _, tree in chosen], chat.pad)
            branches = Branches(prefixes, [place for place, _, _ in chosen], forest.length)
            logits = branches.forward(forest, branches.seen(forest), forest.keep)
            batch, places, tokens = [], [], []
            for b, (_, rows, tree) in enumerate(chosen):
                for k, path in zip(rows, tree.paths, strict=True):
                    row = jobs[k]
                    nodes = path[len(path) - (len(row.ids) - row.start) :]
                    batch.append(k)
                    places.append(forest.logit(b, nodes))
                    tokens.append(row.ids[row.start :])
            found |= zip(batch, _scores(logits, places, tokens), strict=True)
    return found


def _scores(
    logits: Tensor, places: Sequence[Integers], tokens: Sequence[Sequence[int]]
) -> list[TokenScores]:
    """Return scores of rows of tokens by the logits [B, K, V] at places in their first two axes."""
    flat = logits.flatten(0, 1)
    index = np.concatenate(places)
    order = np.argsort(index, kind="stable")  # of several tokens at a place, it is computed once
    wanted = np.fromiter(chain.from_iterable(tokens), np.int64, len(index))[order]
    distinct, at = np.unique(index[order], return_inverse=True)
    size = max(1, HEAD.get(flat.device.type, 1 << 22) // flat.shape[-1])
    parts = []
    for first in range(0, len(distinct), size):
        chosen = distinct[first : first + size]
        start, stop = np.searchsorted(at, (first, first + size))
        parts.append(
            TokenScores.of(
                _rows(flat, chosen),
                torch.from_numpy(wanted[start:stop]).to(flat.device),
                torch.from_numpy(at[start:stop] - first).to(flat.device),
            )
        )
    back = np.argsort(order, kind="stable")
    columns = [
        np.concatenate([getattr(part, name) for part in parts])[back]
        for name in ("logp", "mean", "sigma", "hit")
    ]
    ends = np.cumsum([len(row) for row in tokens]).tolist()
    spans = [slice(a, b) for a, b in pairwise([0, *ends])]
    return [TokenScores(*(column[span] for column in columns)) for span in spans]


def _rows(values: Tensor, chosen: Integers) -> Tensor:
    """Return sorted rows of values; not copied where they follow each other."""
    first, last = int(chosen[0]), int(chosen[-1])
    if last - first + 1 == len(chosen):
        return values[first : last + 1]
    return values[torch.from_numpy(chosen).to(values.device)]


class Group(NamedTuple):
    """Rows that begin with the same tokens, all those of their image among them.

    Attributes:
        rows: Their keys.
        length: Tokens in common; the one before an answer is never among them.
    """

    rows: list[int]
    length: int

    def head(self, jobs: dict[int, Encoded]) -> Encoded:
        """Return what they begin with."""
        row = jobs[self.rows[0]]
        text = {name: value[:, : self.length] for name, value in row.text.items()}
        return Encoded(row.ids[: self.length], self.length, text, row.image)


def grouped(chat: Chat, asks: Sequence[Ask], jobs: dict[int, Encoded]) -> list[Group]:
    """Return rows grouped by image, those with prefixes of one length side by side.

    Raises:
        Unshared: Text stands before an image, or a prompt has one token.
    """
    found: dict[tuple[Path | None, int], list[int]] = {}
    for k, row in jobs.items():
        found.setdefault((asks[k].image, row.ids[0]), []).append(k)
    made = []
    for rows in found.values():
        ids = [jobs[k].ids for k in rows]
        low, high = min(ids), max(ids)  # what these two share, all share
        length = min(jobs[k].start for k in rows) - 1
        differ = (i for i, pair in enumerate(zip(low, high, strict=False)) if pair[0] != pair[1])
        length = min(length, next(differ, length))
        if length < 1:
            raise Unshared("a prompt has one token")
        for k in rows:
            row = jobs[k]
            if chat.image_token in row.ids[length:]:
                raise Unshared("the image does not stand before the text")
            cross = row.text.get(CROSS)
            if cross is not None and bool(
                (cross[:, length:] != cross[:, length - 1 :][:, :1]).any()
            ):
                raise Unshared("tokens of one text see different parts of its image")
        made.append(Group(rows, length))
    return sorted(made, key=lambda group: group.length)


def check_shared(model: VLM, chat: Chat, group: Group, jobs: dict[int, Encoded]) -> None:
    """Compare both ways on a few rows; once for a model, with and without images.

    Raises:
        Unshared: They differ, or the model does not compute the shared way.
    """
    rows = {k: jobs[k] for k in group.rows[:ROWS]}
    dtype = computing_dtype(model)
    key = (bool(next(iter(rows.values())).image), dtype)
    known = _CHECKED.setdefault(model, {})
    if key not in known:
        plain = _score_plain(model, chat, rows, ROWS)
        asks = [Ask(None, "")] * (max(rows) + 1)
        try:
            shared = _score_shared(model, chat, asks, rows, ROWS, check=False)
            known[key] = _difference(plain, shared, dtype)
        except torch.OutOfMemoryError:
            raise
        except Unshared as why:
            known[key] = str(why)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            known[key] = f"{type(error).__name__}: {error}"
    if known[key]:
        raise Unshared(known[key])


def computing_dtype(model: VLM) -> torch.dtype:
    """Return what matrices are multiplied in."""
    kind = model.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    if kind == "cuda" and torch.get_float32_matmul_precision() != "highest":
        return torch.float16  # TF32 rounds like it
    return next(model.parameters()).dtype


def _difference(
    plain: dict[int, TokenScores], shared: dict[int, TokenScores], dtype: torch.dtype
) -> str:
    """Return what differs between both ways; nothing if they agree."""
    gaps = np.concatenate(
        [
            np.abs(getattr(plain[k], name) - getattr(shared[k], name))
            / np.maximum(1, np.abs(plain[k].logp))
            for k in plain
            for name in ("logp", "mean", "sigma")
        ]
    )
    found = float(gaps.max() if dtype in (torch.float32, torch.float64) else gaps.mean())
    if found <= EXACT[dtype]:
        return ""
    return f"log-probabilities would differ by {found:.2g}"


def _trees(
    group: Group, jobs: dict[int, Encoded], batch_size: int
) -> Iterator[tuple[list[int], Tree]]:
    """Yield the rows of a group in trees of equal size, as near as may be, with their keys."""
    rest = {k: jobs[k].ids[group.length : -1] for k in group.rows}
    order = sorted(group.rows, key=rest.__getitem__)
    marks = added([rest[k] for k in order]).cumsum()
    parts = max(1, round(int(marks[-1]) / max(TREE, SPREAD * group.length)))
    # A row belongs where the middle of what it adds falls.
    middles = marks - np.diff(marks, prepend=0) / 2
    part = np.minimum(middles * parts // marks[-1], parts - 1)
    cuts = [0, *(np.nonzero(np.diff(part))[0] + 1).tolist(), len(order)]
    for start, stop in pairwise(cuts):
        for first in range(start, stop, batch_size):
            rows = order[first : min(first + batch_size, stop)]
            firsts = [jobs[k].start - 1 - group.length for k in rows]
            yield rows, Tree([rest[k] for k in rows], firsts)
