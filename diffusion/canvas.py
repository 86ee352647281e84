"""UnlearnCanvas without a model: its names, folders, lists and prompts, and UA, IRA and CRA.

Source: Zhang et al., UnlearnCanvas, NeurIPS 2024 D&B (arXiv 2402.11846). The data set has 60
styles, the benchmark 50 of them; its style classifier knows these and the photos (`Seed_Images`).
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mmforget.diffusion.prompts import read_lines
from mmforget.errors import ConfigError, DataError, MissingDependencyError, unknown
from mmforget.options import option

PHOTOS = "Seed_Images"
PHOTO_FOLDERS = (PHOTOS, "Seed_Image")  # the code and the README differ
SEEDS = (188, 288, 588, 688, 888)
SUFFIXES = (".jpg", ".jpeg", ".png")
SHOWN = 5  # names listed in an error

# In the order of the class indices; alphabetical but for Palette_Knife.
_STYLES_60 = """
Abstractionism Artist_Sketch Blossom_Season Blue_Blooming Bricks Byzantine Cartoon Cold_Warm
Color_Fantasy Comic_Etch Crayon Crypto_Punks Cubism Dadaism Dapple Defoliation Dreamweave
Early_Autumn Expressionism Fauvism Foliage_Patchwork French Glowing_Sunset Gorgeous_Love
Greenfield Impasto Impressionism Ink_Art Joy Liquid_Dreams Palette_Knife Magic_Cube Meta_Physics
Meteor_Shower Monet Mosaic Neon_Lines On_Fire Pastel Pencil_Drawing Picasso Pointillism Pop_Art
Rainwash Realistic_Watercolor Red_Blue_Ink Rust Sketch Sponge_Dabbed Structuralism Superstring
Surrealism Techno Ukiyoe Van_Gogh Vibrant_Flow Warm_Love Warm_Smear Watercolor Winter
"""
_EXTRA_STYLES = """
Blue_Blooming Crypto_Punks Dreamweave Foliage_Patchwork Impasto Palette_Knife Pointillism
Rainwash Realistic_Watercolor Techno
"""
_OBJECTS = """
Architectures Bears Birds Butterfly Cats Dogs Fishes Flame Flowers Frogs Horses Human Jellyfish
Rabbits Sandwiches Sea Statues Towers Trees Waterfalls
"""
STYLES_60 = tuple(_STYLES_60.split())
EXTRA_STYLES = tuple(_EXTRA_STYLES.split())
OBJECTS = tuple(_OBJECTS.split())
STYLES = tuple(style for style in STYLES_60 if style not in EXTRA_STYLES)
# Classes of the style classifier: the photos stand behind Rust, so later styles move up by one.
THEMES = (*STYLES[: STYLES.index("Rust") + 1], PHOTOS, *STYLES[STYLES.index("Rust") + 1 :])

Target = str | tuple[str, str]  # a style, an object, or a pair (style, object)
_NAME = re.compile(r"(?P<both>.+)_seed(?P<seed>0|[1-9][0-9]*)\.jpg")
_CAPTION = re.compile(r"An? (?P<object>\S+) image in (?P<style>.+?) style\.?", re.IGNORECASE)
_LISTED = re.compile(
    r"(?:.*/)?quick-canvas-benchmark/(?P<style>[^/]+)/(?P<object>[^/]+)/(?P<k>[0-9]+)\.jpg"
)


def spaced(style: str) -> str:
    """Return a style's name as prompts write it: `Van_Gogh` -> `Van Gogh`."""
    return style.replace("_", " ")


def answer_name(style: str, object_name: str, seed: int) -> str:
    """Return an answer's file name: `{Style}_{Object}_seed{seed}.jpg`."""
    return f"{style}_{object_name}_seed{seed}.jpg"


def parse_answer_name(name: str) -> tuple[str, str, int]:
    """Return (style, object, seed) of an answer's file name; the inverse of `answer_name`.

    Raises:
        DataError: It is not `{Style}_{Object}_seed{seed}.jpg` of a known style and object.
    """
    found = _NAME.fullmatch(name)
    style, _, object_name = found["both"].rpartition("_") if found else ("", "", "")
    if not found or style not in (*STYLES_60, PHOTOS) or object_name not in OBJECTS:
        raise DataError(
            f"{name!r} is not the name of an answer: {{Style}}_{{Object}}_seed{{seed}}.jpg, such "
            f"as {answer_name('Van_Gogh', 'Dogs', 188)}"
        )
    return style, object_name, int(found["seed"])


