"""Serialization: adapter files, training states, merged weights."""

from tunerkit.serialization.adapter_file import (
    load,
    open_unloaded,
    save,
    save_tuner,
    tensors_of,
    warn_of_unspent_schedule,
    write_trained,
)
from tunerkit.serialization.atomic_writing import locked, replace, scratch_in, sync
from tunerkit.serialization.fingerprint import note_base
from tunerkit.serialization.formats import DEFAULT_FORMAT, SCRATCH, find_format, format_at, is_foreign, write_format
from tunerkit.serialization.header import read
from tunerkit.serialization.merge import (
    disabled,
    merge,
    merge_except_,
    refuse_permanent,
    refuse_unmergeable,
    restore_originals_,
    unmerge,
)
from tunerkit.serialization.packed_layers import dense_layers, replace_by_dense_, rounding
from tunerkit.serialization.safetensors_file import checked_path, file_at, folder_of
from tunerkit.serialization.tensor_checks import limit_for
from tunerkit.serialization.training_state import carry, load_state, restore_, save_state
