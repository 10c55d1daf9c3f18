"""The frozen records that tunerkit and its plugins exchange. Those that plugins make check their own fields."""

import operator
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import repeat
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, NoReturn, TypeAlias, Union, get_args, get_origin

import attrs
import torch
from torch import Tensor, nn

from tunerkit.errors import PluginError, shown

# --- Values and their declared types ----------------------------------------------------------------------------------


class Unfit(PluginError):
    """A value is not what it must be. Both are in words: what it is, and what was expected."""

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(f"it returned {found}; it must return {expected}")
        self.found, self.expected = found, expected


class RecordError(PluginError):
    """A field of a record is not what it must be."""


# Any: nothing is known of the value yet, and types have no common type.
def conform(value: Any, declared: Any) -> Any:
    """Return a value that is of its declared type, as are all its parts. Raises `Unfit` for another one."""
    if type(value) is declared or (wrong := mistyped(value, declared)) is None:
        return value
    path, part, its_type = wrong
    at, there = (f" with {in_short(part)} at {path}", f", with {type_name(its_type)} there") if path else ("", "")
    raise Unfit(f"{in_short(value)}{at}", f"{type_name(declared)}{there}")


def mistyped(value: Any, declared: Any, path: str = "") -> tuple[str, object, Any] | None:
    """Find the first part of a value that is not of its declared type, also inside containers.

    Returns:
        The part's path in the value, the part, and its declared type; None if all parts are of their types.
    """
    kind, parts = get_origin(declared) or declared, get_args(declared)
    if kind in (Union, UnionType):
        found = [mistyped(value, part, path) for part in parts]
        inner = (wrong for wrong in found if wrong is not None and wrong[0] != path)  # of the type that is meant
        return None if None in found else next(inner, (path, value, declared))
    if not _is_of(value, kind, parts):
        return path, value, declared
    for step, each, its_type in _inside(value, kind, parts) if parts else ():
        if (wrong := mistyped(each, its_type, path + step)) is not None:
            return wrong
    return None


def _is_of(value: Any, kind: Any, parts: tuple[Any, ...]) -> bool:
    """Whether a value is of a type, as far as one sees without looking inside."""
    if kind is Literal:
        return value in parts
    if kind is Callable:
        return callable(value)
    if kind is type and parts:
        return isinstance(value, type) and issubclass(value, parts)
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if kind in (Iterable, Sequence):  # a tensor would give its rows
        return isinstance(value, Collection) and not isinstance(value, str | Mapping | Tensor)
    if kind is tuple and parts[-1] is not ...:
        return isinstance(value, tuple) and len(value) == len(parts)
    return kind is Any or isinstance(value, type(None) if kind is None else kind)


def _inside(value: Any, kind: Any, parts: tuple[Any, ...]) -> Iterator[tuple[str, Any, Any]]:
    """Yield the parts of a container: the step to each in a path, the part, and its declared type."""
    if kind is Mapping:
        for key in value:
            yield f"[{key!r}]", key, parts[0]
            yield f"[{key!r}]", value[key], parts[1]
    elif kind in (tuple, Iterable, Sequence):
        types = parts if kind is tuple and parts[-1] is not ... else repeat(parts[0])
        for index, (each, its_type) in enumerate(zip(value, types, strict=False)):
            yield f"[{index}]", each, its_type


def type_name(declared: Any) -> str:
    """A type in words, for messages, with the names by which plugins import classes."""
    if get_origin(declared) is Literal:
        return f"one of {get_args(declared)}"
    is_class = isinstance(declared, type) and not get_args(declared)
    name = f"{declared.__module__}.{declared.__qualname__}" if is_class else str(declared)
    # Without modules: all of them, or those inside tunerkit and torch.nn.
    short = re.sub(r"\b(tunerkit\.|torch\.nn\.|)(\w+\.)+(?=\w)", r"\1", name)
    return short.replace("tunerkit.", "tunerkit.plugin.")