def caption(style: str, object_name: str, form: str = "hub") -> str:
    """Return the text that the base model was fine-tuned on.

    Args:
        style: A style, or the photos.
        object_name: An object.
        form: "hub": of the hub's table and the diffusers weights (`An` before Architectures, no
            full stop); "compvis": of the CompVis weights (always `A`, full stop).
    """
    if form not in ("hub", "compvis"):
        raise ConfigError(unknown("form of captions", form, ("hub", "compvis"), "caption"))
    if form == "compvis":
        shown = "Photo" if style == PHOTOS else spaced(style)
        return f"A {object_name} image in {shown} style."
    article = "An" if object_name == "Architectures" else "A"
    return f"{article} {object_name} image in {'photo' if style == PHOTOS else spaced(style)} style"


def parse_caption(text: str) -> tuple[str, str]:
    """Return (style, object) of a caption or answer prompt in any of its forms.

    Raises:
        DataError: It is no such text, or names an unknown style or object.
    """
    found = _CAPTION.fullmatch(text.strip())
    style = found["style"].replace(" ", "_") if found else ""
    if style.lower() in ("photo", *(name.lower() for name in PHOTO_FOLDERS)):
        style = PHOTOS
    if not found or style not in (*STYLES_60, PHOTOS) or found["object"] not in OBJECTS:
        raise DataError(
            f"{text!r} is no caption of UnlearnCanvas: A {{Object}} image in {{Style}} style, such "
            f"as {caption('Van_Gogh', 'Dogs')!r}"
        )
    return style, found["object"]


@dataclass(frozen=True)
class Protocol:
    """How an answer set is drawn. Answer sets of different protocols are not comparable."""

    name: str = option("mmforget", "one protocol for all methods, so that they can be compared")
    sampler: str = option(
        "ddim",
        "ddim (eta 0), lms, or the scheduler that the checkpoint was saved with",
        choices=("ddim", "lms", "checkpoint"),
    )
    steps: int = option(100, "sampling steps", low=1)
    guidance: float = option(9.0, "classifier-free guidance scale", low=0)
    seeding: str = option(
        "image",
        "image: each image draws its noise from its seed anew; stream: the images of a seed draw "
        "one after another, in the order of the themes and objects",
        choices=("image", "stream"),
    )
    noise_device: str = option("cpu", "where noise is drawn", choices=("cpu", "cuda"))
    precision: str = option("fp32", "weights and activations", choices=("fp32", "fp16", "autocast"))
    photo_style: str = option("Seed Images", "what prompts of the photos call their style")
    underscores: bool = option(False, "prompts keep the underscores of style names")
    full_stop: bool = option(True, "prompts end in a full stop")
    negative_prompt: bool = option(False, "a fixed long negative prompt (not shipped here)")

    def prompt(self, style: str, object_name: str) -> str:
        """Return the prompt of an answer: `A {Object} image in {Style} style.`."""
        shown = self.photo_style if style == PHOTOS else style
        if not self.underscores:
            shown = spaced(shown)
        return f"A {object_name} image in {shown} style{'.' if self.full_stop else ''}"


_COMPVIS = Protocol("original", seeding="stream", noise_device="cuda", precision="autocast")
# What the benchmark's own scripts do. SEOT draws only the prompts that hold its target.
PROTOCOLS: Mapping[str, Protocol] = {
    entry.name: entry
    for entry in (
        Protocol(),
        replace(_COMPVIS, photo_style="Photo"),
        *(replace(_COMPVIS, name=name) for name in ("esd", "ca", "salun", "ediff", "shs")),
        Protocol("uce", sampler="lms", precision="fp16"),
        Protocol(
            "fmn",
            sampler="checkpoint",
            seeding="stream",
            noise_device="cuda",
            precision="fp16",
            photo_style=PHOTOS,
            underscores=True,
            full_stop=False,
        ),
        Protocol("seot", sampler="checkpoint", steps=50),
        Protocol("spm", "checkpoint", guidance=7.5, noise_device="cuda", negative_prompt=True),
    )
}


