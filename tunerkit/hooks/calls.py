"""Ask the plugin that owns a method: one typed function for each hook, which also checks the answer.

An answer must be of the type that the hook's spec declares; what a type cannot say, these functions check. If the
plugin does not implement the hook, they return None or an empty value. An exception of a plugin keeps its class,
because a method's own message explains best what is wrong, and a caller may catch torch's out-of-memory error. It gets
a note with the plugin, the hook and the adapter or target. What would end the program without a word (SystemExit, a
cancelled task) becomes a `PluginError`.
"""

import inspect
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, NoReturn

import attrs
from torch import Tensor, nn
from torch.optim import Optimizer

from tunerkit.config import AdapterConfig, from_mapping
from tunerkit.errors import AdapterError, PluginError, error_text, is_of_user, shown, warn
from tunerkit.hooks import specs
from tunerkit.hooks.engines import TunerView
from tunerkit.hooks.loading import API, API_NAME
from tunerkit.hooks.registry import registry
from tunerkit.layers import Adapter, BaseLayer, low_rank_delta, misfit
from tunerkit.paths import few
from tunerkit.records import (
    Delta,
    Factors,
    ParamGroup,
    State,
    Statistics,
    StatisticsRequest,
    Target,
    mistyped,
    type_name,
)

_DEEPEST = 20  # levels of JSON values
_READS = (
    "reads_output says whether forward uses the values of y for more than adding to it, reads_weight whether forward "
    "or the delta reads the base layer's weight"
)


@attrs.frozen
class Question:
    """What a method's plugin is asked: by which hook, for which adapter (its tuner), target (its path) or targets.

    A context manager around the call and the check of its answer, so that what either raises names the plugin.
    """

    hook: Callable[..., object]
    method: str
    subject: TunerView | str | Sequence[Target]

    # Any: the arguments are those of the hook's spec, which are passed by name.
    def ask(self, **arguments: Any) -> Any:
        """Call the plugin that owns the method; None if it does not implement the hook."""
        return registry.call(self.hook, self.method, **arguments)

    def checked(self, **arguments: Any) -> Any:
        """Ask, and refuse an answer that is not of the type that the hook's spec declares. A generator is read."""
        answer = self.ask(**arguments)
        answer = tuple(answer) if isinstance(answer, Iterator) else answer
        if (wrong := unlike(answer, declared(self.hook))) is not None:
            self.refuse(*wrong)
        return answer

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


def declared(hook: Callable[..., object]) -> Any:
    """The type that a hook's spec declares for its answers."""
    return inspect.get_annotations(hook)["return"]


def unlike(answer: object, declared: Any) -> tuple[str, str] | None:
    """What was answered and what must be, for a message; None if the answer is of its declared type."""
    if (wrong := mistyped(answer, declared)) is None:
        return None
    path, part, its_type = wrong
    if not path:
        return in_short(answer), type_name(declared)
    found = f"{in_short(answer)} with {in_short(part)} at {path}"
    return found, f"{type_name(declared)}, with {type_name(its_type)} there"


def in_short(value: object) -> str:
    """A value as a message names it: a plain one as it is, any other by its class."""
    if value is None or isinstance(value, str | int | float | list | tuple | dict):
        return shown(value)
    name = type(value).__name__
    return f"an {name}" if name[:1] in "aeiouAEIOU" else f"a {name}"


@attrs.frozen(eq=False)
class Caller:
    """A hook of the plugin that owns a method, looked up once. ``check`` looks at an answer other than None."""

    question: Question
    function: Callable[..., Any]
    takes: Sequence[str]
    check: Callable[[Question, Any], Any]


@attrs.frozen(eq=False)
class Callers:
    """What a step calls for one adapter, see `callers_of`; None for hooks that its plugin does not implement."""

    before_step: Caller | None
    after_step: Caller | None
    budget: Caller | None


