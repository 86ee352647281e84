"""What a model answers to every evaluated question of FIUBench: asked once for all metrics."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object

from mmforget.errors import ConfigError
from mmforget.metrics.signals import Floats
from mmforget.types import Benchmark, ModelView, Trial
from mmforget.vlm import models, scores
from mmforget.vlm.benchmarks.fiubench import FIUBenchmark
from mmforget.vlm.chat import Item
from mmforget.vlm.formats import QA, Person
from mmforget.vlm.generation import generate
from mmforget.vlm.metrics.common import asked
from mmforget.vlm.models import VLM
from mmforget.vlm.scores import TokenScores
from mmforget.vlm.scoring import Ask, score
from mmforget.vlm.text_scores import ape_scores, em_keyword, keyword_scores, rouge_recalls


@dataclass(frozen=True)
class Answered:
    """One question and all that was asked around it.

    Attributes:
        item: The question with its true answer.
        qa: Its record.
        person: Whom it is about.
        right: Scores of the true answer.
        paraphrase: Scores of the true answer in other words.
        wrong: Scores of the false answers.
        said: What the model answers.
        reworded: What it answers to the question in other words; forgotten persons only.
        named: The question by name, without the image; None if it was not asked.
        named_said: The answer to it.
        named_right: Scores of the true answer to it.
        other_said: The answer with another face; None if it was not asked.
    """

    item: Item
    qa: QA
    person: Person
    right: TokenScores
    paraphrase: TokenScores
    wrong: tuple[TokenScores, ...]
    said: str
    reworded: tuple[str, ...] = ()
    named: str | None = None
    named_said: str = ""
    named_right: TokenScores | None = None
    other_said: str | None = None

    @property
    def named_keywords(self) -> list[str]:
        """Keywords that the question by name does not hold itself."""
        asked = (self.named or "").lower()
        return [word for word in self.qa.keywords if word.lower() not in asked]


class Answers:
    """The answers about some persons, as arrays in the order of the questions.

    Args:
        rows: The answers.
        reference: Use the published code's forms of losses, ROUGE and min-k.
    """

    def __init__(self, rows: Sequence[Answered], reference: bool) -> None:
        self.rows = list(rows)
        self.reference = reference

    def __len__(self) -> int:
        return len(self.rows)

    def loss(self, found: TokenScores) -> float:
        """Return the loss per token of one answer."""
        per_token = scores.reference_loss if self.reference else scores.per_token_loss
        return per_token(found.logp)

    @cached_property
    def right(self) -> Floats:
        """Losses per token of the true answers, [N]."""
        return np.array([self.loss(row.right) for row in self.rows])

    @cached_property
    def wrong(self) -> Floats:
        """Losses per token of the false answers, [N, K], K the fewest that a question has."""
        count = min(len(row.wrong) for row in self.rows)
        return np.array([[self.loss(w) for w in row.wrong[:count]] for row in self.rows])

    @cached_property
    def ratio(self) -> Floats:
        """R of each question, [N]; see `scores.truth_ratio`."""
        paraphrased = [self.loss(row.paraphrase) for row in self.rows]
        return scores.truth_ratio(paraphrased, self.wrong)

    @cached_property
    def rouge(self) -> Floats:
        """ROUGE-L recall of each answer, [N]."""
        references = [row.item.answer for row in self.rows]
        said = [row.said for row in self.rows]
        return rouge_recalls(references, said, reference=self.reference)

    @cached_property
    def em(self) -> Floats:
        """Share of keywords in each answer, [N]; NaN where there are none."""
        return self._keywords([row.said for row in self.rows])

    @cached_property
    def answered(self) -> Floats:
        """1 where an answer holds every keyword, else 0, [N]; NaN where there are none."""
        return np.where(np.isnan(self.em), np.nan, self.em == 1.0)

    @cached_property
    def ape(self) -> Floats:
        """Share of keywords in each answer to a reworded question."""
        words = [row.qa.keywords for row in self.rows]
        return ape_scores(words, [row.reworded for row in self.rows])

    @cached_property
    def mink(self) -> Floats:
        """Weighted Min-K score of each true answer, [N]."""
        found = [scores.weighted_min_k(row.right.logp, self.reference) for row in self.rows]
        return np.array(found)

    @cached_property
    def minkpp(self) -> Floats:
        """Weighted Min-K++ score of each true answer, [N]."""
        return np.array([scores.weighted_min_k_pp(r.right, self.reference) for r in self.rows])

    @cached_property
    def memorized(self) -> Floats:
        """Share of the tokens of each true answer that are predicted first, [N]."""
        return np.array([scores.exact_memorization(row.right.hit) for row in self.rows])

    @cached_property
    def extraction(self) -> Floats:
        """Extraction strength of each true answer, [N]."""
        return np.array([scores.extraction_strength(row.right.hit) for row in self.rows])

    @cached_property
    def zlib(self) -> Floats:
        """Mean log-likelihood over the compressed length of each true answer, [N]."""
        found = [scores.zlib_ratio(-row.right.loss, row.item.answer) for row in self.rows]
        return np.array(found)

    @cached_property
    def named(self) -> list[Answered]:
        """Rows that were also asked by name, without the image."""
        return [row for row in self.rows if row.named is not None]

    @cached_property
    def named_em(self) -> Floats:
        """Share of keywords in the answers without the image.

        Keywords that are in the question itself (the name) do not count.
        """
        return np.array([em_keyword(row.named_keywords, row.named_said) for row in self.named])

    @cached_property
    def named_mink(self) -> Floats:
        """Weighted Min-K score of the true answers without the image."""
        kept = [row.named_right for row in self.named if row.named_right is not None]
        return np.array([scores.weighted_min_k(each.logp, self.reference) for each in kept])

    @cached_property
    def other_em(self) -> Floats:
        """Share of keywords in the answers with another face."""
        rows = [row for row in self.rows if row.other_said is not None]
        return keyword_scores([r.qa.keywords for r in rows], [r.other_said or "" for r in rows])

    def _keywords(self, said: Sequence[str]) -> Floats:
        return keyword_scores([row.qa.keywords for row in self.rows], said)


def fiubench(benchmark: Benchmark) -> FIUBenchmark:
    """Return the benchmark as FIUBench.

    Raises:
        ConfigError: It is another one.
    """
    if not isinstance(benchmark, FIUBenchmark):
        raise ConfigError("metric vlm/fiubench needs benchmark=vlm/fiubench")
    return benchmark


def answers(view: ModelView, bench: FIUBenchmark, split: str) -> Answers:
    """Return a model's answers about the forgotten ("forget") or kept ("retain") persons."""

    def ask(own: ModelView) -> Answers:
        model = own.model
        assert isinstance(model, VLM)
        asked(own).add(split)
        persons = bench.forgotten if split == "forget" else bench.kept
        rows = [
            (person, item, qa)
            for person in persons
            for item, qa in zip(bench.items(person), person.qa, strict=True)
        ]
        return Answers(_ask(model, bench, rows, split == "forget"), bench.published)

    return view.memo(("fiubench answers", split), ask)


