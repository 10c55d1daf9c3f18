"""The classes of DeepSpeed, and of accelerate around it, that a training loop may hold. Nothing here imports them."""

from torch import Tensor

DEEPSPEED_ENGINE = "deepspeed.runtime.engine.DeepSpeedEngine"
DEEPSPEED_OPTIMIZER = "deepspeed.runtime.base_optimizer.DeepSpeedOptimizer"
ZERO_OPTIMIZER = "deepspeed.runtime.base_optimizer.ZeROOptimizer"
# accelerate's wrappers, and the attribute with the wrapped object.
DEEPSPEED_WRAPPERS = {
    "accelerate.utils.deepspeed.DeepSpeedEngineWrapper": "engine",
    "accelerate.utils.deepspeed.DeepSpeedOptimizerWrapper": "optimizer",
}
DEEPSPEED = (DEEPSPEED_ENGINE, DEEPSPEED_OPTIMIZER, *DEEPSPEED_WRAPPERS)
# The attributes of a parameter that ZeRO sets: stage 3 a number, stages 1 and 2 a mapping for trained ones.
_MARKS = ("ds_id", "_hp_mapping")


def is_of_deepspeed(parameter: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO trains or has partitioned a parameter."""
    return not vars(parameter).keys().isdisjoint(_MARKS)
