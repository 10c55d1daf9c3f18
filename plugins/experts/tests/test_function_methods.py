"""Methods that are one function, and loha, on stacks of experts."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from plugins.experts.tests.tiny_mixtral import STACK, gap, logits, mixtral, train, wrapped
from tunerkit.errors import PluginError, TargetError
from tunerkit.plugin import BaseLayer, Factors, Gain, parameter, setting
from tunerkit_methods.hra import hra
from tunerkit_methods.miss import miss
from tunerkit_testing.registering import registered


@tunerkit.method("one-line")
def one_line(
    a: Tensor = parameter("out", "rank", start=nn.init.normal_),
    b: Tensor = parameter("rank", "in"),
    rank: int = setting(2, ge=1, doc="rank of the product"),
) -> Tensor:
    """ΔW = A B."""
    return a @ b


@tunerkit.method("output-gains")
def output_gains(g: Tensor = parameter("out", start=1.0)) -> Gain:
    """Multiplies each output."""
    return Gain(g)


@tunerkit.method("through-base")
def through_base(base: BaseLayer, g: Tensor = parameter("out")) -> Tensor:
    """ΔW = diag(g) W, with W from the base layer."""
    return g[:, None] * base.dense().to(g.dtype)


@tunerkit.method("deciding")
def deciding(a: Tensor = parameter("out", "in")) -> Tensor:
    """Looks at a value, which vmap cannot do for all experts at once."""
    return a if a.sum() >= 0 else 2 * a


@tunerkit.method("writing")
def writing(weight: Tensor, g: Tensor = parameter("out")) -> Tensor:
    """Writes into W."""
    weight -= weight.mean()
    return g[:, None] * weight


@tunerkit.method("unstacked", stacks=False)
def unstacked(a: Tensor = parameter("out", "in")) -> Tensor:
    """Refuses all stacks."""
    return a


@pytest.fixture(autouse=True, scope="module")
def _methods() -> Iterator[None]:
    with registered(one_line, output_gains, through_base, deciding, writing, unstacked):
        yield


class _View:
    """What a function asks of the base layer of one expert."""

    def __init__(self, weight: Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self.weight = weight

    def dense(self) -> Tensor:
        return self.weight


def _product(factors: Factors) -> Tensor:
    return factors.p @ factors.q


# ΔW of one expert, from its own parameters and its W.
DELTAS: dict[str, Callable[[Mapping[str, Tensor], Tensor], Tensor]] = {
    "hra": lambda own, w: _product(hra(w, **own)),
    "miss": lambda own, w: _product(miss(_View(w), **own)),
    "loha": lambda own, w: (own["b1"] @ own["a1"]) * (own["b2"] @ own["a2"]),  # alpha = rank
    "one-line": lambda own, w: one_line(**own),
    "through-base": lambda own, w: through_base(_View(w), **own),
    "output-gains": lambda own, w: (own["g"] - 1)[:, None] * w,
}
CONFIGS: dict[str, dict[str, Any]] = {"hra": {"rank": 4}, "miss": {"rank": 4}, "loha": {"rank": 4, "alpha": 4.0}}


def trained(name: str, **config: Any) -> Any:
    model = wrapped(name, **CONFIGS.get(name, {}), **config)
    train(model)
    return model


@pytest.mark.parametrize("name", DELTAS)
def test_equals_a_loop_over_dense_experts(name: str) -> None:
    """In float64: the base whose every expert has its own W + ΔW, of the function called for that expert alone."""
    model = wrapped(name, mixtral(dtype=torch.float64), **CONFIGS.get(name, {}), adapter_dtype="float64")
    train(model)
    dense = mixtral(dtype=torch.float64)
    with torch.no_grad():
        for path, adapter in tunerkit.tuner(model).adapters().items():
            stack = dense.get_parameter(path.replace(".stacks", ""))
            for index, weight in enumerate(stack):
                own = {key: values[index] for key, values in adapter.named_parameters()}
                weight += DELTAS[name](own, weight)
    assert gap(logits(model), logits(dense)) <= 1e-9
    assert gap(logits(model), logits(mixtral(dtype=torch.float64))) > 1e-3


@pytest.mark.parametrize("form", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", DELTAS)
def test_is_saved_merged_disabled_and_taken_out(name: str, form: str, tmp_path: Path) -> None:
    """What was trained survives a file and a merge, and the base comes back bit for bit."""
    base = logits(mixtral(form))
    model = wrapped(name, mixtral(form), **CONFIGS.get(name, {}))
    assert gap(logits(model), base) <= (1e-6 if name == "hra" else 0)
    train(model)
    adapted = logits(model)
    with tunerkit.disabled(model):
        assert torch.equal(logits(model), base)
    tunerkit.merge(model)
    assert gap(logits(model), adapted) <= 1e-5
    file = tunerkit.save(model, tmp_path)
    tunerkit.unmerge(model)
    assert torch.equal(logits(model), adapted)
    assert torch.equal(logits(tunerkit.unwrap(model)), base)
    assert gap(logits(tunerkit.load(mixtral(form), file)), adapted) <= 1e-6


@pytest.mark.parametrize("name", ["hra", "loha", "one-line"])
def test_each_expert_has_its_own_random_start(name: str) -> None:
    """Drawn as for a layer; and the seed fixes all of them."""
    first, second = (tunerkit.tuner(wrapped(name)).adapters()[STACK] for _ in range(2))
    drawn = {key: values for key, values in first.named_parameters() if values.any()}
    assert drawn
    for key, values in drawn.items():
        assert torch.equal(values, second.get_parameter(key))
        assert len(values.flatten(1).unique(dim=0)) == len(values) == 4


def test_a_gain_multiplies_the_experts_own_biases(tmp_path: Path) -> None:
    """Gpt-oss has a bias in each expert, which the output has before the gain; a merge changes it too."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["full_attention"],
    )
    base = transformers.GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for parameter_ in base.parameters():
            parameter_.normal_(0, 0.2)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    model = wrapped("output-gains", base)
    train(model)
    adapted = logits(model)
    tunerkit.merge(model)
    assert gap(logits(model), adapted) <= 1e-5
    changed = {key for key, value in before.items() if not torch.equal(model.state_dict()[key], value)}
    assert {key.rpartition(".")[2] for key in changed} == {
        *("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"),
    }
    file = tunerkit.save(model, tmp_path)
    tunerkit.unwrap(model)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert gap(logits(tunerkit.load(model, file)), adapted) <= 1e-6


def test_a_function_that_vmap_cannot_run_is_refused_when_wrapping() -> None:
    """The error says why and what to do, and the model stays as it was."""
    model = mixtral()
    words = (
        r"stacks\.gate_up_proj.*stack of 4 matrices, and torch\.func\.vmap cannot run the function deciding .*exclude"
    )
    with pytest.raises(TargetError, match=words):
        wrapped("deciding", model)
    assert torch.equal(logits(model), logits(mixtral()))
    assert not [name for name, _ in model.named_modules() if "stacks" in name]


def test_a_write_into_the_stack_is_refused_and_undone() -> None:
    """As for a layer."""
    model, before = mixtral(), mixtral().state_dict()
    with pytest.raises(PluginError, match="writing writes into the weight of a Stack"):
        wrapped("writing", model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["dora", "unstacked"])
def test_other_methods_are_refused_by_name_with_those_that_can(name: str) -> None:
    """Methods of a class adapt stacks only if they declare it; a function may decline."""
    with pytest.raises(TargetError, match=rf"method '{name}' does not adapt"):
        wrapped(name)
