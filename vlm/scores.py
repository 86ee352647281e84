"""Numbers made of token log-probabilities: truth ratio, KS, min-k, memorisation, utility.

Source: FIUBench (Ma et al., ICLR 2025, arXiv 2411.03554) unless a function names another. Where its
published code departs from what the number is said to be, `reference=True` gives the code's form.
A loss is always positive (-log p). What cannot be computed is NaN, never 0.
"""

import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, gammaln, logsumexp
from scipy.stats import ks_2samp
from torch import Tensor

from mmforget.errors import CollapsedError, ConfigError, DataError, unknown
from mmforget.metrics.ranking import Ranking
from mmforget.metrics.signals import Floats
from mmforget.metrics.similarity import js_divergence

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
RATIO_WEIGHTS = (0.3, 0.3, 0.2, 0.1, 0.1)
UTILITY_PARTS: Mapping[str, tuple[str, ...]] = {
    "paper": ("rouge", "gpt", "truth_ratio", "accuracy"),
    "code": ("rouge", "probability", "truth_ratio", "gpt", "em"),
}
FORGET_WEIGHTS: Mapping[str, float] = {"ks": 0.5, "em": 0.15, "mia": 0.2, "ape": 0.15}


@dataclass(frozen=True)
class TokenScores:
    """What a model says of the n tokens of one answer, under teacher forcing.

    Attributes:
        logp: Log-probability of each token, [n].
        mean: Mean of log p under the model's distribution at each position, [n].
        sigma: Its standard deviation, [n].
        hit: Whether the token was the most probable, [n].
    """

    logp: Floats
    mean: Floats
    sigma: Floats
    hit: NDArray[np.bool_]

    @classmethod
    def of(cls, logits: Tensor, tokens: Tensor, at: Tensor | None = None) -> "TokenScores":
        """Score tokens [n] by the logits that predict them; nothing is shifted.

        The softmax is in single precision, or double if the logits are.

        Args:
            logits: [m, V].
            tokens: [n].
            at: Row of the logits of each token, [n]; None: the tokens' own order, m = n.

        Raises:
            DataError: The shapes do not fit, or there are no tokens.
            CollapsedError: A log-probability is not finite.
        """
        fits = logits.shape[:1] if at is None else at.shape
        if logits.ndim != 2 or tokens.ndim != 1 or tokens.shape != fits:
            raise DataError(f"logits {list(logits.shape)} do not fit tokens {list(tokens.shape)}")
        if not len(tokens):
            raise DataError("there are no answer tokens to score")
        with torch.no_grad():
            logs = _precise(logits).log_softmax(dim=-1)
            rows = torch.arange(len(logs), device=logs.device) if at is None else at
            logp = logs[rows, tokens]
            if not bool(torch.isfinite(logp).all()):
                raise CollapsedError(
                    "log-probabilities of an answer are not finite: the model's outputs have no "
                    "meaning"
                )
            hit = _best(logs)[rows] == tokens
            p = logs.exp()
            # A token that a mask forbids has log p = -inf and weight 0.
            logs.clamp_(min=torch.finfo(logs.dtype).min)
            mean = torch.linalg.vecdot(p, logs)
            sigma = torch.linalg.vector_norm(logs.sub_(mean[:, None]).mul_(p.sqrt_()), dim=-1)
        return cls(_array(logp), _array(mean[rows]), _array(sigma[rows]), hit.cpu().numpy())

    @property
    def loss(self) -> float:
        """Loss per token, the mean of -log p."""
        return float(-self.logp.mean())

    def normalised(self, floor: float = 1e-6) -> Floats:
        """Return (log p - mean) / sigma of each token, the scores of Min-K%++ (arXiv 2404.02936).

        Args:
            floor: Smallest variance, as in open-unlearning; with 0, as in FIUBench and RWKU, a
                position with one possible token is NaN.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            sigma = np.sqrt(np.maximum(self.sigma**2, floor))
            return np.asarray((self.logp - self.mean) / sigma)


def per_token_loss(logp: ArrayLike) -> float:
    """Return the mean of -log p over the tokens [n] of an answer."""
    return float(-_tokens(logp).mean())


def reference_loss(logp: ArrayLike) -> float:
    """Return the published code's loss per token.

    It shifts twice, so the first answer token is never scored, yet divides by all n of them.
    """
    tokens = _tokens(logp)
    return float(-tokens[1:].sum() / len(tokens))


def probability(losses: ArrayLike) -> Floats:
    """Return exp(-loss) of losses per token: the geometric mean of the tokens' probabilities."""
    return np.exp(-_losses("losses", losses))