def protocol(name: str) -> Protocol:
    """Return a protocol by name: `mmforget`, or the published one of a method.

    Raises:
        ConfigError: There is none of this name.
    """
    if name not in PROTOCOLS:
        raise ConfigError(unknown("protocol", name, PROTOCOLS, "mmforget.diffusion.canvas"))
    return PROTOCOLS[name]


class CanvasRow(NamedTuple):
    """One image of the folder copy.

    Attributes:
        style: A style, or `Seed_Images`.
        object: An object.
        k: Number of the image, from 1.
        path: The file.
        photo: The photo that image k of every style was painted from; None if not asked for.
    """

    style: str
    object: str
    k: int
    path: Path
    photo: Path | None


def read_canvas(
    root: Path,
    styles: Sequence[str] | None = None,
    objects: Sequence[str] | None = None,
    images: int = 20,
    photos: bool = True,
) -> list[CanvasRow]:
    """Return the images `{Style}/{Object}/{k}` of a folder copy, and check that all are there.

    Args:
        root: Folder of the styles; the photos are in `Seed_Images` or `Seed_Image`.
        styles: Styles to list, `Seed_Images` among them if its rows are wanted; None: the 50.
        objects: Objects to list; None: all 20.
        images: Files 1 to `images` are wanted of each pair; others are not read.
        photos: Whether each row has its photo.

    Returns:
        Rows in the order of `styles`, `objects` and k.

    Raises:
        ConfigError: An unknown style or object.
        DataError: Files are missing: how many, of which pairs.
    """
    styles = STYLES if styles is None else styles
    objects = OBJECTS if objects is None else objects
    _check_names("style", styles, (*STYLES_60, PHOTOS))
    _check_names("object", objects, OBJECTS)
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder. Give the one with the style folders")
    themes = [*styles, *((PHOTOS,) if photos and PHOTOS not in styles else ())]
    files = {
        (theme, name): _numbered(_theme_folder(root, theme) / name)
        for theme, name in product(themes, objects)
    }
    numbers = range(1, images + 1)
    gaps = {pair: [k for k in numbers if k not in held] for pair, held in files.items()}
    gaps = {pair: lost for pair, lost in gaps.items() if lost}
    if gaps:
        listed = [
            f"{theme}/{name} ({'all' if len(lost) == images else ', '.join(map(str, lost))})"
            for (theme, name), lost in gaps.items()
        ]
        raise DataError(
            f"{root}: {sum(map(len, gaps.values()))} of {len(files) * images} images are missing, "
            f"in {len(gaps)} pairs: {_some(listed)}. Expected are {{Style}}/{{Object}}/{{k}}.jpg, "
            f"k = 1..{images}: copy them, or name the styles, objects and number you have"
        )
    return [
        CanvasRow(style, name, k, files[style, name][k], files[PHOTOS, name][k] if photos else None)
        for style, name, k in product(styles, objects, numbers)
    ]


class EncodedImage(NamedTuple):
    """One image of the hub's table.

    Attributes:
        style: A style, or `Seed_Images`.
        object: An object.
        number: How many of this pair came before it, from 1. It is NOT the k of the folder copy:
            the table does not keep it, so an image's photo is not known.
        place: File and row, for messages.
        encoded: The bytes of the image file, or its path if the table holds paths.
    """

    style: str
    object: str
    number: int
    place: str
    encoded: bytes | Path


