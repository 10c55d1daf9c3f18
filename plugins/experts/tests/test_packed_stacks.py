"""Stacks in bitsandbytes' 4 bits, stacks that other quantizers have packed, and stacks that one passed over."""

import copy
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import tunerkit

hf: Any = pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("tunerkit_lora")

TINY: dict[str, Any] = {
    **{"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}
MODELS = {
    "Mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2)),
    "Qwen3-MoE": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**TINY, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2, head_dim=16)
    ),
}
LORA = {"rank": 3}
each_model = pytest.mark.parametrize("name", MODELS)
pytestmark = [
    pytest.mark.filterwarnings("ignore:left out, neither adapted"),
    pytest.mark.filterwarnings("ignore:.*on a base with another quantization"),
]


def mixture(name: str = "Mixtral", form: str = "grouped_mm") -> Any:
    """A tiny mixture with stacks in full precision."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = MODELS[name]().eval()
    model.set_experts_implementation(form)
    return model


def packed(name: str = "Mixtral", form: str = "grouped_mm") -> Any:
    """The same, with its stacks in nf4."""
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    model = mixture(name, form)
    for layer in model.model.layers:
        for stack in ("gate_up_proj", "down_proj"):
            parametrize.replace_parameter_4bit(layer.mlp.experts, stack, quant_type="nf4", compress_statistics=True)
    return model


def ids(seed: int) -> Tensor:
    return torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(ids(99)).logits
    return found


def attached(model: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(tunerkit.tuner(model).parameters(), lr=1e-2)
    tunerkit.attach(model, optimizer)
    return optimizer


def train(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(ids(step), labels=ids(step)).loss.backward()
        optimizer.step()


@each_model
def test_twenty_steps_saved_loaded_and_resumed(name: str, tmp_path: Path) -> None:
    """Law: a resumed training has the same bits, and a loaded model the same output."""
    model = tunerkit.wrap(packed(name), "lora", LORA, seed=0)
    base, optimizer = logits(model), attached(model)
    train(model, optimizer, range(10))
    tunerkit.save(model, tmp_path / "ten")
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(10, 20))
    expected = logits(model)
    assert (expected - base).abs().max() > 0.1
    loaded = tunerkit.load(packed(name), tunerkit.save(model, tmp_path / "twenty"))
    assert (logits(loaded) - expected).abs().max() <= 1e-6 * expected.abs().max()
    resumed = tunerkit.load(packed(name), tmp_path / "ten", trainable=True)
    again = attached(resumed)
    again.load_state_dict(state)
    train(resumed, again, range(10, 20))
    assert torch.equal(logits(resumed), expected)


@each_model
def test_the_base_is_unchanged_and_comes_back(name: str) -> None:
    """Law: an adapter at its start changes no bit, and neither does a deep copy; `unwrap` restores the base."""
    model = packed(name)
    base, keys = logits(model), list(model.state_dict())
    tunerkit.wrap(model, "lora", LORA)
    assert torch.equal(logits(model), base)
    assert torch.equal(logits(copy.deepcopy(model)), base)
    train(model, attached(model), range(2))
    assert not torch.equal(logits(model), base)
    tunerkit.unwrap(model)
    assert torch.equal(logits(model), base)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("targets", [["experts"], ["gate_up_proj"], ["q_proj"]])
def test_an_adapter_fits_the_base_in_either_precision(targets: list[str], tmp_path: Path) -> None:
    """Law: files describe a packed stack by its shape, also where no stack is adapted."""
    for number, (before, after) in enumerate(((packed, mixture), (mixture, packed), (packed, packed))):
        model = tunerkit.wrap(before(), "lora", {**LORA, "targets": targets}, seed=0)
        train(model, attached(model), range(2))
        loaded = tunerkit.load(after(), tunerkit.save(model, tmp_path / str(number)))
        assert [target.path for target in tunerkit.tuner(loaded).targets] == [
            target.path for target in tunerkit.tuner(model).targets
        ]
        assert (logits(loaded) - logits(model)).abs().max() < 0.2 * logits(model).abs().max()


def test_a_base_with_other_experts_is_refused(tmp_path: Path) -> None:
    """The shape of a packed stack is compared."""
    pytest.importorskip("bitsandbytes")
    model = tunerkit.wrap(packed(), "lora", {**LORA, "targets": ["q_proj"]})
    train(model, attached(model), range(1))
    file = tunerkit.save(model, tmp_path)
    other = hf.MixtralForCausalLM(hf.MixtralConfig(**TINY, num_local_experts=2, num_experts_per_tok=2))
    with pytest.raises(tunerkit.errors.BaseMismatchError, match=r"experts\.gate_up_proj \[4, 256, 64\] -> \[2, 256"):
        tunerkit.load(other, file)


@pytest.mark.parametrize("form", ["eager", "grouped_mm"])
def test_no_unpacked_stack_waits_for_the_backward(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: autograd keeps no stack in full precision, and the gradients are those of the same weights unpacked."""
    model = packed(form=form)
    plain = mixture(form=form)
    for layer, other in zip(model.model.layers, plain.model.layers, strict=True):
        for stack in ("gate_up_proj", "down_proj"):
            setattr(other.mlp.experts, stack, nn.Parameter(getattr(layer.mlp.experts, stack)))
    functional: Any = pytest.importorskip("bitsandbytes.functional")
    unpacked: list[StorageWeakRef] = []
    dequantize = functional.dequantize_4bit

    def noted(*args: Any) -> Tensor:
        found: Tensor = dequantize(*args)
        unpacked.append(StorageWeakRef(found.untyped_storage()))
        return found

    monkeypatch.setattr(functional, "dequantize_4bit", noted)
    gradients = []
    for each in (model, plain):
        tunerkit.wrap(each, "lora", LORA, seed=0)
        with torch.no_grad():
            for number, parameter in enumerate(tunerkit.tuner(each).parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) / 10)
        loss = each(ids(0), labels=ids(0)).loss
        assert all(storage.expired() for storage in unpacked)
        loss.backward()
        gradients.append([parameter.grad for parameter in tunerkit.tuner(each).parameters()])
    # Once for the shapes, in the forward, and in the backward.
    assert len(unpacked) == 3 * 4
    for one, expected in zip(*gradients, strict=True):
        assert torch.equal(one, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    """It runs each block again, and ends that early."""
    gradients = []
    for is_on in (False, True):
        model = tunerkit.wrap(packed(), "lora", LORA, seed=0).train()
        if is_on:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(ids(0), labels=ids(0)).loss.backward()
        gradients.append([parameter.grad for parameter in tunerkit.tuner(model).parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_what_needs_a_dense_stack_is_refused() -> None:
    """Merging and unwrapping to dense layers say what to do, and change nothing."""
    model = tunerkit.wrap(packed(), "lora", LORA)
    train(model, attached(model), range(1))
    expected = logits(model)
    with pytest.raises(tunerkit.errors.AdapterError, match=r"stacks\.gate_up_proj.*Load the adapter onto the base in"):
        tunerkit.merge(model)
    for keep_merged in (False, True):
        with pytest.raises(tunerkit.errors.AdapterError, match=r"4, 256, 64.*cannot be made dense\. Load the"):
            tunerkit.unwrap(model, keep_merged=keep_merged, dtype=torch.float32)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("pack", [lambda w: w.to(torch.int8), lambda w: w.to(torch.float8_e4m3fn)])
def test_stacks_that_another_quantizer_packed_are_refused(pack: Any) -> None:
    """By name with an error; by default with a warning, and the attention is adapted."""
    model = mixture()
    for layer in model.model.layers:
        experts = layer.mlp.experts
        experts.gate_up_proj = nn.Parameter(pack(experts.gate_up_proj.detach()), requires_grad=False)
    with pytest.raises(tunerkit.errors.TargetError, match="is a stack that a quantizer has packed in a way"):
        tunerkit.wrap(model, "lora", {**LORA, "targets": ["gate_up_proj"]})
    with pytest.warns(tunerkit.TunerkitWarning, match=r"gate_up_proj and 1 more like it: is a stack that a quantizer"):
        tunerkit.wrap(model, "lora", LORA)
    assert {target.path.rpartition(".")[2] for target in tunerkit.tuner(model).targets} >= {"q_proj", "down_proj"}


def test_stacks_that_a_quantizer_passed_over_are_told_once() -> None:
    """As bitsandbytes does; the size is that of the stacks, and a second adapter does not repeat it."""
    model = mixture()
    model.hf_quantizer = types.SimpleNamespace(
        quantization_config=types.SimpleNamespace(quant_method=types.SimpleNamespace(value="bitsandbytes"))
    )
    size = sum(parameter.nbytes for parameter in model.parameters() if parameter.ndim == 3) / 2**30
    with pytest.warns(tunerkit.TunerkitWarning, match="replace_parameter_4bit") as told:
        tunerkit.wrap(model, "lora", {**LORA, "targets": ["q_proj"]})
    assert next(str(each.message) for each in told).startswith(
        f"bitsandbytes left 4 stacks of experts in full precision, which take {size:,.2f} GiB."
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tunerkit.wrap(model, "lora", {**LORA, "targets": ["v_proj"]}, adapter="second")
