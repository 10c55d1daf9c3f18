"""Conformance cases: small random convolutional networks of timm."""

import torch
import torch.nn.functional as F
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from tunerkit_testing.cases import Case

_CLASSES = 3


def convnext() -> nn.Module:
    """Four stages of depthwise convolutions, layer norms and linear layers. No layer scale hides a branch."""
    torch.manual_seed(0)
    model: nn.Module = ConvNeXt(depths=(1,) * 4, dims=(4, 8, 12, 16), num_classes=_CLASSES, ls_init_value=None)
    return model


def resnet() -> nn.Module:
    """Four stages of convolutions with batch norms. None is initialised to 0, which would hide its branch."""
    torch.manual_seed(0)
    model: nn.Module = ResNet(
        BasicBlock,
        layers=(1, 1, 1, 1),
        channels=(8, 8, 16, 16),
        stem_type="deep",
        stem_width=4,
        num_classes=_CLASSES,
        zero_init_last=False,
    )
    return model


def _train_without_statistics(model: nn.Module) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def _scores(model: nn.Module) -> Tensor:
    found: Tensor = model(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    return found


def _output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return _scores(model)


def _loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(_scores(model), torch.tensor([0, 1, 2, 0]))


CASES: tuple[Case, ...] = (
    Case("convnext", convnext, _output, _loss, {"targets": ("all-linear", "conv_dw", "stem.0")}),
    Case("resnet", resnet, _output, _loss, {"train_modules": ("fc",)}, _train_without_statistics),
)
