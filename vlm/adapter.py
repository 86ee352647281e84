"""What loss methods may ask of a vision-language model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmforget.errors import ConfigError
from mmforget.rng import Draws
from mmforget.types import Outputs, Splits, full
from mmforget.vlm.chat import IGNORED, Chat, Encoded, Item
from mmforget.vlm.data import Read
from mmforget.vlm.models import VLM, Frozen, Lora

PLACES = ("answer", "question", "image", "text", "all")


class Tokens(NamedTuple):
    """A prepared batch.

    Attributes:
        inputs: What the model reads: ids and mask [B, T], pixels and what belongs to them.
        targets: Answer tokens, end token included, [B, A]; -100 behind the end of each row.
        at: Where among the kept logits the one stands that predicts each target, [B, A].
        keep: Last positions whose logits are computed; 0: all.
        items: What was encoded.
        image_token: Id of image placeholders.
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    at: Tensor
    keep: int
    items: tuple[Item, ...]
    image_token: int

    def predicting(self, logits: Tensor) -> Tensor:
        """Return the logits that predict each target, [B, A, V], of those kept, [B, keep, V]."""
        return logits.gather(1, self.at[:, :, None].expand(-1, -1, logits.shape[-1]))

    def places(self, kind: str) -> Tensor:
        """Return where tokens of a kind stand, bool [B, T].

        Args:
            kind: "answer" (end token included), "image", "question" (all other text: template and
                question), "text" (question and answer), or "all" but padding.
        """
        ids, real = self.inputs["input_ids"], self.inputs["attention_mask"].bool()
        counts = (self.targets != IGNORED).sum(1, keepdim=True)
        ends = real.sum(1, keepdim=True)
        place = torch.arange(ids.shape[1], device=ids.device)
        answer = (place >= ends - counts) & (place < ends)
        image = (ids == self.image_token) & real
        return {
            "answer": answer,
            "image": image,
            "question": real & ~answer & ~image,
            "text": real & ~image,
            "all": real,
        }[kind]


