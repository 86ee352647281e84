"""Mini worlds: users with tastes choose among items of genres, in published layouts.

A user has a few genres, an item one or two; how well they agree and how popular the item is set the
odds that it is chosen. Popularity is skewed, so that ranking by popularity alone is no bad guess,
and every user makes some choices that no taste explains. These a model can only memorise, and what
it has memorised is what unlearning must take away. Forgotten and unseen pairs come from the same
distribution.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mmforget.recsys.formats import Table, write_lightgcn, write_mmrec
from mmforget.rng import derive

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

VERSION = 1  # raised when the same seed draws another world
USERS, ITEMS, GENRES = 600, 800, 16
PAIRS = 20_000  # about
FEWEST, MOST = 12, 120  # pairs of a user
TASTE = 0.12  # concentration of a user's tastes: the smaller, the fewer genres a user likes
SECOND = 0.3  # of items have a second genre, of half the weight
ZIPF = 0.6  # an item's popularity falls with its rank to this power
BACKGROUND = 0.03  # of an item's appeal to those who do not like its genre at all
STRAY = 0.05  # of a user's choices are made without any taste
DIMS = {"image": 32, "text": 24}  # width of the features
FEATURE_NOISE = {"image": 1.2, "text": 1.0}  # length of the noise, that of a genre being about 1


class World(NamedTuple):
    """All pairs of a world, sorted by (user, item), and what they come from.

    Attributes:
        user: int64 [n].
        item: int64 [n].
        genres: Share of each genre in an item, rows of sum 1, [items, GENRES].
        tastes: Share of each genre in a user's taste, rows of sum 1, [users, GENRES].
    """

    user: Ints
    item: Ints
    genres: Floats
    tastes: Floats


def draw_world(rng: np.random.Generator) -> World:
    """Return tastes, genres and the pairs that follow from them."""
    tastes = rng.dirichlet(np.full(GENRES, TASTE), USERS)
    first = rng.integers(GENRES, size=ITEMS)
    second = (first + rng.integers(1, GENRES, size=ITEMS)) % GENRES
    genres = np.zeros((ITEMS, GENRES))
    genres[np.arange(ITEMS), first] = 1.0
    genres[np.arange(ITEMS), second] += 0.5 * (rng.random(ITEMS) < SECOND)
    genres /= genres.sum(axis=1, keepdims=True)
    popularity = (1.0 + rng.permutation(ITEMS)) ** -ZIPF
    activity = rng.lognormal(0.0, 0.5, USERS)
    counts = (activity * PAIRS / activity.sum()).round().clip(FEWEST, MOST)
    # Sums in a fixed order: a product by BLAS differs in its last bits with the number of threads.
    liking = np.einsum("ug,ig->ui", tastes, genres)
    odds = (liking + BACKGROUND / GENRES) * popularity
    odds /= odds.sum(axis=1, keepdims=True)
    odds = (1 - STRAY) * odds + STRAY / ITEMS
    # Gumbel noise on log odds: the highest of a row are a draw without replacement.
    keys = np.log(odds) + rng.gumbel(size=odds.shape)
    rank = np.argsort(np.argsort(-keys, axis=1), axis=1)
    user, item = np.nonzero(rank < counts[:, None])
    return World(user, item, genres, tastes)


def draw_features(world: World, rng: np.random.Generator) -> dict[str, npt.NDArray[np.float32]]:
    """Return image and text features: genre vectors, turned into other spaces, with noise."""
    unit = world.genres / np.linalg.norm(world.genres, axis=1, keepdims=True)
    features = {}
    for modality, dims in DIMS.items():
        turn = rng.normal(size=(GENRES, dims)) / np.sqrt(dims)
        noise = FEATURE_NOISE[modality] * rng.normal(size=(ITEMS, dims)) / np.sqrt(dims)
        features[modality] = (np.einsum("ig,gd->id", unit, turn) + noise).astype(np.float32)
    return features


def write_unlearnrec(folder: Path, seed: int) -> None:
    """Write `train.txt` and `test.txt` of about 16,000 and 4,000 pairs of 600 users, 800 items.

    Args:
        folder: Where to; made if needed.
        seed: The same seed gives the same bytes.
    """
    rng = np.random.default_rng(derive(seed, "lightgcn"))
    write_lightgcn(folder, _table(draw_world(rng), {}, rng, (0.8, 0.0, 0.2)))


def write_mmrec_mini(folder: Path, seed: int) -> None:
    """Write `mini.inter`, `image_feat.npy` and `text_feat.npy`: pairs 8:1:1, features of genres.

    Args:
        folder: Where to; made if needed.
        seed: The same seed gives the same bytes.
    """
    rng = np.random.default_rng(derive(seed, "mmrec"))
    world = draw_world(rng)
    features = draw_features(world, rng)
    write_mmrec(folder, _table(world, features, rng, (0.8, 0.1, 0.1)), "mini")


def _table(
    world: World,
    features: dict[str, npt.NDArray[np.float32]],
    rng: np.random.Generator,
    shares: tuple[float, float, float],
) -> Table:
    """Divide the pairs of each user into training, validation and test."""
    counts = np.bincount(world.user, minlength=USERS)
    order = np.lexsort((rng.random(len(world.user)), world.user))
    place = np.empty(len(order), np.float64)
    place[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    # The first pair of a random order is at 0.5 / count: a user of few pairs has a test pair too.
    share = (place + 0.5) / np.repeat(counts, counts)
    train, val = share < shares[0], (share >= shares[0]) & (share < shares[0] + shares[1])
    test = ~train & ~val
    return Table(
        users=USERS,
        items=ITEMS,
        train=(world.user[train], world.item[train]),
        test=(world.user[test], world.item[test]),
        val=(world.user[val], world.item[val]) if shares[1] else None,
        features=features,
        format="mini",
        notes=(),
    )
