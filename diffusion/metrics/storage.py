"""What must be kept on disk for one request."""

from collections.abc import Mapping
from typing import ClassVar

from mmforget.diffusion.checkpoints import changed_bytes
from mmforget.diffusion.models import DiffusionModel
from mmforget.record import MetricValue
from mmforget.types import Metric, Trial


class Storage(Metric):
    """Bytes of the tensors that differ from the original's, and of edits: `storage/bytes`, down.

    It is what a run writes. UnlearnCanvas's table counts whole checkpoints of the published tools
    instead (1.7 to 4.3 GB), and 0 for methods that act at inference.
    """

    citation: ClassVar[str] = "storage of UnlearnCanvas, table 2, arXiv 2402.11846"

    def compute(self, trial: Trial) -> Mapping[str, MetricValue]:
        """Return the value."""
        model, start = trial.view.model, trial.original.model
        assert isinstance(model, DiffusionModel) and isinstance(start, DiffusionModel)
        return {"storage/bytes": MetricValue(float(changed_bytes(model, start)), "down")}
