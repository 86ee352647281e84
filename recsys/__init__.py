"""Graph recommenders: UnlearnRec, MMRecUn and CURE4Rec.

This file only lists what the modality offers, as lazy targets, so that `mmforget list` stays light.
"""

_R = "mmforget.recsys"

ENTRIES: dict[str, dict[str, str]] = {
    "benchmarks": {
        "recsys/unlearnrec": f"{_R}.benchmarks.unlearnrec:UnlearnRecBenchmark",
        "recsys/mmrecun": f"{_R}.benchmarks.mmrecun:MMRecUnBenchmark",
        "recsys/cure4rec": f"{_R}.benchmarks.cure4rec:CURE4RecBenchmark",
    },
    "methods": {
        "recsys/unlearnrec": f"{_R}.methods.unlearnrec:UnlearnRec",
        "recsys/mmrecun": f"{_R}.methods.mmrecun:MMRecUn",
        "recsys/sisa": f"{_R}.methods.sisa:SISA",
        "recsys/receraser": f"{_R}.methods.receraser:RecEraser",
        "recsys/ifru": f"{_R}.methods.ifru:IFRU",
        "recsys/scif": f"{_R}.methods.scif:SCIF",
        "recsys/gif": f"{_R}.methods.gif:GIF",
    },
    "metrics": {
        "recsys/ranking": f"{_R}.metrics.ranking:RankingMetrics",
        "recsys/mi": f"{_R}.metrics.mi:MI",
        "recsys/gap": f"{_R}.metrics.gap:Gap",
        "recsys/groups": f"{_R}.metrics.groups:Groups",
        "recsys/fairness": f"{_R}.metrics.fairness:Fairness",
        "recsys/completeness": f"{_R}.metrics.fairness:Completeness",
    },
    "attacks": {
        "recsys/membership": f"{_R}.attacks.membership:PairMembership",
        "recsys/reconstruct": f"{_R}.attacks.reconstruct:Reconstruct",
    },
}
