"""What tunerkit knows of other libraries, as data, and the private names it relies on."""

from tunerkit.libraries import torch_private, transformers_private
from tunerkit.libraries.accelerate import (
    duplicate,
    execution_device,
    forward_name,
    forward_owner,
    identity,
    is_offloaded,
    overrides_forward,
)
from tunerkit.libraries.default_targets import DEFAULT_TARGETS
from tunerkit.libraries.output_heads import is_head_name, named_heads
from tunerkit.libraries.transformers_classes import CONV1D, FALCON_LINEAR, TRAINER, derives_from, is_scaled_embedding
from tunerkit.libraries.weight_readers import WEIGHT_READERS
