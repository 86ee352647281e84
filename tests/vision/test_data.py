"""Decoding, listings, requests, splits and bad input of the face benchmarks."""

import csv
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmforget import images
from mmforget.errors import ConfigError, DataError, SplitError
from mmforget.images import ImageFile, open_images
from mmforget.schema import instantiate
from mmforget.types import Splits
from mmforget.vision.benchmarks import faces, mucac, mufac
from mmforget.vision.benchmarks.base import (
    DataConfig,
    FaceBenchmark,
    IdentityRequest,
    deduplicate,
)
from mmforget.vision.models import ModelConfig

torch.set_num_threads(1)

FAMILIES = {"train": range(1, 7), "val": range(801, 804), "test": range(851, 853)}


def _save(path: Path, seed: int, size: tuple[int, int] = (12, 12), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def _mufac(root: Path, column: str = "age_class") -> Path:
    """Write a MUFAC folder of 24 training, 12 validation and 8 test images."""
    for part, families in FAMILIES.items():
        rows = []
        for family in families:
            for k, role in enumerate(("D", "S2", "GM", "F")):
                letter = mufac.LETTERS[(family + k) % 8]
                name = f"F{family:04d}_AGE_{role}_30_{letter}1.jpg"
                _save(root / f"{part}_images" / name, family * 10 + k)
                rows.append((name, letter, "ignored"))
        with (root / f"custom_{part}_dataset.csv").open("w", newline="") as out:
            csv.writer(out).writerows([("image_path", column, "other"), *rows])
    return root


def _make(
    kind: type[FaceBenchmark],
    root: Path,
    store: Path,
    config: Mapping[str, Any] | None = None,
    request: Mapping[str, Any] | None = None,
) -> FaceBenchmark:
    return kind(
        instantiate(kind.config_type, {"image_size": 12, **(config or {})}, "benchmark"),
        DataConfig(source="local", root=str(root)),
        ModelConfig(name="mini/resnet"),
        instantiate(kind.request_type, request or {}, "request"),
        store,
    )


def _splits(root: Path, config: Mapping[str, Any] | None = None, **request: Any) -> Splits:
    return _make(mufac.MUFAC, root, root / "store", config, request).splits()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return _mufac(tmp_path)


def _files(folder: Path, names: Sequence[str]) -> list[ImageFile]:
    return [ImageFile(n, folder / n, f"list.csv row {k + 2}") for k, n in enumerate(names)]


# Decoding


def test_table_holds_what_pil_reads_and_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save(tmp_path / "a.png", 1)
    _save(tmp_path / "b.png", 2, mode="L")
    files = _files(tmp_path, ["a.png", "b.png"])
    table = open_images(files, 12, tmp_path / "store")
    for k, file in enumerate(files):
        expected = np.asarray(Image.open(file.path).convert("RGB")).transpose(2, 0, 1)
        assert np.array_equal(table.pixels[k], expected)
    assert table.pixels.dtype == np.uint8 and len(set(table.digests)) == 2
    monkeypatch.setattr(images, "decode", lambda *_: pytest.fail("decoded twice"))
    again = open_images(files, 12, tmp_path / "store")
    assert again.digests == table.digests and np.array_equal(again.pixels, table.pixels)


def test_resize_is_torchvisions_and_oblong_images_are_cropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from torchvision.transforms import v2

    _save(tmp_path / "wide.png", 3, size=(37, 20))
    with caplog.at_level(logging.WARNING):
        table = open_images(_files(tmp_path, ["wide.png"]), 12, tmp_path / "store")
    published = v2.Compose([v2.Resize(12), v2.CenterCrop(12)])
    expected = np.asarray(published(Image.open(tmp_path / "wide.png")))
    assert np.array_equal(table.pixels[0], expected.transpose(2, 0, 1))
    assert "1 of 1 images are not square" in caplog.text


def test_a_changed_file_makes_a_new_table(tmp_path: Path) -> None:
    _save(tmp_path / "a.png", 1)
    files = _files(tmp_path, ["a.png"])
    first = open_images(files, 12, tmp_path / "store")
    _save(tmp_path / "a.png", 2)
    second = open_images(files, 12, tmp_path / "store")
    assert first.digests != second.digests and first.folder != second.folder


def test_equal_pixels_have_equal_digests(tmp_path: Path) -> None:
    _save(tmp_path / "a.png", 1)
    _save(tmp_path / "b.bmp", 1)
    table = open_images(_files(tmp_path, ["a.png", "b.bmp"]), 8, tmp_path / "store")
    assert table.digests[0] == table.digests[1]


def test_broken_images_are_named_and_leave_nothing(tmp_path: Path) -> None:
    for k in range(8):
        _save(tmp_path / f"{k}.png", k)
    (tmp_path / "3.png").write_bytes(b"no image")
    (tmp_path / "5.png").write_bytes((tmp_path / "4.png").read_bytes()[:100])
    names = [f"{k}.png" for k in range(8)]
    with pytest.raises(DataError, match=r"2 of 8 images cannot be read.*3\.png \(list.csv row 5\)"):
        open_images(_files(tmp_path, names), 12, tmp_path / "store")
    left = [p.name for p in (tmp_path / "store" / "images").iterdir() if p.suffix != ".lock"]
    assert left == []


def test_missing_and_repeated_images_are_named(tmp_path: Path) -> None:
    _save(tmp_path / "a.png", 1)
    with pytest.raises(DataError, match=r"1 of 2 images are missing.*b\.png \(list.csv row 3\)"):
        open_images(_files(tmp_path, ["a.png", "b.png"]), 12, tmp_path)
    with pytest.raises(DataError, match=r"listed twice: list.csv row 2 and list.csv row 3"):
        open_images(_files(tmp_path, ["a.png", "a.png"]), 12, tmp_path)


def test_a_killed_decode_leaves_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path / "a.png", 1)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(images.np, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            open_images(_files(tmp_path, ["a.png"]), 12, tmp_path / "store")
    assert len(open_images(_files(tmp_path, ["a.png"]), 12, tmp_path / "store").pixels) == 1


# MUFAC


def test_mufac_published_split(root: Path) -> None:
    splits = _splits(root, n=10)
    sizes = {name: len(splits.get(name)) for name in splits.names()}
    assert sizes == {"forget": 10, "retain": 14, "holdout": 8, "test": 12}
    assert list(splits.train.ids) == list(splits.forget.ids) + list(splits.retain.ids)
    assert splits.holdout.ids[0].startswith("F0851") and splits.test.ids[0].startswith("F0801")
    assert splits.check() == []
    batch = splits.forget.take([1, 0])
    assert batch["image"].shape == (2, 3, 12, 12) and batch["image"].dtype == torch.uint8
    assert batch["label"].tolist() == [2, 1] and batch["label"].dtype == torch.int64
    with Image.open(root / "train_images" / splits.forget.ids[1]) as image:
        assert np.array_equal(batch["image"][0].permute(1, 2, 0).numpy(), np.asarray(image))


def test_mufac_hub_layout_gives_the_same_splits(root: Path, tmp_path: Path) -> None:
    expected = _splits(root, n=10)
    other = _mufac(tmp_path / "deep" / "hub", column="age_group")
    (other / "train_images").rename(other / "train_images_part1")
    (other / "train_images_part2").mkdir()
    for path in sorted((other / "train_images_part1").iterdir())[:3]:
        path.rename(other / "train_images_part2" / path.name)
    found = _splits(tmp_path / "deep", n=10)  # the folder may be one level down
    assert found.forget.ids == expected.forget.ids
    assert list(found.forget.digests) == list(expected.forget.digests)


def test_mufac_requests_by_identity(root: Path) -> None:
    splits = _splits(root, kind="identities", identities=["F0003", "F0001_D"])
    assert {i[:5] for i in splits.forget.ids} == {"F0003", "F0001"}
    assert len(splits.forget) == 5 and len(splits.retain) == 19
    splits = _splits(root, kind="identities", identities=["F0003"], retain=["F0004"])
    assert len(splits.forget) == len(splits.retain) == 4 and len(splits.train) == 8
    splits = _splits(root, kind="fraction", fraction=0.34, seed=1)
    again = _splits(root, kind="fraction", fraction=0.34, seed=1)
    assert len(splits.forget) == 8 and splits.forget.ids == again.forget.ids
    assert len({i[:5] for i in splits.forget.ids}) == 2


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"kind": "identities", "identities": ["F0009"]}, "Close: F000"),
        ({"kind": "identities", "identities": ["F0801"]}, "unknown identity"),
        ({"kind": "identities"}, "needs request.identities"),
        ({"kind": "identities", "identities": ["F0001"], "retain": ["F0001_D"]}, "F0001_D .* both"),
        ({"n": 24}, "leaves no image"),
    ],
)
def test_mufac_impossible_requests(root: Path, request_: dict[str, Any], says: str) -> None:
    with pytest.raises(SplitError, match=says):
        _splits(root, **request_)


