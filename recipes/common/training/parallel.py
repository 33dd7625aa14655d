"""How a method is compiled, and replicated (DDP) or sharded (FSDP2) over several devices."""

import contextlib
import copy
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from common.config import Run
from common.training.distributed import Processes

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

M = TypeVar("M", bound=nn.Module)


def trainable(method: M, run: Run, processes: Processes) -> M:
    """Return the module to train: the method itself, or a copy whose parameters are sharded over the devices.

    The method keeps its own parameters, to which `restore` copies the trained ones.
    """
    if run.shard and processes.world_size > 1:
        method = copy.deepcopy(method)
        method.to(processes.device)
        for block in blocks_of(method):
            fully_shard(block)
        return fully_shard(method)  # pyright: ignore
    method.to(processes.device)
    return method


def restore(method: nn.Module, trained: nn.Module, processes: Processes) -> None:
    """Copy the parameters of a sharded copy to the method, on all devices; collective."""
    if trained is not method:
        method.load_state_dict({name: whole(tensor) for name, tensor in trained.state_dict().items()})
        method.to(processes.device).train(trained.training)


def compiled(method: nn.Module, run: Run, processes: Processes, *, static: bool) -> Callable[..., dict[str, Tensor]]:
    """Compile a method as a whole on one device; on several, compile each block, and replicate or shard the method.

    Args:
        method: the module returned by `trainable`.
        run: `compile`, `activation_checkpointing` and `shard` are read.
        processes: the processes that train together.
        static: whether every backward pass synchronizes the gradients.
    """
    wanted = run.compile == "on" or (run.compile == "auto" and processes.device.type == "cuda")
    if wanted:
        torch.compiler.reset()  # free the compile cache of the previous stage
        torch._dynamo.config.optimize_ddp = False  # else DDP cuts each compiled block into graphs at its buckets
    alone = processes.world_size == 1
    for block in blocks_of(method):
        if wanted and not alone:  # `forward` alone is compiled, so the hooks of FSDP stay outside the graph
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
        if run.activation_checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    if alone:
        return torch.compile(method, fullgraph=True, dynamic=False) if wanted else method
    if isinstance(method, FSDPModule):
        return method
    return DistributedDataParallel(method, gradient_as_bucket_view=True, static_graph=static, broadcast_buffers=False)


def synchronized(model: Callable[..., Any], last: bool) -> contextlib.AbstractContextManager[None]:
    """Return a context in which a backward pass synchronizes gradients only if it is the last one of the step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    elif isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


def blocks_of(method: nn.Module) -> list[nn.Module]:
    """Return the modules that are compiled, recomputed and sharded each on its own."""
    return [part for part in method.modules() if getattr(part, "compile_alone", False)]


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor gathered from all devices if it is sharded; collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this device holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
