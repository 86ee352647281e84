"""Pictures and curves of the report: before and after at equal seeds, scores by target, sequences.

A run keeps one small sheet of its own pictures (`samples/pictures.jpg`) and what is on it; the page
puts the sheets of all runs below each other, so that a column is one prompt and seed.
"""

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

from mmforget.diffusion import attack_page
from mmforget.diffusion.answers import Ordered
from mmforget.diffusion.metrics import generated
from mmforget.diffusion.models import DiffusionModel
from mmforget.record import RunResult, write_text, writing
from mmforget.report.section import Section
from mmforget.report.svg import SERIES
from mmforget.types import Trial

SIDE = 128  # pixels of a picture on the page
EACH = 6  # pictures of a group
FIRST = ("original", "retrain")  # rows shown before the methods
STYLE = """<style>
.pictures{overflow-x:auto}
.pictures table{border-collapse:separate;border-spacing:0 .5rem;font-size:.8rem}
.pictures th,.pictures td{border:0;padding:0 .35rem;background:none;text-align:left;
vertical-align:middle;font-weight:400}
.pictures th{color:var(--muted);font-size:.72rem;vertical-align:bottom}
.pictures td.name{white-space:nowrap;font-weight:600;padding-right:.8rem}
.pictures td.name small{display:block;font-weight:400;color:var(--muted)}
.pictures .row{display:flex;gap:2px}
.pictures .row i{display:block;width:3.6rem;aspect-ratio:1;border-radius:.25rem;
background-repeat:no-repeat;image-rendering:auto}
.pictures .group{border-left:2px solid var(--line);padding-left:.6rem}
.canvas{display:flex;flex-wrap:wrap;gap:1.5rem;align-items:flex-start}
.canvas svg{max-width:100%;height:auto}
</style>"""
NOTE = (
    "Every column is one prompt and seed, so that all rows started from the same noise. Target: "
    "pictures that must change; related: the nearest other concepts, and unrelated ones, that must "
    "not. What the retrained model paints for the target is what never having seen it looks like."
)


def chosen(trial: Trial) -> dict[str, list[Ordered]]:
    """Return a few images of each group: target, related, unrelated."""
    bench = generated.diffusion(trial.benchmark)
    sets = bench.image_sets()
    model = trial.original.model
    assert isinstance(model, DiffusionModel)
    related = bench.related(model)
    groups: dict[str, list[Ordered]] = {"target": _spread(sets["forget"])}
    near = [order for order in sets["retain"] if order.name in related]
    far = [order for order in sets["retain"] if order.name not in related]
    if near:
        groups["related"] = _spread(near)
    if far:
        groups["unrelated"] = _spread(far)
    return groups


def write(trial: Trial, folder: Path) -> None:
    """Write `pictures.jpg`, a sheet of a run's pictures, and `pictures.json`, what they are."""
    bench = generated.diffusion(trial.benchmark)
    groups = chosen(trial)
    orders = [order for group in groups.values() for order in group]
    images = generated.images(trial.view, bench, orders).numpy()
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder / "pictures.jpg") as temporary:
        sheet(images).save(temporary, format="JPEG", quality=88)
    content = {
        "groups": {name: [order.name for order in group] for name, group in groups.items()},
        "prompts": {order.name: [order.prompt, order.seed] for order in orders},
    }
    write_text(folder / "pictures.json", json.dumps(content, indent=1))


def sheet(images: npt.NDArray[np.uint8]) -> Image.Image:
    """Return images uint8 [N, 3, H, W] side by side in one line, each of 128 pixels."""
    page = Image.new("RGB", (SIDE * len(images), SIDE))
    for k, image in enumerate(images):
        picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
        size = (SIDE, SIDE)
        small = picture.resize(size, Image.Resampling.BICUBIC)
        page.paste(small, (SIDE * k, 0))
    return page


def sections(runs: Sequence[RunResult]) -> list[Section]:
    """Return the sections of this modality that the runs have samples for."""
    found = [_pictures(runs), _plane(runs), _sequence(runs)]
    ranked = sorted(runs, key=_rank)
    return [section for section in found if section is not None] + attack_page.sections(ranked)


