"""Many texts behind one beginning: the beginning is run once, the texts as one sequence.

`Prefixes` holds keys and values of what prompts begin with, images among it. `Tree` holds each
distinct token of what follows once. `Branches` runs trees behind prefixes: all texts of a tree are
one sequence, whose tokens see the prefix and their own ancestors by a mask, and stand at the
positions they have in their own text. So neither the image nor its keys and values are there more
than once, whatever the number of texts.
"""

import inspect
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from mmforget.vlm.chat import Chat, Encoded
from mmforget.vlm.models import VLM

CROSS = "cross_attention_mask"  # what Llama 3.2 reads along the tokens

T = TypeVar("T")
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]


class Unshared(Exception):
    """Why the beginning of prompts cannot be shared."""


class Tree:
    """Rows of tokens, every distinct beginning once.

    Nodes are numbered along the rows in sorted order, so what is behind a node follows it: the
    nodes from it to its `ends`.

    Args:
        rows: Tokens of each row, at least one.
        first: From which place on the logits of each row are needed.

    Attributes:
        ids: Token of each node, [N].
        depth: How many tokens stand between it and the prefix, [N].
        ends: The first node that is neither itself nor behind it, [N].
        wanted: Whether its logits are needed, bool [N].
        paths: Nodes of each row's tokens.
    """

    def __init__(self, rows: Sequence[list[int]], first: Sequence[int]) -> None:
        order = sorted(range(len(rows)), key=lambda k: rows[k])
        new, real, tokens = _aligned([rows[k] for k in order])
        self.ids: Integers = tokens[new]
        self.depth: Integers = np.nonzero(new)[1]
        before = new.sum(1).cumsum()  # nodes up to each row's end
        nodes = np.where(new, new.cumsum().reshape(new.shape) - 1, 0)
        nodes = np.maximum.accumulate(nodes, axis=0)
        # What is behind a node ends with the first later row that does not begin as this one does.
        starts = np.where(real & ~new, before[-1], (before - new.sum(1))[:, None])
        starts = np.minimum.accumulate(starts[::-1], axis=0)[::-1]
        last = np.full_like(starts[:1], before[-1])
        self.ends: Integers = np.concatenate([starts[1:], last])[new]
        self.wanted: Booleans = np.zeros(len(self.ids), dtype=np.bool_)
        firsts = np.array([first[k] for k in order])
        self.wanted[nodes[real & (np.arange(real.shape[1]) >= firsts[:, None])]] = True
        lengths = real.sum(1).tolist()
        found = {k: path[:size] for k, path, size in zip(order, nodes, lengths, strict=True)}
        self.paths: list[Integers] = [found[k] for k in range(len(rows))]


def added(rows: Sequence[Sequence[int]]) -> Integers:
    """Return how many nodes each of sorted rows adds to a tree of those before it, [R]."""
    counts: Integers = _aligned(rows)[0].sum(1)
    return counts


def _aligned(rows: Sequence[Sequence[int]]) -> tuple[Booleans, Booleans, Integers]:
    """Return which tokens of sorted rows are new, which places are filled, and tokens, [R, L]."""
    lengths = np.array([len(row) for row in rows])
    real = np.arange(lengths.max()) < lengths[:, None]
    tokens = np.full(real.shape, -1, dtype=np.int64)
    tokens[real] = np.fromiter(chain.from_iterable(rows), np.int64, int(lengths.sum()))
    new = real.copy()
    same = np.logical_and.accumulate(tokens[1:] == tokens[:-1], axis=1)
    new[1:] &= ~same
    return new, real, tokens


class Forest(NamedTuple):
    """Trees as a batch.

    Attributes:
        ids: [B, S]; nodes whose logits are needed stand at the end.
        depth: [B, S].
        nodes: Number of the node that stands at a place, [B, S]; of its own where none does.
        ends: `Tree.ends` of it, [B, S].
        slots: Place of each node, for each tree.
        keep: Last places whose logits are needed.
    """

    ids: Tensor
    depth: Tensor
    nodes: Tensor
    ends: Tensor
    slots: list[Integers]
    keep: int

    @property
    def length(self) -> int:
        """Places of a row."""
        return self.ids.shape[1]

    def own(self, device: torch.device) -> Tensor:
        """Return which places of a tree each place sees, itself among them, bool [B, S, S]."""
        nodes, ends = self.nodes.to(device), self.ends.to(device)
        at = nodes[:, :, None]
        return (nodes[:, None] <= at) & (at < ends[:, None])

    def logit(self, b: int, nodes: Integers) -> Integers:
        """Return where the logits of nodes stand among those of all trees."""
        return b * self.keep + self.slots[b][nodes] - (self.length - self.keep)


