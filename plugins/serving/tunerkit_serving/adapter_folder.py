"""A PEFT folder as engines see it: its settings, the names and shapes of its tensors, and pairs of factors."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from tunerkit.errors import shown
from tunerkit.plugin import FileError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
_PREFIX: Final = "base_model.model."
_LARGEST: Final = 10_000_000  # characters of settings: 100,000 patterns fit
_LEVEL: Final = ".base_layer"
_HALVES: Final = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".lora_A": "a",
    ".lora_B": "b",
}


@attrs.frozen
class Pair:
    """The two factors of a module: the names of their tensors, their shapes and their rank."""

    a: str
    b: str
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return self.a_shape[0]

    @property
    def is_embedding(self) -> bool:
        """Whether A is (r, vocabulary), for a lookup."""
        return "lora_embedding_A" in self.a


@attrs.frozen
class Folder:
    """A folder that PEFT wrote, or somebody for PEFT.

    Attributes:
        path: Where it is.
        config: What its ``adapter_config.json`` says.
        pairs: The factors by the path of their module.
        others: The shapes of all other tensors, by name.
    """

    path: Path
    config: Mapping[str, Any]
    pairs: Mapping[str, Pair]
    others: Mapping[str, tuple[int, ...]]

    @property
    def kind(self) -> str:
        """PEFT's name of the method, such as ``"LORA"``."""
        return str(self.config.get("peft_type", ""))

    @property
    def is_lora(self) -> bool:
        """Whether the method is LoRA, so that the factors need nothing but a scale."""
        return self.kind == "LORA"

    @property
    def r(self) -> int:
        """The rank that the settings name."""
        return int(self.config["r"])

    @property
    def alpha(self) -> float:
        """The numerator of the scale."""
        return float(self.config["lora_alpha"])

    @property
    def ranks(self) -> frozenset[int]:
        """The ranks of all modules, by their tensors; those of packed experts say nothing of the rank of one."""
        return frozenset(pair.rank for path, pair in self.pairs.items() if path not in self.packed)

    @property
    def packed(self) -> frozenset[str]:
        """The paths at which PEFT has packed all experts of a parameter into one pair."""
        names = self.config.get("target_parameters")
        owners = [str(name).rpartition(".")[0] or "experts" for name in names] if isinstance(names, list) else []
        experts = {path.removesuffix(_LEVEL) for path in self.pairs}
        experts = {path for path in experts if any(f".{path}".endswith(f".{owner}") for owner in owners)}
        return frozenset(path for path in self.pairs if path.removesuffix(_LEVEL) in experts)

    @property
    def rank(self) -> int:
        """The rank that a server must allow."""
        return max({self.r, *self.ranks}) if self.is_lora else max(self.ranks, default=0)

    @property
    def summary(self) -> str:
        """What it is, in a few words."""
        ranks = sorted(self.ranks) or [self.r]
        said = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        return f"{self.kind} of {len(self.pairs)} modules, {said}"

    @property
    def base(self) -> str:
        """The base model's name, or a placeholder for it."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else "BASE"

    def product(self, path: str) -> "Tensor":
        """Return B·A of a module, unscaled, in float32, with the shape of its weight."""
        from safetensors import safe_open

        pair = self.pairs[path]
        with safe_open(self.path / WEIGHTS, framework="pt") as file:
            a: Tensor = file.get_tensor(pair.a).float()
            b: Tensor = file.get_tensor(pair.b).float()
        if pair.is_embedding:
            return (b @ a).T
        return (b.flatten(1) @ a.flatten(1)).reshape(b.shape[0], *a.shape[1:])


def read_folder(path: Path) -> Folder:
    """Read the settings and the names and shapes of the tensors, not the tensors.

    Args:
        path: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        What is in it.

    Raises:
        FileError: A file is missing or damaged, a setting that scales is not a number, or half of a pair is missing.
    """
    config = _config(path / CONFIG)
    _check_names(path / CONFIG, config)
    shapes = _shapes(path / WEIGHTS)
    pairs, others = _pairs(path / WEIGHTS, shapes)
    folder = Folder(path, config, pairs, others)
    if folder.kind in ("LORA", "ADALORA"):
        _check_numbers(path / CONFIG, config)
        if not pairs:
            raise FileError(f"{path / WEIGHTS}: it has no tensor of LoRA, such as '….q_proj.lora_A.weight'")
    return folder


def _config(file: Path) -> Mapping[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        if len(text) > _LARGEST:
            raise ValueError(f"{len(text)} characters are too many")
        config = json.loads(text)
    except (OSError, ValueError, RecursionError) as problem:
        raise FileError(f"{file}: it cannot be read as JSON: {problem}; is this a folder of PEFT?") from problem
    if not isinstance(config, dict):
        raise FileError(f"{file}: expected a mapping of settings, got {shown(config)}")
    return config


def _shapes(file: Path) -> Mapping[str, tuple[int, ...]]:
    if not file.is_file():
        pickled = (
            " adapter_model.bin is a pickle: save it with PEFT as safetensors." * file.with_suffix(".bin").exists()
        )
        raise FileError(f"{file}: no such file.{pickled}")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118  no mapping
    except (OSError, SafetensorError) as problem:
        raise FileError(f"{file}: it is not a file of safetensors: {problem}") from problem


def _pairs(
    file: Path, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Mapping[str, Pair], Mapping[str, tuple[int, ...]]]:
    halves: dict[str, dict[str, str]] = {}
    others: dict[str, tuple[int, ...]] = {}
    for name in shapes:
        ending = next((ending for ending in _HALVES if name.endswith(ending)), None)
        if ending is None:
            others[name] = shapes[name]
        else:
            module = name.removesuffix(ending).removeprefix(_PREFIX)
            halves.setdefault(module, {})[_HALVES[ending]] = name
    for module, names in halves.items():
        if set(names) != {"a", "b"}:
            missing = "lora_B" if "a" in names else "lora_A"
            raise FileError(f"{file}: {module} has no {missing}; both halves are needed: save the adapter again")
    pairs = {m: Pair(n["a"], n["b"], shapes[n["a"]], shapes[n["b"]]) for m, n in sorted(halves.items())}
    for module, pair in pairs.items():
        if len(pair.a_shape) < 2 or len(pair.b_shape) < 2 or pair.a_shape[0] != pair.b_shape[1]:
            raise FileError(
                f"{file}: {module} has A of shape {pair.a_shape} and B of shape {pair.b_shape}; expected (r, in) and "
                "(out, r) with one r: save the adapter again"
            )
    return pairs, others


def _check_names(file: Path, config: Mapping[str, Any]) -> None:
    names = config.get("modules_to_save")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise FileError(f"{file}: modules_to_save: expected a list of names or null, got {shown(names)}")
    if not isinstance(config.get("use_rslora"), bool | None):
        raise FileError(f"{file}: use_rslora: expected true or false, got {shown(config['use_rslora'])}")


def _check_numbers(file: Path, config: Mapping[str, Any]) -> None:
    for key, kind in (("r", int), ("lora_alpha", float)):
        if not _is_number(config.get(key), kind):
            raise FileError(f"{file}: {key}: expected a number above 0, got {shown(config.get(key))}")
    if config.get("peft_type") != "LORA":  # the pattern of AdaLoRA has masks, which no engine reads
        return
    for key, kind in (("rank_pattern", int), ("alpha_pattern", float)):
        table = config.get(key) or {}
        if not isinstance(table, dict):
            raise FileError(f"{file}: {key}: expected a mapping of patterns to numbers, got {shown(table)}")
        for pattern, value in table.items():
            if not _is_number(value, kind):
                raise FileError(f"{file}: {key}: {shown(pattern)}: expected a number above 0, got {shown(value)}")


def _is_number(value: object, kind: type) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        return False
    return math.isfinite(value) and value > 0
