"""Conformance cases: a small random diffusers model. Its output has no loss, so the cases compute one."""

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor, nn

from tunerkit_testing.cases import Case

_SHAPE = (2, 3, 8, 8)


def unet() -> nn.Module:
    """A UNet with two levels and attention at the lower one."""
    torch.manual_seed(0)
    model: nn.Module = UNet2DModel(
        sample_size=_SHAPE[-1],
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return model


def _noise(seed: int) -> Tensor:
    return torch.randn(_SHAPE, generator=torch.Generator().manual_seed(seed))


def _sample(model: nn.Module) -> Tensor:
    found: Tensor = model(_noise(1), torch.tensor([3, 40])).sample
    return found


def _output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return _sample(model)


def _loss(model: nn.Module) -> Tensor:
    found = _sample(model)
    return F.mse_loss(found, _noise(2).to(found.dtype))


CASES: tuple[Case, ...] = (
    Case("unet", unet, _output, _loss),
    Case("unet-convolutions", unet, _output, _loss, {"targets": ("conv1", "conv2", "conv_in", "to_out.0")}),
)
