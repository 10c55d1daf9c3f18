"""The frozen records that tunerkit and its plugins exchange. Records that plugins build validate their fields."""

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
    """A plugin's answer is invalid: ``found`` describes the answer, ``expected`` a valid one."""

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(f"it returned {found}; it must return {expected}")
        self.found, self.expected = found, expected


class RecordError(PluginError):
    """A field of a record has an invalid value."""


# Any: the value is not checked yet, and annotations have no common type.
def conform(value: Any, declared: Any) -> Any:
    """Return ``value`` if it and its parts have the declared type; raise `Unfit` otherwise."""
    if type(value) is declared or (wrong := mistyped(value, declared)) is None:
        return value
    path, part, its_type = wrong
    at, there = (f" with {in_short(part)} at {path}", f", with {type_name(its_type)} there") if path else ("", "")
    raise Unfit(f"{in_short(value)}{at}", f"{type_name(declared)}{there}")


def mistyped(value: Any, declared: Any, path: str = "") -> tuple[str, object, Any] | None:
    """Return (path in the value, part, declared type) of the first mistyped part of a value; None if all types fit."""
    kind, parts = get_origin(declared) or declared, get_args(declared)
    if kind in (Union, UnionType):
        found = [mistyped(value, part, path) for part in parts]
        inner = (wrong for wrong in found if wrong is not None and wrong[0] != path)  # of the member that fits best
        return None if None in found else next(inner, (path, value, declared))
    if not _is_of(value, kind, parts):
        return path, value, declared
    for step, each, its_type in _inside(value, kind, parts) if parts else ():
        if (wrong := mistyped(each, its_type, path + step)) is not None:
            return wrong
    return None


def _is_of(value: Any, kind: Any, parts: tuple[Any, ...]) -> bool:
    """Whether a value has the type ``kind`` with the type arguments ``parts``; items of containers are not checked."""
    if kind is Literal:
        return value in parts
    if kind is Callable:
        return callable(value)
    if kind is type and parts:
        return isinstance(value, type) and issubclass(value, parts)
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if kind in (Iterable, Sequence):  # a tensor would be iterated by rows
        return isinstance(value, Collection) and not isinstance(value, str | Mapping | Tensor)
    if kind is tuple and parts[-1] is not ...:
        return isinstance(value, tuple) and len(value) == len(parts)
    return kind is Any or isinstance(value, type(None) if kind is None else kind)


def _inside(value: Any, kind: Any, parts: tuple[Any, ...]) -> Iterator[tuple[str, Any, Any]]:
    """Yield (step of the path, item, declared type) for each item of a container, and for the keys of a mapping."""
    if kind is Mapping:
        for key in value:
            yield f"[{key!r}]", key, parts[0]
            yield f"[{key!r}]", value[key], parts[1]
    elif kind in (tuple, Iterable, Sequence):
        types = parts if kind is tuple and parts[-1] is not ... else repeat(parts[0])
        for index, (each, its_type) in enumerate(zip(value, types, strict=False)):
            yield f"[{index}]", each, its_type


def type_name(declared: Any) -> str:
    """Return a type's short name for messages, such as ``"int"`` or ``"tunerkit.plugin.Adapter"``."""
    if get_origin(declared) is Literal:
        return f"one of {get_args(declared)}"
    is_class = isinstance(declared, type) and not get_args(declared)
    name = f"{declared.__module__}.{declared.__qualname__}" if is_class else str(declared)
    # Drop modules, except for the roots tunerkit and torch.nn.
    short = re.sub(r"\b(tunerkit\.|torch\.nn\.|)(\w+\.)+(?=\w)", r"\1", name)
    return short.replace("tunerkit.", "tunerkit.plugin.")


def in_short(value: object) -> str:
    """Describe a value for messages: show plain values, and name the class of other objects."""
    if value is None or isinstance(value, str | int | float | list | tuple | dict):
        return shown(value)
    name = type(value).__name__
    return f"an {name}" if name[:1] in "aeiouAEIOU" else f"a {name}"


# --- The checks of fields, which raise at the plugin's own line -------------------------------------------------------

Field: TypeAlias = "attrs.Attribute[Any]"


