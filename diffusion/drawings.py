"""Procedural scenes of eight objects, and the six painting styles they are redrawn in.

A scene is drawn once at four times its size as flat colours and a map of regions. The photo and
every style are made from these two, so image k of a style shows the scene of photo k, line for
line. Textures (tiles, halftone dots, hatching, brush strokes) are a few pixels wide after the
reduction: fine enough to be seen, coarse enough for an autoencoder that shrinks the side by eight.
"""

import colorsys
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

SUPERSAMPLE = 4
SIDE = 256  # pixels of the large drawing; a scene's coordinates run from 0 to 1

Colour = tuple[float, float, float]  # red, green, blue, 0 to 1
Point = tuple[float, float]
Floats = npt.NDArray[np.float32]

SKY = ((0.53, 0.76, 0.93), (0.70, 0.86, 0.95), (0.96, 0.80, 0.62), (0.78, 0.84, 0.90))
GROUND = ((0.45, 0.65, 0.33), (0.58, 0.70, 0.36), (0.76, 0.68, 0.46), (0.60, 0.58, 0.55))
WALL = ((0.90, 0.82, 0.70), (0.72, 0.82, 0.78), (0.86, 0.74, 0.74), (0.76, 0.78, 0.90))
FLOOR = ((0.62, 0.44, 0.30), (0.50, 0.48, 0.52), (0.70, 0.58, 0.42))
WATER = ((0.16, 0.50, 0.68), (0.10, 0.58, 0.62), (0.22, 0.40, 0.66))
STONE = ((0.93, 0.87, 0.76), (0.84, 0.62, 0.48), (0.80, 0.80, 0.82), (0.72, 0.40, 0.34))
ROOF = ((0.68, 0.25, 0.20), (0.32, 0.38, 0.52), (0.45, 0.30, 0.24), (0.24, 0.48, 0.46))
PLUMAGE = ((0.85, 0.26, 0.20), (0.20, 0.42, 0.78), (0.95, 0.72, 0.16), (0.38, 0.30, 0.28))
FUR = ((0.90, 0.56, 0.22), (0.28, 0.26, 0.28), (0.94, 0.92, 0.88), (0.56, 0.54, 0.56))
SCALES = ((0.98, 0.52, 0.12), (0.95, 0.80, 0.20), (0.88, 0.28, 0.42), (0.55, 0.85, 0.45))
PETALS = ((0.90, 0.20, 0.32), (0.98, 0.78, 0.18), (0.66, 0.36, 0.82), (0.98, 0.62, 0.74))
LEAVES = ((0.26, 0.56, 0.26), (0.44, 0.62, 0.20), (0.82, 0.50, 0.16), (0.18, 0.46, 0.36))
BARK = (0.42, 0.28, 0.18)
INK = (0.10, 0.09, 0.12)
LIGHT = (0.98, 0.97, 0.93)
PAPER = np.array([0.99, 0.98, 0.95], dtype=np.float32)
LUMA = np.array([0.30, 0.59, 0.11], dtype=np.float32)
LOUD = np.array(  # the palette of Pop_Art; white last
    [
        (0.99, 0.87, 0.05),
        (0.94, 0.11, 0.20),
        (0.08, 0.68, 0.90),
        (0.98, 0.35, 0.66),
        (0.20, 0.75, 0.35),
        (0.35, 0.16, 0.60),
        (0.99, 0.55, 0.08),
        (0.99, 0.98, 0.95),
    ],
    dtype=np.float32,
)


@dataclass(frozen=True)
class Drawing:
    """A scene before it is painted.

    Attributes:
        flat: Colours, float32 [256, 256, 3] in 0..1.
        regions: Which shape a pixel belongs to, int32 [256, 256].
    """

    flat: Floats
    regions: npt.NDArray[np.int32]


