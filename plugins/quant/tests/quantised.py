"""Small models in every quantised form, and the libraries that quantise them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

IN, WIDE, OUT = 64, 128, 32  # bitsandbytes on a CPU needs columns in blocks of 64
X = torch.randn(12, IN, generator=torch.Generator().manual_seed(1))
TARGETS = ("0", "2")
_INT4: Any = vars(torch)["int4"]  # torch does not declare it


def dense(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """The base in full precision: two layers that are quantised, a norm and a head that are not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = (
            nn.Linear(IN, WIDE),
            nn.Tanh(),
            nn.Linear(WIDE, OUT, bias=False),
            nn.LayerNorm(OUT),
            nn.Linear(OUT, 4),
        )
        return nn.Sequential(*layers).to(dtype)


def int8() -> nn.Sequential:
    """Bitsandbytes' int8."""
    import bitsandbytes as bnb

    return _replaced(lambda old: bnb.nn.Linear8bitLt(*_sizes(old), has_fp16_weights=False), then="cpu")


def nf4(compute: torch.dtype = torch.float32, *, nested: bool = True) -> nn.Sequential:
    """Bitsandbytes' nf4, with quantised scales."""
    import bitsandbytes as bnb

    return _replaced(
        lambda old: bnb.nn.LinearNF4(*_sizes(old), compute_dtype=compute, compress_statistics=nested), "cpu"
    )


def fp4() -> nn.Sequential:
    """Bitsandbytes' fp4, with scales as they are."""
    import bitsandbytes as bnb

    return _replaced(lambda old: bnb.nn.LinearFP4(*_sizes(old), compress_statistics=False), then="cpu")


def torchao_int8() -> nn.Sequential:
    """Torchao's weight-only int8."""
    from torchao.quantization import Int8WeightOnlyConfig

    return _quantised_by_torchao(Int8WeightOnlyConfig())


def torchao_int4() -> nn.Sequential:
    """Torchao's weight-only int4 with groups, through ``IntxWeightOnlyConfig``."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    return _quantised_by_torchao(IntxWeightOnlyConfig(weight_dtype=_INT4, granularity=PerGroup(32)))


def hqq() -> nn.Sequential:
    """HQQ's 4 bits."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=32, axis=1)
    return _replaced(lambda old: HQQLinear(old, config, compute_dtype=torch.float32, device="cpu"), copy=False)


def quanto(weights: str = "qint8") -> nn.Sequential:
    """Quanto's int8, frozen."""
    from optimum import quanto as library

    model = dense()
    library.quantize(model, weights=getattr(library, weights), exclude=["4"])
    library.freeze(model)
    return model


MODELS: dict[str, Callable[[], nn.Sequential]] = {
    "bitsandbytes int8": int8,
    "bitsandbytes nf4": nf4,
    "bitsandbytes fp4": fp4,
    "torchao int8": torchao_int8,
    "torchao int4": torchao_int4,
    "HQQ int4": hqq,
    "quanto qint8": quanto,
}


PACKAGES = {"bitsandbytes": "bitsandbytes", "torchao": "torchao", "HQQ": "hqq", "quanto": "optimum.quanto"}


def skip_without_library(name: str) -> None:
    """Skip the test if the library of one of `MODELS` is not installed."""
    package = PACKAGES[name.split()[0]]
    pytest.importorskip(package, reason=f"{package} is not installed")


def _sizes(old: nn.Linear) -> tuple[int, int, bool]:
    return old.in_features, old.out_features, old.bias is not None


def _replaced(build: Callable[[nn.Linear], Any], then: str | None = None, *, copy: bool = True) -> nn.Sequential:
    """`dense` with other layers at `TARGETS`; ``then`` is the device to which a move quantises them."""
    model = dense()
    for path in TARGETS:
        old: Any = model[int(path)]
        new = build(old)
        if copy:
            new.load_state_dict(old.state_dict())
        model[int(path)] = new if then is None else new.to(then)
    return model


def _quantised_by_torchao(config: Any) -> nn.Sequential:
    from torchao.quantization import quantize_

    model = dense()
    quantize_(model, config, filter_fn=lambda module, path: path in TARGETS)
    return model


def numbers_of(value: Any) -> list[Tensor]:
    """Every tensor in a value, however deep: in packed tensors, states and dicts."""
    if isinstance(value, Tensor):
        packed: Any = value if hasattr(type(value), "__tensor_flatten__") else None
        inner = [] if packed is None else [getattr(packed, name) for name in packed.__tensor_flatten__()[0]]
        inner += [vars(value)[name] for name in ("CB", "SCB", "quant_state") if name in vars(value)]
        return [*([value.detach()] if packed is None else []), *(t for part in inner for t in numbers_of(part))]
    if isinstance(value, dict):
        return [t for part in value.values() for t in numbers_of(part)]
    return numbers_of(vars(value)) if type(value).__name__ in ("QuantState", "MatmulLtState") else []


def everything(model: nn.Sequential) -> list[Tensor]:
    """Copies of every tensor of the packed layers, hidden states included."""
    names = ("weight", "state", "quant_state", "W_q", "meta", "bias")
    return [t.clone() for path in TARGETS for name in names for t in numbers_of(getattr(model[int(path)], name, None))]
