"""Call the plugin that owns a method: one `ask` for every hook, and checks of the answers beyond their types.

An answer must have the type that the hook's spec declares, and pass the hook's check in `CHECKS`. It is None if the
plugin does not implement the hook. A plugin's exception keeps its class, since the method's own message explains the
problem best, and a caller may catch torch's out-of-memory error. It gets a note with the plugin, the hook and the
adapter or target. SystemExit and a cancelled task, which would end the program silently, become a `PluginError`.
"""

import inspect
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final, ParamSpec, Protocol, TypeVar

import attrs
from torch import Tensor

from tunerkit.config import AdapterConfig, from_mapping
from tunerkit.errors import AdapterError, shown, warn
from tunerkit.hooks import specs
from tunerkit.hooks.engines import TunerView
from tunerkit.hooks.loading import API, API_NAME, Asking, blame
from tunerkit.hooks.registry import registry
from tunerkit.layers import Adapter, BaseLayer, low_rank_delta, misfit
from tunerkit.paths import few
from tunerkit.records import Delta, Factors, StatisticsRequest, Target, Unfit, conform, in_short

P = ParamSpec("P")
R = TypeVar("R")
Given = Mapping[str, Any]
_DEEPEST: Final = 20  # levels of JSON values
_READS = (
    "reads_output: whether the contribution of forward depends on the values of y; reads_weight: whether forward or "
    "the delta reads the base layer's weight"
)


def ask(hook: Callable[P, R], method: str, place: str = "", /, *args: P.args, **given: P.kwargs) -> R:
    """Call a hook of the plugin that owns a method, and return the checked answer. Pass the hook's arguments by name.

    ``place`` names the subject in messages: by default the tuner's adapter, the target, or the targets. Raises
    `PluginError` if the answer is invalid, the plugin was removed, or the hook tried to end the program.
    """
    catalog = registry.loaded()
    owner = catalog.owner_of(method, hook)
    with Asking(hook.__name__, f"the plugin of method {method!r} ({owner.info.distribution})", place or _place(given)):
        answer: Any = catalog.call(owner, hook, given)
        if hook not in CONVERTED:
            answer = conform(answer, declared(hook))
        if answer is not None and hook in CHECKS:
            answer = CHECKS[hook](answer, {**given, "method": method})
        found: R = answer
        return found


def _place(given: Given) -> str:
    match given:
        case {"tuner": tuner}:
            return f"adapter {tuner.name!r}"
        case {"target": target}:
            return repr(target.path)
    return f"{len(given['targets'])} targets"


def declared(hook: Callable[..., object]) -> Any:
    """Return the type that a hook's spec declares for its answers."""
    return inspect.get_annotations(hook)["return"]


@attrs.frozen(eq=False)
class Caller:
    """A hook of the plugin that owns a method, resolved once for all steps of a training.

    ``function`` is the implementation, and ``takes`` are its arguments' names. ``check`` converts an answer other than
    None, or raises `Unfit`. ``blame`` adds a note with the plugin to an exception from ``function`` or ``check``.
    """

    function: Callable[..., Any]
    takes: Sequence[str]
    check: Callable[[Any], Any]
    blame: Callable[[BaseException], None]


@attrs.frozen(eq=False)
class Callers:
    """The hooks that each step calls for one adapter; None for hooks that its plugin does not implement."""

    before_step: Caller | None
    after_step: Caller | None
    budget: Caller | None


def callers_of(tuner: TunerView) -> Callers:
    """Return the hooks that each step calls for an adapter, resolved once before training."""
    whose = registry.plugin_of(tuner.method)

    def caller(hook: Callable[..., object]) -> Caller | None:
        if (found := registry.implementation(hook, tuner.method)) is None:
            return None
        check, place = CHECKS[hook], f"adapter {tuner.name!r}"
        named = partial(blame, what=hook.__name__, whose=whose, place=place)
        return Caller(found.function, found.argnames, partial(check, given={"tuner": tuner}), named)

    return Callers(
        before_step=caller(specs.tunerkit_before_step),
        after_step=caller(specs.tunerkit_after_step),
        budget=caller(specs.tunerkit_budget),
    )


# --- Questions to the plugin of a method ------------------------------------------------------------------------------


