"""Pipelines from elsewhere: `mmforget attack FOLDER attack=text_grad prompts=my.csv judge=...`."""

from collections.abc import Sequence
from pathlib import Path

from mmforget.errors import ConfigError
from mmforget.types import Opened

SHORT = ("prompts", "judge", "original", "images")


def pipeline_folder(path: Path, words: Sequence[str]) -> Opened | None:
    """Return how a diffusers pipeline folder is attacked, or None if the path is none.

    Short words, beside any others: `prompts=FILE.csv` (case_number, prompt, evaluation_seed),
    `judge=KIND` or `judge={kind: ..., label: ...}` (see `zero_shot.JudgeConfig`),
    `original=PIPELINE` (what was unlearned; it draws the target pictures) and `images=DIR` (target
    pictures by case number, in its place).

    Raises:
        ConfigError: There are no prompts.
    """
    if not (path / "model_index.json").is_file():
        return None
    given = {_key(word): _value(word) for word in words if _key(word)}
    others = [
        f"benchmark.{word}" if word.startswith("judge.") else word
        for word in words
        if not _key(word)
    ]
    if "prompts" not in given:
        raise ConfigError(
            f"{path} is a diffusers pipeline: say prompts=FILE.csv, prompts that drew the concept "
            f"before it was erased, and judge=KIND (or the benchmark that it belongs to)"
        )
    held = {word.partition("=")[0] for word in others}
    original = given.get("original", str(path))
    made = [
        "benchmark=diffusion/unlearndiffatk",
        "data=local",
        f"data.root='{given['prompts']}'",
        "data.drawn=1",  # pictures to train on, which no attack needs
        "data.images=2",
        "model=pipeline",
        f"model.pipeline='{original}'",
        "metrics=none",
        "reference=false",
    ]
    if not held & {"request", "request.concept"}:
        made.append(f"request.concept='{Path(given['prompts']).stem}'")
    if "judge" in given:
        judge = given["judge"]
        made.append(f"benchmark.judge{'' if judge.startswith('{') else '.kind'}={judge}")
    if "images" in given:
        made.append(f"benchmark.images='{given['images']}'")
    return Opened([*made, *others], path if "original" in given else None)


def _key(word: str) -> str:
    key = word.partition("=")[0]
    return key if key in SHORT else ""


def _value(word: str) -> str:
    return word.partition("=")[2].strip("'\"")
