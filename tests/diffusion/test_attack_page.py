"""The report's sections on attacks: what is shown, what is behind a click, what is escaped."""

import json
from pathlib import Path

import torch

from mmforget.diffusion import attack_page
from mmforget.diffusion.answers import write_image
from mmforget.diffusion.attacks.arena import picture_path
from mmforget.record import AttackResult, Cost, MetricValue, RunResult, Seeds


def run(folder: Path, method: str, judge: str = "style classifier") -> RunResult:
    place = folder / method / "attacks" / "diffusion.text_grad"
    row = {
        "id": "a/1", "prompt": "a <b>cat</b>", "attacked": True, "success": True, "stage": 2,
        "text": "x <i>cat</i>", "seed": 3, "label": "cat",
    }  # fmt: skip
    for kind in ("before", "after"):
        path = picture_path(place, "a/1", kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, torch.zeros(3, 8, 8, dtype=torch.uint8))
    (place / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    share = MetricValue(0.5, "down", low=0.2, high=0.8, n=4, note=f"4 attacked; judge: {judge}")
    values = {"asr": share, "pre_asr": MetricValue(0.25, "down", n=4)}
    curve = {"x": [0, 1, 2], "y": [0.0, 0.25, 0.5], "x_label": "", "y_label": ""}
    found = AttackResult("white", values, 8, 1.0, curves={"success": curve})
    replayed = AttackResult(
        "black", {**values, "from/esd/asr": MetricValue(0.75, "down", n=4)}, 4, 1.0
    )
    return RunResult(
        id=f"diffusion/x/{method}/0-s0", status="finished", benchmark="diffusion/unlearncanvas",
        modality="diffusion", method=f"diffusion/{method}", seeds=Seeds(), mini=True, request={},
        parents={}, metrics={}, cost=Cost(), environment={}, config={}, folder=folder / method,
        attacks={
            "diffusion/no_attack": AttackResult("black", values, 4, 1.0),
            "diffusion/text_grad": found,
            "diffusion/transfer": replayed,
        },
    )  # fmt: skip


def test_sections(tmp_path: Path) -> None:
    made = {section.title: section for section in attack_page.sections([run(tmp_path, "esd")])}
    assert list(made) == [
        "Attacks on prompts",
        "Success over pictures",
        "Prompts found",
        "Transfer of prompts",
    ]
    table = made["Attacks on prompts"].html
    assert "<td>25</td>" in table and "20 to 80" in table and "no_attack" not in table
    prompts = made["Prompts found"].html
    assert "x &lt;i&gt;cat&lt;/i&gt;" in prompts and "<i>cat" not in prompts
    assert prompts.count("data:image/jpeg;base64,") == 2 and "<details open>" in prompts
    assert "<th>esd</th>" in made["Transfer of prompts"].html
    assert "75" in made["Transfer of prompts"].html


def test_pictures_of_unsafe_concepts_are_behind_a_click(tmp_path: Path) -> None:
    sections = attack_page.sections([run(tmp_path, "uce", "NudeNet 3.4.2, exposed")])
    (found,) = [section for section in sections if section.title == "Prompts found"]
    assert "<details open>" not in found.html


def test_runs_without_attacks_have_no_section(tmp_path: Path) -> None:
    plain = run(tmp_path, "ca")
    plain.attacks.clear()
    assert attack_page.sections([plain]) == []