def retained_view(trial: Trial, bench: FIUBenchmark) -> ModelView | None:
    """Return the model that never saw the forget set: the retrained one, or one the user names."""
    if trial.retrained is not None or bench.config.reference_model is None:
        return trial.retrained
    path = Path(bench.config.reference_model).expanduser()
    return trial.original.memo(
        ("reference model", str(path)),
        lambda _: trial.lab.view(models.load(path, bench.base).eval()),
    )


def _ask(
    model: VLM, bench: FIUBenchmark, every: Sequence[tuple[Person, Item, QA]], forgotten: bool
) -> list[Answered]:
    config, engine = bench.config, bench.engine
    rank, world = (0, 1) if engine is None else (engine.rank, engine.world)
    rows = list(enumerate(every))[rank::world]
    settings: dict[str, Any] = {
        "batch_size": config.eval_rows,
        "shared": config.shared_prefix,
        "autocast": bench.autocast,
    }

    def say(asks: Sequence[Ask]) -> list[str]:
        if not asks:
            return []
        said = generate(
            model,
            bench.chat,
            asks,
            max_new_tokens=config.max_new_tokens,
            stop_at_sentence=bench.published,
            **settings,
        )
        return [samples[0] for samples in said]

    asks = [Ask(item.image, item.question) for _, (_, item, _) in rows]
    texts = [
        [item.answer, *bench.worded([qa.paraphrased_answer]), *qa.wrong]
        for _, (_, item, qa) in rows
    ]
    named = [bench.named(person, item) for _, (person, item, _) in rows]
    places = [k for k, question in enumerate(named) if question is not None]
    blind = [Ask(None, named[k] or "") for k in places]
    scored = score(
        model, bench.chat, [*asks, *blind], [*texts, *([texts[k][0]] for k in places)], **settings
    )
    reworded = [
        [Ask(item.image, text) for text in bench.worded(qa.paraphrases)] if forgotten else []
        for _, (_, item, qa) in rows
    ]
    faces = bench.other_faces() if forgotten and config.other_face else []
    others = [
        Ask(faces[index % len(faces)], item.question) for index, (_, item, _) in rows if faces
    ]
    # One call, so that prompts of one length are decoded together whatever they are for.
    told = iter(say([*asks, *blind, *(ask for each in reworded for ask in each), *others]))
    said = [next(told) for _ in asks]
    blind_said = dict(zip(places, [next(told) for _ in blind], strict=True))
    reworded_said = [tuple(next(told) for _ in each) for each in reworded]
    other_said = dict(enumerate(next(told) for _ in others))
    blind_scores = dict(zip(places, scored[len(asks) :], strict=True))
    found = []
    for k, (index, (person, item, qa)) in enumerate(rows):
        right, paraphrase, *wrong = scored[k]
        found.append(
            (
                index,
                Answered(
                    item=item,
                    qa=qa,
                    person=person,
                    right=right,
                    paraphrase=paraphrase,
                    wrong=tuple(wrong),
                    said=said[k],
                    reworded=reworded_said[k],
                    named=named[k],
                    named_said=blind_said.get(k, ""),
                    named_right=blind_scores[k][0] if k in blind_scores else None,
                    other_said=other_said.get(k),
                ),
            )
        )
    gathered = gather_object(found) if world > 1 else found
    return [row for _, row in sorted(gathered, key=lambda pair: int(pair[0]))]