def read_parquet(folder: Path) -> Iterator[EncodedImage]:
    """Yield the images of the hub's table (columns `image` and `text`) in stored order.

    It streams: one batch of rows is in memory at a time, so a table of decoded images can be
    filled while the shards are read. `mmforget.diffusion.features.decode` decodes one.

    Args:
        folder: Holds the `*.parquet` shards, itself or in `data/`; sorted by name.

    Raises:
        MissingDependencyError: pyarrow is not installed.
        DataError: No shards, a missing column, an unknown caption, or a row without image.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingDependencyError("pyarrow", "diffusion") from error
    shards = sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))
    if not shards:
        raise DataError(f"{folder} holds no .parquet files, nor does its folder data")
    counts: dict[tuple[str, str], int] = {}
    for shard in shards:
        try:
            with pq.ParquetFile(shard) as file:
                names = file.schema_arrow.names
                if not {"image", "text"} <= set(names):
                    raise DataError(f"{shard.name} has the columns {names}: `image` and `text`?")
                number = 0
                for batch in file.iter_batches(64, columns=["image", "text"]):
                    for row in batch.to_pylist():
                        number += 1
                        yield _encoded(row, f"{shard.name} row {number}", folder, counts)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{shard} cannot be read: {error}. Copy it anew") from error


def _encoded(
    row: Mapping[str, object], place: str, folder: Path, counts: dict[tuple[str, str], int]
) -> EncodedImage:
    try:
        style, name = parse_caption(str(row["text"]))
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
    image = row["image"]
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str):
        image = folder / image
    if not isinstance(image, bytes | Path):
        raise DataError(f"{place}: there is no image in it, neither bytes nor a path")
    counts[style, name] = counts.get((style, name), 0) + 1
    return EncodedImage(style, name, counts[style, name], place, image)


class ListedImage(NamedTuple):
    """One line of a forget list.

    Attributes:
        style: A style, or `Seed_Images`.
        object: An object.
        k: Number of the image, from 1.
        path: The file in the data set's folder.
        prompt: Its prompt, from the parallel file.
    """

    style: str
    object: str
    k: int
    path: Path
    prompt: str


def read_forget_list(
    folder: Path, concept: str, root: Path, check: bool = True
) -> list[ListedImage]:
    """Read `{concept}_images.txt` and `{concept}_prompts.txt`, the paths put below `root`.

    Args:
        folder: Holds the two files.
        concept: A style, an object, or `Seed_Images` (the published remain list).
        root: The data set's folder; stands for `../../data/quick-canvas-benchmark`.
        check: Whether the images must exist.

    Raises:
        DataError: Lines of the two files do not pair up, a path is of another form, or images are
            missing.
    """
    paths = read_lines(folder / f"{concept}_images.txt")
    prompts = read_lines(folder / f"{concept}_prompts.txt")
    if len(paths) != len(prompts):
        raise DataError(
            f"{folder}: {concept}_images.txt has {len(paths)} lines and {concept}_prompts.txt "
            f"{len(prompts)}; line n of one belongs to line n of the other"
        )
    rows = []
    for number, (text, prompt) in enumerate(zip(paths, prompts, strict=True), start=1):
        found = _LISTED.fullmatch(text)
        if found is None:
            raise DataError(
                f"{concept}_images.txt line {number}: {text!r} is not "
                f".../quick-canvas-benchmark/{{Style}}/{{Object}}/{{k}}.jpg"
            )
        style = PHOTOS if found["style"] in PHOTO_FOLDERS else found["style"]
        path = _theme_folder(root, style) / found["object"] / f"{found['k']}.jpg"
        rows.append(ListedImage(style, found["object"], int(found["k"]), path, prompt))
    missing = [str(row.path) for row in rows if check and not row.path.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(rows)} listed images are missing: {_some(missing)}"
        )
    return rows


def forget_list(target: str, images: int = 3) -> list[tuple[str, str, int]]:
    """Return the images (style, object, k) that the benchmark gives to forget a target.

    A style: images 1 to 3 of each object, 60 rows; an object: of each of the 51 themes, 153 rows;
    `Seed_Images`: the published remain list, photos 1 to 3 of all objects, the forgotten included.
    """
    numbers = range(1, images + 1)
    if target in OBJECTS:
        return [(theme, target, k) for theme, k in product(THEMES, numbers)]
    _check_names("style", [target], (*STYLES_60, PHOTOS))
    return [(target, name, k) for name, k in product(OBJECTS, numbers)]


def read_anchors(folder: Path, concept: str) -> list[str]:
    """Return the published anchor prompts of an object (80), or of all styles (200 paintings)."""
    _check_names("style or object", [concept], (*OBJECTS, *STYLES_60))
    return read_lines(
        folder / (f"sd_prompt_{concept}.txt" if concept in OBJECTS else "painting.txt")
    )


@dataclass(frozen=True)
class AnswerScan:
    """What is in the folder of an answer set.

    Attributes:
        folder: The folder.
        styles: Themes that were asked for.
        objects: Objects that were asked for.
        seeds: Seeds that were asked for.
        found: (style, object, seed) of the answers that are there, in this order.
        missing: Names of those that are not.
        foreign: Names of other files, such as answers of another naming.
    """

    folder: Path
    styles: tuple[str, ...]
    objects: tuple[str, ...]
    seeds: tuple[int, ...]
    found: tuple[tuple[str, str, int], ...]
    missing: tuple[str, ...]
    foreign: tuple[str, ...]

    @property
    def paths(self) -> list[Path]:
        """Files of the answers found."""
        return [self.folder / answer_name(*key) for key in self.found]

    def require(self, allow_missing: bool = False) -> None:
        """Raise unless all answers are there.

        Args:
            allow_missing: Go on with those found, if there are any.

        Raises:
            DataError: How many are missing, some of their names, and of what is there instead.
        """
        if not self.missing or (allow_missing and self.found):
            return
        instead = ""
        if self.foreign:
            instead = f" There are {len(self.foreign)} other files: {_some(self.foreign)}."
        raise DataError(_missing_text(str(self.folder), self.missing, len(self.found)) + instead)


def scan_answers(
    folder: Path,
    styles: Sequence[str] = THEMES,
    objects: Sequence[str] = OBJECTS,
    seeds: Sequence[int] = SEEDS,
) -> AnswerScan:
    """List an answer set: what is there, what is missing, what does not belong.

    Args:
        folder: Holds `{Style}_{Object}_seed{seed}.jpg`.
        styles: Themes to expect.
        objects: Objects to expect.
        seeds: Seeds to expect; the published scripts draw 188 alone unless told otherwise.

    Raises:
        DataError: There is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder. An answer set is a folder of images")
    held = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
    wanted = {answer_name(*key): key for key in product(styles, objects, seeds)}
    return AnswerScan(
        folder=folder,
        styles=tuple(styles),
        objects=tuple(objects),
        seeds=tuple(seeds),
        found=tuple(key for name, key in wanted.items() if name in held),
        missing=tuple(name for name in wanted if name not in held),
        foreign=tuple(sorted(held - wanted.keys())),
    )


