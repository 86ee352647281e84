"""Golden vectors of UnlearnCanvas's lists and scores, image-set distances and CLIP scores."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mmforget.diffusion.canvas import (
    OBJECTS,
    PHOTOS,
    THEMES,
    Answers,
    answer_name,
    average,
    class_accuracy,
    parse_answer_name,
    protocol,
    scores,
    ua_ira_cra,
)
from mmforget.diffusion.distances import Moments, cmmd, fid, frechet, kid
from mmforget.diffusion.scores import clip_accuracy, clip_score, clip_scores, cosines


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def answer_set_names(inputs: Mapping[str, Any]) -> dict[str, Any]:
    names = [
        answer_name(theme, name, seed)
        for theme in THEMES
        for name in OBJECTS
        for seed in inputs["seeds"]
    ]
    picks = []
    for style, name, seed in inputs["picks"]:
        assert parse_answer_name(answer_name(style, name, seed)) == (style, name, seed)
        picks.append(
            {
                "file": answer_name(style, name, seed),
                "prompt": protocol("mmforget").prompt(style, name),
                "style_index": THEMES.index(style),
                "object_index": OBJECTS.index(name),
            }
        )
    return {
        "n_themes": len(THEMES),
        "n_objects": len(OBJECTS),
        "n_images": len(names),
        "n_images_without_photo_theme": sum(not name.startswith(PHOTOS) for name in names),
        "sha256_of_sorted_names_joined_by_newline": hashlib.sha256(
            "\n".join(sorted(names)).encode()
        ).hexdigest(),
        "picks": picks,
    }


def metrics(inputs: Mapping[str, Any]) -> dict[str, Any]:
    plain, photos = {}, {}
    for target, rows in inputs["answer_sets"].items():
        columns = [list(column) for column in zip(*rows, strict=True)]
        answers = Answers(
            *columns,
            styles=(*inputs["styles"], inputs["photo_theme"]),
            objects=tuple(inputs["objects"]),
            seeds=tuple(inputs["seeds"]),
        )
        plain[target] = ua_ira_cra(answers, target)
        photos[target] = ua_ira_cra(answers, target, photos=True)
        assert plain[target].kind == inputs["kind"]
    per_target = {
        target: {**found.values, **_marked(photos[target].values)}
        for target, found in plain.items()
    }
    percent = average(plain.values())
    means = {**percent, **_marked(average(photos.values()))}
    return {
        "per_target": per_target,
        "average": {name: value / 100 for name, value in means.items()},
        "average_percent_two_decimals": {name: round(value, 2) for name, value in percent.items()},
    }


def from_confusion(inputs: Mapping[str, Any]) -> dict[str, Any]:
    labels, target = inputs["labels"], inputs["target"]
    counts = inputs["in_domain_confusion_rows_true"]
    cross = inputs["cross_domain_confusion_rows_true"]
    own = class_accuracy(labels, counts)
    found = scores(own, class_accuracy([str(i) for i in range(len(cross))], cross), target)
    others = [i for i, label in enumerate(labels) if label != target]
    # Not a score of ours: shows that the macro average is another number.
    micro = sum(counts[i][i] for i in others) / sum(sum(counts[i]) for i in others)
    return {
        "in_domain_accuracy": list(own.values()),
        **found,
        "IRA_if_micro_averaged": micro,
    }


def given_gaussians(inputs: Mapping[str, Any]) -> dict[str, Any]:
    a = tensor(inputs["mu_a"]), tensor(inputs["sigma_a"])
    b = tensor(inputs["mu_b"]), tensor(inputs["sigma_b"])
    return {"fid": frechet(*a, *b), "fid_same": frechet(*a, *a)}


def distances(inputs: Mapping[str, Any]) -> dict[str, Any]:
    sets = {name: tensor(inputs[f"features_{name}"]) for name in "ab"}
    moments = {name: Moments().update(rows[:7]).update(rows[7:]) for name, rows in sets.items()}
    found: dict[str, Any] = {
        "fid": fid(moments["a"], moments["b"]),
        "kid_unbiased_poly3": kid(sets["a"], sets["b"]).value,
        "cmmd_raw_features": cmmd(sets["a"], sets["b"], normalise=False),
        "cmmd_l2_normalised": cmmd(sets["a"], sets["b"]),
    }
    for name, held in moments.items():
        found[f"mu_{name}"] = held.mean.tolist()
        found[f"sigma_{name}"] = held.covariance.tolist()
    return found


def clip(inputs: Mapping[str, Any]) -> dict[str, Any]:
    images = tensor(inputs["image_embeds"])
    target, anchor = tensor(inputs["target_text_embeds"]), tensor(inputs["anchor_text_embeds"])
    cosine = cosines(images, target)
    return {
        "cosine": cosine.tolist(),
        "clip_score_x100": clip_scores(cosine, "clamped").tolist(),
        "clip_score_x100_mean_of_clamped": clip_score(cosine, "clamped"),
        "clip_score_torchmetrics": clip_score(cosine, "torchmetrics"),
        "clip_score_w2p5": clip_scores(cosine, "clipscore").tolist(),
        "clip_accuracy": clip_accuracy(images, target, anchor),
    }


def _marked(values: Mapping[str, float]) -> dict[str, float]:
    return {f"{name}_with_seed_images": value for name, value in values.items()}


ADAPTERS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "clip_score": clip,
    "fid_given_gaussians": given_gaussians,
    "fid_kid_cmmd": distances,
    "ua_ira_cra_from_confusion": from_confusion,
    "unlearncanvas_answer_set_names": answer_set_names,
    "unlearncanvas_metrics": metrics,
}
