"""Check what a plugin returned from a hook: one function for each kind of answer, and one form of message."""

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NoReturn

import attrs
from torch import Tensor, nn

from tunerkit.config import AdapterConfig
from tunerkit.errors import PluginError, shown
from tunerkit.hooks.registry import registry
from tunerkit.hooks.tuner_view import TunerView
from tunerkit.layers import Adapter, BaseLayer, misfit
from tunerkit.records import Delta, Factors, ParamGroup, State, Target

_DEEPEST = 20  # levels of JSON values


@attrs.frozen
class Question:
    """What a method's plugin is asked: by which hook, for which adapter (its tuner), target (its path) or targets."""

    hook: Callable[..., object]
    method: str
    subject: TunerView | str | Sequence[Target]

    @property
    def hook_of_plugin(self) -> str:
        """The hook and the plugin, for a message."""
        return f"{self.hook.__name__} of {registry.plugin_of(self.method)}"

    @property
    def place(self) -> str:
        """The adapter or the target, for a message."""
        match self.subject:
            case str():
                return repr(self.subject)
            case Sequence():
                return f"{len(self.subject)} targets"
        return f"adapter {self.subject.name!r}"

    def refuse(self, returned: str, expected: str) -> NoReturn:
        """Raise the `PluginError` about an answer that is not as expected."""
        raise PluginError(f"{self.hook_of_plugin} returned {returned} for {self.place}; it must return {expected}")


def shared(asked: Question, answer: object, targets: Sequence[Target]) -> nn.Module | None:
    """Check the answer to `tunerkit_shared`: a module of its own, or None."""
    if answer is None:
        return None
    if not isinstance(answer, nn.Module):
        asked.refuse(_kind(answer), "a torch.nn.Module, or None")
    held = set(answer.modules())
    if any(target.module in held for target in targets):
        asked.refuse("a module that holds a base layer", "one with tensors of its own")
    return answer


