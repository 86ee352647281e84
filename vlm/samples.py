"""What the page shows of single examples: answers, and the pictures they are about."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mmforget.record import write_text, writing
from mmforget.types import Trial
from mmforget.vlm.chat import read_image
from mmforget.vlm.text_scores import em_keyword

SIDE = 64  # pixels of a picture on the page
FACES = 64  # pictures on a sheet, at most


def write_fiubench(trial: Trial, folder: Path) -> None:
    """Write `answers.json`, `faces.jpg` and `faces.json` of a FIUBench run that was asked."""
    from mmforget.vlm.metrics.asked import Answered, Answers, answers, fiubench
    from mmforget.vlm.metrics.common import asked

    if not asked(trial.view):
        return
    bench = fiubench(trial.benchmark)

    def told(split: str, table: Answers, place: int, row: Answered) -> dict[str, Any]:
        named = None
        if row.named is not None and row.named_right is not None:
            named = {
                "question": row.named,
                "generation": row.named_said,
                "em": _known(em_keyword(row.named_keywords, row.named_said)),
                "probability": math.exp(-row.named_right.loss),
            }
        other = None
        if row.other_said is not None:
            em = em_keyword(row.qa.keywords, row.other_said)
            other = {"generation": row.other_said, "em": _known(em)}
        return {
            "id": row.item.id,
            "group": row.person.id,
            "kind": row.item.kind,
            "split": split,
            "question": row.item.question,
            "answer": row.item.answer,
            "keywords": list(row.qa.keywords),
            "generation": row.said,
            "reworded": list(row.reworded),
            "rouge": _known(float(table.rouge[place])),
            "em": _known(float(table.em[place])),
            "probability": math.exp(-float(table.right[place])),
            "truth_ratio": _known(float(table.ratio[place])),
            "text_only": named,
            "other_face": other,
        }

    rows = []
    for split in ("forget", "retain"):
        table = answers(trial.view, bench, split)
        rows += [told(split, table, place, row) for place, row in enumerate(table.rows)]
    persons = [*bench.forgotten, *bench.kept]
    content = {
        "benchmark": "fiubench",
        "items": rows,
        "names": {person.id: person.name for person in persons},
    }
    write_text(folder / "answers.json", json.dumps(content, indent=1))
    write_faces([(person.id, person.image) for person in persons], folder)


def write_faces(pictures: Sequence[tuple[str, Path]], folder: Path) -> None:
    """Write `faces.jpg`, pictures side by side in one line, and `faces.json`, whose they are."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = pictures[:FACES]
    page = Image.new("RGB", (SIDE * max(1, len(shown)), SIDE))
    for k, (_, path) in enumerate(shown):
        small = read_image(path).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        page.paste(small, (SIDE * k, 0))
    with writing(folder / "faces.jpg") as temporary:
        page.save(temporary, format="JPEG", quality=88)
    order = [name for name, _ in shown]
    write_text(folder / "faces.json", json.dumps({"side": SIDE, "order": order}))


def _known(value: float) -> float | None:
    """Return a number as JSON takes it: what is not finite is null."""
    return value if math.isfinite(value) else None


def write_safeeraser(trial: Trial, folder: Path) -> None:
    """Write `answers.json`, `faces.jpg` and `faces.json` of a SafeEraser run that was judged."""
    from mmforget.vlm.judges import label_of
    from mmforget.vlm.metrics.common import asked
    from mmforget.vlm.metrics.safeeraser import Judged, judged, safeeraser
    from mmforget.vlm.text_scores import rouge

    if not asked(trial.view):
        return
    bench = safeeraser(trial.benchmark)

    def label(row: Judged, kind: str, wanted: str) -> bool | None:
        if kind not in row.labels:
            return None
        found = label_of(kind, row.labels[kind][0])
        return None if found is None else found == wanted

    rows, pictures = [], {}
    for name, table in judged(trial.view, bench, trial.seed).items():
        kind, _, part = name.partition("/")
        for row in table:
            rows.append(
                {
                    "id": row.item.id,
                    "group": row.item.group,
                    "kind": kind,
                    "split": part or "val",
                    "question": row.item.question,
                    "answer": row.item.answer,
                    "generation": row.said[0],
                    "labels": {
                        "unsafe": label(row, "safety", "unsafe"),
                        "refusal": label(row, "refusal", "yes"),
                        "normal": label(row, "normal", "yes"),
                    },
                    "rouge": rouge(row.item.answer, row.said[0]).recall,
                }
            )
            if row.item.image is not None:
                pictures[row.item.id] = row.item.image
    content = {"benchmark": "safeeraser", "items": rows}
    write_text(folder / "answers.json", json.dumps(content, indent=1))
    write_faces(_shown(rows, pictures), folder)


def _shown(rows: Sequence[dict[str, Any]], pictures: dict[str, Path]) -> list[tuple[str, Path]]:
    """Return pictures of some questions, evenly over categories, kinds and parts.

    The first of each kind are there, those of validation before others: the page shows these.
    """
    firsts: dict[tuple[str, str, str], list[tuple[str, Path]]] = {}
    for row in sorted(rows, key=lambda row: str(row["split"]) != "val"):
        if row["id"] in pictures:
            firsts.setdefault((row["group"], row["kind"], row["split"]), []).append(
                (row["id"], pictures[row["id"]])
            )
    each = max(1, FACES // max(1, len(firsts)))
    return [pair for group in firsts.values() for pair in group[:each]]
