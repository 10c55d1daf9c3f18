"""tunerkit: adapters for torch models, with methods that are plugins."""

from tunerkit.api import activate, active, adapters, attach, delete, freeze, rename, thaw, unwrap, wrap
from tunerkit.config import AdapterConfig, setting, unstructure
from tunerkit.errors import (
    AdapterError,
    BaseMismatchError,
    ConfigError,
    FileError,
    PluginError,
    StepError,
    TargetError,
    TunerkitError,
    TunerkitWarning,
    UnknownMethodError,
)
from tunerkit.hooks import hookimpl, structure
from tunerkit.hooks import registry as _registry
from tunerkit.injection import Summary, Tuner, trainable_parameters, tuner
from tunerkit.layers import Adapter, BaseLayer, add_low_rank, low_rank_delta
from tunerkit.records import Delta, Method, MethodInfo, RankChange, State, Target
from tunerkit.serialization import disabled, load, load_state, merge, save, save_state, unmerge
from tunerkit.steps import Cut, optimizer_of, resize_, shrink_

methods = _registry.methods
register = _registry.register
unregister = _registry.unregister

__all__ = [
    "Adapter",
    "AdapterConfig",
    "AdapterError",
    "BaseLayer",
    "BaseMismatchError",
    "ConfigError",
    "Cut",
    "Delta",
    "FileError",
    "Method",
    "MethodInfo",
    "PluginError",
    "RankChange",
    "State",
    "StepError",
    "Summary",
    "Target",
    "TargetError",
    "Tuner",
    "TunerkitError",
    "TunerkitWarning",
    "UnknownMethodError",
    "activate",
    "active",
    "adapters",
    "add_low_rank",
    "attach",
    "delete",
    "disabled",
    "freeze",
    "hookimpl",
    "load",
    "load_state",
    "low_rank_delta",
    "merge",
    "methods",
    "optimizer_of",
    "register",
    "rename",
    "resize_",
    "save",
    "save_state",
    "setting",
    "shrink_",
    "structure",
    "thaw",
    "trainable_parameters",
    "tuner",
    "unmerge",
    "unregister",
    "unstructure",
    "unwrap",
    "wrap",
]
