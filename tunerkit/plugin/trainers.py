"""More names for a plugin with a trainer, beside `tunerkit.plugin`, in the order of `__all__`.

- Drive adapters: `engine_for` and `drive` connect them to the optimizer that the trainer builds, `detach` undoes it.
- Checkpoints: `save_tuner` and `restore_` write and read an adapter, `folder_of` names its folder.
- Files in the formats of other programs.
- The adapters in a model: `walk` yields the adapted modules, `slots_in` the modules of one adapter.
- Losses that use an output head's weight directly: `adapted_tensors` computes the adapted weight.
- The library's own layers, and texts for messages.

A trainer that lets a plugin call `tunerkit.attach` with its optimizer needs none of these.
"""

from tunerkit.hooks import budget, elsewhere, gather_formats, has_delta, lacking
from tunerkit.injection import (
    Slot,
    Slots,
    adapted_tensors,
    adds_nothing,
    base_modules,
    evaluating,
    inside,
    note_used,
    refuse_fixed,
    regrouped,
    slots_in,
    walk,
    warn_of_base_changes,
)
from tunerkit.layers import DenseLinear, EmbeddingLayer, is_named, is_sharded
from tunerkit.serialization import (
    file_at,
    folder_of,
    format_at,
    is_foreign,
    read,
    replace,
    restore_,
    save_tuner,
    warn_of_unspent_schedule,
)
from tunerkit.steps import detach, drive, engine_for, is_attached

__all__ = ["detach", "drive", "engine_for", "is_attached", "refuse_fixed", "regrouped"]
__all__ += ["budget", "warn_of_base_changes", "warn_of_unspent_schedule"]
__all__ += ["file_at", "folder_of", "read", "replace", "restore_", "save_tuner"]
__all__ += ["format_at", "gather_formats", "is_foreign"]
__all__ += ["Slot", "Slots", "adds_nothing", "base_modules", "evaluating", "inside", "slots_in", "walk"]
__all__ += ["adapted_tensors", "has_delta", "note_used"]
__all__ += ["DenseLinear", "EmbeddingLayer", "elsewhere", "is_named", "is_sharded", "lacking"]