def structure(method: str, mapping: Mapping[str, object]) -> AdapterConfig:
    """Build a method's config from a mapping. Nothing is guessed, so a string is never read as a number.

    Args:
        method: The method's name, in any case.
        mapping: Settings by name, such as parsed YAML or JSON. Missing settings keep their defaults.

    Returns:
        An instance of the method's config class.

    Raises:
        ConfigError: The mapping is invalid; the error lists every problem with its path.
        UnknownMethodError: No installed plugin provides the method.
    """
    config: AdapterConfig = from_mapping(registry.get(registry.named(method)).config, mapping)
    return config


def watches_steps(method: str) -> bool:
    """Whether the method implements a step hook, so that training without the hooks would give another result."""
    return any(registry.implements(hook, method) for hook in (specs.tunerkit_before_step, specs.tunerkit_after_step))


def has_factors(method: str) -> bool:
    """Whether the method can return its ΔW as low-rank factors."""
    return registry.implements(specs.tunerkit_factors, method)


def has_delta(method: str) -> bool:
    """Whether the method can return its ΔW as a dense matrix."""
    return registry.implements(specs.tunerkit_delta, method) or has_factors(method)


def adds_products(method: str) -> bool:
    """Whether the method's adapters add low-rank products and nothing else, so that factors describe them fully."""
    return has_factors(method) and not registry.implements(specs.tunerkit_delta, method)


def statistics(tuner: TunerView) -> StatisticsRequest | None:
    """Return the statistics that the method requests for the adapter's settings; None if it requests none."""
    asked = registry.get(tuner.method).statistics
    if not callable(asked):
        return asked
    with Asking("statistics", registry.plugin_of(tuner.method), f"adapter {tuner.name!r}"):
        found: StatisticsRequest | None = conform(asked(tuner.config), StatisticsRequest | None)
        return found


def budget(tuner: TunerView, step: int | None) -> int | None:
    """Return the budget in force after step ``step``, or now if ``step`` is None; None if the method has no budget."""
    return ask(specs.tunerkit_budget, tuner.method, tuner=tuner, step=step)


def delta(path: str, method: str, adapter: Adapter, base: BaseLayer) -> Delta:
    """Return an adapter's change to its base layer: ``weight`` (out, in) and ``bias`` (out,)."""
    if registry.implements(specs.tunerkit_delta, method):
        return ask(specs.tunerkit_delta, method, repr(path), adapter=adapter, base=base)
    q, p = factors(path, method, adapter, base)
    return Delta(weight=low_rank_delta(base, q=q, p=p, scale=1.0))


def factors(path: str, method: str, adapter: Adapter, base: BaseLayer) -> Factors:
    """Return an adapter's ΔW as low-rank factors."""
    return ask(specs.tunerkit_factors, method, repr(path), adapter=adapter, base=base)


def from_factors(
    method: str, targets: Sequence[Target], products: Mapping[str, Factors]
) -> tuple[AdapterConfig, Mapping[str, Adapter]]:
    """Build a method's config and adapters, by target path, from low-rank ``products`` by target path."""
    paths = [target.path for target in targets]
    if not paths or products.keys() != set(paths):
        raise AdapterError(
            f"expected one product for each of {len(paths)} targets ({few(paths, shown=5)}), got "
            f"{len(products)} ({few([*products], shown=5)})"
        )
    return ask(specs.tunerkit_from_factors, method, targets=targets, factors=products)


# --- The checks -------------------------------------------------------------------------------------------------------


class Check(Protocol):
    """Converts a hook's answer, or raises `Unfit`. ``given`` has the hook's arguments, and the method's name."""

    def __call__(self, answer: Any, given: Given) -> Any: ...


def check_shared(answer: Any, given: Given) -> Any:
    """Return a shared module. Raises `Unfit` if it contains a base layer, which would become a part of the adapter."""
    if not {target.module for target in given["targets"]}.isdisjoint(answer.modules()):
        raise Unfit("a module that holds a base layer", "one with tensors of its own")
    return answer


