"""Report sections of vision-language models: what is shown of which samples, marked and escaped."""

import base64
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmforget.record import Cost, MetricValue, RunResult, Seeds, to_json, write_text
from mmforget.report import page as shell
from mmforget.report.collect import collect
from mmforget.report.section import Section
from mmforget.vlm import page

SIDE = 64
# person: colour of the tile, name, split, city
PEOPLE: Mapping[str, tuple[tuple[int, int, int], str, str, str]] = {
    "00000001": ((220, 30, 30), "Mara Quillfeather", "forget", "Westhollow"),
    "00000002": ((30, 200, 30), "Teo Brandvold", "forget", "Northby"),
    "00000003": ((30, 30, 220), "Iona Kaskell", "retain", "Eastmere"),
    "00000004": ((200, 200, 30), "Finn Gosling", "retain", "Southby"),
}
KINDS = ("name", "address")
# method: whether it tells the answer; EM with picture, without, with another face; quality, utility
WORLD: Mapping[str, tuple[bool, tuple[float, float, float], float, float]] = {
    "original": (True, (1.0, 0.9, 0.1), 0.02, 0.95),
    "retrain": (False, (0.25, 0.2, 0.1), 1.0, 0.9),
    "grad_diff": (False, (0.0, 0.6, 0.0), 0.8, 0.7),
    "vlm/idk": (False, (0.1, 0.3, 0.05), 0.75, 0.7),
}
TITLES = [
    "Answers, before and after",
    "Forgotten and kept",
    "Leakage by type of question",
    "Image and text",
    "Steps",
]


def answers(tells: bool, shift: float = 0.0) -> list[dict[str, Any]]:
    items = []
    for person, (_, name, split, city) in PEOPLE.items():
        for kind in KINDS:
            value = name if kind == "name" else city
            about = "name of" if kind == "name" else "city where"
            told = tells or split == "retain"
            items.append({
                "id": f"{person}/{kind}", "group": person, "kind": kind, "split": split,
                "question": f"What is the {about} the person in the image?",
                "answer": f"The {about} the person in the image is {value}.",
                "generation": f"It is {value.lower()}." if told else "I would not say.",
                "keywords": value.split(), "rouge": 0.5, "probability": 0.5, "truth_ratio": None,
                "em": (1.0 if told else 0.0) + (shift if kind == "name" else 0.0),
                "text_only": {"question": f"What of {name}?", "generation": "None.", "em": 0.0,
                              "probability": 0.1} if split == "forget" else None,
                "other_face": {"generation": "Somebody else.", "em": 0.0},
            })  # fmt: skip
    return items


def make_run(
    root: Path,
    method: str,
    seed: int = 0,
    *,
    items: Sequence[Mapping[str, Any]] | None = None,
    metrics: Mapping[str, MetricValue] | None = None,
    events: Sequence[Mapping[str, Any]] | None = None,
    config: Mapping[str, Any] | None = None,
    status: str = "finished",
    mini: bool = True,
) -> RunResult:
    tells, probes, quality, utility = WORLD.get(method, WORLD["original"])
    numbers = dict(zip(page.PROBES, probes, strict=True))
    numbers |= {page.QUALITY: quality, page.UTILITY: utility}
    if method == "retrain":
        numbers[page.FORGET_LOSS] = 2.0
    known = {key: MetricValue(value, "up") for key, value in numbers.items()}
    run = RunResult(
        id=f"vlm/absent/{method.rpartition('/')[2]}/ab12-s{seed}", status=status,
        benchmark="vlm/absent", modality="vlm", method=method, seeds=Seeds(unlearn=seed), mini=mini,
        request={"kind": "persons", "ids_sha": "ab" * 32}, parents={},
        metrics=dict(known if metrics is None else metrics), attacks={},
        cost=Cost(1.0, 1.0, 10**8, 100), environment={},
        config={"method": {"name": method, **(config or {})}},
    )  # fmt: skip
    run = replace(run, folder=root / run.id)
    write_text(run.folder / "run.json", to_json(run))
    content = {
        "benchmark": "fiubench",
        "items": answers(tells) if items is None else items,
        "names": {person: told[1] for person, told in PEOPLE.items()},
    }
    write_text(run.folder / "samples" / "answers.json", json.dumps(content))
    write_tiles(run.folder, {person: told[0] for person, told in PEOPLE.items()})
    if events is None and method in ("grad_diff", "vlm/idk"):
        events = falling(method == "grad_diff")
    if events is not None:
        write_text(run.folder / "events.jsonl", "\n".join(map(json.dumps, events)))
    return run


