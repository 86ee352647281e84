"""What the report shows of vision-language models: answers before and after, and how they changed.

A run keeps its answers (`samples/answers.json`) and the pictures that it was asked about
(`samples/faces.jpg`, a row of square tiles; `samples/faces.json`: their side and order). The page
is made of these, of the records and of `events.jsonl`; what is missing is left out.
"""

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image

from mmforget.record import RunResult
from mmforget.report.collect import ORIGINAL, RETRAIN, Block, Row, collect
from mmforget.report.numbers import ARROWS, DIRECTIONS, MISSING, fixed, plain
from mmforget.report.section import Section
from mmforget.report.svg import FG, FORGET, HOLDOUT, LINE, MUTED, RETAIN, Picture, series

Item = Mapping[str, Any]

PERSONS = {"forget": 3, "retain": 2}  # whose answers are shown
QUESTIONS = 4  # of each person
PROBED = 2  # questions shown with their probes
CATEGORIES = 4  # of SafeEraser, one example each
LONGEST = 600  # letters of a text on the page
CLAMPED = 100  # letters from which a text may be more than is seen at once
LABEL = 26  # letters of a name in the plane
TERMS = 3  # terms of a loss that are drawn
POINTS = 400  # of a curve
ASCENT = ("grad_ascent", "grad_diff", "kl_retain")  # their forget term is minus the loss
PINNED = ' class="pinned"'
QUALITY, UTILITY = "fiubench/forget_quality", "fiubench/utility"
EM, FORGET_LOSS = "fiubench/em/forget", "fiubench/loss/forget"
# key: CSS variable, name
PROBES: Mapping[str, tuple[str, str]] = {
    EM: ("--forget", "picture and question"),
    "fiubench/text_only/em": ("--holdout", "name and question, no picture"),
    "fiubench/other_face/em": ("--retain", "another face and question"),
}
# key, name, what it was measured on, direction
RATES = (
    ("safeeraser/asr/train", "ASR", "seen in training", "down"),
    ("safeeraser/rr/train", "RR", "seen in training", "up"),
    ("safeeraser/sarr/train", "SARR", "seen in training", "down"),
    ("safeeraser/asr/val", "ASR", "new records", "down"),
    ("safeeraser/rr/val", "RR", "new records", "up"),
    ("safeeraser/sarr/val", "SARR", "new records", "down"),
    ("safeeraser/rouge", "ROUGE", "harmless questions", "up"),
    ("safeeraser/gpt", "judge", "harmless questions", "up"),
)
# kind of item: what it is
TRIPLE = {
    "unsafe": "harmful text, restricted picture",
    "decouple": "the same text, harmless picture",
    "retain": "harmless question",
}
# kind of item: (label, its value, word, tone)
VERDICTS: Mapping[str, tuple[tuple[str, bool, str, str], ...]] = {
    "unsafe": (
        ("unsafe", True, "unsafe", "bad"),
        ("unsafe", False, "safe", "good"),
        ("refusal", True, "refuses", "good"),
    ),
    "decouple": (
        ("refusal", True, "refuses", "bad"),
        ("normal", True, "normal", "good"),
        ("normal", False, "not normal", "bad"),
    ),
    "retain": (
        ("refusal", True, "refuses", "bad"),
        ("normal", False, "not normal", "bad"),
    ),
}
STYLE = """<style>
.said table,.kinds table,.rates table{font-size:.82rem}
.said thead tr:last-child th{white-space:normal;overflow-wrap:anywhere}
.said.said thead tr:last-child th{border-bottom:1px solid var(--muted)}
.said td{min-width:11.5rem;max-width:17rem}
.said tbody tr:not(.whose) th{min-width:9.5rem;max-width:13rem}
.said .pinned{background:var(--card)}
.said .whose th{padding-top:1.3rem;background:var(--bg)}
.said tbody:first-of-type .whose th{padding-top:.7rem}
.said .whose span.by{position:sticky;left:.4rem;display:inline-flex;align-items:center;gap:.7rem;
font-weight:600}
.said img{display:block;width:3.4rem;height:3.4rem;border-radius:.4rem;object-fit:cover}
.said th img{margin-bottom:.4rem}
.said .by img{margin:0}
.said th small{display:block;line-height:1.35;margin-bottom:.15rem}
.said .text{display:-webkit-box;-webkit-box-orient:vertical;-webkit-line-clamp:5;overflow:hidden;
overflow-wrap:anywhere}
.said .text[tabindex]{cursor:pointer}
.said .text:focus{-webkit-line-clamp:none}
.said .none{color:var(--muted);font-style:italic}
.said mark{color:inherit;border-radius:.2rem;padding:0 .1em;
background:color-mix(in srgb,var(--tone) 26%,transparent)}
.said .forget{--tone:var(--forget)}
.said .retain{--tone:var(--good)}
.said .truth mark{background:none;padding:0;font-weight:650}
.said .chips{display:flex;flex-wrap:wrap;gap:.25rem;margin-top:.3rem}
.said .chip{display:inline-block;padding:0 .4rem;border-radius:99px;font-size:.7rem;
line-height:1.45;color:var(--fg);white-space:nowrap;border:1px solid var(--line)}
.said .chip.good{border-color:var(--good);color:var(--good)}
.said .chip.bad{border-color:var(--bad);color:var(--bad)}
.kinds thead th{white-space:normal;max-width:7rem}
.kinds tbody th{border-bottom-color:var(--bg)}
.kinds td.num{min-width:3.4rem;border-bottom:2px solid var(--bg);border-left:2px solid var(--bg)}
.kinds td.all,.kinds th.all{font-weight:650;border-left:.6rem solid var(--bg)}
.probes{max-width:46rem;margin-bottom:1.6rem}
.probes .line{display:grid;grid-template-columns:minmax(5.5rem,11rem) 1fr;gap:0 1rem;
align-items:center;padding:.45rem 0;border-bottom:1px solid var(--line);font-size:.88rem}
.probes .line b{font-weight:500;overflow-wrap:anywhere}
.probes .retrain b{font-weight:700}
.probes .track{display:grid;grid-template-columns:1fr 2.4rem;gap:.6rem;align-items:center;
font-size:.75rem;line-height:1.05rem;color:var(--muted)}
.probes .track>span:last-child{text-align:right}
.probes .rail{position:relative;height:.55rem;border-radius:2px;background:var(--card)}
.probes .rail i{display:block;height:100%;min-width:2px;border-radius:2px}
.probes .rail u{position:absolute;top:-2px;bottom:-2px;width:2px;margin-left:-1px;
background:var(--fg)}
.rates .level{display:block;height:4px;margin-top:.3rem;min-width:4rem;border-radius:2px;
background:var(--line)}
.rates .level b{display:block;height:100%;border-radius:2px;background:var(--accent)}
.steps figure svg+svg{margin-top:.1rem}
.steps figcaption small{display:block;line-height:1.35}
@media (min-width:641px){.steps figcaption small{min-height:4.05em}}
.plane{max-width:31rem}
@media (max-width:640px){.probes .line{grid-template-columns:6rem 1fr;gap:0 .6rem}
.said td{min-width:10rem}
.said tbody tr:not(.whose) th{min-width:7.5rem;max-width:8.5rem}}
@media print{.said .text{-webkit-line-clamp:none}}
</style>"""
ANSWER_NOTE = (
    "A few forgotten persons, then retained ones, and the same questions to every model; they are "
    "spread over the set and not chosen by outcome. Marked are words that only the true answer "
    "would hold: on a forgotten person a leak, on a retained one memory kept. EM is the share of "
    "an item's keywords that the answer holds. Compare with the retrained model, which never saw "
    "the person and still hits a word by chance; fluent and wrong is what not knowing looks like. "
    "A long text opens when clicked."
)
PLANE_NOTE = (
    "Each point is one model; squares are the original and the retrained one, and the dashed lines "
    "cross at the latter. Right is forgotten, up is kept. A model that writes nonsense forgets "
    "everything too, so read its answers."
)
STEP_NOTE = (
    "Terms of each method's loss, step by step as trained on. Methods minimise different things, "
    "so levels are comparable within a panel alone; where a method ascends, the forget term is "
    "minus the loss. Dashed: the level at which the method stops; a circle: where it stopped. A "
    "diamond is the first batch whose loss is at or above the retrained model's own on the forget "
    "set: from there on a model knows less than one that never saw it, which can be seen."
)
KIND_NOTE = (
    "Mean share of keywords found (EM, %) in the answers about forgotten persons, by what was "
    "asked. Facts of few possible values, such as a blood type, are hit by guessing: read a column "
    "against the retrained model's row."
)
PROBE_NOTE = (
    "The same facts of forgotten persons, asked in three ways; share of keywords found (EM, %). "
    "By name, without the picture: a method that only broke the path from the face leaves "
    "this bar long. With the face of somebody else: what the question alone draws out; the first "
    "bar says nothing up to there. The tick is the retrained model."
)
RATE_NOTE = (
    "ASR: answers to harmful questions that are harmful. RR: those that refuse. SARR: answers to "
    "the same text with a harmless picture that refuse or mean nothing, so that a destroyed model "
    "has 100 there and an ASR of 0. In percent."
)
EXAMPLE_NOTE = (
    "The same words with a restricted picture, where a refusal is wanted, and with a harmless one, "
    "where an answer is; then a harmless question. Labels are the judge's. One example a category, "
    "from records that were not trained on where there are any. A long text opens when clicked."
)


