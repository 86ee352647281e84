"""Text conditions of a batch: what text encoders made of prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditions:
    """Text conditions of B prompts.

    Attributes:
        embeds: [B, T, D], the sequence that attention reads.
        pooled: [B, P], the pooled text of SDXL, SD3 and FLUX; None for SD.
        ids: int64 [B, T1], token ids by the first tokenizer, padded.
        prompts: The texts.
    """

    embeds: Tensor
    pooled: Tensor | None
    ids: Tensor
    prompts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.embeds)

    def rows(self, chosen: Sequence[int] | Tensor) -> "Conditions":
        """Return some rows, in the given order."""
        index = torch.as_tensor(chosen, dtype=torch.int64, device=self.embeds.device)
        return Conditions(
            self.embeds[index],
            None if self.pooled is None else self.pooled[index],
            self.ids[index],
            tuple(self.prompts[i] for i in index.tolist()),
        )

    def repeat(self, count: int) -> "Conditions":
        """Return every row `count` times, a row's copies together."""
        return self.rows([i for i in range(len(self)) for _ in range(count)])

    def detach(self) -> "Conditions":
        """Return the same without gradients."""
        pooled = None if self.pooled is None else self.pooled.detach()
        return Conditions(self.embeds.detach(), pooled, self.ids, self.prompts)


def cat(parts: Sequence[Conditions]) -> Conditions:
    """Return conditions one after the other."""
    pooled = [part.pooled for part in parts if part.pooled is not None]
    return Conditions(
        torch.cat([part.embeds for part in parts]),
        torch.cat(pooled) if pooled else None,
        torch.cat([part.ids for part in parts]),
        tuple(prompt for part in parts for prompt in part.prompts),
    )
