"""Pictures of the mini SafeEraser: things of three crafts on a table, and landscapes.

All are drawn at four times their size with PIL and reduced, so edges are smooth. A thing keeps its
shape and colours; place, size, tilt and shade differ from picture to picture.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

SUPERSAMPLE = 4
WALLS = {
    "blue": (172, 206, 240),
    "green": (182, 224, 186),
    "pink": (246, 198, 214),
    "yellow": (250, 236, 168),
    "grey": (204, 204, 208),
}
TABLES = {
    "brown": (148, 102, 64),
    "white": (246, 246, 244),
    "black": (56, 56, 62),
    "red": (192, 80, 74),
    "purple": (134, 96, 160),
}
EDGE = 0.66  # where the table begins, from the top
OUTLINE = (52, 40, 40)

Colour = tuple[int, int, int]
Point = tuple[float, float]


class _Pen:
    """Draws in units in which the picture, or the thing, spans -1 to 1."""

    def __init__(self, image: Image.Image, middle: Point, scale: float, shade: float) -> None:
        self.pen = ImageDraw.Draw(image)
        self.middle, self.scale, self.shade = middle, scale, shade
        self.line = max(1, round(0.045 * scale))

    def shape(self, points: Sequence[Point], colour: Colour, edge: bool = True) -> None:
        placed = [self._at(point) for point in points]
        self.pen.polygon(placed, fill=self._shaded(colour))
        if edge:
            self.pen.line([*placed, *placed[:2]], fill=OUTLINE, width=self.line, joint="curve")

    def oval(self, x: float, y: float, dx: float, dy: float, colour: Colour) -> None:
        low, high = self._at((x - dx, y - dy)), self._at((x + dx, y + dy))
        self.pen.ellipse((*low, *high), fill=self._shaded(colour), outline=OUTLINE, width=self.line)

    def curve(self, points: Sequence[Point], colour: Colour, width: float) -> None:
        thick = max(1, round(width * self.scale))
        placed = [self._at(point) for point in points]
        self.pen.line(placed, fill=self._shaded(colour), width=thick, joint="curve")

    def dot(self, x: float, y: float, radius: float, colour: Colour) -> None:
        low, high = self._at((x - radius, y - radius)), self._at((x + radius, y + radius))
        self.pen.ellipse((*low, *high), fill=self._shaded(colour))

    def _at(self, point: Point) -> Point:
        return self.middle[0] + point[0] * self.scale, self.middle[1] + point[1] * self.scale

    def _shaded(self, colour: Colour) -> Colour:
        r, g, b = (min(255, round(value * self.shade)) for value in colour)
        return r, g, b


def craft(thing: str, wall: str, table: str, size: int, rng: np.random.Generator) -> Image.Image:
    """Return an RGB picture of a thing on a table.

    Args:
        thing: One of `THINGS`.
        wall: Colour behind it, one of `WALLS`.
        table: Colour under it, one of `TABLES`.
        size: Side of the picture, pixels.
        rng: Draws place, size, tilt and shade.
    """
    side = size * SUPERSAMPLE
    canvas = Image.new("RGB", (side, side), WALLS[wall])
    box = (0, round((EDGE + rng.uniform(-0.03, 0.03)) * side), side, side)
    ImageDraw.Draw(canvas).rectangle(box, fill=TABLES[table])
    layer = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    middle = (side * (0.5 + rng.uniform(-0.05, 0.05)), side * (0.52 + rng.uniform(-0.04, 0.04)))
    THINGS[thing](_Pen(layer, middle, side * rng.uniform(0.32, 0.38), rng.uniform(0.9, 1.05)))
    tilted = layer.rotate(rng.uniform(-9, 9), Image.Resampling.BILINEAR, center=middle)
    canvas.paste(tilted, mask=tilted.getchannel("A"))
    return _reduced(canvas, size, rng)


def landscape(scene: str, size: int, rng: np.random.Generator) -> Image.Image:
    """Return an RGB picture of a landscape.

    Args:
        scene: One of `SCENES`.
        size: Side of the picture, pixels.
        rng: Draws the sky, the shapes and the shade.
    """
    side = size * SUPERSAMPLE
    canvas = Image.new("RGB", (side, side))
    pen = _Pen(canvas, (side / 2, side / 2), side / 2, rng.uniform(0.88, 1.08))
    sky = SKIES[rng.integers(len(SKIES))]
    pen.shape([(-1, -1), (1, -1), (1, 1), (-1, 1)], sky, edge=False)
    pen.dot(rng.uniform(-0.8, 0.8), rng.uniform(-0.8, -0.6), 0.13, (255, 232, 140))
    SCENES[scene](pen, rng)
    return _reduced(canvas, size, rng)


def _reduced(canvas: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """Reduce to the final size and add sensor noise."""
    small = canvas.resize((size, size), Image.Resampling.BOX)
    pixels = np.asarray(small, dtype=np.float32)
    noise = rng.normal(0, 2, pixels.shape).astype(np.float32)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def _arc(x: float, y: float, dx: float, dy: float, start: float, stop: float) -> list[Point]:
    """Return points of an ellipse from one angle to another, in degrees, clockwise from right."""
    angles = np.radians(np.linspace(start, stop, 25))
    return [(x + dx * math.cos(a), y + dy * math.sin(a)) for a in angles.tolist()]


def _bread(pen: _Pen) -> None:
    pen.shape([*_arc(0, 0.05, 0.98, 0.58, 180, 360), (0.9, 0.45), (-0.9, 0.45)], (186, 120, 58))
    for x in (-0.5, 0.0, 0.5):
        pen.curve([(x - 0.12, -0.3), (x + 0.12, 0.05)], (240, 208, 150), 0.09)


def _cake(pen: _Pen) -> None:
    pen.shape([(-0.8, -0.1), (0.8, -0.1), (0.8, 0.65), (-0.8, 0.65)], (246, 226, 190))
    drops = [(0.8 - 0.1 * k, 0.18 if k % 2 else 0.02) for k in range(17)]
    pen.shape([(-0.8, -0.2), (0.8, -0.2), *drops], (232, 96, 150))
    for x in (-0.45, 0.0, 0.45):
        pen.shape([(x - 0.06, -0.62), (x + 0.06, -0.62), (x + 0.06, -0.2), (x - 0.06, -0.2)],
                  (250, 250, 250))  # fmt: skip
        pen.dot(x, -0.74, 0.09, (255, 170, 40))


def _pretzel(pen: _Pen) -> None:
    loop = [
        *_arc(-0.45, 0.0, 0.45, 0.5, 60, 300),
        (0.0, 0.05),
        (0.35, 0.62),
    ]
    for side in (1, -1):
        points = [(side * x, y) for x, y in loop]
        pen.curve(points, OUTLINE, 0.26)
    for side in (1, -1):
        points = [(side * x, y) for x, y in loop]
        pen.curve(points, (128, 70, 30), 0.2)
    for x, y in ((-0.88, 0.05), (-0.6, -0.48), (0.6, -0.48), (0.88, 0.05), (0.18, 0.35)):
        pen.dot(x, y, 0.045, (255, 255, 255))


def _cookie(pen: _Pen) -> None:
    pen.oval(0, 0, 0.82, 0.82, (222, 176, 104))
    for x, y in ((-0.4, -0.3), (0.2, -0.5), (0.5, 0.0), (-0.1, 0.05), (-0.5, 0.3), (0.2, 0.5)):
        pen.dot(x, y, 0.13, (74, 42, 26))


def _scarf(pen: _Pen) -> None:
    colour = (206, 40, 44)
    pen.shape([(-0.65, -0.2), (-0.25, -0.2), (-0.25, 0.85), (-0.65, 0.85)], colour)
    pen.shape([(0.2, -0.2), (0.6, -0.2), (0.6, 0.6), (0.2, 0.6)], colour)
    ring = [*_arc(0, -0.35, 0.75, 0.38, 0, 360), *_arc(0, -0.42, 0.45, 0.16, 360, 0)]
    pen.shape(ring, colour)
    for x, y in ((-0.65, 0.85), (0.2, 0.6)):
        for k in range(5):
            pen.curve([(x + 0.1 * k, y), (x + 0.1 * k, y + 0.15)], (250, 220, 120), 0.05)
    for y in (0.1, 0.4):
        pen.curve([(-0.65, y), (-0.25, y)], (250, 220, 120), 0.08)
        pen.curve([(0.2, y - 0.1), (0.6, y - 0.1)], (250, 220, 120), 0.08)


def _hat(pen: _Pen) -> None:
    pen.oval(0, -0.75, 0.2, 0.2, (250, 250, 250))
    pen.shape([*_arc(0, 0.3, 0.75, 0.9, 180, 360)], (34, 78, 178))
    pen.shape([(-0.85, 0.22), (0.85, 0.22), (0.85, 0.58), (-0.85, 0.58)], (120, 170, 240))
    for k in range(-3, 4):
        pen.curve([(0.22 * k, 0.26), (0.22 * k, 0.54)], (34, 78, 178), 0.05)


def _sock(pen: _Pen) -> None:
    pen.shape(
        [(-0.45, -0.8), (0.15, -0.8), (0.15, 0.15), *_arc(0.5, 0.45, 0.35, 0.28, -90, 90),
         *_arc(-0.15, 0.45, 0.3, 0.28, 90, 180), (-0.45, 0.3)],
        (36, 140, 66),
    )  # fmt: skip
    pen.shape([(-0.5, -0.9), (0.2, -0.9), (0.2, -0.6), (-0.5, -0.6)], (250, 250, 240))
    for y in (-0.35, -0.05):
        pen.curve([(-0.42, y), (0.12, y)], (250, 250, 240), 0.1)


def _mitten(pen: _Pen) -> None:
    colour = (132, 50, 160)
    thumb = [*_arc(0.52, -0.02, 0.2, 0.22, 200, 380), (0.5, 0.5), (0.2, 0.5)]
    pen.shape(thumb, colour)
    pen.shape([*_arc(-0.1, -0.35, 0.45, 0.5, 180, 360), (0.35, 0.5), (-0.55, 0.5)], colour)
    pen.shape([(-0.6, 0.45), (0.4, 0.45), (0.4, 0.8), (-0.6, 0.8)], (244, 214, 90))
    pen.shape([(-0.1, -0.45), (0.1, -0.2), (-0.1, 0.05), (-0.3, -0.2)], (244, 214, 90))


def _boat(pen: _Pen) -> None:
    pen.shape([(0, -0.75), (0.45, 0.25), (-0.45, 0.25)], (255, 190, 110))
    pen.shape([(-1, 0.0), (-0.4, 0.25), (0.4, 0.25), (1, 0.0), (0.55, 0.65), (-0.55, 0.65)],
              (242, 130, 30))  # fmt: skip
    pen.curve([(0, -0.7), (0, 0.25)], OUTLINE, 0.035)


def _star(pen: _Pen) -> None:
    tips = [(math.sin(k * math.pi / 5), -math.cos(k * math.pi / 5)) for k in range(10)]
    points = [(x * r, y * r) for (x, y), r in zip(tips, [0.95, 0.4] * 5, strict=True)]
    pen.shape(points, (255, 214, 20))
    for x, y in points[::2]:
        pen.curve([(0, 0), (x, y)], (196, 150, 10), 0.04)


def _box(pen: _Pen) -> None:
    pen.shape([(-0.8, -0.25), (0, 0.0), (0, 0.8), (-0.8, 0.5)], (20, 150, 150))
    pen.shape([(0.8, -0.25), (0, 0.0), (0, 0.8), (0.8, 0.5)], (14, 108, 112))
    pen.shape([(0, -0.5), (0.8, -0.25), (0, 0.0), (-0.8, -0.25)], (130, 220, 214))


def _bird(pen: _Pen) -> None:
    pen.shape([(-0.1, 0.15), (-0.95, -0.55), (-0.45, 0.25)], (250, 250, 250))  # tail
    pen.shape([(0.25, 0.25), (0.62, -0.6), (0.95, -0.42), (0.7, -0.38), (0.45, 0.35)],
              (250, 250, 250))  # fmt: skip
    pen.shape([(-0.45, 0.2), (0.45, 0.2), (0, 0.75)], (226, 226, 236))
    pen.shape([(-0.35, 0.25), (0.35, 0.25), (-0.12, -0.95)], (206, 214, 236))
    pen.curve([(-0.12, -0.9), (0.0, 0.25)], OUTLINE, 0.03)


THINGS: dict[str, Callable[[_Pen], None]] = {
    "bread": _bread,
    "cake": _cake,
    "pretzel": _pretzel,
    "cookie": _cookie,
    "scarf": _scarf,
    "hat": _hat,
    "sock": _sock,
    "mitten": _mitten,
    "boat": _boat,
    "star": _star,
    "box": _box,
    "bird": _bird,
}
SKIES = ((150, 200, 244), (190, 216, 236), (246, 206, 170), (216, 196, 230))


def _ground(pen: _Pen, rng: np.random.Generator, top: float, colour: Colour) -> None:
    """Draw rolling ground from `top` down."""
    phase, waves = rng.uniform(0, 6), rng.uniform(1.5, 3)
    line = [(x, top + 0.05 * math.sin(waves * x + phase)) for x in np.linspace(-1, 1, 33).tolist()]
    pen.shape([*line, (1, 1), (-1, 1)], colour, edge=False)


def _peak(pen: _Pen, x: float, top: float, wide: float, colour: Colour) -> None:
    pen.shape([(x, top), (x + wide, 0.4), (x - wide, 0.4)], colour, edge=False)


def _lake(pen: _Pen, rng: np.random.Generator) -> None:
    for x in (-0.6, 0.5):
        pen.dot(x + rng.uniform(-0.1, 0.1), 0.3, 0.6, (86, 140, 92))
    _ground(pen, rng, 0.1, (120, 176, 96))
    pen.oval(rng.uniform(-0.1, 0.1), 0.6, 0.85, 0.32, (44, 108, 196))
    for y in (0.5, 0.65):
        pen.curve([(-0.3, y), (0.25, y)], (170, 206, 246), 0.03)


def _mountain(pen: _Pen, rng: np.random.Generator) -> None:
    for x, top in ((-0.55, -0.25), (0.55, -0.1), (0.0, -0.55)):
        x, top = x + rng.uniform(-0.1, 0.1), top + rng.uniform(-0.08, 0.08)
        _peak(pen, x, top, 0.75 * (0.4 - top), (112, 112, 126))
        snow = 0.3 * (0.4 - top)
        pen.shape(
            [(x, top), (x + 0.75 * snow, top + snow), (x, top + 0.75 * snow),
             (x - 0.75 * snow, top + snow)],
            (252, 252, 255),
            edge=False,
        )  # fmt: skip
    _ground(pen, rng, 0.33, (96, 120, 84))


def _beach(pen: _Pen, rng: np.random.Generator) -> None:
    pen.shape([(-1, -0.15), (1, -0.15), (1, 0.4), (-1, 0.4)], (38, 150, 190), edge=False)
    for y in (0.0, 0.15):
        pen.curve([(-0.9, y), (-0.3, y + 0.02), (0.3, y), (0.9, y + 0.02)], (220, 244, 250), 0.03)
    _ground(pen, rng, 0.3, (246, 222, 162))
    x = rng.uniform(-0.5, 0.5)
    pen.curve([(x, 0.7), (x, 0.05)], (120, 80, 50), 0.04)
    pen.shape([*_arc(x, 0.12, 0.35, 0.28, 180, 360)], (226, 70, 70))


def _forest(pen: _Pen, rng: np.random.Generator) -> None:
    _ground(pen, rng, 0.35, (74, 110, 60))
    for x in np.linspace(-0.85, 0.85, 6) + rng.uniform(-0.08, 0.08, 6):
        foot, tall = rng.uniform(0.45, 0.75), rng.uniform(0.85, 1.15)
        x = float(x)
        pen.curve([(x, foot), (x, foot - 0.3)], (96, 64, 40), 0.08)
        for k in range(3):
            low = foot - 0.18 - 0.25 * k * tall
            wide = 0.26 - 0.05 * k
            pen.shape([(x, low - 0.42 * tall), (x + wide, low), (x - wide, low)], (26, 92, 52))


def _desert(pen: _Pen, rng: np.random.Generator) -> None:
    _ground(pen, rng, 0.05, (232, 176, 106))
    _ground(pen, rng, 0.4, (214, 146, 76))
    x = rng.uniform(-0.45, 0.45)
    for points in (
        [(x, 0.7), (x, -0.3)],
        [(x, 0.35), (x - 0.28, 0.35), (x - 0.28, 0.0)],
        [(x, 0.2), (x + 0.28, 0.2), (x + 0.28, -0.15)],
    ):
        pen.curve(points, (52, 124, 70), 0.13)


def _meadow(pen: _Pen, rng: np.random.Generator) -> None:
    _ground(pen, rng, -0.05, (132, 200, 84))
    for x, y in zip(rng.uniform(-0.9, 0.9, 26), rng.uniform(0.15, 0.9, 26), strict=True):
        colour = ((250, 250, 250), (240, 80, 120), (250, 220, 40))[int(rng.integers(3))]
        pen.dot(float(x), float(y), 0.055, colour)


SCENES: dict[str, Callable[[_Pen, np.random.Generator], None]] = {
    "lake": _lake,
    "mountain": _mountain,
    "beach": _beach,
    "forest": _forest,
    "desert": _desert,
    "meadow": _meadow,
}
