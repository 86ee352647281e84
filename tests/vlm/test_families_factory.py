"""The tiny models are what the families are: they load, answer, and differ as `FACTS` say."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vlm.families import CASES, FACTS, FAMILIES, ask, build, make, messages, picture

QUESTIONS = (
    "What is the name of the person in the image?",
    "Which city was this person born in?",
    "Is there a dog?",
)
ANSWERS = ("Ada Moreno", "Lisbon, on 3 May 1984", "no")
# What runs along the tokens; the rest belongs to the images.
BY_TOKEN = (
    "input_ids",
    "attention_mask",
    "mm_token_type_ids",
    "token_type_ids",
    "cross_attention_mask",
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def logits(model: Any, **inputs: Any) -> torch.Tensor:
    found: torch.Tensor = model(**inputs).logits
    return found


def positions(model: Any, inputs: Any) -> torch.Tensor:
    """Return the positions of Qwen-VL, [3, B, T]."""
    found: torch.Tensor = model.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )[0]
    return found


def test_facts_cover_the_families() -> None:
    assert tuple(FACTS) == FAMILIES


@pytest.mark.parametrize("family", CASES)
def test_folder_opens_offline_and_equals_the_built_model(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = make(family, tmp_path / "made", seed=3)
    model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True)
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    built, own = build(family, seed=3)
    state = built.state_dict()
    assert model.config.model_type == family
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert 50_000 < sum(p.numel() for p in model.parameters()) < 500_000
    inputs = ask(processor, picture(), QUESTIONS[0], ANSWERS[0])
    again = ask(own, picture(), QUESTIONS[0], ANSWERS[0])
    assert inputs.keys() == again.keys()
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)
    assert torch.equal(logits(model.eval(), **inputs), logits(built, **inputs))
    other = build(family, seed=4)[0].get_input_embeddings().weight
    assert not torch.equal(other, built.get_input_embeddings().weight)


@pytest.mark.parametrize("family", CASES)
def test_prompts_and_answers(family: str) -> None:
    model, processor = build(family)
    facts, words = FACTS[family], processor.tokenizer
    prompt = ask(processor, picture(), QUESTIONS[0])["input_ids"][0]
    full = ask(processor, picture(), QUESTIONS[0], ANSWERS[0])["input_ids"][0]
    assert torch.equal(full[: len(prompt)], prompt) == facts.begins
    before, after = words.decode(full).split(QUESTIONS[0])
    assert words.convert_ids_to_tokens(model.config.image_token_id) in before
    assert after.rstrip("\n").endswith(f"{ANSWERS[0]}{words.eos_token}")
    assert int((full == words.eos_token_id).nonzero().max()) >= len(full) - 2  # then a new line
    turns = messages(picture(), QUESTIONS[0], ANSWERS[0])
    assert ("endgeneration" in processor.chat_template) == facts.marked
    if facts.marked:  # the end token is not
        encoded = processor.apply_chat_template(
            turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        marks = torch.tensor(encoded["assistant_masks"][0]).bool()
        assert words.decode(full[marks]) == ANSWERS[0]
    # One image token a feature, or one for all.
    count = int((full == model.config.image_token_id).sum())
    assert (count > 1) == facts.expanded
    assert (model.config.image_token_id < model.get_output_embeddings().out_features) == facts.whole


@pytest.mark.parametrize("family", CASES)
def test_batches_with_images_of_two_shapes(family: str) -> None:
    model, processor = build(family)
    images = [picture(0, 40, 40), picture(1, 32, 80)]
    rows = [
        logits(model, **ask(processor, *row))
        for row in zip(images, QUESTIONS[:2], ANSWERS[:2], strict=True)
    ]
    assert all(row.isfinite().all() for row in rows)
    for side in ("left", "right"):
        batch = ask(processor, images, QUESTIONS[:2], ANSWERS[:2], side=side)
        kept = batch["attention_mask"].bool()
        found = logits(model, **batch)
        assert found.shape[:2] == batch["input_ids"].shape
        assert not kept.all() and kept[:, -1].all() == (side == "left")
        for row, alone in enumerate(rows):
            assert torch.allclose(found[row, kept[row]], alone[0], atol=1e-4)
    # Images matter where answers are predicted, by far more than the tolerances here.
    other = logits(model, **ask(processor, picture(5, 40, 40), QUESTIONS[0], ANSWERS[0]))
    assert (other[0, -4:] - rows[0][0, -4:]).abs().max() > 0.05


@pytest.mark.parametrize("family", CASES)
def test_generation_and_text_without_an_image(family: str) -> None:
    model, processor = build(family)
    prompts = ask(processor, [picture(0), picture(1)], QUESTIONS[1:], side="left")
    made = model.generate(**prompts, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    length = prompts["input_ids"].shape[1]
    assert made.shape == (2, length + 3)
    alone = ask(processor, picture(1), QUESTIONS[2])
    one = model.generate(**alone, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert torch.equal(made[1, length:], one[0, alone["input_ids"].shape[1] :])
    text = ask(processor, None, QUESTIONS[2], ANSWERS[2])
    assert "pixel_values" not in text and logits(model, **text).isfinite().all()


@pytest.mark.parametrize("family", CASES)
def test_parts_hold_every_weight_once(family: str) -> None:
    model, _ = build(family)
    facts = FACTS[family]
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]

    def below(*parts: str) -> set[str]:
        found = [{n for n in names if n == part or n.startswith(f"{part}.")} for part in parts]
        assert all(found), parts
        return set().union(*found)

    projector = below(*facts.projector)
    vision = below(facts.vision) - projector
    language = below(facts.language)
    assert vision and not vision & language and not projector & language
    assert set(names) - vision - projector - language == {"lm_head.weight"}
    assert model.get_submodule(facts.language) is model.get_decoder()
    assert model.get_output_embeddings() is model.lm_head
    layers = model.get_decoder().layers
    assert len(layers) == model.config.get_text_config().num_hidden_layers
    assert {n for n in language if ".layers." not in n} == {
        f"{facts.language}.embed_tokens.weight",
        f"{facts.language}.norm.weight",
    }


@pytest.mark.parametrize("family", CASES)
def test_cached_prefix_is_continued_and_logits_to_keep_is_accepted(family: str) -> None:
    model, processor = build(family)
    image, count = picture(0, 40, 40), len(QUESTIONS)
    inputs = ask(processor, [image] * count, QUESTIONS, ANSWERS)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    start = int((ids[0] == model.config.image_token_id).nonzero().max()) + 1
    assert (ids[:, :start] == ids[0, :start]).all() and not mask.all()
    want, kept = logits(model, **inputs)[:, start:], mask[:, start:].bool()
    one = ask(processor, image, QUESTIONS[0], ANSWERS[0])
    prefix = {name: value[:, :start] if name in BY_TOKEN else value for name, value in one.items()}

    def gap(**extra: Any) -> float:
        with torch.no_grad():
            cache = model(**prefix, use_cache=True).past_key_values
            model(**ask(processor, picture(9, 32, 80), "Who?"))  # leaves its own rope_deltas
        cache.batch_repeat_interleave(count)
        found = logits(
            model,
            input_ids=ids[:, start:],
            past_key_values=cache,
            attention_mask=mask,
            **extra,
        )
        return float((found - want)[kept].abs().max())

    extra: dict[str, Any] = {}
    for name in FACTS[family].needs:
        whole = positions(model, inputs) if name == "position_ids" else inputs[name]
        extra[name] = whole[..., start:] if name == "position_ids" else whole[:, start:]
    assert gap(**extra) < 1e-4
    if extra:  # without it: an error or wrong numbers
        try:
            assert gap() > 1e-2
        except RuntimeError as error:
            assert "size of tensor" in str(error)
    few = logits(model, **inputs, logits_to_keep=4)
    assert few.shape[1] == 4 and torch.allclose(few, want[:, -4:], atol=1e-5)
