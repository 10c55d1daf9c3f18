"""The header of tunerkit's files: JSON in the safetensors metadata, with a digest of the header and the tensors."""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import torch
from attrs.validators import deep_iterable, instance_of, optional
from torch import Tensor

from tunerkit.errors import FileError, cut, shown
from tunerkit.paths import few

KEY = "tunerkit"
FORMAT = 1
_LONGEST_NAME = 200  # characters of a method's name
_LARGEST_SETTING = 10**100
_LARGEST = 2**63  # counts and sizes are 64-bit integers to torch
_LARGEST_FLOAT = sys.float_info.max
# The digest detects damage, but not a header that someone edited and hashed again. So types and ranges are checked too.


def _is_count(instance: object, attribute: "attrs.Attribute[Any]", value: Any) -> None:
    if not _is_size(value):
        raise ValueError(f"{attribute.name}: expected an integer from 0 to 2**63 - 1, got {shown(value)}")


def _is_method(instance: object, attribute: "attrs.Attribute[Any]", value: Any) -> None:
    if not isinstance(value, str) or len(value) > _LONGEST_NAME:
        raise ValueError(f"{attribute.name}: expected the name of a method, got {shown(value)}")


def _is_config(instance: object, attribute: "attrs.Attribute[Any]", value: Any) -> None:
    """Check the type, and that no number is beyond what a method can compute with."""
    instance_of(dict)(instance, attribute, value)
    waiting: list[object] = [value]
    while waiting:
        match waiting.pop():
            case dict() as settings:
                waiting += settings.values()
            case list() as members:
                waiting += members
            case int() as number if abs(number) > _LARGEST_SETTING:
                raise ValueError(f"{attribute.name}: expected settings below 10**100, got {shown(number)}")


def _are_paths(instance: object, attribute: "attrs.Attribute[Any]", paths: Any) -> None:
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"{attribute.name}: expected a list of texts, got {shown(paths)}")
    if len(set(paths)) < len(paths):
        raise ValueError(f"{attribute.name}: a path is listed twice")


def _is_fingerprint(instance: object, attribute: "attrs.Attribute[Any]", entries: Any) -> None:
    if not isinstance(entries, dict):
        raise ValueError(f"{attribute.name}: expected an entry for each parameter, got {shown(entries)}")
    for name, entry in entries.items():
        match entry:
            case {"shape": list(shape), "dtype": str(), "sample": list(sample)} if (
                isinstance(name, str) and len(entry) == 3
            ):
                if not all(map(_is_size, shape)):
                    raise ValueError(f"{attribute.name}: expected an integer for each dimension, got {shown(shape)}")
                if not all(map(_is_finite, sample)):
                    raise ValueError(f"{attribute.name}: expected a finite number for each sample, got {shown(sample)}")
            case _:
                raise ValueError(f"{attribute.name}: expected a shape, a dtype and a sample, got {shown(entry)}")


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_finite(value: object) -> bool:
    return (type(value) is float or type(value) is int) and -_LARGEST_FLOAT <= value <= _LARGEST_FLOAT


def _is_change(instance: "Header", attribute: "attrs.Attribute[Any]", change: Any) -> None:
    listed = isinstance(change, list) and len(change) == 3 and isinstance(change[2], list)
    if not listed or len(change[2]) != len(instance.targets):
        raise ValueError(f"expected a step, a budget and a list of one rank per target, got {shown(change)}")
    for number in (*change[:2], *change[2]):
        _is_count(instance, attribute, number)