def lay(trees: Sequence[Tree], pad: int) -> Forest:
    """Return trees as a batch."""
    keep = max(int(tree.wanted.sum()) for tree in trees)
    length = max(len(tree.ids) for tree in trees)
    ids = np.full((len(trees), length), pad, dtype=np.int64)
    depth = np.zeros_like(ids)
    nodes = np.broadcast_to(np.arange(length) + length, ids.shape).copy()
    ends = nodes + 1  # a place without a node sees itself: one that sees nothing would be NaN
    slots: list[Integers] = []
    for b, tree in enumerate(trees):
        order = np.argsort(tree.wanted, kind="stable")
        places = np.arange(len(order))
        places[len(order) - int(tree.wanted.sum()) :] += length - len(order)
        ids[b, places], depth[b, places] = tree.ids[order], tree.depth[order]
        nodes[b, places], ends[b, places] = order, tree.ends[order]
        slots.append(places[np.argsort(order, kind="stable")])
    made = [torch.from_numpy(each) for each in (ids, depth, nodes, ends)]
    return Forest(made[0], made[1], made[2], made[3], slots, keep)


class Prefixes:
    """Beginnings that were run: their keys and values, for B groups.

    Args:
        model: The model.
        chat: Pads the beginnings.
        heads: What the groups begin with.
        longest: Tokens of the longest row that will be asked about.

    Raises:
        Unshared: The model's attention takes no mask of its own, or its layers keep something else
            than all keys and values.
    """

    def __init__(self, model: VLM, chat: Chat, heads: Sequence[Encoded], longest: int) -> None:
        text = model.base.config.get_text_config()
        self.model = model
        self.attention: str = text._attn_implementation
        if self.attention not in ("sdpa", "eager"):
            raise Unshared(f"attention is {self.attention}, which takes no mask of its own")
        inputs = chat.collate(heads, model.device)
        real = inputs["attention_mask"].bool()
        positions, self.spatial = _positions(model, inputs)
        given = {"position_ids": positions} if self.spatial else {}
        found = model.net(**inputs, **given, use_cache=True, logits_to_keep=1).past_key_values
        places = positions.amax(0) if self.spatial else positions
        self.following = places.where(real, -1).amax(1) + 1
        self.real = real
        self.cross = None
        if CROSS in inputs:  # what the last token of each sees, all behind it see
            rows = torch.arange(len(real), device=real.device)
            self.cross = inputs[CROSS][rows, real.sum(1) - 1][:, None]
        crossing = getattr(text, "cross_attention_layers", None) or ()
        self.layers: list[tuple[Tensor, Tensor, bool] | None] = []
        for k, layer in enumerate(found.layers):
            if type(layer) is DynamicSlidingWindowLayer:
                if longest > layer.sliding_window:
                    raise Unshared(f"a layer sees {layer.sliding_window} tokens, fewer than asked")
            elif type(layer) is not DynamicLayer:
                raise Unshared(f"its layers keep a {type(layer).__name__}, not keys and values")
            if layer.get_seq_length() == 0:
                self.layers.append(None)  # layers of Llama 3.2 that read an image, without one
            else:
                self.layers.append((layer.keys, layer.values, k in crossing))


def _positions(model: VLM, inputs: dict[str, Tensor]) -> tuple[Tensor, bool]:
    """Return positions [B, T], or [3, B, T] where images have two dimensions, and whether so."""
    core = getattr(model.base, "model", model.base)
    index = getattr(core, "get_rope_index", None)
    ids = inputs["input_ids"]
    along = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    if index is None:
        return along, False
    names = inspect.signature(index).parameters.keys() & inputs.keys()
    if "pixel_values" not in inputs:
        return along.expand(3, -1, -1), True
    found: Tensor = index(**{name: inputs[name] for name in names})[0]
    return found, True