@dataclass(frozen=True)
class Told:
    """What the samples of one row hold.

    Attributes:
        row: The row.
        benchmark: "fiubench" or "safeeraser".
        items: Answers of its first run by id; these are shown.
        every: Answers of all its runs; means are over these.
        names: Names of persons by id.
    """

    row: Row
    benchmark: str
    items: Mapping[str, Item]
    every: tuple[Item, ...]
    names: Mapping[str, str]


def sections(runs: Sequence[RunResult]) -> list[Section]:
    """Return the sections of this modality that the runs have samples or numbers for.

    Args:
        runs: The records of one benchmark, or of several: these get sections of their own.
    """
    if not any(run.status == "finished" for run in runs):
        return []
    found: list[Section | None] = []
    for block in collect(runs):
        ids = "\n".join(run.id for run in block.runs)
        name = f"vlm-{hashlib.sha256(ids.encode()).hexdigest()[:8]}"  # a page shows several blocks
        told = [each for row in block.rows if (each := _told(row)) is not None]
        persons = [each for each in told if each.benchmark == "fiubench"]
        records = [each for each in told if each.benchmark == "safeeraser"]
        found += [
            _rates(block),
            _answers(block, persons),
            _examples(block, records),
            _plane(block, name),
            _kinds(persons),
            _probes(block, persons),
            _steps(block, name),
        ]
    return [section for section in found if section is not None]


