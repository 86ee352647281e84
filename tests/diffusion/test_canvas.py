"""UnlearnCanvas: names, prompts, folders, tables, lists, and UA/IRA/CRA against brute force."""

import io
import os
from collections.abc import Callable
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmforget.diffusion import canvas
from mmforget.diffusion.canvas import (
    EXTRA_STYLES,
    OBJECTS,
    PHOTOS,
    PROTOCOLS,
    STYLES,
    STYLES_60,
    THEMES,
    Answers,
    answer_name,
    average,
    caption,
    fid_sides,
    forget_list,
    parse_answer_name,
    parse_caption,
    read_anchors,
    read_canvas,
    read_forget_list,
    read_parquet,
    scan_answers,
    sequential,
    ua_ira_cra,
)
from mmforget.diffusion.features import decode
from mmforget.errors import ConfigError, DataError
from mmforget.options import faults

real = pytest.mark.skipif("MMFORGET_REAL_DATA" not in os.environ, reason="MMFORGET_REAL_DATA unset")
SMALL = ("Van_Gogh", "Crayon", "Winter", PHOTOS)
THINGS = ("Dogs", "Sea", "Towers")


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def folder_copy(root: Path, photos: str = PHOTOS, images: int = 3) -> Path:
    for theme, name, k in product(("Monet", "Van_Gogh", photos), ("Cats", "Sea"), range(images)):
        touch(root / theme / name / f"{k + 1}.jpg")
    return root


def answers(
    predict: Callable[[str, str, int], tuple[str, str]] = lambda s, o, k: (s, o),
    without: Callable[[str, str, int], bool] = lambda s, o, k: False,
    seeds: tuple[int, ...] = (188, 288),
) -> Answers:
    keys = [key for key in product(SMALL, THINGS, seeds) if not without(*key)]
    told = [predict(*key) for key in keys]
    columns: list[Any] = [[key[i] for key in keys] for i in range(3)]
    columns += [[pair[i] for pair in told] for i in range(2)]
    return Answers(*columns, styles=SMALL, objects=THINGS, seeds=seeds)


def noisy(seed: int) -> Callable[[str, str, int], tuple[str, str]]:
    rng = np.random.default_rng(seed)
    return lambda s, o, k: (str(rng.choice([s, s, *SMALL])), str(rng.choice([o, o, *THINGS])))


def test_the_lists_have_the_benchmark_s_sizes_and_places() -> None:
    assert [len(part) for part in (STYLES_60, STYLES, THEMES, OBJECTS, EXTRA_STYLES)] == [
        60, 50, 51, 20, 10,
    ]  # fmt: skip
    assert THEMES.index(PHOTOS) == 38
    assert THEMES.index("Sketch") == STYLES.index("Sketch") + 1 == 39
    assert THEMES[:38] == STYLES[:38] and THEMES[39:] == STYLES[38:]
    assert set(STYLES) | set(EXTRA_STYLES) == set(STYLES_60)


def test_answer_names_go_back_and_forth() -> None:
    for key in product((*STYLES_60, PHOTOS), OBJECTS, (188, 0)):
        assert parse_answer_name(answer_name(*key)) == key


@pytest.mark.parametrize(
    "name",
    [
        "Van_Gogh_Dogs_seed_188.jpg",  # a peer's samplers
        "Van_Gogh_Dogs_seed188.png",
        "Van_Gogh_Dogs_seed0188.jpg",
        "Van_Gogh_Dog_seed188.jpg",
        "Gogh_Dogs_seed188.jpg",
        "VanGogh1_Dogs_seed188.jpg",
        "Dogs_seed188.jpg",
        "a/Van_Gogh_Dogs_seed188.jpg",
        "Van_Gogh_Dogs_seed188.jpg ",
    ],
)
def test_names_of_another_form_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="seed"):
        parse_answer_name(name)


