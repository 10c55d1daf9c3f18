"""LoRA and AdaLoRA through products and back: equal outputs, ranks from 0 to full, pruned layers, files."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tunerkit import hooks, injection, targets
from tunerkit.injection import Slot
from tunerkit.plugin import Factors
from tunerkit.serialization.adapter_file import save
from tunerkit_adalora.conversion import from_products
from tunerkit_testing.small import X, net, train, trainable

METHODS = ("lora", "adalora")
PATHS = ("0", "2", "4")
pytest.importorskip("tunerkit_lora", reason="LoRA is another distribution")


def products_of(model: Any) -> dict[str, Factors]:
    """What the adapter adds at each target, on the CPU and detached."""
    tuner, found = tunerkit.tuner(model), {}
    for path, adapter in tuner.adapters().items():
        base: Any = model.get_submodule(path).get_submodule("tunerkit").base
        product = hooks.factors(path, tuner.method, adapter, base)
        found[path] = Factors(q=product.q.detach(), p=product.p.detach())
    return found


def converted(method: str, products: Mapping[str, Factors], folder: Path) -> nn.Module:
    """A new base model with an adapter of ``method`` that adds ``products``, through a file as a user would see it."""
    model = net()
    scanned = targets.scan(model, hooks.gather_knowledge())
    chosen = targets.from_paths(scanned, list(products))
    config, adapters = hooks.from_factors(method, chosen, products)
    tuner = injection.Tuner(name="default", method=method, config=config, model=model, targets=chosen)
    slots = {path: Slot(method=method, adapter=adapter) for path, adapter in adapters.items()}
    injection.inject_(tuner, slots, scanned, ExitStack(), trainable=True)
    tuner.progress.steps = 1  # else a method that needs steps refuses to be saved untrained
    expected = model(X)
    loaded = tunerkit.load(net(), save(model, folder), trainable=True)
    assert torch.equal(loaded(X), expected)
    assert tunerkit.tuner(loaded).ranks() == tunerkit.tuner(model).ranks()
    wrapped = tunerkit.wrap(net(), method, config)
    assert set(tunerkit.tuner(wrapped).adapters()) == set(products)
    return loaded


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def trained(method: str, **config: Any) -> nn.Module:
    model = tunerkit.wrap(net(), method, {"targets": list(PATHS), **config}, seed=0)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.05)
    tunerkit.attach(model, optimizer, total_steps=12)
    train(model, optimizer, 12)
    return model


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"rank": 3}),
    "lora with ranks and scales": ("lora", {"rank": 2, "rank_pattern": {"2": 5, "4": 0}, "alpha_pattern": {"2": 3.0}}),
    "lora, rank-stabilised": ("lora", {"rank": 4, "rslora": True, "alpha": 8.0}),
    "lora of full rank": ("lora", {"rank": 8}),
    "adalora": ("adalora", {"init_rank": 4, "target_rank": 4, "t_init": 1, "t_final": 1}),
    "adalora, pruned": ("adalora", {"init_rank": 4, "target_rank": 2, "t_init": 1, "t_final": 5, "delta_t": 1}),
    "adalora, rotated": ("adalora", {"init_rank": 6, "target_rank": 1, "t_init": 1, "t_final": 5, "delta_t": 1}),
    "adalora, from gaussians": ("adalora", {"init_rank": 3, "target_rank": 2, "start": "gaussian"}),
}


@pytest.mark.parametrize("other", METHODS)
@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_becomes_one_of_the_other_method_and_back(name: str, other: str, tmp_path: Path) -> None:
    """Equal outputs at each stage, by products, by files, and by products of the result; also live triplets only."""
    method, config = CONFIGS[name]
    model = trained(method, **config)
    expected = model(X)
    products = products_of(model)
    assert {path: product.rank for path, product in products.items()} == tunerkit.tuner(model).ranks()
    first = converted(other, products, tmp_path / "first")
    assert_equal(first(X), expected)
    again = converted(method, products_of(first), tmp_path / "again")
    assert_equal(again(X), expected)


@pytest.mark.filterwarnings("ignore:.*nothing is left to prune")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ranks", [(0, 0, 0), (0, 1, 3), (6, 7, 3), (2, 2, 2), (8, 0, 5)])
def test_products_of_any_ranks_are_built(method: str, ranks: tuple[int, ...], tmp_path: Path) -> None:
    """From 0 to above the layer's own; then trained: what is built is an adapter like any other."""
    generator, layers = torch.Generator().manual_seed(0), net()
    products, model = {}, net()
    for path, rank in zip(PATHS, ranks, strict=True):
        out, into = layers.get_parameter(f"{path}.weight").shape
        q, p = (0.4 * torch.randn(shape, generator=generator) for shape in ((rank, into), (out, rank)))
        products[path] = Factors(q=q, p=p)
        model.get_parameter(f"{path}.weight").data += p @ q
    loaded = converted(method, products, tmp_path)
    assert_equal(loaded(X), model(X))
    found = tunerkit.tuner(loaded).ranks()
    sizes = {
        path: min(rank, *layers.get_parameter(f"{path}.weight").shape) for path, rank in zip(PATHS, ranks, strict=True)
    }
    assert found == (sizes if method == "adalora" else dict(zip(PATHS, ranks, strict=True)))
    tunerkit.merge(loaded)
    assert_equal(loaded(X), model(X))
    tunerkit.unmerge(loaded)
    if any(ranks):
        optimizer = torch.optim.SGD(trainable(loaded), lr=0.01)
        tunerkit.attach(loaded, optimizer, total_steps=6)
        train(loaded, optimizer, 6)
        assert not torch.equal(loaded(X), model(X))


