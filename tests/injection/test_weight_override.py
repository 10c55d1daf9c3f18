"""Temporary weight overrides, compared with attention written out by hand."""

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tunerkit
from tests.support.model_checks import check_common, each_copy, silent
from tests.support.toys import OneMethod, Running, Toys
from tunerkit.errors import AdapterError, PluginError, TargetError, TunerkitWarning
from tunerkit.injection import eject_
from tunerkit.injection.weight_override import override, restore
from tunerkit.layers import as_base_layer, torch_private
from tunerkit.layers.kinds import AttentionLayer
from tunerkit.plugin import Adapter, AdapterConfig, BaseLayer, Delta, Method, setting
from tunerkit.serialization.fingerprint import fingerprint
from tunerkit_testing.cases import Case
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_adapters import Shift

WIDTH, HEADS = 8, 2
NAMES = ("weight", "bias", "in_proj_weight", "in_proj_bias", "use_nested_tensor")
IN, OUT = "attention.tunerkit.default.adapter", "attention.out_proj.tunerkit.default.adapter"


class Attends(nn.Module):
    """(N, L, E) to (N, L, E): self-attention between two linear layers."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **options)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        h = self.first(x)
        h = h if self.attention.batch_first else h.transpose(0, 1)
        h = self.attention(h, h, h, **options)[0]
        result: Tensor = self.last(h if self.attention.batch_first else h.transpose(0, 1))
        return result


def filled(model: nn.Module) -> nn.Module:
    """The model frozen and with random values: torch orders some products by whether a weight requires a gradient."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    return model.requires_grad_(False)


def attends(**options: Any) -> Any:
    """The same model at every call."""
    return filled(Attends(**{"batch_first": True, **options}))


def encoder(activation: Any = "relu", *, batch_first: bool = True) -> Any:
    """Two of torch's own layers; with relu or gelu they have a fused inference path."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 12, dropout=0.0, activation=activation, batch_first=batch_first)
    return filled(nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first and activation == "relu"))


def batch() -> Tensor:
    return torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1))


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(batch())
    return found


def adapted(toys: "Toys", model: nn.Module | None = None, method: str = "toy-low-rank", **config: Any) -> Any:
    """The model with adapters at all its linear layers, with values away from their start."""
    model = attends() if model is None else model
    return toys.fill_(tunerkit.wrap(model, method, {"targets": "all-linear", **config}, seed=3))


def by_hand(model: Any, x: Tensor) -> Tensor:
    """What `Attends` computes with low-rank adapters everywhere, from plain matrices and a softmax."""
    own = dict(model.named_parameters())

    def linear(path: str, x: Tensor, weight: str = "weight", bias: str = "bias") -> Tensor:
        a, b = (own[f"{path}.tunerkit.default.adapter.{name}"] for name in "ab")
        return x @ own[f"{path}.{weight}"].T + own[f"{path}.{bias}"] + 0.5 * (x @ a.T) @ b.T

    h = linear("attention", linear("first", x), "in_proj_weight", "in_proj_bias")
    heads = [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in h.chunk(3, -1)]  # each (N, heads, L, E/heads)
    q, k, v = heads
    share = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
    return linear("last", linear("attention.out_proj", (share @ v).transpose(1, 2).flatten(2)))


def overridden(model: nn.Module) -> list[str]:
    """Paths where a plain attribute replaces a parameter; between two calls there are none."""
    found = [
        f"{type(m).__name__}.{n}" for m in model.modules() for n in vars(m) if n in (*NAMES, "_tunerkit_overrides")
    ]
    return [name for name in found if name != "TransformerEncoder.use_nested_tensor"]


def our_hooks(model: nn.Module) -> int:
    return sum(h is override for m in model.modules() for h in m._forward_pre_hooks.values()) + sum(
        h is restore for m in model.modules() for h in m._forward_hooks.values()
    )


def gradients(model: nn.Module, run: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """The adapters' gradients of a loss of the output."""
    model.zero_grad()
    run(model).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- Outputs and gradients -------------------------------------------------------------------------------------------


