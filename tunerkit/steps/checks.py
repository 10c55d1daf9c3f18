"""Checks before attaching: what steps, what it holds, how long training is, and which processes take part in it."""

import functools
import hashlib
import json
import operator
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, SupportsIndex, runtime_checkable

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer

from tunerkit import hooks, injection
from tunerkit.config import unstructure
from tunerkit.errors import StepError, shown, warn
from tunerkit.extras import ENGINES, distribution, install
from tunerkit.hooks import Engine, Held
from tunerkit.injection import Tuner, modules_in, slots_in
from tunerkit.paths import few
from tunerkit.steps.attachment import is_attached

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
    needing = [tuner.name for tuner in tuners if injection.needs_steps(tuner)]
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
    warn(
        f"{type(candidate).__name__} does not support hooks, so steps are not counted; nothing else is lost, because "
        "no method here needs them"
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
    trained = {path: {n: p for n, p in slot.named_parameters() if p.requires_grad} for path, slot in slots_in(tuner)}
    adapters = tuner.adapters() if injection.needs_steps(tuner) else trained
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
        warn(
            f"the optimizer does not hold all parameters that adapter {tuner.name!r} trains. Unless another optimizer "
            f"trains them, these do not change: {listed}; {_BUILD_IT}"
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
    if total is None and injection.needs_steps(tuner):
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


def engine_for(
    tuners: Sequence[Tuner], model: nn.Module, candidate: object, data_parallel: bool | None
) -> tuple[Engine | None, object]:
    """Find out what the processes do together, and what takes the step hooks.

    Args:
        tuners: The adapters that are trained.
        model: The model that runs, which may be around the wrapped one.
        candidate: The optimizer, or what a library has instead.
        data_parallel: What `tunerkit.attach` was given.

    Returns:
        The engine, or None if no plugin has one and this process is alone; and ``candidate``, or the optimizer that
        stands for it.

    Raises:
        StepError: There is a process group, and no plugin that keeps its adapters alike.
    """
    if data_parallel not in (None, False, True):
        raise StepError(f"data_parallel: expected True, False or None, got {shown(data_parallel)}")
    found = hooks.first(
        hooks.specs.tunerkit_engine, tuners=tuners, model=model, candidate=candidate, data_parallel=data_parallel
    )
    if found is not None:
        return found
    # A process group of one process counts too, since there may be DDP around it; or a launcher says so.
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    is_one_of_several = grouped or os.environ.get("WORLD_SIZE", "1") not in ("", "1")
    if data_parallel or (data_parallel is None and is_one_of_several):
        raise StepError(
            "this process is one of a group, or has to be, and no installed plugin keeps the adapters of a group "
            f"alike, so each process would train its own in silence: {hooks.registry.absence(distribution(ENGINES))} "
            f"({install(ENGINES)}). If they are meant to be apart, attach with data_parallel=False"
        )
    return None, candidate


def refuse_own_losses(optimizer: Optimizer | None, engine: Engine | None) -> None:
    """Reject an optimizer that decides by the loss, which each process has of its own part of the data."""
    if engine is not None and engine.is_shared and isinstance(optimizer, LBFGS):
        raise StepError(
            "LBFGS chooses its steps by the loss, and each process has another one: they would drift apart. Use "
            "another optimizer, or one process"
        )


def held_of(tuner: Tuner, total_steps: int | None, optimizer: Optimizer | None) -> Held:
    """Describe an adapter that is about to be trained for ``total_steps`` by ``optimizer``, as engines compare it."""
    is_exact = hooks.registry.get(tuner.method).start == "exact"
    describe = functools.partial(_described, tuner, total_steps, optimizer, is_exact)
    return Held(tuner.name, tuner.model, dict(slots_in(tuner)), describe, starts_alike=is_exact)


def _described(
    tuner: Tuner, total_steps: int | None, optimizer: Optimizer | None, starts_at_0: bool
) -> Mapping[str, str]:
    """What an adapter's training must have in common in all processes.

    The seed is compared only as it was given. Without one, processes start differently, and take process 0's start.
    """
    groups = [] if optimizer is None else optimizer.param_groups
    numbers = [
        {name: float(value) for name, value in each.items() if isinstance(value, int | float)} for each in groups
    ]
    described = {
        "method": tuner.method,
        **{f"setting {name}": repr(value) for name, value in unstructure(tuner.config).items()},
        "seed": str(tuner.progress.seed),
        "start": "a file" if tuner.progress.loaded else "its own",
        "length of training": str(total_steps),
        "optimizer": f"{type(optimizer).__name__} {numbers}",
        "steps so far": str(tuner.steps),
        "adapted modules": _digest(list(modules_in(tuner))),
        "shapes": _digest([[name, [*p.shape], str(p.dtype)] for name, p in tuner.named_parameters()]),
        "base": _digest(tuner.progress.noted),
    }
    if tuner.progress.loaded or not starts_at_0:
        described["weights"] = _sums(tuner.parameters())
    return described


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


@torch.no_grad()
def _sums(parameters: Iterable[nn.Parameter]) -> str:
    """Two sums over all values, which differ if the values do; FSDP2's and ZeRO-3's shards differ in any case."""
    plain = [p for p in parameters if type(p.data) is torch.Tensor and p.numel()]
    sums = [torch.stack([p.double().sum(), p.double().square().sum()]).cpu() for p in plain]
    return _digest([[round(float(each), 9) for each in pair] for pair in sums])