class _Room(DynamicLayer):
    """Keys and values of a layer, with room behind them: what comes is written, nothing copied."""

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self.used = keys.shape[-2]
        self._held = [_roomy(each, room) for each in (keys, values)]
        self.keys, self.values = keys, values

    def both(self) -> tuple[Tensor, Tensor]:
        """Return keys and values, [B, heads, T, D] each."""
        keys, values = (held[..., : self.used, :] for held in self._held)
        return keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values [B, heads, T, D]; return all."""
        start, self.used = self.used, self.used + key_states.shape[-2]
        if self.used > self._held[0].shape[-2]:
            self._held = [_roomy(held[..., :start, :], self.used) for held in self._held]
        for held, new in zip(self._held, (key_states, value_states), strict=True):
            held[..., start : self.used, :] = new
        self.keys, self.values = found = self.both()
        return found


def _roomy(values: Tensor, room: int) -> Tensor:
    """Return values [B, heads, T, D] with room for more tokens."""
    *shape, length, width = values.shape
    made = values.new_empty((*shape, length + room, width))
    made[..., :length, :] = values
    return made


class Branches:
    """Sequences of many texts, each behind one of the prefixes.

    Args:
        prefixes: The prefixes; they stay as they are.
        which: The prefix of each sequence.
        room: Tokens that will be added, if known.
    """

    def __init__(self, prefixes: Prefixes, which: Sequence[int], room: int) -> None:
        self.model = prefixes.model
        chosen = torch.tensor(which, device=self.model.device)
        self.spatial = prefixes.spatial
        # Eager attention adds its mask. So does a CPU's sdpa, after making it anew in every layer.
        single = next(self.model.parameters()).dtype == torch.float32
        single &= self.model.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        self.adds = prefixes.attention == "eager" or single
        self.following = prefixes.following[chosen]
        self.real = prefixes.real[chosen]
        self.cross = None if prefixes.cross is None else prefixes.cross[chosen]
        self._rooms = [
            None
            if each is None
            else (_Room(each[0][chosen], each[1][chosen], 0 if each[2] else room), each[2])
            for each in prefixes.layers
        ]
        self._cache = self._cached()

    def _cached(self) -> Cache:
        empty: Any = DynamicLayer
        return Cache(layers=[empty() if each is None else each[0] for each in self._rooms])

    def seen(self, forest: Forest) -> Tensor:
        """Return what tokens of first trees see, bool [B, S, P + S]: prefix and ancestors."""
        before = self.real[:, None, :].expand(-1, forest.length, -1)
        return torch.cat([before, forest.own(before.device)], dim=2)

    def forward(self, forest: Forest, seen: Tensor, keep: int) -> Tensor:
        """Add trees, and return the logits of their last `keep` places, [B, keep, V]."""
        device = self.real.device
        return self.step(forest.ids.to(device), forest.depth.to(device), seen, keep)

    def step(self, ids: Tensor, depth: Tensor, seen: Tensor, keep: int) -> Tensor:
        """Add tokens, and return the logits of the last `keep` of each sequence, [B, keep, V].

        Args:
            ids: Tokens [B, S].
            depth: Tokens between each and the prefix, [B, S].
            seen: What each sees of all that was added, itself included; bool [B, S, all].
            keep: How many logits are needed.
        """
        positions = self.following[:, None] + depth
        if self.spatial:
            positions = positions.expand(3, -1, -1)
        mask = seen[:, None]
        if self.adds:
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(
                ~mask, torch.finfo(torch.float32).min
            )
        extra = {}
        if self.cross is not None:
            extra[CROSS] = self.cross.expand(-1, ids.shape[1], -1, -1)
        found: Tensor = self.model.net(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=keep,
            **extra,
        ).logits
        return found[:, -keep:]

    def select(self, chosen: Tensor, columns: Tensor, room: int) -> None:
        """Keep some sequences [B'] and of each some tokens [B', K], prefixes among them."""
        self.following = self.following[chosen]
        self.cross = None if self.cross is None else self.cross[chosen]
        for k, each in enumerate(self._rooms):
            if each is None:
                continue
            held, crossing = each
            keys, values = (found[chosen] for found in held.both())
            if not crossing:
                at = columns[:, None, :, None]
                keys, values = (
                    found.gather(2, at.expand(-1, found.shape[1], -1, found.shape[3]))
                    for found in (keys, values)
                )
            self._rooms[k] = (_Room(keys, values, 0 if crossing else room), crossing)
        self._cache = self._cached()


def packed(parts: Sequence[T], sizes: Sequence[int], limit: int) -> Iterator[list[T]]:
    """Yield parts in order, as many together as fit into the limit, or one."""
    held: list[T] = []
    total = 0
    for part, size in zip(parts, sizes, strict=True):
        if held and total + size > limit:
            yield held
            held, total = [], 0
        held.append(part)
        total += size
    if held:
        yield held