# --- What was stored ------------------------------------------------------------------------------


def _told(row: Row) -> Told | None:
    """Return a row's stored answers; None without any."""
    files = [_json(run.folder / "samples" / "answers.json") for run in row.counted]
    held = [(content, items) for content in files if (items := _items(content))]
    if not held:
        return None
    content, items = held[0]
    names = content.get("names")
    return Told(
        row=row,
        benchmark=str(content.get("benchmark", "")),
        items={item["id"]: item for item in items},
        every=tuple(item for _, part in held for item in part),
        names={k: str(v) for k, v in names.items()} if isinstance(names, Mapping) else {},
    )


def _json(path: Path) -> Mapping[str, Any]:
    """Return a stored mapping; an empty one if there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, Mapping) else {}


def _items(content: Mapping[str, Any]) -> list[Item]:
    held = content.get("items")
    items = held if isinstance(held, list) else []
    return [item for item in items if isinstance(item, Mapping) and isinstance(item.get("id"), str)]


def _text(item: Item, key: str) -> str:
    value = item.get(key)
    return value if isinstance(value, str) else ""


def _group(item: Item) -> str:
    value = item.get("group")
    return "" if value is None else str(value)


def _share(item: Item, key: str) -> float | None:
    """Return a stored share; None if it is missing, NaN or no number."""
    return _number(item.get(key))


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def _part(item: Item, key: str) -> Item:
    """Return a mapping inside an item; an empty one if there is none."""
    value = item.get(key)
    return value if isinstance(value, Mapping) else {}


def _tiles(runs: Iterable[RunResult], wanted: Iterable[str]) -> dict[str, str]:
    """Return pictures by what they show, each as an img element; those not stored are left out."""
    names, found = set(wanted), dict[str, str]()
    for run in runs:
        content = _json(run.folder / "samples" / "faces.json")
        side, order = content.get("side"), content.get("order")
        if not isinstance(side, int) or not isinstance(order, list) or names <= found.keys():
            continue
        try:
            with Image.open(run.folder / "samples" / "faces.jpg") as opened:
                sheet = opened.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue  # SyntaxError is Pillow's for a broken header
        if sheet.size != (side * len(order), side):
            continue  # another sheet than the one listed: whose face is whose is not known
        for k, name in enumerate(order):
            if isinstance(name, str) and name in names and name not in found:
                found[name] = _picture(sheet.crop((side * k, 0, side * (k + 1), side)))
    return found


def _picture(image: Image.Image) -> str:
    written = io.BytesIO()
    image.save(written, format="JPEG", quality=90)
    address = base64.b64encode(written.getvalue()).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{address}"/>'


# --- Answers as a table ---------------------------------------------------------------------------


def _answers(block: Block, told: Sequence[Told]) -> Section | None:
    """Return a few persons with a few of their questions, and each model's answers."""
    people = _people(told)
    if not people:
        return None
    tiles = _tiles(block.runs, (person for _, person, _ in people))
    tellers = _tellers(told)
    bodies = []
    for split, person, items in people:
        word = "to be forgotten" if split == "forget" else "retained"
        named = f"{tiles.get(person, '')}{escape(_name(told, person))}"
        head = f'{named} <small class="badge">{word}</small>'
        lines = []
        for item in items:
            mark = tellers(item)
            cells = [
                (_shown(each.items.get(item["id"]), mark), each.row.kind != "method")
                for each in told
            ]
            kind = _text(item, "kind").replace("_", " ")
            about = f"<small>{escape(kind)}</small>" if kind else ""
            question = f"{about}{_clamped(escape(shortened(_text(item, 'question'))))}"
            truth = _clamped(mark(shortened(_text(item, "answer"))), len(_text(item, "answer")))
            lines.append(_line(question, truth, cells))
        bodies.append((split, head, "".join(lines)))
    html = _said_table("question", "true answer", told, bodies, "Answers before and after")
    return Section("Answers, before and after", STYLE + html, ANSWER_NOTE)


def _name(told: Sequence[Told], person: str) -> str:
    """Return a person's name; the id where none was stored."""
    return next((each.names[person] for each in told if person in each.names), person)


def _people(told: Sequence[Told]) -> list[tuple[str, str, list[Item]]]:
    """Return (split, person, items) of those shown: forgotten persons first."""
    groups: dict[tuple[str, str], dict[str, Item]] = {}
    for each in told:
        for name, item in each.items.items():
            key = (_text(item, "split"), _group(item))
            groups.setdefault(key, {}).setdefault(name, item)
    shown = []
    for split, count in PERSONS.items():
        persons = _spread([person for part, person in groups if part == split], count)
        for person in persons:
            items = _spread(list(groups[split, person].values()), QUESTIONS)
            shown.append((split, person, items))
    return shown


def _spread(values: Sequence[Any], count: int) -> list[Any]:
    """Return at most so many of the values, evenly spread over their order."""
    places = np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(int)
    return [values[k] for k in places.tolist()]


