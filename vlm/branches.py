"""Many texts behind one beginning: the beginning is run once, the texts as one sequence.

`Prefixes` holds keys and values of what prompts begin with, images among it. `Tree` holds each
distinct token of what follows once. `Branches` runs trees behind prefixes: all texts of a tree are
one sequence, whose tokens see the prefix and their own ancestors by a mask, and stand at the
positions they have in their own text. So neither the image nor its keys and values are there more
than once, whatever the number of texts.
"""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from mmforget.vlm.chat import Chat, Encoded
from mmforget.vlm.models import VLM

CROSS = "cross_attention_mask"  # what Llama 3.2 reads along the tokens

T = TypeVar("T")


class Unshared(Exception):
    """Why the beginning of prompts cannot be shared."""


class Tree:
    """Rows of tokens, every distinct beginning once.

    Attributes:
        ids: Token of each node; parents come before children.
        parents: Parent of each node; -1: the prefix.
        depth: How many tokens stand between it and the prefix.
        wanted: Whether its logits are needed.
        paths: Nodes of each row's tokens.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.parents: list[int] = []
        self.depth: list[int] = []
        self.wanted: list[bool] = []
        self.paths: list[list[int]] = []
        self._nodes: dict[tuple[int, int], int] = {}

    def add(self, row: Sequence[int], first: int) -> None:
        """Add a row, whose logits are needed from place `first` on."""
        node, path = -1, []
        for place, token in enumerate(row):
            key = (node, token)
            child = self._nodes.get(key)
            if child is None:
                child = self._nodes[key] = len(self.ids)
                self.ids.append(token)
                self.parents.append(node)
                self.depth.append(place)
                self.wanted.append(False)
            self.wanted[child] |= place >= first
            path.append(child)
            node = child
        self.paths.append(path)


class Forest(NamedTuple):
    """Trees as a batch.

    Attributes:
        ids: [B, S]; nodes whose logits are needed stand at the end.
        depth: [B, S].
        own: Which tokens of a tree each of its tokens sees, bool [B, S, S]; itself among them.
        slots: Place of each node, for each tree.
        keep: Last places whose logits are needed.
    """

    ids: Tensor
    depth: Tensor
    own: Tensor
    slots: list[list[int]]
    keep: int

    @property
    def length(self) -> int:
        """Places of a row."""
        return self.ids.shape[1]

    def logit(self, b: int, node: int) -> int:
        """Return where the logits of a node stand among those of all trees."""
        return b * self.keep + self.slots[b][node] - (self.length - self.keep)


def lay(trees: Sequence[Tree], pad: int) -> Forest:
    """Return trees as a batch."""
    keep = max(sum(tree.wanted) for tree in trees)
    length = max(len(tree.ids) for tree in trees)
    ids = np.full((len(trees), length), pad, dtype=np.int64)
    depth = np.zeros_like(ids)
    own = np.zeros((len(trees), length, length), dtype=np.bool_)
    own[:, np.arange(length), np.arange(length)] = True  # a row that sees nothing would be NaN
    slots: list[list[int]] = []
    for b, tree in enumerate(trees):
        front, back = 0, length - sum(tree.wanted)
        places = []
        for node, wanted in enumerate(tree.wanted):
            place = back if wanted else front
            back, front = back + wanted, front + (not wanted)
            places.append(place)
            parent = tree.parents[node]
            if parent >= 0:
                own[b, place] |= own[b, places[parent]]
        ids[b, places], depth[b, places] = tree.ids, tree.depth
        slots.append(places)
    made = [torch.from_numpy(each) for each in (ids, depth, own)]
    return Forest(made[0], made[1], made[2], slots, keep)


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
        self.attention, self.spatial = prefixes.attention, prefixes.spatial
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
        return torch.cat([before, forest.own.to(before.device)], dim=2)

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
        if self.attention == "eager":  # which adds its mask
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
