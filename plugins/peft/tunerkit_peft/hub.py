"""Adapters on the Hugging Face hub, downloaded by name. The library is imported only here, and only when asked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tunerkit.plugin import FileError

_SECONDS: Final = 10


def download(name: str, files: Sequence[str]) -> tuple[Path, ...]:
    """Download some files of a repository, and no others, and return their paths in the cache.

    Args:
        name: The repository, ``owner/name``.
        files: The names of the files in it.

    Raises:
        FileError: There is no such folder here, and the files cannot be had from the hub either.
    """
    try:
        from huggingface_hub import HfApi, hf_hub_download
    except ImportError as error:
        raise FileError(
            f"there is no folder {name!r}. To look for it on the Hugging Face hub, tunerkit needs huggingface_hub: "
            "pip install huggingface-hub"
        ) from error
    unreachable: Exception | None = None
    try:
        # Asked once, since a download is tried for half a minute: most often, the name is a mistyped path.
        HfApi().model_info(name, timeout=_SECONDS)
    except Exception as error:  # the library lets those of its HTTP client through
        unreachable = error
    try:
        # Without the hub, an earlier download will do.
        return tuple(Path(hf_hub_download(name, file, local_files_only=unreachable is not None)) for file in files)
    except Exception as error:  # no such file, no permission, a full disk: the library has a class for each
        reason = (str(unreachable or error).strip().splitlines() or [type(error).__name__])[0]
        raise FileError(
            f"there is no folder {name!r}, and the Hugging Face hub does not give {' and '.join(files)} of a "
            f"repository {name!r}: {reason}. Check the path, or the name and the connection"
        ) from error
