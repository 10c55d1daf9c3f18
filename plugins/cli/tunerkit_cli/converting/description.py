"""What the files of an adapter say without its base model, for ``tunerkit show``.

A sound file of ours is described from its header, in a fraction of a second. Torch and the plugins are only imported
for files in other formats, and for what is damaged or from an earlier version.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import attrs
from safetensors import SafetensorError, safe_open

from tunerkit.errors import FileError

OWN = "tunerkit"  # the name of our own format
# The dtypes of an adapter's tensors in a file, as torch calls them. A file with others is read by torch.
_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool", "U8": "uint8"},
    **{"I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"},
}


@attrs.frozen
class Shown:
    """An adapter without its base model. What its files do not state is empty, 0 or None."""

    source: str
    format: str
    method: str
    base: str = ""
    model_class: str = ""
    labels: int = 0  # the number of classes of its head
    ranks: Mapping[str, int] = attrs.field(factory=dict)
    copies: tuple[str, ...] = ()  # the modules that are trained in full
    steps: int | None = None
    parameters: int | None = None  # the number of the adapter's values
    size: int = 0  # bytes of its files
    settings: Mapping[str, Any] = attrs.field(factory=dict)


def describe_adapter(source: str) -> Shown:
    """Describe the adapter at a path. Raises `FileError` if there is none, or if it cannot be read without its base."""
    if (known := _from_header(source)) is not None:
        return known
    from tunerkit import serialization
    from tunerkit_transformers.adapter_files import description_at

    format = serialization.format_at(source)
    if format is None:
        return _own(source)
    found = description_at(format, source)
    if found is None:
        raise FileError(
            f"{source} is an adapter in format {format.name!r}, which can only be read with its base model: tunerkit "
            f"convert {source} --to tunerkit --base DIR --out NEW, then show NEW"
        )
    files = Path(source).iterdir() if os.path.isdir(source) else [Path(source)]
    return Shown(
        source=source,
        format=format.name,
        method=found.method,
        base=found.base,
        model_class=found.model_class,
        labels=found.labels,
        ranks=dict(found.ranks),
        copies=tuple(found.copies),
        size=sum(file.stat().st_size for file in files if file.is_file()),
        settings=dict(found.settings),
    )


def _from_header(source: str) -> Shown | None:
    """Describe a file of tunerkit's; None if anything about it is unusual: reading it whole says what that is."""
    file = source if source.endswith(".safetensors") else os.path.join(source, "adapter.safetensors")
    if not os.path.isfile(file):
        return None
    try:
        with safe_open(file, framework="np"):  # refuses entries that overlap or do not fill the file
            content = Path(file).read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        entries = json.loads(content[8:start])
        metadata = entries.pop("__metadata__")
        if _digest(metadata["tunerkit"], entries, memoryview(content)[start:]) != metadata["tunerkit.digest"]:
            return None
        header = json.loads(metadata["tunerkit"])
        if (header["format"], header["kind"]) != (1, "adapter") or header["values"]["ranks"].keys() - header["targets"]:
            return None
        return Shown(
            source=source,
            format=OWN,
            method=header["method"],
            ranks={path: int(header["values"]["ranks"][path]) for path in header["targets"]},
            copies=tuple(header["copies"]),
            steps=header["steps"],
            parameters=sum(prod(entry["shape"]) for entry in entries.values()),
            size=len(content),
            settings=header["config"],
        )
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _digest(text: str, entries: Mapping[str, Any], data: memoryview) -> str:
    """The digest of a file, as docs/concepts/files.md defines it, from the entries of its tensors and their bytes."""
    hasher = hashlib.sha256(text.encode())
    for name, entry in sorted(entries.items()):
        hasher.update(f"\0{name}\0torch.{_DTYPES[entry['dtype']]}\0{tuple(entry['shape'])}\0".encode())
        hasher.update(data[slice(*entry["data_offsets"])])
    return hasher.hexdigest()


def _own(source: str) -> Shown:
    from tunerkit import serialization
    from tunerkit_transformers.adapter_files import refuse_absent

    refuse_absent(source)
    file, tensors, header = serialization.read(source, content="adapter")
    return Shown(
        source=source,
        format=OWN,
        method=header.method,
        ranks=_ranks(header.values.get("ranks"), header.targets),
        copies=tuple(header.copies),
        steps=header.steps,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        size=Path(file).stat().st_size,
        settings=header.config,
    )


def _ranks(found: object, targets: Sequence[str]) -> dict[str, int]:
    """The ranks that a header states, by target; none in files of versions that did not write them."""
    known = found if isinstance(found, Mapping) else {}
    return {path: known[path] for path in targets if type(known.get(path)) is int}
