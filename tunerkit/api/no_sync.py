"""Put off the averaging of gradients over processes, where gradients are accumulated."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from tunerkit import injection


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Inside the block, backwards add up gradients in each process; the next backward after it averages them.

    This saves an all-reduce for each batch that is accumulated, as ``DistributedDataParallel.no_sync`` does. It is
    never needed: without it, the result is the same. DDP, FSDP2 with sharded adapters, DeepSpeed and accelerate have
    ways of their own to say that, which work too. If no backward comes after the block, the step averages, which is too
    late for clipping.

    Args:
        model: The wrapped model, with its adapters attached.

    Raises:
        AdapterError: The model has no adapter.
    """
    with ExitStack() as stack:
        for tuner in injection.require_tuners(model).values():
            stack.enter_context(tuner.engine.no_sync())
        yield
