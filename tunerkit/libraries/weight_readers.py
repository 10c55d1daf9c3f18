"""The modules known to read a child's weight past its forward, where no hook on the child would ever be called."""

from collections.abc import Mapping

from torch import nn

from tunerkit.libraries.accelerate import forward_owner

_PROJECTIONS = ("qkv", "proj")
# Reads these whatever it runs; kernels that fuse a training step read the two projections too.
_MAMBA = ("conv1d", "x_proj", "dt_proj", "out_proj")
# By the class that defines the forward; core never imports these libraries. One that calls a child in some of its
# configurations may stand here: an override is there for a call as well.
_READ: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("torch.nn.modules.activation", "MultiheadAttention"): ("out_proj",),
    ("torchvision.models.swin_transformer", "ShiftedWindowAttention"): _PROJECTIONS,
    ("torchvision.models.swin_transformer", "ShiftedWindowAttentionV2"): _PROJECTIONS,
    ("timm.models.beit", "Attention"): ("qkv",),
    ("timm.models.eva", "EvaAttention"): ("qkv",),
    ("timm.models.swin_transformer_v2", "WindowAttention"): ("qkv",),
    ("transformers.models.wavlm.modeling_wavlm", "WavLMAttention"): ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("transformers.models.mamba.modeling_mamba", "MambaMixer"): _MAMBA,
    ("transformers.models.falcon_mamba.modeling_falcon_mamba", "FalconMambaMixer"): _MAMBA,
    ("transformers.models.jamba.modeling_jamba", "JambaMambaMixer"): ("conv1d", "dt_proj"),
}


def read_children(owner: nn.Module) -> tuple[str, ...]:
    """The names of the children whose weights the forward of ``owner`` reads itself."""
    found = forward_owner(owner)
    return _READ.get((found.__module__, found.__qualname__), ())
