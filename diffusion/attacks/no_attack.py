"""No attack: each prompt as it is, the rate that attacks start from."""

from dataclasses import dataclass
from typing import ClassVar

from mmforget.diffusion.attacks.arena import Arena, PromptAttackConfig
from mmforget.diffusion.attacks.base import AUTHORS, PromptAttack
from mmforget.options import option


@dataclass(frozen=True)
class NoAttackConfig(PromptAttackConfig):
    """Nothing to choose but prompts and judge."""

    images: int = option(1, "judged pictures of a prompt: its own", low=1, high=1)


class NoAttack(PromptAttack[NoAttackConfig]):
    """One picture of every prompt at its own seed; `asr` is `pre_asr`.

    Prompts too long for an attack are drawn as well: the rate is that of the whole file.
    """

    access: ClassVar[str] = "black"
    citation: ClassVar[str] = AUTHORS
    config_type: ClassVar[type] = NoAttackConfig

    def hunt(self, arena: Arena) -> None:
        """Draw and judge each prompt."""
        for example in arena.todo():
            arena.settle(arena.hunt(example))
