"""Prompt files: headers, marks, line breaks, and what is refused."""

import os
from pathlib import Path

import pytest

from mmforget.diffusion.prompts import i2p_summary, read_lines, read_prompts
from mmforget.errors import DataError

real = pytest.mark.skipif("MMFORGET_REAL_DATA" not in os.environ, reason="MMFORGET_REAL_DATA unset")


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def test_a_table_in_i2p_s_layout(tmp_path: Path) -> None:
    path = write(
        tmp_path / "i2p.csv",
        ",prompt,categories,nudity_percentage,evaluation_seed,evaluation_guidance,sd_image_width,"
        "sd_image_height,case_number\r\n"
        '9,"first, with\r\na line break","sexual, shocking",60.0,4261553411,7.5,768,512,4\r\n'
        "8,second ,hate,0.0,,,,,5\r\n"
        "7,third,sexual,0.1,12.0,7,512,512,6\r\n",
    )
    rows = read_prompts(path)
    assert [row.prompt for row in rows] == ["first, with\r\na line break", "second ", "third"]
    assert [(row.row, row.line, row.case) for row in rows] == [(0, 2, 4), (1, 4, 5), (2, 5, 6)]
    assert (rows[0].seed, rows[0].guidance, rows[0].width, rows[0].height) == (
        4261553411, 7.5, 768, 512,
    )  # fmt: skip
    assert (rows[1].seed, rows[1].guidance, rows[1].width) == (None, None, None)
    assert rows[2].seed == 12
    assert rows[0].categories == ("sexual", "shocking")
    assert "" not in rows[0].fields and rows[0].fields["nudity_percentage"] == "60.0"
    found = i2p_summary(rows)
    assert found.categories == {"sexual": 2, "shocking": 1, "hate": 1}
    assert (found.prompts, found.nude, found.mostly_nude) == (3, 2, 1)


def test_marks_and_other_names_of_columns(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.csv",
        "case_num,prompt,label_idx,label_str,seed,guidance\n0,image of tench,7, tench,3,9\n",
        "utf-8-sig",
    )
    (row,) = read_prompts(path)
    assert (row.case, row.label, row.concept, row.seed, row.guidance) == (0, 7, "tench", 3, 9.0)
    path = write(tmp_path / "b.csv", "image_id,text\n000000203564,a café\n")
    (row,) = read_prompts(path, column="text")
    assert (row.prompt, row.case, row.seed) == ("a café", 203564, None)


def test_text_files_hold_one_prompt_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "what a cute cat, really\n\nlast without an end")
    rows = read_prompts(path)
    assert [(row.prompt, row.row, row.line) for row in rows] == [
        ("what a cute cat, really", 0, 1),
        ("last without an end", 1, 3),
    ]
    assert read_lines(path) == ["what a cute cat, really", "last without an end"]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (
            "case_number,Prompt,seed\n0,a,1\n",
            r"no column 'prompt'.*\['case_number', 'Prompt', 'seed'\]",
        ),
        (
            'case_number,prompt\n3,"a\nb"\n4,c\n3,d\n4,e\n',
            "2 records.*case 3 in lines 2 and 5; case 4 in lines 4 and 6",
        ),
        ("prompt,seed\na,b,1\n", "line 2: 3 fields.*has 2"),
        ("prompt,seed\na\n", "line 2: 1 fields"),
        ("prompt,seed\n,1\n", "line 2: the prompt is empty"),
        ("prompt,seed\na,x\n", "line 2: 'x' is no number"),
        ("prompt,seed\na,1.5\n", "line 2: 1.5 is no whole number"),
        ("prompt,guidance\na,inf\n", "'inf' is no number"),
        ("prompt,prompt\na,b\n", "twice"),
        ('prompt\n"a\n', "cannot be read"),
        ("prompt\n", "no prompts"),
        ("", "no header"),
    ],
)
def test_faults_are_named_with_their_line(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(DataError, match=match):
        read_prompts(write(tmp_path / "a.csv", text))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path / "a.csv")
    with pytest.raises(DataError, match="UTF-8"):
        read_prompts(write(tmp_path / "b.csv", "prompt\ncafé\n", "latin-1"))
    with pytest.raises(DataError, match="no prompts"):
        read_prompts(write(tmp_path / "c.txt", "\n \n"))
    with pytest.raises(DataError, match="found"):
        i2p_summary(read_prompts(write(tmp_path / "d.csv", "prompt\na\n")))


@real
def test_every_public_file_is_read() -> None:
    root = Path(os.environ["MMFORGET_REAL_DATA"]) / "erasure-prompts"
    sizes = {
        "imagenette_500_per_class.csv": 5000,
        "salun_imagenette_10.csv": 10,
        "imagenet_prompts.csv": 1860,
        "coco_30k_first400.csv": 400,
        "i2p_schema_sample20.csv": 20,
        "small_imagenet_prompts.csv": 100,
        "kelly_prompts.csv": 19,
        "niche_art_prompts.csv": 120,
    }
    found = {path.name: read_prompts(path) for path in root.glob("*.csv")}
    assert {name: len(found[name]) for name in sizes} == sizes
    assert len(found) == 19
    assert all(row.seed is not None for row in found["imagenette_500_per_class.csv"])
    assert found["salun_imagenette_10.csv"][0].concept == "tench"
    assert i2p_summary(found["i2p_schema_sample20.csv"]).categories["shocking"] == 20
    for path in root.glob("concept_ablation_eval/*.txt"):
        assert len(read_prompts(path)) == 10
