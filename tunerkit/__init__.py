"""tunerkit: adapters for torch models, with methods that are plugins."""

from tunerkit.api import (
    activate,
    active,
    adapters,
    attach,
    calibrate,
    delete,
    freeze,
    param_groups,
    rename,
    thaw,
    unwrap,
    wrap,
)
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
from tunerkit.injection import Summary, Tuner, reference, trainable_parameters, tuner
from tunerkit.layers import Adapter, BaseLayer, add_low_rank, low_rank_delta, low_rank_factors, resize_
from tunerkit.records import (
    DefaultTargets,
    Delta,
    Factors,
    Method,
    MethodInfo,
    ParamGroup,
    RankChange,
    State,
    Statistics,
    Target,
    Wanted,
    WeightReader,
)
from tunerkit.serialization import disabled, load, load_state, merge, save, save_state, unmerge
from tunerkit.steps import Cut, Growth, grow_, optimizer_of, resize_obstacle, shrink_

methods = _registry.methods
register = _registry.register
unregister = _registry.unregister

# Put adapters in and take them out
__all__ = ["load", "save", "structure", "unstructure", "unwrap", "wrap"]
# Use and inspect them
__all__ += ["disabled", "merge", "trainable_parameters", "tuner", "unmerge"]
# Manage several in one model
__all__ += ["activate", "active", "adapters", "delete", "freeze", "rename", "thaw"]
# Train them
__all__ += ["attach", "calibrate", "load_state", "param_groups", "reference", "save_state"]
# Find plugins
__all__ += ["hookimpl", "methods", "register", "unregister"]
# Write a method
__all__ += ["Adapter", "AdapterConfig", "BaseLayer", "add_low_rank", "low_rank_delta", "low_rank_factors", "setting"]
# Change sizes while training
__all__ += ["Cut", "Growth", "grow_", "optimizer_of", "resize_", "resize_obstacle", "shrink_"]
# Records
__all__ += ["DefaultTargets", "Delta", "Method", "MethodInfo", "RankChange", "State", "Summary", "Target", "Tuner"]
__all__ += ["Factors", "ParamGroup", "Statistics", "Wanted", "WeightReader"]
# Errors
__all__ += ["AdapterError", "BaseMismatchError", "ConfigError", "FileError", "PluginError", "StepError", "TargetError"]
__all__ += ["TunerkitError", "TunerkitWarning", "UnknownMethodError"]
