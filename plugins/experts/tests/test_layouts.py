"""Classes of experts: those that a plugin describes, and those that are refused in words."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tunerkit_experts import Layout, Route, describe

import tunerkit
from plugins.experts.tests.mixtures import mixture, tokens
from plugins.experts.tests.test_mixtures import farthest, off_by, wrapped
from tunerkit.errors import AdapterError, ConfigError, TunerkitError, TunerkitWarning


class Pair(nn.Module):
    """Experts of a class of its own: two stacks, and all of a row's ids as an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(3, 6, 4))
        self.second = nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return torch.stack([torch.tanh(row @ self.first[i].T) @ self.second[i] for row, i in zip(x, ids, strict=True)])


def run_pair(experts: Any, multiply: Any, x: Tensor, ids: Tensor) -> Tensor:
    order = torch.argsort(ids, stable=True)
    route = Route(ids[order], count=3)
    return multiply("second", torch.tanh(multiply("first", x[order], route)), route)[torch.argsort(order)]


PAIR = Layout(f"{__name__}.Pair", {"first": False, "second": True}, run_pair)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts, self.body = Pair(), nn.Linear(4, 2)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        output: Tensor = self.body(self.experts(x, ids))
        return output


def test_a_plugin_describes_a_class_of_its_own_in_six_lines() -> None:
    """Law: a described class keeps its output, is trained, and equals the class itself after a merge."""
    describe(PAIR)
    torch.manual_seed(0)
    model, x, ids = Net(), torch.randn(7, 4), torch.tensor([2, 0, 0, 2, 1, 0, 2])
    before = model(x, ids)
    tunerkit.wrap(model, "lora", {"targets": ["experts"], "rank": 2}, seed=0)
    assert farthest([model(x, ids)], [before]) < 1e-6
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    tunerkit.attach(model, optimizer)
    for _ in range(2):
        model(x, ids).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = model(x, ids)
    assert farthest([trained], [before]) > 1e-3
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(twin(x, ids), trained)
    tunerkit.unwrap(model, keep_merged=True)
    assert farthest([model(x, ids)], [trained]) < 1e-5
    assert "forward" not in vars(model.experts)


def test_a_class_that_nobody_describes_is_named() -> None:
    """Law: experts without a layout are left out with the extra that knows most, and a name of them is an error."""

    class Unknown(Pair):
        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            return super().forward(x, ids)

    model = Net()
    model.experts = Unknown()
    with pytest.warns(TunerkitWarning, match=r"experts.first.*no plugin describes"):
        tunerkit.wrap(model, "lora", {"targets": "all-linear"})
    tunerkit.unwrap(model)
    with pytest.raises(TunerkitError, match="experts"):
        tunerkit.wrap(model, "lora", {"targets": ["experts"]})


def test_a_failed_wrap_leaves_no_child() -> None:
    """Law: if wrapping raises, the model has the modules and the config that it had."""
    model = mixture("Mixtral")
    names, config = [name for name, _ in model.named_modules()], model.model.layers[0].mlp.experts.config
    with pytest.raises(TunerkitError):
        tunerkit.wrap(model, "lora", {"targets": ["no_such_layer"]})
    assert [name for name, _ in model.named_modules()] == names
    tunerkit.wrap(model, "lora", {"targets": ["q_proj"]})  # no stack is adapted
    assert not any("stacks" in name for name, _ in model.named_modules())
    assert model.model.layers[0].mlp.experts.config is config


def test_a_method_without_stacks_is_refused_by_name() -> None:
    """Law: DoRA says that it does not adapt stacks; targets that only match them leave them out."""
    with pytest.raises(TunerkitError, match="stack of 4 matrices, which method 'dora' does not adapt"):
        tunerkit.wrap(mixture("Mixtral"), "dora", {"targets": ["experts"]})
    with pytest.warns(TunerkitWarning, match="which method 'dora' does not adapt"):
        model = tunerkit.wrap(mixture("Mixtral"), "dora", {})
    assert not any(".stacks." in target.path for target in tunerkit.tuner(model).targets)


