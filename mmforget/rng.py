"""Random numbers that depend on a seed and a name, not on a global state or a batch's split."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derive(seed: int, *stream: str | int) -> int:
    """Return a 63-bit seed for one named stream of a run.

    Streams are independent, so a resumed run can re-draw step 500 without drawing steps 0 to 499.
    """
    text = "/".join(str(part) for part in (seed, *stream))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *stream: str | int) -> torch.Generator:
    """Return a CPU generator for one named stream."""
    return torch.Generator().manual_seed(derive(seed, *stream))


class Draws:
    """Random numbers for one effective batch, the same however that batch is split.

    Every draw is made for all `total` examples of the effective batch and cut to the rows that
    this process and micro-batch hold. So one process or two, accumulation 1 or 8, a model or its
    reference: each example gets the same crop, time step, noise and negatives.

    Args:
        seed: The run's seed.
        stream: What the numbers are for, such as ("train", split, step).
        total: Examples in the effective batch.
        rows: The part of it that is held here; None holds all.
        device: Where results are put.
    """

    def __init__(
        self,
        seed: int,
        *stream: str | int,
        total: int,
        rows: Sequence[int] | slice | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.generator = generator(seed, *stream)
        self.total = total
        if isinstance(rows, range):  # indexing by a slice copies nothing
            rows = slice(rows.start, rows.stop, rows.step)
        self.rows = slice(None) if rows is None else rows
        self.device = torch.device(device)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Return floats in [low, high), [B, *shape]."""
        drawn = torch.rand((self.total, *shape), generator=self.generator)
        return self._cut(drawn.mul_(high - low).add_(low))

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal floats, [B, *shape]."""
        return self._cut(torch.randn((self.total, *shape), generator=self.generator))

    def integers(self, high: int, *shape: int) -> Tensor:
        """Return integers in [0, high), [B, *shape], int64."""
        return self._cut(torch.randint(high, (self.total, *shape), generator=self.generator))

    def _cut(self, drawn: Tensor) -> Tensor:
        rows = self.rows if isinstance(self.rows, slice) else list(self.rows)
        return drawn[rows].to(self.device, non_blocking=True)


class BlockDraws(Draws):
    """Random numbers for examples `start` to `stop` of a data set, drawn in blocks of fixed size.

    An example's numbers depend on its place in the data set alone, so neither the batch size of an
    evaluation nor the number of processes changes them.
    """

    BLOCK = 64

    def __init__(
        self,
        seed: int,
        *stream: str | int,
        start: int,
        stop: int,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(seed, *stream, total=stop - start, device=device)
        first, last = start // self.BLOCK, (stop - 1) // self.BLOCK
        self.parts = [
            Draws(
                seed,
                *stream,
                block,
                total=self.BLOCK,
                rows=slice(max(start - block * self.BLOCK, 0), stop - block * self.BLOCK),
                device=device,
            )
            for block in range(first, last + 1)
        ]

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Return floats in [low, high), [B, *shape]."""
        return torch.cat([part.uniform(*shape, low=low, high=high) for part in self.parts])

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal floats, [B, *shape]."""
        return torch.cat([part.normal(*shape) for part in self.parts])

    def integers(self, high: int, *shape: int) -> Tensor:
        """Return integers in [0, high), [B, *shape], int64."""
        return torch.cat([part.integers(high, *shape) for part in self.parts])
