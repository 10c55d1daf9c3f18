"""Layer injection: put adapters into a model and take them out again."""

from tunerkit.injection.base_changes import shapes_of, warn_of_base_changes
from tunerkit.injection.build import build, build_each
from tunerkit.injection.delta import adapted_tensors
from tunerkit.injection.idle import adds_nothing, is_untrained, untrained_copies
from tunerkit.injection.inject import activate_, eject_, inject_, rename_, train_
from tunerkit.injection.integrity import refuse_lost
from tunerkit.injection.measuring import Loss, loss_of, measure
from tunerkit.injection.merged_state import is_merged, refuse_disabled, refuse_fixed
from tunerkit.injection.modes import evaluating
from tunerkit.injection.parameter_count import Summary, trainable_parameters
from tunerkit.injection.parameter_groups import regrouped
from tunerkit.injection.preconditions import check_name, ready_model, refuse_idle_patterns, warn_of_limits
from tunerkit.injection.progress import Link, Progress
from tunerkit.injection.reference import Reference, reference
from tunerkit.injection.root import inside
from tunerkit.injection.running import refuse_running
from tunerkit.injection.slots import Slot, Slots, apply_slots, base_modules, is_called, slots_of, walk
from tunerkit.injection.tuner import (
    Tuner,
    is_frozen,
    require_tuners,
    takes_part,
    tuner,
    tuners_of,
    unseen,
    wrapped_model,
    wrapped_of,
)
from tunerkit.injection.uncalled import report