def in_short(value: object) -> str:
    """A value as a message names it: a plain one as it is, any other by its class."""
    if value is None or isinstance(value, str | int | float | list | tuple | dict):
        return shown(value)
    name = type(value).__name__
    return f"an {name}" if name[:1] in "aeiouAEIOU" else f"a {name}"


# --- The checks of fields, in the plugin's own line -------------------------------------------------------------------

Field: TypeAlias = "attrs.Attribute[Any]"


def checked(cls: type, fields: list[Field]) -> list[Field]:
    """Let a class of records compare each value with the field's annotation, unless the field has another validator."""
    return [field if field.validator else field.evolve(validator=typed) for field in fields]


def typed(record: Any, field: Field, value: Any) -> None:
    """The validator that compares a value with the field's annotation."""
    try:
        conform(value, field.type)
    except Unfit as wrong:
        _refuse(record, field, wrong.found, wrong.expected)


def _refuse(record: Any, field: Field, found: str, expected: str) -> NoReturn:
    kind, name = type(record).__name__, attrs.asdict(record, recurse=False).get("name")
    which = f"{kind.lower()} {name!r}" if isinstance(name, str) and field.name != "name" else f"a {kind}"
    raise RecordError(f"{field.name} of {which} is {found}; expected {expected}") from None


def must_be(expected: str, holds: Callable[[Any], object]) -> Callable[[Any, Field, Any], None]:
    """A validator by a predicate, and its description in words."""

    def check(record: Any, field: Field, value: Any) -> None:
        if not holds(value):
            _refuse(record, field, shown(value), expected)

    return check


_ATTRS, _CONFIG = (
    must_be(f"an attrs class{which}", lambda value: isinstance(value, type) and attrs.has(value))
    for which in ("", " derived from tunerkit.plugin.AdapterConfig")
)
_FACTOR = [typed, must_be("a finite number >= 0", lambda value: value is None or 0 <= value < float("inf"))]
_WORD = must_be(
    "a word (a str) without spaces, commas, slashes or brackets",
    lambda value: isinstance(value, str) and re.fullmatch(r"[^\s,/()]+", value),
)
_REQUEST = must_be(
    "tunerkit.plugin.StatisticsRequest with the ranks of what it wants, as in StatisticsRequest(inputs=16)",
    lambda value: value is None or callable(value) or isinstance(value, StatisticsRequest),
)


_NAME = re.compile(r"(?!re:)[^*?\[]+").fullmatch
_PLAIN = [
    typed,
    must_be(
        "plain names, which are no patterns",
        lambda value: all(map(_NAME, [value] if isinstance(value, str) else value)),
    ),
]


@attrs.frozen(field_transformer=checked)
class StatisticsRequest:
    """The statistics that a method wants of each target, before training.

    Attributes:
        inputs: The rank k of an approximation of the inputs' second moment; 0 for none.
        gradients: The rank k of an approximation of the weight's gradient; 0 for none. It needs a loss.
    """

    inputs: int = 0
    gradients: int = 0

    def __attrs_post_init__(self) -> None:
        if self.inputs < 0 or self.gradients < 0 or not self.inputs + self.gradients:
            wanted = "the ranks of what it wants, as in tunerkit.plugin.StatisticsRequest(inputs=16)"
            raise RecordError(f"{self} wants nothing, or less; expected {wanted}")


