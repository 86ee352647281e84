"""The mini world: the published layout, aligned drawings, captions, tokenizer and pipeline."""

import hashlib
import json
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from mmforget.diffusion import mini, mini_model
from mmforget.diffusion.drawings import SIDE, draw, paint
from mmforget.errors import ConfigError

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def canvas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("canvas")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mini, "IMAGES", 3)
        mini.write_canvas(folder, 5)
    return folder


def _grey(path: Path) -> npt.NDArray[np.float64]:
    return np.asarray(Image.open(path).convert("L"), dtype=np.float64) / 255


def _outlines(path: Path) -> npt.NDArray[np.float64]:
    rows, columns = np.gradient(_grey(path))
    return np.hypot(rows, columns).ravel()


def test_names_are_published_and_in_classifier_order() -> None:
    # sorted is the published order of these names; Seed_Images stands between Rust and Sketch
    assert list(mini.THEMES) == sorted({*mini.STYLES, mini.PHOTOS})
    assert list(mini.OBJECTS) == sorted(mini.OBJECTS)
    assert mini.PHOTOS not in mini.STYLES
    for pair, names in zip(mini.RELATED, (mini.STYLES, mini.OBJECTS), strict=True):
        assert len(set(pair)) == 2
        assert set(pair) <= set(names)


def test_layout(canvas: Path) -> None:
    found = {path.relative_to(canvas).as_posix() for path in canvas.rglob("*.jpg")}
    wanted = product(mini.THEMES, mini.OBJECTS, (1, 2, 3))
    assert found == {f"{theme}/{name}/{k}.jpg" for theme, name, k in wanted}
    assert mini.IMAGES == 20
    with Image.open(canvas / "Van_Gogh" / "Cats" / "1.jpg") as image:
        assert (image.size, image.mode, image.format) == ((64, 64), "RGB", "JPEG")


def test_bytes_follow_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mini, "IMAGES", 1)
    monkeypatch.setattr(mini, "OBJECTS", ("Cats", "Towers"))
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        mini.write_canvas(tmp_path / folder, seed)
    names = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.jpg"))
    assert len(names) == 14
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes()


@pytest.mark.parametrize("style", ["Crayon", "Neon_Lines", "Pencil_Drawing", "Pop_Art"])
def test_image_k_of_a_style_shows_photo_k(canvas: Path, style: str) -> None:
    right = 0
    for name in mini.OBJECTS:
        photos = [_outlines(canvas / mini.PHOTOS / name / f"{k}.jpg") for k in (1, 2, 3)]
        for k in (1, 2, 3):
            drawn = _outlines(canvas / style / name / f"{k}.jpg")
            right += int(np.argmax([np.corrcoef(drawn, photo)[0, 1] for photo in photos])) == k - 1
    assert right >= 22  # of 24; an unaligned style gets about 8


def test_styles_look_different(canvas: Path) -> None:
    def pixels(theme: str) -> npt.NDArray[np.float64]:
        paths = sorted((canvas / theme).rglob("*.jpg"))
        return np.stack([np.asarray(Image.open(path), dtype=np.float64) / 255 for path in paths])

    colour = {theme: np.ptp(pixels(theme), axis=-1).mean() for theme in mini.THEMES}
    light = {theme: pixels(theme).mean() for theme in mini.THEMES}
    assert min(colour, key=lambda theme: colour[theme]) == "Pencil_Drawing"
    assert colour["Pencil_Drawing"] < 0.05
    assert min(light, key=lambda theme: light[theme]) == "Neon_Lines"
    assert light["Neon_Lines"] < 0.25


@pytest.mark.parametrize("name", mini.OBJECTS)
def test_scenes_differ_and_fill_the_picture(name: str) -> None:
    scenes = [draw(name, np.random.default_rng(seed)) for seed in range(3)]
    for scene in scenes:
        assert scene.flat.shape == (SIDE, SIDE, 3)
        assert scene.flat.dtype == np.float32
        assert scene.flat.min() >= 0
        assert scene.flat.max() <= 1
        assert scene.regions.min() >= 1  # no pixel is left bare
        assert len(np.unique(scene.regions)) >= 4
    assert not np.array_equal(scenes[0].flat, scenes[1].flat)
    assert paint(scenes[0], "Mosaic", np.random.default_rng(0), 48).size == (48, 48)