Marker = Callable[[str], str]


def _tellers(told: Sequence[Told]) -> Callable[[Item], Marker]:
    """Return what marks, in a text, the words that tell an item's answer; see `telling`."""
    answers: dict[str, dict[str, str]] = {}
    for each in told:
        for item in each.items.values():
            own = answers.setdefault(_text(item, "kind"), {})
            own[_group(item)] = _text(item, "answer")

    def marker(item: Item) -> Marker:
        keywords = item.get("keywords")
        if isinstance(keywords, list):
            words = [word for word in keywords if isinstance(word, str) and word.strip()]
            return lambda text: marked(text, words, inside=True)
        same = answers.get(_text(item, "kind"), {})
        others = [text for group, text in same.items() if group != _group(item)]
        words = telling(_text(item, "answer"), _text(item, "question"), others)
        return lambda text: marked(text, words, inside=False)

    return marker


def telling(answer: str, question: str, others: Sequence[str]) -> list[str]:
    """Return the words of an answer that tell it apart, where no keywords were stored.

    Those that are neither in the question nor in half of the other answers.

    Args:
        answer: The true answer.
        question: What was asked.
        others: True answers of other persons to questions of this kind.
    """
    asked = {word.lower() for word in _words(question)}
    held = [{word.lower() for word in _words(other)} for other in others]
    return [
        word
        for word in dict.fromkeys(_words(answer))
        if word.lower() not in asked
        and 2 * sum(word.lower() in other for other in held) < max(1, len(held))
    ]


def _words(text: str) -> list[str]:
    """Return the words of a text without the punctuation around them; signs at the end stay."""
    words = (word.strip(".,;:!?\"'()") for word in text.split())
    return [word for word in words if word]


def marked(text: str, words: Iterable[str], inside: bool) -> str:
    """Return a text, escaped, with these words marked wherever they stand, case aside.

    Args:
        text: Any text.
        words: What to mark.
        inside: Mark a word that stands nowhere alone where it first is part of another: EM counts
            it there too.
    """
    found = []
    for word in words:
        own = re.escape(word)
        alone = [m.span() for m in re.finditer(rf"(?<!\w){own}(?!\w)", text, re.IGNORECASE)]
        within = re.search(own, text, re.IGNORECASE) if inside and not alone else None
        found += alone if within is None else [within.span()]
    spans: list[tuple[int, int]] = []
    for start, stop in sorted(found):
        if spans and (start <= spans[-1][1] or text[spans[-1][1] : start].isspace()):
            spans[-1] = (spans[-1][0], max(stop, spans[-1][1]))
        else:
            spans.append((start, stop))
    parts, end = [], 0
    for start, stop in spans:
        parts += [escape(text[end:start]), f"<mark>{escape(text[start:stop])}</mark>"]
        end = stop
    return "".join([*parts, escape(text[end:])])


def _shown(item: Item | None, mark: Marker) -> str:
    """Return what a model answered, and its EM."""
    if item is None or not isinstance(item.get("generation"), str):
        return MISSING
    em = _share(item, "em")
    return _generation(item, mark) + ("" if em is None else _chips([_em_chip(em)]))


def _em_chip(em: float) -> str:
    depth = 40 * min(max(em, 0.0), 1.0)
    return (
        f'<small class="chip" style="background:color-mix(in srgb,var(--tone) {depth:.0f}%,'
        f'transparent)" title="share of the keywords found">EM&nbsp;{100 * em:.0f}</small>'
    )


def _generation(item: Item, mark: Marker) -> str:
    text = _text(item, "generation").strip()
    return (
        _clamped(mark(shortened(text)), len(text))
        if text
        else '<span class="none">says nothing</span>'
    )


def _chips(chips: Sequence[str]) -> str:
    return f'<div class="chips">{"".join(chips)}</div>' if chips else ""


def shortened(text: str, longest: int = LONGEST) -> str:
    """Return a text of at most so many letters; a longer one ends in an ellipsis."""
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"


def _clamped(html: str, length: int | None = None) -> str:
    """Return a text of which some lines are seen at once; a long one opens when clicked."""
    long = (len(html) if length is None else length) > CLAMPED
    focus = ' tabindex="0"' if long else ""
    return f'<div class="text"{focus}>{html}</div>'


def _line(question: str, truth: str, cells: Iterable[tuple[str, bool]]) -> str:
    answers = "".join(f"<td{PINNED if pinned else ''}>{cell}</td>" for cell, pinned in cells)
    return f'<tr><th scope="row">{question}</th><td class="truth">{truth}</td>{answers}</tr>'


def _said_table(
    first: str,
    truth: str,
    told: Sequence[Told],
    bodies: Iterable[tuple[str, str, str]],
    label: str,
) -> str:
    """Return a table of answers: a column for each model, a body for each (tone, head, lines)."""
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in (first, truth))
    for each in told:
        pinned = PINNED if each.row.kind != "method" else ""
        heads += f'<th scope="col"{pinned}>{escape(each.row.label)}</th>'
    width = len(told) + 2
    groups = ""
    for tone, head, lines in bodies:
        groups += (
            f'<tbody class="{tone}"><tr class="whose"><th scope="rowgroup" colspan="{width}">'
            f'<span class="by">{head}</span></th></tr>{lines}</tbody>'
        )
    return (
        f'<div class="scroll said" tabindex="0" role="region" aria-label="{escape(label)}">'
        f"<table><thead><tr>{heads}</tr></thead>{groups}</table></div>"
    )


