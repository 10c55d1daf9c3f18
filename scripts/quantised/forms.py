"""A causal LM in each quantised form."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

FORMS = (
    *("bitsandbytes int8", "bitsandbytes nf4", "bitsandbytes fp4", "torchao int8", "torchao int4"),
    *("HQQ int4", "quanto int8", "GPTQ int4"),
)
# Intx with the scales of HQQ, which the stored weight does not tell from others.
HQQ_SCALES = "torchao int4, scales of HQQ"
REPACKS = "support_avx512bf16_for_cpu"


def quantised(folder: str, form: str, *, repacked: bool = True) -> Any:
    """Load the model in one form. Heads and embeddings stay as they are.

    With ``repacked=False``, bitsandbytes does not repack 4-bit weights for inference on a CPU.
    """
    model = _quantised(folder, form)
    for module in model.modules():
        if not repacked and hasattr(module, REPACKS):
            setattr(module, REPACKS, False)
    return model


def _quantised(folder: str, form: str) -> Any:
    import transformers
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": torch.float32, "device_map": "cpu"}
    match form:
        case "bitsandbytes int8":
            config: Any = transformers.BitsAndBytesConfig(load_in_8bit=True)
        case "bitsandbytes nf4" | "bitsandbytes fp4":
            kind = form.rpartition(" ")[2]
            config = transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.float32
            )
        case "torchao int8":
            from torchao.quantization import Int8WeightOnlyConfig

            config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
        case "torchao int4" | "torchao int4, scales of HQQ":
            from torchao.quantization import IntxWeightOnlyConfig, PerGroup

            four: Any = vars(torch)["int4"]
            scales: Any = {"intx_choose_qparams_algorithm": "hqq_scale_only"} if form == HQQ_SCALES else {}
            config = transformers.TorchAoConfig(
                IntxWeightOnlyConfig(weight_dtype=four, granularity=PerGroup(32), **scales)
            )
        case "quanto int8":
            config = transformers.QuantoConfig(weights="int8")
        case "HQQ int4":
            return _by_hand(folder, _hqq)
        case "GPTQ int4":
            return _by_hand(folder, _gptq)
        case _:
            raise SystemExit(f"no form named {form!r}; there are: {', '.join(FORMS)}")
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options)


def _by_hand(folder: str, build: Callable[[nn.Linear], nn.Module]) -> Any:
    """Load the model and replace the linear layers of its blocks: transformers has no loader for these on a CPU."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in path:
            model.set_submodule(path, build(module))
    return model


def _hqq(linear: nn.Linear) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    built: nn.Module = HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
    return built


def _gptq(linear: nn.Linear) -> nn.Module:
    """GPTQ's format, rounded to the nearest: what is tried here does not depend on how well it was quantised."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    rows, columns = linear.weight.shape
    built: Any = TorchLinear(
        bits=4, group_size=32, sym=True, desc_act=False, in_features=columns, out_features=rows, bias=False
    )
    scales = linear.weight.detach().view(rows, -1, 32).abs().amax(-1).clamp_min(1e-5) / 7
    built.pack(linear, scales, torch.full_like(scales, 8), torch.arange(columns, dtype=torch.int32) // 32)
    built.post_init()
    return built  # type: ignore[no-any-return]
