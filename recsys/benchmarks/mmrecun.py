"""MMRecUn: forget users, items, both or single interactions of a multimodal recommender."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mmforget.options import option
from mmforget.recsys import mini
from mmforget.recsys.backbones.build import BACKBONES, ModelConfig
from mmforget.recsys.benchmarks.base import (
    Bools,
    RecommenderBenchmark,
)
from mmforget.recsys.data import Interactions
from mmforget.recsys.formats import Table
from mmforget.recsys.requests import Request, forgotten_pairs


@dataclass(frozen=True)
class MultimodalRequest(Request):
    """What is to be forgotten; the paper's first request is users."""

    kind: str = option(
        "users",
        "users, items: all interactions of some; users_items: of both; edges: single interactions",
        choices=("edges", "users", "items", "users_items"),
    )


@dataclass(frozen=True)
class MultimodalModel(ModelConfig):
    """The recommender; the paper's backbone is MGCN."""

    name: str = option("mgcn", "backbone", choices=tuple(BACKBONES))


class MMRecUnBenchmark(RecommenderBenchmark):
    """The protocol of MMRecUn (arXiv 2405.15328): ranking on validation, test and forget sets.

    The reference called Gold in the paper is the retrained row. Withdrawn items stay in the list of
    candidates (`benchmark.catalogue=keep`): dropping them would forget them for free. Their
    features leave the item-item graph of the backbones that have one.
    """

    name: ClassVar[str] = "recsys/mmrecun"
    citation: ClassVar[str] = "Sinha et al., MMRecUN, arXiv 2405.15328"
    request_type: ClassVar[type] = MultimodalRequest
    model_type: ClassVar[type] = MultimodalModel
    headline: ClassVar[tuple[str, ...]] = (
        "recall@20/val",
        "recall@20/test",
        "ndcg@20/test",
        "recall@20/forget",
        "ndcg@20/forget",
        "gap/average",
    )
    mini_name: ClassVar[str] = "mmrec"

    def request_mask(self, train: Interactions, table: Table) -> Bools:
        """Return which training pairs are forgotten; see `RecommenderBenchmark.request_mask`."""
        return forgotten_pairs(self.request, train, table)

    @classmethod
    def write_mini(cls, folder: Path, seed: int) -> None:
        """Write the mini world; see `mini.write_mmrec_mini`."""
        mini.write_mmrec_mini(folder, seed)
