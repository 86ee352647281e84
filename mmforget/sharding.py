"""Weights, gradients and optimiser state cut over processes while a loss method trains (FSDP2).

Sharding lives within one optimisation. The module tree is copied without its weights, torch's
`fully_shard` cuts those of the copy, and the model's own are empty meanwhile; at the end they are
filled again. So set-up, evaluation, attacks and saving see whole, plain models.

Gradients are summed, not averaged, over processes: losses are divided by global counts already.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from mmforget.context import Context
from mmforget.engine import Engine
from mmforget.errors import ConfigError
from mmforget.methods.base import LossMethod


def check_sharding(ctx: Context, method: LossMethod[Any]) -> None:
    """Check that a method's optimisation can be cut over processes, if the runtime asks for it.

    Raises:
        ConfigError: The method works on whole weights, or the modality cannot cut its models.
    """
    fsdp = ctx.engine.runtime.fsdp
    if fsdp == "no":
        return
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise ConfigError(
            f"runtime.fsdp={fsdp} needs a newer PyTorch than {torch.__version__}: one whose "
            f"fully_shard adds up gradients that some processes lack"
        )
    why = None
    if method.whole:
        why = f"{ctx.label} works on whole weights or gradients itself"
    elif ctx.adapter.shards(ctx.model) is None:
        why = f"{type(ctx.model).__name__} is not run by calls of its modules alone"
    if why:
        raise ConfigError(f"runtime.fsdp={fsdp}, but {why}: set runtime.fsdp=no")


@contextmanager
def sharded(ctx: Context) -> "Iterator[Calls | None]":
    """Cut the model of a context, and the references it made, for the block; or do nothing.

    Within it `ctx.model` and `ctx.trainable` are the cut ones. After an error the models are left
    empty: to fill them takes all processes. Gives what hears which weights are called.

    Raises:
        ConfigError: What is trained is no part of the model.
    """
    if ctx.engine.runtime.fsdp == "no":
        yield None
        return
    plain = [ctx.model, *ctx.references]
    # fully_shard takes contiguous weights alone, and channels-last ones are not.
    layout = {id(weight): weight.stride() for module in plain for weight in module.parameters()}
    for weight in chain.from_iterable(module.parameters() for module in plain):
        weight.data = weight.data.contiguous()
    tensors = chain.from_iterable(chain(m.parameters(), m.buffers()) for m in plain)
    cut = copy.deepcopy(plain, {id(tensor): tensor for tensor in tensors})
    for module in cut:
        for root in ctx.adapter.shards(module) or ():
            _shard(root, ctx.engine)
    pairs = {
        id(whole): (whole, part)
        for one, other in zip(plain, cut, strict=True)
        for whole, part in zip(one.parameters(), other.parameters(), strict=True)
    }
    names = [name for name, weight in ctx.trainable.items() if id(weight) not in pairs]
    if names or any(not isinstance(part, DTensor) for _, part in pairs.values()):
        raise ConfigError(
            f"runtime.fsdp={ctx.engine.runtime.fsdp}, but weights lie outside of what is cut "
            f"({', '.join(names[:3]) or type(ctx.model).__name__}): set runtime.fsdp=no"
        )
    trainable = dict(ctx.trainable)
    for whole, _ in pairs.values():
        whole.data = whole.data.new_empty(0)
    stand_ins = {id(one): other for one, other in zip(plain[1:], cut[1:], strict=True)}
    ctx.use(cut[0], {name: pairs[id(w)][1] for name, w in trainable.items()}, stand_ins)
    yield Calls(cut[0])
    for whole, part in pairs.values():
        assert isinstance(part, DTensor)
        full = part.full_tensor().detach()
        whole.data = torch.empty_strided(
            full.shape, layout[id(whole)], dtype=full.dtype, device=full.device
        ).copy_(full)
        whole.grad = None
    ctx.use(plain[0], trainable, {})


class Calls:
    """Hears which trainable weights a step calls: processes may call different ones (experts).

    FSDP gives all of them a gradient then, zeros where there is none. Weights that no process
    called must be left without, or weight decay and momentum would move them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._called: set[nn.Parameter] = set()
        for module in model.modules():
            own = [p for p in module.parameters(recurse=False) if p.requires_grad]
            if own:
                module.register_forward_pre_hook(partial(self._hear, own))

    def _hear(self, weights: Sequence[nn.Parameter], module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():
            self._called.update(weights)

    def take(self, weights: Sequence[nn.Parameter]) -> list[bool]:
        """Return which weights this process called since the last time.

        A gradient that is not zero counts too, as weights can be read without a call.
        """
        found = [weight in self._called or _slopes(weight) for weight in weights]
        self._called.clear()
        return found


def _slopes(weight: nn.Parameter) -> bool:
    grad = weight.grad
    local = grad.to_local() if isinstance(grad, DTensor) else grad
    return local is not None and bool(local.any())


def gathered(state: Any, keep: bool) -> Any:
    """Return nested values with every cut tensor whole, in the CPU's memory.

    One after the other, so that no device ever holds more than one of them. All processes must
    call it, each for the same state.

    Args:
        state: Values.
        keep: Whether this process wants them; where it does not, they are None.
    """

    def whole(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        full = value.full_tensor()
        return full.cpu() if keep else None

    return tree_map(whole, state)


def like(value: Tensor, weight: Tensor) -> Tensor:
    """Return a whole value [as the weight] in the memory layout of a weight, cut as it is."""
    if isinstance(weight, DTensor):
        whole = value.to(weight.device)
        return distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)
    return torch.empty_like(weight, dtype=value.dtype).copy_(value)


def blocks(root: nn.Module) -> list[nn.Module]:
    """Return the modules that are cut one by one: what the outermost lists of a model hold.

    These are its repeated layers. Lists within them (experts) are not cut apart: what is cut by
    itself is gathered when it is called, and processes may call different ones.
    """
    found: list[nn.Module] = []
    for child in root.children():
        if isinstance(child, nn.ModuleList):
            found += [each for each in child if any(True for _ in each.parameters())]
        else:
            found += blocks(child)
    return found


def _shard(root: nn.Module, engine: Engine) -> None:
    # Mixed precision stays autocast's, so that numbers are those of whole weights.
    options: Mapping[str, Any] = {
        "mesh": init_device_mesh(engine.device.type, (engine.world,)),
        "reshard_after_forward": engine.runtime.fsdp == "full",
    }
    for block in blocks(root):
        fully_shard(block, **options)
    fully_shard(root, **options)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            module.set_reduce_scatter_unused_params(True)  # see `Calls`
