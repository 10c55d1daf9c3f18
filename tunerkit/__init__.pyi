# The public names, and the modules that may be used after `import tunerkit` alone. Each name is exported by a package's
# __init__, under the same name.

from . import errors as errors, patterns as patterns
from .api import (
    activate as activate,
    active as active,
    adapters as adapters,
    attach as attach,
    calibrate as calibrate,
    delete as delete,
    export as export,
    freeze as freeze,
    from_folder as from_folder,
    no_sync as no_sync,
    param_groups as param_groups,
    rename as rename,
    thaw as thaw,
    unwrap as unwrap,
    wrap as wrap,
)
from .config import (
    AdapterConfig as AdapterConfig,
    setting as setting,
    unstructure as unstructure,
)
from .engine import Pieces as Pieces
from .errors import (
    AdapterError as AdapterError,
    BaseMismatchError as BaseMismatchError,
    ConfigError as ConfigError,
    FileError as FileError,
    PluginError as PluginError,
    StepError as StepError,
    TargetError as TargetError,
    TunerkitError as TunerkitError,
    TunerkitWarning as TunerkitWarning,
    UnknownFormatError as UnknownFormatError,
    UnknownMethodError as UnknownMethodError,
)
from .hooks import (
    methods as methods,
    register as register,
    structure as structure,
    unregister as unregister,
)
from .injection import (
    Summary as Summary,
    Tuner as Tuner,
    reference as reference,
    trainable_parameters as trainable_parameters,
    tuner as tuner,
)
from .layers import (
    Adapter as Adapter,
    BaseLayer as BaseLayer,
    PackedLinear as PackedLinear,
    add_low_rank as add_low_rank,
    low_rank_delta as low_rank_delta,
    low_rank_factors as low_rank_factors,
    resize_ as resize_,
)
from .libraries import forward_name as forward_name
from .markers import hookimpl as hookimpl
from .records import (
    DefaultTargets as DefaultTargets,
    Delta as Delta,
    Description as Description,
    Factors as Factors,
    Foreign as Foreign,
    Format as Format,
    Method as Method,
    MethodInfo as MethodInfo,
    Packing as Packing,
    ParamGroup as ParamGroup,
    RankChange as RankChange,
    Sharding as Sharding,
    State as State,
    Statistics as Statistics,
    StatisticsRequest as StatisticsRequest,
    Target as Target,
    WeightReader as WeightReader,
)
from .serialization import (
    Rounding as Rounding,
    disabled as disabled,
    load as load,
    load_state as load_state,
    merge as merge,
    rounding as rounding,
    save as save,
    save_state as save_state,
    unmerge as unmerge,
)
from .steps import (
    Cut as Cut,
    Growth as Growth,
    grow_ as grow_,
    optimizer_of as optimizer_of,
    resize_obstacle as resize_obstacle,
    shrink_ as shrink_,
)

__version__: str
__all__: list[str]