def checked(cls: type, fields: list[Field]) -> list[Field]:
    """Field transformer of attrs: give each field without a validator the validator `typed`."""
    return [field if field.validator else field.evolve(validator=typed) for field in fields]


def typed(record: Any, field: Field, value: Any) -> None:
    """Validator of attrs: raise `RecordError` if a value does not have the field's annotated type."""
    try:
        conform(value, field.type)
    except Unfit as wrong:
        _refuse(record, field, wrong.found, wrong.expected)


def _refuse(record: Any, field: Field, found: str, expected: str) -> NoReturn:
    kind, name = type(record).__name__, attrs.asdict(record, recurse=False).get("name")
    which = f"{kind.lower()} {name!r}" if isinstance(name, str) and field.name != "name" else f"a {kind}"
    raise RecordError(f"{field.name} of {which} is {found}; expected {expected}") from None


def must_be(expected: str, holds: Callable[[Any], object]) -> Callable[[Any, Field, Any], None]:
    """Return a validator that requires ``holds(value)``; ``expected`` describes valid values in words."""

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
    "a tunerkit.plugin.StatisticsRequest, as in StatisticsRequest(inputs=16), a function that returns one, or None",
    lambda value: value is None or callable(value) or isinstance(value, StatisticsRequest),
)


_NAME = re.compile(r"(?!re:)[^*?\[]+").fullmatch
_PLAIN = [
    typed,
    must_be(
        "plain names without patterns", lambda value: all(map(_NAME, [value] if isinstance(value, str) else value))
    ),
]


@attrs.frozen(field_transformer=checked)
class StatisticsRequest:
    """The statistics that a method needs of each target, before training.

    Attributes:
        inputs: The rank k of an approximation of the inputs' second moment; 0 for none.
        gradients: The rank k of an approximation of the weight's gradient; 0 for none. It needs a loss.
    """

    inputs: int = 0
    gradients: int = 0

    def __attrs_post_init__(self) -> None:
        if self.inputs < 0 or self.gradients < 0 or not self.inputs + self.gradients:
            wanted = "ranks >= 0, not all 0, as in tunerkit.plugin.StatisticsRequest(inputs=16)"
            raise RecordError(f"{self} requests no statistics; expected {wanted}")