class VLMAdapter:
    """`types.Adapter` for questions about images.

    `pred` holds the logits that predict the answer tokens alone, [B, A, V]: neither prompt, image
    nor padding has a loss, and the vocabulary is not spread over them.

    Args:
        chat: Encodes items.
        refusals: Answers that `relabel` draws from.
        lora: What the scope "lora" means.
        everywhere: Keep the logits of all positions, `pred` [B, T, V]: for published forms that
            average over the prompt, the image and padding.
        leak: Learn the last token of the prompt as well, as FIUBench's label mask does.
    """

    random = False  # an item is the same tokens and pixels every time

    def __init__(
        self,
        chat: Chat,
        refusals: Sequence[str],
        lora: Lora,
        everywhere: bool = False,
        leak: bool = False,
    ) -> None:
        self.chat = chat
        self.refusals = tuple(refusals)
        self.lora = lora
        self.everywhere = everywhere
        self.leak = leak

    def prepare(self, raw: Read, draws: Draws, train: bool) -> Tokens:
        """Pad a batch on the right and put it on the device."""
        return self.tokens(raw.items, raw.encoded, draws.device)

    def tokens(
        self, items: Sequence[Item], rows: Sequence[Encoded], device: torch.device | str
    ) -> Tokens:
        """Return encoded items as a batch."""
        if self.leak:
            rows = [row._replace(start=row.start - 1) for row in rows]
        inputs = self.chat.collate(rows, device)
        answers = [row.ids[row.start :] for row in rows]
        width = max(len(answer) for answer in answers)
        length = inputs["input_ids"].shape[1]
        keep = 0 if self.everywhere else length - min(row.start for row in rows) + 1
        first = length - keep if keep else 0
        targets = torch.full((len(rows), width), IGNORED, dtype=torch.long)
        at = torch.zeros((len(rows), width), dtype=torch.long)
        for k, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            targets[k, : len(answer)] = torch.tensor(answer, dtype=torch.long)
            at[k, : len(answer)] = torch.arange(len(answer)) + (row.start - 1 - first)
        return Tokens(
            inputs,
            targets.to(device),
            at.to(device),
            keep,
            tuple(items),
            self.chat.image_token,
        )

    def units(self, data: Tokens) -> Tensor:
        """Return the number of answer tokens of each item, [B]."""
        return (data.targets != IGNORED).sum(1).float()

    def forward(self, model: nn.Module, data: Tokens) -> Outputs:
        """Return -log p of each answer, [B], and logits of its tokens [B, A, V] with their mask.

        With `everywhere`, `pred` is [B, T, V] and the mask says which positions predict an answer
        token.
        """
        if isinstance(model, Frozen):
            with model.as_was() as before:
                return self.forward(before, data)
        logits = _able(model, data).logits(data.inputs, data.keep)
        picked = data.predicting(logits)
        loss = token_losses(picked, data.targets).sum(1)
        counts = data.targets != IGNORED
        if not self.everywhere:
            return Outputs(loss, picked, counts)
        mask = torch.zeros(logits.shape[:2], dtype=torch.bool, device=logits.device)
        mask[torch.arange(len(mask), device=mask.device)[:, None].expand_as(data.at), data.at] = (
            counts
        )
        return Outputs(loss, logits, mask)

    def divergence(self, student: Outputs, teacher: Outputs, temperature: float = 1.0) -> Tensor:
        """Return KL(teacher || student)·T² over the vocabulary, summed over what counts, [B]."""
        log_p = F.log_softmax(student.pred / temperature, dim=-1)
        log_q = F.log_softmax(teacher.pred / temperature, dim=-1)
        kl = (log_q.exp() * (log_q - log_p)).sum(-1) * temperature**2
        return (kl if student.mask is None else kl * student.mask).sum(1)

    def relabel(self, data: Tokens, draws: Draws, exclude_true: bool = True) -> Tokens:
        """Return the same questions, each answered by a refusal drawn from the list.

        Where a refusal is the true answer itself, the next other one in the list stands for it.

        Raises:
            ConfigError: The benchmark has no refusals.
        """
        if not self.refusals:
            raise ConfigError(
                "this method answers by refusals, and the data name none (prompt.json, key idk)"
            )
        drawn = draws.integers(len(self.refusals)).tolist()
        items = []
        for item, k in zip(data.items, drawn, strict=True):
            order = (*self.refusals[k:], *self.refusals[:k])
            others = (text for text in order if not (exclude_true and text == item.answer))
            items.append(replace(item, answer=next(others, order[0])))
        return self.answered(data, items)

    def answered(self, data: Tokens, items: Sequence[Item]) -> Tokens:
        """Return a batch of other items on the device of this one."""
        return self.tokens(items, [self.chat.encode(item) for item in items], data.targets.device)

    def frozen(self, model: nn.Module, trainable: Mapping[str, nn.Parameter]) -> nn.Module:
        """Return the model as it is now: adapters off, or the trained weights alone kept."""
        return Frozen(_vlm(model), trainable)

    def shards(self, model: nn.Module) -> Sequence[nn.Module] | None:
        """Return the transformers model, which is what is called."""
        if isinstance(model, Frozen):
            return None if model.swaps else ()
        return (_vlm(model).net,)

    def parameters(self, model: nn.Module, scope: str) -> dict[str, nn.Parameter]:
        """Return the parameters of a scope; see `VLM.scope`."""
        return _vlm(model).scope(scope, self.lora)

    def apply_request(self, model: nn.Module, splits: Splits) -> None:
        """Do nothing: such a model holds no data besides its weights."""
        return None

    def hidden(self, model: nn.Module, data: Tokens, layer: int) -> Tensor:
        """Return the output of a decoder layer, [B, T, D]; nothing after it is computed."""
        if isinstance(model, Frozen):
            with model.as_was() as before:
                return self.hidden(before, data, layer)
        return _able(model, data).hidden(data.inputs, layer)

    def record(self, model: nn.Module, data: Tokens) -> dict[str, Tensor]:
        """Return of each answer its loss, its number of tokens, and the share predicted first."""
        found = self.forward(model, data)
        counts = data.targets != IGNORED
        best = answer_logits(found, data).argmax(-1)
        units = self.units(data)
        hits = ((best == data.targets) & counts).sum(1).float() / units
        return {"loss": full(found.loss), "tokens": units, "hit": hits}


def answer_logits(found: Outputs, data: Tokens) -> Tensor:
    """Return the logits that predict each answer token, [B, A, V], whatever `pred` holds."""
    return found.pred if data.keep else data.predicting(found.pred)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return -log p of each target, [B, A]; 0 behind the end of an answer.

    Args:
        logits: [B, A, V].
        targets: [B, A]; -100 behind the end.
    """
    flat = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view(targets.shape)


def _able(model: nn.Module, data: Tokens) -> VLM:
    """Return the model, if it can run a batch.

    Raises:
        ConfigError: Its weights are cut over processes, and an item has no image: without one the
            tower is not called, and processes that call it would wait for ever.
    """
    found = _vlm(model)
    if found.sharded and not bool((data.inputs["input_ids"] == data.image_token).any(1).all()):
        raise ConfigError("runtime.fsdp needs an image in every item: set runtime.fsdp=no")
    return found


def _vlm(model: nn.Module) -> VLM:
    found = getattr(model, "_orig_mod", model)  # under torch.compile
    assert isinstance(found, VLM)
    return found