def test_mufac_forgetting_everyone_is_an_empty_retain_set(root: Path) -> None:
    everyone = [f"F{k:04d}" for k in FAMILIES["train"]]
    with pytest.raises(SplitError, match="retain set is empty"):
        _splits(root, kind="identities", identities=everyone).check()


def test_mufac_validation_families_are_taken_from_test(root: Path) -> None:
    splits = _splits(root, {"val_fraction": 0.34}, n=10)
    assert splits.val is not None and len(splits.val) == 4 and len(splits.test) == 8
    assert {i[:5] for i in splits.val.ids}.isdisjoint(i[:5] for i in splits.test.ids)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("age_class", "age", "image_path, age, other.*age_class, age_group"),
        (",b,ignored", ",z,ignored", "row 2: age_class 'z'"),
        (",b,ignored", ",,ignored", "row 2: age_class ''"),
        ("F0001_AGE_D_30_b1.jpg", "portrait.jpg", "row 2: image_path 'portrait.jpg'"),
        ("F0001_AGE_D_30_b1.jpg", "F0001_AGE_D_31_b1.jpg", r"missing.*row 2"),
        ("F0001_AGE_S2_30_c1.jpg", "F0001_AGE_D_30_b1.jpg", "listed twice.*row 2.*row 3"),
    ],
)
def test_mufac_bad_listings(root: Path, old: str, new: str, says: str) -> None:
    path = root / "custom_train_dataset.csv"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=says):
        _splits(root, n=10)


