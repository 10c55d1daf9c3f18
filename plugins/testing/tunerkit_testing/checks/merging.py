"""Checks of the delta: merged weights compute what the adapters compute, and can be taken out again."""

import copy
from unittest import SkipTest

import torch
from torch import Tensor, nn

import tunerkit
from tunerkit import hooks, injection
from tunerkit.layers import low_rank_delta, torch_private
from tunerkit.plugin import Factors
from tunerkit_testing.cases import TOLERANCES, Trial, assert_base_untouched, assert_same
from tunerkit_testing.checks.probing import (
    Call,
    adapter_dtypes,
    base_output,
    calls_of,
    fill_,
    filled,
    gradients,
    largest,
    one_code_path,
    placed,
    require_delta,
    require_places,
    seeded,
)
from tunerkit_testing.checks.training import ended
from tunerkit_testing.product_forms import fused_form, plain_form

_HINT = "return from tunerkit_delta or tunerkit_factors exactly what forward adds, with its scale"

# Of what an adapter adds, for checks that run in fp64 whatever the config says: a method may compute in fp32 what its
# libraries compute there alone. One that is configured for fp64 must not.
_DELTA = 1e-6


@torch.no_grad()
def check_delta_is_what_forward_adds(trial: Trial) -> None:
    """In fp64, each layer with its delta added computes what it computes with its adapter, to 1e-6 of the change.

    If the config asks for adapters in fp64, to 1e-10.
    """
    require_delta(trial.method)
    assert hooks.has_delta(trial.method), (
        f"method {trial.method!r} cannot be merged: its plugin does not implement tunerkit_delta or tunerkit_factors. "
        "Implement one, or declare Method(..., targets='outputs') if it does not adapt weights"
    )
    share, wide = _share(trial), trial.in_fp64()
    model = filled(wide)
    for number, call in enumerate(calls_of(model, wide)):
        if not call.base.has_weight or _has_no_place(call, trial.method):
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


def _share(trial: Trial) -> float:
    dtype = getattr(torch, trial.structured().adapter_dtype)
    return TOLERANCES[dtype] if dtype == torch.float64 else _DELTA


def _fill_bias_(module: nn.Module, name: str, seed: int) -> None:
    """Make a bias that is 0, as in a new model, random: a delta that forgets it would not be noticed."""
    bias = dict(module.named_parameters(recurse=False)).get(name)
    if bias is not None and not bias.any():
        bias.copy_(torch.randn(bias.shape, generator=torch.Generator().manual_seed(seed), dtype=bias.dtype))


@torch.no_grad()
def check_factors_are_the_delta(trial: Trial) -> None:
    """If a plugin implements both hooks, the product of `tunerkit_factors` is the weight of `tunerkit_delta`."""
    if not hooks.has_factors(trial.method):
        raise SkipTest("the method does not implement tunerkit_factors")
    share = _share(trial)
    model = filled(trial.in_fp64())
    for path, adapter, base in placed(model):
        product = hooks.factors(path, trial.method, adapter, base)
        weight = hooks.delta(path, trial.method, adapter, base).weight
        assert weight is not None, f"{path}: tunerkit_factors gives a product, and tunerkit_delta no weight"
        worst = largest({"": low_rank_delta(base, q=product.q, p=product.p, scale=1.0) - weight})
        assert worst <= share * largest({"": weight}), (
            f"{path}: the product of tunerkit_factors differs from the delta's weight by {worst:.3g}; multiply the "
            "scale, λ and mask into the factors, and implement only one of the two hooks if you can"
        )


@torch.no_grad()
def check_builds_from_factors(trial: Trial) -> None:
    """Adapters that `tunerkit_from_factors` builds add the given products, of ranks 0 and up."""
    if not hooks.implements(hooks.specs.tunerkit_from_factors, trial.method) or not hooks.has_factors(trial.method):
        raise SkipTest("the method does not implement both tunerkit_factors and tunerkit_from_factors")
    tuner = tunerkit.tuner(trial.wrapped())
    generator = torch.Generator().manual_seed(3)
    own = {path: base for path, _, base in placed(tuner.model)}
    bases = {target.path: own[target.path] for target in tuner.targets}
    given = {}
    for number, (path, base) in enumerate(bases.items()):
        rank = min(number % 4, base.in_features, base.out_features)
        given[path] = Factors(
            q=torch.randn(rank, base.in_features, generator=generator),
            p=torch.randn(base.out_features, rank, generator=generator),
        )
    _, adapters = hooks.from_factors(trial.method, tuner.targets, given)
    for path, adapter in adapters.items():
        found, product = hooks.factors(path, trial.method, adapter, bases[path]), given[path]
        difference = largest({"": found.p @ found.q - product.p @ product.q})
        assert difference <= 1e-5 * max(1.0, largest({"": product.p @ product.q})), (
            f"{path}: an adapter built from factors of rank {product.rank} adds something else, by {difference:.3g}; "
            "undo in tunerkit_from_factors the scale that tunerkit_factors multiplies in"
        )


