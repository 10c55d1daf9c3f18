"""A method as one function: `method` makes the config, the adapter and the hooks of it."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Final, NamedTuple, NoReturn, TypeAlias, get_type_hints

import attrs
import torch
from torch import Tensor, nn

from tunerkit.errors import PluginError, TargetError, TunerkitError, closest, error_text, shown
from tunerkit.plugin import (
    Adapter,
    AdapterConfig,
    BaseLayer,
    Delta,
    Factors,
    Method,
    Target,
    add_delta,
    add_low_rank,
    autocast_off,
    hookimpl,
)
from tunerkit_verbs.stacked import for_each_matrix
from tunerkit_verbs.torch_private import own_parameters, parameters_of, version

Start: TypeAlias = float | Callable[[Tensor], object]
_GIVEN: Final = ("base", "weight")  # what a function may ask for beside its parameters and settings
_ANNOTATE: Final = "annotate what it returns: -> Tensor for ΔW, -> Factors or -> Gain"


class Gain(NamedTuple):
    """Factors of a layer's output, as a method that is written as a function returns them.

    Attributes:
        rows: One for each row of W, (out,). The bias is multiplied too.
    """

    rows: Tensor


@attrs.frozen
class Parameter:
    """A tensor of a method that is written as a function, see `tunerkit.plugin.parameter`."""

    shape: tuple[str | int, ...]
    start: Start
    trained: bool


def parameter(*shape: str | int, start: Start = 0.0, trained: bool = True) -> Any:
    """Define a tensor of a method that is written as a function, as the default of an argument.

    Args:
        shape: Its sizes: ``"out"`` and ``"in"`` of the layer, the name of a setting, a name that the method's ``sizes``
            gives, or a number.
        start: The number that all its values start at, or a function that fills the tensor in place, such as
            ``torch.nn.init.normal_``. At the start the method must add nothing.
        trained: False for a tensor that keeps its start, which the adapter's file holds.

    Returns:
        A record, typed as ``Any``, so that type checkers use the annotation: ``a: Tensor = parameter("rank", "in")``.
    """
    return Parameter(shape, start, trained)


def method(
    name: str, *, sizes: Callable[[BaseLayer, Any], Mapping[str, int]] | None = None, **record: Any
) -> Callable[[Callable[..., Any]], "FunctionPlugin"]:
    """Make a method of one function that computes what an adapter adds, from its parameters and settings.

    The arguments of the function have `tunerkit.plugin.parameter` or `tunerkit.plugin.setting` as their defaults. It
    may also name ``base``, the `BaseLayer`, and ``weight``, its W (out, in), detached, in the dtype of the parameters
    or a wider one, which it must not change. Its annotation says what it returns:

    - ``Tensor``: ΔW, (out, in).
    - ``Factors``: ΔW as a product of two small matrices, which is never computed as a whole in training.
    - ``Gain``: factors (out,) of the layer's output.

    A setting named ``dropout`` drops a share of the input of ΔW in training. "Write a method" in the docs has examples.

    At a stack of matrices, such as experts, each matrix has its own parameters, and the function runs under
    `torch.func.vmap`: it sees one matrix. A function that vmap cannot run is refused there; ``stacks=False`` refuses
    all stacks.

    Args:
        name: The method's name.
        sizes: Computes further sizes for shapes from the base layer and the config. It raises `TargetError` if a
            setting does not fit the layer.
        record: Further fields of `tunerkit.plugin.Method`.

    Returns:
        A decorator. Its result is a plugin: pass it to `tunerkit.register`, or name it in an entry point,
        ``loha = "my_package.loha:loha"``. The config class is its attribute ``config``.

    Raises:
        PluginError: The function's signature does not say what is needed.
    """

    def decorate(function: Callable[..., Any]) -> FunctionPlugin:
        try:
            hints = get_type_hints(function)
        except Exception as error:  # an annotation may be any expression
            what = f"the function {function.__qualname__} has an annotation that cannot be read ({error_text(error)})"
            raise PluginError(f"{what}; its module must have what it names, also when it runs") from error
        kind = ProductPlugin if hints.get("return") is Factors else DeltaPlugin
        return kind(name, function, sizes, record, hints)

    return decorate


class FunctionPlugin:
    """The plugin of a method that is one function, with its record and its config class. Calling it calls that."""

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        sizes: Callable[[BaseLayer, Any], Mapping[str, int]] | None,
        record: Mapping[str, Any],
        hints: dict[str, Any],
    ) -> None:
        self.function, self.sizes = function, sizes
        self.__name__, self.__qualname__ = function.__name__, function.__qualname__
        self.__module__, self.__doc__ = function.__module__, function.__doc__
        arguments = inspect.signature(function).parameters
        self.returns = hints.pop("return", None)
        if self.returns not in (Tensor, Factors, Gain):
            self.refuse(f"returns {shown(self.returns)}", _ANNOTATE)
        taken = [key for key in attrs.fields_dict(Method) if key not in ("name", "config")]
        for key in record.keys() - {*taken}:
            self.refuse(f"has the field {key!r}", f"tunerkit.method takes sizes, {', '.join(taken)}", key, taken)
        self.parameters = {key: each.default for key, each in arguments.items() if type(each.default) is Parameter}
        if not any(each.trained for each in self.parameters.values()):
            self.refuse("has no tensor that is trained", 'add an argument such as b: Tensor = parameter("out", "rank")')
        for key in self.parameters.keys() & {*dir(FunctionAdapter), *vars(nn.Module()), "plugin", "settings"}:
            self.refuse(f"has a parameter {key!r}, a name that every adapter uses", f"rename it, such as to {key}_")
        # attrs numbers the fields as they are made, and takes that order.
        fields = {key: each.default for key, each in arguments.items() if isinstance(each.default, _Setting)}
        self.given = [key for key in _GIVEN if key in arguments.keys() - {*self.parameters, *fields}]
        self.settings = list(fields)
        for key in arguments.keys() - {*self.parameters, *fields, *self.given}:
            default = arguments[key].default
            got = "without a default" if default is inspect.Parameter.empty else f"with the default {shown(default)}"
            self.refuse(f"has the argument {key!r} {got}", "give it parameter(...) or setting(...)", key, _GIVEN)
        for key in fields.keys() - hints.keys():
            self.refuse(f"has the setting {key!r} without a type", f"annotate it, as in {key}: int = setting(...)")
        namespace = {**fields, "__annotations__": {key: hints[key] for key in fields}, "__doc__": function.__doc__}
        names = {"__module__": self.__module__, "__qualname__": f"{self.__qualname__}.config"}
        self.config: Any = attrs.frozen(type("config", (AdapterConfig,), {**namespace, **names}))
        stacks = record.get("targets", "weights") == "weights"
        self.method = Method(name, config=self.config, **{"stacks": stacks, **record})

    def __call__(self, *args: Any, **arguments: Any) -> Any:
        return self.function(*args, **arguments)

    def __reduce__(self) -> str:
        return self.__qualname__  # pickle finds it where the function was: an adapter holds it

    def refuse(self, what: str, do: str, name: str = "", known: Iterable[str] = ()) -> NoReturn:
        """Raise the `PluginError` about what the function is or returned, with the closest of the ``known`` names."""
        raise PluginError(f"the function {self.__qualname__} {what}; {do}{closest(name, known) if name else ''}")

    @hookimpl
    def tunerkit_methods(self) -> Iterable[Method]:
        return [self.method]

    @hookimpl
    def tunerkit_build_adapter(
        self, target: Target, base: BaseLayer, config: AdapterConfig, loading: bool
    ) -> "FunctionAdapter":
        settings = {key: value for key, value in attrs.asdict(config, recurse=False).items() if key in self.settings}
        known = {key: value for key, value in settings.items() if type(value) is int}
        known |= {"in": base.in_features, "out": base.out_features}
        further = {} if self.sizes is None else self.sizes(base, config)
        if not _are_sizes(further):
            self.refuse(f"has sizes that returned {shown(further)}", "they must return a mapping of names to int")
        known |= further
        for key, size in [(key, size) for key, each in self.parameters.items() for size in each.shape]:
            if type(size) is not int and size not in known:
                what = f"has a parameter {key!r} with the size {size!r}, which is unknown"
                self.refuse(what, f"known are: {', '.join(known)}", str(size), known)
        adapter = FunctionAdapter(self, known, settings, stack=base.stack)
        if not loading:
            adapter.check_first_call(target, base)
        return adapter


class DeltaPlugin(FunctionPlugin):
    """The plugin of a method whose function returns ΔW, or gains."""

    @hookimpl
    def tunerkit_delta(self, adapter: "FunctionAdapter", base: BaseLayer) -> Delta:
        return adapter.delta(base)


class ProductPlugin(FunctionPlugin):
    """The plugin of a method whose function returns factors."""

    @hookimpl
    def tunerkit_factors(self, adapter: "FunctionAdapter", base: BaseLayer) -> Factors:
        added: Factors = adapter.added(base)
        return added


def _are_sizes(value: object) -> bool:
    if not isinstance(value, Mapping):
        return False
    return all(isinstance(key, str) and isinstance(size, int) for key, size in value.items())


def _misfit(base: BaseLayer, product: Factors) -> tuple[str, str] | None:
    """The shapes of a product and those that ``base`` needs; None if they fit."""
    stack, q, p, rank = base.shape[:-2], tuple(product.q.shape), tuple(product.p.shape), product.q.shape[-2:-1]
    if (q, p) == ((*stack, *rank, base.in_features), (*stack, base.out_features, *rank)):
        return None
    stacked = f"{base.stack}, " if base.stack else ""
    needed = f"q ({stacked}r, {base.in_features}) and p ({stacked}{base.out_features}, r), with one r"
    return f"q of shape {q} and p of shape {p}", needed


def _put_back_(module: nn.Module, own: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> bool:
    """Give a module its parameters with their values again; whether anything was another."""
    now, changed = own_parameters(module), False
    for name, parameter in own.items():
        before = values[name]
        same = parameter.is_meta or torch.equal(parameter.nan_to_num(), before.nan_to_num())
        if now.get(name) is not parameter or not same:
            now[name], changed = parameter, True
            parameter.data = before
    return changed


class FunctionAdapter(Adapter):
    """The adapter of a method that is one function. For a ``stack`` of E matrices, each tensor has E first."""

    def __init__(
        self, plugin: FunctionPlugin, sizes: Mapping[str, int], settings: Mapping[str, Any], *, stack: int = 0
    ) -> None:
        super().__init__()
        self.plugin, self.settings = plugin, dict(settings)
        # A method's flags are its own, and not those of all functions.
        gain = plugin.returns is Gain
        vars(self).update(reads_output=gain, reads_weight=gain or bool(plugin.given))
        self._rank = sizes["rank"] if plugin.returns is Factors and "rank" in sizes else 0
        for name, each in plugin.parameters.items():
            first = (stack,) if stack else ()
            values = torch.empty([*first, *(sizes[size] if isinstance(size, str) else size for size in each.shape)])
            with torch.no_grad():
                for one in values if stack else (values,):
                    one.fill_(each.start) if isinstance(each.start, int | float) else each.start(one)
            self.register_parameter(name, nn.Parameter(values, requires_grad=each.trained))

    @property
    def rank(self) -> int:
        return self._rank

    @torch.no_grad()
    def check_first_call(self, target: Target, base: BaseLayer) -> None:
        """Call the function once where the layer runs. If this raises `PluginError`, the layer is as it was.

        Refused are a write into W, another shape than is needed, and a start that adds something.
        """
        own = parameters_of(base.holder) if self.plugin.given else {}
        values = {name: parameter.detach().clone() for name, parameter in own.items()}
        try:
            added = self.to(self.device_of(base)).added(base)
        except BaseException as error:
            _put_back_(base.holder, own, values)
            if not base.stack or not isinstance(error, Exception) or isinstance(error, TunerkitError):
                raise
            raise TargetError(
                f"it is a stack of {base.stack} matrices, and torch.func.vmap cannot run the function "
                f"{self.plugin.__qualname__} for all of them ({error_text(error)}); exclude it, or write the function "
                "without Python decisions on values"
            ) from error
        if _put_back_(base.holder, own, values):
            self.refuse_write(base)
        parts = added if isinstance(added, tuple) else (added,)
        if isinstance(added, Factors):
            wrong = _misfit(base, added)
        else:
            needed = base.shape[:-1] if self.plugin.returns is Gain else base.shape
            wrong = None if parts[0].shape == needed else (f"shape {tuple(parts[0].shape)}", str(needed))
        if wrong is not None:
            self.plugin.refuse(f"returned {wrong[0]} for {target.path!r}", f"it must be {wrong[1]}")
        start = parts[-1] @ parts[0] if len(parts) > 1 else parts[0] - int(self.plugin.returns is Gain)
        if self.plugin.method.start == "exact" and start.nan_to_num().any():  # a base may hold inf, and inf · 0 is NaN
            self.plugin.refuse(
                f"adds something to {target.path!r} at its start",
                "choose starts for which ΔW is 0, or gains are 1, with every setting; if they are so up to rounding, "
                'declare tunerkit.method(..., start="rounding")',
            )

    def device_of(self, base: BaseLayer) -> torch.device | None:
        """The device for the first call: where the layer runs, or the function reads W; None to stay on the CPU."""
        own = [*parameters_of(base.holder).values(), *base.holder.buffers(recurse=False)]
        if own and not any(tensor.is_meta for tensor in own):
            return own[0].device
        read = base.dense() if self.plugin.given and base.has_weight else None  # an offloaded one is loaded
        return None if read is None or read.is_meta else read.device

    def refuse_write(self, base: BaseLayer) -> NoReturn:
        """Raise `PluginError`: the function has changed W."""
        what = f"writes into the weight of a {type(base.module).__name__}, which is the base's own"
        new = "compute a new tensor, as in weight = weight - weight.mean()"
        self.plugin.refuse(what, f"{new}. tunerkit.wrap puts W back; after any other call, load the base again")

    def added(self, base: BaseLayer) -> Any:
        """What the function returns: ΔW (out, in), factors, or gains (out,); for a stack, each with E first."""
        tensors = dict(self.named_parameters(recurse=False))
        wide = torch.promote_types(next(iter(tensors.values())).dtype, torch.float32)
        given: dict[str, Any] = {key: base if key == "base" else base.dense().to(wide) for key in self.plugin.given}
        read: list[Tensor] = []
        if given and not torch.compiler.is_compiling():  # the first call was checked
            read = [*filter(torch.is_tensor, given.values()), *parameters_of(base.holder).values()]
        before = [*map(version, read)]
        # Half precision is for products with the input: what is merged must be what forward adds.
        with autocast_off(next(iter(tensors.values())).device):
            call = partial(self.plugin.function, **self.settings)
            answer = for_each_matrix(call, base, tensors, given) if base.stack else call(**tensors, **given)
        if before != [*map(version, read)]:
            self.refuse_write(base)
        if not isinstance(answer, self.plugin.returns):
            self.plugin.refuse(f"returned a {type(answer).__name__}, not a {self.plugin.returns.__name__}", _ANNOTATE)
        return answer

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        added = self.added(base)
        dropout = self.settings.get("dropout", 0.0) if self.training else 0.0
        if isinstance(added, Factors):
            return add_low_rank(base, x, y, q=added.q, p=added.p, scale=1.0, dropout=dropout)
        if isinstance(added, Gain):
            return (y * base.shape_bias(added.rows)).to(y.dtype)
        return add_delta(base, x, y, added, dropout=dropout)

    def delta(self, base: BaseLayer) -> Delta:
        """What the adapter adds to the weight, and for gains to the bias."""
        added = self.added(base)
        if not isinstance(added, Gain):
            return Delta(weight=added)
        change, bias = added.rows - 1, base.bias()
        return Delta(weight=change.unsqueeze(-1) * base.dense(), bias=None if bias is None else change * bias)


_Setting: Final = type(attrs.field())
