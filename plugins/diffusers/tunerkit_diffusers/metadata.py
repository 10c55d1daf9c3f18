"""The settings of PEFT in a file's metadata, where diffusers keeps them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from tunerkit.errors import shown
from tunerkit.plugin import FileError
from tunerkit_diffusers.peft_patterns import PatternTable

ENTRY: Final = "lora_adapter_metadata"

# Settings that do not change what the adapter adds, or that are read below. All others must be off.
_HARMLESS: Final = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core", "loftq_config"),
    *("qalora_group_size", "runtime_config", "peft_type", "bias", "init_lora_weights", "ensure_weight_tying"),
}
# These starts change the base's weights, so that the adapter is none of the base.
_MOVING_STARTS: Final = ("pissa", "olora", "corda", "loftq", "lora_ga", "orthogonal")


@attrs.frozen
class Settings:
    """What a file says of its scale.

    Attributes:
        alpha: Alpha where no pattern says otherwise.
        rank: The rank where no pattern says otherwise.
        alpha_pattern: Alphas of some modules.
        rank_pattern: Ranks of some modules.
        rslora: Whether the scale is alpha/√r.
        dropout: The share of inputs that training drops.
        base: The name of the base model.
        file: The file, for messages.
    """

    alpha: float
    rank: int
    alpha_pattern: PatternTable
    rank_pattern: PatternTable
    rslora: bool
    dropout: float
    base: str
    file: Path

    def alpha_at(self, path: str, rank: int) -> float:
        """Return alpha at a module, whose tensors have a rank.

        Raises:
            FileError: The settings explain neither the rank nor one alpha.
        """
        known = self.rank_pattern.all_at(path) or {self.rank}
        if rank not in known:
            raise FileError(
                f"{self.file}: the tensors of {path!r} have rank {rank}, and r and rank_pattern in the metadata say "
                f"{' or '.join(map(str, sorted(known)))}; correct the metadata"
            )
        alphas = self.alpha_pattern.all_at(path) or {self.alpha}
        if len(alphas) > 1:
            several = " and ".join(map(str, sorted(alphas)))
            raise FileError(
                f"{self.file}: patterns in alpha_pattern give {path!r} the alphas {several}, and JSON keeps no order "
                "that tells which counts; write patterns of which one matches"
            )
        return float(next(iter(alphas)))


def settings_of(metadata: Mapping[str, str], component: str, file: Path) -> Settings | None:
    """Return the settings for a part of the pipeline; None if the file has none.

    Args:
        metadata: The metadata of the file.
        component: The part; ``""`` if the file's names have none.
        file: The file, for messages.

    Raises:
        FileError: They are damaged, or describe what tunerkit does not read.
    """
    own = values_of(metadata, component, file)
    return _settings(own, file) if own else None


def values_of(metadata: Mapping[str, str], component: str, file: Path) -> dict[str, Any]:
    """Return the settings for a part of the pipeline as they stand in the file; raises `FileError` if damaged."""
    text = metadata.get(ENTRY)
    if not text:
        return {}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{file}: {ENTRY} in the metadata is not JSON: {error}; export the file again") from error
    if not isinstance(values, dict):
        raise FileError(f"{file}: {ENTRY} in the metadata must be a JSON object, got {shown(values)}")
    start = f"{component}." if component else ""
    return {name.removeprefix(start): value for name, value in values.items() if name.startswith(start)}


def _settings(values: Mapping[str, Any], file: Path) -> Settings:
    _refuse_others(values, file)
    base = values.get("base_model_name_or_path")
    return Settings(
        alpha=_number(values, "lora_alpha", 8, file),
        rank=int(_number(values, "r", 8, file, whole=True)),
        alpha_pattern=PatternTable.of(_numbers(values, "alpha_pattern", file), file),
        rank_pattern=PatternTable.of(_numbers(values, "rank_pattern", file, whole=True), file),
        rslora=bool(values.get("use_rslora")),
        dropout=_dropout(values, file),
        base=base if isinstance(base, str) else "",
        file=file,
    )


def _refuse_others(values: Mapping[str, Any], file: Path) -> None:
    off: tuple[object, ...] = (None, False, "none", {}, [])
    kind = values.get("peft_type", "LORA")
    if kind not in ("LORA", None):
        raise FileError(
            f"{file}: peft_type is {shown(kind)} in the metadata, and tunerkit reads 'LORA' from such files"
        )
    for name, value in values.items():
        start = name == "init_lora_weights" and isinstance(value, str) and value.lower().startswith(_MOVING_STARTS)
        if (name not in _HARMLESS and value not in off) or (name == "bias" and value not in off) or start:
            raise FileError(
                f"{file}: setting {name!r} is {shown(value)} in the metadata, which tunerkit does not read from such "
                "files. Merge the adapter into its model with PEFT, and use the merged model"
            )


def _dropout(values: Mapping[str, Any], file: Path) -> float:
    value = values.get("lora_dropout", 0.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise FileError(f"{file}: lora_dropout in the metadata must be a number in [0, 1), got {shown(value)}")
    return float(value)


def _number(values: Mapping[str, Any], name: str, default: float, file: Path, *, whole: bool = False) -> float:
    return _checked(values.get(name, default), name, file, whole=whole)


def _numbers(values: Mapping[str, Any], name: str, file: Path, *, whole: bool = False) -> dict[str, float]:
    table = values.get(name) or {}
    if not isinstance(table, dict):
        raise FileError(f"{file}: {name} in the metadata must be a JSON object, got {shown(table)}")
    return {key: _checked(value, f"{name}[{key!r}]", file, whole=whole) for key, value in table.items()}


def _checked(value: object, name: str, file: Path, *, whole: bool) -> float:
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < float("inf"):
        expected = "a whole number" if whole else "a number"
        raise FileError(f"{file}: {name} in the metadata must be {expected} above 0, got {shown(value)}")
    return value