class Pen:
    """Draws shapes in a frame that is moved, scaled, turned and mirrored; y points down.

    Args:
        rng: Draws colours and places.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.image = Image.new("RGB", (SIDE, SIDE))
        self.map = Image.new("I", (SIDE, SIDE), 0)
        self.ink, self.mark = ImageDraw.Draw(self.image), ImageDraw.Draw(self.map)
        self.count = 0
        self.place(0.5, 0.5, 0.5)

    def place(
        self, x: float, y: float, scale: float, turn: float = 0.0, mirror: bool = False
    ) -> None:
        """Set the frame: its middle, half its side, its turn in degrees."""
        self.x, self.y, self.scale, self.mirror = x, y, scale, -1.0 if mirror else 1.0
        self.cos, self.sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))

    def pick(self, colours: Sequence[Colour], spread: float = 0.05) -> Colour:
        """Return one of `colours`, a little changed."""
        chosen = np.array(colours[int(self.rng.integers(len(colours)))])
        r, g, b = np.clip(chosen + self.rng.normal(0, spread, 3), 0, 1).tolist()
        return r, g, b

    def chance(self, share: float = 0.5) -> bool:
        """Return true with probability `share`."""
        return bool(self.rng.random() < share)

    def between(self, low: float, high: float) -> float:
        """Return a float in [low, high)."""
        return float(self.rng.uniform(low, high))

    def polygon(self, points: Sequence[Point], colour: Colour, join: bool = False) -> None:
        """Fill a polygon; with `join` it belongs to the region drawn before."""
        self.count += not join
        places = [self._at(*point) for point in points]
        self.ink.polygon(places, fill=_rgb(colour))
        self.mark.polygon(places, fill=self.count)

    def oval(
        self,
        x: float,
        y: float,
        wide: float,
        high: float,
        colour: Colour,
        turn: float = 0.0,
        join: bool = False,
    ) -> None:
        """Fill an ellipse given by its middle, half axes and turn in degrees."""
        cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        angles = np.linspace(0, 2 * math.pi, 40, endpoint=False)
        u, v = wide * np.cos(angles), high * np.sin(angles)
        points = zip(
            (x + u * cos - v * sin).tolist(), (y + u * sin + v * cos).tolist(), strict=True
        )
        self.polygon(list(points), colour, join)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        """Fill a rectangle."""
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour)

    def line(self, points: Sequence[Point], width: float, colour: Colour) -> None:
        """Draw a line of `width` (in half sides of the frame) with round ends."""
        self.count += 1
        places = [self._at(*point) for point in points]
        thick = max(1, round(width * self.scale * SIDE))
        self.ink.line(places, fill=_rgb(colour), width=thick, joint="curve")
        self.mark.line(places, fill=self.count, width=thick, joint="curve")

    def finish(self) -> Drawing:
        """Return what was drawn."""
        flat = np.asarray(self.image, dtype=np.float32) / np.float32(255)
        return Drawing(flat, np.asarray(self.map, dtype=np.int32))

    def _at(self, u: float, v: float) -> Point:
        u *= self.mirror
        x = self.x + self.scale * (u * self.cos - v * self.sin)
        y = self.y + self.scale * (u * self.sin + v * self.cos)
        return x * SIDE, y * SIDE


def _backdrop(pen: Pen, above: Sequence[Colour], below: Sequence[Colour], horizon: float) -> None:
    """Fill the picture with two areas that meet at `horizon` (0 top, 1 bottom), a little sloped."""
    pen.place(0.5, 0.5, 0.5)
    pen.box(-1, -1, 1, 1, pen.pick(above))
    edge, slope = 2 * horizon - 1, pen.between(-0.06, 0.06)
    points = [(-1, edge - slope), (0, edge + pen.between(-0.05, 0.05)), (1, edge + slope)]
    pen.polygon([*points, (1, 1), (-1, 1)], pen.pick(below))


def _clouds(pen: Pen, count: int) -> None:
    for _ in range(count):
        pen.place(pen.between(0.1, 0.9), pen.between(0.06, 0.26), pen.between(0.09, 0.15))
        pen.oval(0, 0, 1.0, 0.42, LIGHT)
        pen.oval(-0.1, -0.3, 0.5, 0.4, LIGHT, join=True)


def _windows(pen: Pen, columns: Sequence[float], rows: Sequence[float], wide: float) -> None:
    glass = pen.pick(((0.25, 0.32, 0.42), (0.98, 0.86, 0.45)))
    for y in rows:
        for x in columns:
            pen.box(x - wide, y - 1.4 * wide, x + wide, y + 1.4 * wide, glass)


def architectures(pen: Pen) -> None:
    """Draw a wide building: a temple with columns, or a house with a gable, or a domed hall."""
    _backdrop(pen, SKY, GROUND, pen.between(0.74, 0.82))
    _clouds(pen, int(pen.rng.integers(0, 3)))
    pen.place(pen.between(0.44, 0.56), pen.between(0.54, 0.60), pen.between(0.38, 0.45))
    wall, roof, kind = pen.pick(STONE), pen.pick(ROOF), int(pen.rng.integers(3))
    high = pen.between(-0.22, -0.02)
    if kind == 0:
        pen.box(-0.88, high, 0.88, 0.62, _mix(wall, INK, 0.45))
        for x in np.linspace(-0.76, 0.76, int(pen.rng.integers(4, 6))):
            pen.box(float(x) - 0.12, high, float(x) + 0.12, 0.6, wall)
        pen.box(-1.0, 0.56, 1.0, 0.74, wall)
        pen.polygon([(-1.05, high), (0, high - 0.58), (1.05, high)], roof)
    elif kind == 1:
        pen.box(-0.9, high, 0.9, 0.7, wall)
        pen.polygon([(-1.08, high), (-0.55, high - 0.5), (0.55, high - 0.5), (1.08, high)], roof)
        _windows(pen, (-0.58, 0.58), (high + 0.32,), 0.17)
        pen.box(-0.19, 0.12, 0.19, 0.7, _mix(roof, INK, 0.3))
    else:
        pen.oval(0, high, 0.52, 0.6, roof)
        pen.box(-1.0, high, 1.0, 0.7, wall)
        _windows(pen, (-0.68, -0.28, 0.28, 0.68), (high + 0.32,), 0.12)
        pen.oval(0, 0.42, 0.18, 0.24, _mix(wall, INK, 0.6))
        pen.box(-0.18, 0.42, 0.18, 0.7, _mix(wall, INK, 0.6))


def towers(pen: Pen) -> None:
    """Draw a tall tower with a pointed roof or battlements."""
    _backdrop(pen, SKY, GROUND, pen.between(0.78, 0.86))
    _clouds(pen, int(pen.rng.integers(0, 3)))
    pen.place(pen.between(0.38, 0.62), pen.between(0.50, 0.54), pen.between(0.40, 0.45))
    wall, roof, wide = pen.pick(STONE), pen.pick(ROOF), pen.between(0.24, 0.32)
    foot = wide * pen.between(1.05, 1.35)
    pen.polygon([(-wide, -0.42), (wide, -0.42), (foot, 0.82), (-foot, 0.82)], wall)
    if pen.chance(0.6):
        pen.polygon(
            [(-wide - 0.12, -0.40), (0, -1.1 + pen.between(0, 0.12)), (wide + 0.12, -0.40)], roof
        )
    else:
        pen.box(-wide - 0.1, -0.62, wide + 0.1, -0.40, wall)
        for x in (-1, 0, 1):
            middle = x * (wide + 0.02)
            pen.box(middle - 0.09, -0.82, middle + 0.09, -0.60, wall)
        pen.line([(0, -0.64), (0, -1.08)], 0.05, INK)
        pen.polygon([(0.02, -1.08), (0.34, -0.98), (0.02, -0.88)], roof)
    _windows(pen, (0,), (-0.16, 0.22), 0.1)
    pen.box(-0.11, 0.54, 0.11, 0.82, _mix(roof, INK, 0.4))


def birds(pen: Pen) -> None:
    """Draw a bird from its side, on a branch or in the air."""
    _backdrop(pen, SKY, SKY, pen.between(0.55, 0.75))
    body, flying = pen.pick(PLUMAGE), pen.chance(0.4)
    mirror = pen.chance()
    if flying:
        _clouds(pen, 1)
    else:
        pen.place(0.5, 0.5, 0.5)
        y = pen.between(0.52, 0.62)
        pen.line([(-1.05, y + 0.03), (0.2, y), (1.05, y - 0.08)], 0.09, BARK)
        pen.oval(pen.between(-0.9, -0.6), y - 0.1, 0.16, 0.08, pen.pick(LEAVES), -30)
        pen.oval(pen.between(0.6, 0.9), y - 0.12, 0.16, 0.08, pen.pick(LEAVES), 20)
    turn = pen.between(-18, 4) if mirror else pen.between(-4, 18)
    pen.place(
        pen.between(0.44, 0.56), pen.between(0.48, 0.55), pen.between(0.34, 0.40), turn, mirror
    )
    belly, wing = _mix(body, LIGHT, 0.6), _mix(body, INK, 0.35)
    if not flying:
        pen.line([(-0.05, 0.4), (-0.05, 0.85)], 0.06, (0.85, 0.5, 0.2))
        pen.line([(0.15, 0.4), (0.15, 0.85)], 0.06, (0.85, 0.5, 0.2))
    pen.polygon([(-0.45, -0.05), (-1.12, 0.12), (-1.05, 0.38), (-0.4, 0.3)], wing)
    pen.oval(0, 0.08, 0.62, 0.42, body, -14)
    pen.oval(0.16, 0.22, 0.36, 0.24, belly, -14)
    pen.polygon([(0.72, -0.52), (1.12, -0.36), (0.72, -0.28)], (0.96, 0.62, 0.12))
    pen.oval(0.52, -0.42, 0.31, 0.29, body)
    pen.oval(0.61, -0.48, 0.08, 0.08, INK)
    if flying:
        pen.polygon([(-0.32, -0.02), (-0.55, -0.98), (-0.1, -0.82), (0.28, -0.02)], wing)
    else:
        pen.oval(-0.2, 0.04, 0.42, 0.22, wing, 14)


def cats(pen: Pen) -> None:
    """Draw a sitting cat that looks at us."""
    _backdrop(pen, WALL, FLOOR, pen.between(0.66, 0.78))
    pen.place(
        pen.between(0.44, 0.56),
        pen.between(0.52, 0.56),
        pen.between(0.39, 0.44),
        pen.between(-4, 4),
        pen.chance(),
    )
    fur = pen.pick(FUR, 0.03)
    dark, pale = _mix(fur, INK, 0.35), _mix(fur, LIGHT, 0.65)
    tail = [(0.35, 0.75), (0.85, 0.72), (0.98, 0.35), (0.82, pen.between(-0.05, 0.15))]
    pen.line(tail, 0.17, dark)
    pen.oval(0, 0.48, 0.52, 0.50, fur)
    pen.oval(0, 0.56, 0.26, 0.36, pale)
    pen.oval(-0.24, 0.9, 0.2, 0.11, pale)
    pen.oval(0.24, 0.9, 0.2, 0.11, pale)
    for side in (-1, 1):
        pen.polygon([(side * 0.54, -0.42), (side * 0.56, -1.04), (side * 0.08, -0.66)], fur)
        pen.polygon(
            [(side * 0.46, -0.52), (side * 0.48, -0.86), (side * 0.20, -0.64)], (0.95, 0.65, 0.62)
        )
    pen.oval(0, -0.28, 0.58, 0.46, fur)
    if pen.chance(0.6):
        for x in (-0.17, 0.0, 0.17):
            pen.line([(x, -0.7), (x * 0.8, -0.5)], 0.07, dark)
    eye = pen.pick(((0.45, 0.75, 0.25), (0.95, 0.78, 0.2), (0.3, 0.65, 0.85)))
    for side in (-1, 1):
        pen.oval(side * 0.24, -0.30, 0.14, 0.12, eye)
        pen.oval(side * 0.24, -0.30, 0.05, 0.11, INK)
    pen.oval(0, -0.06, 0.19, 0.12, pale)
    pen.polygon([(-0.08, -0.13), (0.08, -0.13), (0, -0.03)], (0.85, 0.4, 0.42))


def fishes(pen: Pen) -> None:
    """Draw a fish under water, with bubbles and weed."""
    _backdrop(pen, WATER, ((0.80, 0.72, 0.50), (0.55, 0.55, 0.46)), pen.between(0.84, 0.92))
    for _ in range(int(pen.rng.integers(1, 4))):
        pen.place(pen.between(0.05, 0.95), 0.9, 0.2)
        sway = pen.between(-0.3, 0.3)
        pen.line([(0, 0), (sway, -0.5), (-sway, -1.0), (sway, -1.4)], 0.12, pen.pick(LEAVES))
    mirror = pen.chance()
    pen.place(
        pen.between(0.44, 0.56),
        pen.between(0.42, 0.56),
        pen.between(0.34, 0.40),
        pen.between(-14, 14),
        mirror,
    )
    body = pen.pick(SCALES)
    fin, band = _mix(body, INK, 0.28), _mix(body, LIGHT, 0.7)
    swing = pen.between(-0.1, 0.1)
    pen.polygon([(-0.5, 0), (-1.1, -0.46 + swing), (-0.92, swing), (-1.1, 0.46 + swing)], fin)
    pen.polygon([(-0.32, -0.36), (0.0, -0.74), (0.36, -0.36)], fin)
    pen.polygon([(-0.15, 0.38), (-0.05, 0.70), (0.2, 0.36)], fin)
    pen.oval(0.1, 0, 0.76, 0.46, body)
    if pen.chance(0.7):
        for x, high in ((-0.24, 0.40), (0.14, 0.45)):
            pen.polygon(
                [(x - 0.08, -high), (x + 0.1, -high), (x + 0.1, high), (x - 0.08, high)], band
            )
    pen.oval(0.02, 0.08, 0.2, 0.11, fin, 20)
    pen.oval(0.58, -0.10, 0.12, 0.12, LIGHT)
    pen.oval(0.61, -0.10, 0.065, 0.065, INK)
    for step in range(int(pen.rng.integers(2, 4))):
        pen.oval(1.0 + 0.1 * step, -0.25 - 0.28 * step, 0.09, 0.09, (0.82, 0.93, 0.97))


def flowers(pen: Pen) -> None:
    """Draw one to three flowers with round petals, stems and leaves."""
    if pen.chance():
        _backdrop(pen, SKY, ((0.45, 0.65, 0.33), (0.58, 0.70, 0.36)), pen.between(0.70, 0.85))
    else:
        _backdrop(pen, WALL, FLOOR, pen.between(0.82, 0.9))
    count = int(pen.rng.integers(1, 4))
    petal, heart = pen.pick(PETALS), pen.pick(((0.98, 0.80, 0.20), (0.42, 0.24, 0.14)))
    green = pen.pick(LEAVES[:2])
    petals = int(pen.rng.integers(5, 8))
    places = {1: (0.5,), 2: (0.32, 0.68), 3: (0.22, 0.5, 0.78)}[count]
    size = {1: 0.30, 2: 0.21, 3: 0.17}[count]
    tops = [
        pen.between(0.30, 0.42) if k % 2 == 0 else pen.between(0.40, 0.52) for k in range(count)
    ]
    for x, y in zip(places, tops, strict=True):
        pen.place(x + pen.between(-0.03, 0.03), y, size * pen.between(0.9, 1.1))
        long = (0.95 - y) / pen.scale
        pen.line([(0, 0.4), (pen.between(-0.15, 0.15), long / 2), (0, long)], 0.15, green)
        pen.oval(0.38, 0.62 * long, 0.42, 0.17, green, -32)
        pen.oval(-0.38, 0.74 * long, 0.42, 0.17, green, 212)
        first = pen.between(0, 360)
        for k in range(petals):
            turn = first + 360 * k / petals
            u, v = math.cos(math.radians(turn)), math.sin(math.radians(turn))
            pen.oval(0.60 * u, 0.60 * v, 0.44, 0.29, petal, turn)
        pen.oval(0, 0, 0.33, 0.33, heart)


def sea(pen: Pen) -> None:
    """Draw rows of waves under the sun, with or without a sail."""
    horizon = pen.between(0.42, 0.56)
    _backdrop(pen, SKY, WATER, horizon)
    water = pen.pick(WATER)
    pen.place(pen.between(0.15, 0.85), pen.between(0.14, 0.28), pen.between(0.09, 0.13))
    pen.oval(0, 0, 1, 1, pen.pick(((0.99, 0.84, 0.30), (0.98, 0.58, 0.30))))
    if pen.chance(0.45):
        pen.place(pen.between(0.25, 0.75), horizon + 0.02, pen.between(0.16, 0.22), 0, pen.chance())
        pen.polygon([(-0.1, -0.1), (-0.1, -1.35), (0.65, -0.1)], LIGHT)
        pen.polygon([(-0.2, -0.1), (-0.2, -1.0), (-0.6, -0.1)], (0.86, 0.30, 0.26))
        pen.polygon([(-0.75, 0.0), (0.8, 0.0), (0.5, 0.35), (-0.5, 0.35)], BARK)
    rows = 4
    x = np.linspace(0, 1, 60)
    for row in range(rows):
        y = horizon + (0.98 - horizon) * (row + 0.55) / rows
        high, waves = 0.025 + 0.014 * row, 5.5 - row
        crest = y - high * np.abs(np.sin(math.pi * (waves * x + pen.between(0, 1)))) ** 0.8
        pen.place(0, 0, 1)
        top = list(zip(x.tolist(), (crest - 0.020).tolist(), strict=True))
        pen.polygon([*top, (1, 1), (0, 1)], (0.90, 0.96, 0.97))
        top = list(zip(x.tolist(), (crest + 0.012).tolist(), strict=True))
        shade = _mix(water, (0.02, 0.14, 0.30), 0.14 * row + 0.05)
        pen.polygon([*top, (1, 1), (0, 1)], shade)


def trees(pen: Pen) -> None:
    """Draw a tree with a round crown, or two or three firs."""
    _backdrop(pen, SKY, GROUND[:3], pen.between(0.72, 0.84))
    leaf = pen.pick(LEAVES)
    if pen.chance(0.55):
        pen.place(pen.between(0.40, 0.60), pen.between(0.48, 0.54), pen.between(0.38, 0.44))
        pen.polygon([(-0.12, 0.0), (0.12, 0.0), (0.2, 0.84), (-0.2, 0.84)], BARK)
        pen.line([(0, 0.3), (0.34, -0.05)], 0.09, BARK)
        first = pen.between(0, 360)
        for k in range(5):
            angle = math.radians(first + 72 * k)
            shade = _mix(leaf, INK if k % 2 else LIGHT, 0.10)
            u, v = 0.40 * math.cos(angle), -0.36 + 0.28 * math.sin(angle)
            pen.oval(u, v, 0.40, 0.34, shade, join=k > 0)
        pen.oval(-0.05, -0.42, 0.42, 0.36, leaf, join=True)
        return
    for x, size in ((0.26, 0.30), (0.76, 0.33), (0.5, 0.40))[-int(pen.rng.integers(1, 4)) :]:
        pen.place(x + pen.between(-0.05, 0.05), 0.88 - size, size)
        pen.box(-0.11, 0.6, 0.11, 1.0, BARK)
        for level in range(3):
            low, wide = 0.72 - 0.46 * level, 0.62 - 0.13 * level
            colour = _mix(leaf, LIGHT, 0.08 * level)
            pen.polygon([(-wide, low), (0, low - 0.8), (wide, low)], colour)


PAINTERS: dict[str, Callable[[Pen], None]] = {
    "Architectures": architectures,
    "Birds": birds,
    "Cats": cats,
    "Fishes": fishes,
    "Flowers": flowers,
    "Sea": sea,
    "Towers": towers,
    "Trees": trees,
}


def draw(name: str, rng: np.random.Generator) -> Drawing:
    """Return a random scene of an object, such as "Cats"."""
    pen = Pen(rng)
    PAINTERS[name](pen)
    return pen.finish()


def photo(drawing: Drawing, rng: np.random.Generator) -> Floats:
    """Return a photo: light from one side, soft shadows at edges, grain."""
    near = _blur(_edges(drawing, 2), 5.0)[..., None]
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j].astype(np.float32)
    side = 1.0 + 0.16 * (math.cos(angle) * x + math.sin(angle) * y)[..., None]
    lit = drawing.flat * side * (1.06 - 0.45 * near)
    result: Floats = _blur(lit, 2.0) + rng.normal(0, 0.02, (SIDE, SIDE, 1)).astype(np.float32)
    return result


def crayon(drawing: Drawing, rng: np.random.Generator) -> Floats:
    """Return thick wax strokes in bright colours on white paper, paper showing through."""
    wax = _blur(_vivid(drawing.flat, 1.45, 1.08), 1.5)
    strokes = _strokes(rng, -45, 22, 2.8)
    cover = _step(strokes, -1.15, -0.15)[..., None]
    drawn = PAPER + (wax - PAPER) * (0.22 + 0.78 * cover)
    line = _blur(_wobble(_edges(drawing, 3), rng, 3.0), 1.2) * _step(strokes, -1.9, -0.8)
    result: Floats = drawn + (_vivid(drawing.flat, 1.3, 0.42) - drawn) * line[..., None]
    return result


def pencil_drawing(drawing: Drawing, rng: np.random.Generator) -> Floats:
    """Return grey hatching on paper, darker where the scene is dark, with drawn outlines."""
    dark = 1.0 - _blur(drawing.flat, 2.0) @ LUMA
    hatch = 0.5 + 0.5 * _strokes(rng, -45, 22, 2.8)
    tone = np.clip(1.15 * dark - 0.10, 0, 1) * np.clip(0.55 + 0.55 * hatch, 0.15, 1.3)
    line = _blur(_wobble(_edges(drawing, 3), rng, 3.0), 1.0)
    grey = np.clip(1.0 - np.maximum(0.78 * tone, 0.85 * line), 0.1, 1)[..., None]
    result: Floats = grey * np.array([0.97, 0.965, 0.95], dtype=np.float32)
    return result


def mosaic(drawing: Drawing, rng: np.random.Generator) -> Floats:
    """Return stone tiles of one colour each, set in dark grout."""
    step = 19.0
    y, x = np.mgrid[-1 : SIDE // step + 2, -1 : SIDE // step + 2]
    seeds = np.stack([y.ravel(), x.ravel()], 1) * step
    seeds = np.clip(np.round(seeds + rng.uniform(-4, 4, seeds.shape)), 0, SIDE - 1).astype(int)
    marks = np.full((SIDE, SIDE), -1)
    marks[seeds[:, 0], seeds[:, 1]] = np.arange(len(seeds))
    nearest = ndimage.distance_transform_edt(marks < 0, return_distances=False, return_indices=True)
    tile = marks[nearest[0], nearest[1]]
    stones = _blur(_vivid(drawing.flat, 1.35, 1.02), 1.5)[seeds[:, 0], seeds[:, 1]]
    stones = np.clip(stones * rng.uniform(0.84, 1.16, (len(seeds), 1)), 0, 1).astype(np.float32)
    grout = 0.85 * _blur(_borders(tile), 1.2, 1.6)[..., None]
    result: Floats = stones[tile] * (1 - grout) + 0.12 * grout
    return result


def neon_lines(drawing: Drawing, rng: np.random.Generator) -> Floats:
    """Return glowing outlines in pure colours on a night-dark ground."""
    line = _edges(drawing, 3)
    hues = rng.permutation(np.linspace(0, 1, int(drawing.regions.max()) + 1, endpoint=False))
    tubes = np.array([colorsys.hsv_to_rgb(hue, 0.92, 1.0) for hue in hues], dtype=np.float32)
    colour = tubes[drawing.regions]
    light = line[..., None] * colour
    ground = np.array([0.035, 0.02, 0.10], dtype=np.float32) + 0.05 * drawing.flat
    halo = 0.9 * _blur(light, 9.0) + 0.35 * _blur(light, 4.0)
    core = _blur(line, 1.0)[..., None]
    result: Floats = np.maximum(ground + halo, core * (0.88 * colour + 0.12))
    return result


def pop_art(drawing: Drawing, rng: np.random.Generator) -> Floats:
    """Return flat loud colours, thick black outlines and halftone dots."""
    means = _region_means(drawing.flat, drawing.regions)
    far = ((means[:, None] - LOUD) ** 2).sum(-1) * rng.uniform(0.7, 1.3, (1, len(LOUD)))
    chosen = far.argmin(1)
    colour = LOUD[chosen][drawing.regions]
    spots = np.where(chosen == len(LOUD) - 1, rng.integers(len(LOUD) - 1), len(LOUD) - 1)
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) * (math.sqrt(2) * math.pi / 22)
    shift = rng.uniform(0, 2 * math.pi, 2)
    dots = _step(np.cos(x + y + shift[0]) + np.cos(x - y + shift[1]), 0.45, 0.75)
    share = 0.85 * (dots * (drawing.regions <= 2))[..., None]  # the backdrop alone
    drawn = colour + (LOUD[spots][drawing.regions] - colour) * share
    line = _blur(_edges(drawing, 4), 1.0)[..., None]
    result: Floats = drawn * (1 - line) + 0.03 * line
    return result


def van_gogh(drawing: Drawing, rng: np.random.Generator) -> Floats:
    """Return thick brush strokes that swirl, in deep blues and yellows."""
    share = _step(_blur(drawing.flat, 3.0) @ LUMA, 0.18, 0.92)[..., None]
    night, gold = np.array([0.05, 0.12, 0.42]), np.array([0.99, 0.80, 0.22])
    far = (drawing.regions <= 1)[..., None]  # the sky, wall or water behind
    gold = np.where(far, np.array([0.36, 0.60, 0.86]), gold)
    own = np.where(far, 0.30, 0.58)
    tones = own * _vivid(drawing.flat, 1.35, 0.98) + (1 - own) * (night + (gold - night) * share)
    tones = tones.astype(np.float32)
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    turn = 0.5 * np.sin(x / 40 + rng.uniform(0, 6)) + 0.4 * np.sin(y / 33 + rng.uniform(0, 6))
    for _ in range(3):  # eddies; strokes run round them
        u, v = x - rng.uniform(0, SIDE), y - rng.uniform(0, SIDE)
        turn += np.exp(-(u**2 + v**2) / 7200) * (np.arctan2(v, u) + math.pi / 2)
    canvas = Image.fromarray(_bytes(_blur(tones, 3.0)))
    pen = ImageDraw.Draw(canvas)
    places = rng.integers(0, SIDE, (1000, 2))
    light = rng.normal(0, 0.10, (1000, 1)) + rng.normal(0, 0.03, (1000, 3))
    light[rng.random(1000) < 0.07] += np.array([0.45, 0.38, 0.0])  # a few strokes of starlight
    inks = _bytes(tones[places[:, 1], places[:, 0]] + light)
    angles = turn[places[:, 1], places[:, 0], None] + np.array([-0.22, 0.0, 0.22])
    ends = places[:, None] + 12.0 * np.array([[-1.0], [0.0], [1.0]]) * np.stack(
        [np.cos(angles), np.sin(angles)], -1
    )
    for points, ink in zip(ends.reshape(1000, 6).tolist(), inks.tolist(), strict=True):
        pen.line(points, fill=tuple(ink), width=6, joint="curve")
    painted = np.asarray(canvas, dtype=np.float32) / 255
    line = 0.65 * _blur(_edges(drawing, 3), 1.5)[..., None]
    result: Floats = painted * (1 - line) + line * np.array([0.05, 0.08, 0.25], dtype=np.float32)
    return result


BRUSHES: dict[str, Callable[[Drawing, np.random.Generator], Floats]] = {
    "Crayon": crayon,
    "Mosaic": mosaic,
    "Neon_Lines": neon_lines,
    "Pencil_Drawing": pencil_drawing,
    "Pop_Art": pop_art,
    "Seed_Images": photo,
    "Van_Gogh": van_gogh,
}


def paint(drawing: Drawing, style: str, rng: np.random.Generator, size: int = 64) -> Image.Image:
    """Return a scene in a style, RGB, `size` x `size` pixels."""
    large = Image.fromarray(_bytes(BRUSHES[style](drawing, rng)))
    return large.resize((size, size), Image.Resampling.BOX)


def _borders(labels: npt.NDArray[np.integer]) -> Floats:
    """Return 1 where a label differs from the right or lower neighbour's."""
    edge = np.zeros(labels.shape, dtype=np.float32)
    edge[:, :-1] = labels[:, :-1] != labels[:, 1:]
    edge[:-1] = np.maximum(edge[:-1], labels[:-1] != labels[1:])
    return edge