@attrs.frozen(field_transformer=checked)
class Method:
    """A way of fine-tuning, as a plugin returns it from ``tunerkit_methods``.

    Attributes:
        name: The name that users pass to `tunerkit.wrap`.
        config: The config class: a frozen attrs class derived from `tunerkit.plugin.AdapterConfig`.
        needs_steps: Whether the method only works if optimizer steps drive it, as AdaLoRA does. Saving such an adapter
            untrained is an error.
        start: What wrapping does to the model's output, unless a setting asks for a change: ``"exact"`` leaves every
            bit of it, ``"rounding"`` changes it by rounding errors alone, as a start does that adds and subtracts the
            same product.
        targets: What the method adapts: ``"weights"``, modules of which tunerkit knows the weight; ``"outputs"``, any
            module that is called, such as a norm or a block; or ``"norms"``, norms over the last dimension, by default
            all of them outside output heads. What adapts outputs can be merged where it implements ``tunerkit_delta``
            and the module is a layer or such a norm, whose weight is seen as a column, (out, 1).
        multiplies: Whether the adapter multiplies the layer's weight or output, as IA³ does. If two such adapters of a
            layer are active, their changes are added, and a warning says so.
        statistics: What the method wants to know of the data before training, see `tunerkit.calibrate`; None for a
            method that wants nothing. If that depends on the settings, a function of the config that says it.
        pieces: Whether the method's hooks work on the pieces that a process holds where an engine has cut an adapter,
            see `tunerkit.plugin.Tuner.pieces`. Hooks of other methods see whole weights, gathered around each of them.
        foreign: What other packages than core need to know about the method, by their names. ``"peft"``
            wants PEFT's names of tensors and settings, ``"testing"`` the ``expected_failures`` of checks, with reasons.
    """

    name: str = attrs.field(validator=_WORD)
    config: type = attrs.field(validator=_CONFIG)
    needs_steps: bool = False
    start: Literal["exact", "rounding"] = attrs.field(default="exact", kw_only=True)
    targets: Literal["weights", "outputs", "norms"] = attrs.field(default="weights", kw_only=True)
    multiplies: bool = attrs.field(default=False, kw_only=True)
    statistics: StatisticsRequest | Callable[[Any], StatisticsRequest | None] | None = attrs.field(
        default=None, kw_only=True, validator=_REQUEST
    )
    pieces: bool = attrs.field(default=False, kw_only=True)
    foreign: Mapping[str, Mapping[str, Any]] = attrs.field(factory=dict, kw_only=True, repr=False)


@attrs.frozen(field_transformer=checked)
class Packing:
    """How a quantiser stores a weight, see `tunerkit.plugin.BaseLayer.packing`.

    Attributes:
        name: The quantiser and its kind of numbers, such as ``"bitsandbytes nf4"``. Files and messages name it. It
            must not be the name of one of torch's dtypes, which is how files describe a weight that is not packed.
        bits: The bits of each number, without scales.
    """

    name: str
    bits: float


@attrs.frozen
class Rounding:
    """What storing a merged weight W + ΔW again has rounded. Errors are Frobenius norms, relative to that of W + ΔW.

    Attributes:
        stored_as: The quantiser, such as ``"bitsandbytes nf4"``.
        bits: Its bits.
        added: The error that merging added: that of the stored sum.
        own: The quantiser's own error, on a matrix of normally distributed numbers with rows of the same size.
        change: The size of ΔW. An error above it means that merging loses more than the adapters had changed.
    """

    stored_as: str
    bits: float
    added: float
    own: float
    change: float


@attrs.frozen(eq=False)
class Statistics:
    """What `tunerkit.calibrate` measured at one target. Memory and time depend on k, not on the amount of data.

    Attributes:
        rows: n, the number of input rows: tokens for a linear layer, positions for a convolution.
        inputs: S, (k, in) with Sᵀ S close to Σ x xᵀ over the n rows x; None if it was not wanted. Its rows are the
            top-k right singular vectors of X, (n, in), each multiplied by its singular value, in descending order. It
            is a Nyström approximation, exact if X has rank k or less. k is at most the number of features.
        centred: The same for X minus its mean row, (k, in): its principal components, multiplied by their singular
            values; None if ``inputs`` was not wanted.
        variance: Σ ‖x − mean‖² over the n rows, of which the squared rows of ``centred`` are shares; it is exact. 0 if
            ``inputs`` was not wanted.
        gradients: P and Q with P Q close to the gradient of the loss by W, summed over the batches; None if it was not
            wanted. It is exact if the gradient's rank is at most k.
    """

    rows: int
    inputs: Tensor | None
    gradients: "Factors | None"
    centred: Tensor | None = None
    variance: float = 0.0