def test_another_implementation_of_the_model_passes_over_no_adapter() -> None:
    """Law: set_experts_implementation keeps the adapters, and one that has no place for them is an error."""
    model = wrapped("Mixtral", form="grouped_mm")
    before = model(input_ids=tokens()).logits
    model.set_experts_implementation("batched_mm")
    assert farthest([model(input_ids=tokens()).logits], [before]) < 1e-5
    model.config._experts_implementation_internal = "sonicmoe"
    with pytest.raises(AdapterError, match="'sonicmoe', which would pass over their adapters"):
        model(input_ids=tokens())


def test_two_models_with_one_config_do_not_affect_each_other() -> None:
    """Law: adapters in one model change nothing of another that was made with the same config."""
    model = mixture("Qwen3-MoE")
    other = type(model)(model.config).eval()
    before = other(input_ids=tokens()).logits
    tunerkit.wrap(model, "lora", {"targets": ["experts"]})
    assert torch.equal(other(input_ids=tokens()).logits, before)
    assert model.config._experts_implementation == "eager"


def test_expert_parallelism_and_resized_stacks_are_refused() -> None:
    """Law: experts that are sharded over processes cannot be adapted, and stacks that were replaced are named."""
    model = mixture("Mixtral")
    for layer in model.model.layers:
        layer.mlp.experts._is_expert_parallel = True
    with pytest.raises(TunerkitError, match="expert parallelism"):
        tunerkit.wrap(model, "lora", {"targets": ["experts"]})
    model = wrapped("Mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(torch.zeros(5, *experts.down_proj.shape[1:]))
    with pytest.raises(AdapterError, match="resized"):
        tunerkit.merge(model)


def test_copies_have_adapters_of_their_own() -> None:
    """Law: a copied model computes the same, and training it changes nothing of the first."""
    model = wrapped("Llama-4")
    before = model(input_ids=tokens()).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(input_ids=tokens()).logits, before)
    with torch.no_grad():
        for parameter in tunerkit.tuner(twin).parameters():
            parameter.zero_()
    assert torch.equal(model(input_ids=tokens()).logits, before)
    assert off_by(model) < 1e-5


def test_on_an_accelerator_16_bit_products_are_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: the branch for accelerators computes the same, here on a CPU, and odd ranks use the loop."""
    from tunerkit_experts import routes

    ids = torch.tensor([0, 0, 2, 2, 2])
    route = Route(ids, count=3)
    for rank in (8, 3):
        x, w = torch.randn(5, 16, dtype=torch.bfloat16), torch.randn(3, rank, 16, dtype=torch.bfloat16)
        loop = routes.multiply(x, w, route)
        assert routes._is_grouped(x, w) is False
        with monkeypatch.context() as patch:
            patch.setattr(routes, "GROUPED_ON", ("cpu",))
            assert routes._is_grouped(x, w) is (rank == 8)
            assert farthest([routes.multiply(x, w, route).float()], [loop.float()]) < 2e-2


def test_half_precision_keeps_its_bits_where_a_class_adds_up_in_fp32() -> None:
    """Law: Nemotron-H in bf16 and gpt-oss in fp16 keep each bit with adapters that add nothing."""
    for name, dtype, form in (("Nemotron-H", torch.bfloat16, "eager"), ("gpt-oss", torch.float16, "batched_mm")):
        model = mixture(name, dtype=dtype, form=form)
        before = model(input_ids=tokens()).logits
        tunerkit.wrap(model, "lora", {"targets": ["experts"]})
        assert torch.equal(model(input_ids=tokens()).logits, before), name


@pytest.mark.parametrize("form", ["eager", "grouped_mm", "batched_mm"])
def test_an_empty_batch_stays_empty(form: str) -> None:
    """Law: experts without any token return none, as before wrapping."""
    experts = wrapped("Mixtral", form=form).model.layers[0].mlp.experts
    found = experts(torch.zeros(0, 32), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert found.shape == (0, 32)


def test_a_failed_second_adapter_leaves_no_child() -> None:
    """Law: a wrap that raises takes its stacks out again, also where another adapter is in."""
    model = tunerkit.wrap(mixture("Mixtral"), "lora", {"targets": ["q_proj"]})
    with pytest.raises(TunerkitError):
        tunerkit.wrap(model, "lora", {"targets": ["no_such_layer"]}, adapter="second")
    assert not any("stacks" in name for name, _ in model.named_modules())


def test_a_stack_has_the_name_of_its_parameter_too() -> None:
    """Law: PEFT's spelling finds the stack, and a name that layers share leaves stacks out for a method without."""
    model = tunerkit.wrap(mixture("Mixtral"), "lora", {"targets": ["mlp.experts.down_proj"]})
    assert [target.path for target in tunerkit.tuner(model).targets] == [
        f"model.layers.{layer}.mlp.experts.stacks.down_proj" for layer in range(2)
    ]
    with pytest.warns(TunerkitWarning, match="which method 'dora' does not adapt"):
        dora = tunerkit.wrap(mixture("DeepSeek-V3"), "dora", {"targets": ["down_proj"]})
    assert [target.path for target in tunerkit.tuner(dora).targets] == [
        "model.layers.0.mlp.down_proj", "model.layers.1.mlp.shared_experts.down_proj"
    ]  # fmt: skip


