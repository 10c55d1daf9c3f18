"""Target selection: from a model and patterns to the modules to adapt or train."""

from tunerkit.targets.new_modules import choose_new, trained_elsewhere
from tunerkit.targets.resolution import from_paths, refuse_impassable, refuse_tied, refuse_unfit, resolve_modules
from tunerkit.targets.scan import Scan, ScannedModule, scan, tied
from tunerkit.targets.selection import select
from tunerkit.targets.ties import left_out
from tunerkit.targets.trained_in_full import choose_biases, choose_copies, copies_at, takes_bias
