"""The classes of DeepSpeed, and of accelerate around it, that a training loop may hold. Nothing here imports them."""

from torch import Tensor

DEEPSPEED_ENGINE = "deepspeed.runtime.engine.DeepSpeedEngine"
DEEPSPEED_OPTIMIZER = "deepspeed.runtime.base_optimizer.DeepSpeedOptimizer"
ZERO_OPTIMIZER = "deepspeed.runtime.base_optimizer.ZeROOptimizer"
# accelerate's wrappers, and where they store what they wrap.
DEEPSPEED_WRAPPERS = {
    "accelerate.utils.deepspeed.DeepSpeedEngineWrapper": "engine",
    "accelerate.utils.deepspeed.DeepSpeedOptimizerWrapper": "optimizer",
}
DEEPSPEED = (DEEPSPEED_ENGINE, DEEPSPEED_OPTIMIZER, *DEEPSPEED_WRAPPERS)
# What ZeRO sets on a parameter: stage 3 a number, stages 1 and 2 what they train.
_MARKS = ("ds_id", "_hp_mapping")


def is_of_deepspeed(parameter: Tensor) -> bool:
    """Whether ZeRO trains a parameter, or holds only a part of it."""
    return not vars(parameter).keys().isdisjoint(_MARKS)