@attrs.frozen
class MethodInfo:
    """The distribution that provides a method.

    Attributes:
        distribution: The distribution's name, or ``"in-process"``.
        version: The distribution's version; empty for an in-process plugin.
        error: Why the plugin or the method cannot be used; None if it can.
    """

    distribution: str
    version: str
    error: str | None = None


@attrs.frozen(eq=False)
class Target:
    """A place in the model.

    Attributes:
        path: The dotted path.
        module: The module at this path.
    """

    path: str
    module: nn.Module = attrs.field(repr=lambda module: type(module).__name__)


@attrs.frozen(field_transformer=checked)
class DefaultTargets:
    """The default targets of architectures, as a plugin yields them from ``tunerkit_default_targets``.

    Args:
        model_types: The values of ``model.config.model_type`` that have these targets.
        names: Plain names, each the end of a path: the attention and MLP matrices of the repeated blocks. An
            architecture need not have all of them.
    """

    model_types: tuple[str, ...] = attrs.field(validator=_PLAIN)
    names: tuple[str, ...] = attrs.field(validator=_PLAIN)


@attrs.frozen(field_transformer=checked)
class WeightReader:
    """A class that uses its children's weights directly, bypassing their forward, where no hook would be called.

    A plugin yields it from ``tunerkit_weight_readers``.

    Args:
        owner: The qualified name of the class that defines the forward: ``"package.module.Class"``.
        children: The names of the children whose weights that forward uses.
    """

    owner: str = attrs.field(validator=_PLAIN)
    children: tuple[str, ...] = attrs.field(validator=_PLAIN)


