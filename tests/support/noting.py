"""A toy plugin that writes down each call of its step hooks."""

import attrs
from torch import Tensor

import tunerkit
from tunerkit.plugin import AdapterConfig, Method, Tuner, setting
from tunerkit_testing.toy_methods import Shifting


@attrs.frozen
class NotingConfig(AdapterConfig):
    """What a test may ask of the plugin."""

    total_steps: int | None = setting(None, doc="Length of training.")
    refuses: bool = setting(False, doc="Whether starting is refused.")
    ranks_every: int | None = setting(None, ge=1, doc="Steps between two reports of changed ranks.")


@attrs.frozen(eq=False)
class Call:
    """One call of the hook ``"before"`` or ``"after"``, with copies of the parameters and gradients of that moment."""

    hook: str
    step: int
    weights: tuple[Tensor, ...]
    grads: tuple[Tensor | None, ...]
    grad_scale: float | None


class NotingPlugin(Shifting):
    """``noting``, and ``noting-stepper``, which needs steps: both add a `Shift` and keep a list of `Call`."""

    @tunerkit.hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [
            Method("noting", config=NotingConfig),
            Method("noting-stepper", config=NotingConfig, needs_steps=True),
        ]

    @tunerkit.hookimpl
    def tunerkit_start(self, tuner: Tuner) -> list[Call]:
        if _config(tuner).refuses:
            raise tunerkit.errors.ConfigError(["no room @ $.refuses"])
        return []

    @tunerkit.hookimpl
    def tunerkit_before_step(self, tuner: Tuner, step: int, grad_scale: Tensor | None) -> None:
        _note(tuner, "before", step, None if grad_scale is None else float(grad_scale))

    @tunerkit.hookimpl
    def tunerkit_after_step(self, tuner: Tuner, step: int) -> dict[str, int] | None:
        _note(tuner, "after", step, None)
        every = _config(tuner).ranks_every
        return dict.fromkeys(tuner.adapters(), step) if every is not None and step % every == 0 else None


def calls_of(tuner: Tuner) -> list[Call]:
    """The calls that an attached adapter has written down, in order."""
    assert isinstance(tuner.state, list)
    return tuner.state


def hooks_of(tuner: Tuner) -> list[tuple[str, int]]:
    """The hook and the step of each call."""
    return [(call.hook, call.step) for call in calls_of(tuner)]


def per_step(count: int) -> list[tuple[str, int]]:
    """What `hooks_of` returns if both hooks were called once in each of the first ``count`` steps."""
    return [(hook, step) for step in range(1, count + 1) for hook in ("before", "after")]


def _config(tuner: Tuner) -> NotingConfig:
    assert isinstance(tuner.config, NotingConfig)
    return tuner.config


def _note(tuner: Tuner, hook: str, step: int, grad_scale: float | None) -> None:
    own = list(tuner.parameters())
    weights = tuple(p.detach().clone() for p in own)
    grads = tuple(None if p.grad is None else p.grad.clone() for p in own)
    calls_of(tuner).append(Call(hook, step, weights, grads, grad_scale))
