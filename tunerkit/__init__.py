"""tunerkit: adapters for torch models, with methods that are plugins."""

from tunerkit import registry as _registry
from tunerkit._markers import hookimpl
from tunerkit.adapter import Adapter
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
from tunerkit.files import load, load_state, save, save_state
from tunerkit.lowrank import add_low_rank, low_rank_delta
from tunerkit.merge import disabled, merge, unmerge
from tunerkit.records import Delta, Method, MethodInfo, RankChange, State, Target
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
    "add_low_rank",
    "attach",
    "disabled",
    "hookimpl",
    "load",
    "load_state",
    "low_rank_delta",
    "merge",
    "methods",
    "register",
    "save",
    "save_state",
    "setting",
    "structure",
    "trainable_parameters",
    "tuner",
    "unmerge",
    "unregister",
    "unstructure",
    "unwrap",
    "wrap",
]
