"""Read the LoRA files that diffusers writes."""

from pathlib import Path
from typing import Final

from torch import nn

from tunerkit.plugin import FileError, Foreign
from tunerkit_diffusers.components import component_to_read
from tunerkit_diffusers.diffusers_names import EXPECTED, is_diffusers, parse, spellings_of
from tunerkit_diffusers.keys import at_paths, grouped
from tunerkit_diffusers.kohya_reading import is_kohya
from tunerkit_diffusers.lora_file import Header, files_at, header_of
from tunerkit_diffusers.metadata import ENTRY, Settings, settings_of
from tunerkit_diffusers.places import places_of
from tunerkit_diffusers.weights import Pair, as_lora, other_parts, pairs_of

FILE: Final = "pytorch_lora_weights.safetensors"
_PICKLE: Final = "pytorch_lora_weights.bin"


def sniff(path: Path) -> bool:
    """Check whether a path leads to such a file, by its name and its header."""
    return bool(files_at(path, _accept)) or _pickle_at(path) is not None


def _accept(file: Path, header: Header | None) -> bool:
    if header is None or not header.names:
        return file.name == FILE  # reading says what is wrong with it
    if is_kohya(header):
        return False
    return file.name == FILE or ENTRY in header.metadata or any(map(is_diffusers, header.names))


def _pickle_at(path: Path) -> Path | None:
    try:
        return next((each for each in (path, path / _PICKLE) if each.name == _PICKLE and each.is_file()), None)
    except (OSError, ValueError):
        return None


def read(path: Path, model: nn.Module) -> Foreign:
    """Read a file for one model of the pipeline: a UNet, a transformer or a text encoder.

    Args:
        path: The file, or a folder that holds it.
        model: The base model, possibly on the meta device.

    Returns:
        The adapter as LoRA. Without metadata, the scale is alpha / r where the file has an alpha, else 1.

    Raises:
        FileError: The file is damaged, incomplete or no LoRA.
        BaseMismatchError: The file was made for another model.
    """
    file = file_at(path)
    header = header_of(file)
    groups = grouped(header.names, parse, file, EXPECTED)
    places = places_of(model)
    chosen = component_to_read(groups, model, spellings_of(places, "", model), file)
    modules = at_paths(groups[chosen], spellings_of(places, chosen, model), file, model)
    settings = settings_of(header.metadata, chosen, file)
    pairs = pairs_of(file, modules, places)
    remarks = other_parts(groups, chosen)
    if settings is None:
        return as_lora(pairs, {path: pair.alpha or float(pair.rank) for path, pair in pairs.items()}, remarks=remarks)
    alphas = {path: _alpha(path, pair, settings) for path, pair in pairs.items()}
    return as_lora(pairs, alphas, rslora=settings.rslora, dropout=settings.dropout, base=settings.base, remarks=remarks)


def _alpha(path: str, pair: Pair, settings: Settings) -> float:
    if pair.alpha is not None:
        raise FileError(
            f"{settings.file} has an alpha of {path!r} beside its tensors and another one in its metadata; remove one"
        )
    return settings.alpha_at(path, pair.rank)


def file_at(path: Path) -> Path:
    """Return the file at a path. Raises `FileError` if there is none, several, or a pickle."""
    files = files_at(path, _accept)
    if not files:
        if pickle := _pickle_at(path):
            raise FileError(
                f"{pickle} is a pickle, which could run code when it is read; load it with diffusers and save it again "
                "as safetensors"
            )
        raise FileError(f"{path} holds no LoRA of diffusers; expected {FILE}, with {EXPECTED}")
    named = [file for file in files if file.name == FILE] or files
    if len(named) > 1:
        names = ", ".join(file.name for file in named[:5])
        raise FileError(f"{path} holds {len(named)} adapters in format 'diffusers': {names}; pass the path of one file")
    return named[0]
