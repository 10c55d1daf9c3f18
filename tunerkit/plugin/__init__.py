"""The public names for plugin authors: the hook marker, records, base classes, functions on adapters and patterns.

A plugin imports `tunerkit`, `tunerkit.errors` and this package; a plugin for engines also `tunerkit.plugin.engines`,
and a plugin for trainers `tunerkit.plugin.trainers`. Each name is imported at its first use, as in `tunerkit`, so that
a module with commands does not import torch for the hook marker alone.
"""

import importlib
from typing import Any

import tunerkit
from tunerkit import hookimpl as hookimpl

__all__ = [
    *("hookimpl", "AdapterConfig", "setting", "Adapter", "BaseLayer", "Packing", "Engine", "Pieces"),
    *("whole_pieces", "Tuner", "factors_of", "copies_of", "biases_of", "Method", "MethodInfo", "Target"),
    *("WeightReader", "DefaultTargets", "ModelLibrary", "NewModules", "Restriction", "Holding", "forward_name"),
    *("Delta", "Factors", "Gain", "parameter", "add_delta", "add_low_rank", "low_rank_delta", "low_rank_factors"),
    *("autocast_off", "fit_start_", "Format", "Foreign", "Description"),
    *("Rounding", "State", "Statistics", "StatisticsRequest", "ParamGroup", "RankChange", "Cut", "Growth", "grow_"),
    *("shrink_", "optimizer_of", "resize_", "resize_obstacle", "Matcher", "exact_patterns", "file_matchers"),
    *("is_broad", "is_exact", "lookup", "matcher", "matches", "AdapterError", "BaseMismatchError", "ConfigError"),
    *("FileError", "PluginError", "StepError", "TargetError", "TunerkitError", "TunerkitWarning"),
    *("UnknownFormatError", "UnknownMethodError", "Summary", "method_record"),
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return vars(importlib.import_module("tunerkit.patterns")).get(name) or tunerkit.find(name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