@attrs.frozen(field_transformer=checked)
class Method:
    """A way of fine-tuning, as a plugin returns it from ``tunerkit_methods``.

    Attributes:
        name: The name that users pass to `tunerkit.wrap`.
        config: The config class: a frozen attrs class derived from `tunerkit.plugin.AdapterConfig`.
        needs_steps: Whether the method must be called at every optimizer step, as AdaLoRA must. Saving its adapter
            after 0 steps is an error.
        start: The effect of wrapping on the model's output with default settings: ``"exact"`` keeps it bit for bit,
            ``"rounding"`` changes it by rounding errors, as when an initialization adds and subtracts one product.
        targets: The modules that the method adapts: ``"weights"``, modules whose weight tunerkit knows; ``"outputs"``,
            any module that is called, such as a norm or a block; or ``"norms"``, norms over the last dimension, by
            default all outside output heads. Adapters of outputs can be merged if the method implements
            ``tunerkit_delta`` and the module is a layer or such a norm, whose weight is a column, (out, 1).
        multiplies: Whether the adapter multiplies the layer's weight or output, as IA³ does. If two such adapters of a
            layer are active, their changes are added, with a warning.
        statistics: The statistics that `tunerkit.calibrate` measures before training, or a function that returns them
            for a config; None for no statistics.
        stacks: Whether the method adapts stacks of matrices, such as experts; see `tunerkit.plugin.BaseLayer.stack`.
        pieces: Whether the method's hooks work on this process's shards of an adapter, see
            `tunerkit.plugin.Tuner.pieces`. For hooks of other methods, whole weights are gathered.
        foreign: Declarations for other packages, by package: for ``"peft"`` PEFT's names of tensors and settings, for
            ``"testing"`` the ``expected_failures`` of checks, with reasons.
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
    stacks: bool = attrs.field(default=False, kw_only=True)
    pieces: bool = attrs.field(default=False, kw_only=True)
    foreign: Mapping[str, Mapping[str, Any]] = attrs.field(factory=dict, kw_only=True, repr=False)


@attrs.frozen(field_transformer=checked)
class Packing:
    """How a quantizer stores a weight, see `tunerkit.plugin.BaseLayer.packing`.

    Attributes:
        name: The quantizer and its number format, such as ``"bitsandbytes nf4"``, for files and messages. It must not
            be the name of a dtype of torch, since files have that name for a weight that is not packed.
        bits: The bits of each number, without scales.
    """

    name: str
    bits: float


@attrs.frozen
class Rounding:
    """The rounding errors of quantizing a merged weight W + ΔW: Frobenius norms, divided by the norm of W + ΔW.

    Attributes:
        stored_as: The quantizer, such as ``"bitsandbytes nf4"``.
        bits: The bits of each number.
        added: The error that merging added by quantizing the sum.
        own: The quantizer's own error, on a matrix of normally distributed numbers with rows of the same size.
        change: The norm of ΔW. If ``added`` is larger, merging loses more than the adapters changed.
    """

    stored_as: str
    bits: float
    added: float
    own: float
    change: float


@attrs.frozen(eq=False)
class Statistics:
    """The statistics of one target from `tunerkit.calibrate`. Their size depends on k, not on the amount of data.

    Attributes:
        rows: n, the number of input rows: tokens for a linear layer, positions for a convolution.
        inputs: S, (k, in) with Sᵀ S close to Σ x xᵀ over the n rows x; None if not requested. Its rows are the top-k
            right singular vectors of X, (n, in), each multiplied by its singular value, in descending order. S is a
            Nyström approximation, exact if X has rank k or less. k is at most the number of features.
        centred: The same for X minus its mean row, (k, in): its principal components, multiplied by their singular
            values; None if ``inputs`` was not requested.
        variance: Σ ‖x − mean‖² over the n rows, exact. The squared norm of a row of ``centred`` is the part that this
            component explains. 0 if ``inputs`` was not requested.
        gradients: P and Q with P Q close to the gradient of the loss with respect to W, summed over the batches, and
            exact if the gradient's rank is at most k; None if not requested.
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
    """A module to adapt, and its path in the model.

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
    """The change that an adapter makes to its base layer's parameters, as dense tensors.

    Attributes:
        weight: Added to the weight, (out, in), for a norm (out, 1), for a stack (E, out, in); None adds nothing.
        bias: Added to the bias, (out,); None adds nothing.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None


class Factors(NamedTuple):
    """An adapter's weight delta as a product: ΔW = P Q, with everything else (scale, λ, mask) multiplied into them.

    A tuple, so that a method's forward may build one under `torch.compile`.

    Attributes:
        q: Q, (r, in); (E, r, in) for a stack of E matrices.
        p: P, (out, r); (E, out, r) for a stack.
    """

    q: Tensor
    p: Tensor

    @property
    def rank(self) -> int:
        """r, the number of columns of P and of rows of Q; it may be 0."""
        return self.q.shape[-2]

    def triplets(self) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the SVD P Q = U Σ Vᵀ in fp64, from QR decompositions of P and Qᵀ, without the product itself.

        Returns:
            U (out, k), Σ (k,) in descending order, and Vᵀ (k, in), where k is the smallest of r, out and in; for a
            stack, each with E first.
        """
        left, small_left = torch.linalg.qr(self.p.double())
        right, small_right = torch.linalg.qr(self.q.double().mT)
        u, sigma, vh = torch.linalg.svd(small_left @ small_right.mT, full_matrices=False)
        return left @ u, sigma, vh @ right.mT


@attrs.frozen(eq=False, field_transformer=checked)
class ParamGroup:
    """Parameters with their own optimizer settings, as a plugin yields them from ``tunerkit_param_groups``.

    Attributes:
        parameters: Some of the adapter's parameters.
        lr_scale: The factor by which the learning rate is multiplied, as in LoRA+.
        weight_decay: The weight decay of these parameters; None for the optimizer's weight decay.
    """

    parameters: Sequence[nn.Parameter] = attrs.field(converter=tuple[nn.Parameter, ...])  # a generator is read once
    lr_scale: float = attrs.field(default=1.0, validator=_FACTOR)
    weight_decay: float | None = attrs.field(default=None, validator=_FACTOR)


@attrs.frozen(eq=False, field_transformer=checked)
class State:
    """A method's training state, which it needs beside the adapter's weights to resume training.

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

    Core finds the modules at the paths, and rejects an adapter whose shapes or values do not fit. If the model lacks a
    path, the adapter is for another base model.

    Attributes:
        factors: ΔW of each target as factors, by the target's path. A mapping may compute them at access. Empty if
            ``tensors`` describe the adapter; then it cannot be converted to another method.
        method: The method to convert the adapter to; if it is not installed, LoRA with the rank of each target.
        config: The settings of ``method``, if ``tensors`` are given: rank, scale and dropout, so that training can
            continue. Targets, copies and biases are in other fields.
        tensors: The adapter's tensors at each target, by the target's path and the name in a file of ``method``: for
            LoRA ``"a"`` (r, in) and ``"b"`` (out, r). If left out, the method builds its adapters from the factors.
        shared: The tensors of the module that the method's adapters share, by their names in the module.
        copies: The tensors of modules trained in full, by the module's path and the tensor's name in the module.
        biases: The trained biases, by their module's path.
        base: The name or path of the base model in the files; empty if they have none.
        remarks: One sentence for each setting in the files that the conversion loses, for a warning.
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
        if isinstance(value, Mapping) and not isinstance(value, dict):  # it may compute its values at access
            field, value = field.evolve(type=Mapping[str, Any]), dict.fromkeys(value)
        typed(self, field, value)


