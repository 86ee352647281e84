"""Matplotlib figures as inline SVG: text stays text, colours are the page's own variables.

Figures are drawn with stand-in colours that are replaced by CSS variables afterwards, so one
picture serves light and dark. They are small, so that text is legible on a phone, and grow with
the page.
"""

import io
import re
from typing import Any

from markupsafe import Markup, escape

SERIES = 8  # colours of methods; more methods repeat them with another dash
DASHES: tuple[tuple[float, ...], ...] = ((), (4, 1.5), (1, 1.2), (5, 1.2, 1, 1.2))

FG, MUTED, LINE, FORGET, HOLDOUT, RETAIN = (f"#0101{i:02x}" for i in range(6))
_VARIABLES = {
    FG: "--fg",
    MUTED: "--muted",
    LINE: "--line",
    FORGET: "--forget",
    HOLDOUT: "--holdout",
    RETAIN: "--retain",
    **{f"#0202{i:02x}": f"--c{i}" for i in range(SERIES)},
    **{f"#0303{i:02x}": f"--p{i}" for i in range(5)},
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mmforget",
    "text.parse_math": False,  # a name with two dollar signs is a name
    "font.size": 9,
    "axes.labelsize": 9,
    "text.color": FG,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": FG,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 1.5,
    "ytick.minor.size": 1.5,
    "lines.linewidth": 1.2,
}


def series(slot: int) -> str:
    """Return the stand-in colour of a method."""
    return f"#0202{slot % SERIES:02x}"


def dashes(slot: int) -> tuple[float, ...]:
    """Return the dash pattern of a method: another one each time the colours repeat."""
    return DASHES[slot // SERIES % len(DASHES)]


def shade(step: int) -> str:
    """Return a stand-in colour of the sequential scale, 0 (least) to 4 (unknown)."""
    return f"#0303{step:02x}"


class Picture:
    """One figure with one pair of axes; `svg` ends it.

    Args:
        width: Width in units of the SVG (font size 9).
        height: Height likewise.
        left: Room for what stands left of the axes, likewise.
    """

    def __init__(self, width: float, height: float, left: float = 46) -> None:
        import matplotlib  # half a second, which a table on the console need not wait for
        from matplotlib.figure import Figure

        with matplotlib.rc_context(_STYLE):
            self.figure = Figure(figsize=(width / 72, height / 72))
            # Fixed margins keep panels aligned, and a layout engine would draw each one twice.
            self.axes = self.figure.add_subplot()
            self.figure.subplots_adjust(left / width, 34 / height, 1 - 8 / width, 1 - 8 / height)

    def svg(self, name: str, label: str) -> Markup:
        """Return the picture for a page.

        Args:
            name: Prefix of the ids inside, unique on the page.
            label: What a screen reader says.
        """
        import matplotlib

        written = io.StringIO()
        with matplotlib.rc_context(_STYLE):
            self.figure.savefig(
                written, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
            )
        return Markup(_inline(written.getvalue(), name, label))


def _inline(text: str, name: str, label: str) -> str:
    """Return a stand-alone SVG as one for a page: no header, own ids, the page's colours."""
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', text)
    text = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 var(--sans)", text)
    text = re.sub(
        "#0[123]0[123][0-9a-f]{2}", lambda m: f"var({_VARIABLES.get(m[0], '--fg')})", text
    )
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None, "matplotlib writes a view box"
    head = f'<svg {box[0]} role="img" aria-label="{escape(label)}">'
    return re.sub(r"<svg[^>]*>", lambda _: head, text, count=1)
