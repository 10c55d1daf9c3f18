"""The formats of other programs: which of them a path holds, and reading it through the plugin that knows it."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from tunerkit import hooks
from tunerkit.errors import (
    AdapterError,
    FileError,
    PluginError,
    TunerkitWarning,
    UnknownFormatError,
    closest,
    shown,
)
from tunerkit.libraries import FOREIGN_FORMATS, is_partitioned
from tunerkit.paths import few
from tunerkit.records import Factors, Foreign, Format
from tunerkit.serialization.header import is_ours
from tunerkit.serialization.safetensors_file import file_at, metadata_at

A = TypeVar("A")


def find_format(name: object) -> Format:
    """Return the format with this name. Raises `UnknownFormatError`, which names its distribution if it is known."""
    found = hooks.gather_formats()
    if isinstance(name, str) and name in found:
        return found[name]
    known = {each.format: each.distribution for each in FOREIGN_FORMATS}
    if isinstance(name, str) and name in known:
        raise UnknownFormatError(
            f"format {name!r} needs the distribution {known[name]}, which is not installed: pip install {known[name]}"
        )
    installed = few(sorted(found), shown=20) or "none (each is a separate distribution, such as tunerkit-peft)"
    raise UnknownFormatError(
        f"no format named {shown(name)}{closest(str(name).lower(), {*found, *known})}; installed: {installed}. "
        "tunerkit's own file is written by tunerkit.save"
    )


def format_at(path: str | os.PathLike[str]) -> Format | None:
    """Return the format of what lies at ``path``; None if a file of tunerkit's does, or nothing that is known.

    Raises:
        FileError: Adapters in several formats lie there.
    """
    place = file_at(path, "adapter")
    metadata = metadata_at(place)
    if is_ours(metadata) or (metadata is None and os.path.isfile(place) and place != Path(path)):
        return None  # a damaged file of ours is reported, and nothing else is loaded in its place
    found = [each for each in hooks.gather_formats().values() if sniffs(each, Path(path))]
    if len(found) > 1:
        raise FileError(
            f"{os.fspath(path)} holds adapters in the formats {' and '.join(each.name for each in found)}; pass the "
            "path of one file instead of the folder"
        )
    return found[0] if found else None


def sniffs(format: Format, path: Path) -> bool:
    """Whether a format takes what lies at ``path`` for its own. One that raises does not, with a warning."""
    try:
        return bool(format.sniff(path))
    except Exception as error:
        text = f"format {format.name!r} cannot say whether {path} is an adapter: {type(error).__name__}: {error}"
        warnings.warn(text, TunerkitWarning, stacklevel=2)
        return False


def read_foreign(format: Format, path: Path, model: nn.Module) -> Foreign:
    """Read an adapter of another program, and check that the plugin returned what its format declares.

    Raises:
        AdapterError: The model was partitioned by DeepSpeed, so that the plugin would compare empty parameters.
        PluginError: The plugin returned something else.
    """
    if any(map(is_partitioned, model.parameters())):
        raise AdapterError(
            f"{path} is in the format {format.name!r}, whose reader needs the base's own shapes and values, and "
            "deepspeed.zero.Init has partitioned these: load it onto a whole base in one process, tunerkit.save it "
            "there, and load that file here"
        )
    found: Any = asked(format, "read", lambda: format.read(path, model))  # Any: the plugin may return anything
    if not isinstance(found, Foreign):
        raise PluginError(f"read of format {format.name!r} returned {shown(found)}; it must return a tunerkit.Foreign")
    if wrong := list(_wrong_fields(found)):
        raise PluginError(
            f"read of format {format.name!r} returned a tunerkit.Foreign whose {few(wrong, shown=5)}; see its docstring"
        )
    checked: Foreign = found
    return checked


def product_at(found: Foreign, path: str, format: Format) -> Factors:
    """Return the product for one target, checked to be one."""
    product: Any = asked(format, "read", lambda: found.factors[path])  # Any: as above
    if not isinstance(product, Factors) or not all(map(_is_matrix, product)):
        raise PluginError(f"read of format {format.name!r} returned {shown(product)} for {path!r}; expected Factors")
    checked: Factors = product
    return checked


def asked(format: Format, function: str, call: Callable[[], A]) -> A:
    """Call a function of a plugin's format. Its errors keep their class and name the format."""
    try:
        return call()
    except Exception as error:
        error.add_note(f"raised by {function} of format {format.name!r}")
        raise


def _wrong_fields(found: Any) -> Iterator[str]:
    """Say of each field of a record what it must be and is not."""
    texts, mappings = (found.method, found.base), (found.factors, found.config)
    if not all(isinstance(each, str) for each in texts):
        yield "method and base must be texts"
    if not isinstance(found.remarks, tuple | list) or not all(isinstance(each, str) for each in found.remarks):
        yield "remarks must be a tuple of texts"
    if not all(isinstance(each, Mapping) for each in mappings):
        yield "factors and config must be mappings"
    if not _are_tensors(found.biases):
        yield "biases must be tensors by path"
    for name in ("tensors", "copies"):
        field = getattr(found, name)
        if not isinstance(field, Mapping) or not all(map(_are_tensors, field.values())):
            yield f"{name} must be mappings of tensors by path"
        elif name == "tensors" and field and field.keys() != set(found.factors):
            yield "tensors must have the paths of factors, or be empty"


def _are_tensors(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(each, Tensor) for each in value.values())


def _is_matrix(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and value.is_floating_point()
