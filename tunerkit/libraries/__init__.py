"""What tunerkit knows of other libraries, as data, and the private names it relies on."""

from tunerkit.libraries import torch_private, transformers_private
from tunerkit.libraries.accelerate import (
    duplicate,
    execution_device,
    forward_owner,
    identity,
    is_offloaded,
    overrides_forward,
)
from tunerkit.libraries.default_targets import default_names
from tunerkit.libraries.weight_readers import read_children
