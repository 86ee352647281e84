"""Where adversarial tokens stand in a prompt: one gather builds ids and embeddings alike.

A tokenised prompt is its start mark, n tokens, its end mark and padding, `window` places in all.
Tokens that are put in move the prompt's own aside, and as many of the places after it drop out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mmforget.errors import ConfigError, DataError, unknown

# How many of the n prompt tokens stand before the j-th of k adversarial ones, given `every`.
_BEFORE: Mapping[str, Callable[[int, int, int, int], int]] = {
    "prefix_k": lambda j, n, k, every: 0,
    "suffix_k": lambda j, n, k, every: n,
    "mid_k": lambda j, n, k, every: n // 2,
    "insert_k": lambda j, n, k, every: (j + 1) * (n // (k + 1)),
    "per_k_words": lambda j, n, k, every: min(every * j, n),
    "p4d_k": lambda j, n, k, every: min(every * j, n),
}
LOCATIONS: Mapping[str, str] = {
    "prefix_k": "before the prompt (all published runs of UnlearnDiffAtk)",
    "suffix_k": "after the prompt",
    "mid_k": "in the middle of the prompt",
    "insert_k": "one by one, at equal distances within the prompt",
    "per_k_words": "one before every few prompt tokens",
    "p4d_k": "one before every few prompt tokens and one after the last whole few (P4D-K)",
    "replace": "instead of the prompt (P4D-N; AdvUnlearn's replace_k)",
    "add": "added to the prompt's own embeddings, one each (AdvUnlearn)",
}


@dataclass(frozen=True)
class Layout:
    """What stands at each place of an attacked sequence.

    Attributes:
        places: Places of the k adversarial tokens, ascending; 0 is the start mark.
        sources: For each place of the window the place in the original sequence whose token stands
            there; -1: an adversarial one.
        adds: The adversarial embeddings are added to what stands at their places, and no source
            is -1.
    """

    places: tuple[int, ...]
    sources: tuple[int, ...]
    adds: bool = False

    @cached_property
    def index(self) -> Tensor:
        """Places in the original sequence followed by the adversarial tokens, int64 [window]."""
        found = torch.tensor(self.sources)
        found[found < 0] = len(self.sources) + torch.arange(int((found < 0).sum()))
        return found

    @cached_property
    def added(self) -> Tensor:
        """For each place the adversarial token that is added there, -1: none, int64 [window]."""
        found = torch.full((len(self.sources),), -1)
        if self.adds:
            found[list(self.places)] = torch.arange(len(self.places))
        return found


def adversarial_count(location: str, n: int, k: int, every: int = 3) -> int:
    """Return how many adversarial tokens a location takes for a prompt.

    Args:
        location: One of `LOCATIONS`.
        n: Tokens of the prompt, marks left out.
        k: How many are asked for; some locations follow the prompt's length instead.
        every: Prompt tokens between two adversarial ones, where the location has them.

    Returns:
        ⌈n / every⌉, at least 1, for `per_k_words`; ⌊n / every⌋ + 1 for `p4d_k`; n for `add`;
        otherwise k.

    Raises:
        ConfigError: No such location, or a number is out of range.
    """
    _check(location, n, k, every)
    if location == "per_k_words":
        return max(-(-n // every), 1)
    if location == "p4d_k":
        return n // every + 1
    return n if location == "add" else k


def layout(
    location: str,
    n: int,
    k: int,
    window: int = 77,
    every: int = 3,
    keep_end: bool = True,
) -> Layout:
    """Return where the k adversarial tokens and the n of a prompt stand.

    In the published layout the k places right after the prompt drop out. Where a tokenizer pads
    with its end mark, that is padding. Where it does not (the second of SDXL), the end mark itself
    would be lost: `keep_end` drops the k places after it instead, the same tokens otherwise.

    Args:
        location: One of `LOCATIONS`.
        n: Tokens of the prompt, marks left out.
        k: Adversarial tokens; see `adversarial_count`.
        window: Places of a sequence.
        every: Prompt tokens between two adversarial ones (`per_k_words`, where the published code
            fixes 3, and `p4d_k`).
        keep_end: See above; a sequence that fills the window has no end mark all the same.

    Raises:
        ConfigError: No such location, a number is out of range, the tokens do not fit the window,
            or k is not what `p4d_k` or `add` takes.
    """
    _check(location, n, k, every)
    alone = location == "replace"
    if n > window - 1 or k + (0 if alone else n) > window - 1:
        raise ConfigError(
            f"n={n} prompt tokens and k={k} adversarial ones ({location}) do not fit: a window of "
            f"{window} holds {window - 1} besides the start mark. Shorten the prompt or lower k"
        )
    takes = adversarial_count(location, n, k, every)
    if location in ("p4d_k", "add") and k != takes:
        raise ConfigError(
            f"{location} puts {takes} adversarial tokens to n={n} prompt tokens, k={k} were given: "
            f"ask layouts.adversarial_count"
        )
    if alone:
        places, body = list(range(1, k + 1)), [-1] * k
    elif location == "add":
        places = body = list(range(1, n + 1))
    else:
        places = [1 + j + _BEFORE[location](j, n, k, every) for j in range(k)]
        body, own = [-1] * (n + k), iter(range(1, n + 1))
        for place in sorted(set(range(1, n + k + 1)) - set(places)):
            body[place - 1] = next(own)
    # Each place keeps its own padding, except where there are fewer tokens than slots left out.
    first = min(n + k + 1, window - 1)
    tail = [max(place, first) for place in range(len(body) + 1, window)]
    if keep_end and tail:
        tail[0] = min(n + 1, window - 1)
    return Layout(tuple(places), (0, *body, *tail), adds=location == "add")


def prompt_tokens(ids: Tensor, eos: int) -> Tensor:
    """Return the number of tokens between the start mark and the first end mark, int64 [...].

    Args:
        ids: Padded sequences, int64 [..., window].
        eos: Id of the end mark.

    Raises:
        DataError: A sequence does not begin with a mark and tokens that an end mark closes.
    """
    ends = ids == eos
    found = ends.to(torch.uint8).argmax(dim=-1)
    if not bool((ends.any(dim=-1) & (found > 0)).all()):
        raise DataError(
            f"a sequence has no end mark {eos} after its first place; tokenise with truncation and "
            f"special tokens, and give the tokenizer's own eos_token_id"
        )
    return found - 1


def adversarial_ids(layouts: Layout | Sequence[Layout], ids: Tensor, adversarial: Tensor) -> Tensor:
    """Return sequences of ids with adversarial tokens put in, int64 [..., window].

    With `add` there are none to put in: the prompt's own ids stay.

    Args:
        layouts: One for all sequences, or one for each of P.
        ids: Padded sequences [..., window]; [P, window] with P layouts.
        adversarial: [..., K], at least as many as the layouts have places; others are left out.

    Raises:
        DataError: The shapes do not fit.
    """
    index = _stacked(layouts, "index", ids, adversarial, -1)
    return torch.cat([ids, adversarial], dim=-1).gather(-1, index.expand(ids.shape))


def adversarial_embeds(
    layouts: Layout | Sequence[Layout], embeds: Tensor, adversarial: Tensor
) -> Tensor:
    """Return sequences of token embeddings with adversarial ones put in, [..., window, D].

    Gradients flow to both.

    Args:
        layouts: One for all sequences, or one for each of P.
        embeds: Embeddings of padded sequences [..., window, D]; [P, window, D] with P layouts.
        adversarial: [..., K, D], at least as many as the layouts have places.

    Raises:
        DataError: The shapes do not fit.
    """
    index = _stacked(layouts, "index", embeds, adversarial, -2)
    made = torch.cat([embeds, adversarial], dim=-2).gather(-2, index[..., None].expand_as(embeds))
    if any(each.adds for each in ([layouts] if isinstance(layouts, Layout) else layouts)):
        added = _stacked(layouts, "added", embeds, adversarial, -2)[..., None].expand_as(embeds)
        made = made + adversarial.gather(-2, added.clamp(min=0)).where(added >= 0, 0)
    return made


def decode_ids(ids: Tensor | Sequence[int], eos: int, pad: int | None = None) -> list[int]:
    """Return what of one sequence goes to `tokenizer.decode`: no marks, no padding.

    As published, the first place and every end mark drop out, one that the attack chose too.

    Args:
        ids: [window], from the start mark on.
        eos: Id of the end mark.
        pad: Id of the padding; None: the end mark. Only its run at the end drops out, as it may be
            the id of a real token ("!").
    """
    found = [int(i) for i in (ids.tolist() if isinstance(ids, Tensor) else ids)][1:]
    while pad is not None and found and found[-1] == pad:
        found.pop()
    return [i for i in found if i != eos]


def _check(location: str, n: int, k: int, every: int) -> None:
    if location not in LOCATIONS:
        raise ConfigError(unknown("location", location, LOCATIONS, "layouts.LOCATIONS"))
    if n < 0 or k < 1 or every < 1:
        raise ConfigError(
            f"n={n} prompt tokens, k={k} adversarial ones, every={every}: give n at least 0, k and "
            f"every at least 1"
        )


def _stacked(
    layouts: Layout | Sequence[Layout], name: str, original: Tensor, adversarial: Tensor, dim: int
) -> Tensor:
    """Return a tensor of one layout, [window], or of P stacked, [P, window]."""
    each = [layouts] if isinstance(layouts, Layout) else list(layouts)
    windows = {len(one.sources) for one in each}
    wanted, given = max((len(one.places) for one in each), default=0), adversarial.shape[dim]
    rows = original.shape[:dim] == adversarial.shape[:dim]
    if not isinstance(layouts, Layout):
        rows = rows and original.shape[:dim] == (len(each),)
    if windows != {original.shape[dim]} or given < wanted or not rows:
        raise DataError(
            f"sequences {list(original.shape)} and adversarial tokens {list(adversarial.shape)} do "
            f"not fit {len(each)} layouts of windows {sorted(windows)} with up to {wanted} places"
        )
    found = torch.stack([getattr(one, name) for one in each]).to(original.device)
    return found[0] if isinstance(layouts, Layout) else found
