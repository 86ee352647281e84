"""Golden vectors of the search for adversarial prompts, and of its success rates."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mmforget.diffusion.attacks.asr import (
    Outcome,
    in_top,
    joined,
    minutes_per_images,
    rates,
)
from mmforget.diffusion.attacks.layouts import (
    adversarial_count,
    adversarial_embeds,
    adversarial_ids,
    decode_ids,
    layout,
    prompt_tokens,
)
from mmforget.diffusion.attacks.relaxed import (
    RowAdam,
    Vocabulary,
    clamped,
    nearest_tokens,
    project_simplex,
    sample_rows,
    timesteps,
)

WINDOW = 77


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def textgrad_simplex_projection(inputs: dict[str, Any]) -> dict[str, Any]:
    assert inputs["budget"] == inputs["upper"] == 1
    rows = tensor(inputs["adv"])
    # A bisection's sums are off by its bracket for each positive entry: only it can match them.
    published = project_simplex(rows, inputs["xi"])
    return {"projected": project_simplex(rows), "row_sums": published.sum(dim=-1)}


def textgrad_adam_projection_trajectory(inputs: dict[str, Any]) -> dict[str, Any]:
    assert inputs["init"] == "uniform 1/V"
    k, size = inputs["k"], inputs["V"]
    rows = project_simplex(torch.full((1, k, size), 1 / size))
    optimizer = RowAdam(rows, inputs["lr"], inputs["weight_decay"])
    found = []
    for grad in inputs["grads"]:
        rows = project_simplex(optimizer.step(rows, tensor([grad])))
        found.append(rows[0].tolist())
    return {"after_each_step": found, "argmax": rows[0].argmax(dim=-1)}


def straight_through_select(inputs: dict[str, Any]) -> dict[str, Any]:
    rows = tensor(inputs["probs"])
    draw = torch.Generator().manual_seed(0)
    ids = sample_rows(rows, torch.rand(rows.shape[:-1], generator=draw))
    return {
        "one_hot": functional.one_hot(ids, rows.shape[-1]).float(),
        "grad": clamped(tensor(inputs["upstream_grad"])),
    }


def numbered(k: int) -> tuple[Tensor, Tensor]:
    """Rows that hold their own place, and adversarial ones that hold -1, -2, ..."""
    return torch.arange(float(WINDOW))[:, None], -torch.arange(1.0, k + 1)[:, None]


def adversarial_token_insertion(inputs: dict[str, Any]) -> dict[str, Any]:
    ids, eos = torch.tensor(inputs["input_ids"]), inputs["eos"]
    n = int(prompt_tokens(ids, eos))
    assert n == inputs["orig_prompt_len"] and int(ids[0]) == inputs["bos"]
    found: dict[str, dict[str, Any]] = {}
    for location in ("prefix_k", "suffix_k", "mid_k", "insert_k", "per_k_words"):
        given = inputs["adv_ids"]
        count = adversarial_count(location, n, len(given))
        adversarial = torch.tensor(given[:count])
        made = layout(location, n, len(adversarial), len(ids), keep_end=False)
        rows, ours = numbered(len(adversarial))
        found[location] = {
            "adv_ids": adversarial.tolist(),
            "ids": adversarial_ids(made, ids, adversarial).tolist(),
            "embed_first_component": adversarial_embeds(made, rows, ours)[:, 0].tolist(),
            "length": len(made.sources),
        }
    return {
        "by_location": found,
        "prefix_decoded_ids_passed_to_tokenizer_decode": decode_ids(found["prefix_k"]["ids"], eos),
    }


def vocabulary_projection(inputs: dict[str, Any]) -> dict[str, Any]:
    table, query = tensor(inputs["vocab"]), tensor(inputs["query"])[0]
    best = tensor(inputs["probs"])[0].argmax(dim=-1)
    near = nearest_tokens(query, table)
    return {
        "argmax_ids": best,
        "argmax_embed": table[best],
        "cosine_ids": near,
        "cosine_embed": table[near],
        "l2_ids_for_contrast": torch.cdist(query, table).argmin(dim=-1),
    }


def hard_prompt_trajectory(inputs: dict[str, Any]) -> dict[str, Any]:
    vocabulary, target = Vocabulary(tensor(inputs["vocab"])), tensor(inputs["target"])
    points = vocabulary.table[torch.tensor([inputs["init_ids"]])]
    optimizer = RowAdam(points, inputs["lr"], inputs["weight_decay"])
    losses: list[float] = []

    def gradient(embeds: Tensor) -> Tensor:
        losses.append(float((embeds - target).square().mean()))
        return 2 * (embeds - target) / embeds.numel()

    found = []
    for _ in range(inputs["steps"]):
        ids = nearest_tokens(points, vocabulary)
        points = optimizer.step(points, gradient(vocabulary.table[ids]))
        found.append(ids[0].tolist())
    return {
        "projected_ids_per_step": found,
        "loss_per_step": losses,
        "final_continuous": points,
    }


def asr_aggregation(inputs: dict[str, Any]) -> dict[str, Any]:
    plain = {str(run["attack_idx"]): bool(run["success"][-1]) for run in inputs["no_attack_runs"]}
    # The vectors do not say which prompts were left out. No total depends on which of those that
    # did (did not) succeed without an attack are, so the attack's runs take them in order.
    names = {
        start: [name for name, pre in plain.items() if pre == start] for start in (True, False)
    }
    runs = []
    for run in inputs["attack_runs"]:
        shows = run["success"]
        runs.append(Outcome.of(names[shows[0]].pop(0), shows, 60 * run["minutes"]))
    outcomes = joined(plain, runs)
    found = rates(outcomes, len(plain))
    return {
        "pre_asr": found.pre.value,
        "asr": found.asr.value,
        "pre_count": f"{found.pre.hits} / {found.pre.n}",
        "asr_count": f"{found.asr.hits} / {found.asr.n}",
        "normalised_minutes_per_50_entries": minutes_per_images(outcomes, reference=True),
    }


def style_topk_asr(inputs: dict[str, Any]) -> dict[str, Any]:
    runs: Sequence[Sequence[Sequence[str]]] = inputs["ranked_labels_per_run_per_entry"]
    longest = max(len(labels) for run in runs for labels in run)
    found = {}
    for k in range(1, longest + 1):
        outcomes = [
            Outcome.of(str(i), in_top(run, inputs["required"], k)) for i, run in enumerate(runs)
        ]
        total = rates(outcomes, len(runs))
        found[f"top{k}"] = {
            "valid_success": [[int(not one.pre), int(bool(one.hit))] for one in outcomes],
            "pre_successes": total.pre.hits,
            "post_successes": total.new.hits,
            "pre_asr": total.pre.value,
            "asr": total.asr.value,
        }
    return found


def p4d_k_layout(inputs: dict[str, Any]) -> dict[str, Any]:
    n, every = inputs["prompt_tokens"], inputs["every_k"]
    k = adversarial_count("p4d_k", n, 1, every)
    total = n + k
    window = max(WINDOW, total + 3)
    made = layout("p4d_k", n, k, window, every)
    body = made.sources[1 : total + 1]
    own = [source for source in body if source > 0]
    ids = torch.tensor([1, *range(10, 10 + n), 2, *[0] * (window - n - 2)])
    row = adversarial_ids(made, ids, torch.full((k,), 5))
    return {
        "num_learnable": k,
        "total": total,
        "fixed_positions": [i for i, source in enumerate(body) if source > 0],
        "learnable_positions": [place - 1 for place in made.places],
        "fixed_values_follow_prompt": own == list(range(1, n + 1)),
        "pad_id_after_eos": int(row[total + 2]) if int(row[total + 1]) == 2 else None,
    }


def attack_timestep_schedule(inputs: dict[str, Any]) -> dict[str, Any]:
    return {str(count): timesteps(inputs["T"], count) for count in inputs["n_samples"]}


def advunlearn_insertion_and_fast_at(inputs: dict[str, Any]) -> dict[str, Any]:
    n, k = inputs["prompt_words"], inputs["k"]
    ids = torch.arange(100, 100 + WINDOW)
    ours = {"replace_k": "replace"}
    found = {}
    for name in ("prefix_k", "replace_k", "add", "suffix_k", "mid_k", "insert_k", "per_k_words"):
        if name == "add" and k != n:
            continue
        made = layout(ours.get(name, name), n, k, WINDOW, keep_end=False)
        rows, adversarial = numbered(k)
        found[name] = {
            "embed": adversarial_embeds(made, rows, adversarial)[:, 0].tolist(),
            # The published ids of adversarial places are those that dropped out after the prompt.
            "ids": adversarial_ids(made, ids, ids[n + 1 : n + k + 1]).tolist(),
        }
    start = tensor(inputs["start"])
    moved = RowAdam(start, inputs["lr"], sign=True).step(start, tensor(inputs["grad"]))
    return {"by_type": found, "after_sign_step": moved}


ADAPTERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "textgrad_simplex_projection": textgrad_simplex_projection,
    "textgrad_adam_projection_trajectory": textgrad_adam_projection_trajectory,
    "straight_through_select": straight_through_select,
    "adversarial_token_insertion": adversarial_token_insertion,
    "vocabulary_projection": vocabulary_projection,
    "hard_prompt_trajectory": hard_prompt_trajectory,
    "asr_aggregation": asr_aggregation,
    "style_topk_asr": style_topk_asr,
    "p4d_k_layout": p4d_k_layout,
    "attack_timestep_schedule": attack_timestep_schedule,
    "advunlearn_insertion_and_fast_at": advunlearn_insertion_and_fast_at,
}