def test_outputs_and_gradients_are_those_of_attention_written_out_by_hand(toys: "Toys") -> None:
    """In float64, to 1e-10: one low-rank product at each projection; every adapter has a gradient, the base none."""
    model, x = adapted(toys, adapter_dtype="float64").double(), batch().double()
    torch.testing.assert_close(model(x), by_hand(model, x), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(model(x), attends().double()(x), atol=1e-2)
    found, expected = gradients(model, lambda m: m(x)), gradients(model, lambda m: by_hand(m, x))
    assert set(found) == set(expected) == {name for name, p in model.named_parameters() if ".tunerkit." in name}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_first_output_is_bit_identical(toys: "Toys", batch_first: bool, bias: bool, training: bool) -> None:
    """With and without gradients, in both layouts, with need_weights and masks: a zero ΔW changes nothing."""
    options: list[dict[str, Any]] = [{}, {"need_weights": False}, {"attn_mask": torch.ones(5, 5).triu(1).bool()}]
    plain = attends(batch_first=batch_first, bias=bias).train(training)
    model = tunerkit.wrap(copy.deepcopy(plain), "toy-low-rank", {"targets": "all-linear"})
    assert [target.path for target in tunerkit.tuner(model).targets] == [
        *("first", "attention", "attention.out_proj", "last")
    ]
    for chosen in options:
        assert torch.allclose(model(batch(), **chosen), plain(batch(), **chosen), atol=1e-6)
        with torch.no_grad():
            assert torch.equal(model(batch(), **chosen), plain(batch(), **chosen))


def test_the_delta_of_a_half_precision_base_is_added_in_full_precision(toys: "Toys") -> None:
    """W + ΔW is rounded once, to the base's dtype."""
    model = adapted(toys, attends().bfloat16())
    seen: list[Tensor] = []
    model.attention.register_forward_pre_hook(lambda module, args: seen.append(module.in_proj_weight))
    assert model(batch().bfloat16()).dtype == torch.bfloat16
    own, adapter = model.attention.get_parameter("in_proj_weight"), model.get_submodule(IN)
    assert torch.equal(seen[0], (own.float() + 0.5 * adapter.b @ adapter.a).bfloat16())


def test_two_adapters_at_one_place_add_up(toys: "Toys") -> None:
    """If one of them is removed from a copy of the model, the copy has the other's output."""
    model = tunerkit.wrap(attends(), "toy-low-rank", {"targets": ["attention"]})
    tunerkit.wrap(model, "toy-shift", {"targets": ["attention", "out_proj"]}, adapter="two")
    toys.fill_(model)
    expected = attends()
    one, two = model.get_submodule(IN), model.attention.tunerkit.get("two").adapter
    with torch.no_grad():
        expected.attention.in_proj_weight += 0.5 * one.b @ one.a
        expected.attention.in_proj_bias += two.v
        expected.attention.out_proj.bias += model.attention.out_proj.tunerkit.get("two").adapter.v
    assert toys.close(model(batch()), expected(batch()))


def test_a_delta_bias_is_added_where_the_base_has_none(toys: "Toys") -> None:
    """The output includes it, as at a called layer. Merging has nowhere to store it, and raises an error."""
    model = adapted(toys, attends(bias=False), "toy-shift")
    expected = attends(bias=False)
    expected.attention.in_proj_bias = nn.Parameter(model.attention.tunerkit.get("default").adapter.v.detach())
    expected.attention.out_proj.bias = nn.Parameter(model.get_parameter(f"{OUT}.v").detach())
    for layer in ("first", "last"):
        expected.get_submodule(layer).bias.data += model.get_parameter(f"{layer}.tunerkit.default.adapter.v").detach()
    assert toys.close(model(batch()), expected(batch()))
    with pytest.raises(AdapterError, match="cannot merge into 'attention'"):
        tunerkit.merge(model)


@pytest.mark.parametrize("bias", ["adapters", "all"])
def test_attention_s_biases_are_trained(toys: "Toys", bias: str) -> None:
    """The copies of in_proj_bias and of out_proj's bias start as the base's and merge to their own values."""
    targets = "all-linear" if bias == "adapters" else ["first"]
    model = tunerkit.wrap(attends(), "toy-low-rank", {"targets": targets, "bias": bias})
    assert torch.equal(output(model), output(attends()))
    found = gradients(model, lambda m: m(batch()))
    for path in ("attention", "attention.out_proj"):
        assert found[f"{path}.tunerkit.default.bias"].abs().max() > 0
    before = output(toys.fill_(model))
    tunerkit.merge(model)
    assert toys.close(output(model), before)
    assert torch.equal(model.attention.in_proj_bias, model.attention.tunerkit.get("default").bias)


# --- Only for the duration of a call ---------------------------------------------------------------------------------


def test_nothing_is_overridden_between_two_calls(toys: "Toys") -> None:
    """Inside a call the weight is overridden; parameters and state_dict never change."""
    model = adapted(toys)
    before = toys.snapshot(model)
    inside: list[Any] = []

    def look(module: Any, args: Any) -> None:
        inside.append((type(module.in_proj_weight), module.out_proj.weight.requires_grad, toys.snapshot(model)))

    handle = model.attention.register_forward_pre_hook(look)
    model(batch())
    handle.remove()
    assert inside[0][:2] == (Tensor, True)
    assert inside[0][2]["identity"] == before["identity"]
    assert overridden(model) == []
    assert type(model.attention.in_proj_weight) is nn.Parameter


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_inside_leaves_nothing_overridden(toys: "Toys", error: type[BaseException]) -> None:
    """An error restores at once, an interrupt, which no hook sees, at the next call; later outputs are right."""
    model, twin = adapted(toys), adapted(toys)
    armed = [True]

    def fail(module: nn.Module, args: Any) -> None:
        if armed.pop() if armed else False:
            raise error("inside")

    model.attention.register_forward_pre_hook(fail)
    with pytest.raises(error):
        model(batch())
    if error is ValueError:
        assert overridden(model) == []
    with tunerkit.disabled(model):
        assert torch.equal(output(model), output(attends()))
    assert torch.equal(output(model), output(twin))
    assert overridden(model) == []


def interrupt(model: nn.Module, place: nn.Module) -> pytest.ExceptionInfo[KeyboardInterrupt]:
    """Call the model and press Ctrl-C inside ``place``; return the exception with its traceback."""

    def fail(module: nn.Module, args: Any) -> None:
        raise KeyboardInterrupt

    with place.register_forward_pre_hook(fail), pytest.raises(KeyboardInterrupt) as info:
        model(batch())
    return info


def test_an_interrupted_call_is_no_running_one_while_its_traceback_is_kept(toys: "Toys") -> None:
    """An except block may keep it: the model's next call restores the weights, and a part's next call is right."""
    model, twin = adapted(toys), adapted(toys)
    before = toys.snapshot(model)
    for _ in range(2):
        info = interrupt(model, model.attention)
        assert overridden(model) != []
        h = twin.first(batch())
        assert torch.equal(model.attention(h, h, h)[0], twin.attention(h, h, h)[0])
        toys.fill_(model, seed=9)
        toys.fill_(twin, seed=9)
        assert torch.equal(model(batch()), twin(batch()))
        assert overridden(model) == []
        assert info.type is KeyboardInterrupt
    interrupt(model, model.attention)
    tunerkit.unwrap(model)
    assert overridden(model) == []
    assert toys.snapshot(model)["attributes"] == toys.snapshot(attends())["attributes"]
    assert toys.snapshot(model)["identity"].items() <= before["identity"].items()


def test_an_interrupted_call_does_not_change_what_is_merged(toys: "Toys") -> None:
    """Merging adds to the module's own weights, even while they are overridden."""
    model, twin = adapted(toys), adapted(toys)
    interrupt(model, model.attention)
    tunerkit.merge(model)
    tunerkit.merge(twin)
    assert torch.equal(output(model), output(twin))
    assert torch.equal(model.attention.in_proj_weight, twin.attention.in_proj_weight)
    assert torch.equal(output(tunerkit.unmerge(model)), output(tunerkit.unmerge(twin)))


def test_a_thread_that_died_inside_a_call_is_not_waited_for(toys: "Toys") -> None:
    """The next thread that runs the owner restores its overrides."""
    model, twin = adapted(toys), adapted(toys)
    model.attention.forward = lambda *args, **kwargs: sys.exit()
    thread = threading.Thread(target=lambda: model(batch()), daemon=True)
    thread.start()
    thread.join(300)
    assert not thread.is_alive()
    del model.attention.forward
    assert overridden(model) != []
    h = twin.first(batch())
    assert torch.equal(model.attention(h, h, h)[0], twin.attention(h, h, h)[0])
    assert overridden(model) == []


def test_the_whole_model_may_be_called_inside_an_owner(toys: "Toys") -> None:
    """Its call of the owner is another one, also after one that was interrupted: both have their adapters."""
    model, twin = adapted(toys), adapted(toys)
    interrupt(model, model.attention)
    armed = [True]

    def whole(module: Any, args: Any) -> None:
        if armed.pop() if armed else False:
            assert torch.equal(model(batch()), twin(batch()))

    with model.attention.register_forward_pre_hook(whole):
        assert torch.equal(model(batch()), twin(batch()))
    assert overridden(model) == []


def test_an_error_in_the_plugin_s_own_hook_leaves_nothing_overridden(toys: "Toys", monkeypatch: Any) -> None:
    """If the second delta fails, the first is restored."""
    model = adapted(toys)
    model.attention.out_proj.tunerkit.get("default").method = "gone"
    with pytest.raises(PluginError, match="'gone'"):
        model(batch())
    assert overridden(model) == []


def test_a_call_inside_a_call_takes_nothing_away_from_it(toys: "Toys") -> None:
    """A hook runs the same attention again before its forward: both calls are adapted."""
    model, twin = adapted(toys), adapted(toys)
    inner: list[Tensor] = []

    def again(module: Any, args: Any) -> None:
        if not inner:
            inner.append(torch.zeros(0))
            inner.append(module(*args)[0])

    model.attention.register_forward_pre_hook(again)
    assert torch.equal(model(batch()), twin(batch()))
    h = twin.first(batch())
    assert torch.equal(inner[1], twin.attention(h, h, h)[0])
    assert overridden(model) == []


def test_two_threads_at_once_are_refused_and_merged_they_are_not(toys: "Toys") -> None:
    """Otherwise one thread would silently use the other's weights, or the base's."""
    model = adapted(toys)
    expected = model(batch())
    errors: list[Exception] = []

    def other() -> None:
        try:
            model.attention(*[batch()] * 3)
        except AdapterError as error:
            errors.append(error)

    def meanwhile(module: nn.Module, args: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    model.attention.register_forward_pre_hook(meanwhile)
    assert torch.equal(model(batch()), expected)
    assert [("merge" in str(error)) for error in errors] == [True]
    tunerkit.merge(model)
    assert toys.close(model(batch()), expected)
    assert len(errors) == 1


def test_a_call_of_another_thread_may_end_at_any_moment(toys: "Toys", monkeypatch: Any) -> None:
    """Also just after this thread has seen it at the start of its own call."""
    model = adapted(toys)
    expected = model(batch())
    inside, leave = threading.Event(), threading.Event()

    def wait(module: nn.Module, args: Any) -> None:
        if threading.current_thread() is thread:
            inside.set()
            assert leave.wait(300)

    def end_other(function: Any) -> Any:
        leave.set()
        if threading.current_thread() is not thread:
            thread.join()
        return function

    thread = threading.Thread(target=lambda: model(batch()))
    model.attention.register_forward_pre_hook(wait)
    thread.start()
    assert inside.wait(300)
    monkeypatch.setattr(torch_private, "uncompiled", end_other)
    assert torch.equal(model(batch()), expected)
    assert overridden(model) == []


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_with_the_adapters(toys: "Toys", reentrant: bool) -> None:
    """The forward that backward recomputes is overridden too; gradients are equal, and no override remains."""
    # Reentrant, the first forward runs without gradients, where torch may attend with a kernel that rounds otherwise.
    same = toys.close if reentrant else torch.equal
    model, x = adapted(toys), batch().requires_grad_()
    found = gradients(model, lambda m: checkpoint(m, x, use_reentrant=reentrant))
    expected = gradients(model, lambda m: m(x))
    assert overridden(model) == []
    assert set(found) == set(expected)
    assert all(same(found[name], gradient) for name, gradient in expected.items())


def test_a_forward_replaced_after_wrapping_still_gets_the_overrides(toys: "Toys", tmp_path: Any) -> None:
    """Accelerate replaces it on the instance; a file saved after that still fits the base."""
    model, twin = adapted(toys, bias="adapters"), adapted(toys, bias="adapters")
    model.attention.forward = model.attention.forward
    assert torch.equal(output(model), output(twin))
    assert "attention.in_proj_bias" not in fingerprint(tunerkit.tuner(model))
    assert torch.equal(output(tunerkit.load(attends(), tunerkit.save(model, tmp_path), trainable=True)), output(twin))
    tunerkit.unwrap(model)
    assert our_hooks(model) == 0


# --- Inference paths --------------------------------------------------------------------------------------------------


def test_attention_s_fast_path_gets_the_overrides(toys: "Toys", monkeypatch: Any) -> None:
    """Without gradients torch passes the weights to one kernel: it is called, with the overridden weights."""
    model = adapted(toys).eval()
    expected = model(batch())
    handed: list[Tensor] = []
    kernel = torch._native_multi_head_attention

    def spy(*args: Any) -> Any:
        handed.append(args[5])
        return kernel(*args)

    monkeypatch.setattr(torch, "_native_multi_head_attention", spy)
    with torch.no_grad():
        assert toys.close(model(batch()), expected)
    adapter = model.get_submodule(IN)
    assert torch.equal(handed[0], model.attention.in_proj_weight + 0.5 * adapter.b @ adapter.a)


@pytest.mark.parametrize("targets", ["all-linear", ["linear1"], ["self_attn"], ["out_proj"]])
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_transformer_encoder_is_right_in_every_mode(toys: "Toys", targets: Any, batch_first: bool) -> None:
    """In training, in evaluation with and without gradients, with padding (nested tensors in torch), and merged."""
    model = adapted(toys, encoder(batch_first=batch_first), targets=targets)
    merged = copy.deepcopy(model)
    expected = tunerkit.unwrap(merged, keep_merged=True).train().requires_grad_()
    x = batch() if batch_first else batch().transpose(0, 1)
    pad = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5])
    kept = ~(pad if batch_first else pad.T)
    for training in (True, False):
        for mode in (torch.enable_grad, torch.no_grad):
            with mode():
                y = model.train(training)(x, src_key_padding_mask=pad)
                z = model(x)
            assert toys.close(y[kept], expected(x, src_key_padding_mask=pad)[kept])
            assert toys.close(z, expected(x))
    assert overridden(model) == []


