"""Open an adapter of any format: over its base, with its weights or without, or over what its header says of it."""

import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import tunerkit
from tunerkit import TunerkitWarning, serialization
from tunerkit.errors import BaseMismatchError
from tunerkit.layers import torch_private
from tunerkit.paths import join, parent
from tunerkit.plugin import Tuner
from tunerkit_transformers.base_choice import choose_base, with_base
from tunerkit_transformers.bases import Base, skeleton, whole
from tunerkit_transformers.pretrained import quiet

_CONVOLUTIONS: Mapping[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
Shapes = Mapping[str, Sequence[int]]


def open_adapter(source: str, *, base: str | None, task: str | None, beside: str | None = None) -> tuple[Tuner, Base]:
    """Open an adapter over its base on the meta device; its own tensors are on the CPU. No weight of the base is read.

    Only for a method whose adapters start from the base's weights, the base is loaded with them. ``base`` and ``task``
    are for what its files do not say; those of ``beside``, another adapter of the same base, may name it too. Raises
    `FileError` if there is no adapter, or a damaged one, or one of another base; and `ModelError` if the base cannot be
    found.
    """
    chosen = choose_base(source, base=base, task=task, beside=beside)
    model = skeleton(chosen)
    try:
        serialization.open_unloaded(model, source)
    except BaseMismatchError as problem:
        raise with_base(problem, chosen, model, source) from problem
    except NotImplementedError:  # torch's answer to a method that reads values on the meta device
        model = load_adapter(whole(chosen, dtype="auto"), source, chosen)
    return tunerkit.tuner(model), chosen


def load_adapter(model: nn.Module, source: str, base: Base) -> nn.Module:
    """Put an adapter into its base, which has its weights. Raises `FileError` as `tunerkit.load` does."""
    try:
        return tunerkit.load(model, source)
    except BaseMismatchError as problem:
        raise with_base(problem, base, model, source) from problem


def stand_in(shapes: Shapes, targets: Sequence[str], copies: Sequence[str], tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a model on the meta device with parameters of these shapes, as a header lists them.

    ``targets`` are the paths of the adapted modules, and ``copies`` those of the modules that are trained in full.
    ``tensors`` are the file's: copies and biases are parameters of the model too, and those of an adapter say which
    side of a weight is its input.
    """
    adapted, copied = {*targets}, {*copies}  # a file may list hundreds of thousands
    own: dict[str, dict[str, Sequence[int]]] = defaultdict(dict)
    widths: dict[str, set[int]] = defaultdict(set)
    for name, shape in shapes.items():
        own[parent(name)][name.rpartition(".")[2]] = shape
    for name, tensor in tensors.items():
        for found in re.finditer(r"\.adapter\.", name):
            widths[name[: found.start()]].update(tensor.shape[-1:])
        head, mark, rest = name.partition(".copy.")
        if mark and head in copied:
            own[parent(join(head, rest))][rest.rpartition(".")[2]] = tensor.shape
        elif name.endswith(".bias") and ".adapter." not in name and not mark:
            own[parent(name)]["bias"] = tensor.shape
    with torch.device("meta"):
        root = nn.Module()
        for path in sorted({*own, *targets, *copies}, key=lambda path: path.count(".") if path else -1):
            held = own.get(path, {})
            module = _module(held.get("weight", ()), widths[path]) if path in adapted else nn.Module()
            _place(root, path, module, held)
    return root


def _module(weight: Sequence[int], widths: set[int]) -> nn.Module:
    """A module whose forward is of the kind that this weight belongs to. ``widths`` are those of the adapter."""
    if len(weight) in _CONVOLUTIONS:
        found: nn.Module = _CONVOLUTIONS[len(weight)](weight[1], weight[0], tuple(weight[2:]))
        return found
    if len(weight) != 2:
        return nn.Module()
    if weight[1] in widths:
        return nn.Linear(weight[1], weight[0], bias=False)
    return nn.Embedding(weight[0], weight[1])  # or a Conv1D of transformers, whose weight is (in, out) as well


def _place(root: nn.Module, path: str, module: nn.Module, held: Shapes) -> None:
    """Put a module with its parameters at a path. What lies around it is there already, or is made now."""
    *around, name = path.split(".")
    inside = root
    for part in around:
        child = torch_private.own_children(inside).get(part)
        if child is None:
            inside.add_module(part, child := nn.Module())
        inside = child
    if path:
        inside.add_module(name, module)
    else:
        module = root
    for name, shape in held.items():
        torch_private.own_parameters(module).pop(name, None)
        module.register_parameter(name, nn.Parameter(torch.empty(tuple(shape)), requires_grad=False))


@contextmanager
def collected() -> Iterator[list[str]]:
    """Yield a list that gets each of our own warnings inside the block, once and as one line.

    The libraries are quiet from then on, and their warnings are left out.
    """
    found: list[str] = []

    def note(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        lines = str(message).replace(":\n- ", ": ").splitlines()
        text = "; ".join(line.removeprefix("- ").strip() for line in lines)
        if issubclass(category, TunerkitWarning) and text not in found:
            found.append(text)

    quiet()
    with warnings.catch_warnings():  # restores showwarning too
        warnings.simplefilter("always")
        warnings.showwarning = note
        yield found
