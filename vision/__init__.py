"""Face classifiers: MUFAC, MUCAC and any folder of faces.

This file only lists what the modality offers, as lazy targets, so that `mmforget list` stays light.
"""

_V = "mmforget.vision"

ENTRIES: dict[str, dict[str, str]] = {
    "benchmarks": {
        "vision/mufac": f"{_V}.benchmarks.mufac:MUFAC",
        "vision/mucac": f"{_V}.benchmarks.mucac:MUCAC",
        "vision/faces": f"{_V}.benchmarks.faces:Faces",
    },
    "methods": {
        "vision/cf_k": f"{_V}.methods.cf_k:CFk",
        "vision/eu_k": f"{_V}.methods.eu_k:EUk",
        "vision/unsir": f"{_V}.methods.unsir:UNSIR",
        "vision/boundary_shrink": f"{_V}.methods.boundary_shrink:BoundaryShrink",
        "vision/boundary_expand": f"{_V}.methods.boundary_expand:BoundaryExpand",
        "vision/fisher": f"{_V}.methods.fisher:FisherForgetting",
        "vision/influence": f"{_V}.methods.influence:InfluenceUnlearning",
        "vision/ssd": f"{_V}.methods.ssd:SSD",
    },
}
