"""Write the reference page from what the entries say of themselves.

    python docs/reference.py > docs/reference.md

Everything comes from `mmforget list --json` and `mmforget show KIND/NAME --json`.
"""

import contextlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from mmforget.cli import application
from mmforget.options import default_of
from mmforget.types import Training

HEAD = """# Reference

Made by `python docs/reference.py > docs/reference.md` from docstrings and schemas; the same text is
printed by `mmforget show KIND/NAME`. Options are set as `key=value`, such as `method.lr=0.01`.
Tuned values are in presets; `mmforget list presets` names them.

"""
TRAINING = """## Training options

Entries marked *training* have these options too: methods and attacks under their own prefix
(`method.lr`, `attack.relearn.lr`), benchmarks under `benchmark.training`. The tables below repeat
one only where its default differs.

"""
SECTIONS = (
    ("methods", "Methods", ("intent", "reads", "trains", "holds", "modalities")),
    ("metrics", "Metrics", ("needs",)),
    ("attacks", "Attacks", ("access", "needs", "budget")),
    ("benchmarks", "Benchmarks", ("metrics", "attacks", "headline", "distance")),
)


def page() -> str:
    """Return the page as Markdown."""
    shared = {item.name: item for item in fields(Training)}
    common = [
        {"key": name, "default": default_of(item), **item.metadata} for name, item in shared.items()
    ]
    listed = asked("list")
    parts = [HEAD, TRAINING, table(common), "\n"]
    for kind, title, facts in SECTIONS:
        parts.append(f"## {title}\n\n")
        for entry in listed[kind]:
            content = asked("show", f"{kind.removesuffix('s')}/{entry['name']}")
            parts.append(described(content, facts, {k: default_of(v) for k, v in shared.items()}))
    return "".join(parts).rstrip() + "\n"


def asked(*words: str) -> Any:
    """Return what `mmforget WORDS --json` prints."""
    written = io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.suppress(SystemExit):
        application()([*words, "--json"], prog_name="mmforget")
    return json.loads(written.getvalue())


def described(content: Mapping[str, Any], facts: Sequence[str], training: Mapping[str, Any]) -> str:
    """Return one entry: what it does, its facts, its options.

    Args:
        content: What `mmforget show` says.
        facts: The keys to print.
        training: Shared options, printed once, and their defaults.
    """
    lines = [f"### {content['name']}", "", content["description"], ""]
    lines += [f"- citation: {content['citation']}"]
    lines += [f"- {fact}: {listing(content[fact])}" for fact in facts]
    options = content.get("options", [])
    prefix = {"method": "method.", "attack": f"attack.{content['name'].rpartition('/')[2]}."}
    start = prefix.get(content["kind"], "benchmark.training.")
    names = {option["key"].removeprefix(start) for option in options}
    if training.keys() <= names:
        lines.append("- training: has the [training options](#training-options)")
        options = [
            option
            for option in options
            if training.get(option["key"].removeprefix(start), ...) != option["default"]
        ]
    return "\n".join(lines) + "\n\n" + (table(options) + "\n" if options else "")


def table(options: Sequence[Mapping[str, Any]]) -> str:
    """Return options as a Markdown table."""
    rows = ["| option | default | accepts | meaning |", "|---|---|---|---|"]
    rows += [
        f"| `{o['key']}` | `{json.dumps(o['default'])}` | {', '.join(accepted(o))} | "
        f"{o['help'].replace('|', chr(92) + '|')} |"
        for o in options
    ]
    return "\n".join(rows) + "\n"


def accepted(option: Mapping[str, Any]) -> Iterator[str]:
    """Yield what an option accepts, in words."""
    yield from option["choices"] or ()
    if option["low"] is not None:
        yield f"at least {option['low']}"
    if option["high"] is not None:
        yield f"at most {option['high']}"


def listing(value: Any) -> str:
    """Return a fact as text."""
    if isinstance(value, Mapping):
        value = [f"{key} {each}" for key, each in value.items()]
    return (", ".join(value) or "none") if isinstance(value, list) else str(value)


if __name__ == "__main__":
    print(page(), end="")
