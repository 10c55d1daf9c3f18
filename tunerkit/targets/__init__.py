"""Target selection: from a model and patterns to the modules to adapt or train."""

from tunerkit.targets.eligibility import (
    left_out,
    quantiser_of,
    refuse_impassable,
    refuse_tied,
    refuse_unfit,
    warn_of_unknown_packed,
)
from tunerkit.targets.new_modules import choose_new, find_new, trained_elsewhere
from tunerkit.targets.scan import Scan, ScannedModule, from_paths, scan, tied
from tunerkit.targets.selection import select
from tunerkit.targets.trained_in_full import choose_biases, choose_copies, copies_at, takes_bias
