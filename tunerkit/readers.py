"""The modules known to read a child's weight past its forward, where no hook on the child would ever be called."""

from collections.abc import Mapping

from torch import nn

from tunerkit.offloading import forward_owner

# By the class that defines the forward; core never imports transformers.
_READ: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("torch.nn.modules.activation", "MultiheadAttention"): ("out_proj",),
    ("transformers.models.wavlm.modeling_wavlm", "WavLMAttention"): ("q_proj", "k_proj", "v_proj", "out_proj"),
}


def read_children(owner: nn.Module) -> tuple[str, ...]:
    """The names of the children whose weights the forward of ``owner`` reads itself."""
    found = forward_owner(owner)
    return _READ.get((found.__module__, found.__qualname__), ())