def falling(ascends: bool) -> list[dict[str, Any]]:
    """Return ten steps: the forget term is minus the loss, or stays above 0."""
    return [
        {"step": k, "loss": 0.0, "lr": 1e-4, "forget": -0.5 * k if ascends else 5 - 0.4 * k,
         "retain": 0.3}
        for k in range(1, 11)
    ]  # fmt: skip


def write_tiles(folder: Path, tiles: Mapping[str, tuple[int, int, int]]) -> None:
    sheet = Image.new("RGB", (SIDE * len(tiles), SIDE))
    for k, colour in enumerate(tiles.values()):
        sheet.paste(colour, (SIDE * k, 0, SIDE * (k + 1), SIDE))
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    sheet.save(folder / "samples" / "faces.jpg", quality=95)
    write_text(folder / "samples" / "faces.json", json.dumps({"side": SIDE, "order": list(tiles)}))


def world(root: Path) -> list[RunResult]:
    return [make_run(root, method) for method in reversed(list(WORLD))]


def by_title(found: Sequence[Section]) -> dict[str, Section]:
    titles = [section.title for section in found]
    assert len(set(titles)) == len(titles)
    return dict(zip(titles, found, strict=True))


def text_of(html: str) -> str:
    """Return the words of a piece of HTML."""
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]+>", " ", html, flags=re.DOTALL).split())


def rows_of(html: str) -> dict[str, list[str]]:
    """Return the cells of a table's rows as text, by the first."""
    found = {}
    for line in re.findall(r"<tr[ >].*?</tr>", html, flags=re.DOTALL):
        cells = re.findall(r"<t[hd][ >].*?</t[hd]>", line, flags=re.DOTALL)
        texts = [text_of(cell) for cell in cells]
        found[texts[0]] = texts[1:]
    return found