def test_a_pattern_of_ranks_that_names_the_container_gets_the_glob_for_its_stacks() -> None:
    """Law: `experts` is a target, but as a pattern for ranks it matches no path; the error says what does."""
    with pytest.raises(ConfigError, match=r"'experts' matches none of the 4 targets; did you mean '\*\.experts\.\*'"):
        tunerkit.wrap(mixture("Mixtral"), "lora", {"targets": ["experts"], "rank_pattern": {"experts": 1}})
    model = tunerkit.wrap(mixture("Mixtral"), "lora", {"targets": ["experts"], "rank_pattern": {"*.experts.*": 1}})
    assert {*tunerkit.tuner(model).ranks().values()} == {1}


def test_rows_that_are_not_sorted_are_refused() -> None:
    """Law: a route of a described class must be sorted, and an id beyond the experts is an error."""
    for ids in ([1, 0], [0, 3]):
        with pytest.raises(AdapterError, match="sorted by expert, from 0 to 2"):
            Route(torch.tensor(ids), count=3).counts  # noqa: B018  # a property


def test_a_forward_around_a_described_class_stays() -> None:
    """Law: unwrapping leaves a forward that somebody put around ours, which then runs the class's own."""
    describe(PAIR)
    model, x, ids = Net(), torch.randn(5, 4), torch.tensor([2, 0, 0, 2, 1])
    before = model(x, ids)
    tunerkit.wrap(model, "lora", {"targets": ["experts"]})
    inner = model.experts.forward
    model.experts.forward = lambda *given: inner(*given)  # type: ignore[method-assign]
    tunerkit.unwrap(model)
    assert torch.equal(model(x, ids), before)
    assert "forward" in vars(model.experts)


def test_zero_3_needs_a_gradient_at_the_input_of_the_first_stack() -> None:
    """Law: with DeepSpeed's mark on an adapter's weights, the first forward raises; what the error says mends it."""
    model = tunerkit.wrap(mixture("Mixtral"), "lora", {"targets": ["experts"]})
    for parameter in tunerkit.tuner(model).parameters():
        vars(parameter)["ds_id"] = 0
    with pytest.raises(AdapterError, match=r"ZeRO-3.*enable_input_require_grads"):
        model(input_ids=tokens())
    with torch.no_grad():
        model(input_ids=tokens())
    model.enable_input_require_grads()
    model(input_ids=tokens()).logits.sum().backward()
