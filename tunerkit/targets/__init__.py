"""Target selection: choose the modules to adapt or to train in full, from a model and patterns."""

from tunerkit.targets.eligibility import (
    left_out,
    lines,
    quantiser_of,
    refuse_impassable,
    refuse_tied,
    refuse_unfit,
    warn_of_unknown_packed,
)
from tunerkit.targets.scan import Scan, ScannedModule, from_paths, scan, tied
from tunerkit.targets.selection import select
from tunerkit.targets.trained_in_full import (
    choose_biases,
    choose_copies,
    choose_new,
    copies_at,
    find_new,
    takes_bias,
    trained_elsewhere,
)
