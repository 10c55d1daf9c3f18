"""The verbs that users call. Each combines functions of the other packages."""

from tunerkit.api.adapters import activate, active, adapters, delete, freeze, reference, rename, thaw
from tunerkit.api.export import export, from_folder
from tunerkit.api.training import attach, fit_start_, no_sync, param_groups
from tunerkit.api.wrap import unwrap, wrap
