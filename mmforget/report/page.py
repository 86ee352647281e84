"""One self-contained page, and the same numbers as CSV, LaTeX and JSON beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mmforget.record import RunResult, write_text
from mmforget.report import exports, plots, tables
from mmforget.report.collect import Block, Row, benchmark_class, collect
from mmforget.report.section import Section
from mmforget.report.svg import SERIES, dashes
from mmforget.report.verdict import distance_label, verdict

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Details:
    """What stands behind one run: config and environment as text, and its loss curve."""

    run: RunResult
    label: str
    config: str
    environment: str
    spark: tuple[Markup, str] | None


def write_report(runs: Sequence[RunResult], page: Path, title: str | None = None) -> list[Path]:
    """Write the page and, beside it under the same stem, `.csv`, `.tex` and `.json`.

    Runs of several benchmarks make one block each; runs that differ only in their seeds make one
    row. `original` and `retrain` runs that the records name are read from the disk if they are
    not among the runs.

    Args:
        runs: The records, in any order.
        page: The HTML file; each file is replaced as a whole or not at all.
        title: Heading; by default the benchmarks' names.

    Returns:
        The paths written, the page first.

    Raises:
        DataError: No run is finished.
        ResourceError: The disk is full.
    """
    blocks = collect(runs)
    contents = {
        page: render(blocks, title, page.stem),
        page.with_suffix(".csv"): exports.to_csv(blocks),
        page.with_suffix(".tex"): exports.to_latex(blocks),
        page.with_suffix(".json"): exports.to_records(blocks),
    }
    for path, text in contents.items():
        write_text(path, text)
    return list(contents)


def render(blocks: Sequence[Block], title: str | None, stem: str) -> str:
    """Return the page.

    Args:
        blocks: What `collect` returned.
        title: Heading; None takes the benchmarks' names.
        stem: Name of the files beside it, for the links.
    """
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = ", ".join(dict.fromkeys(block.benchmark for block in blocks))
    return environment.get_template("page.html.j2").render(
        title=title or f"Unlearning on {names}",
        stem=stem,
        css=Markup((_HERE / "page.css").read_text()),
        script=Markup((_HERE / "page.js").read_text()),
        blocks=[_view(block, f"b{i}") for i, block in enumerate(blocks)],
        leak_limits=plots.LEAK_LIMITS,
    )


def _view(block: Block, name: str) -> dict[str, Any]:
    """Return all that the template shows of one block."""
    heads, lines = tables.headline(block)
    histograms, unreadable = plots.histograms(block, f"{name}-hist")
    return {
        "name": name,
        "block": block,
        "sizes": block.request.get("sizes") or {},
        "request": _request(block.request),
        "sha": str(block.request.get("ids_sha", ""))[:12],
        "statuses": _statuses(block.runs),
        "notes": list(dict.fromkeys(note for run in block.runs for note in run.notes)),
        "verdict": verdict(block),
        "distance": distance_label(block),
        "heads": heads,
        "lines": lines,
        "every_run": tables.every_run(block),
        "several_seeds": any(len(row.runs) > 1 for row in block.rows),
        "tradeoff": plots.tradeoff(block, f"{name}-tradeoff"),
        "histograms": histograms,
        "unreadable": unreadable,
        "rocs": plots.rocs(block, f"{name}-roc"),
        "relearning": plots.relearning(block, f"{name}-relearn"),
        "legend": [(row.label, _swatch(row)) for row in block.rows if plots.has_curves(row)],
        "sections": _sections(block),
        "costs": tables.costs(block),
        "numbered": block.numbered,
        "groups": tables.metric_groups(block),
        "attacks": tables.attack_tables(block),
        "details": _details(block),
    }


def _request(request: Mapping[str, Any]) -> str:
    """Return the request in one line: its kind, then its other settings."""
    skipped = ("kind", "sizes", "ids_sha", "name")
    parts = [
        f"{key.replace('_', ' ')} {', '.join(map(str, _listed(value)))}"
        for key, value in request.items()
        if key not in skipped and value not in (None, "", [], {})
    ]
    return "; ".join([str(request.get("kind", "forget set")), *parts])


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]


def _statuses(runs: Sequence[RunResult]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for run in runs:
        counts[run.status] = counts.get(run.status, 0) + 1
    return counts


def _swatch(row: Row) -> tuple[str, str]:
    """Return the colour and the dash pattern of a row's curves, for the legend."""
    if row.kind == "retrain":
        return "var(--fg)", ""
    if row.kind == "original":
        return "var(--fg)", "5 3"
    pattern = " ".join(f"{1.5 * part:g}" for part in dashes(row.slot))
    return f"var(--c{row.slot % SERIES})", pattern


def _sections(block: Block) -> Sequence[Section]:
    cls = benchmark_class(block.benchmark)
    return () if cls is None else cls.sections(block.runs)


def _details(block: Block) -> list[Details]:
    return [
        Details(
            run,
            row.label,
            _yaml(run.config),
            _yaml(run.environment),
            plots.sparkline(run),
        )
        for row in block.rows
        for run in row.runs
    ]


def _yaml(content: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, width=88)