def test_prompts_follow_each_method_s_script() -> None:
    assert PROTOCOLS["mmforget"].prompt("Van_Gogh", "Dogs") == "A Dogs image in Van Gogh style."
    assert PROTOCOLS["esd"].prompt(PHOTOS, "Sea") == "A Sea image in Seed Images style."
    assert PROTOCOLS["original"].prompt(PHOTOS, "Sea") == "A Sea image in Photo style."
    assert PROTOCOLS["fmn"].prompt("Van_Gogh", "Sea") == "A Sea image in Van_Gogh style"
    assert PROTOCOLS["fmn"].prompt(PHOTOS, "Sea") == "A Sea image in Seed_Images style"
    settings = {name: (p.sampler, p.steps, p.guidance, p.seeding) for name, p in PROTOCOLS.items()}
    assert settings["mmforget"] == ("ddim", 100, 9.0, "image")
    assert settings["shs"] == ("ddim", 100, 9.0, "stream")
    assert settings["uce"] == ("lms", 100, 9.0, "image")
    assert settings["spm"] == ("checkpoint", 100, 7.5, "image")
    assert settings["seot"] == ("checkpoint", 50, 9.0, "image")
    assert not [fault for protocol in PROTOCOLS.values() for fault in faults(protocol)]
    assert all(item.metadata["help"] for item in fields(canvas.Protocol))
    with pytest.raises(ConfigError, match="esd"):
        canvas.protocol("es")


def test_captions_and_their_inverse() -> None:
    assert caption("Van_Gogh", "Dogs") == "A Dogs image in Van Gogh style"
    assert caption("Joy", "Architectures") == "An Architectures image in Joy style"
    assert caption(PHOTOS, "Sea") == "A Sea image in photo style"
    assert caption("Joy", "Architectures", "compvis") == "A Architectures image in Joy style."
    assert caption(PHOTOS, "Sea", "compvis") == "A Sea image in Photo style."
    for style, name in product((*STYLES_60, PHOTOS), OBJECTS):
        texts = [caption(style, name), caption(style, name, "compvis")]
        texts += [protocol.prompt(style, name) for protocol in PROTOCOLS.values()]
        assert {parse_caption(text) for text in texts} == {(style, name)}
    for wrong in (
        "A Dogs painting in Joy style",
        "A Dog image in Joy style",
        "A Dogs image in X style",
    ):
        with pytest.raises(DataError, match="caption"):
            parse_caption(wrong)
    with pytest.raises(ConfigError, match="hub"):
        caption("Joy", "Sea", "huh")


@pytest.mark.parametrize("photos", ["Seed_Images", "Seed_Image"])
def test_a_folder_is_read_in_order_with_its_photos(tmp_path: Path, photos: str) -> None:
    root = folder_copy(tmp_path, photos)
    rows = read_canvas(root, ["Van_Gogh", PHOTOS], ["Sea", "Cats"], images=3)
    assert [row[:3] for row in rows] == list(
        product(("Van_Gogh", PHOTOS), ("Sea", "Cats"), (1, 2, 3))
    )
    assert rows[1].path == root / "Van_Gogh" / "Sea" / "2.jpg"
    assert rows[1].photo == rows[7].path == rows[7].photo == root / photos / "Sea" / "2.jpg"


def test_missing_images_are_counted_and_named(tmp_path: Path) -> None:
    root = folder_copy(tmp_path)
    (root / "Monet" / "Sea" / "2.jpg").unlink()
    for file in (root / PHOTOS / "Cats").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"4 of 18 images.*2 pairs.*Monet/Sea \(2\).*Cats \(all\)"):
        read_canvas(root, ["Monet", "Van_Gogh"], ["Cats", "Sea"], images=3)
    rows = read_canvas(root, ["Van_Gogh"], ["Cats", "Sea"], images=3, photos=False)
    assert len(rows) == 6 and rows[0].photo is None
    with pytest.raises(DataError, match=r"34 of 40 images.*4, 5"):  # 20 a pair unless told
        read_canvas(root, ["Van_Gogh"], ["Cats", "Sea"], photos=False)
    with pytest.raises(DataError, match="no such folder"):
        read_canvas(root / "x")
    with pytest.raises(ConfigError, match="Van_Gogh"):
        read_canvas(root, ["Van_Goh"])