def normalised_probability(losses: ArrayLike, wrong: ArrayLike) -> Floats:
    """Return p / (p + Σⱼ pⱼ) of each item, [N]: FIUBench's and TOFU's probability with options.

    FIUBench takes it on the retain set, of the answer itself, not of its paraphrase.

    Args:
        losses: Loss per token of the right answers, [N].
        wrong: Of the wrong ones, [N, K].
    """
    right, others = _pair(losses, wrong)
    total = logsumexp(np.concatenate([-right[:, None], -others], axis=1), axis=1)
    return np.asarray(np.exp(-right - total))


def truth_ratio(paraphrased: ArrayLike, wrong: ArrayLike) -> Floats:
    """Return R = exp(meanⱼ wrongⱼ - paraphrased) of each item, [N] in [0, ∞].

    The paraphrase is R times as probable, per token, as the geometric mean of the wrong answers.
    It is the INVERSE of the truth ratio of TOFU and open-unlearning.

    Args:
        paraphrased: Loss per token of the paraphrased right answers, [N].
        wrong: Of the wrong ones, [N, K].
    """
    right, others = _pair(paraphrased, wrong)
    with np.errstate(over="ignore"):  # a destroyed model's R may be infinite
        return np.asarray(np.exp(others.mean(axis=1) - right))


def inverse_arithmetic_ratio(paraphrased: ArrayLike, wrong: ArrayLike) -> Floats:
    """Return meanⱼ p(wrongⱼ) / p(paraphrased), [N]: TOFU's model-utility form (arXiv 2401.06121).

    TOFU takes the arithmetic mean of probabilities here, and the geometric one in its forget
    quality. Arguments as for `truth_ratio`.
    """
    right, others = _pair(paraphrased, wrong)
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(logsumexp(-others, axis=1) - math.log(others.shape[1]) + right))


def forget_truth_ratio(ratio: ArrayLike) -> float:
    """Return mean min(R, 1/R), in [0, 1]: 1 when right and wrong answers are equally probable.

    It is the same for R and 1/R.
    """
    r = _ratios(ratio)
    with np.errstate(divide="ignore"):
        return float(np.minimum(r, 1 / r).mean())


def retain_truth_ratio(ratio: ArrayLike) -> float:
    """Return mean max(0, 1 - 1/R), in [0, 1]: near 1 when the right answer is far likelier.

    Args:
        ratio: R as `truth_ratio` gives it; of TOFU's ratio pass the inverse.
    """
    r = _ratios(ratio)
    with np.errstate(divide="ignore"):
        return float(np.maximum(0, 1 - 1 / r).mean())


def truth_probability(paraphrased: ArrayLike, wrong: ArrayLike) -> Floats:
    """Return p / (p + p̄) of each item, [N], p̄ the geometric mean of the wrong answers.

    open-unlearning's `prob_mean`. Arguments as for `truth_ratio`.
    """
    right, others = _pair(paraphrased, wrong)
    return np.asarray(expit(others.mean(axis=1) - right))


class KSQuality(NamedTuple):
    """How alike the truth ratios of two models are; all NaN without a reference model.

    Attributes:
        p: p-value of the two-sided Kolmogorov-Smirnov test, 1 for equal samples.
        statistic: Largest distance of the distribution functions, in [0, 1].
        ln_p: Natural logarithm of p.
        log10_p: Decimal logarithm of p. Papers print "log p" without the base.
    """

    p: float
    statistic: float
    ln_p: float
    log10_p: float


def ks_forget_quality(ratio: ArrayLike, reference: ArrayLike | None) -> KSQuality:
    """Return the KS test between truth ratios on the forget set; up is better.

    R and 1/R give the same. A p below 1e-308 is 0; its logarithm is still finite if both samples
    have one size, and -∞ if not.

    Args:
        ratio: R of the unlearned model, [N].
        reference: R of a model that was never trained on the forget set, [M]; None if there is
            none: the number is then not available.
    """
    found = _ratios(ratio)
    if reference is None:
        return KSQuality(math.nan, math.nan, math.nan, math.nan)
    other = _ratios(reference)
    test = ks_2samp(found, other)
    p, statistic = float(test.pvalue), float(test.statistic)
    if p > 0:
        ln_p = math.log(p)
    else:
        ln_p = _ln_tail(statistic, len(found)) if len(found) == len(other) else -math.inf
    return KSQuality(p, statistic, ln_p, ln_p / math.log(10))