@pytest.mark.parametrize("method", METHODS)
def test_paths_that_end_alike_keep_their_own_ranks(method: str) -> None:
    """A config names targets by pattern, and one path may be the end of another."""
    outer = nn.Module()
    outer.a, outer.b = (
        nn.Linear(3, 3),
        nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.ModuleDict({"a": nn.Linear(3, 3)})}),
    )
    scanned = targets.scan(outer, hooks.gather_knowledge())
    paths = ["a", "b.a", "b.b.a"]
    products = {path: Factors(q=torch.ones(rank, 3), p=torch.ones(3, rank)) for rank, path in enumerate(paths)}
    config, _ = hooks.from_factors(method, targets.from_paths(scanned, paths), products)
    tuner = tunerkit.tuner(tunerkit.wrap(outer, method, config))
    assert [target.path for target in tuner.targets] == paths
    if method == "lora":
        assert tuner.ranks() == {"a": 0, "b.a": 1, "b.b.a": 2}


def test_a_masked_triplet_is_left_out_and_a_live_one_with_a_zero_stays() -> None:
    """The rank of the product is the live rank, as the last allocation left it."""
    model = trained("adalora", init_rank=4, target_rank=2, t_init=1, t_final=5, delta_t=1)
    tuner = tunerkit.tuner(model)
    assert sum(tuner.ranks().values()) == 6
    assert {path: product.rank for path, product in products_of(model).items()} == tuner.ranks()


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_the_config_names_no_module_that_had_no_product(method: str) -> None:
    """A plain name would also match the end of a longer path."""
    outer = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.ModuleDict({"a": nn.Linear(3, 3)})})
    scanned = targets.scan(outer, hooks.gather_knowledge())
    products = {"a": Factors(q=torch.ones(1, 3), p=torch.ones(3, 1))}
    chosen = targets.from_paths(scanned, ["a"])
    config, _ = hooks.from_factors(method, chosen, products)
    assert list(tunerkit.tuner(tunerkit.wrap(outer, method, config)).adapters()) == ["a"]


@pytest.mark.parametrize("method", ["lora", "adalora"])
@pytest.mark.parametrize(
    ("products", "words"),
    [
        ({}, "expected one product for each of 1 targets"),
        ({"z": (torch.ones(1, 3), torch.ones(3, 1))}, "got 1 \\(z\\)"),
    ],
)
def test_products_for_other_targets_are_refused(
    method: str, products: dict[str, tuple[Tensor, Tensor]], words: str
) -> None:
    """Before the method's plugin is asked, whose own errors would say less."""
    scanned = targets.scan(nn.ModuleDict({"a": nn.Linear(3, 3)}), hooks.gather_knowledge())
    given = {path: Factors(*pair) for path, pair in products.items()}
    with pytest.raises(tunerkit.errors.AdapterError, match=words):
        hooks.from_factors(method, targets.from_paths(scanned, ["a"]), given)


def test_products_of_rank_0_give_the_smallest_config() -> None:
    """A rank is at least 1 in a config, and the layers stay empty."""
    config, layers = from_products({"layer": Factors(q=torch.empty(0, 4), p=torch.empty(3, 0))})
    assert (config.init_rank, config.target_rank, layers["layer"].rank) == (1, 1, 0)