@attrs.frozen(field_transformer=checked)
class Description:
    """An adapter's files described without a model, for `tunerkit show` and to choose the base model.

    Attributes:
        method: The method, by its name in the other program.
        base: The name or path of the base model; empty if the files have none.
        model_class: The class of transformers that loaded the base, such as
            ``"AutoModelForSequenceClassification"``; empty if the files have none.
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
    """The options of a format without options."""


@attrs.frozen(eq=False, kw_only=True, field_transformer=checked)
class Holding:
    """Access to weights that a library offloads or shards.

    A plugin yields it from ``tunerkit_holdings``, with the functions that its library needs. Core needs values, shapes
    and ties only of parameters that are empty or on the meta device. All processes must call a function that gathers.

    Attributes:
        name: The library's name, as the subject of messages: "accelerate" offloads, "FSDP2" shards.
        package: The library's package; before it is imported, no function is called. "" to call them always.
        way_out: The alternative to an operation that such weights do not support, as a sentence fragment.
        one_dtype: Why trained parameters must share one dtype (a sentence fragment), or "".
        offloads: Whether a module's own weights are on the meta device, and loaded during its forward only.
        load: Returns an offloaded weight or buffer, by its module and name, detached, on the module's execution device.
        device: The execution device, to which the library moves a module and its input; None if it does not move them.
        forward: The instance-level forward that the library's wrapper calls; None if there is no wrapper, or if the
            wrapper does more than move tensors.
        identity: Returns a number that is equal for tied weights, by the module, name and tensor of an offloaded
            weight; None if the library does not offload it.
        duplicate: Returns a deep copy of a module with its weights on the execution device. The second argument maps
            the id of a submodule to its replacement in the copy. None if the library manages nothing in the module.
        shards: Whether a tensor is sharded, even while it is gathered.
        shape: The full shape of a sharded tensor, even while it is empty.
        part: This process's shard of a sharded tensor: a view, not a copy.
        gathered: Returns a context manager in which the parameters of a module and its children are gathered, and
            changes to them are lost. It yields a function (parameter name, full tensor) -> this process's shard of the
            tensor, as a copy.
        reshard_: Shards the weights of a model again that a forward has left gathered.
        lent: The reason why in-place writes to a module's weights are currently discarded (a sentence fragment); None
            if they persist.
        outside: Returns a context manager in which new modules are not sharded.
    """

    name: str = "an engine"
    package: str = ""
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
    """Verbs that do not work with a library, as a plugin yields them from ``tunerkit_restrictions``.

    Attributes:
        name: The name of the library, or of its part, in messages.
        refused: The reason and the alternative, by verb: ``"wrap"`` (and load), ``"attach"``, ``"save"``, ``"merge"``.
        classes: The qualified names of base classes of the library's modules or parameters, or of packages, with a dot
            at their end, for all their classes.
        marks: Attributes that the library sets on modules or parameters, with their value; None for any value.
        error: The exception to raise; by default `tunerkit.errors.AdapterError`.
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
    """The modules of a model that no checkpoint initialized, for certain or possibly.

    Attributes:
        loader: The name of the library's function that loads checkpoints, for messages.
        whole: The paths of modules in which all parameters are newly initialized.
        partly: The paths of modules with some newly initialized parameters.
        heads: The paths of output heads for which it cannot be determined whether they are new.
        replaced: The paths of replaced modules in numbered blocks, because of which ``heads`` may be new.
    """

    loader: str
    whole: tuple[str, ...] = ()
    partly: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()


