"""Adapters on the Hugging Face hub, downloaded by name. The library is imported only here, and only when asked."""

from collections.abc import Sequence
from pathlib import Path

from tunerkit import FileError


def download(name: str, files: Sequence[str]) -> tuple[Path, ...]:
    """Download some files of a repository, and no others, and return their paths in the cache.

    Args:
        name: The repository, ``owner/name``.
        files: The names of the files in it.

    Raises:
        FileError: There is no such folder here, and the files cannot be had from the hub either.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise FileError(
            f"there is no folder {name!r}. To look for it on the Hugging Face hub, tunerkit needs huggingface_hub: "
            "pip install tunerkit-peft[hub]"
        ) from error
    try:
        return tuple(Path(hf_hub_download(name, file)) for file in files)
    # Any: no connection, no such repository, no such file, no permission, a full disk. The library has a class for
    # each, and lets those of its HTTP client through.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileError(
            f"there is no folder {name!r}, and the Hugging Face hub does not give {' and '.join(files)} of a "
            f"repository {name!r}: {reason}. Check the path, or the name and the connection"
        ) from error
