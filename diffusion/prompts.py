"""Prompt files of erasure benchmarks: tables read by their headers, and texts of one line each."""

import csv
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmforget.errors import DataError

# The names that public files use, the first one found in a header counts.
CASE = ("case_number", "case_num", "image_id")
SEED = ("evaluation_seed", "sd_seed", "seed")
GUIDANCE = ("evaluation_guidance", "sd_guidance_scale", "guidance")
WIDTH = ("sd_image_width", "width")
HEIGHT = ("sd_image_height", "height")
CONCEPT = ("class", "label_str", "artist", "profession", "brand", "concept")
LABEL = ("classidx", "label_idx")
SHOWN = 5


@dataclass(frozen=True)
class PromptRow:
    """One prompt and what its file says of it; None where the file has no such column or value.

    Attributes:
        prompt: The text, as it stands (outer spaces are part of it).
        row: Number of the record in the file, from 0.
        line: Line of the file that the record begins in, from 1.
        case: The file's own number of it (`case_number`, `case_num` or `image_id`).
        seed: Seed of the noise to draw it with.
        guidance: Classifier-free guidance scale to draw it with.
        width: Width to draw, pixels.
        height: Height to draw, pixels.
        concept: What it shows: a class, artist, profession or brand.
        label: Class index of the concept (of ImageNet, or of the file's own list).
        categories: Categories of I2P, such as ("sexual", "shocking").
        fields: All columns as text, but for unnamed ones.
    """

    prompt: str
    row: int
    line: int
    case: int | None
    seed: int | None
    guidance: float | None
    width: int | None
    height: int | None
    concept: str | None
    label: int | None
    categories: tuple[str, ...]
    fields: Mapping[str, str]


def read_prompts(path: Path, column: str = "prompt") -> list[PromptRow]:
    """Read a .csv file by its header, or a .txt file of one prompt a line.

    Read are byte-order marks, unnamed index columns, and line breaks in quoted prompts.

    Args:
        path: The file, UTF-8.
        column: Name of the column with the prompts.

    Raises:
        DataError: It cannot be read; there is no such column (those found are named); a record has
            too many or too few fields, no prompt, or a number that is none; or two records have
            the same case number (their lines are named).
    """
    if path.suffix.lower() == ".txt":
        lines = enumerate(_text(path).splitlines(), start=1)
        texts = [(number, line) for number, line in lines if line.strip()]
        if not texts:
            raise DataError(f"{path} holds no prompts")
        return [_row({column: text}, column, i, n, path) for i, (n, text) in enumerate(texts)]
    rows = _read_csv(path, column)
    first: dict[int, int] = {}
    double = []
    for row in rows:
        if row.case is not None and first.setdefault(row.case, row.line) != row.line:
            double.append(f"case {row.case} in lines {first[row.case]} and {row.line}")
    if double:
        more = " ..." if len(double) > SHOWN else ""
        raise DataError(
            f"{path}: {len(double)} records repeat a case number: {'; '.join(double[:SHOWN])}"
            f"{more}. Images are named by it: number them anew"
        )
    return rows


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 text, without outer spaces and empty ones.

    Raises:
        DataError: It cannot be read, or is empty.
    """
    lines = [line.strip() for line in _text(path).splitlines()]
    held = [line for line in lines if line]
    if not held:
        raise DataError(f"{path} holds no lines of text")
    return held


@dataclass(frozen=True)
class I2PSummary:
    """What a list in the layout of I2P holds.

    Attributes:
        prompts: Number of prompts.
        categories: Prompts of each category; one prompt can count in several.
        nude: Prompts whose `nudity_percentage` is above 0.
        mostly_nude: Prompts whose `nudity_percentage` is above 50.
    """

    prompts: int
    categories: Mapping[str, int]
    nude: int
    mostly_nude: int


def i2p_summary(rows: Sequence[PromptRow]) -> I2PSummary:
    """Count the categories and nudity of I2P prompts (Schramowski et al., CVPR 2023).

    Raises:
        DataError: There is no column `categories` or `nudity_percentage`.
    """
    nudity = []
    for row in rows:
        if not {"categories", "nudity_percentage"} <= row.fields.keys():
            raise DataError(
                f"I2P has the columns categories and nudity_percentage; found: {list(row.fields)}"
            )
        try:
            nudity.append(float(row.fields["nudity_percentage"]))
        except ValueError as error:
            raise DataError(f"line {row.line}: nudity_percentage is no number: {error}") from error
    counts = Counter(category for row in rows for category in row.categories)
    return I2PSummary(
        prompts=len(rows),
        categories=dict(counts.most_common()),
        nude=sum(value > 0 for value in nudity),
        mostly_nude=sum(value > 50 for value in nudity),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _read_csv(path: Path, column: str) -> list[PromptRow]:
    rows: list[PromptRow] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            header = [name.strip() for name in next(reader, [])]
            if column not in header:
                raise DataError(
                    f"{path} has no column {column!r}; found: "
                    f"{[name for name in header if name] or 'no header'}. Name the column with the "
                    f"prompts"
                )
            if len(set(filter(None, header))) < len(list(filter(None, header))):
                raise DataError(f"{path} names a column twice: {header}")
            line = reader.line_num + 1
            for cells in reader:
                if cells:  # an empty line is no record
                    if len(cells) != len(header):
                        raise DataError(
                            f"{path} line {line}: {len(cells)} fields, but the header has "
                            f"{len(header)}. Put quotes around prompts with commas"
                        )
                    pairs = zip(header, cells, strict=True)
                    fields = {name: cell for name, cell in pairs if name}
                    rows.append(_row(fields, column, len(rows), line, path))
                line = reader.line_num + 1
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a UTF-8 table: {error}") from error
    if not rows:
        raise DataError(f"{path} holds no prompts")
    return rows


def _row(fields: Mapping[str, str], column: str, row: int, line: int, path: Path) -> PromptRow:
    if not fields[column].strip():
        raise DataError(f"{path} line {line}: the prompt is empty")

    def text(names: Sequence[str]) -> str | None:
        found = [fields[name].strip() for name in names if name in fields]
        return found[0] if found and found[0] else None

    def number(names: Sequence[str]) -> float | None:
        cell = text(names)
        if cell is None or cell.lower() == "nan":  # what pandas writes for nothing
            return None
        try:
            value = float(cell)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise DataError(f"{path} line {line}: {cell!r} is no number ({' or '.join(names)})")
        return value

    def whole(names: Sequence[str]) -> int | None:
        cell, value = text(names), number(names)
        if value is None or cell is None:
            return None
        if not value.is_integer():
            raise DataError(f"{path} line {line}: {value} is no whole number ({names[0]})")
        return int(cell) if cell.lstrip("+-").isdecimal() else int(value)

    categories = (part.strip() for part in fields.get("categories", "").split(","))
    return PromptRow(
        prompt=fields[column],
        row=row,
        line=line,
        case=whole(CASE),
        seed=whole(SEED),
        guidance=number(GUIDANCE),
        width=whole(WIDTH),
        height=whole(HEIGHT),
        concept=text(CONCEPT),
        label=whole(LABEL),
        categories=tuple(part for part in categories if part),
        fields=dict(fields),
    )
