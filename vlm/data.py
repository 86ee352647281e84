"""Items as a data set of the core."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from mmforget.errors import DataError
from mmforget.vlm.chat import Chat, Encoded, Item, read_image


class Read(NamedTuple):
    """A raw batch: items and their tokens, encoded where the batch is read."""

    items: tuple[Item, ...]
    encoded: tuple[Encoded, ...]


class Dialogues:
    """Questions about images with answers.

    Args:
        items: The examples.
        chat: Encodes them; a batch is encoded by the thread that reads ahead.
        images: Digest of every image file.
    """

    def __init__(self, items: Sequence[Item], chat: Chat, images: dict[Path, str]) -> None:
        self.items = list(items)
        self.chat = chat
        self.ids = [item.id for item in self.items]
        self.digests = [_digest(item, images) for item in self.items]

    def __len__(self) -> int:
        return len(self.items)

    def take(self, indices: Sequence[int]) -> Read:
        """Return items and their tokens."""
        chosen = tuple(self.items[i] for i in indices)
        return Read(chosen, tuple(self.chat.encode(item) for item in chosen))

    def lengths(self) -> tuple[list[int], list[int]]:
        """Return tokens of every item, and how many of its answer the window cuts off.

        Raises:
            DataError: A prompt alone fills the window.
        """
        made = [self.chat.encode(item) for item in self.items]
        return [len(each.ids) for each in made], [each.cut for each in made]


def check_images(paths: Sequence[Path]) -> dict[Path, str]:
    """Decode every image once, and return the SHA-256 of each file.

    Raises:
        DataError: Some cannot be read; the message counts them and names the first.
    """

    def check(path: Path) -> tuple[str, str]:
        try:
            read_image(path)
        except DataError as error:
            return "", str(error)
        return hashlib.sha256(path.read_bytes()).hexdigest(), ""

    unique = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(check, unique))
    faults = [fault for _, fault in found if fault]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise DataError(f"{faults[0]}{more}. Copy or download it again")
    return {path: digest for path, (digest, _) in zip(unique, found, strict=True)}


def _digest(item: Item, images: dict[Path, str]) -> str:
    image = "" if item.image is None else images[item.image]
    text = "\x1f".join((image, item.question, item.answer))
    return hashlib.sha256(text.encode()).hexdigest()