@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad])
def test_a_disabled_encoder_is_the_base(toys: "Toys", grad: Any) -> None:
    """Bit for bit if the base runs the same operations: its layers are not fused, but attention's kernel is."""
    base = encoder(F.silu).eval()
    model = adapted(toys, encoder(F.silu)).eval()
    tunerkit.merge(model)
    with grad(), tunerkit.disabled(model):
        assert torch.equal(model(batch()), base(batch()))


# --- Merge, unwrap, files, copies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["toy-low-rank", "toy-shift"])
def test_they_do_what_any_adapter_does(toys: "Toys", method: str) -> None:
    """They are trained, disabled, merged, unmerged, saved, loaded, copied and unwrapped; no hook of ours is left."""
    case = Case("attention", attends, output, lambda m: m(batch()).square().mean(), {"targets": "all-linear"}, lr=0.05)
    check_common(method, case)
    model = adapted(toys, method=method)
    assert our_hooks(model) == 2
    assert our_hooks(tunerkit.unwrap(model)) == 0


def test_one_of_two_adapters_taken_out_leaves_the_hooks_for_the_other(toys: "Toys") -> None:
    """The owner's hooks are removed with the last adapter at the weights that it uses."""
    model = adapted(toys, targets=["attention"])
    output = model(batch())
    tunerkit.wrap(model, "toy-shift", {"targets": ["out_proj"]}, adapter="two")
    eject_([tunerkit.tuner(model, "two")])
    assert our_hooks(model) == 2
    assert torch.equal(model(batch()), output)