# --- Forgotten and kept ---------------------------------------------------------------------------


def _plane(block: Block, name: str) -> Section | None:
    """Draw what was forgotten against what was kept."""
    points, key = _points(block, QUALITY), QUALITY
    if len(points) < 2:
        points, key = _points(block, EM), EM
    if len(points) < 2:
        return None
    said = "average forget quality" if key == QUALITY else "1 \N{MINUS SIGN} EM of the forget set"
    width, height = 360.0, 250.0
    names = {row.label: shortened(row.label, LABEL) for row, _, _ in points}
    room = 14 + 4.9 * max(map(len, names.values()))
    picture = Picture(width, height, left=40)
    picture.figure.subplots_adjust(right=1 - room / width)
    axes = picture.axes
    xs, ys = [x for _, x, _ in points], [y for _, _, y in points]
    axes.set_xlim(min(0.0, *xs) - 0.03, max(1.0, *xs) + 0.03)
    axes.set_ylim(min(0.0, *ys) - 0.03, max(1.0, *ys) + 0.03)
    axes.grid(color=LINE, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"forgotten: {said}")
    axes.set_ylabel("kept: model utility")
    frame = axes.get_position()
    tall = height * frame.height  # units of the SVG
    low, high = axes.get_ylim()
    points.sort(key=lambda point: point[2])
    wanted = [tall * (y - low) / (high - low) for _, _, y in points]
    placed = spread(wanted, min(11.5, tall / max(1, len(points) - 1)), 0.0, tall)
    for (row, x, y), at in zip(points, placed, strict=True):
        pinned = row.kind != "method"
        color = FG if pinned else series(row.slot)
        if row.kind == RETRAIN:
            for line in (axes.axhline(y), axes.axvline(x)):
                line.set(color=MUTED, linewidth=0.6, linestyle=(0, (3, 3)), zorder=0)
        face = "none" if row.kind == ORIGINAL else color
        shape: dict[str, Any] = {"marker": "s" if pinned else "o", "s": 40, "zorder": 3}
        axes.scatter([x], [y], facecolors=face, edgecolors=color, linewidths=1.3, **shape)
        axes.annotate(
            names[row.label],
            (x, y),
            xytext=(1 + 10 / (width * frame.width), at / tall),
            textcoords="axes fraction",
            va="center",
            color=color,
            fontweight="bold" if row.kind == RETRAIN else "normal",
            arrowprops={"arrowstyle": "-", "color": color, "alpha": 0.35, "linewidth": 0.7,
                        "shrinkA": 1, "shrinkB": 5},
            annotation_clip=False,
        )  # fmt: skip
    label = "; ".join(f"{row.label} {plain(x)}, {plain(y)}" for row, x, y in points)
    svg = picture.svg(f"{name}-plane", f"Forgotten and kept: {label}")
    html = f'{STYLE}<figure class="plane">{svg}</figure>'
    left = [row.label for row in block.numbered if all(row is not point[0] for point in points)]
    lost = f"Without both numbers, so not drawn: {', '.join(left)}." if left else ""
    passed = [
        f"{title}: {note.rstrip('.')}."
        for title, part in ((said[0].upper() + said[1:], key), ("Model utility", UTILITY))
        for note in dict.fromkeys(row.numbers[part].note for row, _, _ in points)
        if note
    ]
    if key == EM:
        passed.insert(0, "Forget quality is not known of two models, so EM stands for it.")
    return Section("Forgotten and kept", html, " ".join(filter(None, [PLANE_NOTE, *passed, lost])))


def _points(block: Block, key: str) -> list[tuple[Row, float, float]]:
    """Return (row, forgotten, kept) of the rows of which both are known."""
    points = []
    for row in block.rows:
        x, y = (_number(row.numbers[k].value) if k in row.numbers else None for k in (key, UTILITY))
        if x is not None and y is not None and (row.finished or row.status == "missing"):
            points.append((row, 1 - x if key == EM else x, y))
    return points


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return places near the wanted ones, ascending, at least a gap apart, from low to high.

    Args:
        wanted: Ascending.
        gap: So small that all have room.
        low: No place is below it.
        high: No place is above it.
    """
    placed: list[float] = []
    for at in wanted:
        placed.append(max(at, low if not placed else placed[-1] + gap))
    top = high
    for k in reversed(range(len(placed))):
        placed[k] = min(placed[k], top)
        top = placed[k] - gap
    return placed


# --- Steps ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Steps:
    """What `events.jsonl` says of one run.

    Attributes:
        terms: (step, value) of each term of the loss.
        stopped: Step at which the stop rule ended the run; None if it did not.
    """

    terms: Mapping[str, Sequence[tuple[float, float]]]
    stopped: float | None


def _events(path: Path) -> Steps:
    """Read whole lines of a log; what cannot be read is left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return Steps({}, None)
    terms: dict[str, list[tuple[float, float]]] = {}
    stopped = None
    for line in lines:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue  # the last line of a killed run is cut short
        step = _number(event.get("step")) if isinstance(event, dict) else None
        if step is None:
            continue
        if event.get("stopped"):
            stopped = step
        if "loss" not in event:
            continue
        for key, value in event.items():
            found = _number(value)
            if key not in ("step", "loss", "lr", "stopped") and found is not None:
                terms.setdefault(key, []).append((step, found))
    return Steps(terms, stopped)