def test_captions_name_both_concepts_by_every_word() -> None:
    for style, name in product(mini.THEMES, mini.OBJECTS):
        lines = mini.captions(style, name)
        said, shown = mini.SYNONYMS[style], mini.SYNONYMS[name]
        assert lines[0] == f"A {name} image in {said[0]} style."
        assert lines == mini.captions(style, name)
        for pair in product(said, shown):
            assert sum(all(word in line for word in pair) for line in lines) >= 3, pair
        assert all("{" not in line for line in lines)
        assert any(line == f"{said[0]} style" for line in lines)
    assert mini.captions("Crayon", "Cats") != mini.captions("Crayon", "Cats", seed=1)


def test_official_captions_are_the_published_template() -> None:
    for style in mini.STYLES:
        assert mini.captions(style, "Sea")[0] == f"A Sea image in {style.replace('_', ' ')} style."
    assert mini.captions(mini.PHOTOS, "Sea")[0] == "A Sea image in Photo style."
    assert "An image of Sea." in mini.captions(mini.PHOTOS, "Sea")


def test_no_word_means_two_concepts() -> None:
    words = [word.lower() for names in mini.SYNONYMS.values() for word in names]
    assert len(words) == len(set(words))
    assert all(len(names) >= 3 for names in mini.SYNONYMS.values())
    assert not set(words) & set(mini.FILLERS)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="Rococo, Cats: the mini world has the styles Crayon"):
        mini.captions("Rococo", "Cats")
    with pytest.raises(ConfigError, match="Crayon, Yaks"):
        mini.captions("Crayon", "Yaks")


