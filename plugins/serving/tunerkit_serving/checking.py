"""Check an adapter for engines."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from tunerkit.errors import closest, shown
from tunerkit.plugin import ConfigError, FileError
from tunerkit_serving import llama_cpp, mlx, ollama, sglang, tgi, vllm
from tunerkit_serving.adapter_folder import CONFIG, Folder, read_folder
from tunerkit_serving.findings import Engine, Finding
from tunerkit_serving.gguf_header import GgufAdapter, is_gguf, read_gguf
from tunerkit_serving.mends import quoted

ENGINES: Final = {module.ENGINE.name: module.ENGINE for module in (vllm, sglang, llama_cpp, ollama, mlx, tgi)}
_OTHER_NAMES: Final = {"llamacpp": "llama.cpp", "llama-cpp": "llama.cpp", "mlx-lm": "mlx", "lorax": "tgi"}
_OURS: Final = "adapter.safetensors"


def chosen(names: str) -> tuple[Engine, ...]:
    """Return the engines of a list such as ``"vllm,llama.cpp"``.

    Args:
        names: Names, divided by commas.

    Returns:
        Each engine once, in the order of the list.

    Raises:
        ConfigError: A name is unknown, or there is none.
    """
    given = [name.strip().lower() for name in names.split(",") if name.strip()]
    full = [_OTHER_NAMES.get(name, name) for name in given]
    unknown = [name for name in full if name not in ENGINES]
    if unknown or not full:
        named = shown(unknown[0]) if unknown else "named"
        hint = closest(unknown[0], [*ENGINES, *_OTHER_NAMES]) if unknown else ""
        raise ConfigError([f"--for: no engine {named}; known: {', '.join(ENGINES)}{hint}"])
    return tuple(ENGINES[name] for name in dict.fromkeys(full))


def usual(adapter: Folder | GgufAdapter) -> tuple[Engine, ...]:
    """Return the engines that read such a folder, or such a file, at all."""
    names = "vllm,sglang,tgi" if isinstance(adapter, Folder) else "llama.cpp,ollama"
    return chosen(names)


def check(adapter: Folder | GgufAdapter, engines: Iterable[Engine], max_rank: int | None = None) -> Sequence[Finding]:
    """Apply the rules of engines.

    Args:
        adapter: What is to be served.
        engines: Those that shall serve it.
        max_rank: The largest rank that the servers were started with; None for their defaults.

    Returns:
        The findings, engine by engine, the worst first.

    Raises:
        FileError: A pattern of the adapter is malformed.
    """
    return [finding for engine in engines for finding in engine.check(adapter, max_rank)]


def read(path: Path) -> Folder | GgufAdapter:
    """Read a PEFT folder or a GGUF file.

    Args:
        path: The folder or the file.

    Returns:
        What is in it. Tensors are not read.

    Raises:
        FileError: It is none of them, is damaged, or is tunerkit's own file.
    """
    if not path.exists():
        raise FileError(f"{path}: no such folder or file")
    if is_gguf(path):
        return read_gguf(path)
    if (path / CONFIG).is_file():
        return read_folder(path)
    if path.name == _OURS or path.suffix == ".safetensors" or (path / _OURS).is_file():
        out = quoted(path.with_suffix("").as_posix() + "-peft")
        raise FileError(
            f"{path}: engines do not read tunerkit's files; export it first: tunerkit convert {quoted(path)} --to peft "
            f"--out {out}"
        )
    raise FileError(f"{path}: expected a PEFT folder with {CONFIG}, or a GGUF file")
