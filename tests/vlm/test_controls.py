"""POPE and MME as their copies lie on a disk: read, or refused with all faults named."""

import json
from pathlib import Path
from typing import Any

import pytest

from mmforget.errors import DataError
from mmforget.vlm.controls import MmeImage, PopeQuestion, read_mme, read_pope
from mmforget.vlm.text_scores import mme_score, pope_score


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def record(number: Any, **changed: Any) -> dict[str, Any]:
    made = {
        "question_id": number,
        "image": f"COCO_{number}.jpg",
        "text": "Is there a dog in the image?",
        "label": "yes",
    }
    return {key: value for key, value in {**made, **changed}.items() if value is not None}


def pope(folder: Path, *records: Any, array: bool = False) -> tuple[Path, Path]:
    for one in range(1, 5):
        touch(folder / "val2014" / f"COCO_{one}.jpg")
    lines = [json.dumps(one) for one in records]
    text = "[" + ",\n".join(lines) + "]" if array else "\n".join([*lines, "", ""])
    (folder / "coco_pope_random.json").write_text(text)
    return folder / "coco_pope_random.json", folder / "val2014"


@pytest.mark.parametrize("array", [False, True])
def test_pope_in_both_forms(tmp_path: Path, array: bool) -> None:
    place = pope(tmp_path, record(2), record(1, label="No", more=1), record("3"), array=array)
    found = read_pope(*place)
    image = tmp_path / "val2014" / "COCO_2.jpg"
    assert found[0] == PopeQuestion("2", image, "Is there a dog in the image?", "yes")
    assert [(one.id, one.label) for one in found] == [("2", "yes"), ("1", "no"), ("3", "yes")]
    answers = ["Yes", "no", "well"]
    assert pope_score([one.label for one in found], answers).accuracy == pytest.approx(2 / 3)


def test_pope_with_a_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    path, images = pope(tmp_path, record(1), record(2))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert len(read_pope(path, images)) == 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (record(1, label=None), "line 2: without label"),
        (record(1, label=None, image=None), "without image, label"),
        (record(1, label="maybe"), "'maybe' is neither yes nor no"),
        (record(1, label=True), "True is neither yes nor no"),
        (record(1, image=5), "image 5 is no text"),
        (record(1, text=" "), "text ' ' is no text"),
        (record(1.5), "question_id 1.5"),
        (record(True), "question_id True"),
        (record(3), "question_id 3 comes twice"),
        (record("3"), "question_id 3 comes twice"),
        (record(9), "COCO_9.jpg is not in"),
        ([1], r"\[1\] is no object"),
    ],
)
def test_a_wrong_record_of_pope_is_refused(tmp_path: Path, bad: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_pope(*pope(tmp_path, record(3), bad))


def test_faults_of_pope_are_counted(tmp_path: Path) -> None:
    bad = [record(number) for number in range(10, 18)]
    with pytest.raises(DataError, match=r"8 faults: line 2: COCO_10.jpg.*COCO_14.jpg.* \.\.\."):
        read_pope(*pope(tmp_path, record(1), *bad))


def test_pope_that_is_not_there(tmp_path: Path) -> None:
    path, images = pope(tmp_path)
    with pytest.raises(DataError, match="holds no questions"):
        read_pope(path, images)
    with pytest.raises(DataError, match="no such folder"):
        read_pope(path, tmp_path / "elsewhere")
    with pytest.raises(DataError, match="cannot be read"):
        read_pope(tmp_path / "none.json", images)
    path.write_text('{"question_id": 1,\n')
    with pytest.raises(DataError, match="line 1 is no JSON"):
        read_pope(path, images)
    path.write_text("[{]")
    with pytest.raises(DataError, match="no JSON array"):
        read_pope(path, images)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        read_pope(path, images)


LINES = "Is it a dog? Please answer yes or no.\tYes\nIs it a cat? Please answer yes or no.\tNo\n"


def side_by_side(folder: Path, *names: str, text: str = LINES) -> Path:
    for name in names:
        touch(folder / name).with_suffix(".txt").write_text(text)
    return folder


def apart(folder: Path, *names: str) -> Path:
    for name in names:
        touch(folder / "images" / name)
        touch(folder / "questions_answers_YN" / name).unlink()
        (folder / "questions_answers_YN" / name).with_suffix(".txt").write_text(LINES)
    return folder


def test_mme_in_both_layouts(tmp_path: Path) -> None:
    side_by_side(tmp_path / "existence", "0002.jpg", "0001.jpg")
    apart(tmp_path / "artwork", "10.png")
    touch(tmp_path / "eval_tool" / "calculation.py")
    touch(tmp_path / ".cache" / "x")
    touch(tmp_path / "README.md")
    found = read_mme(tmp_path)
    asked = ("Is it a dog? Please answer yes or no.", "Is it a cat? Please answer yes or no.")
    image = tmp_path / "artwork" / "images" / "10.png"
    assert found[0] == MmeImage("artwork", image, asked, ("yes", "no"))
    names = [(one.task, one.image.name) for one in found[1:]]
    assert names == [("existence", "0001.jpg"), ("existence", "0002.jpg")]
    assert [one.task for one in read_mme(tmp_path, ["existence"])] == ["existence"] * 2
    labels = [one.labels for one in found]
    assert mme_score(labels, [["yes", "no"]] * 3).score == 200


def test_mme_lines_may_end_in_any_way(tmp_path: Path) -> None:
    text = "\ufeff" + LINES.replace("\n", " \r\n") + "\r\n"
    found = read_mme(side_by_side(tmp_path / "color", "1.jpg", text=text).parent)
    assert found[0].labels == ("yes", "no") and found[0].questions[0].startswith("Is it a dog")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it has 0 lines"),
        (LINES + LINES, "it has 4 lines"),
        (LINES.replace("\t", " "), "line 1 is not question<TAB>answer"),
        ("\tYes\n" + LINES.split("\n")[1], "line 1 is not question<TAB>answer"),
        (LINES.replace("No", "Maybe"), "line 2: the answer 'Maybe' is neither yes nor no"),
    ],
)
def test_a_wrong_text_of_mme_is_refused(tmp_path: Path, text: str, message: str) -> None:
    side_by_side(tmp_path / "count", "1.jpg", text=text)
    with pytest.raises(DataError, match=rf"1 faults: count/1\.txt: {message}"):
        read_mme(tmp_path)


def test_images_and_texts_of_mme_must_pair_up(tmp_path: Path) -> None:
    task = side_by_side(tmp_path / "scene", "1.jpg", "2.jpg")
    touch(task / "3.png")
    (task / "2.jpg").unlink()
    touch(task / "1.png")
    with pytest.raises(DataError, match="3 faults") as error:
        read_mme(tmp_path)
    for fault in ("3.png has no text", "2.txt has no image", "1.jpg and 1.png share a text"):
        assert f"scene: {fault}" in str(error.value)


def test_mme_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        read_mme(tmp_path / "none")
    with pytest.raises(DataError, match="no folders of sub-tasks"):
        read_mme(tmp_path)
    touch(tmp_path / "landmark" / "images" / "1.jpg")
    with pytest.raises(DataError, match="only one of the folders"):
        read_mme(tmp_path)
    with pytest.raises(DataError, match="no folders of sub-tasks color"):
        read_mme(tmp_path, ["color", "landmark"])
    (tmp_path / "OCR").mkdir()
    with pytest.raises(DataError, match="OCR: it holds no images"):
        read_mme(tmp_path, ["OCR"])
