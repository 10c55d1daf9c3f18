"""Write one safetensors file, completely or not at all."""

import contextlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from tunerkit.errors import FileError

_SUFFIX = ".safetensors"


def write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> Path:
    """Write a safetensors file and return its path: to a temporary file, flushed to disk, then renamed."""
    if path.is_dir():
        raise FileError(f"cannot write {path}: it is a folder; a path that ends in {_SUFFIX} names the file itself")
    data = safetensors.torch.save(_apart(tensors), metadata)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:  # plain open: the file mode follows the user's umask
            file.writelines(_ordered(data))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}; an older file there is unchanged") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return path


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give each tensor its own storage: safetensors rejects tied tensors, which a trained copy may contain."""
    storages: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return found


def _ordered(data: bytes) -> tuple[bytes, memoryview]:
    """Sort the metadata, which safetensors writes in random order, so that equal adapters give equal bytes."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text, memoryview(data)[end:]


def file_at(path: str | os.PathLike[str], content: str) -> Path:
    """Return ``path`` if it ends in ``.safetensors``, else the file for ``content`` in that folder.

    Args:
        path: The file or the folder.
        content: The kind of file: ``"adapter"`` or ``"state"``.
    """
    try:
        place = Path(path)
    except TypeError:
        raise FileError(f"expected the path of a folder or a file, got {type(path).__name__} {path!r}") from None
    return place if place.suffix == _SUFFIX else place / f"{content}{_SUFFIX}"
