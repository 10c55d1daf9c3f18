"""Read and write tunerkit's files: JSON in the safetensors metadata, with a digest of this header and the tensors."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import attrs
from attrs.validators import deep_iterable, deep_mapping, instance_of, optional
from torch import Tensor

from tunerkit import hooks
from tunerkit.errors import FileError, TargetError, cut, shown
from tunerkit.extras import distribution, install, reader_of
from tunerkit.patterns import at_paths
from tunerkit.serialization import safetensors_file
from tunerkit.serialization.safetensors_file import bytes_of, file_at, metadata_at, plain

KEY = "tunerkit"
FORMAT = 1
_LONGEST_NAME = 200  # characters of a method's name
_LARGEST = 2**63  # counts and sizes are 64-bit integers to torch
_LARGEST_FLOAT = sys.float_info.max
# The public function that writes each kind of file.
_WRITERS = {"adapter": "save", "state": "save_state"}
_Attribute: TypeAlias = "attrs.Attribute[Any]"

# --- The fields -------------------------------------------------------------------------------------------------------
# The digest detects damage, but not a header that someone edited and hashed again. So types and ranges are checked too.


def _expect(what: str, is_right: Callable[[Any], bool]) -> Callable[[object, _Attribute, Any], None]:
    def check(instance: object, attribute: _Attribute, value: Any) -> None:
        if not is_right(value):
            raise ValueError(f"{attribute.name}: expected {what}, got {shown(value)}")

    return check


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and -_LARGEST_FLOAT <= value <= _LARGEST_FLOAT  # type: ignore[operator]


def _are_paths(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(x, str) for x in value) and len(set(value)) == len(value)


def _is_entry(value: object) -> bool:
    match value:
        case {"shape": list(shape), "dtype": str(), "sample": list(sample), **others} if not others:
            return all(map(_is_size, shape)) and all(map(_is_finite, sample))
    return False


def _is_change(instance: "Header", attribute: _Attribute, change: Any) -> None:
    match change:
        case [step, budget, list(ranks)] if len(ranks) == len(instance.targets):
            if all(map(_is_size, (step, budget, *ranks))):
                return
    raise ValueError(
        f"{attribute.name}: expected a step, a budget and a list of one rank per target, each an integer from 0 to "
        f"2**63 - 1, got {shown(change)}"
    )


_is_count = _expect("an integer from 0 to 2**63 - 1", _is_size)
_is_method = _expect("the name of a method", lambda value: isinstance(value, str) and len(value) <= _LONGEST_NAME)
_lists_paths = _expect("a list of texts, none of them twice", _are_paths)
_holds_entry = _expect("a shape of integers, a dtype and a sample of finite numbers", _is_entry)


@attrs.frozen
class Header:
    """The fields of a header; docs/concepts/files.md explains each.

    ``base`` is the base model's fingerprint. ``values`` are JSON values: in a training state the method's own, in an
    adapter's file what it says of the base beyond ``base``. ``history`` has one ``[step, budget, [rank of each
    target]]`` per allocation (training state only).
    """

    kind: str
    method: str = attrs.field(validator=_is_method)
    config: dict[str, Any] = attrs.field(validator=instance_of(dict))
    targets: list[str] = attrs.field(validator=_lists_paths)
    copies: list[str] = attrs.field(validator=_lists_paths)
    biases: list[str] = attrs.field(validator=_lists_paths)
    steps: int = attrs.field(validator=_is_count)
    total_steps: int | None = attrs.field(validator=optional(_is_count))
    versions: dict[str, str] = attrs.field(validator=instance_of(dict))
    base: dict[str, Any] = attrs.field(
        factory=dict, validator=deep_mapping(instance_of(str), _holds_entry, instance_of(dict))
    )
    values: dict[str, Any] = attrs.field(factory=dict, validator=instance_of(dict))
    history: list[Any] = attrs.field(factory=list, validator=deep_iterable(_is_change, instance_of(list)))
    format: int = FORMAT

    @property
    def places(self) -> dict[str, list[str]]:
        """The paths of the adapted modules, by the field that lists them."""
        return {"targets": self.targets, "copies": self.copies, "biases": self.biases}


# --- In the metadata --------------------------------------------------------------------------------------------------


def encode(header: Header, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the safetensors metadata for ``tensors`` with this header. Raises `FileError` if JSON cannot hold it."""
    try:
        text = json.dumps(attrs.asdict(header, recurse=False), sort_keys=True, allow_nan=False)
    except ValueError as error:
        raise FileError(f"the file's header cannot hold NaN, inf or values that contain themselves: {error}") from error
    return {KEY: text, f"{KEY}.digest": digest(text, tensors)}


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of the header's text and of each tensor's name, dtype, shape and bytes, sorted by name."""
    hasher = hashlib.sha256(text.encode())
    for name, tensor in sorted(plain(tensors).items()):
        hasher.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        hasher.update(bytes_of(tensor))
    return hasher.hexdigest()


def is_ours(metadata: Mapping[str, str] | None) -> bool:
    """Whether a safetensors file with this metadata was written by tunerkit."""
    return metadata is not None and KEY in metadata and f"{KEY}.digest" in metadata


def decode(metadata: Mapping[str, str], tensors: Mapping[str, Tensor], *, source: str, content: str) -> Header:
    """Verify the digest, then return the header. Raises `FileError` if the file is damaged or not ours."""
    if not is_ours(metadata):
        raise _not_ours(source)
    text = metadata[KEY]
    if digest(text, tensors) != metadata[f"{KEY}.digest"]:
        raise FileError(f"{source} is damaged: its digest does not match its content; copy or save it again")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{source}: the header is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise FileError(f"{source}: the header is not a JSON object")
    if fields.get("format") != FORMAT:
        found = shown(fields.get("format"))
        raise FileError(f"{source} has format {found}, this tunerkit reads {FORMAT}; install a matching release")
    lacking = [field.name for field in attrs.fields(Header) if field.name not in fields]
    try:
        if lacking:
            raise ValueError(f"it has no {lacking[0]!r}")
        header = Header(**fields)
    except (TypeError, ValueError) as error:
        why = cut(str(error.args[0] if error.args else error), 400)
        raise FileError(
            f"{source}: its header has a field that tunerkit would not write: {why}; if a later tunerkit wrote the "
            "file, install that release"
        ) from error
    if header.kind != content:
        raise FileError(f"{source} holds {shown(header.kind)}, expected {content!r}: pass the other of the two files")
    try:
        config = at_paths(header.config, header.targets, of_file=True)
    except TargetError as error:
        raise FileError(f"{source} has settings that cannot be used: {error}") from error
    return attrs.evolve(header, config=config)


def _not_ours(source: str) -> FileError:
    return FileError(f"{source} is a safetensors file, but not one that tunerkit wrote (it has no tunerkit header)")


# --- Files ------------------------------------------------------------------------------------------------------------


def write(place: Path, header: Header, tensors: Mapping[str, Tensor]) -> None:
    """Write a file of tunerkit's, completely or not at all, and not over a safetensors file of another program.

    One whose header cannot be read may be ours and damaged, and is replaced.
    """
    metadata = metadata_at(place)
    if metadata is not None and not is_ours(metadata):
        raise FileError(
            f"{place} is a safetensors file that tunerkit did not write, such as the weights of a model. Nothing was "
            "written, and it is unchanged. Save under another name or into another folder, or delete that file first"
        )
    stored = plain(tensors)
    safetensors_file.write(place, stored, encode(header, stored))


def read(path: str | os.PathLike[str], *, content: str) -> tuple[str, dict[str, Tensor], Header]:
    """Return the file's own path for messages, its tensors, and its header after all checks. Raises `FileError`."""
    place = file_at(path, content)
    source = str(place)
    if not os.path.isfile(place):
        try:
            names = os.listdir(place.parent)
        except (OSError, ValueError):
            names = []
        _refuse_foreign(place.parent, [place.parent.name, *names], ())
        raise FileError(
            f"there is no file {source}; tunerkit.{_WRITERS[content]} writes {content}.safetensors into the folder "
            "it is given"
        )

    def accept(metadata: Mapping[str, str], names: Collection[str]) -> None:
        if not is_ours(metadata):
            _refuse_foreign(place, [place.name], names)
            raise _not_ours(source)

    tensors, metadata = safetensors_file.read(place, accept)
    return source, tensors, decode(metadata, tensors, source=source, content=content)


def is_foreign(path: str) -> bool:
    """Whether an adapter of another program lies at ``path``, by the names of files: no plugin need read it."""
    place = Path(path)
    inside = os.listdir(place) if os.path.isdir(place) else []  # a path that no file system allows is no folder
    return reader_of([place.name, *inside]) is not None


def _refuse_foreign(place: Path, files: Collection[str], tensors: Collection[str]) -> None:
    if (found := reader_of(files, tensors)) is not None:
        installed = not hooks.gather_formats().keys().isdisjoint(found.formats)
        reader = distribution(found.extra)
        known = ", which is installed and cannot read this: pass the folder or the file that holds the adapter"
        raise FileError(
            f"{place} holds an adapter in the format of {found.program}. tunerkit itself does not read it: that takes "
            f"the distribution {reader}{known if installed else f' ({install(found.extra)})'}. Without it, use "
            f"{found.instead}"
        )
