"""The folder of each adapter in a checkpoint."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from tunerkit.injection import Tuner
from tunerkit.serialization.safetensors_file import file_at


def folder_of(checkpoint: Path, tuners: Sequence[Tuner], tuner: Tuner) -> Path:
    """Return the folder of one adapter's files: the checkpoint itself if it is the only one, else a subfolder.

    If a subfolder exists because there were several adapters, it is used even after the others were deleted.
    """
    named = checkpoint / _folder_name(tuner.name)
    digest = checkpoint / _digest(tuner.name)
    # Earlier versions used the bare digest. If that is the name of another adapter, the folder is that one's.
    if has_file(digest, "adapter") and not has_file(named, "adapter") and digest.name not in {t.name for t in tuners}:
        named = digest
    return named if len(tuners) > 1 or has_file(named, "adapter") else checkpoint


def has_file(folder: Path, content: str) -> bool:
    """Whether the folder contains a file of this kind, ``"adapter"`` or ``"state"``."""
    return file_at(folder, content).is_file()


def _folder_name(name: str) -> str:
    """Return an adapter's name, if every file system can store and distinguish it, or a digest of it.

    Names may contain any character but "." and "/", and some file systems do not distinguish "a" from "A". The dot in
    front of a digest keeps it apart from every name.
    """
    return name if re.fullmatch(r"[a-z0-9_-]+", name) else f"name.{_digest(name)}"


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:16]
