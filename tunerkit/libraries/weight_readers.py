"""The classes known to use a child's weight directly, bypassing its forward: no hook on the child would be called.

One that calls a child in some of its configurations may stand here: the override is in place for a call as well.
"""

from tunerkit.records import WeightReader

_SWIN = "torchvision.models.swin_transformer"
_WAVLM = ("q_proj", "k_proj", "v_proj", "out_proj")
_MAMBA = ("conv1d", "x_proj", "dt_proj", "out_proj")

WEIGHT_READERS = (
    WeightReader("torch.nn.modules.activation.MultiheadAttention", ("out_proj",)),
    WeightReader(f"{_SWIN}.ShiftedWindowAttention", ("qkv", "proj")),
    WeightReader(f"{_SWIN}.ShiftedWindowAttentionV2", ("qkv", "proj")),
    WeightReader("timm.models.beit.Attention", ("qkv",)),
    WeightReader("timm.models.eva.EvaAttention", ("qkv",)),
    WeightReader("timm.models.swin_transformer_v2.WindowAttention", ("qkv",)),
    WeightReader("transformers.models.wavlm.modeling_wavlm.WavLMAttention", _WAVLM),
    # conv1d and dt_proj in any case; kernels that fuse a training step use the two projections too.
    WeightReader("transformers.models.mamba.modeling_mamba.MambaMixer", _MAMBA),
    WeightReader("transformers.models.falcon_mamba.modeling_falcon_mamba.FalconMambaMixer", _MAMBA),
    WeightReader("transformers.models.jamba.modeling_jamba.JambaMambaMixer", ("conv1d", "dt_proj")),
)