@attrs.frozen
class Header:
    """The fields of a header; docs/files.md explains each.

    ``base`` is the base model's fingerprint. ``values`` are JSON values: in a training state the method's own, in an
    adapter's file what it says of the base beyond ``base``. ``history`` has one ``[step, budget, [rank of each
    target]]`` per allocation (training state only).
    """

    kind: str = attrs.field(validator=instance_of(str))
    method: str = attrs.field(validator=_is_method)
    config: dict[str, Any] = attrs.field(validator=_is_config)
    targets: list[str] = attrs.field(validator=_are_paths)
    copies: list[str] = attrs.field(validator=_are_paths)
    biases: list[str] = attrs.field(validator=_are_paths)
    steps: int = attrs.field(validator=_is_count)
    total_steps: int | None = attrs.field(validator=optional(_is_count))
    versions: dict[str, str] = attrs.field(validator=instance_of(dict))
    base: dict[str, dict[str, list[float]]] = attrs.field(validator=_is_fingerprint)
    values: dict[str, Any] = attrs.field(factory=dict, validator=instance_of(dict))
    history: list[Any] = attrs.field(factory=list, validator=deep_iterable(_is_change, instance_of(list)))
    format: int = FORMAT

    @property
    def places(self) -> dict[str, list[str]]:
        """The paths of the adapted modules, by the field that lists them."""
        return {"targets": self.targets, "copies": self.copies, "biases": self.biases}


_Stored = Mapping[str, memoryview]  # the bytes of each tensor in a file


def encode(header: Header, tensors: Mapping[str, Tensor], stored: _Stored | None = None) -> dict[str, str]:
    """Return the safetensors metadata for ``tensors`` with this header. Raises `FileError` if JSON cannot hold it."""
    try:
        text = json.dumps(attrs.asdict(header, recurse=False), sort_keys=True, allow_nan=False)
    except ValueError as error:
        wrong = [name for name, value in header.values.items() if not _is_json(value)]
        raise FileError(
            f"the file's header cannot hold NaN, inf or values that contain themselves: {few(wrong, shown=5)}"
        ) from error
    return {KEY: text, f"{KEY}.digest": digest(text, tensors, stored)}


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


def is_ours(metadata: Mapping[str, str] | None) -> bool:
    """Whether a safetensors file with this metadata was written by tunerkit."""
    return metadata is not None and KEY in metadata and f"{KEY}.digest" in metadata


def decode(
    metadata: Mapping[str, str] | None,
    tensors: Mapping[str, Tensor],
    stored: _Stored | None = None,
    *,
    source: str,
    content: str,
) -> Header:
    """Verify the digest, then return the header. Raises `FileError` if the file is damaged or not ours."""
    if metadata is None or not is_ours(metadata):
        raise FileError(f"{source} is a safetensors file, but not one that tunerkit wrote (it has no tunerkit header)")
    text = metadata[KEY]
    if digest(text, tensors, stored) != metadata[f"{KEY}.digest"]:
        raise FileError(f"{source} is damaged: its digest does not match its content; copy or save it again")
    fields = _parse(text, source)
    if fields.get("format") != FORMAT:
        found = shown(fields.get("format"))
        raise FileError(f"{source} has format {found}, this tunerkit reads {FORMAT}; install a matching release")
    if problems := list(_wrong_fields(fields)):
        raise FileError(
            f"{source}: its header fields do not fit: {'; '.join(problems)}; a later tunerkit may have written the "
            "file, then install that release"
        )
    try:
        header = Header(**fields)
    except (TypeError, ValueError) as error:
        raise FileError(f"{source}: its header has a field that tunerkit would not write: {_reason(error)}") from error
    if header.kind != content:
        raise FileError(f"{source} holds {shown(header.kind)}, expected {content!r}: pass the other of the two files")
    return header


def _wrong_fields(fields: Mapping[str, Any]) -> Iterator[str]:
    expected = [field.name for field in attrs.fields(Header)]
    if missing := [name for name in expected if name not in fields]:
        yield f"missing {few(missing, shown=5)}"
    if unknown := [name for name in fields if name not in expected]:
        yield f"unknown {few(unknown, shown=5)}"


def _reason(error: TypeError | ValueError) -> str:
    return cut(str(error.args[0] if error.args else error), 400)


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{source}: the header is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise FileError(f"{source}: the header is not a JSON object")
    return fields


def digest(text: str, tensors: Mapping[str, Tensor], stored: _Stored | None = None) -> str:
    """Return the sha256 of the header's text and of each tensor's name, dtype, shape and bytes, sorted by name.

    Args:
        text: The header's text.
        tensors: The tensors by name.
        stored: Their bytes in a file, if there is one: reading them from many small tensors takes longer.
    """
    hasher = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        hasher.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            hasher.update(_bytes_of(tensor) if stored is None else stored[name])
    return hasher.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    found: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return found
