"""The keys of a file, grouped by the modules that they adapt."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

from torch import nn

from tunerkit.errors import closest
from tunerkit.plugin import BaseMismatchError, FileError

# The names of a module's tensors in the file, by what they are: "down", "up", "mid" or "alpha".
Parts: TypeAlias = dict[str, str]
# Parts by the module's name as the file spells it, by the part of the pipeline.
Groups: TypeAlias = dict[str, dict[str, Parts]]

# What an unknown key with one of these texts belongs to. None of it is LoRA.
_OTHERS: Final = (
    ("dora_scale", "DoRA"),
    ("lora_magnitude_vector", "DoRA"),
    ("hada_", "LoHa"),
    ("lokr_", "LoKr"),
    ("oft_", "OFT"),
    ("boft_", "BOFT"),
    ("glora_", "GLoRA"),
    ("on_input", "IA3"),
    ("lora_embedding_", "an adapted embedding"),
    (".diff", "a weight trained in full"),
    (".set_weight", "a weight trained in full"),
    ("lora_controlnet", "a Control LoRA"),
    (".bias", "a trained bias"),
)


class Key(NamedTuple):
    """What a key means: a part of the pipeline, a module as the file spells it, and what the tensor is."""

    component: str
    module: str
    part: str


def grouped(names: Iterable[str], parse: Callable[[str], Key | None], file: Path, expected: str) -> Groups:
    """Group a file's keys.

    Args:
        names: The keys.
        parse: Says what a key means; None for one that the format does not have.
        file: The file, for messages.
        expected: What keys look like, for messages.

    Raises:
        FileError: A key is of another method, unknown, or means the same as another one; or there are none.
    """
    groups: Groups = {}
    for name in names:
        key = parse(name)
        if key is None:
            _refuse_other(name, file)
            raise FileError(f"{file}: key {name!r} is unknown; expected {expected}. Remove it if it is not needed")
        parts = groups.setdefault(key.component, {}).setdefault(key.module, {})
        if key.part in parts:
            raise FileError(
                f"{file}: {name!r} and {parts[key.part]!r} are the same tensor of the same module; remove one"
            )
        parts[key.part] = name
    if not groups:
        raise FileError(f"{file} holds no tensors; expected {expected}")
    return groups


def _refuse_other(name: str, file: Path) -> None:
    for text, method in _OTHERS:
        if text in name:
            raise FileError(
                f"{file}: key {name!r} belongs to {method}, which tunerkit does not read from such files. Merge "
                "the adapter into its model with the program that wrote it, and use the merged model"
            )


def at_paths(
    modules: Mapping[str, Parts], spellings: Mapping[str, tuple[str, ...]], file: Path, model: nn.Module
) -> dict[str, Parts]:
    """Find the modules that a file names.

    Args:
        modules: The parts by the module's name in the file.
        spellings: The paths in the model that a name may stand for.
        file: The file, for messages.
        model: The model, for messages.

    Returns:
        The parts by path.

    Raises:
        BaseMismatchError: The model has no such module.
        FileError: A name stands for several modules, or two names for one.
    """
    found: dict[str, Parts] = {}
    for name, parts in modules.items():
        paths = spellings.get(name, ())
        key = repr(next(iter(parts.values())))
        if not paths:
            raise BaseMismatchError(
                f"{file}: key {key} names no linear or convolution layer of this {type(model).__name__} that such "
                f"files can adapt{closest(name, spellings)}; load it onto the model that it was trained on"
            )
        if len(paths) > 1:
            raise FileError(
                f"{file}: key {key} may stand for {' or '.join(map(repr, paths))} of this {type(model).__name__}; "
                "format 'diffusers' has names that are clear"
            )
        if paths[0] in found:
            other = repr(next(iter(found[paths[0]].values())))
            raise FileError(f"{file}: {key} and {other} both adapt {paths[0]!r}; remove one")
        found[paths[0]] = parts
    return found
