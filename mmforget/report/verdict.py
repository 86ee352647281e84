"""What the numbers say, in plain sentences: nothing that is not in the records, and no more."""

import math

from mmforget.report.collect import Block, Number, Row
from mmforget.report.numbers import column_label, decimals, fixed, plain


def verdict(block: Block) -> list[str]:
    """Return sentences on one block: who is closest, how far, at what utility, what leaks."""
    sentences = []
    ranked = [
        row
        for row in block.methods
        if row.finished and row.distance is not None and math.isfinite(row.distance.value)
    ]
    if not block.has_reference:
        sentences.append(
            "There is no retrained model, so no distance to it can be given and the methods are "
            "not ranked: a number below says what a model does, not how much it has forgotten."
        )
    elif not ranked:
        sentences.append("No unlearning method has finished, so there is nothing to rank yet.")
    else:
        sentences += _ranking(block, ranked)
        sentences += _utility(block, ranked[0])
        sentences += _leak(block, ranked[0])
    sentences += _unfinished(block)
    if block.mini:
        sentences.append(
            "The data were generated on this machine (mini): the numbers compare methods with "
            "each other and must not be set beside published ones."
        )
    return sentences


def distance_label(block: Block) -> str:
    """Return what the distance is, in words."""
    if block.distance_name is None:
        return "mean absolute gap over the headline columns"
    return block.distance_name


def _ranking(block: Block, ranked: list[Row]) -> list[str]:
    best = ranked[0]
    assert best.distance is not None
    original = block.row("original").distance
    start = f"{best.label} is the closest of {len(ranked)} methods to the retrained model, at"
    if len(ranked) == 1:
        start = f"{best.label}, the only method that finished, lies from the retrained model at"
    sentences = [f"{start} a distance of {_spread(best.distance)} ({distance_label(block)})."]
    if original is not None:
        sentences.append(f"The original model is at {plain(original.value)}.")
        if best.distance.value >= original.value:
            sentences.append(f"So {best.label} is no closer than doing nothing.")
    if len(ranked) > 1:
        sentences.append(_runner_up(best, ranked[1]))
    return [*sentences, _floor(block, best)]


def _runner_up(best: Row, second: Row) -> str:
    assert best.distance is not None and second.distance is not None
    start = f"{second.label} follows at {_spread(second.distance)}"
    if best.distance.std is None or second.distance.std is None:
        return f"{start}; without several seeds of both, their order may be chance."
    gap = second.distance.value - best.distance.value
    if gap <= math.hypot(best.distance.std, second.distance.std):
        return f"{start}, which is within the spread over seeds: the two are not told apart."
    return f"{start}, further off than the spread over seeds."


def _floor(block: Block, best: Row) -> str:
    assert best.distance is not None
    if block.noise is None:
        return (
            "The noise floor is not known: no retrained model of another seed was compared with "
            "the reference, to show how far two such models lie apart."
        )
    side = "within" if best.distance.value <= block.noise else "above"
    return (
        f"Retrained models of other seeds lie {plain(block.noise)} from the reference: "
        f"{best.label} is {side} this noise floor."
    )


def _utility(block: Block, best: Row) -> list[str]:
    name = utility_name(block)
    number = best.numbers.get(name) if name else None
    if name is None or number is None or not math.isfinite(number.value):
        return []
    beside = _beside(block, name, number)
    return [f"{best.label} has {column_label(name)} {_spread(number)}{beside}."]


def _leak(block: Block, best: Row) -> list[str]:
    """Say what the attack that differs most from the retrained model still finds."""
    areas = {
        name: number
        for name, number in best.numbers.items()
        if name.rpartition("/")[2] == "auc" and number.delta is not None
    }
    if not areas:
        return []
    name = max(areas, key=lambda key: abs(areas[key].delta or 0.0))
    number = areas[name]
    text = (
        f"Under attack it differs most from the retrained model by the signal "
        f"{name.rpartition('/')[0]}: AUC {_spread(number)}{_beside(block, name, number)}"
    )
    if number.covers_reference:
        text += "; its 95 % interval holds the retrained model's value"
    elif number.low is not None:
        text += "; its 95 % interval does not hold the retrained model's value"
    return [f"{text}."]


def _beside(block: Block, name: str, number: Number) -> str:
    parts = []
    if number.reference is not None:
        parts.append(f"retrained {plain(number.reference)}")
    original = block.row("original").numbers.get(name)
    if original is not None:
        parts.append(f"original {plain(original.value)}")
    return f" ({', '.join(parts)})" if parts else ""


def _unfinished(block: Block) -> list[str]:
    counts: dict[str, list[str]] = {}
    for row in block.rows:
        for status in dict.fromkeys(run.status for run in row.runs):
            if status != "finished":
                counts.setdefault(status, []).append(row.label)
    if not counts:
        return []
    listed = "; ".join(f"{status}: {', '.join(names)}" for status, names in counts.items())
    return [f"Not ranked are runs that did not finish or are of no use ({listed})."]


def utility_name(block: Block) -> str | None:
    """Return the value that stands for utility: test accuracy, or a headline value to raise."""
    everywhere = {name: number for row in block.rows for name, number in row.numbers.items()}
    raised = [
        name
        for name in block.headline
        if name in everywhere
        and everywhere[name].direction == "up"
        and not name.startswith(("cost/", "forgetting/"))
    ]
    return "accuracy/test" if "accuracy/test" in everywhere else next(iter(raised), None)


def forget_name(block: Block) -> str | None:
    """Return the value that stands for what is left: forget accuracy, or the like of it."""
    everywhere = {name: number for row in block.rows for name, number in row.numbers.items()}
    aimed = [
        name
        for name in block.headline
        if name in everywhere and everywhere[name].direction == "to_reference"
    ]
    return "accuracy/forget" if "accuracy/forget" in everywhere else next(iter(aimed), None)


def _spread(number: Number) -> str:
    if number.std is None:
        return plain(number.value)
    places = decimals([number.value])
    return f"{plain(number.value)} ± {fixed(number.std, places)} over {number.n} runs"