@attrs.frozen(eq=False)
class Delta:
    """What an adapter adds to the parameters of its base layer, as dense tensors.

    Attributes:
        weight: Added to the weight, (out, in), for a norm (out, 1); None adds nothing.
        bias: Added to the bias, (out,); None adds nothing.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None


class Factors(NamedTuple):
    """An adapter's weight delta as a product: ΔW = P Q, with everything else (scale, λ, mask) multiplied into them.

    A tuple, so that a method's forward may build one under `torch.compile`.

    Attributes:
        q: Q, (r, in).
        p: P, (out, r).
    """

    q: Tensor
    p: Tensor

    @property
    def rank(self) -> int:
        """r, the number of pairs of a column of P and a row of Q; it may be 0."""
        return self.q.shape[0]

    def triplets(self) -> tuple[Tensor, Tensor, Tensor]:
        """Decompose P Q = U Σ Vᵀ, in fp64 and without the whole matrix: by the QR of P and of Qᵀ.

        Returns:
            U (out, k), Σ (k,), the largest first, and Vᵀ (k, in), where k is the smallest of r, out and in.
        """
        left, small_left = torch.linalg.qr(self.p.double())
        right, small_right = torch.linalg.qr(self.q.double().T)
        u, sigma, vh = torch.linalg.svd(small_left @ small_right.T, full_matrices=False)
        return left @ u, sigma, vh @ right.T


@attrs.frozen(eq=False, field_transformer=checked)
class ParamGroup:
    """Parameters that are trained with settings of their own, as a plugin yields them from ``tunerkit_param_groups``.

    Attributes:
        parameters: Some of the adapter's parameters.
        lr_scale: The factor of the learning rate, as in LoRA+.
        weight_decay: Their weight decay; None for that of all others.
    """

    parameters: Sequence[nn.Parameter] = attrs.field(converter=tuple[nn.Parameter, ...])  # a generator is read once
    lr_scale: float = attrs.field(default=1.0, validator=_FACTOR)
    weight_decay: float | None = attrs.field(default=None, validator=_FACTOR)


@attrs.frozen(eq=False, field_transformer=checked)
class State:
    """What a method needs to resume training, in addition to the adapter's weights.

    Attributes:
        tensors: Tensors by name.
        values: Values that JSON can hold, by name.
    """

    tensors: Mapping[str, Tensor]
    values: Mapping[str, object]


@attrs.frozen
class RankChange:
    """One allocation, as `Tuner.history` records it.

    Attributes:
        step: The optimizer step of the allocation.
        budget: The budget in force from this step on.
        ranks: The live rank by target path.
    """

    step: int
    budget: int
    ranks: Mapping[str, int] = attrs.field(repr=lambda ranks: f"<of {len(ranks)} targets>")


@attrs.frozen(eq=False, field_transformer=checked)
class Foreign:
    """An adapter that another program wrote, as a format reads it. All tensors are on the CPU.

    Core finds the modules at the paths, checks shapes and values, and refuses what does not fit the model. A path that
    the model does not have makes the adapter one of another base model.

    Attributes:
        factors: What is added to the weight of each target, by its path. A mapping may compute them when it is asked.
            Empty for a method whose ``tensors`` say all; such an adapter becomes no other method's.
        method: The method that the adapter becomes. If it is not installed, it becomes LoRA, with the rank of each
            target.
        config: The settings of ``method``, if ``tensors`` are given: its rank, scale and dropout, so that training
            goes on as it began. The targets, the copies and the biases stand in the fields here.
        tensors: The tensors of the adapter of ``method`` at each target, by their names in its file: for LoRA ``"a"``
            (r, in) and ``"b"`` (out, r). If they are left out, the method builds its adapters from the factors.
        shared: The tensors of the module that the method's adapters share, by their names in it.
        copies: The tensors of the modules that are trained in full, by the module's path and the tensor's name in it.
        biases: The trained biases, by their module's path.
        base: The name or path of the base model, as the files state it; empty if they do not.
        remarks: One sentence for each statement of the files that the adapter does not keep, for a warning.
    """

    factors: Mapping[str, Factors] = attrs.field()
    method: str = "lora"
    config: Mapping[str, object] = attrs.field(factory=dict, kw_only=True)
    tensors: Mapping[str, Mapping[str, Tensor]] = attrs.field(factory=dict, kw_only=True)
    shared: Mapping[str, Tensor] = attrs.field(factory=dict, kw_only=True)
    copies: Mapping[str, Mapping[str, Tensor]] = attrs.field(factory=dict, kw_only=True)
    biases: Mapping[str, Tensor] = attrs.field(factory=dict, kw_only=True)
    base: str = attrs.field(default="", kw_only=True)
    remarks: Sequence[str] = attrs.field(default=(), kw_only=True)

    @factors.validator
    def _check_factors(self, field: Field, value: Any) -> None:
        if isinstance(value, Mapping) and not isinstance(value, dict):  # it may compute what it is asked for
            field, value = field.evolve(type=Mapping[str, Any]), dict.fromkeys(value)
        typed(self, field, value)


@attrs.frozen(field_transformer=checked)
class Description:
    """What the files of an adapter say of it without a model, for `tunerkit show` and to choose the base model.

    Attributes:
        method: The method, as the other program names it.
        base: The name or path of the base model; empty if the files do not state it.
        model_class: The class of transformers that the base was loaded by, such as
            ``"AutoModelForSequenceClassification"``; empty if the files do not state it.
        labels: The number of classes of a head that is trained in full; 0 if there is none.
        ranks: The rank of each target, by its path.
        copies: The paths of the modules that are trained in full.
        settings: Further settings of the files that a user may want to see.
    """

    method: str
    base: str = attrs.field(default="", kw_only=True)
    model_class: str = attrs.field(default="", kw_only=True)
    labels: int = attrs.field(default=0, kw_only=True)
    ranks: Mapping[str, int] = attrs.field(factory=dict, kw_only=True)
    copies: Sequence[str] = attrs.field(default=(), kw_only=True)
    settings: Mapping[str, object] = attrs.field(factory=dict, kw_only=True)


@attrs.frozen
class NoOptions:
    """The options of a format that has none."""


@attrs.frozen(eq=False, kw_only=True, field_transformer=checked)
class Holding:
    """How a library holds weights that are not simply in their modules.

    A plugin yields it from ``tunerkit_holdings``, with the functions that its library needs. Core asks about values,
    shapes and ties only for a parameter that is empty or on the meta device. All processes call what gathers together.

    Attributes:
        name: What messages call the library, before what it does: "accelerate" offloads, "FSDP2" cuts.
        way_out: What to do instead of what cannot be done with such weights, as the part of a sentence.
        one_dtype: Why trained parameters must share one dtype, as a part of a sentence; empty if they need not.
        offloads: Whether the own weights of a module are on the meta device, and loaded in each forward only.
        load: The values of an offloaded weight or buffer, by its module and its name in it, detached, on the device on
            which the module runs.
        device: The device to which the library moves a module and its input; None if it does not.
        forward: The instance-level forward that the library's wrapper calls; None if there is no wrapper, or if it
            does more than move tensors.
        identity: A number that tied weights share, by the module of an offloaded one, its name in it, and the tensor;
            None if the library does not hold it.
        duplicate: A deep copy of a module, whose weights stay on the device on which it runs, and a mapping from the
            id of a submodule to what replaces it in the copy; None if the library holds nothing in it.
        shards: Whether processes share a tensor, so that this one holds a part of it, also while it is whole.
        shape: The shape of the whole of such a tensor, also while it is empty.
        part: What this process holds of such a tensor: the memory itself.
        gathered: Inside the block, the parameters of a module and below it are whole, and what the block changes in
            them is lost. It gives a function from a parameter's name in the module and a whole tensor of its shape to
            the part that this process would hold, in memory of its own.
        reshard_: Cuts what a forward has left whole in a model.
        lent: Why in-place writes to a module's weights are lost at present, as a sentence without its end; None if
            they persist.
        outside: Inside the block, new modules are whole.
    """

    name: str = "an engine"
    way_out: str = "load the model without it"
    one_dtype: str = ""
    offloads: Callable[[nn.Module], bool] = lambda module: False
    load: Callable[[nn.Module, str], Tensor] = getattr
    device: Callable[[nn.Module], torch.device | None] = lambda module: None
    forward: Callable[[nn.Module], object | None] = lambda module: None
    identity: Callable[[nn.Module, str, Tensor], int | None] = lambda module, name, tensor: None
    duplicate: Callable[[nn.Module, Mapping[int, nn.Module]], nn.Module | None] = lambda module, replaced: None
    shards: Callable[[Tensor], bool] = lambda tensor: False
    shape: Callable[[Tensor], Sequence[int]] = operator.attrgetter("shape")
    part: Callable[[Tensor], Tensor] = lambda tensor: tensor
    gathered: Callable[[nn.Module], AbstractContextManager[Callable[[str, Tensor], Tensor]]] = lambda module: (
        nullcontext(lambda name, tensor: tensor)
    )
    reshard_: Callable[[nn.Module], None] = lambda module: None
    lent: Callable[[nn.Module], str | None] = lambda module: None
    outside: Callable[[], AbstractContextManager[object]] = lambda: nullcontext()


@attrs.frozen(field_transformer=checked)
class Restriction:
    """What tunerkit cannot do with a library, as a plugin yields it from ``tunerkit_restrictions``.

    Attributes:
        name: What messages call the library, or the part of it.
        refused: The reason and the way out by verb: ``"wrap"`` (and load), ``"attach"``, ``"save"``, ``"merge"``.
        classes: The qualified names of the classes from which its modules or its parameters derive; one with a dot at
            its end stands for all classes of a package.
        marks: Attributes that it sets on modules or parameters, with their value; None stands for any value.
        error: The exception that refusing raises; by default `tunerkit.errors.AdapterError`.
    """

    name: str
    refused: Mapping[str, str]
    classes: tuple[str, ...] = attrs.field(default=(), validator=_PLAIN)
    marks: Mapping[str, object] = attrs.field(factory=dict)
    error: type[Exception] | None = None

    def __attrs_post_init__(self) -> None:
        if not (self.classes or self.marks):
            raise RecordError(f"restriction {self.name!r} recognizes nothing; expected classes or marks")


@attrs.frozen(field_transformer=checked)
class NewModules:
    """The modules of a model with values that its checkpoint does not have, or may not have.

    Attributes:
        loader: What fills models of the library, for messages: a function's name.
        whole: The paths of the modules that are new as a whole.
        partly: The paths of modules with some newly initialised parameters.
        heads: The paths of output heads that may be new, if that cannot be seen.
        replaced: The paths of the modules in numbered blocks that are the reason: they lost their marks.
    """

    loader: str
    whole: tuple[str, ...] = ()
    partly: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()


Resized = tuple[Sequence[int], Sequence[int]]  # the shape that a weight needs, and the one that it has


@attrs.frozen(eq=False, kw_only=True, field_transformer=checked)
class ModelLibrary:
    """What a library knows of its models, as a plugin yields it from ``tunerkit_model_libraries``.

    Each function is asked about every model. About one that is not the library's it says nothing, as the defaults do.

    Attributes:
        heads: The output heads that a module names by a method of its own. Every module of a model is asked.
        new: Finds what no checkpoint filled. It gets the model, the paths of the modules in numbered blocks, and those
            of the modules that are output heads or in one. Adapters train such modules in full.
        settings: The settings that change the model's output and leave no trace in its weights, by name, as values that
            JSON can hold. Files of adapters record them; a base with other values is refused.
        tied_flags: The dotted names of attributes of a module that are True while weights in it are tied. Merging
            adapters at all sides of a tie sets them to False, until that is undone.
        resize_hint: How to load the model in the sizes that an adapter needs, as the end of a sentence.
    """

    heads: Callable[[nn.Module], Sequence[nn.Module]] = lambda module: ()
    new: Callable[[nn.Module, Collection[str], Collection[str]], NewModules | None] = lambda model, blocks, heads: None
    settings: Callable[[nn.Module], Mapping[str, Any]] = lambda model: {}
    tied_flags: Callable[[nn.Module], Sequence[str]] = lambda module: ()
    resize_hint: Callable[[nn.Module, Sequence[Resized]], str] = lambda model, resized: ""


# Any: a writer takes a `tunerkit.plugin.Tuner` and its own options, which this file cannot name.
@attrs.frozen(field_transformer=checked)
class Format:
    """Another program's way of writing an adapter to disk, as a plugin yields it from ``tunerkit_formats``.

    Attributes:
        name: The name that users pass to `tunerkit.export`.
        sniff: Whether a path leads to an adapter in this format: a file, a folder, or a name that is neither. It only
            looks at names and at the beginning of a file. It does not raise.
        read: Reads the adapter at a path for a model, which it does not change. It raises `tunerkit.errors.FileError`
            for files that are damaged or hold what tunerkit cannot, and names the file and the key.
        write: Writes an adapter into an empty folder, and returns the files that it wrote. Core moves them to where the
            user wants them once all are written.
        options: An attrs class with the options of ``write``; see `tunerkit.plugin.setting` for ranges.
            `tunerkit.export` takes them by name.
        describe: Says what the files at a path hold, without a model; None for a format that cannot.
        config: Reads a config object of the program that `tunerkit.wrap` was given for a model: returns the method and
            its settings, or None if the object is none of the program's.
    """

    name: str = attrs.field(validator=_PLAIN)
    sniff: Callable[[Path], bool]
    read: Callable[[Path, nn.Module], Foreign]
    write: Callable[[Any, Path, Any], Iterable[Path]]
    options: type = attrs.field(default=NoOptions, validator=_ATTRS)
    describe: Callable[[Path], Description] | None = None
    config: Callable[[object, nn.Module], tuple[str, Mapping[str, object]] | None] = lambda config, model: None