def adapter(asked: Question, answer: object, target: Target, shared: nn.Module | None = None) -> Adapter:
    """Check the answer to `tunerkit_build_adapter`: an adapter that does not hold the base layer."""
    if not isinstance(answer, Adapter):
        asked.refuse(_kind(answer), "a tunerkit.Adapter")
    if target.module in answer.modules():
        asked.refuse(
            "an adapter that holds the base layer as a child",
            "one that does not store it: forward receives the base layer as an argument",
        )
    declared: tuple[object, ...] = (answer.reads_output, answer.reads_weight)
    if not all(isinstance(value, bool | None) for value in declared):
        asked.refuse(
            f"a {type(answer).__name__} with reads_output={shown(declared[0])} and reads_weight={shown(declared[1])}",
            "one with True, False or None there",
        )
    _check_rank_dims(asked, answer)
    if shared is not None and not set(answer.modules()).isdisjoint(shared.modules()):
        asked.refuse(
            "an adapter that holds the shared module as a child",
            "one that does not store it: forward finds it as self.shared",
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
    """Check a rank for every target, in any order: what allocations and `tunerkit_calibrate` answer."""
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


def delta(asked: Question, answer: object, adapter: Adapter, base: BaseLayer) -> Delta:
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
        devices = [parameter.device for parameter in adapter.parameters()]
        if devices and tensor.device not in devices:
            asked.refuse(f"a delta {what} on device {tensor.device}", f"one on {devices[0]}, where the adapter is")
    return answer


def factors(asked: Question, answer: object, adapter: Adapter, base: BaseLayer) -> Factors:
    """Check the answer to `tunerkit_factors`: two matrices of one rank, with the base layer's features."""
    if not isinstance(answer, Factors):
        asked.refuse(_kind(answer), "tunerkit.Factors")
    parts: tuple[tuple[str, object], ...] = (("q", answer.q), ("p", answer.p))
    for what, tensor in parts:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            asked.refuse(f"{_kind(tensor)} as {what}", "a tensor of floating-point numbers")
        devices = [parameter.device for parameter in adapter.parameters()]
        if devices and tensor.device not in devices:
            asked.refuse(f"{what} on device {tensor.device}", f"it on {devices[0]}, where the adapter is")
    if (shapes := misfit(base, answer)) is not None:
        asked.refuse(*shapes)
    return answer


def built_from_factors(
    asked: Question, answer: object, targets: Sequence[Target], config: type
) -> tuple[AdapterConfig, Mapping[str, Adapter]]:
    """Check the answer to `tunerkit_from_factors`: a config of the method, and one adapter for each target."""
    expected = f"a pair of a {config.__name__} and a mapping with one adapter for each target path"
    if not isinstance(answer, tuple) or len(answer) != 2:
        asked.refuse(_kind(answer), expected)
    settings, adapters = answer
    if not isinstance(settings, AdapterConfig) or not isinstance(settings, config):
        asked.refuse(f"{_kind(settings)} as the config", expected)
    if not isinstance(adapters, Mapping) or adapters.keys() != {target.path for target in targets}:
        asked.refuse(f"{shown(adapters)} as the adapters", expected)
    for path, found in adapters.items():
        if not isinstance(found, Adapter):
            asked.refuse(f"{_kind(found)} at {path!r}", expected)
    return settings, adapters


def param_groups(asked: Question, answer: object, tuner: TunerView) -> list[ParamGroup]:
    """Check the answer to `tunerkit_param_groups`: groups of the adapter's own parameters, each in one of them."""
    if answer is None:
        return []
    if not isinstance(answer, Iterable) or isinstance(answer, Tensor):
        asked.refuse(_kind(answer), "a list of tunerkit.ParamGroup")
    own, seen, groups = {id(parameter) for parameter in tuner.parameters()}, set[int](), list(answer)
    for group in groups:
        if not isinstance(group, ParamGroup):
            asked.refuse(f"a list with {_kind(group)}", "a list of tunerkit.ParamGroup")
        scale, decay = group.lr_scale, group.weight_decay
        if not _is_at_least_0(scale) or not (decay is None or _is_at_least_0(decay)):
            asked.refuse(
                f"a group with lr_scale={shown(scale)} and weight_decay={shown(decay)}", "finite numbers >= 0 there"
            )
        for parameter in group.parameters:
            if id(parameter) not in own:
                asked.refuse("a group with a parameter that is not the adapter's", "parameters of tuner.parameters()")
            if id(parameter) in seen:
                asked.refuse("a parameter in two groups, or twice in one", "each in one group")
            seen.add(id(parameter))
    return groups


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


def _check_rank_dims(asked: Question, answer: Adapter) -> None:
    """Refuse ranks that no tensor of the adapter has: files with other ranks could not be loaded."""
    own = {**dict(answer.named_buffers()), **dict(answer.named_parameters())}
    for name, dim in answer.rank_dims.items():
        if name not in own:
            asked.refuse(
                f"a {type(answer).__name__} whose rank_dims names {shown(name)}",
                f"one that names parameters or buffers there: {', '.join(own)}",
            )
        if type(dim) is not int or not -own[name].ndim <= dim < own[name].ndim:
            asked.refuse(
                f"a {type(answer).__name__} whose rank_dims is {shown(dim)} for {name!r}",
                f"one with a dimension of its shape {tuple(own[name].shape)} there",
            )


def _kind(answer: object) -> str:
    if answer is None:
        return "None"
    name = type(answer).__name__
    return f"an {name}" if name[:1] in "aeiouAEIOU" else f"a {name}"


def _is_at_least_0(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


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


def is_pair(what: str, answer: object, *, has: str) -> bool:
    """Whether an answer is no None, which says that a plugin has nothing to do with the question.

    Args:
        what: What the pair is, for the error.
        answer: What a plugin returned.
        has: An attribute of the first of the pair, by which it is recognised.

    Raises:
        PluginError: It is something else than a pair.
    """
    if not (isinstance(answer, tuple) and len(answer) == 2 and hasattr(answer[0], has)):
        raise PluginError(f"a plugin returned {shown(answer)}; expected {what}, or None")
    return True
