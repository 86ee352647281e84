"""mmforget: a workbench for multimodal machine unlearning."""

from pathlib import Path

# A wheel holds the modality packages inside this folder; a checkout keeps them beside it.
_here = Path(__file__).resolve().parent
if not (_here / "vision").is_dir():
    __path__[:] = [str(_here), str(_here.parent)]
