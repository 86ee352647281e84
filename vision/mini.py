"""Mini worlds: procedural portraits in the published layouts of MUFAC, MUCAC and a faces folder.

A person sets geometry, skin and hair. Age class, gender and smile are drawn for each photo and do
not depend on the person, and cues are noisy: a photo may look older than its label, or show the
other gender. So a model learns the rule in part and memorises the rest, and what it has memorised
is what unlearning must take away. Forgotten and unseen photos come from the same distribution.
"""

import csv
from pathlib import Path

import numpy as np

from mmforget.portraits import Person, draw_look, draw_person, portrait
from mmforget.rng import derive

VERSION = 1  # raised when the same seed draws another world
SIZE = 48  # pixels
QUALITY = 95

AGE_LETTERS = "abcdefgh"
AGE_NOISE = 0.05  # of the span from a small child to a very old person; a class spans 0.125
ROLES = ("F", "M", "D", "S", "GM")
PHOTOS = 5  # of each person of a family
FAMILIES = {"train": (1, 36), "val": (801, 8), "test": (851, 8)}  # first number, count

CUE_NOISE = 0.15  # share of attribute cues drawn the wrong way round
PEOPLE = {0: 24, 190: 24, 1250: 96, 4855: 24}  # first id of each published range: persons
PHOTOS_OF_ID = 7
CELEBA_NAMES = (
    "5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose "
    "Black_Hair Blond_Hair Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee "
    "Gray_Hair Heavy_Makeup High_Cheekbones Male Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard "
    "Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks Sideburns Smiling Straight_Hair "
    "Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace Wearing_Necktie Young"
)
ATTRIBUTE_NAMES = CELEBA_NAMES.split()

PERSONS = 24
PHOTOS_OF_PERSON = 20


def write_mufac(folder: Path, seed: int, size: int = SIZE) -> None:
    """Write a MUFAC-like folder: 900 training, 200 test and 200 unseen photos of families.

    Args:
        folder: Where to; made if needed.
        seed: The same seed gives the same bytes.
        size: Side of the images, pixels.
    """
    for part, (first, count) in FAMILIES.items():
        rng = np.random.default_rng(derive(seed, "mufac", part))
        images = folder / f"{part}_images"
        images.mkdir(parents=True, exist_ok=True)
        rows = []
        for family in range(first, first + count):
            for role in ROLES:
                person, present = draw_person(rng), int(rng.integers(1, 80))
                for photo in range(PHOTOS):
                    grade = int(rng.integers(len(AGE_LETTERS)))
                    letter = AGE_LETTERS[grade]
                    name = f"F{family:04d}_AGE_{role}_{present}_{letter}{photo + 1}.jpg"
                    age = (grade + 0.5) / len(AGE_LETTERS) + rng.normal(0, AGE_NOISE)
                    male, smile = rng.random(2) < 0.5
                    _write(images / name, person, rng, size, age, bool(male), bool(smile))
                    rows.append((name, letter))
        with (folder / f"custom_{part}_dataset.csv").open("w", newline="") as out:
            csv.writer(out).writerows([("image_path", "age_class"), *rows])


def write_mucac(folder: Path, seed: int, size: int = SIZE) -> None:
    """Write a MUCAC-like folder: 1,176 photos of 168 persons, ids in the published ranges.

    Args:
        folder: Where to; made if needed.
        seed: The same seed gives the same bytes.
        size: Side of the images, pixels.
    """
    rng = np.random.default_rng(derive(seed, "mucac"))
    images = folder / "CelebAMask-HQ" / "CelebA-HQ-img"
    images.mkdir(parents=True, exist_ok=True)
    people = [first + k for first, count in PEOPLE.items() for k in range(count)]
    persons = {identity: draw_person(rng) for identity in people}
    shown = np.repeat(people, PHOTOS_OF_ID)
    rng.shuffle(shown)
    identities, attributes = [], []
    for number, identity in enumerate(shown.tolist()):
        values = np.where(rng.random(len(ATTRIBUTE_NAMES)) < 0.5, 1, -1)
        truth = [values[ATTRIBUTE_NAMES.index(name)] > 0 for name in ("Male", "Smiling", "Young")]
        male, smile, young = np.array(truth) ^ (rng.random(3) < CUE_NOISE)
        age = rng.uniform(0.15, 0.45) if young else rng.uniform(0.55, 0.95)
        name = f"{number}.jpg"
        _write(images / name, persons[identity], rng, size, age, bool(male), bool(smile))
        identities.append(f"{name} {identity}\n")
        attributes.append(f"{name}  {' '.join(f'{value:2d}' for value in values)}\n")
    (folder / "CelebA-HQ-identity.txt").write_text("".join(identities))
    head = f"{len(attributes)}\n{' '.join(ATTRIBUTE_NAMES)}\n"
    (folder / "CelebA-HQ-attribute.txt").write_text(head + "".join(attributes))


def write_faces(folder: Path, seed: int, size: int = SIZE) -> None:
    """Write one folder of 20 photos for each of 24 persons.

    Args:
        folder: Where to; made if needed.
        seed: The same seed gives the same bytes.
        size: Side of the images, pixels.
    """
    rng = np.random.default_rng(derive(seed, "faces"))
    for number in range(PERSONS):
        place = folder / f"person_{number + 1:02d}"
        place.mkdir(parents=True, exist_ok=True)
        person = draw_person(rng)
        for photo in range(PHOTOS_OF_PERSON):
            male, smile = rng.random(2) < 0.5
            age = rng.uniform(0.05, 0.95)
            path = place / f"{photo + 1:02d}.jpg"
            _write(path, person, rng, size, age, bool(male), bool(smile))


def _write(
    path: Path,
    person: Person,
    rng: np.random.Generator,
    size: int,
    age: float,
    male: bool,
    smile: bool,
) -> None:
    image = portrait(person, draw_look(rng, age, male, smile), size, rng)
    image.save(path, quality=QUALITY, subsampling=0)