@one_code_path()
def check_merges(trial: Trial) -> None:
    """Merging keeps the output. Unmerging restores every base tensor bit for bit. A merged model can be saved."""
    require_delta(trial.method)
    model = ended(trial)
    require_places(model)
    adapted = trial.output(model)
    tunerkit.merge(model)
    assert_same(trial.output(model), adapted, "merged against adapted", _HINT, adapters=adapter_dtypes(model))
    loaded = tunerkit.load(trial.build(), tunerkit.save(model, trial.folder / "merged")).eval()
    assert_same(
        trial.output(loaded), adapted, "saved while merged", "change no weight of the adapter in the delta's hooks"
    )
    with tunerkit.disabled(model):
        assert torch.equal(trial.output(model), base_output(trial)), (
            "disabled while merged, the model is not the base; " + _OWN
        )
    tunerkit.unmerge(model)
    assert torch.equal(trial.output(model), adapted), "unmerged, the output is another than before; " + _OWN
    assert_base_untouched(model, trial.case, _OWN)


_OWN = "write to no tensor of the base layer in a hook"


@one_code_path()
def check_disabled_is_the_base(trial: Trial) -> None:
    """Inside ``disabled`` the output is bit-identical to the base model's; then it is adapted again."""
    expected, model = base_output(trial), ended(trial)
    adapted = trial.output(model)
    with tunerkit.disabled(model), tunerkit.disabled(model):
        assert torch.equal(trial.output(model), expected), "disabled, the model is not the base; " + _OWN
    assert torch.equal(trial.output(model), adapted), "after disabled, the output is another than before; " + _OWN


@one_code_path()
def check_unwraps(trial: Trial) -> None:
    """`unwrap` restores the base model and its ``requires_grad`` flags."""
    original = trial.build()
    trial.output(original.eval())  # a library may leave something in a model at its first forward
    model = copy.deepcopy(ended(trial))
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
    assert_base_untouched(model, trial.case, _OWN)
    flags = {name: p.requires_grad for name, p in original.named_parameters()}
    found = {name: p.requires_grad for name, p in model.named_parameters()}
    assert found == flags, "unwrap does not restore requires_grad; do not set it in a hook"
    assert torch.equal(trial.output(model), trial.output(original)), "unwrapped, the output is not the base's; " + _OWN


def check_keeps_merged(trial: Trial) -> None:
    """``unwrap(keep_merged=True)`` keeps the adapted output in a plain model."""
    require_delta(trial.method)
    model = ended(trial)
    require_places(model)
    adapted, dtypes = trial.output(model), adapter_dtypes(model)
    merged = tunerkit.unwrap(copy.deepcopy(model), keep_merged=True)
    assert_same(trial.output(merged), adapted, "kept merged", _HINT, adapters=dtypes)
    assert list(merged.state_dict()) == list(trial.build().state_dict()), "unwrap left something in the model; " + _OWN


def check_fused_is_plain(trial: Trial) -> None:
    """In float64, the fused low-rank product has the plain form's output and gradients, to 1e-10."""
    model = fill_(trial.in_fp64().wrapped())
    trial.start_training(model)
    with fused_form():
        fused = _values_and_gradients(trial, model)
    with plain_form():
        plain = _values_and_gradients(trial, model)
    for name, expected in plain.items():
        worst = largest({name: fused[name] - expected})
        assert worst <= 1e-10 * max(1.0, largest({name: expected})), (
            f"{name} differs by {worst:.3g} between the fused and the plain low-rank product; pass add_low_rank the "
            "y that forward received, once, and do not use that y again"
        )


def _values_and_gradients(trial: Trial, model: nn.Module) -> dict[str, Tensor]:
    loss = seeded(trial.loss, model)
    found = {"the loss": loss.detach(), "the output": seeded(trial.output, model).detach()}
    tuner = tunerkit.tuner(model)
    copies = {name: p for name, p in tuner.named_parameters() if p.requires_grad}
    values = torch.autograd.grad(
        loss, list(copies.values()), allow_unused=True, materialize_grads=True, retain_graph=True
    )
    return {**found, **dict(zip(copies, values, strict=True)), **gradients(loss, tuner)}
