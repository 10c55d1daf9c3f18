"""Read Kohya's LoRA files, which sd-scripts, LyCORIS and many trainers write."""

from pathlib import Path
from typing import Final

from torch import nn

from tunerkit.plugin import BaseMismatchError, FileError, Foreign
from tunerkit_diffusers.components import component_to_read, components_of
from tunerkit_diffusers.keys import Key, at_paths, grouped
from tunerkit_diffusers.kohya_names import PREFIXES, spellings_of
from tunerkit_diffusers.lora_file import Header, files_at, header_of
from tunerkit_diffusers.places import places_of
from tunerkit_diffusers.weights import as_lora, other_parts, pairs_of

_PARTS: Final = {"lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "mid", "alpha": "alpha"}
EXPECTED: Final = (
    f"one of {', '.join(PREFIXES)}, a module's path with '_' for '.', and one of .{', .'.join(_PARTS)}, such as "
    "'lora_unet_conv_in.lora_down.weight'"
)


def sniff(path: Path) -> bool:
    """Check whether a path leads to such a file, by the names of the tensors in its header."""
    return bool(files_at(path, _accept))


def is_kohya(header: Header) -> bool:
    """Check whether a file has Kohya's names. Any one will do: reading names those that do not belong."""
    return any(name.startswith(tuple(PREFIXES)) for name in header.names)


def _accept(file: Path, header: Header | None) -> bool:
    return header is not None and is_kohya(header)


def read(path: Path, model: nn.Module) -> Foreign:
    """Read a file for a model, a UNet or a text encoder.

    Args:
        path: The file, or a folder that holds one such file.
        model: The base model, possibly on the meta device.

    Returns:
        The adapter as LoRA. The scale of each module is its alpha / r, or 1 without alpha, as in sd-scripts.

    Raises:
        FileError: The file is damaged, incomplete or no LoRA; or a name in it is ambiguous.
        BaseMismatchError: The file was made for another model.
    """
    file = file_at(path)
    groups = grouped(header_of(file).names, parse, file, EXPECTED)
    places = places_of(model)
    if components_of(model) == ("transformer",):
        raise BaseMismatchError(
            f"{file} has Kohya's names, which for a {type(model).__name__} follow the original checkpoint with q, k "
            "and v in one, and cannot be found in this model. Load the file into a pipeline of diffusers, save it with "
            "save_lora_adapter, and load that"
        )
    known = {part: spellings_of(places, part, model) for part in groups}
    chosen = component_to_read(groups, model, {name for part in known.values() for name in part}, file)
    modules = at_paths(groups[chosen], known[chosen], file, model)
    pairs = pairs_of(file, modules, places)
    alphas = {path: float(pair.rank) if pair.alpha is None else pair.alpha for path, pair in pairs.items()}
    return as_lora(pairs, alphas, remarks=other_parts(groups, chosen))


def file_at(path: Path) -> Path:
    """Return the file at a path. Raises `FileError` if there is none, or several."""
    files = files_at(path, _accept)
    if not files:
        raise FileError(f"{path} holds no file with Kohya's names; expected a .safetensors file with {EXPECTED}")
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise FileError(f"{path} holds {len(files)} adapters in format 'kohya': {names}; pass the path of one file")
    return files[0]


def parse(name: str) -> Key | None:
    """Say what a key means; None for one that Kohya's files do not have."""
    module, _, part = name.partition(".")
    prefix = max((prefix for prefix in PREFIXES if module.startswith(prefix)), key=len, default=None)
    if prefix is None or part not in _PARTS:
        return None
    return Key(PREFIXES[prefix], module.removeprefix(prefix), _PARTS[part])
