"""Canaries: each private name of torch that the core uses exists and behaves as expected."""

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import BaseTorchFunctionMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from scripts.structure import private_attributes, read
from tests.support.canaries import confirm
from tunerkit.layers import torch_private
from tunerkit_testing.counting import Counting

ROOT = Path(__file__).parents[2]
FILE = "tunerkit/layers/torch_private.py"


def parameters() -> bool:
    """The live dict: an entry is a parameter, even if an instance attribute hides it."""
    module = nn.Linear(2, 2)
    vars(module)["weight"] = "in front"
    torch_private.own_parameters(module)["further"] = nn.Parameter(torch.ones(1))
    return [name for name, _ in module.named_parameters()] == ["weight", "bias", "further"]


def children() -> bool:
    """The live dict, which takes any name."""
    module = nn.Module()
    torch_private.own_children(module)["forward"] = nn.ReLU()
    return [name for name, _ in module.named_modules()] == ["", "forward"]


def compiled() -> bool:
    """The module behind `torch.compile`; None for any other module."""
    module = nn.Linear(2, 2)
    return torch_private.compiled_from(torch.compile(module)) is module and torch_private.compiled_from(module) is None  # type: ignore[arg-type]


def calls() -> bool:
    """The module of each call in a stack, the innermost first."""

    class Looks(nn.Module):
        def forward(self, x: object) -> list[nn.Module]:
            return list(torch_private.called_in(sys._getframe()))

    inner = Looks()
    outer = nn.Sequential(inner)
    return outer(None) == [inner, outer]  # type: ignore[no-any-return]


def nothing(*_: object, **__: object) -> None:
    """A hook."""


def hooks() -> bool:
    """Hooks are found by function and removed with every flag; a second or a global one is not a single hook."""
    module = nn.Linear(2, 2)
    module.register_forward_hook(nothing, with_kwargs=True, always_call=True)
    single, found = torch_private.has_single_hook(module), torch_private.has_hook(module, nothing)
    with nn.modules.module.register_module_forward_hook(nothing):
        seen = not torch_private.has_single_hook(module)
    module.register_forward_pre_hook(nothing)
    torch_private.remove_hooks_(module, nothing)
    left = (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called)
    return single and found and seen and not any(left) and not torch_private.has_hook(module, nothing)


def classes() -> bool:
    """The bases of convolutions and norms, lazy and transposed ones too."""
    return (
        torch_private.is_convolution(nn.LazyConvTranspose2d(1, 1))
        and not torch_private.is_convolution(nn.Linear(1, 1))
        and torch_private.is_batch_norm(nn.SyncBatchNorm(1))
        and not torch_private.is_batch_norm(nn.InstanceNorm1d(1))
        and torch_private.has_statistics(nn.InstanceNorm3d(1))
        and not torch_private.has_statistics(nn.LayerNorm(1))
        and all(isinstance(norm(4, 4), torch_private.channel_norms()) for norm in (nn.GroupNorm, nn.InstanceNorm2d))
    )


def batch_dimension() -> bool:
    """Instance norms take (C, L) and (N, C, L)."""
    norm = nn.InstanceNorm1d(2)
    return [torch_private.is_batched(norm, torch.rand(shape)) for shape in ((2, 3), (1, 2, 3))] == [False, True]


def convolutions() -> bool:
    """The method that a convolution's forward calls with its weight and bias."""
    layer, x = nn.Conv1d(2, 3, 2, padding="same", padding_mode="circular", bias=False), torch.rand(1, 2, 5)
    own = [torch_private.runs_convolution_of(layer, kind) for kind in (nn.Conv1d, nn.Conv2d)]
    return own == [True, False] and torch.equal(torch_private.convolve(layer, x, layer.weight), layer(x))


def versions() -> bool:
    """Rises with an in-place change, also one through a detached view."""
    tensor = torch.zeros(2)
    before = torch_private.version(tensor)
    tensor.detach().add_(1)
    with torch.inference_mode():
        return before is not None and torch_private.version(tensor) == before + 1 and not versions_of_inference()


def divided() -> bool:
    """Every tensor of the list is divided in place."""
    tensors = [torch.ones(2), torch.ones(1)]
    torch_private.divide_(tensors, torch.tensor(4.0))
    return [tensor.tolist() for tensor in tensors] == [[0.25, 0.25], [0.25]]