def test_mufac_missing_files(root: Path, tmp_path: Path) -> None:
    (root / "custom_val_dataset.csv").unlink()
    with pytest.raises(DataError, match=r"custom_val_dataset.csv is missing"):
        _splits(root, n=10)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no custom_train_dataset.csv"):
        _splits(tmp_path / "empty", n=10)
    with pytest.raises(DataError, match="no such folder"):
        _splits(tmp_path / "absent", n=10)


def test_mufac_warns_when_counts_differ_from_the_published(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        _splits(root, n=10)
    assert "24 rows in custom_train_dataset.csv; published are 10025" in caplog.text


def test_dedup_rule() -> None:
    parts = {
        "forget": [0, 1, 2, 3],
        "retain": [4, 5, 6],
        "test": [7, 8],
        "holdout": [9, 10, 11],
        "forget_test": [9, 10, 11],
    }
    #          0  1  2  3  4  5  6  7  8  9 10 11
    hashes = [1, 1, 2, 3, 3, 4, 4, 5, 6, 6, 7, 4]
    found = deduplicate(parts, hashes)
    assert found["forget"] == [0, 2]  # 1 repeats 0; 3 is in retain, which keeps it
    assert found["retain"] == [4, 5]
    assert found["holdout"] == [9, 10]  # 11 equals a retain image
    assert found["test"] == [7]  # 8 equals a holdout image
    assert found["forget_test"] == [9, 10]


def test_duplicates_are_reported_or_dropped(root: Path) -> None:
    listed = sorted((root / "train_images").iterdir())
    listed[20].write_bytes(listed[0].read_bytes())
    (warning,) = _splits(root, n=10).check(allow_shared_content=True)
    assert warning == "forget and retain share 1 examples of equal content"
    clean = _splits(root, {"dedup": "phash"}, n=10)
    assert clean.check() == [] and len(clean.forget) == 9 and len(clean.retain) == 14


def test_fingerprint_follows_pixels_labels_and_options(root: Path) -> None:
    def key(config: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        bench = _make(mufac.MUFAC, root, root / "store", config, {"n": 10})
        bench.splits()
        return bench.fingerprint()

    first = key()
    assert key() == first and key({"augment": "none"}) != first
    path = root / "custom_train_dataset.csv"
    path.write_text(path.read_text().replace(",b,ignored", ",d,ignored", 1))
    assert key() != first


# MUCAC

PEOPLE = (3, 189, 190, 1249, 1250, 4854, 4855, 6216)


def _mucac(root: Path) -> Path:
    """Write a MUCAC folder: three images of each of eight persons, two in every split."""
    people = [person for person in PEOPLE for _ in range(3)]
    values = np.random.default_rng(0).choice([-1, 1], (len(people), 3))
    for number in range(len(people)):
        _save(root / "CelebAMask-HQ" / "CelebA-HQ-img" / f"{number}.jpg", number)
    lines = [f"{n}.jpg {person}\n" for n, person in enumerate(people)]
    (root / "CelebA-HQ-identity.txt").write_text("".join(lines))
    names = "Bald Male Smiling  Young"
    rows = [f"{n}.jpg  1 {' '.join(f'{v:2d}' for v in row)}\n" for n, row in enumerate(values)]
    text = f"{len(people)}\n{names}\n{''.join(rows)}"
    (root / "CelebA-HQ-attribute.txt").write_text(text)
    return root


def test_mucac_splits_and_tasks(tmp_path: Path) -> None:
    root = _mucac(tmp_path)
    multi = _make(mucac.MUCAC, root, root / "store")
    splits = multi.splits()
    assert [len(splits.get(name)) for name in splits.names()] == [6, 6, 6, 6]
    assert list(splits.forget.ids) == [f"{n}.jpg" for n in range(6, 12)]
    label = splits.train.take(range(12))["label"]
    assert label.shape == (12, 3) and label.dtype == torch.float32
    assert multi.build(0)(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    smiling = _make(mucac.MUCAC, root, root / "store", {"task": "smiling"})
    one = smiling.splits().train.take(range(12))["label"]
    assert torch.equal(one, label[:, 1].long())
    assert smiling.training.momentum == 0.9 and multi.training.momentum == 0.0
    assert multi.fingerprint()["task"] != smiling.fingerprint()["task"]


def test_mucac_request_by_person(tmp_path: Path) -> None:
    root = _mucac(tmp_path)
    request = {"kind": "identities", "identities": ["1250", "190"]}
    splits = _make(mucac.MUCAC, root, root / "store", request=request).splits()
    assert len(splits.forget) == 6 and len(splits.retain) == 6
    with pytest.raises(SplitError, match=r"unknown identity.*'4855'"):
        bad = {"kind": "identities", "identities": ["4855"]}  # an unseen person
        _make(mucac.MUCAC, root, root / "store", request=bad).splits()


def test_mucac_few_missing_images_are_left_out_many_are_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = _mucac(tmp_path)
    (root / "CelebAMask-HQ" / "CelebA-HQ-img" / "0.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of the 24 images.*such as 0\.jpg"):
        _make(mucac.MUCAC, root, root / "store").splits()
    monkeypatch.setattr(mucac, "MISSING", 0.05)
    with caplog.at_level(logging.WARNING):
        splits = _make(mucac.MUCAC, root, root / "store").splits()
    assert "1 of 24 images are missing" in caplog.text and len(splits.test) == 5


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("identity", "5.jpg 189", "5.jpg 189 7", "line 6"),
        ("identity", "5.jpg 189", "4.jpg 189", "line 6: 4.jpg is listed twice"),
        ("identity", "5.jpg 189\n", "", "disagree on 1 images, such as 5.jpg"),
        ("attribute", "Smiling", "Grinning", "names no Smiling"),
        ("attribute", "5.jpg  1", "5.jpg  2", "line 8: .* -1 or 1"),
    ],
)
def test_mucac_bad_text_files(tmp_path: Path, file: str, old: str, new: str, says: str) -> None:
    root = _mucac(tmp_path)
    path = root / f"CelebA-HQ-{file}.txt"
    text = path.read_text()
    path.write_text(
        text.replace(f"\n{old}", f"\n{new}", 1) if old[0] == "5" else text.replace(old, new)
    )
    with pytest.raises(DataError, match=says):
        _make(mucac.MUCAC, root, root / "store").splits()


def test_mucac_published_retrain_is_weaker() -> None:
    config = mucac.MUCACConfig()
    assert mucac.published_retrain(config.training, True).epochs == 7
    binary = mucac.published_retrain(config.training_binary, False)
    assert (binary.lr, binary.momentum, binary.epochs) == (pytest.approx(0.001), 0.0, 10)


# Faces


def _faces(root: Path) -> Path:
    for p, person in enumerate(("anna", "bert", "cleo")):
        for k in range(5):
            _save(root / person / f"{k}{('.png', '.pgm', '.bmp', '.webp', '.jpg')[k]}", 10 * p + k)
    (root / "anna" / "notes.txt").write_text("no image")
    return root


def test_faces_forgetting_a_person(tmp_path: Path) -> None:
    root = _faces(tmp_path)
    bench = _make(faces.Faces, root, root / "store", request={"persons": ["bert"]})
    splits = bench.splits()
    sizes = {name: len(splits.get(name)) for name in splits.names()}
    assert sizes == {"forget": 4, "retain": 8, "holdout": 1, "test": 2, "forget_test": 1}
    assert all(i.startswith("bert/") for i in (*splits.forget.ids, *splits.holdout.ids))
    assert not any(i.startswith("bert/") for i in (*splits.retain.ids, *splits.test.ids))
    assert splits.check() == [] and list(bench.label_names()) == ["anna", "bert", "cleo"]
    assert bench.build(0)(torch.zeros(2, 3, 32, 32)).shape == (2, 3)  # the class stays in the head


def test_faces_forgetting_photos(tmp_path: Path) -> None:
    root = _faces(tmp_path)
    trained = _make(faces.Faces, root, root / "store").splits().train.ids
    chosen = [i for i in trained if i.startswith("cleo/")][:2]
    splits = _make(faces.Faces, root, root / "store", request={"images": chosen}).splits()
    assert list(splits.forget.ids) == chosen and len(splits.retain) == 10
    assert len(splits.test) == 3 and [i[:4] for i in splits.holdout.ids] == ["cleo"]
    unseen = splits.holdout.ids[0]
    with pytest.raises(SplitError, match="never trained on"):
        _make(faces.Faces, root, root / "store", request={"images": [unseen]}).splits()


def test_faces_listing_equals_folders(tmp_path: Path) -> None:
    root = _faces(tmp_path / "a")
    expected = _make(faces.Faces, root, tmp_path / "store").splits()
    rows = [(i, i.partition("/")[0]) for i, _, _ in faces.read_folders(root)]
    with (root / "faces.csv").open("w", newline="") as out:
        csv.writer(out).writerows([("image_path", "person"), *rows])
    found = _make(faces.Faces, root, tmp_path / "store").splits()
    assert found.train.ids == expected.train.ids and found.forget.ids == expected.forget.ids


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"persons": ["anne"]}, "Close: anna"),
        ({"images": ["anna/9.png"]}, "unknown image"),
        ({"persons": ["anna", "bert", "cleo"]}, "at least one must be kept"),
        ({"persons": ["anna"], "images": ["anna/0.png"]}, "give one of them"),
    ],
)
def test_faces_impossible_requests(tmp_path: Path, request_: dict[str, Any], says: str) -> None:
    root = _faces(tmp_path)
    with pytest.raises(SplitError, match=says):
        _make(faces.Faces, root, root / "store", request=request_).splits()