def callers_of(tuner: TunerView) -> Callers:
    """Look up what a step calls for an adapter, so that no step looks anything up."""

    def caller(hook: Callable[..., object], check: Callable[[Question, Any], Any]) -> Caller | None:
        found = registry.implementation(hook, tuner.method)
        if found is None:
            return None
        return Caller(Question(hook, tuner.method, tuner), found.function, found.argnames, check)

    return Callers(
        before_step=caller(specs.tunerkit_before_step, _checked_parameters),
        after_step=caller(specs.tunerkit_after_step, partial(_checked_ranks, targets=tuner.targets)),
        budget=caller(specs.tunerkit_budget, _checked_budget),
    )


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
    """Whether the method acts in each step, so that a step without its hooks is another training."""
    return any(registry.implements(hook, method) for hook in (specs.tunerkit_before_step, specs.tunerkit_after_step))


def has_factors(method: str) -> bool:
    """Whether the method can return what it adds as a product."""
    return registry.implements(specs.tunerkit_factors, method)


def has_delta(method: str) -> bool:
    """Whether the method can return what it adds as a dense matrix."""
    return registry.implements(specs.tunerkit_delta, method) or has_factors(method)


def adds_products(method: str) -> bool:
    """Whether the method's adapters add products and nothing else, so that the factors say all."""
    return has_factors(method) and not registry.implements(specs.tunerkit_delta, method)


def shared(
    method: str, targets: Sequence[Target], bases: Sequence[BaseLayer], config: AdapterConfig
) -> nn.Module | None:
    """Build what all adapters of the method use, in a module of its own; None for nothing."""
    with Question(specs.tunerkit_shared, method, targets) as question:
        answer: nn.Module | None = question.checked(targets=targets, bases=bases, config=config)
        if answer is not None and not {target.module for target in targets}.isdisjoint(answer.modules()):
            question.refuse("a module that holds a base layer", "one with tensors of its own")
        return answer


def build_adapter(
    method: str,
    target: Target,
    base: BaseLayer,
    config: AdapterConfig,
    shared: nn.Module | None = None,
    *,
    loading: bool = False,
) -> Adapter:
    """Build one adapter with the method's plugin. Raises `PluginError` if the result is not an adapter."""
    with Question(specs.tunerkit_build_adapter, method, target.path) as question:
        answer: Adapter = question.checked(target=target, base=base, config=config, shared=shared, loading=loading)
        if target.module in answer.modules():
            question.refuse(
                "an adapter that holds the base layer as a child",
                "one that does not store it: forward receives the base layer as an argument",
            )
        _check_reads(question, answer)
        _check_rank_dims(question, answer)
        if shared is not None and not set(answer.modules()).isdisjoint(shared.modules()):
            question.refuse(
                "an adapter that holds the shared module as a child",
                "one that does not store it: forward finds it as self.shared",
            )
        return answer


def _check_reads(question: Question, answer: Adapter) -> None:
    """Refuse a class that does not declare what it reads; of a plugin for the contract's number 1, warn once."""
    flags: dict[str, object] = {"reads_output": answer.reads_output, "reads_weight": answer.reads_weight}
    if all(isinstance(flag, bool) for flag in flags.values()):
        return
    got, catalog = " and ".join(f"{name}={shown(flag)}" for name, flag in flags.items()), registry.loaded()
    old, name = catalog.owners[question.method].api < 2, type(answer).__name__
    if not (old and all(isinstance(flag, bool | None) for flag in flags.values())):
        question.refuse(f"a {name} with {got}", f"one whose class declares both, as True or False: {_READS}")
    if (key := (API_NAME, question.method)) not in catalog.known:
        catalog.known[key] = True
        warn(
            f"{registry.plugin_of(question.method)} was written for {API_NAME} 1: its class {name} has {got}, where "
            f"None counts as True. Declare both there, as True or False, and set {API_NAME} = {API}, which later "
            f"versions will ask for. {_READS}"
        )


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


def statistics(tuner: TunerView) -> StatisticsRequest | None:
    """Return what the method wants to know of the data with the adapter's settings; None for nothing."""
    asked = registry.get(tuner.method).statistics
    found: object = asked(tuner.config) if callable(asked) else asked
    if found is None or isinstance(found, StatisticsRequest):
        return found
    raise PluginError(
        f"statistics of method {tuner.method!r} returned {shown(found)}; it must return None, or what it wants as a "
        "tunerkit.plugin.StatisticsRequest"
    )