def test_a_saved_adapter_loads(toys: "Toys", tmp_path: Any) -> None:
    """The file has attention's weights and biases under their module's path, and a fresh base gets them."""
    model = adapted(toys, bias="adapters")
    path = tunerkit.save(model, tmp_path)
    assert torch.equal(output(tunerkit.load(attends(), path, trainable=True)), output(model))
    other = attends()
    other.attention.in_proj_weight.data += 1
    with pytest.raises(tunerkit.errors.BaseMismatchError, match=r"attention\.in_proj_weight"):
        tunerkit.load(other, path)
    other = attends()
    other.attention.in_proj_bias.data += 1  # trained with the adapter: the base's own does not matter
    assert tunerkit.load(other, path) is other


@each_copy
def test_a_copy_overrides_its_own(toys: "Toys", way: Any) -> None:
    """The copy computes the same, and trains and unwraps independently."""
    model = adapted(toys)
    twin = way(model)
    assert torch.equal(twin(batch()), model(batch()))
    toys.fill_(twin)
    assert not torch.equal(twin(batch()), model(batch()))
    tunerkit.unwrap(twin)
    assert our_hooks(twin) == 0
    assert our_hooks(model) == 2
    assert torch.equal(twin(batch()), attends()(batch()))


def test_an_attention_that_is_the_model_itself_gets_the_overrides_too(toys: "Toys") -> None:
    """The owner of out_proj then has an empty path."""
    base = filled(nn.MultiheadAttention(WIDTH, HEADS))
    model: Any = adapted(toys, copy.deepcopy(base), targets=["out_proj"])
    delta = model.out_proj.tunerkit.get("default").adapter
    base.get_submodule("out_proj").weight.data += 0.5 * delta.b.detach() @ delta.a.detach()
    assert toys.close(model(*[batch()] * 3)[0], base(*[batch()] * 3)[0])


