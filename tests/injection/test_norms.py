"""Methods that adapt norms: the weight is a vector, to which a delta is merged as to any weight."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tests.support.model_checks import check_common, nudge_, pickled
from tests.support.toy_norms import NormPlugin
from tests.support.toy_outputs import OutputPlugin
from tests.support.toy_readers import ScaleConfig, ScalePlugin
from tests.support.toys import registering
from tunerkit.errors import AdapterError, TargetError
from tunerkit.layers import NormLayer, as_output
from tunerkit.plugin import Method
from tunerkit_testing.cases import Case
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import LowRankPlugin

X = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(1))


class Root(nn.Module):
    """A norm as Llama's: without a mean and a bias, in fp32 inside."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.rand(features) + 0.5), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.weight * wide.to(x.dtype)


class Offset(Root):
    """A norm as Gemma's: it multiplies by 1 + its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.unscaled(x.float()) * (1 + self.weight.float())).type_as(x)

    def unscaled(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)


def randomized(norm: nn.LayerNorm) -> nn.LayerNorm:
    """The norm with a weight and a bias that no product or sum would hide."""
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        if norm.bias is not None:
            norm.bias.normal_()
    return norm


NORMS = {
    "LayerNorm": lambda: randomized(nn.LayerNorm(8)),
    "LayerNorm without a bias": lambda: randomized(nn.LayerNorm(8, bias=False)),
    "RMSNorm": lambda: nn.RMSNorm(8),
    "as Llama's": lambda: Root(8),
    "as Gemma's": lambda: Offset(8),
}


class Model(nn.Module):
    """A norm, a layer, a norm and a head."""

    def __init__(self, kind: str = "LayerNorm") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.layer, self.last = NORMS[kind](), nn.Linear(8, 8), NORMS[kind]()
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.last(torch.tanh(self.layer(self.first(x)))))
        return result


_toys = registering(NormPlugin(), OutputPlugin(), LowRankPlugin(), ScalePlugin())


each_kind = pytest.mark.parametrize("kind", NORMS)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_as_the_base_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    """By default at every norm; every tensor is trained."""
    base = Model(kind).to(dtype)
    expected = base(X.to(dtype))
    model = tunerkit.wrap(base, "toy-norms")
    assert tunerkit.tuner(model).adapters().keys() == {"first", "last"}
    assert torch.equal(model(X.to(dtype)), expected)


@each_kind
def test_it_computes_and_learns_what_the_norm_itself_would(kind: str) -> None:
    """Against the plain training of the norms' own parameters, in fp64: outputs and weights after three steps."""
    base = Model(kind).double().requires_grad_(False)
    for norm in (base.first, base.last):
        norm.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in base.parameters() if p.requires_grad], lr=0.05, weight_decay=0)
    model = tunerkit.wrap(Model(kind).double(), "toy-norms", {"adapter_dtype": "float64"})
    own = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0)
    tunerkit.attach(model, own, total_steps=3)
    x = X.double()
    for _ in range(3):
        for each, its_optimizer in ((base, optimizer), (model, own)):
            its_optimizer.zero_grad()
            each(x).square().sum().backward()
            its_optimizer.step()
    close = 1e-5 if kind.startswith("as") else 1e-12  # those compute in fp32
    torch.testing.assert_close(model(x), base(x), rtol=close, atol=close)
    for name in ("first", "last"):
        found = tunerkit.tuner(model).adapters()[name].get_parameter("weight") - int(kind == "as Gemma's")
        torch.testing.assert_close(found, getattr(base, name).weight, rtol=close, atol=close)


def test_a_copy_and_a_pickle_compute_the_same() -> None:
    """The kind is a part of the model."""
    for model in (tunerkit.wrap(Model("as Gemma's"), "toy-norms"), tunerkit.wrap(Model(), "toy-outputs")):
        for twin in (copy.deepcopy(nudge_(model)), pickled(model)):
            assert torch.equal(twin(X), model(X))


def test_what_scales_an_output_merges_into_the_norm() -> None:
    """The delta of a layer, (l - 1) W, is right for a norm, whose W is a column; beside another adapter too."""

    class Outputs(ScalePlugin):
        method = Method("toy-scaled", config=ScaleConfig, targets="outputs")

    with registered(Outputs()):
        for kind in NORMS:
            model = tunerkit.wrap(Model(kind), "toy-scaled", {"targets": ["first", "last", "layer"]})
            model = tunerkit.wrap(model, "toy-norms", adapter="norms")
            adapted = nudge_(model)(X)
            tunerkit.merge(model)
            torch.testing.assert_close(model(X), adapted, rtol=1e-5, atol=1e-5)