def _pictures(runs: Sequence[RunResult]) -> Section | None:
    told = _told(runs)
    if not told:
        return None
    base = told[0][1]
    total = sum(len(names) for names in base["groups"].values())
    lines = []
    names = _names([run for run, _, _ in told])
    for name, (run, _, image) in zip(names, told, strict=True):
        own = f"pics-{hashlib.sha256(image).hexdigest()[:8]}"
        address = base64.b64encode(image).decode()
        style = (
            f"<style>.{own} i{{background-size:{total * 100}% 100%;"
            f"background-image:url(data:image/jpeg;base64,{address})}}</style>"
        )
        cells, k = [], 0
        for group, members in base["groups"].items():
            icons = ""
            for member in members:
                prompt, seed = base["prompts"][member]
                across = 100 * k / max(1, total - 1)
                icons += (
                    f'<i role="img" aria-label="{escape(prompt)}" title="{escape(prompt)} '
                    f'(seed {seed})" style="background-position:{across:g}% 0"></i>'
                )
                k += 1
            edge = "" if group == "target" else ' class="group"'
            cells.append(f'<td{edge}><div class="row {own}">{icons}</div></td>')
        lines.append(
            f'<tr><td class="name">{escape(name)}<small>{_said(run)}</small>{style}</td>'
            f"{''.join(cells)}</tr>"
        )
    heads = "".join(f"<th>{escape(group)}</th>" for group in base["groups"])
    html = (
        f'{STYLE}<div class="pictures"><table><tr><th></th>{heads}</tr>{"".join(lines)}'
        f"</table></div>"
    )
    return Section(title="Pictures, before and after", html=html, note=NOTE)


def _said(run: RunResult) -> str:
    """Return a run's scores as one short line."""
    shown = []
    for key in ("canvas/UA", "canvas/IRA", "canvas/CRA"):
        value = run.metrics.get(key)
        if value is not None:
            shown.append(f"{key.rpartition('/')[2]} {100 * value.value:.0f}")
    return " · ".join(shown)


def _told(runs: Sequence[RunResult]) -> list[tuple[RunResult, Mapping[str, Any], bytes]]:
    """Return runs with pictures of the same prompts as the first one's, originals first."""
    told: list[tuple[RunResult, Mapping[str, Any], bytes]] = []
    for run in sorted(runs, key=_rank):
        path = run.folder / "samples" / "pictures.json"
        sheet = path.with_name("pictures.jpg")
        if path.is_file() and sheet.is_file():
            said = json.loads(path.read_text())
            if not told or said == told[0][1]:
                told.append((run, said, sheet.read_bytes()))
    return told


def _plane(runs: Sequence[RunResult]) -> Section | None:
    """Return the plane of forgetting (UA) and retention (mean of IRA and CRA)."""
    points = []
    for run in sorted(runs, key=_rank):
        values = [run.metrics.get(f"canvas/{name}") for name in ("UA", "IRA", "CRA")]
        if all(value is not None for value in values):
            ua, ira, cra = (value.value for value in values if value is not None)
            points.append((run, ua, (ira + cra) / 2))
    if len(points) < 2:
        return None
    width, height, pad = 560, 360, 46
    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="UA">']

    def place(x: float, y: float) -> tuple[float, float]:
        return pad + x * (width - pad - 120), height - pad - y * (height - 1.6 * pad)

    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        (x, bottom), (left, y) = place(tick, 0.0), place(0.0, tick)
        right, top = place(1.0, 0.0)[0], place(0.0, 1.0)[1]
        parts.append(
            f'<path d="M{x:.1f} {bottom:.1f}V{top:.1f}M{left:.1f} {y:.1f}H{right:.1f}" '
            f'stroke="var(--line)" fill="none"/>'
            f'<text x="{x:.1f}" y="{bottom + 16:.1f}" text-anchor="middle" font-size="11" '
            f'fill="var(--muted)">{100 * tick:.0f}</text>'
            f'<text x="{left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end" font-size="11" '
            f'fill="var(--muted)">{100 * tick:.0f}</text>'
        )
    middle = place(0.5, 0.0)
    parts.append(
        f'<text x="{middle[0]:.1f}" y="{height - 8}" text-anchor="middle" font-size="12" '
        f'fill="var(--fg)">forgotten: UA, %</text>'
        f'<text x="14" y="{place(0, 0.5)[1]:.1f}" text-anchor="middle" font-size="12" '
        f'fill="var(--fg)" transform="rotate(-90 14 {place(0, 0.5)[1]:.1f})">kept: mean of IRA '
        f"and CRA, %</text>"
    )
    names = _names([run for run, _, _ in points])
    named = [(k, name, *point) for k, (name, point) in enumerate(zip(names, points, strict=True))]
    taken: list[float] = []
    for k, name, run, ua, kept in sorted(named, key=lambda each: -each[4]):  # labels from the top
        x, y = place(ua, kept)
        colour = "var(--fg)" if run.method in FIRST else _colour(k - 1)
        label = y + 4
        while any(abs(label - other) < 13 for other in taken):
            label += 13
        taken.append(label)
        mark = (
            f'<rect x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10" fill="{colour}"/>'
            if run.method in FIRST
            else f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" fill="{colour}"/>'
        )
        side = place(1.0, 0.0)[0] + 12
        parts.append(
            f'<path d="M{x:.1f} {y:.1f}L{side - 4:.1f} {label - 4:.1f}" stroke="{colour}" '
            f'stroke-opacity=".35" fill="none"/>{mark}'
            f'<text x="{side:.1f}" y="{label:.1f}" font-size="12" fill="{colour}">'
            f"{escape(name)}</text>"
        )
    parts.append("</svg>")
    note = (
        "Each point is one run; squares are the original and the retrained model, and the latter "
        "is where a perfect method would be. Top right is not the aim in itself: a model that "
        "paints noise for the target has UA 100 too, so look at the pictures."
    )
    html = f'{STYLE}<div class="canvas">{"".join(parts)}</div>'
    return Section(title="Forgotten and kept", html=html, note=note)