# --- Errors and warnings ----------------------------------------------------------------------------------------------


def test_the_kind_has_no_input_to_project() -> None:
    """Its features are those of the packed matrix; a method that asks for its input gets an error that explains why."""
    base = as_base_layer(nn.MultiheadAttention(WIDTH, HEADS))
    assert isinstance(base, AttentionLayer)
    assert (base.in_features, base.out_features, base.scale) == (WIDTH, 3 * WIDTH, 1.0)
    assert torch.equal(base.dense(), base.module.in_proj_weight)
    for call in (lambda: base.project_in(batch(), batch()), lambda: base.project_out(batch(), batch())):
        with pytest.raises(AdapterError, match="in its own forward"):
            call()


@attrs.frozen
class MuteConfig(AdapterConfig):
    """With a dropout setting, which adapters may have."""

    dropout: float = setting(0.0, ge=0, doc="Share dropped.")


class Mute(OneMethod):
    """A method that does not define its delta."""

    method = Method("mute", config=MuteConfig)

    @tunerkit.hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer) -> Adapter:
        return Shift(base)


class Detached(Mute):
    """A method that returns its delta without a gradient."""

    @tunerkit.hookimpl
    def tunerkit_delta(self, adapter: Shift) -> Delta:
        return Delta(bias=adapter.v.detach())


