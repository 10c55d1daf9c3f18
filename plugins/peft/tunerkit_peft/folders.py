"""Where the two files of a PEFT adapter lie: its settings and its tensors, here or on the Hugging Face hub."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import attrs

from tunerkit.plugin import FileError

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
PICKLE: Final = "adapter_model.bin"
_NAMES: Final = (CONFIG, WEIGHTS, PICKLE)
_OTHER_ADAPTERS: Final = (".safetensors", ".gguf")
_POINTER: Final = b"version https://git-lfs"
_BEGINNING: Final = 1_000_000  # bytes
_HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@attrs.frozen
class Files:
    """The files of one adapter.

    Attributes:
        config: The settings, ``adapter_config.json``.
        weights: The tensors, ``adapter_model.safetensors``.
    """

    config: Path
    weights: Path


def sniff(path: Path) -> bool:
    """Whether a path leads to a PEFT adapter: a folder with one of its files, such a file, or a name on the hub.

    So does a folder without any adapter around folders with one: the error that `find_files` raises names these.
    """
    try:
        if path.name in _NAMES:
            return path.is_file()
        if any((path / name).exists() for name in _NAMES):
            return any((path / name).is_file() for name in (WEIGHTS, PICKLE)) or _is_config(path / CONFIG)
        return bool(hub_name(path)) or _is_around(path)
    except (OSError, ValueError):  # a name that no file system allows
        return False


def _is_config(file: Path) -> bool:
    """Whether a file of settings says that it is PEFT's: core replaces what this is true of."""
    if not file.is_file():  # to open a pipe would wait for who writes into it
        return False
    with file.open("rb") as opened:
        return b'"peft_type"' in opened.read(_BEGINNING)


def _is_around(folder: Path) -> bool:
    if not folder.is_dir() or any(each.suffix in _OTHER_ADAPTERS for each in folder.iterdir()):
        return False
    return any(True for _ in _below(folder))


def hub_name(path: Path) -> str:
    """Return the path as the name of a repository on the hub, ``owner/name``; empty if it cannot be one.

    It cannot if anything lies at the path, or its first part is a folder here: then it is a mistyped path.
    """
    name = path.as_posix()
    if path.exists() or path.parent.exists() or path.suffix in (".safetensors", ".json", ".bin", ".gguf"):
        return ""
    return name if _HUB_NAME.fullmatch(name) else ""


def find_files(path: Path) -> Files:
    """Find the files of the adapter at a path, which may be a folder, one of the files, or a name on the hub.

    Raises:
        FileError: A file is missing, there is only a pickle, or the hub does not answer.
    """
    if name := hub_name(path):
        config, weights = download(name, (CONFIG, WEIGHTS))
        return Files(config, weights)
    folder = path.parent if path.name in _NAMES else path
    found = Files(folder / CONFIG, folder / WEIGHTS)
    if not folder.is_dir():
        raise FileError(f"there is no folder {folder}; pass the folder that holds {CONFIG} and {WEIGHTS}")
    if not found.weights.is_file() and (folder / PICKLE).is_file():
        raise FileError(
            f"{folder / PICKLE} is a pickle, which may run any code when it is read, so tunerkit never reads one. Load "
            "it with PEFT in an environment that you trust, and save it again, which writes "
            f"{WEIGHTS}: peft.PeftModel.from_pretrained(model, folder).save_pretrained(new_folder)"
        )
    for file in (found.config, found.weights):
        if not file.is_file():
            raise FileError(f"{folder} is no PEFT adapter: it has no {file.name}{_nearby(folder)}")
        _refuse_pointer(file)
    return found


def _refuse_pointer(file: Path) -> None:
    try:
        with file.open("rb") as opened:
            beginning = opened.read(len(_POINTER))
    except OSError as error:
        raise FileError(f"{file} cannot be read: {error.strerror or error}") from error
    if beginning == _POINTER:
        raise FileError(
            f"{file} is a pointer of git-lfs and not the file itself. Fetch the file in that repository with: git lfs "
            "pull"
        )


def _nearby(folder: Path) -> str:
    """A hint at the adapters one folder deeper: PEFT saves those with a name of their own there."""
    names = list(_below(folder))
    return f"; there are adapters in {', '.join(names[:5])}: pass one of these folders" if names else ""


def _below(folder: Path) -> Iterator[str]:
    yield from sorted(str(each.parent) for each in folder.glob(f"*/{CONFIG}"))


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
