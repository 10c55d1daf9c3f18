"""Where the modules that a PEFT file names are in the user's model."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import product
from typing import Final

import attrs
from torch import nn

from tunerkit import FileError
from tunerkit.errors import first, shown

# PEFT wraps attention's output projection inside the wrapped attention.
INNER: Final = ".base_layer.out_proj"
_CHILD: Final = "tunerkit"  # where tunerkit keeps adapters, below the modules of the model
# Wrappers that a model gains or loses between versions of transformers, or between a head model and its body.
_WRAPPERS: Final = ("", "model.", "base_model.", "language_model.", "model.language_model.", "language_model.model.")
Rename = Callable[[str], str]


@attrs.frozen
class Place:
    """One adapted module.

    Attributes:
        path: Its path in the user's model.
        owner: The path by which PEFT's patterns name it: for attention's output projection, that of the attention.
        times: How often PEFT adds the product. It applies the one of attention's output projection twice: it adds it to
            the weight, and merges the same layer again.
    """

    path: str
    owner: str
    times: int


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's own modules by path, tied ones by each of their paths, and adapters left out."""
    named = model.named_modules(remove_duplicate=False)
    return {path: module for path, module in named if _CHILD not in path.split(".")}


def place_of(name: str, rename: Rename) -> Place:
    """Return the place of a module that a file calls ``name``."""
    if not name.endswith(INNER):
        return Place(rename(name), name, times=1)
    owner = name.removesuffix(INNER)
    return Place(f"{rename(owner)}.out_proj", owner, times=2)


def renaming(names: Iterable[str], modules: Mapping[str, nn.Module], prefix: str) -> tuple[Rename, tuple[str, ...]]:
    """Find how the paths of the file become those of the model, where a wrapper was added or taken away.

    Args:
        names: The paths of all adapted modules, as the file has them.
        modules: The model's modules.
        prefix: The name that a head model of transformers gives its body; may be empty.

    Returns:
        The function, and a remark if it changes paths. It changes none if any path is as in the model, or if several
        changes would fit: then the paths are reported as they are.
    """
    owners = [place_of(name, str).owner for name in names]
    wrappers = (*_WRAPPERS, f"{prefix}.") if prefix else _WRAPPERS
    if any(owner in modules for owner in owners):
        return str, ()
    found = {
        tuple(added + owner.removeprefix(gone) for owner in owners): (gone, added)
        for gone, added in product(dict.fromkeys(wrappers), repeat=2)
        if all(owner.startswith(gone) and added + owner.removeprefix(gone) in modules for owner in owners)
    }
    if len(found) != 1:
        return str, ()
    ((gone, added),) = found.values()
    remark = f"its modules are found under {added or 'the model itself'!r} instead of {gone or 'the model itself'!r}"
    return lambda path: _renamed(path, gone, added, modules), (remark,)


def _renamed(path: str, gone: str, added: str, modules: Mapping[str, nn.Module]) -> str:
    changed = added + path.removeprefix(gone)
    return changed if path.startswith(gone) and changed in modules else path


def refuse_convolutions(source: object, modules: Mapping[str, nn.Module], paths: Iterable[str], *, lora: bool) -> None:
    """Refuse convolutions in which PEFT adds something that is no change of the weight.

    Args:
        source: What an error is about.
        modules: The model's modules.
        paths: The paths of the targets.
        lora: Whether PEFT runs A as a convolution of its own, as for LoRA; AdaLoRA multiplies it into the weight.

    Raises:
        FileError: There are such convolutions.
    """
    wrong = [f"{path} ({reason})" for path in paths if (reason := _obstacle(modules.get(path), lora=lora))]
    if wrong:
        raise FileError(
            "\n- ".join(
                [
                    f"{source}: PEFT adds to the output of these convolutions, in a way that no change of their weight "
                    "does. Merge the adapter in the program that trained it, and use the merged model:",
                    *first(wrong),
                ]
            )
        )


def _obstacle(module: nn.Module | None, *, lora: bool) -> str:
    return next(_obstacles(module, lora=lora), "") if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else ""


def _obstacles(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, *, lora: bool) -> Iterator[str]:
    if module.groups > 1:
        yield f"groups {module.groups}"
    pairs = zip(module.kernel_size, module.dilation, strict=True)
    if lora and any(size > 1 and dilation > 1 for size, dilation in pairs):
        yield f"dilation {shown(module.dilation)}"
    padded = module.padding not in ("valid",) and any(each != 0 for each in module.padding)
    if module.padding_mode != "zeros" and padded:
        yield f"padding mode {module.padding_mode!r}"
