"""Checks of the delta: merged weights compute what the adapters compute, and can be taken out again."""

import copy
from collections.abc import Mapping
from pathlib import Path
from unittest import SkipTest

import torch
from torch import Tensor, nn

import tunerkit
from tunerkit import hooks, injection
from tunerkit.layers import low_rank_delta, torch_private
from tunerkit.plugin import Factors
from tunerkit_testing import tolerances
from tunerkit_testing.cases import Case, assert_base_untouched, assert_same, wrapped
from tunerkit_testing.checks.probing import (
    Call,
    adapter_dtypes,
    base_output,
    calls_of,
    fill_,
    filled,
    gradients,
    in_dtype,
    largest,
    one_code_path,
    require_delta,
    require_places,
    seeded,
)
from tunerkit_testing.checks.training import ended
from tunerkit_testing.product_forms import fused_form, plain_form

_HINT = "return from tunerkit_delta or tunerkit_factors exactly what forward adds, with its scale"


@torch.no_grad()
def check_delta_is_what_forward_adds(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """In fp64, each layer with its delta added computes what it computes with its adapter, to 1e-6 of the change.

    If the config asks for adapters in fp64, to 1e-10.
    """
    require_delta(method)
    assert hooks.has_delta(method), (
        f"method {method!r} cannot be merged: its plugin does not implement tunerkit_delta or tunerkit_factors. "
        "Implement one, or declare Method(..., targets='outputs') if it does not adapt weights"
    )
    share, wide = _share(case, method, config), in_dtype(case, torch.float64)
    model = filled(wide, method, {**config, "adapter_dtype": "float64"})
    for number, call in enumerate(calls_of(model, wide)):
        if not call.base.has_weight or _has_no_place(call, method):
            continue
        _fill_bias_(call.module, call.base.bias_name, number)
        adapted = call.run()
        tensors = injection.adapted_tensors(call.path, call.module, call.slots)
        with tunerkit.disabled(model):
            plain, merged = call.run(), call.run(tensors)
        added, worst = float((adapted - plain).abs().max()), float((merged - adapted).abs().max())
        assert worst <= share * max(added, float((merged - plain).abs().max())), (
            f"{call.path}: forward changes the output by up to {added:.4g}, and with its delta the layer computes "
            f"something else, by up to {worst:.4g}; {_HINT}{_of_the_bias(merged - adapted, adapted)}"
        )


def _of_the_bias(difference: Tensor, output: Tensor) -> str:
    """Return what to add to a message where a difference does not depend on the input, and the output does."""
    rows, others = difference.flatten(0, -2), output.flatten(0, -2)
    near = 1e-6 * float(difference.abs().max())
    if bool((rows - rows[0]).abs().max() > near) or torch.equal(others, others[0].expand_as(others)):
        return ""
    return (
        ". The difference is the same for every input: the delta lacks a bias, or has another one than forward adds: "
        "return Delta(weight=..., bias=...); base.bias() is the layer's own"
    )


def _has_no_place(call: Call, method: str) -> bool:
    """Whether the delta has a bias for a layer that has none, such as an embedding, so that merging is refused."""
    own = torch_private.own_parameters(call.module)
    return call.base.bias_name not in own and hooks.delta(call.path, method, call.adapter, call.base).bias is not None


def _share(case: Case, method: str, config: Mapping[str, object]) -> float:
    built = tunerkit.structure(method, {**case.settings, **config})
    return tolerances.of_delta(getattr(torch, built.adapter_dtype))


def _fill_bias_(module: nn.Module, name: str, seed: int) -> None:
    """Make a bias that is 0, as in a new model, random: a delta that forgets it would not be noticed."""
    bias = dict(module.named_parameters(recurse=False)).get(name)
    if bias is not None and not bias.any():
        bias.copy_(torch.randn(bias.shape, generator=torch.Generator().manual_seed(seed), dtype=bias.dtype))


@torch.no_grad()
def check_factors_are_the_delta(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """If a plugin implements both hooks, the product of `tunerkit_factors` is the weight of `tunerkit_delta`."""
    if not hooks.has_factors(method):
        raise SkipTest("the method does not implement tunerkit_factors")
    share = _share(case, method, config)
    model = filled(in_dtype(case, torch.float64), method, {**config, "adapter_dtype": "float64"})
    for path, _, slots in injection.walk(model):
        for slot in slots.applied:
            if slot.adapter is None or slots.base is None:
                continue
            product = hooks.factors(path, method, slot.adapter, slots.base)
            weight = hooks.delta(path, method, slot.adapter, slots.base).weight
            assert weight is not None, f"{path}: tunerkit_factors gives a product, and tunerkit_delta no weight"
            found = low_rank_delta(slots.base, q=product.q, p=product.p, scale=1.0)
            worst = largest({"": found - weight})
            assert worst <= share * largest({"": weight}), (
                f"{path}: the product of tunerkit_factors differs from the delta's weight by {worst:.3g}; multiply the "
                "scale, λ and mask into the factors, and implement only one of the two hooks if you can"
            )


@torch.no_grad()
def check_builds_from_factors(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """Adapters that `tunerkit_from_factors` builds add the given products, of ranks 0 and up."""
    if not hooks.implements(hooks.specs.tunerkit_from_factors, method) or not hooks.has_factors(method):
        raise SkipTest("the method does not implement both tunerkit_factors and tunerkit_from_factors")
    tuner = tunerkit.tuner(wrapped(case, method, config))
    generator = torch.Generator().manual_seed(3)
    own = {path: slots.base for path, _, slots in injection.walk(tuner.model)}
    bases = {target.path: base for target in tuner.targets if (base := own[target.path]) is not None}
    given = {}
    for number, (path, base) in enumerate(bases.items()):
        rank = min(number % 4, base.in_features, base.out_features)
        given[path] = Factors(
            q=torch.randn(rank, base.in_features, generator=generator),
            p=torch.randn(base.out_features, rank, generator=generator),
        )
    _, adapters = hooks.from_factors(method, tuner.targets, given)
    for path, adapter in adapters.items():
        found, product = hooks.factors(path, method, adapter, bases[path]), given[path]
        difference = largest({"": found.p @ found.q - product.p @ product.q})
        assert difference <= 1e-5 * max(1.0, largest({"": product.p @ product.q})), (
            f"{path}: an adapter built from factors of rank {product.rank} adds something else, by {difference:.3g}; "
            "undo in tunerkit_from_factors the scale that tunerkit_factors multiplies in"
        )


@one_code_path()
def check_merges(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """Merging keeps the output. Unmerging restores every base tensor bit for bit. A merged model can be saved."""
    require_delta(method)
    model = ended(case, method, config)
    require_places(model)
    adapted = case.output(model)
    tunerkit.merge(model)
    assert_same(case.output(model), adapted, "merged against adapted", _HINT, adapters=adapter_dtypes(model))
    loaded = tunerkit.load(case.build(), tunerkit.save(model, tmp_path / "merged")).eval()
    assert_same(
        case.output(loaded), adapted, "saved while merged", "change no weight of the adapter in the delta's hooks"
    )
    with tunerkit.disabled(model):
        assert torch.equal(case.output(model), base_output(case)), (
            "disabled while merged, the model is not the base; " + _OWN
        )
    tunerkit.unmerge(model)
    assert torch.equal(case.output(model), adapted), "unmerged, the output is another than before; " + _OWN
    assert_base_untouched(model, case, _OWN)


_OWN = "write to no tensor of the base layer in a hook"


@one_code_path()
def check_disabled_is_the_base(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """Inside ``disabled`` the output is bit-identical to the base model's; then it is adapted again."""
    expected, model = base_output(case), ended(case, method, config)
    adapted = case.output(model)
    with tunerkit.disabled(model), tunerkit.disabled(model):
        assert torch.equal(case.output(model), expected), "disabled, the model is not the base; " + _OWN
    assert torch.equal(case.output(model), adapted), "after disabled, the output is another than before; " + _OWN


@one_code_path()
def check_unwraps(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """`unwrap` restores the base model and its ``requires_grad`` flags."""
    original = case.build()
    case.output(original.eval())  # a library may leave something in a model at its first forward
    model = copy.deepcopy(ended(case, method, config))
    tunerkit.unwrap(model)
    assert list(model.state_dict()) == list(original.state_dict()), "unwrap left something in the model; " + _OWN
    for (path, module), own in zip(model.named_modules(), original.modules(), strict=True):
        left = sorted(vars(module).keys() - vars(own).keys())
        assert not left, f"unwrap left the attribute {left[0]!r} in the module at {path!r}; set it in the adapter"
        hooked = [
            name for name in vars(own) if name.endswith("_hooks") and len(vars(module)[name]) > len(vars(own)[name])
        ]
        assert not hooked, (
            f"unwrap left {hooked[0].strip('_')} in the module at {path!r}; register none in a base layer"
        )
    assert_base_untouched(model, case, _OWN)
    flags = {name: p.requires_grad for name, p in original.named_parameters()}
    found = {name: p.requires_grad for name, p in model.named_parameters()}
    assert found == flags, "unwrap does not restore requires_grad; do not set it in a hook"
    assert torch.equal(case.output(model), case.output(original)), "unwrapped, the output is not the base's; " + _OWN


def check_keeps_merged(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """``unwrap(keep_merged=True)`` keeps the adapted output in a plain model."""
    require_delta(method)
    model = ended(case, method, config)
    require_places(model)
    adapted, dtypes = case.output(model), adapter_dtypes(model)
    merged = tunerkit.unwrap(copy.deepcopy(model), keep_merged=True)
    assert_same(case.output(merged), adapted, "kept merged", _HINT, adapters=dtypes)
    assert list(merged.state_dict()) == list(case.build().state_dict()), "unwrap left something in the model; " + _OWN


def check_fused_is_plain(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """In float64, the fused low-rank product has the plain form's output and gradients, to 1e-10."""
    model = fill_(wrapped(in_dtype(case, torch.float64), method, {**config, "adapter_dtype": "float64"}))
    case.start_training(model)
    with fused_form():
        fused = _values_and_gradients(case, model)
    with plain_form():
        plain = _values_and_gradients(case, model)
    for name, expected in plain.items():
        worst = largest({name: fused[name] - expected})
        assert worst <= 1e-10 * max(1.0, largest({name: expected})), (
            f"{name} differs by {worst:.3g} between the fused and the plain low-rank product; pass add_low_rank the "
            "y that forward received, once, and do not use that y again"
        )


def _values_and_gradients(case: Case, model: nn.Module) -> dict[str, Tensor]:
    loss = seeded(case.loss, model)
    found = {"the loss": loss.detach(), "the output": seeded(case.output, model).detach()}
    tuner = tunerkit.tuner(model)
    copies = {name: p for name, p in tuner.named_parameters() if p.requires_grad}
    values = torch.autograd.grad(
        loss, list(copies.values()), allow_unused=True, materialize_grads=True, retain_graph=True
    )
    return {**found, **dict(zip(copies, values, strict=True)), **gradients(loss, tuner)}
