"""Checks for targets and weights that AdaLoRA cannot train."""

import sys
from collections.abc import Sequence
from typing import NoReturn

from torch import nn

from tunerkit.plugin import AdapterError, StepError, TargetError, Tuner
from tunerkit_adalora.config import AdaLoraConfig
from tunerkit_adalora.svd_layer import SvdLayer


def refuse_sharded(tuner: Tuner, weights: Sequence[nn.Parameter]) -> None:
    """Reject weights that became DTensors after attaching, so that the engine does not know them.

    Args:
        tuner: The adapter's handle.
        weights: P, λ and Q of each layer, one after the other.

    Raises:
        StepError: Some weights are DTensors, and the engine returns no shards of them.
    """
    # If the module was not imported, no DTensor exists. The import is slow.
    sharding = sys.modules.get("torch.distributed.tensor")
    if sharding is None:
        return
    # For speed in each step, check the few types, not the many weights.
    kinds: set[type[nn.Parameter]] = set(map(type, weights))
    if any(issubclass(kind, sharding.DTensor) for kind in kinds) and not tuner.pieces(weights[:3]).are_cut:
        raise StepError(
            f"the weights of adapter {tuner.name!r} became DTensors after it was attached: call tunerkit.attach after "
            "fully_shard, in every process"
        )


def refuse_for_stack(config: AdaLoraConfig) -> None:
    """Reject settings that stacks of matrices do not support.

    Args:
        config: The adapter's settings.

    Raises:
        TargetError: The start needs statistics, or the orthogonality regularizer is on.
    """
    if config.request() is not None:
        raise TargetError(
            f"start {config.start!r} needs statistics of each matrix, which tunerkit.calibrate does not measure for a "
            "stack of experts; set start to 'lora'"
        )
    if config.gamma > 0:
        raise TargetError(
            f"gamma {config.gamma} would also change experts that got no tokens; set gamma to 0, and exact_svd to True "
            "for orthonormal P and Q"
        )


def refuse_sharded_stacks(tuner: Tuner, layers: Sequence[SvdLayer]) -> None:
    """Reject stacks of matrices whose weights are sharded.

    Args:
        tuner: The adapter's handle.
        layers: The adapter's layers, in the order of the targets.

    Raises:
        StepError: There is a stack.
    """
    stacks = [target.path for target, layer in zip(tuner.targets, layers, strict=True) if layer.mask.ndim > 1]
    if stacks:
        raise StepError(
            f"the weights of adapter {tuner.name!r} are sharded, and AdaLoRA cannot yet train shards of stacks of "
            f"experts, such as at {stacks[0]!r}: train with DDP, leave out the experts with exclude, or use method "
            "'lora' for them"
        )


def refuse_other_ranks(adapter: str) -> None:
    """Raise an error for layers that were resized after attaching, for example by ``load_state_dict``.

    Args:
        adapter: The adapter's name, for the message.

    Raises:
        StepError: Always.
    """
    raise StepError(
        f"adapter {adapter!r} has other ranks than when it was attached (load_state_dict of a checkpoint?), so the "
        "optimizer's state does not fit; load the optimizer's state too, then tunerkit.load_state"
    )


def refuse_revived(adapter: str, live: int, in_force: int, step: int) -> NoReturn:
    """Raise an error: the masks keep more triplets than the last allocation, so they are from another step.

    Args:
        adapter: The adapter's name, for the message.
        live: The budget that the masks keep, in the config's unit.
        in_force: The budget of the last allocation.
        step: The last step.

    Raises:
        AdapterError: Always.
    """
    raise AdapterError(
        f"the masks of adapter {adapter!r} keep {live}, but its last allocation set a budget of {in_force}: "
        "weights of another step were loaded into it (load_state_dict). Load the training state of that step too "
        f"(the optimizer's state_dict, or tunerkit.load_state), or the weights of step {step} again. To keep the "
        "best weights of a training, tunerkit.save them at their step"
    )
