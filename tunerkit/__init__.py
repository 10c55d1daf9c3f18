"""tunerkit: adapters for torch models, with methods that are plugins."""

from tunerkit import registry as _registry
from tunerkit._markers import hookimpl
from tunerkit.adapter import Adapter
from tunerkit.adapters import activate, active, adapters, delete, freeze, rename, thaw
from tunerkit.attach import attach
from tunerkit.base_layers import BaseLayer
from tunerkit.configs import AdapterConfig, setting
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
from tunerkit.files import load, save
from tunerkit.lowrank import add_low_rank, low_rank_delta
from tunerkit.merge import disabled, merge, unmerge
from tunerkit.records import Delta, Method, MethodInfo, RankChange, State, Target
from tunerkit.resizing import Cut, resize_, shrink_
from tunerkit.resume import load_state, save_state
from tunerkit.steps import optimizer_of
from tunerkit.summary import Summary, trainable_parameters
from tunerkit.tuner import Tuner, tuner
from tunerkit.wrap import structure, unstructure, unwrap, wrap

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