def check_adapter(answer: Adapter, given: Given) -> Adapter:
    """Raise `Unfit` if an adapter contains the base or shared module, or declares invalid flags or ``rank_dims``."""
    inside, shared = set(answer.modules()), given["shared"]
    if given["target"].module in inside:
        does = "does not store it: forward receives the base layer as an argument"
        raise Unfit("an adapter that holds the base layer as a child", f"one that {does}")
    if shared is not None and not inside.isdisjoint(shared.modules()):
        does = "does not store it: forward finds it as self.shared"
        raise Unfit("an adapter that holds the shared module as a child", f"one that {does}")
    _check_reads(answer, given["method"])
    # With invalid ``rank_dims``, files with other ranks could not be loaded.
    own, kind = {**dict(answer.named_buffers()), **dict(answer.named_parameters())}, f"a {type(answer).__name__} whose"
    for name, dim in answer.rank_dims.items():
        if name not in own:
            raise Unfit(
                f"{kind} rank_dims names {shown(name)}", f"one that names parameters or buffers there: {', '.join(own)}"
            )
        if type(dim) is not int or not -own[name].ndim <= dim < own[name].ndim:
            expected = f"one with a dimension of its shape {tuple(own[name].shape)} there"
            raise Unfit(f"{kind} rank_dims is {shown(dim)} for {name!r}", expected)
    return answer


def _check_reads(answer: Adapter, method: str) -> None:
    """Raise `Unfit` if an adapter's class lacks ``reads_output`` or ``reads_weight``; for API version 1, only warn."""
    flags: dict[str, object] = {"reads_output": answer.reads_output, "reads_weight": answer.reads_weight}
    if all(isinstance(flag, bool) for flag in flags.values()):
        return
    got, catalog = " and ".join(f"{name}={shown(flag)}" for name, flag in flags.items()), registry.loaded()
    old, name = catalog.owners[method].api < 2, type(answer).__name__
    if not (old and all(isinstance(flag, bool | None) for flag in flags.values())):
        raise Unfit(f"a {name} with {got}", f"one whose class declares both, as True or False: {_READS}")
    if (key := (API_NAME, method)) not in catalog.known:
        catalog.known[key] = True
        warn(
            f"{registry.plugin_of(method)} was written for {API_NAME} 1: its class {name} has {got}, and None counts "
            f"as True. Declare both in the class, as True or False, and set {API_NAME} = {API}, which later versions "
            f"will require. {_READS}"
        )


def read_ranks(answer: Any, given: Given) -> dict[str, int]:
    """Return the rank of every target as an int, by path, in the order of the targets."""
    paths = [target.path for target in given["tuner"].targets]
    if not isinstance(answer, Mapping) or answer.keys() != set(paths):
        raise Unfit(shown(answer), "None, or a mapping with one rank for each target path")
    return {path: read_count(answer[path], f" as the rank of {path!r}", "an int >= 0 there") for path in paths}


def read_budget(answer: Any, given: Given) -> int:
    """Return a budget, in the method's unit, as an int."""
    return read_count(answer, "", "an int >= 0, or None")


def read_count(value: Any, where: str, expected: str) -> int:
    """Return a plugin's count as an int; numpy's integers are accepted. Raises `Unfit` if it is not an int >= 0."""
    try:
        count = -1 if isinstance(value, bool) else operator.index(value)
    except Exception:
        count = -1
    if count < 0:
        raise Unfit(f"{shown(value)}{where}", expected)
    return count


def read_parameters(answer: Any, given: Given) -> list[Tensor]:
    """Return an answer, the parameters that a step must not update, as a list. Raises `Unfit` for a bare tensor."""
    expected = "a list of the adapter's parameters, or None"
    if isinstance(answer, Tensor) or not isinstance(answer, Iterable):
        raise Unfit(in_short(answer), expected)
    found = list(answer)
    for each in found:
        if not isinstance(each, Tensor):
            raise Unfit(f"a list with {in_short(each)}", expected)
    return found


def check_groups(answer: Any, given: Given) -> Any:
    """Raise `Unfit` if groups contain a parameter that is not the adapter's, or a parameter twice."""
    own, seen = {id(parameter) for parameter in given["tuner"].parameters()}, set[int]()
    for parameter in (parameter for group in answer for parameter in group.parameters):
        if id(parameter) not in own:
            raise Unfit("a group with a parameter that is not the adapter's", "parameters of tuner.parameters()")
        if id(parameter) in seen:
            raise Unfit("a parameter in two groups, or twice in one", "each parameter in one group only")
        seen.add(id(parameter))
    return answer