@dataclass(frozen=True)
class Answers:
    """The answers of one unlearned model, and what both classifiers took them for.

    Attributes:
        style: True styles, N.
        object: True objects, N.
        seed: Seeds, N.
        predicted_style: Labels given by the style classifier, N.
        predicted_object: Labels given by the object classifier, N.
        styles: Themes that the answer set must cover.
        objects: Objects that it must cover.
        seeds: Seeds that it must cover.
    """

    style: Sequence[str]
    object: Sequence[str]
    seed: Sequence[int]
    predicted_style: Sequence[str]
    predicted_object: Sequence[str]
    styles: tuple[str, ...] = THEMES
    objects: tuple[str, ...] = OBJECTS
    seeds: tuple[int, ...] = SEEDS

    def __post_init__(self) -> None:
        """Check that every answer was asked for and comes once.

        Raises:
            DataError: Columns of different lengths, an answer outside the set, or one that is
                there twice.
        """
        columns = (self.object, self.seed, self.predicted_style, self.predicted_object)
        if any(len(column) != len(self.style) for column in columns):
            raise DataError("an answer table needs columns of one length")
        grid = set(product(self.styles, self.objects, self.seeds))
        seen: set[tuple[str, str, int]] = set()
        for key in zip(self.style, self.object, self.seed, strict=True):
            if key not in grid or key in seen:
                fault = "twice" if key in seen else "but does not belong to this answer set"
                raise DataError(f"the answer {answer_name(*key)} is in the table {fault}")
            seen.add(key)

    @classmethod
    def of(cls, scan: AnswerScan, styles: Sequence[str], objects: Sequence[str]) -> "Answers":
        """Return the table of a scanned folder.

        Args:
            scan: The folder.
            styles: Predicted style of each answer found, in its order.
            objects: Predicted object of each.
        """
        found = scan.found
        return cls(
            style=[key[0] for key in found],
            object=[key[1] for key in found],
            seed=[key[2] for key in found],
            predicted_style=styles,
            predicted_object=objects,
            styles=scan.styles,
            objects=scan.objects,
            seeds=scan.seeds,
        )

    @cached_property
    def missing(self) -> tuple[str, ...]:
        """Names of the answers that the table lacks."""
        held = set(zip(self.style, self.object, self.seed, strict=True))
        grid = product(self.styles, self.objects, self.seeds)
        return tuple(answer_name(*key) for key in grid if key not in held)

    def kind(self, target: Target) -> str:
        """Return "style", "object" or "pair".

        Raises:
            ConfigError: The answer set does not cover the target.
        """
        if isinstance(target, str):
            if target in self.styles:
                return "style"
            if target in self.objects:
                return "object"
            accepted = (*self.styles, *self.objects)
            raise ConfigError(unknown("target", target, accepted, "mmforget.diffusion.canvas"))
        style, name = target
        _check_names("style", [style], self.styles)
        _check_names("object", [name], self.objects)
        return "pair"

    def confusion(self, kind: str) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
        """Return labels and counts [true, predicted] of one classifier, photos included.

        Args:
            kind: "style" or "object". The labels are those asked for, then any other predicted.
        """
        true, predicted, labels = (
            (self.style, self.predicted_style, self.styles)
            if kind == "style"
            else (self.object, self.predicted_object, self.objects)
        )
        labels = tuple(dict.fromkeys((*labels, *predicted)))
        places = {label: place for place, label in enumerate(labels)}
        counts = np.zeros((len(labels), len(labels)), dtype=np.int64)
        np.add.at(counts, ([places[a] for a in true], [places[b] for b in predicted]), 1)
        return labels, counts

    @cached_property
    def columns(self) -> tuple[npt.NDArray[np.str_], ...]:
        """Style, object, predicted style and predicted object as arrays [N]."""
        names = (self.style, self.object, self.predicted_style, self.predicted_object)
        return tuple(np.asarray(column, dtype=np.str_) for column in names)


