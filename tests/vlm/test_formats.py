"""Reading FIUBench and SafeEraser: every field, every place of an image, and every fault."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmforget.errors import DataError
from mmforget.vlm.formats import (
    QA,
    HarmPair,
    Plain,
    ids_of,
    read_fiubench,
    read_safeeraser,
    read_text_only,
    refusals,
    retain_ids,
    text_only_question,
)

real = pytest.mark.skipif("MMFORGET_REAL_DATA" not in os.environ, reason="MMFORGET_REAL_DATA unset")

Change = Callable[[dict[str, Any]], Any]


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2)).save(path)


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def person(number: int, questions: int = 2) -> dict[str, Any]:
    return {
        "image_path": f"./dataset/SFHQ/SFHQ_pt1_{number:08d}.jpg",
        "name": f"Mara Quill{number}",
        "gender": "female",
        "unique_id": f"{number:08d}",
        "caption": "A profile.",
        "raw_data": {"job": "none"},
        "qa_list": [
            {
                "question": f"Question {k}?",
                "paraphrased_question": [f"Again {k}{letter}?" for letter in "abc"],
                "answer": f"Answer {k} of {number}.",
                "paraphrased_answer": f"Other answer {k}.",
                "perturbed_answer": [f"Wrong {k}{letter}." for letter in "abc"],
                "keywords": ["of", str(number)],
            }
            for k in range(questions)
        ],
    }


PEOPLE = [person(number) for number in range(1, 9)]
LISTS = {
    "forget1": ["00000003"],
    "forget5": ["00000001", "00000005"],
    "forget10": ["00000007"],
    "retain5": ["00000002"],
    "retain15": ["00000002", "00000008"],
}


def fiubench(
    root: Path,
    people: list[dict[str, Any]] | None = None,
    lists: Any = LISTS,
    prompts: Any = None,
    images: bool = True,
) -> Path:
    people = PEOPLE if people is None else people
    write(root / "full.json", people)
    write(root / "split.json", lists)
    write(root / "prompt.json", {"idk": ["No."], "icd": ["All."]} if prompts is None else prompts)
    for record in people if images else ():
        picture(root / record["image_path"])
    return root


def test_every_field_is_read(tmp_path: Path) -> None:
    files = read_fiubench(fiubench(tmp_path))
    assert [each.id for each in files.persons] == [f"{number:08d}" for number in range(1, 9)]
    second = files.persons[1]
    assert (second.name, second.gender, second.caption) == ("Mara Quill2", "female", "A profile.")
    assert second.image.samefile(tmp_path / "dataset" / "SFHQ" / "SFHQ_pt1_00000002.jpg")
    assert second.qa[1] == QA(
        question="Question 1?",
        paraphrases=("Again 1a?", "Again 1b?", "Again 1c?"),
        answer="Answer 1 of 2.",
        paraphrased_answer="Other answer 1.",
        wrong=("Wrong 1a.", "Wrong 1b.", "Wrong 1c."),
        keywords=("of", "2"),
    )
    assert (files.idk, files.icd, files.notes, files.root) == (("No.",), ("All.",), (), tmp_path)
    assert refusals(files) == ("No.",)
    assert ids_of(files, "forget5") == ("00000001", "00000005")
    left = ("00000002", "00000004", "00000006", "00000008")
    assert retain_ids(files.persons, files.splits) == left


@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_json_lines_are_the_same(tmp_path: Path, start: str) -> None:
    array = read_fiubench(fiubench(tmp_path))
    lines = "\n\n".join(json.dumps(record) for record in PEOPLE)
    (tmp_path / "full.json").write_text(start + lines + "\n", encoding="utf-8")
    assert read_fiubench(tmp_path) == array
    (tmp_path / "full.json").write_text(f"{start}\n {json.dumps(PEOPLE)}", encoding="utf-8")
    assert read_fiubench(tmp_path) == array


@pytest.mark.parametrize(
    ("files", "images", "named"),
    [
        ("", "dataset/SFHQ", ""),  # the repository
        ("dataset", "dataset/SFHQ", ""),  # the same, files where they are published
        ("dataset", "dataset/SFHQ", "dataset"),  # the folder of the data set
        ("data", "data/SFHQ", "data"),  # the data set under another name
        ("", "SFHQ", ""),
    ],
)
def test_images_are_found_where_users_have_them(
    tmp_path: Path, files: str, images: str, named: str
) -> None:
    fiubench(tmp_path / files, PEOPLE[:2], {}, images=False)
    for record in PEOPLE[:2]:
        picture(tmp_path / images / Path(record["image_path"]).name)
    found = read_fiubench(tmp_path / named).persons
    assert [each.image.parent for each in found] == [tmp_path / images] * 2


def test_only_the_first_400_records_count(tmp_path: Path) -> None:
    people = [person(number, 1) for number in range(400)]
    root = fiubench(tmp_path, [*people, {"unique_id": 7, "image_path": "x.jpg"}], {})
    files = read_fiubench(root)
    assert len(files.persons) == 400
    assert files.notes == ("full.json: the first 400 of 401 records are used",)


def test_a_list_may_name_persons_that_are_not_there(tmp_path: Path) -> None:
    lists = {**LISTS, "forget10": ["00000007", "00004711"], "extra": []}
    files = read_fiubench(fiubench(tmp_path, lists=lists))
    assert files.notes == ("split.json: forget10 names 1 persons that full.json lacks",)
    assert ids_of(files, "forget1") == ("00000003",)
    with pytest.raises(DataError, match=r"forget10 names 1 of 2 persons .* hold: 00004711"):
        ids_of(files, "forget10")
    with pytest.raises(DataError, match=r"unknown list of ids 'forget15'\. Close: forget5"):
        ids_of(files, "forget15")
    with pytest.raises(DataError, match="extra is empty"):
        ids_of(files, "extra")


def test_refusals_are_missed_only_when_they_are_asked_for(tmp_path: Path) -> None:
    (fiubench(tmp_path) / "prompt.json").unlink()
    files = read_fiubench(tmp_path)
    assert files.idk == files.icd == ()
    assert files.notes == ("prompt.json is missing: there are no refusals",)
    with pytest.raises(DataError, match=r"no prompt\.json"):
        refusals(files)
    for prompts, message in (
        ({}, "no field 'idk'"),
        ({"idk": []}, "idk has 0 values"),
        ({"idk": "No."}, "idk must be a list, but is a string"),
        ({"idk": ["No.", " "]}, "idk value 2 is empty"),
        (["No."], "must be an object with named fields, but is a list"),
    ):
        with pytest.raises(DataError, match=rf"prompt\.json.*{message}"):
            read_fiubench(fiubench(tmp_path, prompts=prompts))


def _qa(record: dict[str, Any]) -> dict[str, Any]:
    asked: dict[str, Any] = record["qa_list"][1]
    return asked


FAULTS: dict[str, tuple[Change, str]] = {
    "numeric id": (lambda r: r.update(unique_id=44363), 'number 44363.*zeros.*"00044363"'),
    "short id": (lambda r: r.update(unique_id="44363"), "unique_id must be a string of 8 digits"),
    "no id": (lambda r: r.pop("unique_id"), "no field 'unique_id'; it has image_path"),
    "no image": (lambda r: r.pop("image_path"), r"\(00000003\) has no field 'image_path'"),
    "empty image": (lambda r: r.update(image_path=""), "image_path is empty"),
    "numeric name": (lambda r: r.update(name=3), "name must be a string, but is a number"),
    "null caption": (lambda r: r.update(caption=None), "caption must be a string, but is null"),
    "no questions": (lambda r: r.update(qa_list=[]), "qa_list has 0 values"),
    "questions in an object": (
        lambda r: r.update(qa_list={}),
        "qa_list must be a list, but is an object",
    ),
    "question as text": (
        lambda r: r["qa_list"].__setitem__(1, "Who?"),
        "qa_list 2 must be an object with named fields, but is a string",
    ),
    "empty question": (lambda r: _qa(r).update(question=" "), "qa_list 2: question is empty"),
    "empty answer": (lambda r: _qa(r).update(answer=""), "qa_list 2: answer is empty"),
    "no paraphrase of the answer": (
        lambda r: _qa(r).pop("paraphrased_answer"),
        "qa_list 2 has no field 'paraphrased_answer'",
    ),
    "two paraphrases": (
        lambda r: _qa(r)["paraphrased_question"].pop(),
        "qa_list 2: paraphrased_question has 2 values, but at least 3",
    ),
    "two wrong answers": (
        lambda r: _qa(r)["perturbed_answer"].pop(),
        "qa_list 2: perturbed_answer has 2 values, but at least 3",
    ),
    "wrong answer as number": (
        lambda r: _qa(r)["perturbed_answer"].__setitem__(0, True),
        "perturbed_answer value 1 must be a string, but is true or false",
    ),
    "keywords as text": (
        lambda r: _qa(r).update(keywords="of"),
        "keywords must be a list, but is a string",
    ),
    "empty keyword": (  # it would be found in every answer
        lambda r: _qa(r)["keywords"].append(""),
        "keywords value 3 is empty",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_names_file_record_and_field(tmp_path: Path, name: str) -> None:
    people = json.loads(json.dumps(PEOPLE))
    change, message = FAULTS[name]
    fiubench(tmp_path)
    change(people[2])
    write(tmp_path / "full.json", people)
    with pytest.raises(DataError, match=rf"(?s)^full\.json record 3.*{message}"):
        read_fiubench(tmp_path)


def test_ids_that_occur_twice(tmp_path: Path) -> None:
    root = fiubench(tmp_path, [*PEOPLE, person(4)])
    with pytest.raises(DataError, match=r"record 9 .*'00000004' occurs twice, first in .*record 4"):
        read_fiubench(root)


def test_missing_images_are_counted_and_named(tmp_path: Path) -> None:
    root = fiubench(tmp_path)
    for number in (2, 3, 4, 6):
        (root / "dataset" / "SFHQ" / f"SFHQ_pt1_{number:08d}.jpg").unlink()
    with pytest.raises(DataError, match=r"4 of 8 images.*record 2 \(00000002\).*and 1 more"):
        read_fiubench(root)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({**LISTS, "forget10": ["00000005"]}, "forget5 and forget10 share 00000005"),
        ({**LISTS, "forget1": ["00000008"]}, "forget1 and retain15 share 00000008"),
        ({**LISTS, "forget5": ["00000001"] * 2}, "forget5: the id '00000001' occurs twice"),
        ({**LISTS, "forget5": [1]}, "forget5 value 1 is the number 1, so zeros"),
        ({**LISTS, "forget5": [None]}, "forget5 value 1 must be a string of 8 digits"),
        ({**LISTS, "forget5": "00000001"}, "forget5 must be a list, but is a string"),
        ([], "must be an object"),
    ],
)
def test_wrong_lists_of_ids(tmp_path: Path, lists: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"^split\.json.*{message}"):
        read_fiubench(fiubench(tmp_path, lists=lists))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"unique_id": "00000001"', "is no JSON"),
        (b'{"unique_id":\n"00000001"}', "neither a JSON array nor JSON Lines: line 1"),
        (b'{"a": 1}\n{"a": 1', "neither a JSON array nor JSON Lines: line 2"),
        (b"name,question", "neither a JSON array nor JSON Lines: line 1"),
        (b"", "holds no records"),
        (b"[]", "holds no records"),
        (b"[3]", "record 1 must be an object with named fields, but is a number"),
        (b"\xff\xfe[]", "cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "neither"),
    ],
)
def test_files_that_are_no_records(tmp_path: Path, content: bytes, message: str) -> None:
    (fiubench(tmp_path) / "full.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"full\.json.*{message}"):
        read_fiubench(tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither full\.json nor dataset/full\.json"):
        read_fiubench(tmp_path)
    (fiubench(tmp_path) / "split.json").write_text("{")
    with pytest.raises(DataError, match=r"split\.json is no JSON"):
        read_fiubench(tmp_path)
    (tmp_path / "split.json").unlink()
    with pytest.raises(DataError, match=r"neither split\.json"):
        read_fiubench(tmp_path)


@pytest.mark.parametrize(
    ("question", "named"),
    [
        ("Where does the person in the image live?", "Where does Ann Lee live?"),
        ("Who is this person?", "Who is Ann Lee?"),
        ("Can you tell me this person's name?", "Can you tell me Ann Lee's name?"),
        ("Which job does the person shown have?", "Which job does Ann Lee have?"),
        ("The individual in this photo earns what?", "Ann Lee earns what?"),
        ("What do the people in the image speak?", "What does Ann Lee speak?"),
    ],
)
def test_a_name_takes_the_place_of_the_person(question: str, named: str) -> None:
    assert text_only_question(question, "Ann Lee") == named


def test_names_are_taken_as_they_are() -> None:
    assert text_only_question("Who is this person?", r"A\1 \g<0>") == r"Who is A\1 \g<0>?"
    for question in ("Who lives here?", "What does the personnel do?"):
        with pytest.raises(DataError, match="no name can stand there"):
            text_only_question(question, "Ann")


def text_only(**changes: Any) -> dict[str, Any]:
    return {
        "identity_id": "00044363",
        "name": "Ann Lee",
        "original_question": "Who is it?",
        "answer": "Ann.",
        "text_only_question": "Who is Ann Lee?",
        "template": "template1",
        **changes,
    }


def test_text_only_records(tmp_path: Path) -> None:
    write(tmp_path / "a.json", [text_only(), text_only(answer="Lee.")])
    first, second = read_text_only(tmp_path / "a.json")
    assert (first.id, first.name, first.template) == ("00044363", "Ann Lee", "template1")
    assert (first.original, first.question) == ("Who is it?", "Who is Ann Lee?")
    assert (first.answer, second.answer) == ("Ann.", "Lee.")
    write(tmp_path / "a.json", [text_only(), text_only(identity_id=44363)])
    with pytest.raises(DataError, match=r"a\.json record 2: identity_id is the number 44363"):
        read_text_only(tmp_path / "a.json")


def plain(text: str) -> dict[str, str]:
    return {"Question": f"{text}?", "Answer": text, "Prediction": f"A longer {text}."}


def eraser(number: int, category: str = "Weapon", folder: str = "Weapon") -> dict[str, Any]:
    return {
        "type": "syn" if number % 2 else "real",
        "keyword": f"Key{number}",
        "category": category,
        "image_id": f"img/{folder}/{number}.jpg",
        "image_path": f"dataset/img/{folder}/{number}.jpg",
        "SDImage_path": f"dataset/pdset/image/{folder}/train/{number}.jpg",
        "unsafe_pairs": [
            {"question": f"Q{k}?", "model_response": f"Harm {k}.", "sd_response": f"Safe {k}."}
            for k in range(4)
        ],
        **{f"UnharmPair_text{k}": plain(f"text {k}") for k in (1, 2)},
        **{f"UnharmPair_image{k}": plain(f"image {k}") for k in (1, 2)},
    }


def safeeraser(root: Path, train: list[dict[str, Any]], val: list[dict[str, Any]]) -> Path:
    write(root / "all_train.json", train)
    write(root / "all_val.json", val)
    write(root / "prompt.json", {"idk": ["No.", "Never."]})
    for record in (*train, *val):
        for field in ("image_path", "SDImage_path"):
            if isinstance(record.get(field), str) and record[field]:
                picture(root / record[field])
    return root


def test_safeeraser_is_read(tmp_path: Path) -> None:
    root = safeeraser(tmp_path, [eraser(1), eraser(2)], [eraser(3)])
    files = read_safeeraser(root)
    assert [each.id for each in files.train] == ["img/Weapon/1.jpg", "img/Weapon/2.jpg"]
    (val,) = files.val
    assert (val.keyword, val.kind, val.category) == ("Key3", "syn", "Weapon")
    assert files.train[1].kind == "real"
    assert val.image == root / "dataset" / "img" / "Weapon" / "3.jpg"
    assert val.safe_image == root / "dataset" / "pdset" / "image" / "Weapon" / "train" / "3.jpg"
    assert val.pairs[2] == HarmPair("Q2?", "Harm 2.", "Safe 2.") and len(val.pairs) == 4
    assert val.texts == tuple(
        Plain(f"text {k}?", f"text {k}", f"A longer text {k}.") for k in (1, 2)
    )
    assert val.images[1] == Plain("image 2?", "image 2", "A longer image 2.")
    assert (files.idk, files.notes) == (("No.", "Never."), ())


@pytest.mark.parametrize(
    ("category", "folder", "wanted"),
    [
        ("", "Violence", "Violence"),
        (" ", "Hatespeech", "HateSpeech"),
        ("Hatespeech", "HateSpeech", "HateSpeech"),
        ("Baking", "Weapon", "Baking"),
    ],
)
def test_a_category_may_be_that_of_the_folder(
    tmp_path: Path, category: str, folder: str, wanted: str
) -> None:
    files = read_safeeraser(safeeraser(tmp_path, [eraser(1, category, folder)], [eraser(2)]))
    assert files.train[0].category == wanted
    assert len(files.notes) == (not category.strip())


def test_safeeraser_below_its_dataset_folder(tmp_path: Path) -> None:
    safeeraser(tmp_path, [eraser(1)], [eraser(2)])
    for name in ("all_train.json", "all_val.json", "prompt.json"):
        (tmp_path / name).rename(tmp_path / "dataset" / name)
    assert len(read_safeeraser(tmp_path).train) == 1
    (tmp_path / "dataset").rename(tmp_path / "data")
    files = read_safeeraser(tmp_path / "data")
    assert files.val[0].image == tmp_path / "data" / "img" / "Weapon" / "2.jpg"
    (tmp_path / "data" / "prompt.json").unlink()
    with pytest.raises(DataError, match=r"no prompt\.json"):
        refusals(read_safeeraser(tmp_path / "data"))
    (tmp_path / "data" / "all_val.json").unlink()
    with pytest.raises(DataError, match=r"neither all_val\.json"):
        read_safeeraser(tmp_path / "data")


ERASER_FAULTS: dict[str, tuple[Change, str]] = {
    "three pairs": (lambda r: r["unsafe_pairs"].pop(), "unsafe_pairs has 3 values"),
    "five pairs": (
        lambda r: r["unsafe_pairs"].append(r["unsafe_pairs"][0]),
        "unsafe_pairs has 5 values, not 4",
    ),
    "an evaluated file": (
        lambda r: r["unsafe_pairs"][3].pop("model_response"),
        r"\(img/Weapon/2.jpg\), unsafe_pairs 4 has no field 'model_response'",
    ),
    "empty question": (
        lambda r: r["unsafe_pairs"][0].update(question=""),
        "unsafe_pairs 1: question is empty",
    ),
    "no prediction": (
        lambda r: r["UnharmPair_text2"].pop("Prediction"),
        "UnharmPair_text2 has no field 'Prediction'",
    ),
    "plain as text": (
        lambda r: r.update(UnharmPair_image1="x"),
        "UnharmPair_image1 must be an object with named fields, but is a string",
    ),
    "no safe image": (lambda r: r.pop("SDImage_path"), "no field 'SDImage_path'"),
    "no category": (lambda r: r.pop("category"), "no field 'category'"),
    "null image": (lambda r: r.update(image_path=None), "image_path must be a string, but is null"),
    "twice": (
        lambda r: r.update(image_id="img/Weapon/1.jpg"),
        "image_id 'img/Weapon/1.jpg' occurs twice, first in all_train.json record 1",
    ),
}


@pytest.mark.parametrize("name", ERASER_FAULTS)
@pytest.mark.parametrize("part", ["all_train.json", "all_val.json"])
def test_a_fault_of_safeeraser_names_its_place(tmp_path: Path, part: str, name: str) -> None:
    change, message = ERASER_FAULTS[name]
    first, second, other = eraser(1), eraser(2), eraser(3)
    change(second)
    in_train = part == "all_train.json"
    train, val = ([first, second], [other]) if in_train else ([first], [other, second])
    safeeraser(tmp_path, train, val)
    with pytest.raises(DataError, match=rf"^{part} record 2.*{message}"):
        read_safeeraser(tmp_path)


def test_missing_images_of_safeeraser(tmp_path: Path) -> None:
    root = safeeraser(tmp_path, [eraser(1), eraser(2)], [eraser(3)])
    shutil.rmtree(root / "dataset" / "pdset")
    with pytest.raises(DataError, match=r"3 of 6 images.*all_train.*SDImage_path 'dataset/pdset"):
        read_safeeraser(root)


@real
def test_the_samples_of_fiubench(tmp_path: Path) -> None:
    root = Path(os.environ["MMFORGET_REAL_DATA"]) / "fiubench"
    shutil.copy(root / "full.schema_example.json", tmp_path / "full.json")
    for name in ("split.json", "prompt.json"):
        shutil.copy(root / name, tmp_path / name)
    for number in ("00044363", "00083018"):
        picture(tmp_path / "SFHQ" / f"SFHQ_pt1_{number}.jpg")
    files = read_fiubench(tmp_path)
    sizes = {name: len(ids) for name, ids in files.splits.items()}
    assert sizes == {"forget1": 4, "forget5": 20, "forget10": 40, "retain5": 20, "retain15": 60}
    assert set(files.splits["retain5"]) < set(files.splits["retain15"])
    assert (len(files.idk), len(files.icd)) == (50, 28)
    assert len(files.notes) == 5 and "forget5 names 19 persons" in files.notes[1]
    assert [len(each.qa) for each in files.persons] == [3, 3]
    assert files.persons[0].qa[0].keywords == ("Mara", "Quillfeather")
    assert retain_ids(files.persons, files.splits) == ()  # one is in forget1, one in forget5
    with pytest.raises(DataError, match="forget1 names 3 of 4 persons"):
        ids_of(files, "forget1")


@real
def test_the_published_text_only_questions() -> None:
    root = Path(os.environ["MMFORGET_REAL_DATA"]) / "fiubench"
    first, second = (
        read_text_only(root / f"text_only_variants_template{k}.sample.json") for k in (1, 2)
    )
    assert len(first) == len(second) == 20
    for record in first:
        assert text_only_question(record.original, record.name) == record.question
    assert {record.template for record in second} == {"template2"}


@real
def test_the_sample_of_safeeraser(tmp_path: Path) -> None:
    root = Path(os.environ["MMFORGET_REAL_DATA"]) / "safeeraser"
    records = json.loads((root / "all_train.schema_example.json").read_text())
    val = [{**records[0], "image_id": "img/Violence/3.jpg"}]
    files = read_safeeraser(safeeraser(tmp_path, records, val))
    assert [each.category for each in files.train] == ["Violence", "Privacy"]
    assert [each.kind for each in files.train] == ["syn", "real"]
    assert files.train[1].pairs[3].safe_response.startswith("A harmless, on-topic answer 3")
