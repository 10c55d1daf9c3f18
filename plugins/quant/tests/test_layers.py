"""Every quantised layer under LoRA and AdaLoRA: trained, shrunk, saved, resumed, merged, made dense."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from plugins.quant.tests.quantised import MODELS, OUT, TARGETS, X, dense, everything, skip_without_library
from tunerkit.plugin import BaseLayer
from tunerkit_testing.product_forms import fused_form, plain_form

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*on a base with another quantization"),
    pytest.mark.filterwarnings("ignore:.*4 bits"),
    pytest.mark.filterwarnings("ignore:the biases of 1 quantised"),
]
METHODS: dict[str, dict[str, Any]] = {"lora": {"rank": 4, "alpha": 8}, "adalora": {"target_rank": 2, "init_rank": 4}}
STEPS = 12


@pytest.fixture(params=MODELS)
def make(request: pytest.FixtureRequest) -> Callable[[], Any]:
    """One of the libraries' models; skipped where the library is missing."""
    skip_without_library(request.param)
    return MODELS[request.param]


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(f"tunerkit_{request.param}")
    return str(request.param)


def wrapped(make: Callable[[], Any], method: str, **config: Any) -> Any:
    return tunerkit.wrap(make(), method, {**METHODS[method], "targets": list(TARGETS), **config}, seed=0)