def function_modes() -> bool:
    """A default device is a mode too, and changes no product; another mode, or another ``F.linear``, may."""
    before = torch_private.is_intercepted()
    with torch.device("cpu"):
        device = torch_private.is_intercepted()
    with BaseTorchFunctionMode():
        mode = torch_private.is_intercepted()
    with mock.patch.object(nn.functional, "linear", lambda *args: nn.functional.linear(*args)):
        replaced = torch_private.is_intercepted()
    return not before and not device and mode and replaced


def versions_of_inference() -> int | None:
    return torch_private.version(torch.zeros(2))


def observed_inside(block: Callable[[Callable[[Tensor], Tensor]], object]) -> Callable[[], bool]:
    """Whether `is_observed` is true inside ``block``, which gets a function to run, and false outside."""

    def check() -> bool:
        seen: list[bool] = []

        def look(x: Tensor) -> Tensor:
            seen.append(torch_private.is_observed())
            return x.sin()

        look(torch.ones(2))
        block(look)
        return seen[0] is False and len(seen) > 1 and all(seen[1:])

    return check


def in_forward_mode(look: Callable[[Tensor], Tensor]) -> None:
    with forward_ad.dual_level():
        look(torch.ones(2))


def kept(policy: CheckpointPolicy) -> Callable[[Callable[[Tensor], Tensor]], object]:
    """In both passes of selective checkpointing: the one that saves outputs, and the one that reuses them."""

    def block(look: Callable[[Tensor], Tensor]) -> None:
        def contexts() -> Any:
            return create_selective_checkpoint_contexts(lambda *_, **__: policy)

        x = torch.ones(2, requires_grad=True)
        checkpoint(lambda x: look(x).cos(), x, use_reentrant=False, context_fn=contexts).sum().backward()

    return block


def operations() -> bool:
    """Each dispatched operation is counted, including in-place ones."""
    with Counting() as operations:
        torch.ones(2).add_(1)
    return operations.count == 2


def other_modes() -> bool:
    """A dispatch mode that saves nothing does not count as observing."""
    with Counting():
        return not torch_private.is_observed()


def other(*_: object, **__: object) -> None:
    """A second hook."""


def state_hooks() -> bool:
    """Hooks after taking a state and before loading one are found by function; others stay."""
    module = nn.Linear(2, 2)
    for hook in (nothing, other):
        module.register_load_state_dict_pre_hook(hook)
        module.register_state_dict_post_hook(hook)
    torch_private.remove_state_hooks_(module, nothing)
    wrappers: Any = module._load_state_dict_pre_hooks.values()
    left = [wrapper.hook for wrapper in wrappers]
    return left == [other] == list(module._state_dict_hooks.values())


def dynamo() -> bool:
    """Compiled code is detected until a reset."""
    import torch._dynamo

    torch._dynamo.reset()
    before = list(torch._dynamo.convert_frame.input_codes.seen)
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
    noted = len(torch._dynamo.convert_frame.input_codes.seen)
    torch_private.forget_compiled()
    forgotten = not torch._dynamo.convert_frame.input_codes.seen
    return not before and noted > 0 and forgotten and torch._dynamo.config.skip_nnmodule_hook_guards is False


def compilations() -> bool:
    """A function that is compiled once and called twice has one compilation."""
    counter = torch_private.compile_counter("eager")
    compiled_function = torch.compile(torch.sin, backend=counter)
    compiled_function(torch.ones(2)), compiled_function(torch.zeros(2))
    torch.compiler.reset()
    return bool(counter.frame_count == 1)


