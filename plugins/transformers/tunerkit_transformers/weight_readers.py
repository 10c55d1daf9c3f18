"""The classes known to use a child's weight directly, bypassing the child's forward(), so that no hook on it runs.

A class may be listed even if some of its configurations call the child: the weight override also covers a call.
"""

from tunerkit.plugin import WeightReader

_MAMBA = ("conv1d", "x_proj", "dt_proj", "out_proj")

WEIGHT_READERS = (
    WeightReader("torchvision.models.swin_transformer.ShiftedWindowAttention", ("qkv", "proj")),
    WeightReader("torchvision.models.swin_transformer.ShiftedWindowAttentionV2", ("qkv", "proj")),
    WeightReader("timm.models.beit.Attention", ("qkv",)),
    WeightReader("timm.models.eva.EvaAttention", ("qkv",)),
    WeightReader("timm.models.swin_transformer_v2.WindowAttention", ("qkv",)),
    WeightReader("transformers.models.wavlm.modeling_wavlm.WavLMAttention", ("q_proj", "k_proj", "v_proj", "out_proj")),
    # conv1d and dt_proj always; kernels that fuse a training step also use the other two projections.
    WeightReader("transformers.models.mamba.modeling_mamba.MambaMixer", _MAMBA),
    WeightReader("transformers.models.falcon_mamba.modeling_falcon_mamba.FalconMambaMixer", _MAMBA),
    WeightReader("transformers.models.jamba.modeling_jamba.JambaMambaMixer", ("conv1d", "dt_proj")),
)
