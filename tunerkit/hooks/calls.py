"""Ask the plugin that owns a method: one typed function for each hook, which also checks the answer.

If the plugin does not implement the hook, they return None or an empty value. An exception of a plugin keeps its class,
because a method's own message explains best what is wrong, and a caller may catch torch's out-of-memory error. It gets
a note with the plugin, the hook and the adapter or target. What would end the program without a word (SystemExit, a
cancelled task) becomes a `PluginError`.
"""

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, NoReturn

import attrs
from torch import Tensor, nn
from torch.optim import Optimizer

from tunerkit.config import AdapterConfig, from_mapping
from tunerkit.errors import AdapterError, ConfigError, PluginError, error_text, is_of_user, shown
from tunerkit.hooks import specs
from tunerkit.hooks.registry import registry
from tunerkit.hooks.tuner_view import TunerView
from tunerkit.layers import Adapter, BaseLayer, low_rank_delta, misfit
from tunerkit.paths import few
from tunerkit.records import Delta, Factors, ParamGroup, State, Statistics, Target

_DEEPEST = 20  # levels of JSON values


@attrs.frozen
class Question:
    """What a method's plugin is asked: by which hook, for which adapter (its tuner), target (its path) or targets.

    A context manager around the call and the check of its answer, so that what either raises names the plugin.
    """

    hook: Callable[..., object]
    method: str
    subject: TunerView | str | Sequence[Target]

    # Any: the arguments are those of the hook's spec, which pluggy passes by name.
    def ask(self, **arguments: Any) -> Any:
        """Call the plugin that owns the method; None if it does not implement the hook."""
        return registry.call(self.hook, self.method, **arguments)

    def refuse(self, returned: str, expected: str) -> NoReturn:
        """Raise the `PluginError` about an answer that is not as expected."""
        raise PluginError(f"{self._asked} returned {returned} for {self._place}; it must return {expected}")

    def blame(self, error: BaseException) -> None:
        """Name the plugin in what it raised. Raises `PluginError` instead of what would end the program."""
        if isinstance(error, PluginError) or is_of_user(error):  # the first names the plugin already
            return
        if not isinstance(error, Exception):
            raise PluginError(f"{self._asked} raised {error_text(error)} for {self._place}") from error
        error.add_note(f"raised by {self._asked}, for {self._place}")

    @property
    def _asked(self) -> str:
        return f"{self.hook.__name__} of {registry.plugin_of(self.method)}"

    @property
    def _place(self) -> str:
        match self.subject:
            case str():
                return repr(self.subject)
            case Sequence():
                return f"{len(self.subject)} targets"
        return f"adapter {self.subject.name!r}"

    def __enter__(self) -> "Question":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self.blame(error)


@attrs.frozen(eq=False)
class Caller:
    """A hook of the plugin that owns a method, looked up once.

    Attributes:
        question: What is asked, for messages.
        function: The plugin's function.
        takes: Which of the hook's arguments it takes, in its order.
        check: Checks an answer other than None.
    """

    question: Question
    function: Callable[..., Any]
    takes: Sequence[str]
    check: Callable[[Question, Any], Any]


@attrs.frozen(eq=False)
class Callers:
    """What a step calls for one adapter, see `callers_of`; None for hooks that its plugin does not implement.

    ``watchers`` holds the implementations of `tunerkit_ranks_changed` of all plugins, as they are at any time.
    """

    before_step: Caller | None
    after_step: Caller | None
    budget: Caller | None
    watchers: Any


def callers_of(tuner: TunerView) -> Callers:
    """Look up what a step calls for an adapter, so that no step looks anything up."""

    def caller(hook: Callable[..., object], check: Callable[[Question, Any], Any]) -> Caller | None:
        found = registry.implementation(hook, tuner.method)
        return (
            None
            if found is None
            else Caller(Question(hook, tuner.method, tuner), found.function, found.argnames, check)
        )

    return Callers(
        before_step=caller(specs.tunerkit_before_step, _checked_parameters),
        after_step=caller(specs.tunerkit_after_step, partial(_checked_ranks, targets=tuner.targets)),
        budget=caller(specs.tunerkit_budget, _checked_budget),
        watchers=registry.watchers(specs.tunerkit_ranks_changed),
    )


