"""Small random models of other libraries that use weights directly, bypassing a layer's forward()."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunerkit_testing.cases import Case

_CLASSES = torch.tensor([0, 1, 2, 0])
_VIT = {"img_size": 32, "depth": 2, "embed_dim": 16, "num_heads": 2, "num_classes": 3}
_SWIN = {**{"img_size": 32, "depths": (2, 1), "embed_dim": 16, "num_heads": (2, 2), "num_classes": 3}, "window_size": 4}
_MAMBA = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4}
_JAMBA = {
    **{"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_experts": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "attn_layer_offset": 1, "attn_layer_period": 2},
    **{"mamba_d_state": 4, "mamba_dt_rank": 4},
}


def cases() -> list[Any]:
    """One pytest parameter per case, with its name as the id; those of a missing library are skipped with a reason."""
    return [
        pytest.param(case, id=case.name, marks=pytest.mark.skipif(find_spec(library) is None, reason=f"no {library}"))
        for library, found in _CASES.items()
        for case in found
    ]


def _torchvision(name: str) -> nn.Module:
    """A Swin transformer with one stage, whose second block shifts its windows. ``name`` is the block's class name."""
    swin = import_module("torchvision.models.swin_transformer")
    merging = swin.PatchMergingV2 if name.endswith("V2") else swin.PatchMerging
    kind = {"block": getattr(swin, name), "downsample_layer": merging, "stochastic_depth_prob": 0.0}
    model: nn.Module = swin.SwinTransformer([4, 4], 16, [2], [2], [4, 4], num_classes=3, **kind)
    return model


def _timm(name: str, **options: Any) -> nn.Module:
    model: nn.Module = import_module("timm").create_model(name, pretrained=False, **options)
    return model


def _transformers(name: str, **sizes: Any) -> nn.Module:
    transformers = import_module("transformers")
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes))
    return model


def _image() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def _text() -> Tensor:
    return torch.randint(20, (4, 6), generator=torch.Generator().manual_seed(1))


def _seen(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(_image())
    return found


def _seen_loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(_image()), _CLASSES)


def _read(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(_text()).logits
    return found


def _read_loss(model: nn.Module) -> Tensor:
    found: Tensor = model(_text(), labels=_text()).loss
    return found


def _built(build: Callable[..., nn.Module], *arguments: str, **options: Any) -> Callable[[], nn.Module]:
    def built() -> nn.Module:
        torch.manual_seed(0)
        # Frozen: torch chooses the order of some products by requires_grad, and outputs are compared bit for bit.
        # The added noise moves weights away from initial zeros that would hide a branch.
        model = build(*arguments, **options).requires_grad_(False)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    return built


def _case(kind: tuple[Any, Any], name: str, build: Callable[[], nn.Module], targets: tuple[str, ...]) -> Case:
    return Case(name, build, *kind, {"targets": targets})


_IMAGES, _TEXTS = (_seen, _seen_loss), (_read, _read_loss)
_CASES: dict[str, list[Case]] = {
    "torchvision": [
        _case(_IMAGES, "swin", _built(_torchvision, "SwinTransformerBlock"), ("qkv", "proj")),
        _case(_IMAGES, "swin-v2", _built(_torchvision, "SwinTransformerBlockV2"), ("qkv", "proj")),
    ],
    "timm": [
        _case(_IMAGES, "beit", _built(_timm, "beit_base_patch16_224", **_VIT), ("qkv", "proj")),
        _case(_IMAGES, "eva", _built(_timm, "eva02_tiny_patch14_224", patch_size=16, **_VIT), ("qkv", "proj")),
        _case(_IMAGES, "timm-swin-v2", _built(_timm, "swinv2_tiny_window8_256", **_SWIN), ("qkv", "proj")),
    ],
    "transformers": [
        _case(_TEXTS, "mamba", _built(_transformers, "Mamba", **_MAMBA), ("conv1d", "x_proj", "dt_proj", "out_proj")),
        _case(
            _TEXTS,
            "falcon-mamba",
            _built(_transformers, "FalconMamba", **_MAMBA),
            ("conv1d", "x_proj", "dt_proj", "out_proj"),
        ),
        _case(_TEXTS, "jamba", _built(_transformers, "Jamba", **_JAMBA), ("conv1d", "dt_proj", "in_proj", "q_proj")),
    ],
}