def test_faces_bad_folders(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"neither faces.csv"):
        _make(faces.Faces, tmp_path / "none", tmp_path).splits()
    _save(tmp_path / "few" / "anna" / "0.png", 0)
    with pytest.raises(DataError, match="two or more"):
        _make(faces.Faces, tmp_path / "few", tmp_path).splits()
    _save(tmp_path / "few" / "bert" / "0.png", 1)
    with pytest.raises(DataError, match="2 persons have a single photo, such as anna, bert"):
        _make(faces.Faces, tmp_path / "few", tmp_path).splits()


# Sources


def test_sources_that_cannot_be_used_say_what_to_do(tmp_path: Path) -> None:
    config = mucac.MUCACConfig()
    data = DataConfig(source="hub")
    made = mucac.MUCAC(config, data, ModelConfig(), IdentityRequest(), tmp_path)
    with pytest.raises(ConfigError, match="not published on the hub"):
        made.splits()
    made = mucac.MUCAC(
        config, replace(data, source="local"), ModelConfig(), IdentityRequest(), tmp_path
    )
    with pytest.raises(ConfigError, match=r"needs data\.root"):
        made.splits()


def test_hub_failures_are_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_: object, **__: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    made = mufac.MUFAC(
        mufac.MUFACConfig(), DataConfig(source="hub"), ModelConfig(), mufac.MUFACRequest(), tmp_path
    )
    with pytest.raises(DataError, match="Dasool/MUFAC cannot be downloaded"):
        made.splits()


@pytest.mark.skipif("MMFORGET_REAL_DATA" not in os.environ, reason="MMFORGET_REAL_DATA is not set")
def test_faces_on_the_orl_photographs(tmp_path: Path) -> None:
    stored = np.load(Path(os.environ["MMFORGET_REAL_DATA"]) / "faces" / "orl_faces.npz")
    for pixels, person, sample in zip(
        *(stored[k] for k in ("images", "identity", "sample")), strict=True
    ):
        path = tmp_path / "orl" / f"s{person + 1:02d}" / f"{sample:02d}.pgm"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    config, request = {"image_size": 92}, {"persons": ["s01", "s02", "s07"]}
    splits = _make(faces.Faces, tmp_path / "orl", tmp_path, config, request).splits()
    sizes = [len(splits.get(name)) for name in ("forget", "retain", "holdout", "test")]
    assert sizes == [24, 296, 6, 74] and splits.check() == []
    image = splits.forget.take([0])["image"][0].numpy()
    number = int(splits.forget.ids[0].partition("/")[2].removesuffix(".pgm"))
    original = stored["images"][(stored["identity"] == 0) & (stored["sample"] == number)][0]
    assert (image == original[10:102]).all()  # 92 x 112, cropped about its centre