def structure(method: str, mapping: Mapping[str, object]) -> AdapterConfig:
    """Build a method's config from a mapping. Nothing is guessed, so a string is never read as a number.

    Args:
        method: The method's name.
        mapping: Settings by name, such as parsed YAML or JSON. Missing settings keep their defaults.

    Returns:
        An instance of the method's config class.

    Raises:
        ConfigError: The mapping is invalid; the error lists every problem with its path.
        UnknownMethodError: No installed plugin provides the method.
    """
    config: AdapterConfig = from_mapping(registry.get(method).config, mapping)
    return config


def configure(method: str, config: object) -> AdapterConfig:
    """Convert what the user passed as config (an object, a mapping or None) to the method's config class."""
    if config is None or isinstance(config, Mapping):
        return structure(method, config or {})
    expected = registry.get(method).config
    if isinstance(config, AdapterConfig) and isinstance(config, expected):
        return config
    takes, got = f"method {method!r} takes {expected.__name__}, a mapping or None", type(config)
    # Another library may have a class of the same name.
    which = f" of {got.__module__}, not of {expected.__module__}" if got.__name__ == expected.__name__ else ""
    raise ConfigError([f"{takes}, got {got.__name__}{which} @ $"])


def has_shared(method: str) -> bool:
    """Whether the method's adapters may share a module."""
    return registry.implements(specs.tunerkit_shared, method)


def changes_gradients(method: str) -> bool:
    """Whether the method acts before a step, when the gradients are complete."""
    return registry.implements(specs.tunerkit_before_step, method)


def watches_steps(method: str) -> bool:
    """Whether the method acts in each step, so that a step without its hooks is another training."""
    return registry.implements(specs.tunerkit_after_step, method) or changes_gradients(method)


def has_factors(method: str) -> bool:
    """Whether the method can return what it adds as a product."""
    return registry.implements(specs.tunerkit_factors, method)


def has_delta(method: str) -> bool:
    """Whether the method can return what it adds as a dense matrix."""
    return registry.implements(specs.tunerkit_delta, method) or has_factors(method)


def adds_products(method: str) -> bool:
    """Whether the method's adapters add products and nothing else, so that the factors say all."""
    return has_factors(method) and not registry.implements(specs.tunerkit_delta, method)


def takes_factors(method: str) -> bool:
    """Whether the method can build adapters from products."""
    return registry.implements(specs.tunerkit_from_factors, method)


def shared(
    method: str, targets: Sequence[Target], bases: Sequence[BaseLayer], config: AdapterConfig
) -> nn.Module | None:
    """Build what all adapters of the method use, in a module of its own; None for nothing."""
    with Question(specs.tunerkit_shared, method, targets) as question:
        answer = question.ask(targets=targets, bases=bases, config=config)
        if answer is None:
            return None
        if not isinstance(answer, nn.Module):
            question.refuse(_kind(answer), "a torch.nn.Module, or None")
        held = set(answer.modules())
        if any(target.module in held for target in targets):
            question.refuse("a module that holds a base layer", "one with tensors of its own")
        return answer


