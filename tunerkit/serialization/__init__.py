"""Serialization: adapter files, training states, merged weights."""

from tunerkit.serialization.adapter_file import FILE_NAME, load, save, save_tuner, warn_of_unspent_schedule
from tunerkit.serialization.merge import disabled, merge, restore_originals_, unmerge
from tunerkit.serialization.training_state import (
    STATE_NAME,
    carry,
    forget_state_,
    load_state,
    load_tuner_state,
    restore_,
    save_state,
    save_tuner_state,
)