@pytest.fixture
def method(request: Any) -> Iterator[str]:
    """The method of the plugin class in the parameter, registered for one test."""
    with registered(request.param()):
        yield "mute"


@pytest.mark.parametrize("method", [Mute], indirect=True)
def test_a_method_without_a_delta_is_refused_at_wrap(toys: "Toys", method: str) -> None:
    """The error names the target and the hook, and the model is unchanged."""
    model = attends()
    before = toys.snapshot(model)
    for path in ("attention", "attention.out_proj"):
        with pytest.raises(TargetError, match=f"'{path}'.* tunerkit_delta"):
            tunerkit.wrap(model, method, {"targets": [path]})
    assert toys.same(toys.snapshot(model), before)


@pytest.mark.parametrize("method", [Detached], indirect=True)
def test_a_delta_without_a_gradient_is_refused_where_it_should_train(toys: "Toys", method: str) -> None:
    """The error comes in a forward with gradients; without gradients, or frozen, the value is enough."""
    model = tunerkit.wrap(attends(), method, {"targets": ["attention"]})
    with pytest.raises(PluginError, match="without gradients"):
        model(batch())
    with torch.no_grad():
        assert toys.close(model(batch()), attends()(batch()))
    model.requires_grad_(False)
    assert toys.close(model(batch()), attends()(batch()))