@dataclass(frozen=True)
class CanvasScores:
    """Scores of one answer set, fractions in [0, 1].

    Attributes:
        target: What was to be forgotten.
        kind: "style", "object" or "pair".
        values: `UA` (up: forgotten), and `IRA` and `CRA` (up: the rest is kept); for a pair `UA`,
            `SC` (same style, other objects), `OC` (same object, other styles) and `UP` (the rest).
        style_accuracy: Of every style that counts; empty for a pair.
        object_accuracy: Of every object; empty for a pair.
        images: Answers that count.
        missing: Answers of them that were not there, left out of every mean.
    """

    target: Target
    kind: str
    values: Mapping[str, float]
    style_accuracy: Mapping[str, float]
    object_accuracy: Mapping[str, float]
    images: int
    missing: int


def ua_ira_cra(
    answers: Answers, target: Target, photos: bool = False, allow_missing: bool = False
) -> CanvasScores:
    """Return UA, IRA and CRA (arXiv 2402.11846, section 4), as macro averages over classes.

    UA = 1 - accuracy of the target; IRA = mean accuracy of the other classes of its kind; CRA =
    mean accuracy of all classes of the other kind, over ALL answers, the target's included. For a
    pair an answer is right if both classifiers are, and means are over pairs.

    Args:
        answers: The answer set with its predictions.
        target: A style, an object or a pair.
        photos: Keep the answers in the style `Seed_Images` as one more style; published headline
            numbers leave them out.
        allow_missing: Score the answers that are there. A class without any stays an error.

    Raises:
        ConfigError: The answer set does not cover the target.
        DataError: Answers are missing: how many and which. They never count as wrong or right.
    """
    kind = answers.kind(target)
    styles = [style for style in answers.styles if photos or style != PHOTOS]
    if kind != "object" and (target if kind == "style" else target[0]) not in styles:
        raise ConfigError(f"{target} is no target unless the photos are kept: photos=True")
    lost = [name for name in answers.missing if photos or not name.startswith(f"{PHOTOS}_")]
    keep = np.isin(answers.columns[0], styles)
    count = int(keep.sum())
    if lost and not allow_missing:
        raise DataError(_missing_text("the answer set", lost, count))
    style, name, predicted_style, predicted_name = (column[keep] for column in answers.columns)
    right_style, right_name = predicted_style == style, predicted_name == name
    by_style: dict[str, float] = {}
    by_name: dict[str, float] = {}
    if kind == "pair":
        pairs = list(product(styles, answers.objects))
        keys = np.char.add(np.char.add(style, "/"), name)
        joint = _accuracy(keys, right_style & right_name, [f"{a}/{b}" for a, b in pairs])
        groups: dict[str, list[float]] = {"UA": [], "SC": [], "OC": [], "UP": []}
        for (a, b), value in zip(pairs, joint.values(), strict=True):
            same = (a == target[0], b == target[1])
            place = {(True, True): "UA", (True, False): "SC", (False, True): "OC"}
            groups[place.get(same, "UP")].append(value)
        values = {group: _mean(found) for group, found in groups.items()}
        values["UA"] = 1 - values["UA"]
    else:
        by_style = _accuracy(style, right_style, styles)
        by_name = _accuracy(name, right_name, answers.objects)
        own, other = (by_style, by_name) if kind == "style" else (by_name, by_style)
        values = scores(own, other, str(target))
    return CanvasScores(target, kind, values, by_style, by_name, count, len(lost))


