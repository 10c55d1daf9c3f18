# All names, and the modules that may be used after `import tunerkit` alone. Each name is exported by a package's
# __init__, under the same name. Until version 0.3, those of `tunerkit.plugin` are still here.
# A line for each name would make three pages of a list:
# ruff: noqa: I001
# fmt: off

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import pluggy
from torch import Tensor, nn

from . import errors as errors, patterns as patterns
from .api import (
    activate as activate, active as active, adapters as adapters, attach as attach, delete as delete,
    export as export, fit_start_ as fit_start_, freeze as freeze, from_folder as from_folder, no_sync as no_sync,
    param_groups as param_groups, reference as reference, rename as rename, thaw as thaw, unwrap as unwrap,
    wrap as wrap,
)
from .config import AdapterConfig as AdapterConfig, setting as setting, unstructure as unstructure
from .errors import (
    AdapterError as AdapterError, BaseMismatchError as BaseMismatchError, ConfigError as ConfigError,
    FileError as FileError, PluginError as PluginError, StepError as StepError, TargetError as TargetError,
    TunerkitError as TunerkitError, TunerkitWarning as TunerkitWarning, UnknownFormatError as UnknownFormatError,
    UnknownMethodError as UnknownMethodError,
)
from .hooks import (
    Engine as Engine, Pieces as Pieces, method_record as method_record, methods as methods, register as register,
    structure as structure, unregister as unregister, whole_pieces as whole_pieces,
)
from .injection import (
    Summary as Summary, Tuner as Tuner, biases_of as biases_of, copies_of as copies_of, factors_of as factors_of,
    trainable_parameters as trainable_parameters, tuner as tuner,
)
from .layers import (
    Adapter as Adapter, BaseLayer as BaseLayer, add_delta as add_delta, add_low_rank as add_low_rank,
    autocast_off as autocast_off, forward_name as forward_name, low_rank_delta as low_rank_delta,
    low_rank_factors as low_rank_factors, resize_ as resize_,
)
from .records import (
    DefaultTargets as DefaultTargets, Delta as Delta, Description as Description, Factors as Factors,
    Foreign as Foreign, Format as Format, Holding as Holding, Method as Method, MethodInfo as MethodInfo,
    ModelLibrary as ModelLibrary, NewModules as NewModules, Packing as Packing, ParamGroup as ParamGroup,
    RankChange as RankChange, Restriction as Restriction, Rounding as Rounding, State as State,
    Statistics as Statistics, StatisticsRequest as StatisticsRequest, Target as Target, WeightReader as WeightReader,
)
from .serialization import (
    disabled as disabled, load as load, load_state as load_state, merge as merge, rounding as rounding, save as save,
    save_state as save_state, unmerge as unmerge,
)
from .steps import (
    Cut as Cut, Growth as Growth, grow_ as grow_, optimizer_of as optimizer_of, resize_obstacle as resize_obstacle,
    shrink_ as shrink_,
)

__version__: str
hookimpl: pluggy.HookimplMarker

# What tunerkit-verbs brings. Its tests compare these lines with its functions.
_M = TypeVar("_M", bound=nn.Module)

class Gain(NamedTuple):
    rows: Tensor

class _FunctionPlugin(Protocol):
    config: Any
    method: Method
    def __call__(self, *args: Any, **arguments: Any) -> Any: ...

def calibrate(
    model: _M,
    batches: Iterable[Any],
    adapter: str | None = None,
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
) -> _M: ...
def method(
    name: str, *, sizes: Callable[[BaseLayer, Any], Mapping[str, int]] | None = None, **record: Any
) -> Callable[[Callable[..., Any]], _FunctionPlugin]: ...
def parameter(*shape: str | int, start: float | Callable[[Tensor], object] = 0.0, trained: bool = True) -> Any: ...
