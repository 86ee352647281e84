"""What users get wrong, through the command line: one clear message, and nothing half-written."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from mmforget.cli import application
from mmforget.record import RunResult, load_run
from tests.vlm.families import make
from tests.vlm.world import PERSONS, QUESTIONS, Place, make_place

torch.set_num_threads(1)

Edit = Callable[[Path], None]
BARE = ("benchmark.judged=false", "benchmark.text_only=false", "benchmark.other_face=false")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("bad_input"))


def call(*words: object, status: int = 0) -> Any:
    result = CliRunner().invoke(application(), list(map(str, words)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, (result.stdout, result.stderr)
    return result


def options(place: Place) -> tuple[object, ...]:
    return ("--runs", place.store["runs"], "--cache", place.store["cache"])


def recorded(place: Place, method: str) -> list[RunResult]:
    """Return the records of a method's runs."""
    folder = place.store["runs"] / "vlm"
    return [load_run(path.parent) for path in folder.glob(f"*/{method}/*/run.json")]


def refused(
    place: Place,
    *words: str,
    verb: tuple[object, ...] = ("run", "method=original"),
    begun: bool = False,
) -> str:
    """Return the one message that a command ends with.

    Args:
        place: Where.
        words: What is wrong, among other words.
        verb: The command.
        begun: Whether a run was begun, and is recorded as failed; else nothing is.
    """
    before = {run.id for run in recorded(place, "*")}
    result = call(*verb, *words, *options(place), status=2)
    assert "Traceback" not in result.stderr and result.stdout == ""
    lines: list[str] = result.stderr.splitlines()
    (error,) = [line for line in lines if line.startswith("error: ")]
    assert error == lines[-1], "the message is one line, and the last"
    assert all(line.startswith(("warning: ", "[", "error: ")) for line in lines), lines
    made = [run for run in recorded(place, "*") if run.id not in before]
    assert [run.status for run in made if run.status not in ("finished", "collapsed")] == (
        ["failed"] if begun else []
    )
    assert begun or not made, "nothing was begun"
    return error.removeprefix("error: ")


def edited(place: Place, tmp_path: Path, edit: Edit, name: str = "people") -> str:
    """Copy a world, spoil the copy, and return the word that names it."""
    folder = tmp_path / name
    shutil.copytree(place.root / name, folder)
    edit(folder)
    return f"data.root={folder}"


