"""What is checked and told before an adapter is written: that something was trained, and that it is finite."""

import warnings
from collections.abc import Mapping

from torch import Tensor

from tunerkit import hooks, injection
from tunerkit.errors import AdapterError, TunerkitWarning
from tunerkit.injection import Tuner
from tunerkit.libraries import is_sharded
from tunerkit.paths import few, join
from tunerkit.serialization.base_check import base_values
from tunerkit.serialization.finite import nonfinite


def refuse_untrained(tuner: Tuner) -> None:
    """Raise `AdapterError` if the method needs steps, and the adapter neither saw one nor came from a file."""
    if tuner.needs_steps and _is_fresh(tuner):
        raise AdapterError(
            f"adapter {tuner.name!r} was trained with no step: method {tuner.method!r} needs to see each step of the "
            "optimizer. Call tunerkit.attach(model, optimizer, total_steps=...) before training"
        )


def refuse_shards(tuner: Tuner) -> None:
    """Raise `AdapterError` if this process holds shards of the adapter, and nothing here can gather them."""
    shards = [name for name, parameter in tuner.named_parameters() if is_sharded(parameter)]
    if shards and not tuner.engine.splits:
        raise AdapterError(
            f"each process holds a shard of adapter {tuner.name!r} ({few(shards, shown=2)}), and only an attached one "
            "is gathered: call tunerkit.attach after sharding, in every process, and save in every process"
        )


def refuse_diverged(tuner: Tuner, tensors: Mapping[str, Tensor]) -> None:
    """Raise `AdapterError` if the adapter's tensors contain NaN or inf where the base's own do not."""
    if wrong := nonfinite(tensors, base_values(tuner)):
        raise AdapterError(
            f"adapter {tuner.name!r} has NaN or inf in {len(wrong)} of {len(tensors)} tensors: {few(wrong, shown=5)}. "
            "Nothing was written, and an older file is unchanged. The training has diverged: lower the learning rate, "
            "check the loss, and start again from a file saved earlier. To write the weights all the same and examine "
            "them, call tunerkit.save(..., allow_nonfinite=True)"
        )


def warn_of_unspent_schedule(tuner: Tuner) -> None:
    """Warn if the ranks are above their final budget: expected in a checkpoint, but not after training."""
    if tuner.steps == 0 or tuner.total_steps is None:
        return
    final = hooks.budget(tuner, tuner.total_steps)
    if final is not None and tuner.budget() > final:
        warnings.warn(
            f"adapter {tuner.name!r} is at step {tuner.steps} of {tuner.total_steps} with a budget of "
            f"{tuner.budget()}, above the final {final}; if training is over, call tuner.finish() before you save",
            TunerkitWarning,
            stacklevel=3,
        )


def warn_of_untrained(tuner: Tuner) -> None:
    """Warn of what nothing trained. A method that needs steps cannot miss them, and `attach` looks at what it holds."""
    if tuner.loaded or tuner.needs_steps or (tuner.steps == 0 and not _is_fresh(tuner)):
        return
    if injection.is_untrained(tuner, copies=False):
        warnings.warn(_of_matrices(tuner), TunerkitWarning, stacklevel=3)
    elif tuner.steps == 0 and (kept := injection.untrained_copies(tuner)):
        warnings.warn(
            f"adapter {tuner.name!r} was saved, and what it trains in full is as it was: {few(kept, shown=3)}. A new "
            f"head is random then. Most often the optimizer was built without it: {_REBUILD}",
            TunerkitWarning,
            stacklevel=3,
        )


_REBUILD = (
    "wrap first, then build the optimizer from the parameters with requires_grad. tunerkit.attach(model, optimizer) "
    "finds this before training"
)


def _of_matrices(tuner: Tuner) -> str:
    if tuner.steps == 0 and injection.is_untrained(tuner):
        return (
            f"adapter {tuner.name!r} was saved untrained: it adds nothing to the model. Most often the optimizer was "
            f"built before tunerkit.wrap, or from other parameters: {_REBUILD}"
        )
    after = f" after {tuner.steps} steps" if tuner.steps else ""
    return (
        f"adapter {tuner.name!r} was saved{after}, and none of its matrices is trained: they add nothing to the model. "
        "Check that the optimizer holds them, that they were not frozen by hand (requires_grad), that gradients are "
        "cleared after the step and not before it, and that the learning rate is not 0"
    )


def _is_fresh(tuner: Tuner) -> bool:
    """Whether nothing made the adapter what it is but its method: no file, no step, no data."""
    return not tuner.loaded and tuner.steps == 0 and tuner.progress.calibration is None


def tensors_of(tuner: Tuner) -> dict[str, Tensor]:
    """Return all tensors of an adapter, by ``<path of the module>.<name in the slot>``."""
    tensors = {join(path, name): tensor for path, slot in tuner.slots() for name, tensor in slot.state_dict().items()}
    away = [name for name, tensor in tensors.items() if tensor.is_meta]
    if away:
        raise AdapterError(
            f"adapter {tuner.name!r} is on the meta device ({away[0]}, ...), so there is nothing to save: if "
            "accelerate offloads it, call accelerate.hooks.remove_hook_from_submodules(model) first"
        )
    return tensors