def check_delta(answer: Delta, given: Given) -> Delta:
    """Raise `Unfit` for a delta of a wrong type, device or shape; broadcasting could hide a wrong shape."""
    shape = given["base"].shape
    for what, tensor, expected in (("weight", answer.weight, shape), ("bias", answer.bias, shape[:-1])):
        if tensor is not None:
            _check_tensor(tensor, f"a delta {what}", given["adapter"])
            if tensor.shape != expected:
                raise Unfit(f"a delta {what} of shape {tuple(tensor.shape)}", f"one of shape {expected}")
    return answer


def check_factors(answer: Factors, given: Given) -> Factors:
    """Raise `Unfit` for factors of a wrong type, device or shape."""
    _check_tensor(answer.q, "q", given["adapter"])
    _check_tensor(answer.p, "p", given["adapter"])
    if (shapes := misfit(given["base"], answer)) is not None:
        raise Unfit(*shapes)
    return answer


def _check_tensor(tensor: object, what: str, adapter: Adapter) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise Unfit(f"{in_short(tensor)} as {what}", "a tensor of floating-point numbers there")
    devices = [parameter.device for parameter in adapter.parameters()]
    if devices and tensor.device not in devices:
        raise Unfit(f"{what} on device {tensor.device}", f"a tensor on {devices[0]}, where the adapter is")


def check_converted(answer: Any, given: Given) -> Any:
    """Raise `Unfit` for a config of a class other than the method's, or adapters at paths other than the targets'."""
    settings, adapters = answer
    if not isinstance(settings, config := registry.get(given["method"]).config):
        raise Unfit(f"{in_short(settings)} as the config", f"a {config.__name__}")
    if adapters.keys() != given["factors"].keys():
        raise Unfit(f"{shown(adapters)} as the adapters", "a mapping with one adapter for each target path")
    return answer


def check_state(answer: Any, given: Given) -> Any:
    """Raise `Unfit` for values that JSON cannot hold, since files store them as JSON."""
    for name, value in answer.values.items():
        if not is_json(value):
            expected = "one that JSON can hold: text, bools, finite numbers, None, and lists and mappings of these"
            raise Unfit(f"{shown(value)} as the state's value {shown(name)}", expected)
    return answer


def check_restored(answer: Any, given: Given) -> None:
    """Raise `Unfit`: core ignores any answer other than None, so that a returned state would be lost."""
    raise Unfit(in_short(answer), "None; set tuner.state to the restored state")


def is_json(value: object, depth: int = 0) -> bool:
    """Whether JSON can hold a value: text, bools, finite numbers, None, and lists and mappings of these."""
    if value is None or isinstance(value, bool | int | str):
        return True
    if isinstance(value, float):
        return math.isfinite(value)
    if depth > _DEEPEST:
        return False
    if isinstance(value, list | tuple):
        return all(is_json(each, depth + 1) for each in value)
    return isinstance(value, dict) and all(isinstance(k, str) and is_json(v, depth + 1) for k, v in value.items())


# The checks of answers beyond their types.
CHECKS: Final[Mapping[Callable[..., object], Check]] = {
    specs.tunerkit_shared: check_shared,
    specs.tunerkit_build_adapter: check_adapter,
    specs.tunerkit_calibrate: read_ranks,
    specs.tunerkit_param_groups: check_groups,
    specs.tunerkit_before_step: read_parameters,
    specs.tunerkit_after_step: read_ranks,
    specs.tunerkit_finish: read_ranks,
    specs.tunerkit_budget: read_budget,
    specs.tunerkit_delta: check_delta,
    specs.tunerkit_factors: check_factors,
    specs.tunerkit_from_factors: check_converted,
    specs.tunerkit_state: check_state,
    specs.tunerkit_restore: check_restored,
}
# Hooks whose check also accepts types other than the declared one, such as numpy's integers.
CONVERTED: Final = frozenset(
    hook for hook, check in CHECKS.items() if check in (read_ranks, read_budget, read_parameters, check_restored)
)
