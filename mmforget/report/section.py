"""One part of the report page."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """A titled part of the page.

    Attributes:
        title: Heading.
        html: Body, already escaped; self-contained (inline SVG, data URIs), no scripts.
        note: One paragraph of plain text under the heading: what is shown and how it misleads.
    """

    title: str
    html: str
    note: str = ""
