"""Numbers and names as text: one number of decimals a column, so that digits line up."""

import math
from collections.abc import Iterable

ARROWS = {"up": "↑", "down": "↓", "to_reference": "→"}
DIRECTIONS = {
    "up": "higher is better",
    "down": "lower is better",
    "to_reference": "the retrained model's value is the target; further either way is worse",
}
MISSING = "\N{EN DASH}"


def decimals(values: Iterable[float | None]) -> int:
    """Return how many decimals a column needs, from its largest magnitude."""
    sizes = [abs(value) for value in values if value is not None and math.isfinite(value)]
    largest = max(sizes, default=0.0)
    for limit, places in ((1000, 0), (100, 1), (10, 2)):
        if largest >= limit:
            return places
    return 3 if largest >= 0.01 or largest == 0 else 5


def fixed(value: float | None, places: int, sign: bool = False) -> str:
    """Return a number with this many decimals; a dash for none or NaN."""
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    text = f"{value:{'+' if sign else ''},.{places}f}"
    return text.replace("-", "\N{MINUS SIGN}").replace(",", "\N{THIN SPACE}")


def plain(value: float | None) -> str:
    """Return a number that stands alone, in a sentence."""
    return fixed(value, decimals([value]))


def column_label(name: str) -> str:
    """Return a value's name for a sentence: `accuracy/test` -> `accuracy on test`."""
    family, _, rest = name.partition("/")
    words = rest.replace("_", " ")
    return f"{family} on {words}" if family == "accuracy" else name


def seconds(value: float) -> str:
    """Return a duration: 0.8 s, 12 s, 3 min 20 s, 2 h 05 min."""
    if value < 10:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def memory(value: float) -> str:
    """Return bytes as MiB or GiB."""
    mebi = value / 2**20
    return f"{mebi:,.0f} MiB" if mebi < 1024 else f"{mebi / 1024:.1f} GiB"
