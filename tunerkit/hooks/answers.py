"""Check what a plugin returned from a hook: one function for each kind of answer, and one form of message."""

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import NoReturn

import attrs
from torch import Tensor

from tunerkit.errors import PluginError, shown
from tunerkit.hooks.registry import registry
from tunerkit.hooks.tuner_view import TunerView
from tunerkit.layers import Adapter, BaseLayer
from tunerkit.records import Delta, State, Target

_DEEPEST = 20  # levels of JSON values


@attrs.frozen
class Question:
    """What a method's plugin is asked: by which hook, and for which adapter (its tuner) or target (its path)."""

    hook: Callable[..., object]
    method: str
    subject: TunerView | str

    @property
    def hook_of_plugin(self) -> str:
        """The hook and the plugin, for a message."""
        return f"{self.hook.__name__} of {registry.plugin_of(self.method)}"

    @property
    def place(self) -> str:
        """The adapter or the target, for a message."""
        return repr(self.subject) if isinstance(self.subject, str) else f"adapter {self.subject.name!r}"

    def refuse(self, returned: str, expected: str) -> NoReturn:
        """Raise the `PluginError` about an answer that is not as expected."""
        raise PluginError(f"{self.hook_of_plugin} returned {returned} for {self.place}; it must return {expected}")


def adapter(asked: Question, answer: object, target: Target) -> Adapter:
    """Check the answer to `tunerkit_build_adapter`: an adapter that does not hold the base layer."""
    if not isinstance(answer, Adapter):
        asked.refuse(_kind(answer), "a tunerkit.Adapter")
    if target.module in answer.modules():
        asked.refuse(
            "an adapter that holds the base layer as a child",
            "one that does not store it: forward receives the base layer as an argument",
        )
    return answer


def anything(asked: Question, answer: object) -> object:
    """Accept the answer to `tunerkit_start`: the training state is the method's own."""
    return answer


def parameters(asked: Question, answer: object) -> list[Tensor]:
    """Check the answer to `tunerkit_before_step`. A single tensor is rejected: iterating over it yields its rows."""
    expected = "a list of the adapter's parameters, or None"
    if answer is None:
        return []
    if isinstance(answer, Tensor) or not isinstance(answer, Iterable):
        asked.refuse(_kind(answer), expected)
    found = list(answer)
    for each in found:
        if not isinstance(each, Tensor):
            asked.refuse(f"a list with {_kind(each)}", expected)
    return found


def ranks(asked: Question, answer: object, targets: Iterable[Target]) -> dict[str, int] | None:
    """Check the answer to `tunerkit_after_step` or `tunerkit_finish`: a rank for every target, in any order."""
    if answer is None:
        return None
    paths = [target.path for target in targets]
    if not isinstance(answer, Mapping) or answer.keys() != set(paths):
        asked.refuse(shown(answer), "None, or a mapping with one rank for each target path")
    found = {path: _count(answer[path]) for path in paths}
    wrong = next((path for path, rank in found.items() if rank is None), None)
    if wrong is not None:
        asked.refuse(f"{shown(answer[wrong])} as the rank of {wrong!r}", "an int >= 0 there")
    return {path: rank for path, rank in found.items() if rank is not None}


def budget(asked: Question, answer: object) -> int | None:
    """Check the answer to `tunerkit_budget`."""
    found = None if answer is None else _count(answer)
    if answer is not None and found is None:
        asked.refuse(shown(answer), "an int >= 0, or None")
    return found


def delta(asked: Question, answer: object, base: BaseLayer) -> Delta:
    """Check the answer to `tunerkit_delta`. A wrong shape is rejected, because broadcasting could hide it."""
    if not isinstance(answer, Delta):
        asked.refuse(_kind(answer), "a tunerkit.Delta")
    features = (base.out_features, base.in_features)
    parts: tuple[tuple[str, object, tuple[int, ...]], ...] = (
        ("weight", answer.weight, features),
        ("bias", answer.bias, features[:1]),
    )
    for what, tensor, shape in parts:
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            asked.refuse(f"{_kind(tensor)} as the delta's {what}", "a tensor of floating-point numbers, or None")
        if (got := tuple(tensor.shape)) != shape:
            asked.refuse(f"a delta {what} of shape {got}", f"one of shape {shape}")
    return answer


def state(asked: Question, answer: object) -> State:
    """Check the answer to `tunerkit_state`; None means that there is nothing to save."""
    if answer is None:
        return State(tensors={}, values={})
    if not isinstance(answer, State):
        asked.refuse(_kind(answer), "a tunerkit.State")
    parts: tuple[tuple[str, object], ...] = (("tensors", answer.tensors), ("values", answer.values))
    for what, entries in parts:
        if not isinstance(entries, Mapping) or not all(isinstance(name, str) for name in entries):
            asked.refuse(f"{shown(entries)} as the state's {what}", "a mapping with names as keys")
    for name, tensor in answer.tensors.items():
        if not isinstance(tensor, Tensor):
            asked.refuse(f"{_kind(tensor)} as the state's tensor {shown(name)}", "a tensor there")
    for name, value in answer.values.items():
        if not _is_json(value):
            asked.refuse(
                f"{shown(value)} as the state's value {shown(name)}", "one that JSON can hold: text, bools, finite "
                "numbers, None, and lists and mappings of these"
            )  # fmt: skip
    return answer


def nothing(asked: Question, answer: object) -> None:
    """Check the answer to `tunerkit_restore`, which sets ``tuner.state`` instead of returning it."""
    if answer is not None:
        asked.refuse(_kind(answer), "None; set tuner.state to what was restored")


def _kind(answer: object) -> str:
    if answer is None:
        return "None"
    name = type(answer).__name__
    return f"an {name}" if name[:1] in "aeiouAEIOU" else f"a {name}"


def _count(value: object) -> int | None:
    """Convert to an int; numpy's integers are accepted too. None if it is not a count."""
    try:
        count = -1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except Exception:
        return None
    return count if count >= 0 else None


def _is_json(value: object, depth: int = 0) -> bool:
    if value is None or isinstance(value, bool | int | str):
        return True
    if isinstance(value, float):
        return math.isfinite(value)
    if depth > _DEEPEST:
        return False
    if isinstance(value, list | tuple):
        return all(_is_json(each, depth + 1) for each in value)
    return isinstance(value, dict) and all(isinstance(k, str) and _is_json(v, depth + 1) for k, v in value.items())