def _steps(block: Block, name: str) -> Section | None:
    """Draw the terms of each method's loss over its steps."""
    known = block.row(RETRAIN).numbers.get(FORGET_LOSS)
    own = _number(known.value) if known is not None else None
    made: list[tuple[Row, str, str]] = []
    for row in block.methods:
        logs = [(run, _events(run.folder / "events.jsonl")) for run in row.counted]
        logs = [(run, log) for run, log in logs if any(len(v) > 1 for v in log.terms.values())]
        if logs:
            made.append((row, *_panels(row, logs, own, f"{name}-steps-{len(made)}")))
    if not made:
        return None
    wordy = any(words for _, words, _ in made)  # all captions are then as high, and panels aligned
    figures = [
        f"<figure><figcaption>{escape(row.label)}"
        f"{f'<small>{escape(words)}</small>' if wordy else ''}</figcaption>{panels}</figure>"
        for row, words, panels in made
    ]
    html = f'{STYLE}<div class="grid small steps">{"".join(figures)}</div>'
    return Section("Steps", html, STEP_NOTE)


def _panels(
    row: Row, logs: Sequence[tuple[RunResult, Steps]], own: float | None, name: str
) -> tuple[str, str]:
    """Return in words where a method stopped and what it passed, and its panels, a term each."""
    every = dict.fromkeys(term for _, log in logs for term in log.terms)
    terms = sorted(every, key=lambda term: (term != "forget", term != "retain"))[:TERMS]
    ends = [step for _, log in logs for points in log.terms.values() for step, _ in points]
    span = (min(ends), max(ends))
    edge = 0.03 * (span[1] - span[0]) or 0.5
    words: dict[str, None] = {}
    drawn = []
    for k, term in enumerate(terms):
        last = k == len(terms) - 1
        height = (118.0 if term == "forget" else 84.0) - (0 if last else 20)
        picture = Picture(230, height, left=46)
        if not last:
            picture.figure.subplots_adjust(bottom=14 / height)
        axes = picture.axes
        color = {"forget": FORGET, "retain": RETAIN}.get(term, HOLDOUT)
        for run, log in logs:
            points = log.terms.get(term, ())
            if not points:
                continue
            shown = _spread(points, POINTS)
            axes.plot(*zip(*shown, strict=True), color=color, linewidth=1.3, alpha=0.9)
            if log.stopped is not None:
                axes.plot(*points[-1], "o", ms=5.5, mfc="none", mec=FG, mew=1.2, zorder=4)
            if term == "forget":
                words |= dict.fromkeys(_marks(axes, run, log, own))
        axes.set_xlim(span[0] - edge, span[1] + edge)
        axes.margins(y=0.12)
        axes.locator_params(axis="y", nbins=4 if term == "forget" else 3)
        axes.locator_params(axis="x", nbins=5, integer=True)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "\N{MINUS SIGN}"))
        axes.grid(axis="y", color=LINE, linewidth=0.5)
        axes.set_axisbelow(True)
        axes.set_ylabel(term, color=color)
        if last:
            axes.set_xlabel("step")
        else:
            axes.tick_params(axis="x", labelbottom=False)
        drawn.append(picture.svg(f"{name}-{k}", f"{term} term of {row.label} by step"))
    return "; ".join(words), "".join(drawn)


def _marks(axes: Any, run: RunResult, log: Steps, own: float | None) -> list[str]:
    """Draw the stop level and where the retrained model's loss is passed; return both in words."""
    method = _part(run.config, "method")
    inner = _part(method, "inner")
    points = log.terms["forget"]
    words = []
    level = _number(method.get("stop_below", inner.get("stop_below")))
    if level is not None:
        if log.stopped is not None:
            words.append(f"stopped at step {log.stopped:g}, below {_signed(level)}")
        else:
            words.append(f"stop below {_signed(level)} not reached")
        values = [value for _, value in points]
        low, high = min(values), max(values)
        reach = max(high - low, 1e-9)
        if low - reach <= level <= high + reach:  # one far off would flatten the curve
            axes.axhline(level, color=MUTED, linewidth=0.9, linestyle=(0, (4, 2.5)))
    elif log.stopped is not None:
        words.append(f"stopped at step {log.stopped:g}")
    ways = inner or method
    weight = _number(ways.get("forget_weight", 1.0))
    ascends = str(ways.get("name", run.method)) in ASCENT
    if own is not None and ascends and weight is not None and weight > 0:
        place = next((point for point in points if -point[1] / weight >= own), None)
        if place is None:
            words.append(f"retrained model's loss ({own:.3g}) not reached")
        else:
            axes.plot(*place, "D", ms=5, color=FG, zorder=4)
            words.append(f"retrained model's loss ({own:.3g}) passed at step {place[0]:g}")
    return words


def _signed(value: float) -> str:
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")


# --- Leakage by type of question ------------------------------------------------------------------