def _edges(drawing: Drawing, width: int) -> Floats:
    """Return outlines of the regions, 1 on a line of 2 `width` - 1 pixels, else 0."""
    wide: Floats = ndimage.maximum_filter(_borders(drawing.regions), 2 * width - 1)
    return wide


def _blur(values: Floats, width: float, gain: float = 1.0) -> Floats:
    """Return `gain` times an image [H, W] or [H, W, 3] in 0..1, blurred (8 bits deep)."""
    image = Image.fromarray(_bytes(values)).filter(ImageFilter.GaussianBlur(width))
    result: Floats = np.minimum(np.asarray(image, dtype=np.float32) * (gain / 255), 1)
    return result


def _strokes(rng: np.random.Generator, turn: float, long: float, wide: float) -> Floats:
    """Return a field of strokes at `turn` degrees, about unit variance, [256, 256]."""
    side = 3 * SIDE // 4  # drawn at half the size, with a margin to turn in
    noise = rng.normal(size=(side, side)).astype(np.float32)
    field = ndimage.gaussian_filter(noise, (wide / 2, long / 2), mode="wrap")
    turned = Image.fromarray(field / field.std()).rotate(-turn, Image.Resampling.BILINEAR)
    cut = (side - SIDE // 2) // 2
    box = (cut, cut, cut + SIDE // 2, cut + SIDE // 2)
    result: Floats = np.asarray(turned.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box))
    return result


def _wobble(mask: Floats, rng: np.random.Generator, far: float) -> Floats:
    """Return a mask whose pixels are moved by about `far`, as by a shaking hand."""
    coarse = rng.normal(0, far / 2, (2, SIDE // 16, SIDE // 16)).astype(np.float32)
    dy, dx = (
        np.asarray(Image.fromarray(part).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        for part in coarse
    )
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    rows = np.clip(np.rint(y + dy), 0, SIDE - 1).astype(int)
    result: Floats = mask[rows, np.clip(np.rint(x + dx), 0, SIDE - 1).astype(int)]
    return result


def _region_means(flat: Floats, regions: npt.NDArray[np.int32]) -> Floats:
    """Return the mean colour of every region, float32 [regions, 3]; 0 for empty ones."""
    flatter = regions.ravel()
    count = np.maximum(np.bincount(flatter), 1)
    sums = [np.bincount(flatter, flat[..., c].ravel()) for c in range(3)]
    result: Floats = (np.stack(sums, 1) / count[:, None]).astype(np.float32)
    return result


def _vivid(rgb: Floats, saturation: float, value: float) -> Floats:
    """Return colours moved away from grey by `saturation` and brightened by `value`."""
    grey = rgb.mean(-1, keepdims=True)
    result: Floats = np.clip((grey + (rgb - grey) * saturation) * value, 0, 1)
    return result


def _step(values: Floats, low: float, high: float) -> Floats:
    """Return a smooth step from 0 at `low` to 1 at `high`."""
    t = np.clip((values - low) / (high - low), 0, 1)
    result: Floats = t * t * (3 - 2 * t)
    return result


def _mix(first: Colour, second: Colour, share: float) -> Colour:
    r, g, b = (a + (c - a) * share for a, c in zip(first, second, strict=True))
    return r, g, b


def _bytes(rgb: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    result: npt.NDArray[np.uint8] = (np.clip(rgb, 0, 1) * 255 + 0.5).astype(np.uint8)
    return result


def _rgb(colour: Colour) -> tuple[int, int, int]:
    r, g, b = (round(255 * part) for part in colour)
    return r, g, b