def loss_of(model: nn.Module) -> Tensor:
    wanted = torch.randn(len(X), 4, generator=torch.Generator().manual_seed(2))
    return (model(X) - wanted).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Train, with a forward in eval mode before each step, and look at every gradient."""
    for step in range(steps):
        model.eval()
        with torch.no_grad():
            model(X)
        model.train()
        optimizer.zero_grad()
        loss_of(model).backward()  # type: ignore[no-untyped-call]  # torch's own
        for name, parameter in tunerkit.tuner(model).named_parameters():
            assert not parameter.requires_grad or parameter.grad is not None or not parameter.numel(), name
            # LoRA's `a` and AdaLoRA's λ get theirs once the other factor is not 0.
            assert step < 2 or parameter.grad is None or parameter.grad.any() or not parameter.numel(), name
        optimizer.step()


def trained(make: Callable[[], Any], method: str, **config: Any) -> Any:
    model = wrapped(make, method, **config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tunerkit.attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer, STEPS)
    return model.eval()


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_it_trains_and_what_is_saved_is_what_was_trained(make: Callable[[], Any], method: str, tmp_path: Path) -> None:
    """Gradients reach every adapter after a forward in eval mode; the budget is exact; the base stays as it is."""
    model = trained(make, method)
    start = loss_of(make().eval())
    assert loss_of(model) < 0.7 * start
    if method == "adalora":
        assert sum(tunerkit.tuner(model).ranks().values()) == 2 * len(TARGETS)
        adapters = tunerkit.tuner(model).adapters().values()
        assert [adapter.get_parameter("p").shape[1] for adapter in adapters] == [a.rank for a in adapters]
    fresh = tunerkit.wrap(make(), method, {"targets": ["0"]}).eval()  # bare, bitsandbytes would compute in bf16
    with tunerkit.disabled(model), tunerkit.disabled(fresh):
        assert torch.equal(model(X), fresh(X))
    loaded = tunerkit.load(make(), tunerkit.save(model, tmp_path)).eval()
    assert torch.equal(loaded(X), model(X))


def test_training_resumes_exactly(make: Callable[[], Any], method: str, tmp_path: Path) -> None:
    """A run of two halves, saved between them, ends with the same bits as a whole one, in shape and value."""
    whole = trained(make, method)
    half = wrapped(make, method)
    optimizer = torch.optim.AdamW([p for p in half.parameters() if p.requires_grad], lr=1e-2)
    tunerkit.attach(half, optimizer, total_steps=STEPS)
    train(half, optimizer, STEPS // 2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*above the final.*")
        tunerkit.save(half, tmp_path)
    tunerkit.save_state(half, tmp_path)
    state = optimizer.state_dict()
    again = tunerkit.load(make(), tmp_path, trainable=True)
    optimizer = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], lr=1e-2)
    tunerkit.attach(again, optimizer, total_steps=STEPS)
    optimizer.load_state_dict(state)
    tunerkit.load_state(again, tmp_path)
    train(again, optimizer, STEPS - STEPS // 2)
    assert torch.equal(again.eval()(X), whole(X))


def test_merging_rounds_once_and_unmerging_restores_every_bit(make: Callable[[], Any], method: str) -> None:
    """The error is at most 1.2 times that of quantising W + ΔW directly; hidden states come back too."""
    model = trained(make, method)
    output, before = model(X), everything(model)
    sums = [base.dense().float() + delta for base, delta in _deltas(model)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*merged into .* 4 bits")
        tunerkit.merge(model)
    assert not same(everything(model), before)
    for (base, _), wanted in zip(_deltas(model), sums, strict=True):
        own = next(iter(tunerkit.rounding(model).values())).own
        assert (base.dense().float() - wanted).norm() <= 1.2 * own * wanted.norm()
    effect = (output - make().eval()(X)).norm()
    assert (model(X) - output).norm() <= 0.2 * effect
    model.train()(X)  # a merged model may run in any mode before it is unmerged
    model.eval()(X)
    tunerkit.unmerge(model)
    assert same(everything(model), before)
    assert torch.equal(model(X), output)


@pytest.mark.parametrize("name", ["bitsandbytes nf4", "torchao int8", "torchao int4"])
def test_a_model_may_be_cast_while_it_is_merged(name: str) -> None:
    """`unmerge` gives back what casting the unmerged model gives. HQQ and quanto cast no quantised layers."""
    skip_without_library(name)
    pytest.importorskip("tunerkit_lora")
    outputs = []
    for merged in (False, True):
        model = trained(MODELS[name], "lora")
        if merged:
            tunerkit.merge(model)
        model.to(torch.bfloat16)
        outputs.append((tunerkit.unmerge(model) if merged else model)(X.bfloat16()))
    assert torch.equal(*outputs)


def _deltas(model: Any) -> list[tuple[BaseLayer, Tensor]]:
    from tunerkit import hooks

    found = []
    for path, adapter in tunerkit.tuner(model).adapters().items():
        base = model[int(path)].tunerkit.base
        delta = hooks.delta(path, tunerkit.tuner(model).method, adapter, base).weight
        assert delta is not None
        found.append((base, delta.detach()))
    return found


def test_it_becomes_dense_with_no_error_of_its_own(make: Callable[[], Any], method: str) -> None:
    """In fp32 the dense model computes what the adapted one did; int8 activations of bitsandbytes' eval mode aside."""
    model = trained(make, method).train()
    expected = model(X)
    plain = tunerkit.unwrap(model, keep_merged=True, dtype=torch.float32)
    assert [type(plain[int(path)]) for path in TARGETS] == [nn.Linear] * 2
    assert (plain(X) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert list(plain.state_dict()) == list(dense().state_dict())


def test_an_adapter_moves_between_precisions(make: Callable[[], Any], method: str, tmp_path: Path) -> None:
    """Outputs differ by no more than a few times what quantising the base alone changes, both ways."""
    own = (make().train()(X) - dense()(X)).norm()
    packed = tunerkit.save(trained(make, method), tmp_path / "packed")
    plain = tunerkit.save(trained(dense, method), tmp_path / "dense")
    for path in (packed, plain):
        one, other = (tunerkit.load(base(), path).train() for base in (make, dense))
        assert (one(X) - other(X)).norm() <= 3 * own


def test_the_fused_product_computes_what_the_plain_form_does(make: Callable[[], Any]) -> None:
    """It writes into the output of the library's forward, and into nothing that its backward needs."""
    pytest.importorskip("tunerkit_lora")
    gradients = []
    for form in (plain_form, fused_form):
        model = trained(make, "lora").train()
        x = X.clone().requires_grad_()
        model.zero_grad()
        with form():
            model(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in tunerkit.tuner(model).parameters())])
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        assert other is not None
        assert (one - other).abs().max() <= 1e-5 * one.abs().max()


def test_heads_biases_and_dropout_train_beside(make: Callable[[], Any], tmp_path: Path) -> None:
    """What is not quantised is trained in full, in its own dtype; a bias that is a parameter is trained."""
    pytest.importorskip("tunerkit_lora")
    model = trained(make, "lora", train_modules=["4"], bias="adapters", dropout=0.1)
    assert {p.dtype for p in tunerkit.tuner(model).parameters()} == {torch.float32}
    loaded = tunerkit.load(make(), tunerkit.save(model, tmp_path)).eval()
    assert torch.equal(loaded(X), model(X))
    assert loaded(X).shape == (len(X), 4)
    assert OUT == 32