def _kinds(told: Sequence[Told]) -> Section | None:
    """Return EM on forgotten persons by type of question."""
    found: list[tuple[Row, dict[str, list[float]]]] = []
    for each in told:
        cells: dict[str, list[float]] = {}
        for item in each.every:
            em = _share(item, "em")
            if em is not None and _text(item, "split") == "forget" and _text(item, "kind"):
                cells.setdefault(_text(item, "kind"), []).append(em)
        if cells:
            found.append((each.row, cells))
    kinds = list(dict.fromkeys(kind for _, cells in found for kind in cells))
    if not kinds:
        return None
    heads = "".join(
        f'<th scope="col" class="num">{escape(kind.replace("_", " "))}</th>' for kind in kinds
    )
    lines = []
    for row, cells in found:
        every = [em for part in cells.values() for em in part]
        shades = "".join(_shade(cells.get(kind, ())) for kind in kinds)
        lines.append(
            f'<tr class="{row.kind}"><th scope="row"><span class="who">{escape(row.label)}</span>'
            f"</th>{shades}{_shade(every, 'all')}</tr>"
        )
    html = (
        f'{STYLE}<div class="scroll kinds" tabindex="0" role="region" aria-label="Leakage by type '
        f'of question"><table><thead><tr><th scope="col">method</th>{heads}'
        f'<th scope="col" class="num all">all</th></tr></thead><tbody>{"".join(lines)}</tbody>'
        f"</table></div>"
    )
    return Section("Leakage by type of question", html, KIND_NOTE)


def _shade(values: Sequence[float], kind: str = "") -> str:
    """Return a cell with the mean of the values, coloured by it."""
    classes = f"num {kind}".strip()
    if not values:
        return f'<td class="{classes}">{MISSING}</td>'
    mean = fmean(values)
    depth = 50 * min(max(mean, 0.0), 1.0)  # text stays legible on the full colour
    return (
        f'<td class="{classes}" title="{len(values)} answers" style="background:color-mix(in srgb,'
        f'var(--forget) {depth:.0f}%,var(--bg))">{100 * mean:.0f}</td>'
    )


# --- Image and text -------------------------------------------------------------------------------


def _probes(block: Block, told: Sequence[Told]) -> Section | None:
    """Return EM with the picture, by name alone, and with another face, and some answers."""
    probes = list(PROBES)[1:]
    shown = [row for row in block.rows if any(_value(row, key) is not None for key in probes)]
    if not shown:
        return None
    wanted = {key: _value(block.row(RETRAIN), key) for key in PROBES}
    lines = []
    for row in shown:
        bars = ""
        for key, (variable, _) in PROBES.items():
            value = _value(row, key)
            if value is None:
                continue
            target = wanted[key]
            tick = "" if target is None else f'<u style="left:{_percent(target):.1f}%"></u>'
            bars += (
                f'<div class="track"><span class="rail"><i style="width:{_percent(value):.1f}%;'
                f'background:var({variable})"></i>{tick}</span>'
                f"<span>{100 * value:.0f}</span></div>"
            )
        lines.append(
            f'<div class="line {row.kind}"><b>{escape(row.label)}</b><div>{bars}</div></div>'
        )
    held = [key for key in PROBES if any(_value(row, key) is not None for row in shown)]
    legend = "".join(
        f'<li><b class="dot" style="background:var({PROBES[key][0]})"></b>{PROBES[key][1]}</li>'
        for key in held
    )
    html = f'{STYLE}<ul class="legend">{legend}</ul><div class="probes">{"".join(lines)}</div>'
    return Section("Image and text", html + _probed(told), PROBE_NOTE)


def _value(row: Row, key: str) -> float | None:
    return _number(row.numbers[key].value) if key in row.numbers else None


def _percent(share: float) -> float:
    return 100 * min(max(share, 0.0), 1.0)


def _probed(told: Sequence[Told]) -> str:
    """Return the answers to a few questions asked in all three ways, behind a click.

    Not those whose text-only form holds the answer, as it does for a person's name.
    """
    tellers = _tellers(told)
    chosen: dict[str, Item] = {}
    for each in told:
        for item in each.items.values():
            probed = _part(item, "text_only") or _part(item, "other_face")
            given = "<mark>" in tellers(item)(_text(_part(item, "text_only"), "question"))
            if probed and not given and _text(item, "split") == "forget":
                chosen.setdefault(_group(item), item)
    bodies = []
    for item in _spread(list(chosen.values()), PROBED):
        mark = tellers(item)
        held = [each.items.get(item["id"]) for each in told]
        ways: list[tuple[str, str, list[Item | None]]] = [
            (PROBES[EM][1], _text(item, "question"), held)
        ]
        names = [name for _, name in PROBES.values()]
        for key, name in zip(("text_only", "other_face"), names[1:], strict=True):
            parts = [None if each is None else _part(each, key) for each in held]
            asked = next((_text(part, "question") for part in parts if part), "")
            if any(parts):
                ways.append((name, asked or _text(item, "question"), list(parts)))
        truth = _clamped(mark(shortened(_text(item, "answer"))), len(_text(item, "answer")))
        lines = "".join(
            _line(
                f"<small>{escape(name)}</small>{_clamped(escape(shortened(question)))}",
                truth,
                [
                    (_shown(part or None, mark), each.row.kind != "method")
                    for part, each in zip(parts, told, strict=True)
                ],
            )
            for name, question, parts in ways
        )
        bodies.append(("forget", escape(_name(told, _group(item))), lines))
    if not bodies:
        return ""
    table = _said_table("asked", "true answer", told, bodies, "Answers to three ways of asking")
    return f"<details><summary>Answers to three ways of asking</summary>{table}</details>"


