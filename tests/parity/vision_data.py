"""Adapters from golden families of the face benchmarks to the code that runs in production."""

import csv
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmforget.metrics.signals import Predictions
from mmforget.vision.adapter import FaceAdapter, Faces
from mmforget.vision.benchmarks import mucac, mufac
from mmforget.vision.benchmarks.base import IdentityRequest


def mufac_split(inputs: Mapping[str, Any]) -> dict[str, Any]:
    names = inputs["image_path_in_csv_order"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "custom_train_dataset.csv"
        letters = [parsed.letter for name in names if (parsed := mufac.parse_name(name))]
        with path.open("w", newline="") as out:
            rows = zip(names, letters, strict=True)
            csv.writer(out).writerows([("image_path", "age_class"), *rows])
        rows = mufac.read_csv(path, "train")
    parts = mufac.split_rows(rows, mufac.MUFACRequest())
    split = {i: name for name in ("forget", "retain") for i in parts[name]}
    probe = [0, 1, 1499, 1500, len(rows) - 1]

    def histogram(name: str) -> list[int]:
        found = Counter(rows[i].label for i in parts[name])
        return [found[k] for k in range(len(mufac.LETTERS))]

    return {
        "n_forget": len(parts["forget"]),
        "n_retain": len(parts["retain"]),
        "probe_index": probe,
        "probe_label": [rows[i].label for i in probe],
        "probe_split": [split[i] for i in probe],
        "label_histogram_forget": histogram("forget"),
        "label_histogram_retain": histogram("retain"),
        "family_of_probe": [rows[i].group for i in probe],
    }


def mucac_split(inputs: Mapping[str, Any]) -> dict[str, Any]:
    names = inputs["file"]
    with tempfile.TemporaryDirectory() as folder:
        identities, attributes = Path(folder) / "identity.txt", Path(folder) / "attribute.txt"
        lines = zip(names, inputs["identity"], strict=True)
        identities.write_text("".join(f"{name} {identity}\n" for name, identity in lines))
        values = zip(names, inputs["attributes_male_smiling_young"], strict=True)
        text = "".join(f"{name}  {'  '.join(map(str, row))}\n" for name, row in values)
        attributes.write_text(f"{len(names)}\n{' '.join(mucac.ATTRIBUTES)}\n{text}")
        rows = mucac.read_rows(identities, attributes, Path(folder), "multi")
    parts = mucac.split_rows(rows, IdentityRequest())
    called = {"forget": "forget", "retain": "retain", "test": "test", "holdout": "unseen"}
    split = {rows[i].file.id: called[name] for name, chosen in parts.items() for i in chosen}
    label = {row.file.id: list(row.label) for row in rows if isinstance(row.label, tuple)}
    return {
        "split": [split[name] for name in names],
        "train_count": len(parts["forget"]) + len(parts["retain"]),
        "labels_gender_smiling_young": [label[name] for name in names],
    }


def mucac_multilabel(inputs: Mapping[str, Any]) -> dict[str, Any]:
    logits = torch.tensor(inputs["logits_gender_smiling_young"])
    label = torch.tensor(inputs["labels"], dtype=torch.float32)
    adapter = FaceAdapter(classes=3, multilabel=True, augmented=False)
    out = adapter.forward(nn.Identity(), Faces(logits, label))
    hits = Predictions.of(out.pred.numpy(), label.numpy()).hits
    return {
        "per_sample_loss": out.loss.tolist(),
        "per_attribute_accuracy": hits.mean(axis=0).tolist(),
        "average_accuracy": hits.mean(),
    }


ADAPTERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "mufac_split": mufac_split,
    "mucac_split": mucac_split,
    "mucac_multilabel": mucac_multilabel,
}
