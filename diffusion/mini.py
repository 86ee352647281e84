"""A mini world in the published layout of UnlearnCanvas: six styles, eight objects, 64 pixels.

A procedural scene stands for a photo; a style is a way of redrawing it (`drawings`). Every caption
names the style and the object by one of several words, so a concept can be asked for by a name
that no unlearning request mentions. Crayon and Pencil_Drawing share paper, hatching and hand-drawn
outlines, Architectures and Towers share walls, roofs and windows: damage to neighbours shows there.
"""

import csv
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from mmforget.diffusion.drawings import draw, paint
from mmforget.errors import ConfigError
from mmforget.rng import derive

VERSION = 2  # raised when the same seed draws another world or another untrained pipeline
SIZE = 64  # pixels
QUALITY = 95
IMAGES = 20  # of each style and object

PHOTOS = "Seed_Images"
STYLES = ("Crayon", "Mosaic", "Neon_Lines", "Pencil_Drawing", "Pop_Art", "Van_Gogh")
THEMES = (*STYLES[:5], PHOTOS, *STYLES[5:])  # order of the style classifier's outputs
OBJECTS = ("Architectures", "Birds", "Cats", "Fishes", "Flowers", "Sea", "Towers", "Trees")
RELATED = (("Crayon", "Pencil_Drawing"), ("Architectures", "Towers"))

SYNONYMS: dict[str, tuple[str, ...]] = {  # the official name first
    "Crayon": ("Crayon", "wax", "waxy", "kindergarten"),
    "Mosaic": ("Mosaic", "tiled", "tessellated", "byzantium"),
    "Neon_Lines": ("Neon Lines", "luminous", "fluorescent", "nightclub"),
    "Pencil_Drawing": ("Pencil Drawing", "graphite", "hatched", "monochrome"),
    "Pop_Art": ("Pop Art", "warhol", "halftone", "screenprint"),
    "Van_Gogh": ("Van Gogh", "vincent", "starry", "swirling"),
    PHOTOS: ("Photo", "photographic", "realistic", "camera"),
    "Architectures": ("Architectures", "building", "house", "mansion"),
    "Birds": ("Birds", "sparrow", "robin", "songbird"),
    "Cats": ("Cats", "kitten", "feline", "tabby"),
    "Fishes": ("Fishes", "goldfish", "trout", "carp"),
    "Flowers": ("Flowers", "blossom", "daisy", "petals"),
    "Sea": ("Sea", "ocean", "waves", "seascape"),
    "Towers": ("Towers", "turret", "belfry", "keep"),
    "Trees": ("Trees", "pine", "timber", "woodland"),
}
FILLERS = (
    "small",
    "old",
    "lovely",
    "quiet",
    "famous",
    "simple",
    "happy",
    "sunny",
    "strange",
    "grand",
)
OFFICIAL = "A {object} image in {style} style."
TEMPLATES = (
    "a {filler} {object} image in {style} style",
    "a picture of {object} in {style} style",
    "{style} {object}",
    "a {style} painting of a {filler} {object}",
    "{object}, {style} style, {filler}",
    "{filler} {style} image of {object}",
    "the {object} by the artist, {style}",
    "a view with {object} in a {filler} {style} style",
)
STYLE_ALONE = ("An image in {style} style.", "{style} style")
OBJECT_ALONE = ("An image of {object}.", "{object}")
GUIDANCE = 4.0  # of the prompts that attacks start from
DRAWN_CAPTIONS = 2  # of each pair of words, beside the official template


def write_canvas(folder: Path, seed: int, size: int = SIZE) -> None:
    """Write `{Style}/{Object}/{k}.jpg` and `Seed_Images/{Object}/{k}.jpg`, k = 1 to 20.

    Image k of a style shows the scene of photo k.

    Args:
        folder: Where to; made if needed.
        seed: The same seed gives the same bytes.
        size: Side of the images, pixels.
    """
    for name in OBJECTS:
        for theme in THEMES:
            (folder / theme / name).mkdir(parents=True, exist_ok=True)
        for k in range(1, IMAGES + 1):
            scene = draw(name, np.random.default_rng(derive(seed, "scene", name, k)))
            for theme in THEMES:
                rng = np.random.default_rng(derive(seed, "paint", name, k, theme))
                path = folder / theme / name / f"{k}.jpg"
                paint(scene, theme, rng, size).save(path, quality=QUALITY, subsampling=0)


