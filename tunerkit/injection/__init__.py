"""Layer injection: put adapters into a model and take them out again."""

from tunerkit.injection.adapter_checks import WATCHED, note_used, refuse_lost, report, warn_of_base_changes
from tunerkit.injection.contents import biases_of, copies_of, factors_of, regrouped, trainable_parameters
from tunerkit.injection.delta import adapted_tensors, adds_nothing, is_untrained, untrained_copies
from tunerkit.injection.inject import activate_, build_each, completed, eject_, inject_, rename_, train_
from tunerkit.injection.preconditions import (
    check_name,
    prepared,
    refuse_idle_patterns,
    refuse_restricted,
    refuse_running,
    warn_of_limits,
)
from tunerkit.injection.slots import (
    Slot,
    Slots,
    apply_slots,
    base_modules,
    inside,
    is_called,
    is_merged,
    places_in,
    refuse_disabled,
    refuse_fixed,
    slots_of,
    walk,
)
from tunerkit.injection.tuner import (
    Adapters,
    Link,
    Progress,
    Summary,
    Tuner,
    Wrapped,
    as_hooks_see_it,
    engine_of,
    evaluating,
    is_frozen,
    modules_in,
    needs_steps,
    record,
    require_tuners,
    slots_in,
    training_state,
    tuner,
    tuners_of,
    wrapped_model,
    wrapped_of,
)