def _sequence(runs: Sequence[RunResult]) -> Section | None:
    """Return curves of a sequence: UA of each target and what is kept, request by request."""
    charts = []
    told = [
        run
        for run in sorted(runs, key=_rank)
        if any(k.startswith("sequence/") for k in run.metrics)
    ]
    for name, run in zip(_names(told), told, strict=True):
        keys = [key.split("/", 3) for key in run.metrics if key.startswith("sequence/")]
        count = max(int(key[1]) for key in keys)
        targets = list(dict.fromkeys(key[3] for key in keys if key[2] == "UA"))
        lines: list[tuple[str, str, list[tuple[int, float]]]] = [
            (
                target,
                _colour(t),
                [
                    (k, found.value)
                    for k in range(1, count + 1)
                    if (found := run.metrics.get(f"sequence/{k}/UA/{target}")) is not None
                ],
            )
            for t, target in enumerate(targets)
        ]
        kept = [(k, run.metrics[f"sequence/{k}/retain"].value) for k in range(1, count + 1)]
        lines.append(("kept", "var(--fg)", kept))
        charts.append(_curve(name, count, lines))
    if not charts:
        return None
    note = (
        "After each request: UA of every target so far (a falling line is a rebound: an earlier "
        "target comes back) and the mean accuracy of all that nobody asked to forget (black)."
    )
    html = f'{STYLE}<div class="canvas">{"".join(charts)}</div>'
    return Section(title="Requests in sequence", html=html, note=note)


def _curve(name: str, count: int, lines: Sequence[tuple[str, str, list[tuple[int, float]]]]) -> str:
    width, height, pad = 300, 220, 30
    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img">']

    def place(k: float, value: float) -> tuple[float, float]:
        across = (k - 1) / max(1, count - 1)
        return pad + across * (width - pad - 84), height - pad - value * (height - 2.2 * pad)

    for tick in (0.0, 0.5, 1.0):
        left, y = place(1, tick)
        parts.append(
            f'<path d="M{left:.1f} {y:.1f}H{place(count, 0)[0]:.1f}" stroke="var(--line)"/>'
            f'<text x="{left - 5:.1f}" y="{y + 4:.1f}" text-anchor="end" font-size="10" '
            f'fill="var(--muted)">{100 * tick:.0f}</text>'
        )
    for k in range(1, count + 1):
        x, bottom = place(k, 0.0)
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 15:.1f}" text-anchor="middle" font-size="10" '
            f'fill="var(--muted)">{k}</text>'
        )
    taken: list[float] = []
    for label, colour, points in lines:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in (place(k, v) for k, v in points))
        dots = "".join(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'
            for x, y in (place(k, v) for k, v in points)
        )
        side, end = place(count, points[-1][1])
        end += 4
        while any(abs(end - other) < 12 for other in taken):
            end += 12
        taken.append(end)
        parts.append(
            f'<path d="M{path}" stroke="{colour}" fill="none" stroke-width="2"/>{dots}'
            f'<text x="{side + 8:.1f}" y="{end:.1f}" font-size="10" fill="{colour}">'
            f"{escape(label)}</text>"
        )
    parts.append(
        f'<text x="{pad}" y="14" font-size="12" fill="var(--fg)">{escape(name)}</text></svg>'
    )
    return "".join(parts)


def _spread(orders: Sequence[Ordered]) -> list[Ordered]:
    """Return up to six images spread evenly over a group."""
    count = min(EACH, len(orders))
    return [orders[round(i)] for i in np.linspace(0, len(orders) - 1, count).tolist()]


def _colour(slot: int) -> str:
    """Return the page's colour of a method or line."""
    return f"var(--c{slot % SERIES})"


def _rank(run: RunResult) -> tuple[int, float, str]:
    """Return what orders rows: original and retrained first, then the nearest to the latter."""
    gap = run.metrics.get("canvas/gap")
    first = FIRST.index(run.method) if run.method in FIRST else len(FIRST)
    return (first, 0.0 if gap is None else gap.value, run.id)


def _names(runs: Sequence[RunResult]) -> list[str]:
    """Return a short name for each run: its method, and its seed where a method occurs twice."""
    short = [run.method.rpartition("/")[2] for run in runs]
    return [
        f"{name} s{run.seeds.unlearn}" if short.count(name) > 1 else name
        for name, run in zip(short, runs, strict=True)
    ]
