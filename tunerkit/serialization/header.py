"""The header of tunerkit's files: JSON in the safetensors metadata, with a digest of the header and the tensors."""

import hashlib
import json
import reprlib
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from attrs.validators import deep_iterable, deep_mapping, instance_of, optional
from torch import Tensor

from tunerkit.errors import FileError

KEY = "tunerkit"
FORMAT = 1
# The digest detects damage, but not a header that someone edited and hashed again. So the types are checked too.
_PATHS = deep_iterable(instance_of(str), instance_of(list))
_NUMBERS = deep_iterable(instance_of((int, float)), instance_of(list))


def _is_entry(instance: object, attribute: "attrs.Attribute[Any]", entry: Any) -> None:
    instance_of(dict)(instance, attribute, entry)
    if set(entry) != {"shape", "dtype", "sample"}:
        raise ValueError(f"expected a shape, a dtype and a sample, got {sorted(entry)}")
    instance_of(str)(instance, attribute, entry["dtype"])
    for numbers in (entry["shape"], entry["sample"]):
        _NUMBERS(instance, attribute, numbers)


def _is_change(instance: "Header", attribute: "attrs.Attribute[Any]", change: Any) -> None:
    instance_of(list)(instance, attribute, change)
    if len(change) != 3 or not isinstance(change[2], list) or len(change[2]) != len(instance.targets):
        raise ValueError(f"expected a step, a budget and a list of one rank per target, got {reprlib.repr(change)}")
    for number in (*change[:2], *change[2]):
        instance_of(int)(instance, attribute, number)


_FINGERPRINT = deep_mapping(instance_of(str), _is_entry, instance_of(dict))


@attrs.frozen
class Header:
    """The fields of a header; docs/files.md explains each.

    ``base`` is the base model's fingerprint, and ``values`` are the method's own JSON values. ``history`` has one
    ``[step, budget, [rank of each target]]`` per allocation (training state only).
    """

    kind: str = attrs.field(validator=instance_of(str))
    method: str = attrs.field(validator=instance_of(str))
    config: dict[str, Any] = attrs.field(validator=instance_of(dict))
    targets: list[str] = attrs.field(validator=_PATHS)
    copies: list[str] = attrs.field(validator=_PATHS)
    biases: list[str] = attrs.field(validator=_PATHS)
    steps: int = attrs.field(validator=instance_of(int))
    total_steps: int | None = attrs.field(validator=optional(instance_of(int)))
    versions: dict[str, str] = attrs.field(validator=instance_of(dict))
    base: dict[str, dict[str, list[float]]] = attrs.field(validator=_FINGERPRINT)
    values: dict[str, Any] = attrs.field(factory=dict, validator=instance_of(dict))
    history: list[Any] = attrs.field(factory=list, validator=deep_iterable(_is_change, instance_of(list)))
    format: int = FORMAT

    @property
    def places(self) -> dict[str, list[str]]:
        """The paths of the adapted modules, by the field that lists them."""
        return {"targets": self.targets, "copies": self.copies, "biases": self.biases}


def encode(header: Header, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the safetensors metadata for ``tensors`` with this header."""
    text = json.dumps(attrs.asdict(header, recurse=False), sort_keys=True, allow_nan=False)
    return {KEY: text, f"{KEY}.digest": digest(text, tensors)}


def decode(metadata: Mapping[str, str] | None, tensors: Mapping[str, Tensor], *, source: str, content: str) -> Header:
    """Verify the digest, then return the header. Raises `FileError` if the file is damaged or not ours."""
    if not metadata or KEY not in metadata or f"{KEY}.digest" not in metadata:
        raise FileError(f"{source} is a safetensors file, but not one that tunerkit wrote (it has no tunerkit header)")
    text = metadata[KEY]
    if digest(text, tensors) != metadata[f"{KEY}.digest"]:
        raise FileError(f"{source} is damaged: its digest does not match its content; copy or save it again")
    fields = _parse(text, source)
    if fields.get("format") != FORMAT:
        raise FileError(
            f"{source} has format {fields.get('format')!r}, this tunerkit reads {FORMAT}; install a matching release"
        )
    expected = {field.name for field in attrs.fields(Header)}
    if set(fields) != expected:
        raise FileError(f"{source}: header fields {sorted(fields)} are not {sorted(expected)}")
    try:
        header = Header(**fields)
    except (TypeError, ValueError) as error:
        raise FileError(f"{source}: its header has a field that tunerkit would not write: {error.args[0]}") from error
    if header.kind != content:
        raise FileError(f"{source} holds {header.kind!r}, expected {content!r}: pass the other of the two files")
    return header


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{source}: the header is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise FileError(f"{source}: the header is not a JSON object")
    return fields


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of the header's text and of each tensor's name, dtype, shape and bytes, sorted by name."""
    hasher = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        hasher.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()
