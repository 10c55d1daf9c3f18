"""Say what the files of diffusers and Kohya hold, without a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tunerkit.plugin import Description, FileError
from tunerkit_diffusers import diffusers_names, diffusers_reading, kohya_reading
from tunerkit_diffusers.components import refuse_mixed
from tunerkit_diffusers.keys import Groups, Parts, grouped
from tunerkit_diffusers.lora_file import Stored, header_of, stored_of
from tunerkit_diffusers.metadata import settings_of, values_of
from tunerkit_diffusers.weights import refuse_missing

# What Kohya's trainer says in the metadata, by the names that `tunerkit show` gives it. The base is a file or a
# pipeline, and no part of one that could be loaded.
_KOHYA: Final = {
    "rank": "ss_network_dim",
    "alpha": "ss_network_alpha",
    "module": "ss_network_module",
    "arguments": "ss_network_args",
    "base_name": "ss_sd_model_name",
    "base_version": "ss_base_model_version",
    "architecture": "modelspec.architecture",
}


def describe_diffusers(path: Path) -> Description:
    """Describe a file of diffusers from its metadata, and from the names and shapes of its tensors.

    Paths and settings begin with the part of the pipeline if the file adapts several.

    Raises:
        FileError: The file is damaged, incomplete or no LoRA.
    """
    file = diffusers_reading.file_at(path)
    header = header_of(file)
    groups = grouped(header.names, diffusers_names.parse, file, diffusers_names.EXPECTED)
    refuse_mixed(groups, file)
    stored = stored_of(file)
    ranks: dict[str, int] = {}
    told: dict[str, object] = {"parts": [part for part in groups if part], "dtype": _dtype(groups, stored)}
    bases = set()
    for part, modules in groups.items():
        start = f"{part}." if len(groups) > 1 else ""
        ranks |= {start + module: _rank(module, parts, stored, file) for module, parts in modules.items()}
        if settings := settings_of(header.metadata, part, file):
            bases.add(settings.base)
            values = values_of(header.metadata, part, file)
            found = {
                "rank": settings.rank,
                "alpha": settings.alpha,
                "dropout": settings.dropout,
                "rslora": settings.rslora,
                "rank_pattern": values.get("rank_pattern") or {},
                "alpha_pattern": values.get("alpha_pattern") or {},
            }
            told |= {start + name: value for name, value in found.items()}
    return Description("lora", base=bases.pop() if len(bases) == 1 else "", ranks=ranks, settings=told)


def describe_kohya(path: Path) -> Description:
    """Describe a file of Kohya's from its metadata, and from the names and shapes of its tensors.

    Ranks go by the names in the file, such as ``lora_unet_conv_in``: the path in the model needs the model.

    Raises:
        FileError: The file is damaged, incomplete or no LoRA.
    """
    file = kohya_reading.file_at(path)
    header = header_of(file)
    groups = grouped(header.names, kohya_reading.parse, file, kohya_reading.EXPECTED)
    stored = stored_of(file)
    told = {name: header.metadata[key] for name, key in _KOHYA.items() if header.metadata.get(key)}
    return Description(
        "lora",
        ranks={
            next(iter(parts.values())).partition(".")[0]: _rank(module, parts, stored, file)
            for modules in groups.values()
            for module, parts in modules.items()
        },
        settings={"parts": list(groups), "dtype": _dtype(groups, stored), **told},
    )


def _rank(module: str, parts: Parts, stored: Mapping[str, Stored], file: Path) -> int:
    refuse_missing(module, parts, file)
    down, up = (stored[parts[half]].shape for half in ("down", "up"))
    # Ones at the end of a shape may be left out.
    if not down or not up or down[0] == 0 or (*up, 1)[1] != down[0]:
        raise FileError(
            f"{file}: {parts['down']!r} has shape {down} and {parts['up']!r} {up}, which are no (r, in) and (out, r); "
            "the file is damaged, fetch or export it again"
        )
    return down[0]


def _dtype(groups: Groups, stored: Mapping[str, Stored]) -> str:
    """How the matrices are stored; alphas may be stored otherwise."""
    names = [name for modules in groups.values() for parts in modules.values() for name in _matrices(parts)]
    return ", ".join(sorted({stored[name].dtype.lower() for name in names}))


def _matrices(parts: Parts) -> list[str]:
    return [name for part, name in parts.items() if part != "alpha"]