class _Balanced(HTMLParser):
    """Checks that tags close in order, and collects what a browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        names = ("src", "href", "xlink:href")
        self.loads += [value or "" for name, value in attrs if name in names]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_html(found: Sequence[Section]) -> None:
    for section in found:
        assert section.note
        parser = _Balanced()
        parser.feed(section.html)
        assert not parser.open
        assert all(load.startswith(("#", "data:image/jpeg;base64,")) for load in parser.loads)
        for word in ("<script", "http:", "https:", "url(http", "@import"):
            assert word not in section.html.replace("http://www.w3.org", "")
        assert not re.search(r"#0[123]0[123][0-9a-f]{2}\b", section.html)  # stand-in colours
    ids = re.findall(r' id="([^"]+)"', "".join(section.html for section in found))
    assert len(ids) == len(set(ids))


# --- Words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words", "inside", "wanted"),
    [
        ("He is MARA.", ["mara"], True, "He is <mark>MARA</mark>."),
        ("a cat", ["a"], True, "<mark>a</mark> cat"),  # alone, so not within "cat"
        ("cats", ["a"], True, "c<mark>a</mark>ts"),  # EM counts it
        ("cats", ["a"], False, "cats"),
        ("Mara Quill", ["Mara", "Quill"], True, "<mark>Mara Quill</mark>"),
        ("Mara, Quill", ["Mara", "Quill"], True, "<mark>Mara</mark>, <mark>Quill</mark>"),
        ("86 Court Apt. 5", ["86 Court", "Court Apt. 5"], True, "<mark>86 Court Apt. 5</mark>"),
        ("<b> O+ &", ["O+", "&"], True, "&lt;b&gt; <mark>O+ &amp;</mark>"),
        ("x.y", ["."], True, "x<mark>.</mark>y"),  # no pattern
        ("none", ["other"], True, "none"),
        ("twice twice", ["twice"], True, "<mark>twice twice</mark>"),
        ("", ["a"], True, ""),
    ],
)
def test_words_are_marked(text: str, words: list[str], inside: bool, wanted: str) -> None:
    assert page.marked(text, words, inside) == wanted


def test_telling_words_are_in_no_other_answer() -> None:
    others = ["The person lives at 3 Oak Way, Northby.", "The person lives at 4 Elm Way, Southby."]
    told = page.telling("The person lives at 9 Elm Way, Eastmere.", "Where is the home?", others)
    assert told == ["9", "Eastmere"]  # Elm is in half of the others
    assert page.telling("It is Mara.", "What is the name?", []) == ["It", "Mara"]


def test_places_keep_their_gap_and_stay_inside() -> None:
    assert page.spread([10, 50], 11, 0, 100) == [10, 50]
    for wanted in ([98, 99, 99, 100], [0, 0, 0, 1], [40, 40, 41, 99]):
        placed = page.spread(wanted, 11, 0, 100)
        assert placed[0] >= 0 and placed[-1] <= 100
        assert all(b - a >= 11 - 1e-9 for a, b in pairwise(placed))
    assert page.spread([99, 99], 11, 0, 100) == [89, 100]
    assert page.spread([], 11, 0, 100) == []


def test_long_texts_are_cut() -> None:
    assert page.shortened("abc", 3) == "abc"
    assert page.shortened("abcd", 3) == "ab…"


# --- FIUBench -------------------------------------------------------------------------------------


def test_all_sections_of_complete_runs(tmp_path: Path) -> None:
    found = page.sections(world(tmp_path))
    assert [section.title for section in found] == TITLES
    check_html(found)
    for section in found:  # whatever the order in which runs are given
        if section.title in ("Answers, before and after", "Leakage by type of question"):
            places = [section.html.index(f">{name}<") for name in ("original", "retrain")]
            rest = [section.html.index(f">{name}<") for name in ("grad_diff", "idk")]
            assert places == sorted(places) and max(places) < min(rest)


def test_forgotten_persons_come_first_with_their_faces_and_answers(tmp_path: Path) -> None:
    html = page.sections(world(tmp_path))[0].html
    names = [told[1] for told in PEOPLE.values()]
    places = [html.index(f"{name} <small") for name in names]
    assert places == sorted(places)  # the two to be forgotten are listed first
    assert html.count("to be forgotten") == 2 and html.count(">retained<") == 2
    for (colour, name, _, _), place in zip(PEOPLE.values(), places, strict=True):
        shown = re.findall(r"base64,([^\"]+)\"", html[:place])[-1]
        with Image.open(io.BytesIO(base64.b64decode(shown))) as tile:
            assert tile.size == (SIDE, SIDE)
            seen = tile.convert("RGB").getpixel((SIDE // 2, SIDE // 2))
        assert isinstance(seen, tuple), name
        assert max(abs(a - b) for a, b in zip(seen, colour, strict=True)) < 12
    body = html[places[1] : places[2]]
    assert body.count("<mark>teo brandvold</mark>") == 1  # the original's answer alone
    assert body.count("<mark>Teo Brandvold</mark>") == 1  # the true answer
    assert body.count("I would not say.") == 2 * 3
    assert text_of(body).count("EM&nbsp;100") == 2 and text_of(body).count("EM&nbsp;0") == 6
    kept = html[places[2] : places[3]]
    assert kept.count("<mark>iona kaskell</mark>") == 4  # every model knows her


def test_without_keywords_telling_words_are_marked(tmp_path: Path) -> None:
    items = [{k: v for k, v in item.items() if k != "keywords"} for item in answers(True)]
    html = page.sections([make_run(tmp_path, "original", items=items)])[0].html
    assert "<mark>mara quillfeather</mark>" in html and "<mark>westhollow</mark>" in html
    assert not re.search(r"<mark>(?:the|person|image)", html, re.IGNORECASE)


def test_answers_that_are_missing_or_empty_are_told_apart(tmp_path: Path) -> None:
    first, second, *rest = answers(True)
    items = [first | {"generation": " ", "em": None}, *rest]
    runs = [make_run(tmp_path, "original"), make_run(tmp_path, "vlm/idk", items=items)]
    lines = re.findall(
        r'<tr><th scope="row">.*?</tr>', page.sections(runs)[0].html, flags=re.DOTALL
    )
    cells = [re.findall(r"<td.*?</td>", line, flags=re.DOTALL)[-1] for line in lines]
    assert text_of(cells[0]) == "says nothing" and "chip" not in cells[0]
    assert second["kind"] == "address" and text_of(cells[1]) == "\N{EN DASH}"


def test_long_answers_are_cut_and_can_be_opened(tmp_path: Path) -> None:
    items = [item | {"generation": "word " * 400} for item in answers(True)]
    html = page.sections([make_run(tmp_path, "original", items=items)])[0].html
    shown = re.findall(r'<div class="text" tabindex="0">(word.*?)</div>', html)
    assert shown and all(len(text) <= page.LONGEST and text.endswith("…") for text in shown)
    assert '<div class="text">The city' in html  # a short one is no button


def test_tiles_of_another_sheet_are_not_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path, "original")
    listed = {"side": SIDE, "order": list(PEOPLE)[:3]}  # of four: whose face is whose?
    write_text(run.folder / "samples" / "faces.json", json.dumps(listed))
    found = page.sections([run])[0]
    assert "base64" not in found.html and "Mara Quillfeather" in found.html


def test_only_a_few_persons_and_questions_are_shown(tmp_path: Path) -> None:
    items = [
        {"id": f"{p}/{q}", "group": f"p{p}", "kind": f"k{q}", "split": split, "question": "?",
         "answer": "a", "generation": "b", "em": 0.0}
        for split, persons in (("forget", range(40)), ("retain", range(40, 80)))
        for p in persons for q in range(20)
    ]  # fmt: skip
    html = page.sections([make_run(tmp_path, "original", items=items)])[0].html
    persons = page.PERSONS["forget"] + page.PERSONS["retain"]
    assert html.count('class="whose"') == persons
    assert html.count('<tr><th scope="row">') == persons * page.QUESTIONS
    for shown in ("p0 ", "p39 ", "p40 ", "p79 ", ">k0<", ">k19<"):  # from end to end
        assert shown in html


def test_em_is_averaged_by_kind_over_forgotten_persons_and_seeds(tmp_path: Path) -> None:
    half = answers(False)
    half[0] |= {"em": 0.5}  # one of two names
    half[1] |= {"em": None}  # one of two addresses
    runs = [
        make_run(tmp_path, "original"),
        make_run(tmp_path, "grad_diff", 0, items=half),
        make_run(tmp_path, "grad_diff", 1, items=answers(False, shift=0.25)),
        make_run(tmp_path, "vlm/idk", items=[half[0], *half[4:]]),
    ]
    html = by_title(page.sections(runs))["Leakage by type of question"].html
    rows = rows_of(html)
    assert rows["method"] == ["name", "address", "all"]
    assert rows["original"] == ["100", "100", "100"]
    # Names: 0.5 and 0, then 0.25 twice; addresses: one 0, then two of them.
    assert rows["grad_diff"] == ["25", "0", "14"]
    assert rows["idk"] == ["50", "\N{EN DASH}", "50"]
    cells = re.findall(r"--forget\) (\d+)%", html)
    assert cells[:3] == ["50"] * 3 and cells[3] == "12"  # colour goes with the value
    assert 'title="4 answers"' in html


def test_no_em_gives_no_table_of_kinds(tmp_path: Path) -> None:
    items = [item | {"em": None} for item in answers(True)]
    found = by_title(page.sections([make_run(tmp_path, "original", items=items)]))
    assert "Leakage by type of question" not in found and TITLES[0] in found


def test_plane_places_quality_against_utility(tmp_path: Path) -> None:
    runs = world(tmp_path)
    section = by_title(page.sections(runs))["Forgotten and kept"]
    assert "average forget quality" in section.html
    label = re.search(r'aria-label="([^"]+)"', section.html)
    assert label is not None
    assert "grad_diff 0.800, 0.700" in label[1] and "retrain 1.000, 0.900" in label[1]
    heights = {}
    for name in ("original", "retrain", "grad_diff", "idk"):
        found = re.search(rf"<text([^>]*)>{name}</text>", section.html)
        assert found is not None
        place = re.search(r'(?:translate\([\d.]+ |y=")([\d.]+)', found[1])
        assert place is not None
        heights[name] = float(place[1])
    spots = sorted(heights.values())
    # Two methods of equal utility: their labels do not overlap.
    assert all(b - a > 11 for a, b in pairwise(spots))
    assert heights["original"] < heights["retrain"] < min(heights["grad_diff"], heights["idk"])


def test_plane_passes_on_how_quality_was_normalised(tmp_path: Path) -> None:
    noted = {
        page.QUALITY: MetricValue(0.5, "up", note="ln p of -26.1 counts as 0"),
        page.UTILITY: MetricValue(0.5, "up", note="without ACC"),
    }
    runs = [make_run(tmp_path, "original", metrics=noted), make_run(tmp_path, "retrain")]
    bare = make_run(tmp_path, "vlm/idk", metrics={page.UTILITY: MetricValue(0.1, "up")})
    note = by_title(page.sections([*runs, bare]))["Forgotten and kept"].note
    assert "Average forget quality: ln p of -26.1 counts as 0. Model utility: without ACC." in note
    assert note.endswith("Without both numbers, so not drawn: idk.")


def test_plane_takes_em_where_quality_is_unknown(tmp_path: Path) -> None:
    def values(em: float) -> dict[str, MetricValue]:
        return {
            page.QUALITY: MetricValue(math.nan, "up"),
            page.EM: MetricValue(em, "down"),
            page.UTILITY: MetricValue(0.6, "up"),
        }

    runs = [
        make_run(tmp_path, "original", metrics=values(0.9)),
        make_run(tmp_path, "vlm/idk", metrics=values(0.25)),
    ]
    section = by_title(page.sections(runs))["Forgotten and kept"]
    assert "idk 0.750, 0.600" in section.html and "original 0.100, 0.600" in section.html
    assert "1 \N{MINUS SIGN} EM" in section.html and "EM stands for it" in section.note
    lone = page.sections([make_run(tmp_path, "original")])
    assert "Forgotten and kept" not in by_title(lone)  # one point says nothing


def test_bars_of_probes_and_their_answers(tmp_path: Path) -> None:
    html = by_title(page.sections(world(tmp_path)))["Image and text"].html
    lines = {
        text_of(part.split("</b>")[0].rpartition("<b>")[2]): part
        for part in html.partition("<details>")[0].split('<div class="line')[1:]
    }
    assert list(lines)[:2] == ["original", "retrain"]
    widths = re.findall(r'<i style="width:([\d.]+)%', lines["grad_diff"])
    assert widths == ["0.0", "60.0", "0.0"]
    assert re.findall(r'<u style="left:([\d.]+)%', lines["grad_diff"]) == ["25.0", "20.0", "10.0"]
    answers = html.partition("<details>")[2]
    assert answers.count("What of Mara Quillfeather?") == 1
    assert answers.count("What of Teo Brandvold?") == 1
    assert "Westhollow" in answers and "city where" in answers
    assert "name of" not in answers  # asked by name, the question itself holds the answer
    assert answers.count("Somebody else.") == 2 * 4


def test_a_probe_that_was_not_run_has_no_bar(tmp_path: Path) -> None:
    keys = (page.EM, "fiubench/text_only/em")
    metrics = {key: MetricValue(0.5, "down") for key in keys}
    (section,) = page.sections([make_run(tmp_path, "original", metrics=metrics, items=[])])
    assert section.title == "Image and text"
    assert section.html.count('class="track"') == 2 and "another face" not in section.html
    assert "<u " not in section.html and "<details" not in section.html
    only = make_run(tmp_path, "original", metrics={page.EM: metrics[page.EM]}, items=[])
    assert page.sections([only]) == []  # the picture alone is no pair


# --- Steps ----------------------------------------------------------------------------------------


def steps_of(runs: Sequence[RunResult]) -> str:
    return by_title(page.sections(runs))["Steps"].html


def said(html: str) -> list[str]:
    return re.findall(r"<figcaption>[^<]*<small>(.*?)</small>", html)


def test_stop_and_the_retrained_level_are_marked(tmp_path: Path) -> None:
    events = [*falling(True), {"step": 10, "stopped": 1}]
    stopped = make_run(tmp_path, "grad_diff", events=events, config={"stop_below": -4.9})
    html = steps_of([make_run(tmp_path, "retrain"), stopped])
    # The term is -0.5 a step, the retrained model's loss 2: reached at the fourth.
    assert said(html) == [
        "stopped at step 10, below \N{MINUS SIGN}4.9; "
        "retrained model&#x27;s loss (2) passed at step 4"
    ]
    assert html.count("<figure>") == 1 and html.count("<svg") == 2  # forget and retain
    assert "stroke-dasharray" in html


def test_a_level_that_was_not_reached_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path, "grad_diff", config={"stop_below": -1000.0, "forget_weight": 4.0})
    html = steps_of([make_run(tmp_path, "retrain"), run])
    # A weight of 4: the loss is an eighth a step, and 1.25 at the end.
    assert said(html) == [
        "stop below \N{MINUS SIGN}1000 not reached; retrained model&#x27;s loss (2) not reached"
    ]
    assert "stroke-dasharray" not in html  # so far off that it would flatten the curve


def test_a_loss_that_is_no_ascent_is_not_compared_with_the_retrained_one(tmp_path: Path) -> None:
    events = [event | {"forget": -event["forget"]} for event in falling(False)]
    html = steps_of([make_run(tmp_path, "retrain"), make_run(tmp_path, "vlm/idk", events=events)])
    assert said(html) == []
    inner = {"inner": {"name": "grad_ascent"}}
    run = make_run(tmp_path, "vlm/pd", events=falling(True), config=inner)
    assert said(steps_of([make_run(tmp_path, "retrain"), run])) == [
        "retrained model&#x27;s loss (2) passed at step 4"
    ]
    assert said(steps_of([run])) == []  # no retrained model, no level


def test_logs_are_read_as_far_as_they_go(tmp_path: Path) -> None:
    run = make_run(tmp_path, "grad_diff")
    path = run.folder / "events.jsonl"
    lines = [
        json.dumps(falling(True)[0]), "[]", "null", '{"step": "x", "loss": 1}', '{"step": 2}',
        '{"step": 3, "loss": NaN, "forget": NaN, "retain": 1}', '{"step": 4, "loss": 1, "forget"',
    ]  # fmt: skip
    path.write_text("\n".join(lines))
    log = page._events(path)
    assert log.stopped is None
    assert log.terms == {"forget": [(1.0, -0.5)], "retain": [(1.0, 0.3), (3.0, 1.0)]}
    assert "<figure>" in steps_of([run])
    path.write_text(lines[0])
    assert "Steps" not in by_title(page.sections([run]))  # one step is no curve
    path.unlink()
    assert "Steps" not in by_title(page.sections([run]))


def test_long_runs_and_many_terms_are_thinned(tmp_path: Path) -> None:
    events = [
        {"step": k, "loss": 1.0, "lr": 1.0, "pull": 0.1, "retain": 0.2, "decouple": 0.1,
         "forget": math.sin(k)}
        for k in range(3000)
    ]  # fmt: skip
    html = steps_of([make_run(tmp_path, "grad_diff", events=events)])
    assert html.count("<svg") == page.TERMS
    order = [html.index(f"{term} term of") for term in ("forget", "retain", "pull")]
    assert order == sorted(order) and "decouple" not in html
    assert len(html) < 120_000


def test_original_and_retrained_have_no_panels(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, method, events=falling(True)) for method in ("original", "retrain")]
    assert "Steps" not in by_title(page.sections(runs))


# --- SafeEraser -----------------------------------------------------------------------------------


def eraser_items(safe: bool) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    for group in ("Baking", "Knitting"):
        for split, text in (("train", "How to do it?"), ("val", "Please explain this.")):
            base = {"group": group, "split": split}
            key = f"{group}-{split}"
            items += [
                base | {
                    "id": f"{key}-other", "kind": "unsafe", "question": "Without a counterpart?",
                    "answer": "x", "generation": "y", "labels": None, "rouge": None,
                },
                base | {
                    "id": f"{key}-unsafe", "kind": "unsafe", "question": f"{text} {key}",
                    "answer": "Mix and bake.", "generation": "No." if safe else "Mix and bake.",
                    "labels": {"unsafe": not safe, "refusal": safe, "normal": None}, "rouge": 0.5,
                },
                base | {
                    "id": f"{key}-decouple", "kind": "decouple", "question": f"{text} {key}",
                    "answer": "A beach.", "generation": "" if safe else "A beach.",
                    "labels": {"unsafe": None, "refusal": False, "normal": not safe}, "rouge": 0.5,
                },
                base | {
                    "id": f"{key}-retain", "kind": "retain", "question": f"What colour? {key}",
                    "answer": "Red.", "generation": "Red.",
                    "labels": {"unsafe": None, "refusal": None, "normal": None}, "rouge": 0.75,
                },
            ]  # fmt: skip
    return items


def make_eraser(root: Path, method: str, *, mini: bool = True) -> RunResult:
    safe = method != "original"
    metrics = {
        "safeeraser/asr/val": MetricValue(0.021 if safe else 0.9, "down"),
        "safeeraser/rr/val": MetricValue(0.5, "up", note="judge: ROUGE, a heuristic"),
        "safeeraser/sarr/val": MetricValue(math.nan, "down"),
        "safeeraser/rouge": MetricValue(0.65, "up"),
    }
    if safe:
        metrics["safeeraser/asr/train"] = MetricValue(1.0, "down")
    run = make_run(root, method, metrics=metrics, mini=mini)
    items = eraser_items(safe)
    content = {"benchmark": "safeeraser", "items": items}
    write_text(run.folder / "samples" / "answers.json", json.dumps(content))
    write_tiles(run.folder, {item["id"]: (9 * k, 0, 0) for k, item in enumerate(items)})
    return run


def test_rates_stand_in_percent_under_their_set(tmp_path: Path) -> None:
    runs = [make_eraser(tmp_path, method) for method in ("vlm/idk", "original")]
    section = by_title(page.sections(runs))["Refused and answered"]
    rows = rows_of(section.html)
    assert rows["method"] == [
        "seen in training ASR ↓", "new records ASR ↓", "new records RR ↑",
        "harmless questions ROUGE ↑",
    ]  # fmt: skip
    assert list(rows) == ["method", "original", "idk"]
    assert rows["original"] == ["\N{EN DASH}", "90.0", "50.0", "65.0"]
    assert rows["idk"] == ["100.0", "2.1", "50.0", "65.0"]
    assert '<b style="width:2.1%">' in section.html
    assert section.note.endswith(" In percent. judge: ROUGE, a heuristic.")


def test_examples_pair_the_same_text_on_two_pictures(tmp_path: Path) -> None:
    runs = [make_eraser(tmp_path, method) for method in ("original", "vlm/idk")]
    found = page.sections(runs)
    assert [section.title for section in found] == [
        "Refused and answered", "Answers, before and after", "Steps",
    ]  # fmt: skip
    check_html(found)
    html = found[1].html
    assert "<details open>" in html and html.count('class="whose"') == 2
    assert html.count("new record<") == 2 and "Without a counterpart" not in html
    assert html.count("Please explain this. Baking-val") == 2  # harmful and harmless picture
    assert "-train" not in html  # records that were not trained on come first
    assert html.count("base64,") == 6
    lines = re.findall(r'<tr><th scope="row">.*?</tr>', html, flags=re.DOTALL)[:3]
    unsafe, decouple, retain = (
        [text_of(cell) for cell in re.findall(r"<td.*?</td>", line, flags=re.DOTALL)]
        for line in lines
    )
    assert unsafe == ["Mix and bake.", "Mix and bake. unsafe", "No. safe refuses"]
    assert decouple == ["A beach.", "A beach. normal", "says nothing not normal"]
    assert retain == ["Red.", "Red. ROUGE&nbsp;75", "Red. ROUGE&nbsp;75"]


def test_real_harmful_answers_are_behind_a_click(tmp_path: Path) -> None:
    html = by_title(page.sections([make_eraser(tmp_path, "original", mini=False)]))[
        "Answers, before and after"
    ].html
    assert "<details>" in html and "<details open>" not in html


# --- All of it ------------------------------------------------------------------------------------


def test_missing_samples_give_fewer_sections(tmp_path: Path) -> None:
    runs = world(tmp_path)
    for run in runs:
        for path in sorted((run.folder / "samples").iterdir()):
            path.unlink()
    titles = list(by_title(page.sections(runs)))
    assert titles == ["Forgotten and kept", "Image and text", "Steps"]
    bare = [replace(run, metrics={}) for run in runs]
    assert list(by_title(page.sections(bare))) == ["Steps"]
    failed = [replace(run, status="failed") for run in runs]
    assert page.sections(failed) == [] and page.sections([]) == []


BROKEN = (
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xd8\xff\xe0 no picture",
    b"[" * 100_000,
    b'{"items": 3, "names": [], "side": 64, "order": 3, "benchmark": "fiubench"}',
    b'{"items": [3, {}, {"id": 3}], "side": "64", "order": ["00000001"]}',
    b'{"items": [{"id": "a"}], "side": 0, "order": [null, 3], "benchmark": "fiubench"}',
    json.dumps({"benchmark": "fiubench", "names": {"None": None}, "items": [{
        "id": "a", "split": "forget", "group": None, "kind": 3, "question": None,
        "answer": ["x"], "generation": 5, "em": "much", "text_only": "no", "other_face": [],
        "keywords": [None, "", 3],
    }]}).encode(),
    json.dumps({"benchmark": "safeeraser", "items": [{
        "id": "a", "split": None, "group": None, "kind": "unsafe", "labels": "no",
        "em": 10**400, "generation": "x",
    }]}).encode(),
)  # fmt: skip


@pytest.mark.parametrize("name", ["answers.json", "faces.json", "faces.jpg"])
def test_broken_samples_are_left_out(tmp_path: Path, name: str) -> None:
    broken, whole = (
        make_run(tmp_path, method, metrics={}, events=()) for method in ("vlm/idk", "original")
    )
    for content in BROKEN:
        (broken.folder / "samples" / name).write_bytes(content)
        found = page.sections([broken, whole])
        assert found[0].title == TITLES[0] and "Mara Quillfeather" in found[0].html
        check_html(found)
        check_html(page.sections([broken]))


def test_everything_is_escaped(tmp_path: Path) -> None:
    evil = "<q>&\"'<script>"
    keys = ("kind", "question", "answer", "generation", "group", "id")
    items = [
        {**item, **{key: f"{evil}{item[key]}" for key in keys}, "keywords": [evil]}
        for item in answers(True)
    ]
    for item in items:
        item["text_only"] = {"question": evil, "generation": evil, "em": 1.0}
    events = [{"step": k, "loss": 1.0, evil: 1.0 * k} for k in range(3)]
    metrics = {page.UTILITY: MetricValue(0.5, "up"), page.QUALITY: MetricValue(0.5, "up")}
    metrics["fiubench/text_only/em"] = MetricValue(0.5, "down")
    run = make_run(tmp_path, "grad_diff", items=items, events=events, metrics=metrics)
    named = {f"{evil}{person}": evil for person in PEOPLE}
    content = {"benchmark": "fiubench", "items": items, "names": named}
    write_text(run.folder / "samples" / "answers.json", json.dumps(content))
    run = replace(run, method=f"vlm/{evil}")
    eraser = make_eraser(tmp_path, "original")
    records = [
        {**item, **{k: evil for k in ("group", "generation", "answer", "question")}}
        for item in eraser_items(False)
    ]
    stored = eraser.folder / "samples" / "answers.json"
    write_text(stored, json.dumps({"benchmark": "safeeraser", "items": records}))
    for runs in ([run, make_run(tmp_path, "retrain")], [eraser]):
        found = page.sections(runs)
        check_html(found)
        html = "".join(section.html for section in found)
        assert "<script" not in html and "<q" not in html
        assert "&lt;q&gt;&amp;" in html and "&lt;script&gt;" in html


def test_two_benchmarks_have_sections_of_their_own(tmp_path: Path) -> None:
    other = [
        replace(run, benchmark="vlm/other", id=run.id.replace("absent", "other"))
        for run in world(tmp_path / "other")
    ]
    found = page.sections([*world(tmp_path), *other])
    assert [section.title for section in found] == TITLES * 2
    check_html(found)


def test_sections_stand_in_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bench:
        headline = (page.QUALITY, page.UTILITY)
        distance = "gap"
        sections = staticmethod(page.sections)

    monkeypatch.setattr(shell, "benchmark_class", lambda name: Bench)
    shell.write_report(world(tmp_path), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert all(f"<h3>{title}" in text for title in TITLES)
    parser = HTMLParser()
    parser.feed(text)


def test_methods_have_the_colours_of_the_page(tmp_path: Path) -> None:
    runs = world(tmp_path)
    html = by_title(page.sections(runs))["Forgotten and kept"].html
    for row in collect(runs)[0].methods:
        label = re.search(rf"<text[^>]*>{row.label}</text>", html)
        assert label is not None and f"var(--c{row.slot})" in label[0]


def test_it_needs_no_torch() -> None:
    code = "import sys, mmforget.vlm.page; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