def rows(change: Callable[[list[Any]], Any], file: str = "full.json") -> Edit:
    """Return an edit of the records of a file."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        found = change(content)
        (folder / file).write_text(json.dumps(content if found is None else found))

    return edit


def without_image(people: list[Any]) -> None:
    del people[2]["image_path"]


def few_paraphrases(people: list[Any]) -> None:
    people[1]["qa_list"][2]["paraphrased_question"].pop()


def numeric_ids(people: list[Any]) -> None:
    people[3]["unique_id"] = int(people[3]["unique_id"])


def empty_answer(people: list[Any]) -> None:
    people[0]["qa_list"][0]["answer"] = "  "


def no_list(people: list[Any]) -> None:
    people[0]["qa_list"][0]["keywords"] = "Ada"


def twice(people: list[Any]) -> None:
    people[5]["unique_id"] = people[4]["unique_id"]


def two_lists(lists: Any) -> None:
    lists["forget10"].append(lists["forget5"][0])


def numeric_list(lists: Any) -> None:
    lists["forget5"] = [int(name) for name in lists["forget5"]]


def lost_person(lists: Any) -> None:
    lists["forget5"].append("99999999")


def image_gone(folder: Path) -> None:
    sorted((folder / "dataset" / "SFHQ").glob("*.jpg"))[0].unlink()


def image_broken(folder: Path) -> None:
    path = sorted((folder / "dataset" / "SFHQ").glob("*.jpg"))[0]
    path.write_bytes(path.read_bytes()[:200])


def no_json(folder: Path) -> None:
    (folder / "full.json").write_text('[{"unique_id": "0000')


def no_file(folder: Path) -> None:
    (folder / "split.json").unlink()


CASES: dict[str, tuple[Edit, str]] = {
    "record without an image": (rows(without_image), "record 3 .*has no field 'image_path'"),
    "image gone": (image_gone, f"1 of {PERSONS} images are missing"),
    "image unreadable": (image_broken, r"SFHQ_pt1_\d{8}\.jpg cannot be read as an image.*again"),
    "two paraphrases": (rows(few_paraphrases), "qa_list 3: paraphrased_question has 2.*at least 3"),
    "numeric id": (rows(numeric_ids), 'record 4: unique_id is the number .*such as "0'),
    "numeric list": (rows(numeric_list, "split.json"), "split.json: forget5 value 1 is the number"),
    "empty answer": (rows(empty_answer), "record 1 .*qa_list 1: answer is empty"),
    "text for a list": (rows(no_list), "keywords must be a list, but is a string"),
    "id twice": (rows(twice), "record 6.*occurs twice, first in .*record 5"),
    "id in two lists": (rows(two_lists, "split.json"), "forget5 and forget10 share .*disjoint"),
    "person of nobody": (rows(lost_person, "split.json"), "forget5 names 1 of 3 .*: 99999999"),
    "no JSON": (no_json, r"full\.json is no JSON"),
    "no file": (no_file, r"holds neither split\.json nor dataset/split\.json"),
}


@pytest.mark.parametrize("name", CASES)
def test_faults_of_the_data(name: str, place: Place, tmp_path: Path) -> None:
    edit, message = CASES[name]
    said = refused(place, *place.people(edited(place, tmp_path, edit)))
    assert re.search(message, said), said


def picture_gone(folder: Path) -> None:
    sorted((folder / "dataset" / "pdset").rglob("*.jpg"))[0].unlink()


def prediction_empty(records: list[Any]) -> None:
    records[0]["UnharmPair_text2"]["Prediction"] = ""


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (picture_gone, "images are missing.*SDImage_path"),
        (rows(prediction_empty, "all_val.json"), "record 1 .*Prediction is empty"),
    ],
)
def test_faults_of_records(edit: Edit, message: str, place: Place, tmp_path: Path) -> None:
    said = refused(place, *place.crafts(edited(place, tmp_path, edit, "crafts")))
    assert re.search(message, said), said


def test_faults_of_words(place: Place, tmp_path: Path) -> None:
    for words, part in (
        (("request.split=retain5",), "one of the forget lists is needed"),
        (("benchmark.max_length=20",), "the window is 20: raise benchmark.max_length"),
        # Long enough for all that is learnt, but not for a question in other words.
        (("benchmark.max_length=58",), "the window is 58: raise benchmark.max_length"),
        ((f"data.root={tmp_path / 'no'}",), "there is no such folder"),
        ((f"model.path={tmp_path}",), "is not opened as a vision-language model"),
        (("model.path=null",), "model.name=pretrained needs model.path"),
        ((f"model.template={tmp_path / 'no.jinja'}",), "there is no such file"),
        (("benchmark.judge.kind=endpoint", "benchmark.judge.model=m"), "needs judge.url"),
    ):
        assert part in refused(place, *place.people(*words))


def without_template(place: Place, tmp_path: Path) -> Path:
    folder = tmp_path / "mute"
    shutil.copytree(place.root / "tiny", folder)
    (folder / "chat_template.jinja").unlink()
    return folder


def test_a_processor_without_a_chat_template(place: Place, tmp_path: Path) -> None:
    folder = without_template(place, tmp_path)
    words = place.people(f"model.path={folder}", *BARE)
    said = refused(place, *words)
    assert "has no chat template; name a file with one: model.template=FILE.jinja" in said
    template = place.root / "tiny" / "chat_template.jinja"
    call("run", "method=original", *words, f"model.template={template}", *options(place))
    (run,) = recorded(place, "original")
    call("run", "method=original", *place.people(*BARE), *options(place))
    plain = next(each for each in recorded(place, "original") if each.id != run.id)
    for name, value in plain.metrics.items():
        if name.startswith("fiubench/"):
            assert run.metrics[name].value == pytest.approx(value.value, nan_ok=True)


def lines(folder: Path) -> None:
    path = folder / "full.json"
    path.write_text("\n".join(map(json.dumps, json.loads(path.read_text()))) + "\n")


def test_an_array_and_json_lines_are_the_same_run(place: Place, tmp_path: Path) -> None:
    first = call("run", "method=original", *place.people(*BARE), *options(place), "--json")
    words = place.people(edited(place, tmp_path, lines), *BARE)
    second = call("run", "method=original", *words, *options(place), "--json")
    folders = [json.loads(each.stdout)["folder"] for each in (first, second)]
    assert folders[0] == folders[1], "the content decides, not the path or the form"


def test_answers_that_are_cut_are_counted_in_the_record(place: Place) -> None:
    words = place.people("benchmark.max_length=72", *BARE)
    call("run", "method=original", *words, *options(place))
    (note,) = {note for run in recorded(place, "original") for note in run.notes}
    count = int(note.split()[0])
    assert 0 < count < PERSONS * QUESTIONS
    assert f"{count} of {PERSONS * QUESTIONS} answers of all persons are longer" in note
    assert "without their end" in note


def test_a_scope_that_reaches_the_vision_tower(place: Place) -> None:
    words = place.people(*BARE, "method.epochs=1", "method.batch_size=4")
    verb = ("run", "method=grad_ascent", "method.scope=q_proj")
    said = refused(place, *words, verb=verb, begun=True)
    assert "would train" in said and "of the vision tower" in said and "scope=vision" in said
    (run,) = recorded(place, "grad_ascent")
    assert run.status == "failed" and run.error == said and not run.metrics
    assert not (run.folder / "stages" / "unlearn.json").exists()
    assert not list(run.folder.glob("*.safetensors"))
    good = ("run", "method=grad_ascent", r"method.scope='language_model.*q_proj'")
    call(*good, *words, *options(place))
    (made,) = [each for each in recorded(place, "grad_ascent") if each.id != run.id]
    assert made.status in ("finished", "collapsed") and made.metrics


def test_a_judge_that_cannot_be_reached(place: Place) -> None:
    words = place.people(
        "benchmark.text_only=false", "benchmark.other_face=false",
        "benchmark.judge.kind=endpoint", "benchmark.judge.model=m", "benchmark.judge.retries=0",
        "benchmark.judge.url=http://127.0.0.1:9/v1", "request.split=forget1",
    )  # fmt: skip
    said = refused(place, *words, begun=True)
    assert "the judge m at http://127.0.0.1:9/v1 gave no answer in 1 tries" in said
    assert "run the same command again" in said
    run = next(each for each in recorded(place, "original") if each.status == "failed")
    assert run.error == said and not (run.folder / "stages" / "evaluate.json").exists()
    # The same request with a judge that needs no server, in the same folders.
    plain = place.people(*BARE, "request.split=forget1")
    call("run", "method=original", *plain, *options(place))
    assert "as it was written" in call("cache", "verify", "--cache", place.store["cache"]).stdout


# --- Models from elsewhere


def evaluated(place: Place, target: Path, *more: str) -> RunResult:
    words = [*place.people(*BARE, *more), *options(place), "--json"]
    content = json.loads(call("eval", target, *words).stdout)
    assert content["method"] == "external"
    return load_run(Path(content["folder"]))


def loss(run: RunResult) -> float:
    return run.metrics["fiubench/loss/forget"].value


def test_a_folder_of_save_pretrained_is_evaluated(place: Place, tmp_path: Path) -> None:
    folder = make("llava", tmp_path / "other", seed=1)
    run = evaluated(place, folder)
    itself = evaluated(place, place.root / "tiny")
    call("run", "method=original", *place.people(*BARE), *options(place))
    parent = load_run(place.store["runs"] / str(itself.parents["original"]))
    assert loss(itself) == pytest.approx(loss(parent), abs=1e-6)
    assert abs(loss(run) - loss(parent)) > 0.1
    assert loss(evaluated(place, folder / "model.safetensors")) == loss(run)


def adapter(place: Place, folder: Path) -> Path:
    """Write an adapter that plain peft made and trained."""
    net = AutoModelForImageTextToText.from_pretrained(place.root / "tiny")
    config = LoraConfig(r=2, lora_alpha=8, target_modules=r".*language_model.*\.(q_proj|down_proj)")
    made = get_peft_model(net, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    made.save_pretrained(str(folder))
    return folder


def test_an_adapter_of_plain_peft_is_evaluated_whole_or_not_at_all(
    place: Place, tmp_path: Path
) -> None:
    folder = adapter(place, tmp_path / "adapter")
    run = evaluated(place, folder)
    call("run", "method=original", *place.people(*BARE), *options(place))
    parent = load_run(place.store["runs"] / str(run.parents["original"]))
    assert abs(loss(run) - loss(parent)) > 0.01
    before = {each.id for each in recorded(place, "external")}

    file = folder / "adapter_model.safetensors"
    held = load_file(file)
    save_file({name.replace("language_model", "text_model"): v for name, v in held.items()}, file)
    said = refused(place, *place.people(*BARE), verb=("eval", folder))
    assert "does not fit the model" in said and f"{len(held)} of its {len(held)} tensors" in said
    some = dict(held)
    some.pop(next(name for name in held if "down_proj" in name))
    save_file(some, file)
    said = refused(place, *place.people(*BARE), verb=("eval", folder))
    assert re.search(r"lacks .*down_proj|are missing, such as .*down_proj", said), said
    assert {each.id for each in recorded(place, "external")} == before


def test_a_model_of_another_family_is_refused(place: Place, tmp_path: Path) -> None:
    folder = make("internvl", tmp_path / "other")
    said = refused(place, *place.people(*BARE), verb=("eval", folder))
    assert "InternVL" in said and "the original is a Llava" in said
    said = refused(place, *place.people(*BARE), verb=("eval", tmp_path / "nowhere"))
    assert "no such file or folder" in said
