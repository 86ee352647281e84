"""Attacks on prompts in the report: method by attack, success over pictures, prompts, transfer."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from mmforget.record import AttackResult, MetricValue, RunResult
from mmforget.report.section import Section
from mmforget.report.svg import MUTED, Picture, dashes, series

SIDE = 96  # pixels of a picture on the page
SHOWN = 6  # prompts of a run and attack
TRANSFER = "diffusion/transfer"
APART = (TRANSFER, "diffusion/no_attack")  # shown in a table and a column of their own
UNSAFE = ("NudeNet", "Q16")  # judges whose pictures are shown behind a click
STYLE = """<style>
.prompts table{border-collapse:collapse;font-size:.82rem}
.prompts td,.prompts th{padding:.25rem .6rem .25rem 0;text-align:left;vertical-align:middle;
border:0;background:none}
.prompts img{width:4rem;height:4rem;border-radius:.25rem;display:block}
.prompts td.text{max-width:30rem;overflow-wrap:anywhere}
.prompts td.text small{display:block;color:var(--muted)}
.prompts .hit{font-weight:600}
.grid{overflow-x:auto}
.grid table{border-collapse:collapse;font-size:.85rem}
.grid td,.grid th{padding:.3rem .7rem;text-align:right;border-bottom:1px solid var(--line)}
.grid td small{display:block;color:var(--muted);font-size:.72rem;white-space:nowrap}
.grid th:first-child{text-align:left}
.curves{display:flex;flex-wrap:wrap;gap:1rem}
.curves figure{margin:0;width:19rem}
.curves figcaption{font-size:.85rem;font-weight:600}
.curves .key{font-size:.75rem;color:var(--muted);font-weight:400}
</style>"""


def sections(runs: Sequence[RunResult]) -> list[Section]:
    """Return the sections that the runs have attacks on prompts for."""
    told = [run for run in runs if any(_on_prompts(a) for a in run.attacks.values())]
    if not told:
        return []
    found = [_matrix(told), _curves(told), _prompts(told), _transfer(told)]
    return [section for section in found if section is not None]


def _on_prompts(attack: AttackResult) -> bool:
    return "asr" in attack.values


def _attacks(runs: Sequence[RunResult]) -> list[str]:
    """Return the attacks of the runs, in the order they were run."""
    names = [n for run in runs for n, a in run.attacks.items() if _on_prompts(a)]
    return [name for name in dict.fromkeys(names) if name not in APART]


def _short(name: str) -> str:
    return name.rpartition("/")[2]


def _matrix(runs: Sequence[RunResult]) -> Section | None:
    """Return methods by attacks: success rates with intervals, and what they cost."""
    attacks = _attacks(runs)
    if not attacks:
        return None
    heads = "".join(f"<th>{escape(_short(name))}</th>" for name in attacks)
    lines = []
    for run in runs:
        pre = next((a.values["pre_asr"] for a in run.attacks.values() if _on_prompts(a)), None)
        cells = [f"<td>{_share(pre)}</td>"]
        for name in attacks:
            attack = run.attacks.get(name)
            cells.append("<td>-</td>" if attack is None else f"<td>{_cell(attack)}</td>")
        lines.append(f"<tr><th>{escape(_label(run, runs))}</th>{''.join(cells)}</tr>")
    html = (
        f'{STYLE}<div class="grid"><table><tr><th>model</th><th>no attack</th>{heads}</tr>'
        f"{''.join(lines)}</table></div>"
    )
    note = (
        "Attack success rate in percent: prompts whose picture shows the concept, with the attack "
        "or without (95 % Wilson interval), and seconds a prompt. Read a row against its first "
        "column and against random and seed_search, which spend the same pictures without any "
        "gradient; and against the retrained model, which never saw the concept."
    )
    return Section(title="Attacks on prompts", html=html, note=note)


def _cell(attack: AttackResult) -> str:
    value = attack.values["asr"]
    seconds = attack.values.get("seconds_per_prompt")
    cost = "" if seconds is None else f" · {seconds.value:.1f} s"
    low, high = 100 * (value.low or 0.0), 100 * (value.high or 0.0)
    return f"{_share(value)}<small>{low:.0f} to {high:.0f}{cost}</small>"


def _share(value: MetricValue | None) -> str:
    return "-" if value is None else f"{100 * value.value:.0f}"


def _curves(runs: Sequence[RunResult]) -> Section | None:
    """Return one chart a model: success over judged pictures, a line an attack."""
    attacks = _attacks(runs)
    figures = []
    for k, run in enumerate(runs):
        picture = Picture(240, 150)
        drawn = []
        for slot, name in enumerate(attacks):
            curve = run.attacks[name].curves.get("success") if name in run.attacks else None
            if curve is None or len(curve["x"]) < 2:
                continue
            style: Any = {"color": series(slot), "dashes": dashes(slot) or (None, None)}
            picture.axes.step(curve["x"], [100 * y for y in curve["y"]], where="post", **style)
            drawn.append((slot, name))
        if not drawn:
            continue
        picture.axes.set_ylim(0, 104)
        picture.axes.set_xlim(left=0)
        picture.axes.set_xlabel("judged pictures beside the prompt's own")
        picture.axes.set_ylabel("success, %")
        picture.axes.grid(axis="y", color=MUTED, alpha=0.2, linewidth=0.5)
        key = " ".join(
            f'<span style="color:var(--c{slot % 8})">{"━" if not dashes(slot) else "╍"} '
            f"{escape(_short(name))}</span>"
            for slot, name in drawn
        )
        label = f"success of attacks on {_label(run, runs)}"
        figures.append(
            f"<figure><figcaption>{escape(_label(run, runs))}"
            f'<div class="key">{key}</div></figcaption>{picture.svg(f"asr{k}", label)}</figure>'
        )
    if not figures:
        return None
    note = "Share of prompts that had shown the concept after so many judged pictures."
    html = f'{STYLE}<div class="curves">{"".join(figures)}</div>'
    return Section(title="Success over pictures", html=html, note=note)


def _prompts(runs: Sequence[RunResult]) -> Section | None:
    """Return found prompts with the pictures before and after."""
    parts: list[str] = []
    for run in runs:
        for name in [*_attacks([run]), *([TRANSFER] if TRANSFER in run.attacks else [])]:
            folder = run.folder / "attacks" / name.replace("/", ".")
            rows = _rows(folder)
            shown = [row for row in rows if row["attacked"] and _image(folder, row, "after")]
            shown = sorted(shown, key=lambda row: not row["success"])[:SHOWN]
            if not shown:
                continue
            lines = "".join(_line(folder, row) for row in shown)
            table = (
                f"<table><tr><th>before</th><th>after</th><th>prompt found</th><th>seen</th></tr>"
                f"{lines}</table>"
            )
            title = f"{_label(run, runs)} · {_short(name)}"
            judged = run.attacks[name].values["asr"].note
            closed = any(word in judged for word in UNSAFE) or run.request.get("kind") == "unsafe"
            state = "" if closed or parts else " open"
            parts.append(f"<details{state}><summary>{escape(title)}</summary>{table}</details>")
    if not parts:
        return None
    note = (
        "Pictures of one prompt at its own seed: as it is, and as the attack changed it. The text "
        "is what was drawn; it gives the same picture again. Full list: attacks/*/prompts.jsonl."
    )
    html = f'{STYLE}<div class="prompts">{"".join(parts)}</div>'
    return Section(title="Prompts found", html=html, note=note)


def _line(folder: Path, row: Mapping[str, Any]) -> str:
    state = "hit" if row["success"] else ""
    said = f"after {row['stage']} pictures" if row["success"] else "best of all, no success"
    return (
        f"<tr><td>{_image(folder, row, 'before')}</td><td>{_image(folder, row, 'after')}</td>"
        f'<td class="text"><span class="{state}">{escape(row["text"])}</span>'
        f"<small>{escape(row['prompt'])} (seed {row['seed']}; {said})</small></td>"
        f"<td>{escape(row['label'])}</td></tr>"
    )


def _transfer(runs: Sequence[RunResult]) -> Section | None:
    """Return from which model's prompts which model was attacked, and how often it worked."""
    prefix = "from/"
    told = [run for run in runs if TRANSFER in run.attacks]
    sources = list(
        dict.fromkeys(
            key.removeprefix(prefix).removesuffix("/asr")
            for run in told
            for key in run.attacks[TRANSFER].values
            if key.startswith(prefix)
        )
    )
    if not sources:
        return None
    heads = "".join(f"<th>{escape(name)}</th>" for name in sources)
    lines = []
    for run in told:
        values = run.attacks[TRANSFER].values
        cells = "".join(f"<td>{_share(values.get(f'{prefix}{n}/asr'))}</td>" for n in sources)
        lines.append(f"<tr><th>{escape(_label(run, runs))}</th>{cells}</tr>")
    html = (
        f'{STYLE}<div class="grid"><table><tr><th>attacked with prompts of</th>{heads}</tr>'
        f"{''.join(lines)}</table></div>"
    )
    note = (
        "Success in percent of prompts found on one model (columns) when drawn by another (rows)."
    )
    return Section(title="Transfer of prompts", html=html, note=note)


def _rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "prompts.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _image(folder: Path, row: Mapping[str, Any], kind: str) -> str:
    """Return a kept picture as an img element, or nothing."""
    from mmforget.diffusion.attacks.arena import picture_path

    path = picture_path(folder, row["id"], kind)
    if not path.is_file():
        return ""
    with Image.open(path) as opened:
        small = opened.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    written = io.BytesIO()
    small.save(written, format="JPEG", quality=85)
    address = base64.b64encode(written.getvalue()).decode()
    return f'<img alt="{kind}" src="data:image/jpeg;base64,{address}">'


def _label(run: RunResult, runs: Sequence[RunResult]) -> str:
    """Return a run's method, and its seed where a method occurs twice."""
    name = _short(run.method)
    same = sum(_short(other.method) == name for other in runs)
    return f"{name} s{run.seeds.unlearn}" if same > 1 else name
