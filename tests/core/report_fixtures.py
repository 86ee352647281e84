"""Synthetic run folders with all that a report can show."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mmforget.record import (
    AttackResult,
    Cost,
    MetricValue,
    RunResult,
    Seeds,
    save_arrays,
    to_json,
    write_text,
)

# method: forget accuracy, test accuracy, mean log10 loss on forget, wall seconds
RETRAINED = {"forget": 0.48, "test": 0.52, "retain": 0.97, "auc": 0.593}
METHODS = {
    "original": (0.99, 0.55, -2.3, 96.0),
    "retrain": (0.48, 0.52, 0.1, 81.0),
    "finetune": (0.93, 0.55, -1.2, 9.1),
    "grad_diff": (0.35, 0.47, 0.5, 4.0),
    "npo": (0.52, 0.50, 0.0, 5.3),
    "salun": (0.57, 0.51, -0.2, 7.7),
    "scrub": (0.61, 0.53, -0.4, 11.6),
    "vision/ssd": (0.82, 0.49, -0.9, 1.4),
}
SIGNALS = ("loss", "confidence", "modified_entropy")


def make_run(
    root: Path,
    method: str = "npo",
    *,
    seed: int = 0,
    train_seed: int = 0,
    benchmark: str = "test/absent",
    status: str = "finished",
    reference: bool = True,
    files: bool = True,
    option: float = 0.1,
    mini: bool = True,
    shift: float = 0.0,
    error: str | None = None,
) -> RunResult:
    """Write one run folder with numbers that depend on method and seed only."""
    forget, test, level, wall = METHODS.get(method, METHODS["npo"])
    rng = np.random.default_rng([seed, train_seed, len(method), int(100 * forget)])
    jitter = 0.0 if (seed, train_seed) == (0, 0) else float(rng.normal(0, 0.02))
    forget, test = forget + jitter + shift, test + jitter / 2
    losses = {
        "forget": 10 ** rng.normal(level, 0.6, 120),
        "holdout": 10 ** rng.normal(0.15, 0.5, 100),
        "retain": 10 ** rng.normal(-2.2, 0.5, 300),
        "test": 10 ** rng.normal(0.1, 0.5, 100),
    }
    auc = float((losses["forget"][:, None] < losses["holdout"]).mean())

    def known(value: float) -> float | None:
        return value if reference else None

    metrics = {
        "accuracy/constant_predictor": MetricValue(0.21, "to_reference", n=100, note="a floor"),
        "accuracy/forget": MetricValue(
            forget, "to_reference", known(RETRAINED["forget"]), forget - 0.07, forget + 0.07, 120
        ),
        "accuracy/retain": MetricValue(0.97 - abs(level) / 50, "up", known(0.97), n=300),
        "accuracy/test": MetricValue(
            test, "up", known(RETRAINED["test"]), test - 0.05, test + 0.05, 100
        ),
        "forgetting/score": MetricValue(abs(auc - 0.5), "down", known(0.093), n=220),
        "forgetting/nomus": MetricValue((test + 1 - abs(auc - 0.5)) / 2, "up", known(0.714)),
        "cost/peak_bytes": MetricValue(3.1e8, "down", known(5e8)),
        "cost/speedup": MetricValue(81 / wall, "up", known(1.0)),
    }
    attacks = {"mia": _mia(losses, auc, known), "relearn": _relearn(forget, method, known)}
    if method == "retrain" and option == 0.1:  # the reference itself; another seed is not
        metrics = _own_reference(metrics)
        attacks = {k: replace(v, values=_own_reference(v.values)) for k, v in attacks.items()}
    run = RunResult(
        id=f"{benchmark}/{method.rpartition('/')[2]}/{option:.2f}{train_seed}-s{seed}",
        status=status,
        benchmark=benchmark,
        modality=benchmark.partition("/")[0],
        method=method,
        seeds=Seeds(train_seed, seed, 0),
        mini=mini,
        request={
            "kind": "identity",
            "people": 12,
            "sizes": {name: len(part) for name, part in losses.items()},
            "ids_sha": "5f2c" * 16,
        },
        parents={},
        metrics=metrics if status in ("finished", "collapsed") else {},
        attacks=attacks if status == "finished" else {},
        cost=Cost(wall, wall * 1.7, int(3e8 + 1e7 * wall), 40 + int(wall), 5000, 1_100_000),
        environment={"python": "3.11", "device": "cpu"},
        config={
            "benchmark": {"name": benchmark, "training": {"lr": 0.1}},
            "method": {"name": method, "lr": option},
            "seeds": {"train": train_seed, "unlearn": seed},
        },
        notes=[],
        error=error,
    )
    run = replace(run, folder=root / run.id)
    write_text(run.folder / "run.json", to_json(run))
    if files:
        save_arrays(run.folder / "predictions.npz", {k: {"loss": v} for k, v in losses.items()})
        lines = [
            {"step": i, "loss": 2.3 * 0.93**i + 0.1, "lr": 0.01, "forget": 1.0, "retain": 0.5}
            for i in range(1, 41)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_text(run.folder / "events.jsonl", text)
    return run


def make_runs(root: Path, benchmark: str = "test/absent") -> list[RunResult]:
    """Write an original, a retrain, six methods, one of them with two seeds, and two failures."""
    runs = [make_run(root, method, benchmark=benchmark) for method in METHODS]
    runs.append(make_run(root, "npo", seed=1, benchmark=benchmark))
    runs.append(
        make_run(
            root,
            "grad_ascent",
            benchmark=benchmark,
            status="collapsed",
            error="test accuracy 0.21 is what a constant prediction reaches",
        )
    )
    runs.append(
        make_run(
            root,
            "vision/fisher",
            benchmark=benchmark,
            status="failed",
            files=False,
            error="out of memory. Lower method.batch_size",
        )
    )
    return runs


def _own_reference(values: dict[str, MetricValue]) -> dict[str, MetricValue]:
    return {name: replace(value, reference=value.value) for name, value in values.items()}


def _mia(losses: dict[str, Any], auc: float, known: Any) -> AttackResult:
    values, curves = {}, {}
    for i, signal in enumerate(SIGNALS):
        own = auc + 0.01 * i * (0.5 - auc)
        values[f"{signal}/auc"] = MetricValue(
            own, "to_reference", known(RETRAINED["auc"]), own - 0.05, min(1.0, own + 0.05)
        )
        rates = {"tpr@0.01": max(0.0, 0.02 + (own - 0.5) / 3), "tpr@0.001": float("nan")}
        for name, rate in rates.items():
            values[f"{signal}/{name}"] = MetricValue(rate, "to_reference", known(0.02))
        scores = np.sort(np.concatenate([losses["forget"], losses["holdout"]]))
        curves[f"roc/{signal}"] = {
            "x": [0.0, *((losses["holdout"] <= t).mean() for t in scores[::4]), 1.0],
            "y": [0.0, *((losses["forget"] <= t).mean() for t in scores[::4]), 1.0],
            "x_label": "false-positive rate",
            "y_label": "true-positive rate",
        }
    return AttackResult("grey", values, 420, 0.8, {"queries": 1000}, curves)


def _relearn(forget: float, method: str, known: Any) -> AttackResult:
    speed = {"original": 1.0, "retrain": 0.12}.get(method, 0.3 + forget / 3)
    steps = list(range(0, 21, 2))
    level = [0.99 - (0.99 - forget) * float(np.exp(-speed * step / 4)) for step in steps]
    curve = {"x": steps, "y": level, "x_label": "steps", "y_label": "accuracy on forget"}
    values = {"steps": MetricValue(6.0 / speed, "to_reference", known(50.0))}
    return AttackResult("white", values, 2400, 3.1, {"steps": 20}, {"recovery": curve})
