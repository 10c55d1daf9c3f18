"""A toy method whose adapters are products, with a toy format that its adapters leave by and come back through."""

import json
from collections.abc import Mapping
from pathlib import Path

import attrs
import torch
from torch import nn

import tunerkit
from tests.support import toy_formats
from tunerkit.plugin import (
    AdapterConfig,
    BaseLayer,
    Description,
    Factors,
    Foreign,
    Format,
    Method,
    Target,
    Tuner,
    low_rank_factors,
    setting,
)
from tunerkit_testing.toy_adapters import SCALE, LowRank

BASE_FILE = "base.json"  # beside the toy format's own file: the base, its class and the number of its labels


@attrs.frozen
class ProductConfig(AdapterConfig):
    """A rank, and those of single targets by their paths."""

    rank: int = setting(2, ge=1, doc="Rows of a.")
    ranks: Mapping[str, int] = setting(attrs.Factory(dict), ge=0, doc="The rank by path.")


@attrs.frozen
class ToyOptions:
    """What may be written beside the products."""

    base: str = setting("", doc="The base that the files name.")
    labels: int = setting(0, ge=0, doc="The number of classes that they name.")


class ProductPlugin:
    """``toy-product``, and the format ``toy``."""

    @tunerkit.hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [Method("toy-product", config=ProductConfig)]

    @tunerkit.hookimpl
    def tunerkit_build_adapter(self, target: Target, base: BaseLayer, config: ProductConfig) -> LowRank:
        return LowRank(base, config.ranks.get(target.path, config.rank))

    @tunerkit.hookimpl
    def tunerkit_factors(self, adapter: LowRank) -> Factors:
        return low_rank_factors(adapter.a, adapter.b, scale=SCALE)

    @tunerkit.hookimpl
    def tunerkit_from_factors(
        self, factors: Mapping[str, Factors], targets: tuple[Target, ...]
    ) -> tuple[ProductConfig, Mapping[str, LowRank]]:
        made = {path: _adapter(product) for path, product in factors.items()}
        return ProductConfig(ranks={path: adapter.rank for path, adapter in made.items()}), made

    @tunerkit.hookimpl
    def tunerkit_formats(self) -> list[Format]:
        return [Format("toy", toy_formats.sniff, _read, _write, ToyOptions, _describe)]


def _adapter(product: Factors) -> LowRank:
    adapter = LowRank.__new__(LowRank)
    nn.Module.__init__(adapter)
    adapter.a = nn.Parameter(product.q.clone())
    adapter.b = nn.Parameter(product.p / SCALE)
    return adapter


def _read(path: Path, model: nn.Module) -> Foreign:
    return attrs.evolve(toy_formats.read(path, model), method="toy-product")


def _write(tuner: Tuner, path: Path, options: ToyOptions) -> list[Path]:
    written = toy_formats.write(tuner, path, options)
    place = path / BASE_FILE
    place.write_text(json.dumps({"base": options.base, "labels": options.labels}))
    return [*written, place]


def _describe(path: Path) -> Description:
    found = toy_formats.read(path, nn.Module()).factors
    facts = json.loads((path / BASE_FILE).read_text())
    return Description(
        "toy-product", ranks={name: product.rank for name, product in found.items()}, settings={"scale": SCALE}, **facts
    )


def trained(model: nn.Module, **config: object) -> nn.Module:
    """Wrap a model with ``toy-product``, and give all that is trained random values."""
    tunerkit.wrap(model, "toy-product", config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in tunerkit.tuner(model).parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()