Resized = tuple[Sequence[int], Sequence[int]]  # the shape that a weight needs, and the one that it has


@attrs.frozen(eq=False, kw_only=True, field_transformer=checked)
class ModelLibrary:
    """A library's knowledge of its models, as a plugin yields it from ``tunerkit_model_libraries``.

    For a model of another library, each function returns an empty answer, like the defaults.

    Attributes:
        applies: Whether a model, or a module in it, may be the library's. Otherwise no other function is called.
        heads: Returns the output heads that a module declares; called for every module of a model.
        new: Finds modules that no checkpoint initialized, which adapters train in full. The other arguments are the
            paths of modules in numbered blocks, and the paths of output heads and the modules in them.
        settings: Returns the settings that change the model's output but not its weights, by name, as values that JSON
            can hold. Adapter files record them; a base with other values is rejected.
        tied_flags: Returns the dotted names of a module's attributes that are True while weights in it are tied. A
            merge that unties the weights sets them to False, until it is undone.
        resize_hint: Returns how to load the model in the shapes that an adapter needs, as the end of a sentence.
    """

    applies: Callable[[nn.Module], bool] = lambda model: True
    heads: Callable[[nn.Module], Sequence[nn.Module]] = lambda module: ()
    new: Callable[[nn.Module, Collection[str], Collection[str]], NewModules | None] = lambda model, blocks, heads: None
    settings: Callable[[nn.Module], Mapping[str, Any]] = lambda model: {}
    tied_flags: Callable[[nn.Module], Sequence[str]] = lambda module: ()
    resize_hint: Callable[[nn.Module, Sequence[Resized]], str] = lambda model, resized: ""


# Any: a writer takes a `tunerkit.plugin.Tuner` and its own options, which this file cannot name.
@attrs.frozen(field_transformer=checked)
class Format:
    """Another program's file format for adapters, as a plugin yields it from ``tunerkit_formats``.

    Attributes:
        name: The name that users pass to `tunerkit.export`.
        sniff: Whether a path is an adapter in this format. The path may be a file, a folder or missing. Look only at
            names and at the beginning of a file, and do not raise.
        read: Reads the adapter at a path for a model, without changing the model. Raises `tunerkit.errors.FileError`,
            with the file and the key, for damaged files and for features that tunerkit does not support.
        write: Writes an adapter into an empty folder, and returns the files that it wrote. Core then moves them to the
            user's path.
        options: An attrs class with the options of ``write``; see `tunerkit.plugin.setting` for ranges.
            `tunerkit.export` takes them by name.
        describe: Describes the files at a path without a model; None if the format does not support this.
        config: Converts the program's config object, passed to `tunerkit.wrap` for a model, to a method and its
            settings; returns None for any other object.
    """

    name: str = attrs.field(validator=_PLAIN)
    sniff: Callable[[Path], bool]
    read: Callable[[Path, nn.Module], Foreign]
    write: Callable[[Any, Path, Any], Iterable[Path]]
    options: type = attrs.field(default=NoOptions, validator=_ATTRS)
    describe: Callable[[Path], Description] | None = None
    config: Callable[[object, nn.Module], tuple[str, Mapping[str, object]] | None] = lambda config, model: None
