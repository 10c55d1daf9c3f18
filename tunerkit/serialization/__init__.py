"""Serialization: adapter files, training states, merged weights."""

from tunerkit.serialization.adapter_file import load, read, save, save_tuner, warn_of_unspent_schedule
from tunerkit.serialization.merge import disabled, merge, refuse_permanent, restore_originals_, unmerge
from tunerkit.serialization.replacing import replace
from tunerkit.serialization.safetensors_file import file_at
from tunerkit.serialization.training_state import carry, forget_state_, load_state, restore_, save_state