@pytest.mark.parametrize("method", [Detached], indirect=True)
def test_dropout_that_cannot_be_applied_triggers_a_warning(method: str) -> None:
    """One warning has the targets; if every target is called, or dropout is 0, there is none."""
    with pytest.warns(TunerkitWarning, match=r"dropout is not applied at 2 targets \(attention, \.\.\.\)"):
        tunerkit.wrap(attends(), method, {"targets": "all-linear", "dropout": 0.1})
    with silent(Warning):
        tunerkit.wrap(attends(), method, {"targets": ["first"], "dropout": 0.1})
        model = tunerkit.wrap(attends(), method, {"targets": "all-linear"})
    assert our_hooks(model) == 2


def test_the_detector_is_silent_about_known_owners_only(toys: "Toys") -> None:
    """Attention's targets run without being called; another owner that bypasses forward() still triggers a warning."""
    reads = Running(lambda m, x: F.linear(x, m.proj.weight), proj=nn.Linear(WIDTH, WIDTH))
    model = tunerkit.wrap(nn.Sequential(attends(), reads), "toy-low-rank", {"targets": "all-linear"})
    with pytest.warns(TunerkitWarning, match=r"although the module that owns their base layer did: 1\.proj\.") as told:
        model(batch())
    assert len(told) == 1


def test_a_projection_that_is_read_is_not_trained_in_full(toys: "Toys") -> None:
    """Its copy would never be called; the attention around it is copied as a whole."""
    with pytest.raises(TargetError, match="name the owner 'attention'"):
        tunerkit.wrap(attends(), "toy-shift", {"targets": ["first"], "train_modules": ["attention.out_proj"]})
    model = toys.fill_(tunerkit.wrap(attends(), "toy-shift", {"targets": ["first"], "train_modules": ["attention"]}))
    assert our_hooks(model) == 0
    assert "attention.tunerkit.default.copy.out_proj.weight" in gradients(model, lambda m: m(batch()))


def test_a_loaded_adapter_at_a_place_that_cannot_be_overridden_is_refused(toys: "Toys", tmp_path: Any) -> None:
    """Between saving and loading, the base's attention got a custom forward."""

    class Own(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    path = tunerkit.save(adapted(toys), tmp_path)
    other = attends()
    other.attention.__class__ = Own
    with pytest.raises(TargetError, match=r"attention\.out_proj: nn\.MultiheadAttention with its own forward"):
        tunerkit.load(other, path)


# --- Compiled ---------------------------------------------------------------------------------------------------------


def test_a_compiled_model_computes_the_same(toys: "Toys") -> None:
    """Outputs and gradients, also disabled, merged and with changed adapters: graph breaks, but never stale code."""
    model = adapted(toys)
    compiled = torch.compile(model, backend="eager")
    assert toys.close(compiled(batch()), model(batch()))
    found, expected = gradients(model, lambda m: compiled(batch())), gradients(model, lambda m: m(batch()))
    assert all(toys.close(found[name], gradient) for name, gradient in expected.items())
    assert set(found) == set(expected)
    with tunerkit.disabled(model):
        assert toys.close(compiled(batch()), attends()(batch()))
    toys.fill_(model)
    output = model(batch())
    assert toys.close(compiled(batch()), output)
    tunerkit.merge(model)
    assert toys.close(compiled(batch()), output)
    assert toys.close(torch.compile(model, backend="eager", fullgraph=True)(batch()), output)
    assert overridden(model) == []
