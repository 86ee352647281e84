"""Vision-language models: FIUBench and SafeEraser, on any model with a chat template.

This file only lists what the modality offers, as lazy targets, so that `mmforget list` stays light.
"""

_V = "mmforget.vlm"

ENTRIES: dict[str, dict[str, str]] = {
    "benchmarks": {
        "vlm/fiubench": f"{_V}.benchmarks.fiubench:FIUBenchmark",
        "vlm/safeeraser": f"{_V}.benchmarks.safeeraser:SafeEraser",
    },
    "methods": {
        "vlm/undial": f"{_V}.methods.undial:UNDIAL",
        "vlm/wga": f"{_V}.methods.reweighted:WGA",
        "vlm/satimp": f"{_V}.methods.reweighted:SatImp",
        "vlm/ceu": f"{_V}.methods.ceu:CEU",
        "vlm/rmu": f"{_V}.methods.rmu:RMU",
        "vlm/icd": f"{_V}.methods.icd:ICD",
        "vlm/pd": f"{_V}.methods.decouple:PromptDecouple",
        "vlm/gapd": f"{_V}.methods.decouple:GAPD",
        "vlm/gdpd": f"{_V}.methods.decouple:GDPD",
        "vlm/klpd": f"{_V}.methods.decouple:KLPD",
        "vlm/idkpd": f"{_V}.methods.decouple:IDKPD",
    },
    "metrics": {
        "vlm/fiubench": f"{_V}.metrics.fiubench:FIUBenchScores",
        "vlm/safeeraser": f"{_V}.metrics.safeeraser:SafeEraserScores",
    },
}