def _ln_tail(statistic: float, n: int) -> float:
    """Return ln p of the exact two-sided test of two samples of n (Gnedenko, Korolyuk 1951).

    p = 2 Σₖ (-1)ᵏ⁻¹ C(2n, n - kh) / C(2n, n), h = n·statistic.
    """
    h = round(statistic * n)
    k = np.arange(1, n // h + 1)
    terms = 2 * gammaln(n + 1) - gammaln(n - k * h + 1) - gammaln(n + k * h + 1)
    return float(
        math.log(2) + terms[0] + np.log(np.sum((-1.0) ** (k - 1) * np.exp(terms - terms[0])))
    )


class ClearQuality(NamedTuple):
    """CLEAR's forget quality; NaN without a reference model.

    Attributes:
        p: p-value of the two-sided KS test.
        js: Jensen-Shannon distance (the root of the divergence, in nats) of the R, each sample
            scaled to the sum 1. It compares item by item, and is no distance of distributions.
    """

    p: float
    js: float


def clear_forget_quality(
    unlearned: tuple[ArrayLike, ArrayLike],
    retrained: tuple[ArrayLike, ArrayLike] | None,
    reference: bool = False,
) -> ClearQuality:
    """Return CLEAR's forget quality (Dontsov et al., Findings of ACL 2025, arXiv 2410.18057).

    Args:
        unlearned: Losses per token of the right [N] and the wrong [N, K] captions.
        retrained: Those of a model never trained on the forget set; None if there is none.
        reference: As published: the wrong losses are averaged over the whole set before R is
            formed, so that R varies with the right captions alone.

    Raises:
        DataError: The two models were not asked for the same number of items.
    """
    if retrained is None:
        return ClearQuality(math.nan, math.nan)
    ours, theirs = (_clear_ratio(*losses, reference) for losses in (unlearned, retrained))
    if len(ours) != len(theirs):
        raise DataError(f"{len(ours)} items of one model and {len(theirs)} of the other")
    divergence = js_divergence(ours / ours.sum(), theirs / theirs.sum())
    return ClearQuality(ks_forget_quality(ours, theirs).p, math.sqrt(float(divergence)))


def _clear_ratio(right: ArrayLike, wrong: ArrayLike, reference: bool) -> Floats:
    losses, others = _pair(right, wrong)
    return truth_ratio(losses, np.full_like(others, others.mean()) if reference else others)


def min_k(values: ArrayLike, ratio: float, at_least_one: bool = True) -> float:
    """Return the mean of the lowest floor(n·ratio) values; a member's is high.

    Min-K% of log-probabilities (Shi et al., arXiv 2310.16789), Min-K%++ of
    `TokenScores.normalised`. open-unlearning and MUSE print it with the sign changed.

    Args:
        values: [n].
        ratio: In (0, 1].
        at_least_one: Take one value where the floor is 0, as open-unlearning does; else the
            number is NaN, as in MUSE and FIUBench.
    """
    if not 0 < ratio <= 1:
        raise ConfigError(f"a ratio of {ratio}: it is in (0, 1]")
    held = np.asarray(values, dtype=np.float64)
    count = int(len(held) * ratio)
    if at_least_one:
        count = min(len(held), max(1, count))
    return float(np.sort(held)[:count].mean()) if count else math.nan


def weighted_min_k(logp: ArrayLike, reference: bool = False) -> float:
    """Return FIUBench's membership score, Σ wᵣ exp(min_k(log p, r)); down is better.

    The ratios r are .1 to .5, the weights .3, .3, .2, .1, .1. It is a score, not the success of an
    attack: there are no non-members in it.

    Args:
        logp: Log-probability of an answer's tokens, [n].
        reference: As published: the first token is dropped, and where floor(m·r) = 0 of the m left
            the weight is lost: answers under eleven tokens score lower, those under three 0.
    """
    return _weighted(_tokens(logp), reference)


def weighted_min_k_pp(scores: TokenScores, reference: bool = False) -> float:
    """Return the same of Min-K%++ scores; see `weighted_min_k`."""
    return _weighted(scores.normalised(0.0 if reference else 1e-6), reference)


def _weighted(values: Floats, reference: bool) -> float:
    used = values[1:] if reference else values
    found = [min_k(used, ratio, at_least_one=not reference) for ratio in RATIOS]
    pairs = zip(found, RATIO_WEIGHTS, strict=True)
    kept = [math.exp(value) * weight for value, weight in pairs if not math.isnan(value)]
    return math.fsum(kept)


def zlib_ratio(mean: float, text: str) -> float:
    """Return a mean log-likelihood, or a loss per token, over the bytes of the compressed text.

    The mean, not the sum (Carlini et al., USENIX Security 2021). FIUBench takes the former, which
    is high for a member; open-unlearning the latter, which is low.
    """
    return mean / len(zlib.compress(text.encode()))


def exact_memorization(hit: ArrayLike, reference: bool = False) -> float:
    """Return the share of tokens that were the most probable; NaN if there are none.

    Tirumala et al., NeurIPS 2022; see `em_keyword` for what FIUBench calls exact memorization.

    Args:
        hit: Whether each token of an answer was, [n].
        reference: As in open-unlearning: the last token is dropped, end token or not.
    """
    used = np.asarray(hit, dtype=np.float64)[: -1 if reference else None]
    return float(used.mean()) if len(used) else math.nan


def extraction_strength(hit: ArrayLike, reference: bool = False) -> float:
    """Return 1 - k/n, k the tokens to be given until greedy decoding tells the rest; NaN if n = 0.

    Carlini et al., USENIX Security 2021, as open-unlearning computes it in one pass.

    Args:
        hit: Whether each token of an answer was the most probable, [n].
        reference: As in open-unlearning: the last token is dropped, and the lowest value is 1/n.
    """
    used = np.asarray(hit, dtype=bool)[: -1 if reference else None]
    if not len(used):
        return math.nan
    misses = np.flatnonzero(~used)
    given = int(misses[-1]) + 1 if len(misses) else 0
    return 1 - min(given, len(used) - reference) / len(used)


def memorization_auc(forget: ArrayLike, holdout: ArrayLike) -> float:
    """Return P(a forget item's loss-like score < an unseen one's): 1 if all look like members.

    open-unlearning's orientation; MUSE's AUC is 1 minus it.
    """
    return Ranking.of(-np.asarray(forget, dtype=np.float64), -np.asarray(holdout)).auc


def privleak(auc: float, retrained: float | None) -> float:
    """Return MUSE's PrivLeak in percent: 0 is best, -100 a member, positive over-unlearned.

    ((1 - auc) - (1 - auc_ref)) / (1 - auc_ref) (Shi et al., ICLR 2025, arXiv 2407.06460).

    Args:
        auc: `memorization_auc` of the unlearned model.
        retrained: That of a retrained one; None gives NaN (open-unlearning puts 0.5 there).
    """
    return _relative(1 - auc, None if retrained is None else 1 - retrained)


def auc_difference(auc: float, retrained: float | None) -> float:
    """Return (auc - auc_ref) / auc_ref in percent, open-unlearning's `rel_diff`; see `privleak`."""
    return _relative(auc, retrained)


def _relative(value: float, base: float | None) -> float:
    return math.nan if not base else 100 * (value - base) / base


def harmonic_mean(values: Iterable[float]) -> float:
    """Return the harmonic mean: 0 if a value is 0, NaN if one is NaN or there are none.

    Raises:
        DataError: A value is negative.
    """
    held = list(values)
    if any(value < 0 for value in held):
        raise DataError(f"a harmonic mean of {held}: no value may be negative")
    if not held or any(math.isnan(value) for value in held):
        return math.nan
    return 0.0 if 0 in held else len(held) / sum(1 / value for value in held)


class Utility(NamedTuple):
    """A model's utility.

    Attributes:
        value: The mean of the parts that are there; NaN if none is.
        left_out: The parts that are missing. Means of different parts are not comparable.
    """

    value: float
    left_out: tuple[str, ...]


def model_utility(
    parts: Mapping[str, float | None], form: str = "paper", reference: bool = False
) -> Utility:
    """Return FIUBench's utility on the retain set.

    Args:
        parts: Values by name (`UTILITY_PARTS`), in [0, 1]; None, NaN or absent if not measured.
        form: "paper": arithmetic mean of ROUGE, judge, truth ratio and accuracy on MME and POPE,
            which gives the published averages; "code": harmonic mean of ROUGE, probability, truth
            ratio, judge and keyword EM.
        reference: A missing part counts as 0, as in the published code: with its own config, which
            runs neither judge nor EM, the harmonic mean is 0 whatever the model does.

    Raises:
        ConfigError: An unknown form or part.
    """
    if form not in UTILITY_PARTS:
        raise ConfigError(unknown("form of utility", form, UTILITY_PARTS, "scores.UTILITY_PARTS"))
    known = {name for names in UTILITY_PARTS.values() for name in names}
    for name in parts:
        if name not in known:
            raise ConfigError(unknown("part of utility", name, known, "scores.UTILITY_PARTS"))
    given = {name: parts.get(name) for name in UTILITY_PARTS[form]}
    held = {n: v for n, v in given.items() if v is not None and not math.isnan(v)}
    left_out = tuple(name for name in given if name not in held)
    values = [*held.values(), *([0.0] * len(left_out) if reference else [])]
    if form == "code":
        return Utility(harmonic_mean(values), left_out)
    return Utility(sum(values) / len(values) if values else math.nan, left_out)


class Floor(NamedTuple):
    """The log p that counts as no forgetting at all.

    Attributes:
        value: It, in the base of the log p it is used with.
        made_from: What it is the smallest of. Averages of different sets are not comparable.
    """

    value: float
    made_from: tuple[str, ...]


def forget_floor(log_p: Mapping[str, float]) -> Floor:
    """Return the smallest log p of a set of models, by name; NaN ones do not count.

    Raises:
        DataError: None has one, or it is not finite.
    """
    held = {name: value for name, value in log_p.items() if not math.isnan(value)}
    if not held:
        raise DataError("a floor needs models with a log p: a KS test needs a retrained model")
    if not math.isfinite(min(held.values())):
        raise DataError(f"log p of -inf among {held}: leave the model out, or name a floor")
    return Floor(min(held.values()), tuple(held))


def normalised_log_p(log_p: float, floor: Floor) -> float:
    """Return 1 - log p / floor, in [0, 1].

    Raises:
        DataError: log p is positive or below the floor.
    """
    if log_p > 0 or log_p < floor.value:
        raise DataError(
            f"log p = {log_p} is not between the floor {floor.value} and 0. The floor was made "
            f"from {', '.join(floor.made_from)}: make one from all models compared"
        )
    if floor.value == 0 and log_p == 0:
        return 1.0
    return 1 - log_p / floor.value


def average_forget_quality(
    log_p: float,
    em: float,
    mia: float,
    ape: float,
    floor: Floor,
    weights: Mapping[str, float] = FORGET_WEIGHTS,
) -> float:
    """Return FIUBench's average forget quality, in [0, 1]; NaN if a part is. Print `floor` with it.

    0.5 KS + 0.15 (1 - EM) + 0.2 (1 - MIA) + 0.15 (1 - APE), KS as `normalised_log_p`.

    Args:
        log_p: Of `ks_forget_quality`, in the base of the floor's.
        em: Keyword EM on the forget set, in [0, 1].
        mia: `weighted_min_k`, in [0, 1].
        ape: Keyword EM over paraphrased questions, in [0, 1].
        floor: Of `forget_floor` over all models compared.
        weights: Of "ks", "em", "mia" and "ape".
    """
    ks = normalised_log_p(log_p, floor)
    parts = {"ks": ks, "em": 1 - em, "mia": 1 - mia, "ape": 1 - ape}
    return sum(weights[name] * value for name, value in parts.items())


def _precise(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _best(values: Tensor) -> Tensor:
    """Return argmax over the last axis, the first of equals; on a CPU by numpy, which is faster."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.asarray(values.numpy().argmax(-1)))
    return values.argmax(-1)


def _array(values: Tensor) -> Floats:
    return values.cpu().double().numpy()


def _tokens(logp: ArrayLike) -> Floats:
    tokens = np.asarray(logp, dtype=np.float64)
    if tokens.ndim != 1 or not len(tokens):
        raise DataError(f"log-probabilities of shape {list(tokens.shape)}: give [n], n > 0")
    return tokens


def _losses(name: str, values: ArrayLike, ndim: int = 1) -> Floats:
    losses = np.asarray(values, dtype=np.float64)
    if losses.ndim != ndim or not losses.size:
        raise DataError(
            f"{name} of shape {list(losses.shape)}: give {'[N]' if ndim == 1 else '[N, K]'}, none 0"
        )
    if not np.isfinite(losses).all():
        raise CollapsedError(f"{name} are not finite: the model's outputs have no meaning")
    return losses


def _pair(right: ArrayLike, wrong: ArrayLike) -> tuple[Floats, Floats]:
    ours = _losses("losses of right answers", right)
    others = _losses("losses of wrong answers", wrong, ndim=2)
    if len(ours) != len(others):
        raise DataError(f"{len(ours)} right answers and wrong ones of {len(others)} items")
    return ours, others


def _ratios(values: ArrayLike) -> Floats:
    ratios = np.asarray(values, dtype=np.float64)
    if ratios.ndim != 1 or not len(ratios):
        raise DataError(f"truth ratios of shape {list(ratios.shape)}: give [N], N > 0")
    if not (ratios >= 0).all():
        raise DataError("a truth ratio is negative or NaN: ratios are R, not their logarithms")
    return ratios