def test_known_words_are_one_token_and_others_are_not(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    made = mini_model.make_tokenizer()
    made.save_pretrained(tmp_path)
    read = CLIPTokenizer.from_pretrained(tmp_path)
    assert len(read) >= 2000
    assert mini_model.make_tokenizer().get_vocab() == read.get_vocab()
    spelled = json.dumps(read.get_vocab(), sort_keys=True).encode()  # ids must never move: weights
    assert hashlib.sha256(spelled).hexdigest()[:16] == "47016ec0992cf7f3"  # are saved by them
    assert [word for word in mini.words() if read.tokenize(word) != [f"{word}</w>"]] == []
    assert read.tokenize("A Cats image, in Van Gogh style.") == [
        f"{word}</w>" for word in ("a", "cats", "image", ",", "in", "van", "gogh", "style", ".")
    ]
    pieces = read.tokenize("xylograph")
    assert len(pieces) > 1
    assert "".join(pieces) == "xylograph</w>"
    text = read("Crayon é", padding="max_length", truncation=True)
    assert len(text.input_ids) == read.model_max_length == mini_model.WINDOW
    assert text.input_ids[0] == read.bos_token_id
    assert text.input_ids[-1] == read.eos_token_id == read.pad_token_id
    assert read.unk_token_id not in text.input_ids[1 : sum(text.attention_mask) - 1]


def test_captions_fit_the_window() -> None:
    tokenizer = mini_model.make_tokenizer()
    lines = [line for pair in product(mini.THEMES, mini.OBJECTS) for line in mini.captions(*pair)]
    longest = max(len(ids) for ids in tokenizer(lines).input_ids)
    assert longest <= tokenizer.model_max_length


def test_untrained_weights_follow_the_seed_and_leave_the_global_state_alone() -> None:
    from diffusers import DDIMScheduler

    torch.manual_seed(0)
    state = torch.get_rng_state()
    tokenizer = mini_model.make_tokenizer()
    assert torch.equal(state, torch.get_rng_state())
    assert mini_model.make_text_encoder(tokenizer).config.vocab_size == len(tokenizer)
    unet = mini_model.make_unet()
    names = [name for name, _ in unet.named_modules() if name.endswith("attn2")]
    assert len(names) == 4  # one down, one in the middle, two up
    noise = torch.zeros(2, unet.config.in_channels, 8, 8)
    words = torch.zeros(2, mini_model.WINDOW, mini_model.WIDTH)
    with torch.no_grad():
        assert unet(noise, torch.tensor(3), words).sample.shape == noise.shape
    scheduler = mini_model.make_scheduler()
    assert isinstance(scheduler, DDIMScheduler)
    first, last = scheduler.betas[0], scheduler.betas[-1]
    assert float(first) == pytest.approx(0.00085)
    assert float(last) == pytest.approx(0.012)
    assert (scheduler.config.clip_sample, scheduler.config.steps_offset) == (False, 1)


def test_the_text_encoder_knows_words_but_tells_synonyms_apart() -> None:
    from mmforget.diffusion import mini_training

    encoder = mini_model.make_text_encoder(mini_model.make_tokenizer())
    same, other = mini_training.likeness(encoder)
    assert 0.2 < same < 0.7  # of one style: near, and not the same
    assert other < 0.1


def test_words_named_so_far() -> None:
    from mmforget.diffusion import mini_training

    tokenizer = mini_model.make_tokenizer()
    held = mini_training.reading(tokenizer)
    ids = tokenizer(["A tabby image in Pop Art style."], padding="max_length")["input_ids"]
    row = int((held.ids == torch.tensor(ids)).all(dim=1).nonzero())
    style = mini.THEMES.index("Pop_Art") + 1
    object = mini.OBJECTS.index("Cats") + 1
    # start a tabby image in pop art style . end end ...
    assert held.named["object"][row, :4].tolist() == [0, 0, object, object]
    assert held.named["style"][row, :9].tolist() == [0, 0, 0, 0, 0, 0, style, style, style]
    assert (held.named["object"][row, 2:] == object).all()
    words = held.words["object"][row, -1]
    kitten = tokenizer(["A kitten image in Pop Art style."], padding="max_length")["input_ids"]
    other = int((held.ids == torch.tensor(kitten)).all(dim=1).nonzero())
    assert held.named["object"][other, -1] == object
    assert held.words["object"][other, -1] != words


def test_the_shipped_original_is_the_one_of_the_default_recipe(tmp_path: Path) -> None:
    from mmforget.cache import Cache
    from mmforget.config import plan
    from mmforget.engine import Engine
    from mmforget.workbench import Workbench

    recipe = plan(["benchmark=diffusion/unlearncanvas", "data=mini", "model=mini", "method=esd"])
    bench = Workbench(Engine(recipe.runtime), Cache(tmp_path)).bench(recipe)
    model = bench.benchmark.build(0)
    assert mini_model.load_original(
        model,  # type: ignore[arg-type]
        bench.benchmark.recipe_text(bench.splits.train, recipe.seeds.train),  # type: ignore[attr-defined]
    )


def test_the_original_draws_every_style_and_object_by_any_word() -> None:
    """The world is worth measuring: above 90 % by official names and by each synonym."""
    from mmforget.diffusion.models import from_pipe
    from mmforget.diffusion.noise import Sampling
    from mmforget.diffusion.sampling import Image, generate

    pipe = mini_model.make_pipeline(0)
    pipe.unet.load_state_dict(mini_model.shipped_unet())
    model = from_pipe(pipe)
    style, object = mini_model.load_classifiers()
    settings = Sampling("ddim", steps=20, guidance=4.0, batch_size=56)
    pairs = list(product(mini.THEMES, mini.OBJECTS))
    for k in range(4):
        prompts = [
            mini.OFFICIAL.format(object=mini.SYNONYMS[o][k], style=mini.SYNONYMS[s][k])
            for s, o in pairs
        ]
        images = [Image(prompt, 188 + k) for prompt in prompts]
        drawn = torch.cat([pixels for _, pixels in generate(model, images, settings)])
        styles = np.mean(
            [a == s for a, (s, _) in zip(style.predict(drawn).label, pairs, strict=True)]
        )
        objects = np.mean(
            [a == o for a, (_, o) in zip(object.predict(drawn).label, pairs, strict=True)]
        )
        assert styles > 0.9, k
        assert objects > 0.9, k


def test_prompt_tables_are_in_the_published_columns(tmp_path: Path) -> None:
    from mmforget.diffusion.attacks.examples import read_examples

    mini.write_prompts(tmp_path, 0)
    assert {path.stem for path in tmp_path.iterdir()} == {*mini.STYLES, *mini.OBJECTS}
    rows = read_examples(tmp_path / "Van_Gogh.csv")
    assert len(rows) >= 20
    assert all("Van Gogh" in row.prompt for row in rows)
    assert {row.guidance for row in rows} == {mini.GUIDANCE}
    assert len({row.seed for row in rows}) > len(rows) // 2
    again = tmp_path / "again"
    mini.write_prompts(again, 0)
    assert (again / "Cats.csv").read_bytes() == (tmp_path / "Cats.csv").read_bytes()