def calibrate(
    tuner: TunerView, statistics: Mapping[str, Statistics], bases: Mapping[str, BaseLayer]
) -> Mapping[str, int] | None:
    """Let the method set its start. Returns the ranks by target path if they changed."""
    return _ranks(specs.tunerkit_calibrate, tuner, statistics=statistics, bases=bases)


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
        groups: Iterable[ParamGroup] = question.checked(tuner=tuner) or ()
        own, seen = {id(parameter) for parameter in tuner.parameters()}, set[int]()
        for group in groups:
            scale, decay = group.lr_scale, group.weight_decay
            if not all(math.isfinite(value) and value >= 0 for value in (scale, decay or 0.0)):
                settings = f"lr_scale={shown(scale)} and weight_decay={shown(decay)}"
                question.refuse(f"a group with {settings}", "finite numbers >= 0 there")
            for parameter in group.parameters:
                if id(parameter) not in own:
                    whose = "a group with a parameter that is not the adapter's"
                    question.refuse(whose, "parameters of tuner.parameters()")
                if id(parameter) in seen:
                    question.refuse("a parameter in two groups, or twice in one", "each in one group")
                seen.add(id(parameter))
        return list(groups)


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
        question.refuse(in_short(answer), expected)
    found = list(answer)
    for each in found:
        if not isinstance(each, Tensor):
            question.refuse(f"a list with {in_short(each)}", expected)
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
        answer: Delta = question.checked(adapter=adapter, base=base)
        features = (base.out_features, base.in_features)
        for what, tensor, shape in (("weight", answer.weight, features), ("bias", answer.bias, features[:1])):
            if tensor is not None:
                _check_tensor(question, tensor, f"a delta {what}", adapter)
                if tensor.shape != shape:
                    question.refuse(f"a delta {what} of shape {tuple(tensor.shape)}", f"one of shape {shape}")
        return answer


def factors(path: str, method: str, adapter: Adapter, base: BaseLayer) -> Factors:
    """Return what an adapter adds to its base layer's weight as a product. Raises `PluginError` if it is wrong."""
    with Question(specs.tunerkit_factors, method, path) as question:
        answer: Factors = question.checked(adapter=adapter, base=base)
        _check_tensor(question, answer.q, "q", adapter)
        _check_tensor(question, answer.p, "p", adapter)
        if (shapes := misfit(base, answer)) is not None:
            question.refuse(*shapes)
        return answer


def _check_tensor(question: Question, tensor: object, what: str, adapter: Adapter) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        question.refuse(f"{in_short(tensor)} as {what}", "a tensor of floating-point numbers there")
    devices = [parameter.device for parameter in adapter.parameters()]
    if devices and tensor.device not in devices:
        question.refuse(f"{what} on device {tensor.device}", f"a tensor on {devices[0]}, where the adapter is")


def from_factors(
    method: str, targets: Sequence[Target], bases: Sequence[BaseLayer], products: Mapping[str, Factors]
) -> tuple[AdapterConfig, Mapping[str, Adapter]]:
    """Build a config and adapters, by target path, that add the products, by target path, to the base layers."""
    _refuse_unfit(targets, bases, products)
    with Question(specs.tunerkit_from_factors, method, targets) as question:
        answer: tuple[AdapterConfig, Mapping[str, Adapter]] = question.checked(targets=targets, factors=products)
        settings, adapters = answer
        if not isinstance(settings, config := registry.get(method).config):
            question.refuse(f"{in_short(settings)} as the config", f"a {config.__name__}")
        if adapters.keys() != products.keys():
            question.refuse(f"{shown(adapters)} as the adapters", "a mapping with one adapter for each target path")
        return answer


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
        answer: State = question.checked(tuner=tuner) or State(tensors={}, values={})
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
            question.refuse(in_short(answer), "None; set tuner.state to what was restored")


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