def scores(own: Mapping[str, float], other: Mapping[str, float], target: str) -> dict[str, float]:
    """Return UA, IRA and CRA out of the accuracies of the target's kind and of the other kind.

    Args:
        own: Accuracy of each class of the target's kind, the target's among them.
        other: Accuracy of each class of the other kind.
        target: The forgotten class.
    """
    return {
        "UA": 1 - own[target],
        "IRA": _mean([value for label, value in own.items() if label != target]),
        "CRA": _mean(list(other.values())),
    }


def class_accuracy(labels: Sequence[str], confusion: npt.ArrayLike) -> dict[str, float]:
    """Return each class's accuracy out of counts [true, predicted] whose columns begin with them.

    Raises:
        DataError: A class has no images.
    """
    counts = np.asarray(confusion, dtype=np.float64)
    totals = counts.sum(axis=1)
    empty = [label for label, total in zip(labels, totals, strict=True) if total == 0]
    if empty:
        raise DataError(f"no answers of {_some(empty)}: their accuracy is not defined")
    return dict(zip(labels, (counts.diagonal() / totals).tolist(), strict=True))


def average(results: Iterable[CanvasScores]) -> dict[str, float]:
    """Return the mean of each score over targets of one kind, in percent, as tables print them.

    Raises:
        DataError: No results, or targets of different kinds.
    """
    listed = list(results)
    kinds = sorted({result.kind for result in listed})
    if len(kinds) != 1:
        raise DataError(
            f"an average is over targets of one kind: found {kinds or 'no results'}. Average "
            f"styles, objects and pairs apart"
        )
    names = listed[0].values
    return {name: 100 * _mean([result.values[name] for result in listed]) for name in names}


class SequentialStep(NamedTuple):
    """A model after one more target, fractions in [0, 1].

    Attributes:
        target: The last target.
        ua: UA of every target so far, in the order they came; falling values are a rebound.
        style_retain: Mean accuracy of the styles that are no target so far.
        object_retain: Mean accuracy of the objects that are no target so far.
        retain: Mean of the two.
    """

    target: str
    ua: Mapping[str, float]
    style_retain: float
    object_retain: float
    retain: float


