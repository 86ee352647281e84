"""The same numbers for other programs: CSV, LaTeX, JSON, and plain text for a terminal."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from mmforget.record import RunResult, to_json
from mmforget.report.collect import Block, Row, collect, numbers_of
from mmforget.report.tables import Head, headline
from mmforget.report.verdict import distance_label

_ESCAPES = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "{": r"\{",
        "}": r"\}",
        "$": r"\$",
        "&": r"\&",
        "%": r"\%",
        "#": r"\#",
        "_": r"\_",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "↑": r"$\uparrow$",
        "↓": r"$\downarrow$",
        "→": r"$\to$",
        "±": r"$\pm$",
        "\N{EN DASH}": "--",
        "∞": r"$\infty$",
        "\N{MINUS SIGN}": "$-$",
        "\N{THIN SPACE}": r"\,",
    }
)


def headline_rows(runs: Sequence[RunResult]) -> list[Row]:
    """Return the rows of the first table, ranked, of all benchmarks one after another.

    Raises:
        DataError: No run is finished.
    """
    return [row for block in collect(runs) for row in block.rows]


def text_table(runs: Sequence[RunResult], width: int) -> str:
    """Return the first table of each benchmark as plain text.

    Args:
        runs: The records.
        width: Columns of the terminal.

    Raises:
        DataError: No run is finished.
    """
    written = io.StringIO()
    console = Console(file=written, width=width, color_system=None, markup=False)
    for block in collect(runs):
        console.print(_table(block))
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines()) + "\n"


def _table(block: Block) -> Table:
    heads, lines = headline(block)
    mini = " (mini: generated data)" if block.mini else ""
    table = Table(
        title=f"{block.benchmark}{mini}",
        caption=f"distance: {distance_label(block)}. ↑ ↓ better, → the retrained model's value",
        title_justify="left",
        caption_justify="left",
        title_style="none",
        caption_style="none",
        header_style="none",
        box=None,
        pad_edge=False,
    )
    table.add_column("method", overflow="fold")
    for item in heads:
        table.add_column(_head_text(item), justify="right", overflow="fold")
    for line in lines:
        cells = [f"{cell.text} {cell.sub}".strip() for cell in line.cells]
        table.add_row(_marked(line.row), *cells)
    return table


def _head_text(item: Head) -> str:
    return f"{item.family}\n{item.name} {item.arrow}".strip()


def _marked(row: Row) -> str:
    if row.status == "finished":
        return row.label
    return f"{row.label} [{row.status}]" if row.runs else f"{row.label} ({row.reason})"


def to_csv(blocks: Sequence[Block]) -> str:
    """Return one line a run: who it is, its cost, and each value with interval and reference."""
    listed = [(run, row.label, block) for block in blocks for row in block.rows for run in row.runs]
    names = sorted({name for run, _, _ in listed for name in numbers_of(run)})
    rows = []
    for run, label, _ in listed:
        row: dict[str, Any] = {
            "id": run.id,
            "benchmark": run.benchmark,
            "method": run.method,
            "label": label,
            "status": run.status,
            "mini": run.mini,
            **{f"seed/{name}": seed for name, seed in asdict(run.seeds).items()},
            "forget_sha": run.request.get("ids_sha", ""),
            **{f"spent/{name}": value for name, value in asdict(run.cost).items()},
            "error": run.error or "",
        }
        for name, value in numbers_of(run).items():
            row[name] = value.value
            row[f"{name}:low"] = value.low
            row[f"{name}:high"] = value.high
            row[f"{name}:reference"] = value.reference
        rows.append(row)
    values = [f"{name}{part}" for name in names for part in ("", ":low", ":high", ":reference")]
    fixed = [name for name in rows[0] if name not in set(values)]
    written = io.StringIO()
    writer = csv.DictWriter(written, [*fixed, *values], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return written.getvalue()


def to_latex(blocks: Sequence[Block]) -> str:
    """Return the first table of each block, for the package booktabs."""
    return "\n".join(_latex(block) for block in blocks)


def _latex(block: Block) -> str:
    heads, lines = headline(block)
    top = [item.family for item in heads]
    names = [f"{item.name} {item.arrow}" for item in heads]
    mini = " Mini: generated data, not comparable with published numbers." if block.mini else ""
    caption = (
        f"{block.benchmark}: distance to the retrained model ({distance_label(block)}) and "
        f"headline metrics; → means the retrained model's value is the target.{mini}"
    )
    body = []
    for i, line in enumerate(lines):
        cells = [_marked(line.row), *(f"{cell.text} {cell.sub}".strip() for cell in line.cells)]
        body.append(_latex_line(cells))
        if i == 1:
            body.append(r"\midrule")
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{escape_latex(caption)}}}",
            rf"\begin{{tabular}}{{l{'r' * len(heads)}}}",
            r"\toprule",
            _latex_line(["", *top]),
            _latex_line(["method", *names]),
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(escape_latex(cell) for cell in cells) + r" \\"


def escape_latex(text: str) -> str:
    """Return text with every character that LaTeX reads as a command escaped."""
    return text.translate(_ESCAPES)


def to_records(blocks: Sequence[Block]) -> str:
    """Return the records' numbers as a JSON list: all of `run.json` but curves and config."""
    listed = []
    for block in blocks:
        for row in block.rows:
            for run in row.runs:
                content = json.loads(to_json(run))
                for name in ("config", "environment"):
                    del content[name]
                for attack in content["attacks"].values():
                    del attack["curves"]
                listed.append({"label": row.label, **content})
    return json.dumps(listed, indent=1, allow_nan=False) + "\n"
