"""Forget images and what each model says about them: written with a run, drawn in the report."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.special import expit, softmax

from mmforget.record import RunResult, write_text, writing
from mmforget.report.section import Section
from mmforget.types import Trial

SHOWN = 24
COLUMNS = 6
FIRST = ("original", "retrain")  # rows shown before the methods
STYLE = """<style>
.faces{display:grid;grid-template-columns:repeat(auto-fill,minmax(11rem,1fr));gap:.75rem}
.faces figure{margin:0;padding:.6rem;border-radius:.5rem;background:var(--card);color:var(--fg)}
.faces .face{width:5.5rem;aspect-ratio:1;margin:0 auto .4rem;border-radius:.4rem}
.faces figcaption{font-size:.8rem;text-align:center;margin-bottom:.3rem}
.faces table{width:100%;border-collapse:collapse;font-size:.72rem;line-height:1.35}
.faces td{padding:0 .15rem;border:0}
.faces td:first-child{color:var(--muted);background:none;box-shadow:none;position:static}
.faces td:last-child{text-align:right;font-variant-numeric:tabular-nums}
.faces .right{color:var(--good)}.faces .wrong{color:var(--bad)}
</style>"""
NOTE = (
    "The same images of the forget set for every model: predicted label, its confidence, and "
    "whether it is the true one. Wrong is not the aim in itself: read each method beside the "
    "retrained model, which never saw these images and may still be right about many."
)


def write(trial: Trial, names: Sequence[str], multilabel: bool, folder: Path) -> None:
    """Write `forget.png`, a sheet of up to 24 forget images, and `forget.json`, what is said.

    Args:
        trial: The model under test and its splits.
        names: What each class or attribute is called.
        multilabel: Whether labels are attributes.
        folder: Where to; made if needed.
    """
    numbers = trial.view.numbers("forget")
    chosen = _spread(len(numbers["loss"]))
    logits, label = numbers["logits"][chosen], numbers["label"][chosen]
    if multilabel:
        true, predicted, confidence = _attributes(logits, label, names)
    else:
        likely = logits.argmax(axis=1)
        true, predicted = [names[k] for k in label], [names[k] for k in likely]
        confidence = softmax(logits.astype(np.float64), axis=1).max(axis=1)
    images = trial.splits.forget.take(chosen)["image"].numpy()
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder / "forget.png") as temporary:
        sheet(images).save(temporary, format="PNG", optimize=True)
    content = {
        "ids": numbers["ids"][chosen].tolist(),
        "true": true,
        "predicted": predicted,
        "confidence": [round(float(value), 4) for value in confidence],
    }
    write_text(folder / "forget.json", json.dumps(content, indent=1))


def sheet(images: npt.NDArray[np.uint8]) -> Image.Image:
    """Return images uint8 [N, 3, S, S] side by side, six to a line."""
    size = images.shape[-1]
    lines = -(-len(images) // COLUMNS)
    page = np.zeros((lines * COLUMNS, 3, size, size), dtype=np.uint8)
    page[: len(images)] = images
    grid = page.reshape(lines, COLUMNS, 3, size, size).transpose(0, 3, 1, 4, 2)
    return Image.fromarray(np.ascontiguousarray(grid.reshape(lines * size, COLUMNS * size, 3)))


def sections(runs: Sequence[RunResult]) -> list[Section]:
    """Return the section of forget images, before and after; none without samples.

    Runs that forget other images than the first one are left out.
    """
    told: list[tuple[RunResult, Mapping[str, Any]]] = []
    for run in sorted(runs, key=_rank):
        path = run.folder / "samples" / "forget.json"
        if path.is_file():
            said = json.loads(path.read_text())
            if not told or said["ids"] == told[0][1]["ids"]:
                told.append((run, said))
    if not told:
        return []
    run, base = told[0]
    image = (run.folder / "samples" / "forget.png").read_bytes()
    lines = -(-len(base["ids"]) // COLUMNS)
    own = f"faces-{hashlib.sha256(image).hexdigest()[:8]}"  # a page may show several benchmarks
    sprite = (
        f"<style>.{own} .face{{background-size:{COLUMNS * 100}% {lines * 100}%;"
        f"background-image:url(data:image/png;base64,{base64.b64encode(image).decode()})}}</style>"
    )
    names = _names([entry for entry, _ in told])
    cards = "".join(
        _card(k, lines, base, [(name, said) for name, (_, said) in zip(names, told, strict=True)])
        for k in range(len(base["ids"]))
    )
    html = f'{STYLE}{sprite}<div class="faces {own}">{cards}</div>'
    return [Section(title="Forget images, before and after", html=html, note=NOTE)]


def _card(
    k: int, lines: int, base: Mapping[str, Any], told: Sequence[tuple[str, Mapping[str, Any]]]
) -> str:
    """Return one image and, for each model, a line with label, confidence and a mark."""
    across = 100 * (k % COLUMNS) / (COLUMNS - 1)
    down = 100 * (k // COLUMNS) / max(1, lines - 1)
    rows = []
    for name, said in told:
        right = said["predicted"][k] == base["true"][k]
        mark = '<span class="right">✓</span>' if right else '<span class="wrong">✗</span>'
        rows.append(
            f"<tr><td>{escape(name)}</td><td>{escape(said['predicted'][k])} {mark}</td>"
            f"<td>{said['confidence'][k]:.0%}</td></tr>"
        )
    image = escape(base["ids"][k])
    return (
        f'<figure><div class="face" role="img" aria-label="{image}" title="{image}" '
        f'style="background-position:{across:g}% {down:g}%"></div>'
        f"<figcaption>true: {escape(base['true'][k])}</figcaption>"
        f"<table>{''.join(rows)}</table></figure>"
    )


def _attributes(
    logits: npt.NDArray[Any], label: npt.NDArray[Any], names: Sequence[str]
) -> tuple[list[str], list[str], npt.NDArray[np.float64]]:
    """Return true and predicted attributes as text, and the mean confidence in them."""
    chance = expit(logits.astype(np.float64))

    def said(row: npt.NDArray[Any]) -> str:
        return ", ".join(name for name, yes in zip(names, row, strict=True) if yes) or "none"

    true = [said(row > 0.5) for row in label]
    predicted = [said(row > 0.5) for row in chance]
    return true, predicted, np.maximum(chance, 1 - chance).mean(axis=1)


def _spread(count: int) -> list[int]:
    """Return up to 24 indices spread evenly over `count` examples."""
    return [round(i) for i in np.linspace(0, count - 1, min(SHOWN, count)).tolist()]


def _rank(run: RunResult) -> tuple[int, str]:
    return (FIRST.index(run.method) if run.method in FIRST else len(FIRST), run.id)


def _names(runs: Sequence[RunResult]) -> list[str]:
    """Return a short name for each run: its method, and its seed where a method occurs twice."""
    short = [run.method.rpartition("/")[2] for run in runs]
    return [
        f"{name} s{run.seeds.unlearn}" if short.count(name) > 1 else name
        for name, run in zip(short, runs, strict=True)
    ]
