"""All checks, root causes first: which must pass before another one says anything."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from tunerkit_testing.cases import Check, name_of
from tunerkit_testing.checks import (
    batches,
    compiling,
    configs,
    cost,
    differentiating,
    driving,
    files,
    forward,
    merging,
    moving,
    precision,
    randomness,
    ranks,
    resuming,
    sharing,
    stacking,
    start,
    training,
)

_BUILT: Final = (start.check_building_keeps_the_base,)
_RUNS: Final = (*_BUILT, forward.check_forward_runs)
_PURE: Final = (forward.check_no_hidden_state, forward.check_same_in_inference)
_TRAINS: Final = (training.check_something_trains, training.check_steps_run, *_PURE)
_FILES: Final = (training.check_every_tensor_moves, *_PURE)
_STEPS: Final = (start.check_seed, training.check_every_tensor_moves)
_MERGES: Final = (
    merging.check_delta_is_what_forward_adds,
    training.check_steps_keep_the_base,
    files.check_saves_and_loads,  # a merged model is saved, too
)

# Each check with those that must pass first: if one of them fails, this one would only repeat it in other words.
NEEDS: Final[Mapping[Check, Sequence[Check]]] = MappingProxyType(
    {
        configs.check_config_round_trip: (),
        configs.check_bad_config_refused: (),
        start.check_building_keeps_the_base: (),
        forward.check_forward_runs: _BUILT,
        forward.check_forward_keeps_the_base: _RUNS,
        forward.check_inputs_unwritten: _RUNS,
        randomness.check_random_state: _RUNS,
        forward.check_no_hidden_state: (*_RUNS, forward.check_inputs_unwritten),
        forward.check_same_in_inference: _RUNS,
        forward.check_same_in_training: _PURE,
        randomness.check_dropout: (*_PURE, randomness.check_random_state, forward.check_same_in_training),
        forward.check_output_dtype: _RUNS,
        start.check_start: (*_BUILT, forward.check_forward_keeps_the_base, forward.check_inputs_unwritten, *_PURE),
        start.check_seed: (*_BUILT, randomness.check_random_state),
        sharing.check_shared_module_kept: _BUILT,
        sharing.check_shared_module_used: _BUILT,
        start.check_calibration_keeps_the_start: (start.check_start,),
        training.check_something_trains: _BUILT,
        training.check_steps_run: (*_RUNS, training.check_something_trains),
        training.check_only_the_adapter_trains: (training.check_steps_run,),
        training.check_gradients_reach_every_tensor: _TRAINS,
        differentiating.check_gradients_are_true: (training.check_gradients_reach_every_tensor,),
        batches.check_large_batch: (differentiating.check_gradients_are_true,),
        batches.check_row_by_row: (batches.check_large_batch,),
        training.check_every_tensor_moves: (*_TRAINS, training.check_gradients_reach_every_tensor),
        training.check_steps_keep_the_base: (*_TRAINS, forward.check_forward_keeps_the_base),
        training.check_fixed_stays_fixed: _TRAINS,
        training.check_loss_falls: (training.check_every_tensor_moves,),
        training.check_trains_beside_copies: (training.check_every_tensor_moves,),
        training.check_freezing: _TRAINS,
        training.check_param_groups: _TRAINS,
        driving.check_grad_scale: _STEPS,
        driving.check_accumulation: _STEPS,
        driving.check_trainings_do_not_meet: _STEPS,
        training.check_needs_steps: _TRAINS,
        driving.check_checkpointing: (training.check_gradients_reach_every_tensor,),
        precision.check_autocast: (forward.check_output_dtype, training.check_gradients_reach_every_tensor),
        precision.check_half_precision: (forward.check_output_dtype, training.check_gradients_reach_every_tensor),
        precision.check_bf16_base: (forward.check_output_dtype, training.check_every_tensor_moves),
        merging.check_fused_is_plain: _PURE,
        merging.check_delta_is_what_forward_adds: (*_PURE, forward.check_inputs_unwritten, forward.check_output_dtype),
        differentiating.check_delta_gives_gradients: (
            merging.check_delta_is_what_forward_adds,
            training.check_gradients_reach_every_tensor,
        ),
        merging.check_factors_are_the_delta: (merging.check_delta_is_what_forward_adds,),
        merging.check_builds_from_factors: (merging.check_factors_are_the_delta,),
        ranks.check_rank: (training.check_every_tensor_moves, merging.check_delta_is_what_forward_adds),
        ranks.check_budget: (training.check_every_tensor_moves,),
        merging.check_disabled_is_the_base: (training.check_steps_keep_the_base,),
        merging.check_unwraps: (training.check_steps_keep_the_base, merging.check_disabled_is_the_base),
        files.check_saves_and_loads: _FILES,
        files.check_state_is_all: (files.check_saves_and_loads,),
        randomness.check_other_process: (start.check_seed, files.check_saves_and_loads),
        files.check_other_rank_setting: (files.check_saves_and_loads,),
        files.check_other_ranks_load: (files.check_saves_and_loads,),
        merging.check_merges: _MERGES,
        merging.check_keeps_merged: (merging.check_merges,),
        stacking.check_stacked_first: (merging.check_merges,),
        stacking.check_stacked_second: (merging.check_merges,),
        resuming.check_resumes: (files.check_saves_and_loads, training.check_steps_keep_the_base),
        resuming.check_resumes_late: (resuming.check_resumes,),
        moving.check_deepcopy: _FILES,
        moving.check_pickle: (),
        moving.check_device: (forward.check_output_dtype, *_PURE),
        moving.check_offload: (forward.check_output_dtype, *_PURE),
        compiling.check_compiles: (*_PURE, randomness.check_random_state),
        cost.check_operations: (training.check_steps_run, *_PURE),
    }
)
CHECKS: Final[tuple[Check, ...]] = tuple(NEEDS)
BY_NAME: Final[Mapping[str, Check]] = MappingProxyType({name_of(check): check for check in CHECKS})
