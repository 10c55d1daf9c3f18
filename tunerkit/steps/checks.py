"""Checks before attaching: find the torch optimizer, and check its parameters and the total number of steps."""

import operator
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol, SupportsIndex, runtime_checkable

from torch.optim import Optimizer

from tunerkit import hooks, injection
from tunerkit.errors import StepError, TunerkitWarning
from tunerkit.injection import Tuner
from tunerkit.paths import few
from tunerkit.steps.links import is_attached

_BUILD_IT = "build it from (p for p in model.parameters() if p.requires_grad) after tunerkit.wrap"


@runtime_checkable
class _Stepping(Protocol):
    """Anything that steps, such as an optimizer of another library."""

    def step(self) -> object: ...


def find_optimizer(candidate: object, tuners: Sequence[Tuner]) -> Optimizer | None:
    """Return the torch optimizer inside wrappers such as accelerate's, which store it as ``.optimizer``.

    If a method of ``tuners`` needs steps, a wrapper that keeps its own state is rejected. Lookahead or weight averaging
    would restore pruned weights, in their old shapes. So is an optimizer that takes no hooks. If none needs steps, the
    result is None for such an optimizer: its steps cannot be counted, which a warning says.
    """
    needing = [tuner.name for tuner in tuners if tuner.needs_steps]
    while isinstance(inner := getattr(candidate, "optimizer", None), Optimizer):
        if needing and getattr(candidate, "state", inner.state) is not inner.state:
            wrapper, wrapped = type(candidate).__name__, type(inner).__name__
            raise StepError(
                f"{wrapper} keeps its own state in addition to that of {wrapped}, and may restore weights that adapter "
                f"{needing[0]!r} pruned; train it with {wrapped} alone, or use a method that needs no steps"
            )
        candidate = inner
    if isinstance(candidate, Optimizer) and _takes_hooks(candidate):
        return candidate
    if isinstance(candidate, type) or not isinstance(candidate, _Stepping):
        raise StepError(
            f"attach takes a torch optimizer, or a trainer that an installed plugin knows, got "
            f"{type(candidate).__name__}; {hooks.unserved(candidate) or 'pass the optimizer that steps the adapter'}"
        )
    if needing:
        raise StepError(
            f"{type(candidate).__name__} does not support hooks: it does not call torch.optim.Optimizer.__init__. "
            "If it wraps an optimizer that does, attach that one; otherwise attach another optimizer"
        )
    warnings.warn(
        f"{type(candidate).__name__} does not support hooks, so steps are not counted; nothing else is lost, because "
        "no method here needs them",
        TunerkitWarning,
        stacklevel=4,
    )
    return None


def _takes_hooks(optimizer: Optimizer) -> bool:
    try:
        optimizer.register_state_dict_post_hook(lambda *_: None).remove()
    except AttributeError:
        return False
    return True


def check_attachable(tuner: Tuner, optimizer: Optimizer | None) -> None:
    """Reject a second attachment, and an adapter that this optimizer, if it is known, cannot train."""
    if is_attached(tuner):
        others = [name for name, other in injection.wrapped_of(tuner.model).tuners.items() if not is_attached(other)]
        which = f", or pass adapter={others[0]!r} to attach another" if others else ""
        raise StepError(
            f"adapter {tuner.name!r} is attached already: one optimizer drives it. To go on with another one, first "
            "delete the earlier one and what holds it, such as its scheduler; or call "
            f"tunerkit.delete(model, {tuner.name!r}) and wrap again for a new run{which}"
        )
    if injection.is_frozen(tuner):
        raise StepError(
            f"adapter {tuner.name!r} is frozen; tunerkit.thaw(model, {tuner.name!r}) resumes training it, and "
            "tunerkit.load(..., trainable=True) loads an adapter for training"
        )
    if any(p.is_meta for p in tuner.parameters()):
        raise StepError(
            f"adapter {tuner.name!r} is on the meta device and cannot be trained: accelerate offloads it with the "
            "model. Offload first, then wrap: the adapter then stays on the device where the model runs"
        )
    injection.refuse_fixed(tuner.model, "attaching")
    injection.refuse_lost([tuner])
    if optimizer is not None:
        _check_held(tuner, optimizer)


def _check_held(tuner: Tuner, optimizer: Optimizer) -> None:
    """Reject an optimizer that holds no parameter of the adapter; warn about one that holds only some of them.

    For a method that needs steps, heads that are trained in full do not count: its allocations depend on how the
    adapters themselves are trained.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = {path: {n: p for n, p in slot.named_parameters() if p.requires_grad} for path, slot in tuner.slots()}
    adapters = tuner.adapters() if tuner.needs_steps else trained
    counted = [own for path, own in trained.items() if own and path in adapters]
    if counted and not any(id(p) in held for own in counted for p in own.values()):
        raise StepError(
            f"the optimizer holds none of the parameters of adapter {tuner.name!r} at its {len(counted)} places; "
            f"{_BUILD_IT}, or pass adapter=... to name the adapter that it trains"
        )
    missing: dict[str, list[str]] = defaultdict(list)  # the places by what is missing there
    for path, own in trained.items():
        if names := ", ".join(name for name, p in own.items() if id(p) not in held):
            missing[names].append(path)
    if missing:
        listed = "; ".join(f"{names} at {few(paths, shown=5)}" for names, paths in missing.items())
        warnings.warn(
            f"the optimizer does not hold all parameters that adapter {tuner.name!r} trains. Unless another optimizer "
            f"trains them, these do not change: {listed}; {_BUILD_IT}",
            TunerkitWarning,
            stacklevel=5,
        )


def agree_on_total(tuner: Tuner, total_steps: int | None) -> int | None:
    """Return the total steps of the call or the config. They must agree; a method that needs steps requires one."""
    configured = tuner.config.total_steps
    total = configured if total_steps is None else total_steps
    if configured is not None and total != configured:
        raise StepError(
            f"adapter {tuner.name!r}: the config says total_steps={configured}, training has {total_steps}; "
            "make them equal or leave the config's out"
        )
    if total is None and tuner.needs_steps:
        raise StepError(
            f"method {tuner.method!r} needs the length of training: pass total_steps=... to tunerkit.attach, "
            "or set total_steps in the config"
        )
    return None if total is None else _as_count(total)


def _as_count(total: SupportsIndex) -> int:
    """Convert ``total`` to an int; numpy's integers are accepted too."""
    try:
        count = 0 if isinstance(total, bool) else operator.index(total)
    except TypeError:
        count = 0
    if count < 1:
        raise StepError(f"total_steps: expected a number of optimizer steps >= 1, got {total!r}")
    return count
