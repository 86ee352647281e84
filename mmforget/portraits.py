"""Procedural portraits: who a person is sets geometry, skin and hair; the rest is drawn per photo.

A portrait is drawn at four times its size with PIL and reduced, so edges are smooth. Age shows in
grey hair, wrinkles, eye size, face length and a receding hairline; gender in hair length, brows,
lips and beard; a smile in the mouth. None of these depends on the person.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

SUPERSAMPLE = 4
SKINS = ((255, 224, 196), (241, 194, 152), (224, 172, 125), (198, 134, 86), (141, 92, 60))
HAIRS = ((38, 28, 26), (84, 52, 34), (122, 74, 40), (176, 116, 56), (222, 184, 112), (150, 58, 36))
EYES = ((70, 46, 30), (46, 92, 120), (64, 110, 70), (96, 96, 104))
CLOTHES = (
    (58, 90, 140),
    (170, 64, 70),
    (66, 128, 96),
    (212, 160, 62),
    (112, 80, 150),
    (80, 84, 92),
)
BACKDROPS = ((206, 222, 236), (236, 222, 206), (214, 234, 214), (232, 212, 228), (222, 222, 226))
GREY_HAIR = (216, 216, 220)

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Person:
    """What stays the same on every photo of one person.

    Attributes:
        skin: Colour; likewise hair, eye.
        width: Half-width of the face, in image sides; likewise height.
        jaw: Width of the chin against the cheeks.
        eye_gap: Distance of the eyes from the middle, in face half-widths.
        eye_size: Relative to the usual; likewise nose, mouth, brow.
        parting: Where hair parts, -1 left to 1 right.
        mole: Place of a mole in face half-sizes.
        freckles: Whether there are any.
        glasses: Whether glasses are worn.
    """

    skin: Colour
    hair: Colour
    eye: Colour
    width: float
    height: float
    jaw: float
    eye_gap: float
    eye_size: float
    nose: float
    mouth: float
    brow: float
    parting: float
    mole: tuple[float, float] | None
    freckles: bool
    glasses: bool


@dataclass(frozen=True)
class Look:
    """What is drawn anew for a photo: attributes first, then pose, light and noise.

    Attributes:
        age: 0 (small child) to 1 (very old), as it looks on this photo.
        male: Whether male cues are drawn.
        smile: Whether the mouth smiles.
        turn: Head turn, -1 to 1.
        tilt: Head tilt, degrees.
        shift: Offset of the head, in image sides.
        zoom: Size of the head against the usual.
        light: Brightness against the usual; `warmth` shifts red against blue.
        backdrop: Colour behind.
        clothes: Colour below.
        noise: Standard deviation of sensor noise, grey levels.
    """

    age: float
    male: bool
    smile: bool
    turn: float
    tilt: float
    shift: tuple[float, float]
    zoom: float
    light: float
    warmth: float
    backdrop: Colour
    clothes: Colour
    noise: float


def draw_person(rng: np.random.Generator) -> Person:
    """Return a random person."""
    mole = (float(rng.uniform(-0.6, 0.6)), float(rng.uniform(0.1, 0.7)))
    return Person(
        skin=_near(SKINS[rng.integers(len(SKINS))], rng, 8),
        hair=_near(HAIRS[rng.integers(len(HAIRS))], rng, 12),
        eye=_near(EYES[rng.integers(len(EYES))], rng, 10),
        width=float(rng.uniform(0.255, 0.315)),
        height=float(rng.uniform(0.325, 0.375)),
        jaw=float(rng.uniform(0.55, 0.85)),
        eye_gap=float(rng.uniform(0.36, 0.48)),
        eye_size=float(rng.uniform(0.85, 1.2)),
        nose=float(rng.uniform(0.75, 1.35)),
        mouth=float(rng.uniform(0.8, 1.2)),
        brow=float(rng.uniform(0.8, 1.3)),
        parting=float(rng.uniform(-1, 1)),
        mole=mole if rng.random() < 0.35 else None,
        freckles=bool(rng.random() < 0.2),
        glasses=bool(rng.random() < 0.18),
    )


def draw_look(rng: np.random.Generator, age: float, male: bool, smile: bool) -> Look:
    """Return a random photo situation for given attributes."""
    return Look(
        age=float(np.clip(age, 0, 1)),
        male=male,
        smile=smile,
        turn=float(rng.uniform(-1, 1)),
        tilt=float(rng.normal(0, 5)),
        shift=(float(rng.normal(0, 0.015)), float(rng.normal(0, 0.012))),
        zoom=float(rng.uniform(0.92, 1.08)),
        light=float(rng.uniform(0.82, 1.12)),
        warmth=float(rng.normal(0, 5)),
        backdrop=_near(BACKDROPS[rng.integers(len(BACKDROPS))], rng, 10),
        clothes=_near(CLOTHES[rng.integers(len(CLOTHES))], rng, 12),
        noise=float(rng.uniform(1, 4)),
    )


def portrait(person: Person, look: Look, size: int, rng: np.random.Generator) -> Image.Image:
    """Return an RGB portrait of `size` x `size` pixels."""
    side = size * SUPERSAMPLE
    canvas = Image.new("RGB", (side, side), _rgb(look.backdrop))
    _shoulders(ImageDraw.Draw(canvas), person, look, side)
    mask = Image.new("L", (side, side), 0)
    layer = Image.new("RGB", (side, side))
    for image, colour in ((layer, None), (mask, 255)):
        _Head(ImageDraw.Draw(image), person, look, side, colour).draw()
    turned = {"resample": Image.Resampling.BILINEAR, "center": (side / 2, side * 0.75)}
    canvas.paste(layer.rotate(look.tilt, **turned), mask=mask.rotate(look.tilt, **turned))  # type: ignore[arg-type]
    small = canvas.resize((size, size), Image.Resampling.BOX)
    return Image.fromarray(_lit(np.asarray(small, dtype=np.float32), look, rng))


def _lit(
    pixels: npt.NDArray[np.float32], look: Look, rng: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """Apply light from one side, colour of light and sensor noise."""
    size = len(pixels)
    side = 1 + 0.10 * look.turn * np.linspace(-1, 1, size, dtype=np.float32)[None, :, None]
    tint = np.array([look.warmth, 0.0, -look.warmth], dtype=np.float32)
    noise = rng.normal(0, look.noise, pixels.shape).astype(np.float32)
    return np.clip(pixels * side * look.light + tint + noise, 0, 255).astype(np.uint8)


def _shoulders(pen: ImageDraw.ImageDraw, person: Person, look: Look, side: int) -> None:
    x = (0.5 + look.shift[0]) * side
    wide = (0.37 + 0.06 * look.male - 0.08 * (look.age < 0.2)) * side
    top = 0.87 * side
    pen.ellipse((x - wide, top, x + wide, top + 0.6 * side), fill=_rgb(look.clothes))
    neck = (0.115 + 0.02 * look.male) * side
    shade = _rgb(_mix(person.skin, (90, 50, 40), 0.22))
    pen.rectangle((x - neck, 0.7 * side, x + neck, top + 0.03 * side), fill=shade)
    pen.ellipse((x - neck, top - 0.02 * side, x + neck, top + 0.08 * side), fill=shade)


class _Head:
    """Draws one head; with `colour` set everything is drawn in it, which makes the mask."""

    def __init__(
        self, pen: ImageDraw.ImageDraw, person: Person, look: Look, side: int, colour: int | None
    ) -> None:
        self.pen, self.person, self.look, self.colour = pen, person, look, colour
        child = max(0.0, 1 - look.age / 0.22)
        self.child = child
        self.old = min(1.0, max(0.0, (look.age - 0.45) / 0.5))
        self.a = person.width * side * look.zoom * (1 - 0.04 * child)
        self.b = person.height * side * look.zoom * (1 - 0.13 * child)
        self.x = (0.5 + look.shift[0]) * side
        self.y = (0.50 + look.shift[1]) * side
        self.lean = look.turn * 0.13  # features move with the turn, in half-widths
        self.hair = _mix(person.hair, GREY_HAIR, min(1.0, max(0.0, (look.age - 0.5) / 0.35)))
        self.line = max(1, round(side * 0.008))

    def draw(self) -> None:
        self._back_hair()
        self._ears()
        self._face()
        self._skin_marks()
        self._eyes()
        self._nose()
        self._mouth()
        self._beard_and_front_hair()
        if self.person.glasses:
            self._glasses()

    def _ink(self, colour: Colour) -> tuple[int, int, int] | int:
        return self.colour if self.colour is not None else _rgb(colour)

    def _at(self, u: float, v: float) -> tuple[float, float]:
        """Return the place at (u, v) face half-sizes from the centre, moved by the turn."""
        near = math.sqrt(max(0.0, 1 - min(1.0, u * u + v * v)))
        return self.x + (u + self.lean * near) * self.a, self.y + v * self.b

    def _blob(self, u: float, v: float, du: float, dv: float, colour: Colour) -> None:
        x, y = self._at(u, v)
        box = (x - du * self.a, y - dv * self.a, x + du * self.a, y + dv * self.a)
        self.pen.ellipse(box, fill=self._ink(colour))

    def _curve(self, points: list[tuple[float, float]], colour: Colour, width: float) -> None:
        line = max(1, round(width * self.line))
        self.pen.line(
            [self._at(u, v) for u, v in points], fill=self._ink(colour), width=line, joint="curve"
        )

    def _back_hair(self) -> None:
        if self.look.male:
            return
        low = 0.45 + 0.75 * (0.5 + 0.5 * self.person.parting)
        top = self.y - 1.22 * self.b
        box = (self.x - 1.28 * self.a, top, self.x + 1.28 * self.a, self.y + low * self.b)
        self.pen.rounded_rectangle(
            box, 1.1 * self.a, fill=self._ink(_mix(self.hair, (0, 0, 0), 0.2))
        )

    def _ears(self) -> None:
        for side in (-1, 1):
            x = self.x + side * 0.98 * self.a
            r = 0.17 * self.a
            box = (x - r, self.y - 0.02 * self.b - r, x + r, self.y - 0.02 * self.b + 1.6 * r)
            self.pen.ellipse(box, fill=self._ink(_mix(self.person.skin, (150, 70, 60), 0.15)))

    def _face(self) -> None:
        angle = np.linspace(0, 2 * math.pi, 72, endpoint=False)
        jaw = self.person.jaw + 0.12 * self.look.male
        lower = np.clip(np.sin(angle), 0, 1) ** 2
        wide = np.cos(angle) * (1 - lower * (1 - jaw) * 0.7)
        outline = zip(self.x + wide * self.a, self.y + np.sin(angle) * self.b, strict=True)
        self.pen.polygon(
            [(float(x), float(y)) for x, y in outline], fill=self._ink(self.person.skin)
        )

    def _skin_marks(self) -> None:
        skin = self.person.skin
        blush = _mix(skin, (232, 110, 100), 0.22 + 0.18 * self.child)
        for side in (-1, 1):
            self._blob(side * 0.55, 0.28, 0.2, 0.14, blush)
        if self.person.freckles:
            for u, v in ((-0.5, 0.2), (-0.35, 0.27), (0.35, 0.2), (0.5, 0.27)):
                self._blob(u, v, 0.035, 0.035, _mix(skin, (120, 60, 30), 0.5))
        if self.person.mole is not None:
            self._blob(*self.person.mole, 0.05, 0.05, (70, 40, 34))
        crease = _mix(skin, (80, 40, 30), 0.5)
        if self.old > 0.1:
            for k in range(1 + round(2 * self.old)):
                v = -0.50 - 0.11 * k
                self._curve([(-0.4, v + 0.02), (0, v), (0.4, v + 0.02)], crease, 0.8)
        if self.old > 0.3:
            for side in (-1, 1):
                self._curve([(side * 0.24, 0.28), (side * 0.42, 0.52)], crease, 1.0)
                self._curve([(side * 0.72, -0.06), (side * 0.84, -0.14)], crease, 0.8)

    def _eyes(self) -> None:
        p = self.person
        size = p.eye_size * (1 + 0.35 * self.child - 0.15 * self.old)
        v = -0.08 + 0.10 * self.child
        for side in (-1, 1):
            u = side * p.eye_gap
            self._blob(u, v, 0.175 * size, 0.125 * size, (250, 250, 250))
            gaze = u + 0.02 * self.look.turn
            self._blob(gaze, v, 0.105 * size, 0.115 * size, p.eye)
            self._blob(gaze, v, 0.055 * size, 0.06 * size, (18, 14, 14))
            self._blob(gaze + 0.035, v - 0.03, 0.025, 0.025, (255, 255, 255))
            if not self.look.male:
                lash = [
                    (u - 0.2 * size, v - 0.03),
                    (u, v - 0.12 * size),
                    (u + 0.2 * size, v - 0.03),
                ]
                self._curve(lash, (40, 28, 28), 1.1)
            top = v - 0.24 - 0.04 * size
            thick = p.brow * (2.4 if self.look.male else 1.3) * (1 - 0.5 * self.child)
            brow = [(u - side * 0.18, top + 0.02), (u, top - 0.04), (u + side * 0.2, top + 0.03)]
            self._curve(brow, _mix(self.hair, (30, 20, 20), 0.35), thick)

    def _nose(self) -> None:
        long = 0.26 * self.person.nose * (1 - 0.35 * self.child)
        shade = _mix(self.person.skin, (130, 60, 46), 0.38)
        self._curve([(-0.02, -0.02), (0.06, long - 0.06), (0.0, long)], shade, 1.2)
        self._curve([(-0.10, long), (0.0, long + 0.03), (0.10, long)], shade, 1.4)

    def _mouth(self) -> None:
        wide = 0.3 * self.person.mouth * (1 - 0.15 * self.child)
        v = 0.55 - 0.03 * self.child
        lips = (196, 62, 76) if not self.look.male else _mix(self.person.skin, (150, 50, 50), 0.55)
        turns = np.linspace(-1, 1, 13)
        if self.look.smile:
            wide *= 1.25
            lower = [(wide * t, v - 0.05 + 0.19 * (1 - t * t)) for t in turns]
            upper = [(wide * t, v - 0.05 + 0.04 * (1 - t * t)) for t in turns[::-1]]
            self.pen.polygon([self._at(*q) for q in lower + upper], fill=self._ink((250, 246, 240)))
            self._curve(lower, lips, 1.7)
            self._curve(upper, lips, 1.3)
        else:
            self._curve([(wide * t, v + 0.03 * t * t) for t in turns], lips, 2.6)
            self._curve([(0.5 * wide * t, v + 0.09) for t in turns], lips, 1.2)

    def _beard_and_front_hair(self) -> None:
        male, p = self.look.male, self.person
        if male and self.child < 0.2 and self.look.age > 0.25:
            stubble = _mix(self.hair, self.person.skin, 0.35)
            beard = [(t, 0.42 + 0.52 * math.sqrt(1 - t * t)) for t in np.linspace(-0.62, 0.62, 9)]
            inner = [(t, 0.5 + 0.26 * math.sqrt(1 - t * t)) for t in np.linspace(0.5, -0.5, 9)]
            self.pen.polygon([self._at(*q) for q in beard + inner], fill=self._ink(stubble))
        line = -0.52 - 0.34 * self.old * male + 0.06 * (not male)
        if self.child > 0.75:
            line = -0.72
        part = 0.45 * p.parting
        edge = [
            (t, line + 0.16 * abs(t - part) - 0.05 * math.cos(9 * t))
            for t in np.linspace(-1, 1, 17)
        ]
        crown = [
            (1.1 * math.cos(s), -0.12 - 1.08 * math.sin(s))
            for s in np.linspace(0.25, math.pi - 0.25, 24)
        ]
        if not male:
            crown = [(1.2, 0.25), *crown, (-1.2, 0.25), (-0.93, 0.1)]
            edge = [*edge, (0.93, 0.1)]
        points = [(self.x + u * self.a, self.y + v * self.b) for u, v in edge + crown]
        self.pen.polygon(points, fill=self._ink(self.hair))

    def _glasses(self) -> None:
        v = -0.07 + 0.10 * self.child
        for side in (-1, 1):
            x, y = self._at(side * self.person.eye_gap, v)
            r = 0.3 * self.a
            box = (x - r, y - 0.8 * r, x + r, y + 0.8 * r)
            self.pen.ellipse(box, outline=self._ink((40, 40, 48)), width=max(1, self.line))
        gap = self.person.eye_gap - 0.28
        self._curve([(-gap, v), (gap, v)], (40, 40, 48), 1.0)


def _near(colour: Colour, rng: np.random.Generator, spread: float) -> Colour:
    drawn = np.clip(np.array(colour) + rng.normal(0, spread, 3), 0, 255)
    return float(drawn[0]), float(drawn[1]), float(drawn[2])


def _mix(first: Colour, second: Colour, share: float) -> Colour:
    r, g, b = (a + (c - a) * share for a, c in zip(first, second, strict=True))
    return r, g, b


def _rgb(colour: Colour) -> tuple[int, int, int]:
    return round(colour[0]), round(colour[1]), round(colour[2])