def test_a_trained_bias_beside_it_merges_too() -> None:
    """Another adapter trains the norm's bias; the sums are those of the forward."""
    model = tunerkit.wrap(Model(), "toy-low-rank", {"targets": ["layer"], "bias": "all"}, adapter="biases")
    model = tunerkit.wrap(model, "toy-norms", adapter="norms")
    adapted = nudge_(model)(X)
    tunerkit.merge(model)
    torch.testing.assert_close(model(X), adapted, rtol=1e-5, atol=1e-5)


class Curved(nn.Module):
    """Has a weight (out,) and a bias, and is no norm: the output is not linear in the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.weight * x) + self.bias


NO_NORMS = {
    "an activation with a weight": lambda: nn.PReLU(8),
    "a weight that bends": Curved,
    "a batch norm": lambda: nn.BatchNorm1d(8),
    "a group norm": lambda: nn.GroupNorm(2, 8),
    "a norm without a weight": lambda: nn.LayerNorm(8, elementwise_affine=False),
    "a norm of two dimensions": lambda: nn.LayerNorm((3, 8)),
}


@pytest.mark.parametrize("build", NO_NORMS.values(), ids=NO_NORMS)
def test_what_is_no_such_norm_is_refused_by_name_and_not_chosen(build: Any) -> None:
    """Its weight is not known to multiply the last dimension, so a merge could be wrong without an error."""
    model = nn.Sequential(nn.LayerNorm(8), build())
    assert not NormLayer.matches(model[1])
    assert not as_output(model[1]).has_weight
    with pytest.raises(TargetError, match="1: is not a norm over the last dimension"):
        tunerkit.wrap(model, "toy-norms", {"targets": ["1"]})
    assert tunerkit.tuner(tunerkit.wrap(model, "toy-norms")).adapters().keys() == {"0"}


def test_a_forward_of_the_instance_is_no_known_norm() -> None:
    """It may do anything with the weight."""
    model = Model()
    model.last.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(TargetError, match="last: is not a norm"):
        tunerkit.wrap(model, "toy-norms", {"targets": ["last"]})


def test_the_check_of_a_norm_leaves_the_random_state_and_the_module_alone() -> None:
    """It draws from a generator of its own, and runs the forward on a stand-in."""
    norm = randomized(nn.LayerNorm(8))
    torch.manual_seed(3)
    before, held = torch.get_rng_state(), dict(vars(norm))
    assert NormLayer.matches(norm)
    assert torch.equal(torch.get_rng_state(), before)
    assert vars(norm) == held


@each_kind
def test_it_does_what_any_method_does(kind: str) -> None:
    """And its delta is what it adds; a norm with an adapter compiles into one graph, which old versions cut there."""

    def output(model: nn.Module) -> Tensor:
        result: Tensor = model(X.to(next(model.parameters()).dtype))
        return result

    case = Case("norms", lambda: Model(kind), output, lambda model: output(model).float().square().mean(), lr=0.05)
    more = ["delta_is_what_forward_adds", "delta_gives_gradients", "gradients_are_true"]
    if torch.__version__ >= "2.12":  # no comparison of texts
        more.append("compiles")
    check_common("toy-norms", case, *(more if kind == "LayerNorm" else ()))


def test_a_product_at_a_norm_is_refused_in_words() -> None:
    """A vector mixes no features; the message says what can be added."""
    base = as_output(nn.LayerNorm(8))
    assert (base.out_features, base.in_features) == (8, 1)
    with pytest.raises(AdapterError, match=r"LayerNorm is a vector.*base\.normalised"):
        base.project_in(X, torch.ones(2, 1))
    with pytest.raises(NotImplementedError, match="Linear is not a norm"):
        tunerkit.layers.LinearLayer(nn.Linear(8, 8)).normalised(X)


def test_the_norms_of_transformers_are_known() -> None:
    """Also those that multiply by 1 + their weight."""
    pytest.importorskip("transformers")
    from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    found = [as_output(norm) for norm in (LlamaRMSNorm(16), T5LayerNorm(16), GemmaRMSNorm(16), nn.LayerNorm(16))]
    assert [getattr(base, "offset", None) for base in found] == [0, 0, 1, 0]
    assert not NormLayer.matches(ConvNextLayerNorm(16, data_format="channels_first"))