def test_the_hub_s_table_streams_bytes(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def encoded(value: int) -> bytes:
        stream = io.BytesIO()
        Image.new("RGB", (4, 3), (value, 0, 0)).save(stream, "PNG")
        return stream.getvalue()

    texts = [caption(*pair) for pair in (("Joy", "Birds"), (PHOTOS, "Sea"), ("Joy", "Birds"))]
    table = pa.table(
        {"image": [{"bytes": encoded(i), "path": f"{i}.jpg"} for i in range(3)], "text": texts}
    )
    (tmp_path / "data").mkdir()
    pq.write_table(table, tmp_path / "data" / "train-0.parquet")
    rows = list(read_parquet(tmp_path))
    assert [row[:3] for row in rows] == [
        ("Joy", "Birds", 1),
        (PHOTOS, "Sea", 1),
        ("Joy", "Birds", 2),
    ]
    assert [int(decode(row.encoded)[0, 0, 0]) for row in rows] == [0, 1, 2]
    paths = pa.table({"image": [{"bytes": None, "path": "a.jpg"}], "text": [texts[0]]})
    pq.write_table(paths, tmp_path / "data" / "train-0.parquet")
    assert next(read_parquet(tmp_path)).encoded == tmp_path / "a.jpg"
    pq.write_table(pa.table({"image": ["a"], "text": ["a cat"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet row 1: 'a cat'"):
        list(read_parquet(tmp_path))
    pq.write_table(pa.table({"image": ["a"], "label": ["a cat"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="label"):
        list(read_parquet(tmp_path))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(DataError, match=r"b\.parquet cannot be read"):
        list(read_parquet(tmp_path))


def test_forget_lists_are_put_below_the_root(tmp_path: Path) -> None:
    lists, root = tmp_path / "lists", folder_copy(tmp_path / "data", "Seed_Image")
    lists.mkdir()
    start = "../../data/quick-canvas-benchmark"
    (lists / "Sea_images.txt").write_text(f"{start}/Monet/Sea/1.jpg\n{start}/Seed_Images/Sea/3.jpg")
    (lists / "Sea_prompts.txt").write_text("a\nb\n")
    rows = read_forget_list(lists, "Sea", root)
    assert rows[1] == (PHOTOS, "Sea", 3, root / "Seed_Image" / "Sea" / "3.jpg", "b")
    rows[0].path.unlink()
    with pytest.raises(DataError, match="1 of 2 listed images are missing"):
        read_forget_list(lists, "Sea", root)
    assert len(read_forget_list(lists, "Sea", root, check=False)) == 2
    (lists / "Sea_prompts.txt").write_text("a\n")
    with pytest.raises(DataError, match="2 lines"):
        read_forget_list(lists, "Sea", root)
    (lists / "Sea_images.txt").write_text("elsewhere/Monet/Sea/1.jpg")
    with pytest.raises(DataError, match="line 1"):
        read_forget_list(lists, "Sea", root)


def test_a_scan_tells_what_is_missing_and_what_is_foreign(tmp_path: Path) -> None:
    for key in product(SMALL, THINGS, (188, 288)):
        touch(tmp_path / answer_name(*key))
    scan = scan_answers(tmp_path, SMALL, THINGS, (188, 288))
    assert (len(scan.found), scan.missing, scan.foreign) == (24, (), ())
    assert [path.name for path in scan.paths] == [answer_name(*key) for key in scan.found]
    scan.require()
    for name in THINGS:  # the target's own answers are gone: no UA of 1
        (tmp_path / answer_name("Crayon", name, 188)).rename(
            tmp_path / f"Crayon_{name}_seed_188.jpg"
        )
    touch(tmp_path / ".DS_Store")
    scan = scan_answers(tmp_path, SMALL, THINGS, (188, 288))
    assert scan.missing == tuple(answer_name("Crayon", name, 188) for name in THINGS)
    assert scan.foreign == tuple(f"Crayon_{name}_seed_188.jpg" for name in THINGS)
    with pytest.raises(DataError, match=r"3 of 24 .*Crayon_Dogs_seed188.jpg.*3 other.*_seed_188"):
        scan.require()
    scan.require(allow_missing=True)
    with pytest.raises(DataError, match="12 of 12"):  # told or not: of nothing no score
        scan_answers(tmp_path, SMALL, THINGS, (588,)).require(allow_missing=True)
    assert len(scan_answers(tmp_path).missing) == 5100 - 21
    with pytest.raises(DataError, match="no such folder"):
        scan_answers(tmp_path / "x")


def test_a_perfect_classifier_on_the_original_model() -> None:
    for target in ("Crayon", "Dogs"):
        assert ua_ira_cra(answers(), target).values == {"UA": 0.0, "IRA": 1.0, "CRA": 1.0}
    found = ua_ira_cra(answers(), ("Crayon", "Dogs"))
    assert found.values == {"UA": 0.0, "SC": 1.0, "OC": 1.0, "UP": 1.0}


@pytest.mark.parametrize("photos", [False, True])
@pytest.mark.parametrize("target", ["Crayon", "Dogs", ("Crayon", "Dogs")])
def test_scores_agree_with_counting_by_hand(target: Any, photos: bool) -> None:
    table = answers(noisy(3))
    rows = list(
        zip(table.style, table.object, table.predicted_style, table.predicted_object, strict=True)
    )
    rows = [row for row in rows if photos or row[0] != PHOTOS]
    styles = [style for style in SMALL if photos or style != PHOTOS]

    def share(true: int, predicted: int, label: str) -> float:
        hits = [row[predicted] == label for row in rows if row[true] == label]
        return sum(hits) / len(hits)

    def joint(keep: Callable[[str, str], bool]) -> float:
        hits = [row[0] == row[2] and row[1] == row[3] for row in rows if keep(row[0], row[1])]
        return sum(hits) / len(hits)

    s = {style: share(0, 2, style) for style in styles}
    o = {name: share(1, 3, name) for name in THINGS}
    if target == "Crayon":
        ira = np.mean([value for style, value in s.items() if style != target])
        wanted = {"UA": 1 - s["Crayon"], "IRA": ira, "CRA": np.mean(list(o.values()))}
    elif target == "Dogs":
        ira = np.mean([value for name, value in o.items() if name != target])
        wanted = {"UA": 1 - o["Dogs"], "IRA": ira, "CRA": np.mean(list(s.values()))}
    else:
        a, b = target
        wanted = {
            "UA": 1 - joint(lambda x, y: x == a and y == b),
            "SC": joint(lambda x, y: x == a and y != b),
            "OC": joint(lambda x, y: x != a and y == b),
            "UP": joint(lambda x, y: x != a and y != b),
        }
    found = ua_ira_cra(table, target, photos=photos)
    assert found.values == pytest.approx(wanted)
    assert (found.images, found.missing) == (24 if photos else 18, 0)


def test_order_of_rows_does_not_matter() -> None:
    table = answers(noisy(5))
    order = np.random.default_rng(0).permutation(24).tolist()
    names = ("style", "object", "seed", "predicted_style", "predicted_object")
    mixed = [[getattr(table, name)[i] for i in order] for name in names]
    again = Answers(*mixed, styles=SMALL, objects=THINGS, seeds=(188, 288))
    assert ua_ira_cra(again, "Sea") == ua_ira_cra(table, "Sea")


def test_missing_answers_never_count() -> None:
    lost = answers(noisy(4), without=lambda s, o, k: (s, k) == ("Crayon", 188))
    with pytest.raises(DataError, match=r"3 of 18 answers are missing: Crayon_Dogs_seed188\.jpg"):
        ua_ira_cra(lost, "Winter")
    found = ua_ira_cra(lost, "Winter", allow_missing=True)
    assert (found.images, found.missing) == (15, 3)
    crayon = [
        p == "Crayon"
        for t, p in zip(lost.style, lost.predicted_style, strict=True)
        if t == "Crayon"
    ]
    assert len(crayon) == 3 and found.style_accuracy["Crayon"] == sum(crayon) / 3
    without_target = answers(without=lambda s, o, k: s == "Crayon")
    for allow in (False, True):  # not UA 1, whatever is allowed
        with pytest.raises(DataError, match="Crayon"):
            ua_ira_cra(without_target, "Crayon", allow_missing=allow)
    # Photos that are not there matter only where photos count.
    no_photos = answers(without=lambda s, o, k: s == PHOTOS)
    assert ua_ira_cra(no_photos, "Crayon").missing == 0
    with pytest.raises(DataError, match="6 of 24"):
        ua_ira_cra(no_photos, "Crayon", photos=True)


def test_a_wrong_table_is_refused() -> None:
    row: list[Any] = [["Crayon"], ["Dogs"], [188], ["Crayon"], ["Dogs"]]
    with pytest.raises(DataError, match="twice"):
        Answers(*[column * 2 for column in row])
    with pytest.raises(DataError, match="does not belong"):
        Answers(*row, seeds=(288,))
    with pytest.raises(DataError, match="one length"):
        Answers(["Crayon", "Joy"], *row[1:])
    with pytest.raises(ConfigError, match="Dogs"):
        ua_ira_cra(answers(), "Dog")
    with pytest.raises(ConfigError, match="photos"):
        ua_ira_cra(answers(), PHOTOS)
    assert ua_ira_cra(answers(), PHOTOS, photos=True).values["UA"] == 0


def test_confusion_counts_every_image_once() -> None:
    table = answers(lambda s, o, k: ("Monet" if s == "Crayon" else s, o))
    labels, counts = table.confusion("style")
    assert labels == (*SMALL, "Monet")
    assert counts.sum() == 24 and counts[1, 4] == 6 and counts[1, 1] == 0
    assert np.array_equal(table.confusion("object")[1], np.diag([8, 8, 8]))


def test_averages_are_percent_over_one_kind() -> None:
    wrong = answers(lambda s, o, k: ("Winter" if s == "Crayon" else s, o))
    results = [ua_ira_cra(wrong, "Crayon"), ua_ira_cra(answers(), "Van_Gogh")]
    assert average(results) == {"UA": 50.0, "IRA": 100.0, "CRA": 100.0}
    for bad in ([], [results[0], ua_ira_cra(answers(), "Dogs")]):
        with pytest.raises(DataError, match="one kind"):
            average(bad)


def test_a_sequence_shows_rebound_and_what_is_kept() -> None:
    def forgot(*gone: str) -> Answers:
        return answers(lambda s, o, k: (PHOTOS if s in gone else s, "Sea" if o in gone else o))

    steps = sequential(
        [
            ("Crayon", forgot("Crayon")),
            ("Dogs", forgot("Dogs", "Winter")),
            ("Winter", forgot("Winter")),
        ]
    )
    assert steps[0].ua == {"Crayon": 1.0} and steps[0].retain == 1.0
    assert steps[1].ua == {"Crayon": 0.0, "Dogs": 1.0}  # Crayon came back
    assert (steps[1].style_retain, steps[1].object_retain, steps[1].retain) == (0.5, 1.0, 0.75)
    assert steps[2].ua == {"Crayon": 0.0, "Dogs": 0.0, "Winter": 1.0}
    with pytest.raises(ConfigError, match="once"):
        sequential([("Crayon", answers()), ("Crayon", answers())])


def test_both_sides_of_the_fid_leave_out_the_target(tmp_path: Path) -> None:
    root = folder_copy(tmp_path / "real", images=3)
    for key in product(("Monet", "Van_Gogh", PHOTOS), ("Cats", "Sea"), (188, 288)):
        touch(tmp_path / "drawn" / answer_name(*key))
    scan = scan_answers(
        tmp_path / "drawn", ("Monet", "Van_Gogh", PHOTOS), ("Cats", "Sea"), (188, 288)
    )
    rows = read_canvas(root, scan.styles, scan.objects, images=3)
    drawn, held = fid_sides(scan, rows, "Monet", images=2)
    assert len(drawn) == 2 * 2 * 2 and len(held) == 2 * 2 * 2
    assert not [path for path in (*drawn, *held) if "Monet" in str(path.relative_to(tmp_path))]
    drawn, held = fid_sides(scan, rows, "Cats", images=2)
    assert len(drawn) == 6 and {path.parent.name for path in held} == {"Sea"}
    with pytest.raises(DataError, match=r"2 pairs have under 2.*Seed_Images/Cats"):
        fid_sides(scan, [row for row in rows if row.style != PHOTOS], "Monet", images=2)


@real
def test_the_published_lists_are_the_constants() -> None:
    root = Path(os.environ["MMFORGET_REAL_DATA"]) / "unlearncanvas"

    def listed(name: str) -> tuple[str, ...]:
        return tuple((root / f"{name}.txt").read_text().split())

    assert listed("styles_60") == STYLES_60
    assert listed("styles_50") == STYLES
    assert listed("styles_60_only_extra_10") == EXTRA_STYLES
    assert listed("style_classifier_labels_51") == THEMES
    assert listed("objects_20") == OBJECTS
    for target, count in (("Dogs", 153), ("Van_Gogh", 60), (PHOTOS, 60)):
        rows = read_forget_list(root / "forget_lists", target, Path("data"), check=False)
        assert [row[:3] for row in rows] == forget_list(target) and len(rows) == count
        assert all(parse_caption(row.prompt) == row[:2] for row in rows)
    for name in OBJECTS:
        assert len(read_anchors(root / "anchor_prompts", name)) == 80
    assert len(read_anchors(root / "anchor_prompts", "Van_Gogh")) == 200