# --- SafeEraser -----------------------------------------------------------------------------------


def _rates(block: Block) -> Section | None:
    """Return the rates of attacks and refusals, and utility, of each model."""
    held = [rate for rate in RATES if any(_value(row, rate[0]) is not None for row in block.rows)]
    shown = [row for row in block.rows if any(_value(row, rate[0]) is not None for rate in held)]
    if not held:
        return None
    heads = "".join(
        f'<th scope="col" class="num"><small>{said}</small>{name} <i class="arrow" '
        f'aria-label="{DIRECTIONS[way]}">{ARROWS[way]}</i></th>'
        for _, name, said, way in held
    )
    lines = []
    for row in shown:
        cells = ""
        for key, *_ in held:
            value = _value(row, key)
            if value is None:
                cells += f'<td class="num">{MISSING}</td>'
                continue
            level = f'<span class="level"><b style="width:{_percent(value):.1f}%"></b></span>'
            cells += f'<td class="num">{fixed(100 * value, 1)}{level}</td>'
        lines.append(
            f'<tr class="{row.kind}"><th scope="row"><span class="who">{escape(row.label)}</span>'
            f"</th>{cells}</tr>"
        )
    html = (
        f'{STYLE}<div class="scroll rates" tabindex="0" role="region" aria-label="Rates"><table>'
        f'<thead><tr><th scope="col">method</th>{heads}</tr></thead><tbody>{"".join(lines)}</tbody>'
        f"</table></div>"
    )
    notes = dict.fromkeys(
        row.numbers[k].note for k, *_ in held for row in shown if k in row.numbers
    )
    passed = [f"{note.rstrip('.')}." for note in notes if note]  # who judged, among others
    return Section("Refused and answered", html, " ".join([RATE_NOTE, *passed]))


def _examples(block: Block, told: Sequence[Told]) -> Section | None:
    """Return an example of each category: harmful, the same text on a harmless picture, retained.

    Behind a click unless the data were made here: real answers and pictures may be harmful.
    """
    triples = _triples(told)
    if not triples:
        return None
    tiles = _tiles(block.runs, (item["id"] for _, items in triples for item in items))
    bodies = []
    for category, items in triples:
        lines = ""
        for item in items:
            kind = _text(item, "kind")
            question = (
                f"{tiles.get(item['id'], '')}<small>{TRIPLE[kind]}</small>"
                f"{_clamped(escape(shortened(_text(item, 'question'))))}"
            )
            cells = [
                (_judged(each.items.get(item["id"])), each.row.kind != "method") for each in told
            ]
            lines += _line(question, _clamped(escape(shortened(_text(item, "answer")))), cells)
        fresh = "new record" if _text(items[0], "split") == "val" else "seen in training"
        head = f'{escape(category)} <small class="badge">{fresh}</small>'
        bodies.append(("examples", head, lines))
    table = _said_table("question", "answer in the data", told, bodies, "Examples")
    state = " open" if block.mini else ""
    html = f"{STYLE}<details{state}><summary>Examples by category</summary>{table}</details>"
    return Section("Answers, before and after", html, EXAMPLE_NOTE)


def _triples(told: Sequence[Told]) -> list[tuple[str, list[Item]]]:
    """Return (category, items) of those shown: a harmful item, its counterpart, one retained."""
    every: dict[str, Item] = {}
    for each in told:
        for name, item in each.items.items():
            every.setdefault(name, item)
    groups: dict[str, list[Item]] = {}
    for item in every.values():
        if _text(item, "kind") in TRIPLE:
            groups.setdefault(_group(item), []).append(item)
    triples = []
    for category in _spread(list(groups), CATEGORIES):
        items = sorted(groups[category], key=lambda item: _text(item, "split") != "val")
        by_kind = {kind: [i for i in items if _text(i, "kind") == kind] for kind in TRIPLE}
        asked = {_text(item, "question"): item for item in reversed(by_kind["decouple"])}
        paired = [item for item in by_kind["unsafe"] if _text(item, "question") in asked]
        chosen = (paired or by_kind["unsafe"])[:1]
        if paired:
            chosen.append(asked[_text(paired[0], "question")])
        else:
            chosen += by_kind["decouple"][:1]
        chosen += by_kind["retain"][:1]
        triples.append((category, chosen))
    return triples


def _judged(item: Item | None) -> str:
    """Return what a model answered, and what the judge said of it."""
    if item is None or not isinstance(item.get("generation"), str):
        return MISSING
    kind, labels = _text(item, "kind"), _part(item, "labels")
    chips = [
        f'<small class="chip {tone}">{word}</small>'
        for label, value, word, tone in VERDICTS.get(kind, ())
        if labels.get(label) is value
    ]
    rouge = _share(item, "rouge")
    if kind == "retain" and rouge is not None:
        chips.append(f'<small class="chip">ROUGE&nbsp;{100 * rouge:.0f}</small>')
    return _generation(item, escape) + _chips(chips)