def exporting() -> bool:
    """A compiled function is not exported, and an exported one is; dynamo traces the question either way."""

    class Asking(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if torch_private.is_transformed_or_exported() else x

    x = torch.zeros(1)
    compiled = torch.compile(Asking(), backend="eager", fullgraph=True)(x)
    exported = [torch.export.export(Asking(), (x,), strict=strict).module()(x) for strict in (True, False)]
    torch.compiler.reset()
    return [float(found) for found in (Asking()(x), compiled, *exported)] == [0, 0, 1, 1]


def onednn_products() -> bool:
    """X Wᵀ. There is none while oneDNN is off, or while a mode sees every operation."""
    x, w = torch.rand(3, 5), torch.rand(2, 5)
    with torch.backends.mkldnn.flags(enabled=False):
        off = torch_private.onednn_product()
    with Counting():
        seen = torch_private.onednn_product()
    product = torch_private.onednn_product()
    if off is not None or seen is not None or product is None:
        return off is seen is None and not torch.backends.mkldnn.is_available()
    return torch.allclose(product.default(x, w, None, "none", [], ""), x @ w.t())


OBSERVED = "is_observed (layers.fused)"
# By the names that stand in torch_private.py: what uses them, and a check.
CANARIES: dict[str, tuple[str, Callable[[], bool]]] = {
    "_C": (OBSERVED, lambda: isinstance(torch._C, type(torch))),
    "_get_current_function_mode_stack": ("is_intercepted (layers.low_rank)", function_modes),
    "_foreach_div_": ("divide_ (steps.withheld)", divided),
    "_parameters": ("own_parameters (everywhere)", parameters),
    "_modules": ("own_children, compiled_from (injection.slots)", children),
    "_orig_mod": ("compiled_from (injection.slots)", compiled),
    "_wrapped_call_impl": ("called_in (injection.preconditions, injection.weight_override)", calls),
    "_forward_hooks": ("has_hook, has_single_hook, remove_hooks_ (injection, layers.low_rank)", hooks),
    "_forward_pre_hooks": ("has_hook, remove_hooks_ (injection)", hooks),
    "_forward_hooks_with_kwargs": ("remove_hooks_ (injection)", hooks),
    "_forward_hooks_always_called": ("remove_hooks_ (injection)", hooks),
    "_global_forward_hooks": ("has_single_hook (layers.low_rank)", hooks),
    "_ConvNd": ("is_convolution (targets)", classes),
    "_NormBase": ("has_statistics (injection.preconditions)", classes),
    "_BatchNorm": ("is_batch_norm, channel_norms (injection.inject, layers.base_layer)", classes),
    "_InstanceNorm": ("channel_norms, is_batched (layers.base_layer)", classes),
    "_get_no_batch_dim": ("is_batched (layers.base_layer)", batch_dimension),
    "_conv_forward": ("runs_convolution_of, convolve (layers.kinds)", convolutions),
    "_version": ("version (layers.low_rank, layers.fused)", versions),
    "_are_functorch_transforms_active": (
        "is_transformed_or_exported, is_observed (layers.compiled, layers.fused)",
        observed_inside(lambda look: torch.vmap(look)(torch.ones(3, 2))),
    ),
    "_is_exporting_flag": ("is_transformed_or_exported, is_observed (layers.compiled, layers.fused)", exporting),
    "_current_level": (OBSERVED, observed_inside(in_forward_mode)),
    "_is_tracing": (OBSERVED, observed_inside(lambda look: torch.jit.trace(look, torch.ones(2), check_trace=False))),
    "_len_torch_dispatch_stack": ("is_observed, onednn_product (layers.fused, layers.products)", other_modes),
    "_CachingTorchDispatchMode": (OBSERVED, observed_inside(kept(CheckpointPolicy.MUST_SAVE))),
    "_CachedTorchDispatchMode": (OBSERVED, observed_inside(kept(CheckpointPolicy.PREFER_SAVE))),
    "_get_current_dispatch_mode_stack": (OBSERVED, observed_inside(kept(CheckpointPolicy.MUST_SAVE))),
    "torch.utils._python_dispatch": ("is_observed, dispatch_mode (layers.fused, testing.counting)", operations),
    "_linear_pointwise": ("onednn_product (layers.products)", onednn_products),
    "_load_state_dict_pre_hooks": ("remove_state_hooks_ (injection.inject)", state_hooks),
    "_state_dict_hooks": ("remove_state_hooks_ (injection.inject)", state_hooks),
    "torch._dynamo": (
        "uncompiled, forget_compiled (injection), compile_counter (testing.compiling)",
        lambda: dynamo() and compilations(),
    ),
}


@pytest.mark.parametrize("name", CANARIES)
def test_a_private_name_of_torch_does_what_it_is_taken_for(name: str) -> None:
    """On failure, the message says what broke, what uses it, and where to fix it."""
    users, check = CANARIES[name]
    where = f"torch {torch.__version__}: its private name {name} is not what it was. {users} relies on it: mend {FILE}"
    confirm(check, where)


def test_every_private_name_in_the_file_has_a_canary() -> None:
    """Also, no canary is for a name that is no longer used."""
    source = next(s for s in read("layers", ROOT / "tunerkit/layers") if s.name.endswith("torch_private"))
    assert set(private_attributes(source)) == set(CANARIES)


def test_tunerkit_is_imported_without_a_private_name_of_torch() -> None:
    """A renamed one breaks its users when they run, never the import: the file touches none outside of functions."""
    source = next(s for s in read("layers", ROOT / "tunerkit/layers") if s.name.endswith("torch_private"))
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef):
            node.body = []
    assert private_attributes(source) == ["torch._dynamo"]  # a name alone, which functions import
