"""Find averaged models and optimizers that have copies of an adapter's weights, or rely on the weights' shapes."""

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

import tunerkit
from tunerkit.errors import warn
from tunerkit.plugin import StepError, Tuner, optimizer_of

F = TypeVar("F", str, bool)
# Names of copies of the weights in optimizer states: of ASGD, schedule-free optimizers, Prodigy, D-Adaptation, Ranger,
# timm's Lookahead, and optimizers with full-precision copies.
_COPIES = frozenset(
    {"ax", "z", "p0", "x0", "slow_buffer", "lookahead_params", "lookahead_slow_buff", "master_param", "master_weights"}
)


def copies_in(optimizer: Optimizer | None, weights: Iterable[Tensor]) -> list[str]:
    """Find copies of the weights in an optimizer's state.

    Args:
        optimizer: The optimizer, or None if it no longer exists.
        weights: The weights.

    Returns:
        The sorted names of the state's entries with copies.
    """
    if optimizer is None:
        return []
    kept = (optimizer.state[weight] for weight in weights if weight in optimizer.state)
    return sorted({str(name) for state in kept for name in state if name in _COPIES})


def refuse_split(tuner: Tuner, optimizer: Optimizer | None) -> None:
    """Raise an error if another optimizer trains a λ: it would change a masked λ after the mask was applied.

    Args:
        tuner: The adapter's handle. With a shared engine, optimizers may have other tensors than the model.
        optimizer: The attached optimizer.

    Raises:
        StepError: Another optimizer has a λ that the attached optimizer lacks.
    """
    if optimizer is None:
        return
    held, lams = _held(optimizer), {path: id(own.get_parameter("lam")) for path, own in tuner.adapters().items()}
    left = {path: lam for path, lam in lams.items() if lam not in held}
    if not left:
        return
    names = _found(lambda: _kinds(_alive(Optimizer), lambda other: not _held(other).isdisjoint(left.values())))
    if names:
        raise StepError(
            f"another optimizer ({names}) trains λ of adapter {tuner.name!r} at {next(iter(left))!r}: masks are set "
            "in λ after each step of the attached optimizer, and the other one would change λ again. Put P, λ and Q "
            "of all targets into one optimizer; its parameter groups may have their own learning rates"
        )


def follower(tuner: Tuner, weights: Sequence[nn.Parameter], like: Tensor) -> str | None:
    """Return why the weights must not shrink, or None; process 0 decides for all processes.

    Args:
        tuner: The adapter's handle.
        weights: P, λ and Q of each layer, one after the other.
        like: Any tensor on the device to use for the broadcast.

    Returns:
        The reason, an object that relies on the weights' shapes; None if the weights may shrink.
    """
    found = _found(lambda: _obstacle(tuner, weights))
    if tuner.engine.is_shared:
        decision = like.new_tensor(float(bool(found)))
        tuner.agree_([decision], "what follows the weights")
        found = (found or "an object in process 0 relies on their shapes") if decision else ""
    return found or None


def warn_of_average(tuner: Tuner, final_step: int) -> None:
    """Warn if an `AveragedModel` averages the weights: re-parametrising the triplets makes its average meaningless."""
    if _found(lambda: _is_averaged(tuner, _alive(AveragedModel))):
        warn(
            f"adapter {tuner.name!r}: an AveragedModel averages it, but each allocation re-parametrises P, Λ and Q, so "
            f"the average is meaningless. Set exact_svd=False, or begin to average after step {final_step}, the last "
            "allocation"
        )


def _obstacle(tuner: Tuner, weights: Sequence[nn.Parameter]) -> str:
    found, own = _alive(AveragedModel, Optimizer), optimizer_of(tuner)
    if _is_averaged(tuner, found):
        return "an AveragedModel averages them, and its copy keeps their shapes"
    shrinks = None if own is None else own.state  # a wrapper may share its optimizer's state object
    names = _kinds(found, lambda other: vars(other).get("state") is not shrinks and _keeps(other, weights))
    return names and f"another optimizer ({names}) has state for them; use one optimizer for all weights"


def _is_averaged(tuner: Tuner, found: Iterable[object]) -> bool:
    """Whether an AveragedModel among the objects has an adapter with the same name and config."""
    models = (each.module for each in found if isinstance(each, AveragedModel))
    copies = (tunerkit.adapters(model).get(tuner.name) for model in models)
    return any(copied is not None and copied is not tuner and copied.config == tuner.config for copied in copies)


def _kinds(found: Iterable[object], does: Callable[[Optimizer], bool]) -> str:
    """Return the class names of the optimizers in ``found`` for which ``does`` is true, separated by commas."""
    return ", ".join(sorted({type(each).__name__ for each in found if isinstance(each, Optimizer) and does(each)}))


def _keeps(optimizer: Optimizer, weights: Iterable[Tensor]) -> bool:
    state = vars(optimizer).get("state")
    own = [state[weight] for weight in weights if weight in state] if isinstance(state, Mapping) else []
    kept = [value for each in own for value in (each.values() if isinstance(each, Mapping) else (each,))]
    return any(isinstance(value, Tensor) and value.ndim for value in kept)


def _held(optimizer: Optimizer) -> set[int]:
    """Return the ids of the parameters that an optimizer updates."""
    return {id(parameter) for group in vars(optimizer).get("param_groups", ()) for parameter in group["params"]}


def _found(look: Callable[[], F]) -> F:
    """Return the result of the search ``look``; if it finds something, collect garbage and search again."""
    if found := look():
        gc.collect()
        found = look()
    return found


def _alive(*kinds: type) -> list[object]:
    """Return all living objects of some classes, by a search, since torch has no list of them."""
    return [each for each in gc.get_objects() if issubclass(type(each), kinds)]