def build_adapter(
    method: str, target: Target, base: BaseLayer, config: AdapterConfig, shared: nn.Module | None = None
) -> Adapter:
    """Build one adapter with the method's plugin. Raises `PluginError` if the result is not an adapter."""
    with Question(specs.tunerkit_build_adapter, method, target.path) as question:
        answer = question.ask(target=target, base=base, config=config, shared=shared)
        if not isinstance(answer, Adapter):
            question.refuse(_kind(answer), "a tunerkit.Adapter")
        if target.module in answer.modules():
            question.refuse(
                "an adapter that holds the base layer as a child",
                "one that does not store it: forward receives the base layer as an argument",
            )
        declared: tuple[object, ...] = (answer.reads_output, answer.reads_weight)
        if not all(isinstance(value, bool | None) for value in declared):
            reads = f"reads_output={shown(declared[0])} and reads_weight={shown(declared[1])}"
            question.refuse(f"a {type(answer).__name__} with {reads}", "one with True, False or None there")
        _check_rank_dims(question, answer)
        if shared is not None and not set(answer.modules()).isdisjoint(shared.modules()):
            question.refuse(
                "an adapter that holds the shared module as a child",
                "one that does not store it: forward finds it as self.shared",
            )
        return answer


def _check_rank_dims(question: Question, answer: Adapter) -> None:
    """Refuse ranks that no tensor of the adapter has: files with other ranks could not be loaded."""
    own = {**dict(answer.named_buffers()), **dict(answer.named_parameters())}
    for name, dim in answer.rank_dims.items():
        if name not in own:
            question.refuse(
                f"a {type(answer).__name__} whose rank_dims names {shown(name)}",
                f"one that names parameters or buffers there: {', '.join(own)}",
            )
        if type(dim) is not int or not -own[name].ndim <= dim < own[name].ndim:
            question.refuse(
                f"a {type(answer).__name__} whose rank_dims is {shown(dim)} for {name!r}",
                f"one with a dimension of its shape {tuple(own[name].shape)} there",
            )


def calibrate(tuner: TunerView, statistics: Mapping[str, Statistics]) -> Mapping[str, int] | None:
    """Let the method set its start. Returns the ranks by target path if they changed."""
    return _ranks(specs.tunerkit_calibrate, tuner, statistics=statistics)


def finish(tuner: TunerView) -> Mapping[str, int] | None:
    """Let the method make its final allocation. Returns the ranks by target path if it did."""
    return _ranks(specs.tunerkit_finish, tuner)


def _ranks(hook: Callable[..., object], tuner: TunerView, **arguments: object) -> dict[str, int] | None:
    """Ask for a rank for every target; None if the method changed none."""
    with Question(hook, tuner.method, tuner) as question:
        answer = question.ask(tuner=tuner, **arguments)
        return None if answer is None else _checked_ranks(question, answer, targets=tuner.targets)


def _checked_ranks(question: Question, answer: Any, targets: Sequence[Target]) -> dict[str, int]:
    """One rank for each target, which may come in any order."""
    paths = [target.path for target in targets]
    if not isinstance(answer, Mapping) or answer.keys() != set(paths):
        question.refuse(shown(answer), "None, or a mapping with one rank for each target path")
    ranks = {}
    for path in paths:
        if (rank := _count(answer[path])) is None:
            question.refuse(f"{shown(answer[path])} as the rank of {path!r}", "an int >= 0 there")
        ranks[path] = rank
    return ranks


def param_groups(tuner: TunerView) -> list[ParamGroup]:
    """Return the parameters that the method wants to train with settings of their own, each in one group."""
    with Question(specs.tunerkit_param_groups, tuner.method, tuner) as question:
        answer = question.ask(tuner=tuner)
        if answer is None:
            return []
        if not isinstance(answer, Iterable) or isinstance(answer, Tensor):
            question.refuse(_kind(answer), "a list of tunerkit.ParamGroup")
        own, seen, groups = {id(parameter) for parameter in tuner.parameters()}, set[int](), list(answer)
        for group in groups:
            if not isinstance(group, ParamGroup):
                question.refuse(f"a list with {_kind(group)}", "a list of tunerkit.ParamGroup")
            scale, decay = group.lr_scale, group.weight_decay
            if not _is_at_least_0(scale) or not (decay is None or _is_at_least_0(decay)):
                settings = f"lr_scale={shown(scale)} and weight_decay={shown(decay)}"
                question.refuse(f"a group with {settings}", "finite numbers >= 0 there")
            for parameter in group.parameters:
                if id(parameter) not in own:
                    whose = "a group with a parameter that is not the adapter's"
                    question.refuse(whose, "parameters of tuner.parameters()")
                if id(parameter) in seen:
                    question.refuse("a parameter in two groups, or twice in one", "each in one group")
                seen.add(id(parameter))
        return groups