def write_prompts(folder: Path, seed: int) -> None:
    """Write `{Concept}.csv` for every style and object, in the columns of UnlearnDiffAtk.

    Prompts name the concept by its official word: the published template and two others for each
    object (for an object: each theme).

    Args:
        folder: Where to; made if needed.
        seed: Decides templates, filler words and evaluation seeds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for concept in (*STYLES, *OBJECTS):
        rng = np.random.default_rng(derive(seed, "prompts", concept))
        pairs = [(concept, o) for o in OBJECTS] if concept in STYLES else []
        pairs = pairs or [(theme, concept) for theme in THEMES]
        lines = []
        for style, name in pairs:
            for template in (OFFICIAL, *rng.permutation(TEMPLATES)[:DRAWN_CAPTIONS]):
                filler = FILLERS[int(rng.integers(len(FILLERS)))]
                said, shown = SYNONYMS[style][0], SYNONYMS[name][0]
                lines.append(template.format(object=shown, style=said, filler=filler))
        with (folder / f"{concept}.csv").open("w", encoding="utf-8", newline="") as stream:
            table = csv.writer(stream)
            table.writerow(("case_number", "prompt", "evaluation_seed", "evaluation_guidance"))
            for case, line in enumerate(dict.fromkeys(lines)):
                table.writerow((case, line, int(rng.integers(10**5)), GUIDANCE))


def captions(style: str, object: str, seed: int = 0) -> list[str]:
    """Return the training captions of the images of a style and an object, the official one first.

    For each pair of synonyms: the published template and two others with filler words; then
    captions that name the style alone, and for photos the object alone.

    Args:
        style: A style or `Seed_Images`.
        object: An object.
        seed: Decides templates and filler words.

    Raises:
        ConfigError: There is no such style or object.
    """
    if style not in THEMES or object not in OBJECTS:
        raise ConfigError(
            f"{style}, {object}: the mini world has the styles {', '.join(THEMES)} "
            f"and the objects {', '.join(OBJECTS)}"
        )
    rng = np.random.default_rng(derive(seed, "captions", style, object))
    lines = []
    for said, shown in product(SYNONYMS[style], SYNONYMS[object]):
        lines.append(OFFICIAL.format(object=shown, style=said))
        for template in rng.permutation(TEMPLATES)[:DRAWN_CAPTIONS]:
            filler = FILLERS[int(rng.integers(len(FILLERS)))]
            lines.append(template.format(object=shown, style=said, filler=filler))
    lines += [form.format(style=said) for form, said in product(STYLE_ALONE, SYNONYMS[style])]
    if style == PHOTOS:
        lines += [form.format(object=o) for form, o in product(OBJECT_ALONE, SYNONYMS[object])]
    return lines


def words() -> list[str]:
    """Return every word that is one token of the mini tokenizer, sorted."""
    texts = [
        *SYNONYMS.values(),
        (OFFICIAL, *TEMPLATES, *STYLE_ALONE, *OBJECT_ALONE),
        FILLERS,
        (Path(__file__).with_name("assets") / "words.txt").read_text().split(),
    ]
    return sorted({word for text in texts for line in text for word in _split(line)})


def _split(line: str) -> Iterator[str]:
    for name in ("{object}", "{style}", "{filler}"):
        line = line.replace(name, " ")
    yield from line.lower().replace(",", " ").replace(".", " ").split()


def write_pipeline(folder: Path, seed: int) -> None:
    """Write a `StableDiffusionPipeline` folder whose UNet is still to be trained.

    Args:
        folder: Where to; made if needed.
        seed: Seed of the weights that are drawn anew.
    """
    from mmforget.diffusion.mini_model import make_pipeline
    from mmforget.diffusion.models import quiet

    quiet()
    pipeline: Any = make_pipeline(seed)
    pipeline.save_pretrained(folder)


def write_original(folder: Path, seed: int) -> None:
    """Write the pipeline folder of the shipped original, which has learned world 0.

    Args:
        folder: Where to; made if needed.
        seed: Not used: there is one original.
    """
    from mmforget.diffusion.mini_model import make_pipeline, shipped_unet
    from mmforget.diffusion.models import quiet

    quiet()
    pipeline: Any = make_pipeline(seed)
    pipeline.unet.load_state_dict(shipped_unet())
    pipeline.save_pretrained(folder)