def sequential(
    steps: Sequence[tuple[str, Answers]], photos: bool = False, allow_missing: bool = False
) -> list[SequentialStep]:
    """Return what is forgotten and kept after each request of a sequence.

    Args:
        steps: Target of each request, a style or an object, and the answer set drawn after it.
        photos: As in `ua_ira_cra`.
        allow_missing: As in `ua_ira_cra`.

    Raises:
        ConfigError: A target comes twice, is a pair, or is not covered.
        DataError: Answers are missing.
    """
    targets = [target for target, _ in steps]
    if len(set(targets)) < len(targets) or not all(isinstance(t, str) for t in targets):
        raise ConfigError(f"a sequence names every style or object once: {targets}")
    done = []
    for number, (target, answers) in enumerate(steps, start=1):
        so_far = targets[:number]
        found = ua_ira_cra(answers, target, photos, allow_missing)
        accuracy = {**found.style_accuracy, **found.object_accuracy}
        for earlier in so_far:
            answers.kind(earlier)
        kept = [
            _mean([value for label, value in group.items() if label not in so_far])
            for group in (found.style_accuracy, found.object_accuracy)
        ]
        ua = {earlier: 1 - accuracy[earlier] for earlier in so_far}
        done.append(SequentialStep(target, ua, kept[0], kept[1], _mean(kept)))
    return done


def fid_sides(
    scan: AnswerScan, rows: Sequence[CanvasRow], target: str, images: int = 5
) -> tuple[list[Path], list[Path]]:
    """Return the two sides of the benchmark's FID: answers and real images without the target.

    Photos are on both sides. With 51 themes, 20 objects and 5 seeds each side has 5,000 images for
    a style and 4,845 for an object.

    Args:
        scan: The complete answer set.
        rows: Real images, rows of `Seed_Images` among them.
        target: The style or object that both sides leave out.
        images: Real images 1 to `images` of each pair count.

    Raises:
        DataError: Answers are missing, or no real images are left of a pair that has answers.
    """
    scan.require()
    _check_names("target", [target], (*scan.styles, *scan.objects))
    pairs = {(a, b) for a, b in product(scan.styles, scan.objects) if target not in (a, b)}
    held = [row for row in rows if (row.style, row.object) in pairs and row.k <= images]
    real: dict[tuple[str, str], int] = {}
    for row in held:
        real[row.style, row.object] = real.get((row.style, row.object), 0) + 1
    short = sorted("/".join(pair) for pair in pairs if real.get(pair, 0) < images)
    if short:
        raise DataError(
            f"{len(short)} pairs have under {images} real images: {_some(short)}. Read the folder "
            f"copy with these styles, {PHOTOS} among them"
        )
    drawn = [p for p, key in zip(scan.paths, scan.found, strict=True) if target not in key[:2]]
    return drawn, [row.path for row in held]


def _accuracy(
    keys: npt.NDArray[np.str_], right: npt.NDArray[np.bool_], labels: Sequence[str]
) -> dict[str, float]:
    """Return the share of right answers of each label."""
    names, places = np.unique(keys, return_inverse=True)
    totals = np.bincount(places, minlength=len(names))
    hits = np.bincount(places, weights=right, minlength=len(names))
    found = dict(zip(names.tolist(), (hits / totals).tolist(), strict=True))
    empty = [label for label in labels if label not in found]
    if empty:
        raise DataError(
            f"no answers at all of {_some(empty)}: no score is defined without them. Draw them"
        )
    return {label: found[label] for label in labels}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _missing_text(where: str, missing: Sequence[str], found: int) -> str:
    return (
        f"{where}: {len(missing)} of {len(missing) + found} answers are missing: {_some(missing)}. "
        f"Draw them, or score the rest with allow_missing=True"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (" ..." if len(names) > SHOWN else "")


def _check_names(kind: str, given: Sequence[str], accepted: Sequence[str]) -> None:
    for name in given:
        if name not in accepted:
            raise ConfigError(unknown(kind, name, accepted, "mmforget.diffusion.canvas"))


def _theme_folder(root: Path, theme: str) -> Path:
    if theme != PHOTOS:
        return root / theme
    folders = [root / name for name in PHOTO_FOLDERS if (root / name).is_dir()]
    return folders[0] if folders else root / PHOTOS


def _numbered(folder: Path) -> dict[int, Path]:
    """Return the images of a folder by their number."""
    if not folder.is_dir():
        return {}
    files = [entry for entry in folder.iterdir() if entry.suffix.lower() in SUFFIXES]
    return {int(file.stem): file for file in files if re.fullmatch(r"[1-9][0-9]*", file.stem)}