def start(tuner: TunerView, total_steps: int | None, optimizer: Optimizer | None) -> object | None:
    """Return the method's initial training state, which is the method's own."""
    # The spec says which methods may get None, which means that the length is unknown.
    with Question(specs.tunerkit_start, tuner.method, tuner) as question:
        answer: object = question.ask(tuner=tuner, total_steps=total_steps, optimizer=optimizer)
        return answer


def _checked_parameters(question: Question, answer: Any) -> list[Tensor]:
    """The parameters that a step must not move. Iterating over a single tensor would yield its rows."""
    expected = "a list of the adapter's parameters, or None"
    if isinstance(answer, Tensor) or not isinstance(answer, Iterable):
        question.refuse(_kind(answer), expected)
    found = list(answer)
    for each in found:
        if not isinstance(each, Tensor):
            question.refuse(f"a list with {_kind(each)}", expected)
    return found


def budget(tuner: TunerView, step: int | None) -> int | None:
    """Return the budget in force after ``step`` optimizer steps (None: now). None: it is the sum of the live ranks."""
    with Question(specs.tunerkit_budget, tuner.method, tuner) as question:
        answer = question.ask(tuner=tuner, step=step)
        return None if answer is None else _checked_budget(question, answer)


def _checked_budget(question: Question, answer: Any) -> int:
    if (found := _count(answer)) is None:
        question.refuse(shown(answer), "an int >= 0, or None")
    return found


def delta(path: str, method: str, adapter: Adapter, base: BaseLayer) -> Delta:
    """Return what an adapter adds to its base layer: ``weight`` (out, in) and ``bias`` (out,).

    Raises `PluginError` for a wrong type, shape or device: broadcasting could hide a wrong shape.
    """
    if not registry.implements(specs.tunerkit_delta, method):
        product = factors(path, method, adapter, base)
        return Delta(weight=low_rank_delta(base, q=product.q, p=product.p, scale=1.0))
    with Question(specs.tunerkit_delta, method, path) as question:
        answer = question.ask(adapter=adapter, base=base)
        if not isinstance(answer, Delta):
            question.refuse(_kind(answer), "a tunerkit.Delta")
        features = (base.out_features, base.in_features)
        parts: tuple[tuple[str, object, tuple[int, ...]], ...] = (
            ("weight", answer.weight, features),
            ("bias", answer.bias, features[:1]),
        )
        for what, tensor, shape in parts:
            if tensor is None:
                continue
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                question.refuse(f"{_kind(tensor)} as the delta's {what}", "a tensor of floating-point numbers, or None")
            if (got := tuple(tensor.shape)) != shape:
                question.refuse(f"a delta {what} of shape {got}", f"one of shape {shape}")
            _check_device(question, tensor, f"a delta {what}", adapter, "one")
        return answer


def factors(path: str, method: str, adapter: Adapter, base: BaseLayer) -> Factors:
    """Return what an adapter adds to its base layer's weight as a product. Raises `PluginError` if it is wrong."""
    with Question(specs.tunerkit_factors, method, path) as question:
        answer = question.ask(adapter=adapter, base=base)
        if not isinstance(answer, Factors):
            question.refuse(_kind(answer), "tunerkit.Factors")
        parts: tuple[tuple[str, object], ...] = (("q", answer.q), ("p", answer.p))
        for what, tensor in parts:
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                question.refuse(f"{_kind(tensor)} as {what}", "a tensor of floating-point numbers")
            _check_device(question, tensor, what, adapter, "it")
        if (shapes := misfit(base, answer)) is not None:
            question.refuse(*shapes)
        return answer


