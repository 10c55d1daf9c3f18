"""The verbs a user calls: each combines the groups below."""

from tunerkit.api.adapters import activate, active, adapters, delete, freeze, rename, thaw
from tunerkit.api.attach import attach
from tunerkit.api.calibrate import calibrate
from tunerkit.api.export import export
from tunerkit.api.folder import from_folder
from tunerkit.api.no_sync import no_sync
from tunerkit.api.param_groups import param_groups
from tunerkit.api.wrap import unwrap, wrap
