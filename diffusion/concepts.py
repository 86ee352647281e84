"""What a request means to methods of this modality: concepts to erase, and what stands for them."""

from collections.abc import Callable
from dataclasses import dataclass

from mmforget.errors import ConfigError


@dataclass(frozen=True)
class Concept:
    """One concept to erase.

    Attributes:
        name: Its bare name as a user writes it: "Van Gogh", "Dogs".
        kind: "style", "object", "person", "pair" or "unsafe".
        text: The short prompt that names it: "Van Gogh style".
        anchor: The short prompt of what stands in its place: "Photo style"; "" is no concept.
        prompts: Full prompts that name it; at least one.
        anchors: The same prompts with the anchor in its place, aligned with `prompts`.
    """

    name: str
    kind: str
    text: str
    anchor: str
    prompts: tuple[str, ...]
    anchors: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.prompts or len(self.prompts) != len(self.anchors):
            raise ConfigError(
                f"concept {self.name!r} has {len(self.prompts)} prompts and {len(self.anchors)} "
                f"anchor prompts; give each prompt its anchor"
            )


@dataclass(frozen=True)
class Erasure:
    """All that one request erases and keeps; methods read it as `ctx.target`.

    Attributes:
        concepts: What is erased, one or many.
        preserve: Short texts of what must stay: "Monet style", "Cats".
        retain: Full prompts that name no erased concept.
    """

    concepts: tuple[Concept, ...]
    preserve: tuple[str, ...] = ()
    retain: tuple[str, ...] = ()


def check_texts(texts: tuple[str, ...], count: Callable[[str], int], window: int) -> None:
    """Check that texts name something and fit the text encoder's window.

    Args:
        texts: Names and prompts of a request.
        count: Returns the tokens of a text, without those that mark its start and end.
        window: Tokens that fit between start and end.

    Raises:
        ConfigError: A text tokenises to nothing, or to more than the window.
    """
    for text in texts:
        found = count(text)
        if found == 0:
            raise ConfigError(f"the concept {text!r} tokenises to nothing; name it in words")
        if found > window:
            raise ConfigError(
                f"{text!r} is {found} tokens and the text encoder takes {window}; shorten it, or "
                f"its end would be cut off unseen"
            )