def _check_device(question: Question, tensor: Tensor, what: str, adapter: Adapter, pronoun: str) -> None:
    devices = [parameter.device for parameter in adapter.parameters()]
    if devices and tensor.device not in devices:
        question.refuse(f"{what} on device {tensor.device}", f"{pronoun} on {devices[0]}, where the adapter is")


def from_factors(
    method: str, targets: Sequence[Target], bases: Sequence[BaseLayer], products: Mapping[str, Factors]
) -> tuple[AdapterConfig, Mapping[str, Adapter]]:
    """Build a config and adapters, by target path, that add the given products.

    Args:
        method: The method's name.
        targets: The targets.
        bases: Their base layers, in the same order.
        products: The product for each target, by its path.

    Raises:
        AdapterError: There is no target, or a product is missing, has another shape, or is not finite.
    """
    _refuse_unfit(targets, bases, products)
    config = registry.get(method).config
    expected = f"a pair of a {config.__name__} and a mapping with one adapter for each target path"
    with Question(specs.tunerkit_from_factors, method, targets) as question:
        answer = question.ask(targets=targets, factors=products)
        if not isinstance(answer, tuple) or len(answer) != 2:
            question.refuse(_kind(answer), expected)
        settings, adapters = answer
        if not isinstance(settings, AdapterConfig) or not isinstance(settings, config):
            question.refuse(f"{_kind(settings)} as the config", expected)
        if not isinstance(adapters, Mapping) or adapters.keys() != {target.path for target in targets}:
            question.refuse(f"{shown(adapters)} as the adapters", expected)
        for path, found in adapters.items():
            if not isinstance(found, Adapter):
                question.refuse(f"{_kind(found)} at {path!r}", expected)
        return settings, adapters


def _refuse_unfit(targets: Sequence[Target], bases: Sequence[BaseLayer], products: Mapping[str, Factors]) -> None:
    paths = [target.path for target in targets]
    if not paths or products.keys() != set(paths):
        raise AdapterError(
            f"expected one product for each of {len(paths)} targets ({few(paths, shown=5)}), got "
            f"{len(products)} ({few([*products], shown=5)})"
        )
    for path, base in zip(paths, bases, strict=True):
        if (shapes := misfit(base, products[path])) is not None:
            found, needed = shapes
            raise AdapterError(f"the product for {path!r} has {found}; expected {needed}")
        if not all(bool(factor.isfinite().all()) for factor in products[path]):
            raise AdapterError(f"the product for {path!r} contains NaN or inf")


def state(tuner: TunerView) -> State:
    """Return what training needs to resume, in addition to the adapter's weights."""
    with Question(specs.tunerkit_state, tuner.method, tuner) as question:
        answer = question.ask(tuner=tuner)
        if answer is None:
            return State(tensors={}, values={})
        if not isinstance(answer, State):
            question.refuse(_kind(answer), "a tunerkit.State")
        parts: tuple[tuple[str, object], ...] = (("tensors", answer.tensors), ("values", answer.values))
        for what, entries in parts:
            if not isinstance(entries, Mapping) or not all(isinstance(name, str) for name in entries):
                question.refuse(f"{shown(entries)} as the state's {what}", "a mapping with names as keys")
        for name, tensor in answer.tensors.items():
            if not isinstance(tensor, Tensor):
                question.refuse(f"{_kind(tensor)} as the state's tensor {shown(name)}", "a tensor there")
        for name, value in answer.values.items():
            if not is_json(value):
                question.refuse(
                    f"{shown(value)} as the state's value {shown(name)}",
                    "one that JSON can hold: text, bools, finite numbers, None, and lists and mappings of these",
                )
        return answer


def restore(tuner: TunerView, saved: State) -> None:
    """Restore what `state` returned."""
    with Question(specs.tunerkit_restore, tuner.method, tuner) as question:
        if (answer := question.ask(tuner=tuner, state=saved)) is not None:
            question.refuse(_kind(answer), "None; set tuner.state to what was restored")


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
