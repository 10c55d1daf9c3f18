"""Read and write tunerkit's files: JSON in the safetensors metadata, with a digest of this header and the tensors."""

import hashlib
import json
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from tunerkit.config import options_from, setting
from tunerkit.errors import ConfigError, FileError, TargetError, cut, shown
from tunerkit.patterns import at_paths
from tunerkit.serialization import safetensors_file
from tunerkit.serialization.formats import refuse_foreign
from tunerkit.serialization.safetensors_file import KEY, bytes_of, file_at, is_ours, metadata_at, plain

FORMAT = 1
_LONGEST_NAME = 200  # characters of a method's name
_SIZES = 2**63  # counts and sizes are 64-bit integers to torch
# The public function that writes each kind of file.
_WRITERS = {"adapter": "save", "state": "save_state"}

# --- The fields -------------------------------------------------------------------------------------------------------
# The digest detects damage, but not a header that someone edited and hashed again. So types and ranges are checked too.


@attrs.frozen(kw_only=True)
class Header:
    """The fields of a header; docs/concepts/files.md explains each. `tunerkit.config` checks the types.

    Raises:
        ValueError: A field has the right type, but an impossible value.
    """

    # All keys are strings, since JSON has no others.
    format: int = setting(FORMAT, doc="The number of the format.")
    kind: str = setting(doc="'adapter' or 'state'.")
    method: str = setting(doc="The method's name.")
    config: Mapping[Any, Any] = setting(doc="The method's settings.")
    targets: tuple[str, ...] = setting(doc="The paths of the adapted layers.")
    copies: tuple[str, ...] = setting(doc="The paths of the modules trained in full.")
    biases: tuple[str, ...] = setting(doc="The paths of the modules whose bias is trained.")
    steps: int = setting(ge=0, lt=_SIZES, doc="Optimizer steps taken.")
    total_steps: int | None = setting(ge=0, lt=_SIZES, doc="The length of training.")
    versions: Mapping[str, str] = setting(doc="Versions of distributions.")
    base: Mapping[Any, Any] = setting(doc="The fingerprint of the base model.")
    values: Mapping[Any, Any] = setting(doc="JSON values: the method's own state, or the base's settings.")
    history: tuple[Any, ...] = setting(doc="Allocations: step, budget, and the list of ranks by target.")

    def __attrs_post_init__(self) -> None:
        if len(self.method) > _LONGEST_NAME:
            raise ValueError(f"method: expected the name of a method, got {shown(self.method)}")
        for name, paths in self.places.items():
            if len(set(paths)) < len(paths):
                raise ValueError(f"{name}: expected distinct paths, got {shown(paths)}")
        for entry in self.base.values():
            if not _is_entry(entry):
                raise ValueError(
                    f"base: expected a shape of integers, a dtype and a sample of finite numbers, got {shown(entry)}"
                )
        for change in self.history:
            if not _is_change(change, len(self.targets)):
                raise ValueError(
                    "history: expected a step, a budget and a list of one rank per target, each an integer from 0 to "
                    f"2**63 - 1, got {shown(change)}"
                )

    @property
    def places(self) -> dict[str, tuple[str, ...]]:
        """The paths of the adapted modules, by the header's field that lists them."""
        return {"targets": self.targets, "copies": self.copies, "biases": self.biases}


# Without attrs validators, since a file may have a million of these numbers.
def _are_sizes(values: Sequence[Any]) -> bool:
    return {*map(type, values)} <= {int} and all(map(range(_SIZES).__contains__, values))


def _is_entry(entry: object) -> bool:
    match entry:
        case {"shape": list(shape), "dtype": str(), "sample": list(sample), **others} if not others:
            are_numbers = {*map(type, sample)} <= {int, float}
            return _are_sizes(shape) and are_numbers and all(map(sys.float_info.max.__ge__, map(abs, sample)))
    return False


def _is_change(change: object, targets: int) -> bool:
    match change:
        case [step, budget, list(ranks)] if len(ranks) == targets:
            return _are_sizes((step, budget, *ranks))
    return False


# --- In the metadata --------------------------------------------------------------------------------------------------


def encode(header: Header, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the safetensors metadata for ``tensors`` with this header. Raises `FileError` if JSON cannot hold it."""
    try:
        text = json.dumps(attrs.asdict(header, recurse=False), sort_keys=True, allow_nan=False)
    except ValueError as error:
        raise FileError(f"the file's header cannot hold NaN, inf or self-referencing values: {error}") from error
    return {KEY: text, f"{KEY}.digest": digest(text, tensors)}


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of the header's text and of all tensors' names, dtypes, shapes and bytes, sorted by name."""
    hasher = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        hasher.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        hasher.update(bytes_of(tensor))
    return hasher.hexdigest()


def decode(metadata: Mapping[str, str], tensors: Mapping[str, Tensor], *, source: str, content: str) -> Header:
    """Verify the digest, and return the header. Raises `FileError` if the file is damaged or another program's."""
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
    try:
        header: Header = options_from(Header, fields)
    except ConfigError as error:
        why = cut("; ".join(error.problems), 400)
        raise FileError(
            f"{source}: its header has an invalid field, which this release would not write: {why}; if a later "
            "release of tunerkit wrote the file, install that one"
        ) from error
    if header.kind != content:
        raise FileError(f"{source} is a file of kind {shown(header.kind)}: pass the file of kind {content!r}")
    try:
        config = at_paths(header.config, header.targets, of_file=True)
    except TargetError as error:
        raise FileError(f"{source} has settings that cannot be used: {error}") from error
    object.__setattr__(header, "config", config)  # `attrs.evolve` would check all numbers again
    return header


def _not_ours(source: str) -> FileError:
    return FileError(f"{source} is a safetensors file, but not one that tunerkit wrote (it has no tunerkit header)")


# --- Files ------------------------------------------------------------------------------------------------------------


def write(place: Path, header: Header, tensors: Mapping[str, Tensor]) -> None:
    """Write a tunerkit file atomically. Raises `FileError` rather than overwrite another program's safetensors file.

    A file with an unreadable header is replaced, since it may be a damaged tunerkit file.
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
    """Read and check a file: return its path for messages, its tensors and its header. Raises `FileError`."""
    place = file_at(path, content)
    source = str(place)
    if not os.path.isfile(place):
        try:
            names = os.listdir(place.parent)
        except (OSError, ValueError):
            names = []
        refuse_foreign(place.parent, [place.parent.name, *names], ())
        raise FileError(
            f"there is no file {source}; tunerkit.{_WRITERS[content]} writes {content}.safetensors into the folder "
            "that you pass"
        )

    def accept(metadata: Mapping[str, str], names: Collection[str]) -> None:
        if not is_ours(metadata):
            refuse_foreign(place, [place.name], names)
            raise _not_ours(source)

    tensors, metadata = safetensors_file.read(place, accept)
    return source, tensors, decode(metadata, tensors, source=source, content=content)
