"""Serialization: adapter files, training states, merged weights."""

from tunerkit.serialization.adapter_file import load, open_unloaded, read, save, save_tuner
from tunerkit.serialization.base_check import note_base
from tunerkit.serialization.before_saving import (
    refuse_diverged,
    refuse_shards,
    refuse_untrained,
    tensors_of,
    warn_of_unspent_schedule,
    warn_of_untrained,
)
from tunerkit.serialization.dense import dense_layers, replace_by_dense_
from tunerkit.serialization.exporting import SCRATCH, write_format
from tunerkit.serialization.folders import folder_of, has_file
from tunerkit.serialization.formats import find_format, format_at
from tunerkit.serialization.merge import (
    disabled,
    merge,
    merge_except_,
    refuse_permanent,
    refuse_unmergeable,
    restore_originals_,
    unmerge,
)
from tunerkit.serialization.replacing import replace
from tunerkit.serialization.rounding import Rounding, rounding
from tunerkit.serialization.safetensors_file import checked_path, file_at
from tunerkit.serialization.scratch import locked, scratch_in
from tunerkit.serialization.training_state import carry, forget_state_, load_state, restore_, save_state
from tunerkit.serialization.written_once import written_once
