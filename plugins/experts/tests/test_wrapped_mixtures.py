"""A mixture with adapters: recomputed, compiled, copied, sent to a process, generating, with several adapters."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from tunerkit_experts.stacks import Stack

import tunerkit
from plugins.experts.tests.tiny_mixtral import IDS, gap, logits, mixtral, train, wrapped

FORMS = ("eager", "grouped_mm", "batched_mm")


def trained(method: str = "lora", form: str = "eager") -> Any:
    model = wrapped(method, mixtral(form), rank=4)
    train(model)
    return model


def gradients(model: Any, call: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """The gradient of each trained parameter for one batch."""
    model.zero_grad()
    (model if call is None else call)(IDS, labels=IDS).loss.backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("method", "form"), [("lora", "grouped_mm"), ("miss", "eager"), ("loha", "batched_mm")])
def test_gradient_checkpointing_changes_no_gradient(method: str, form: str, reentrant: bool) -> None:
    """The second forward of a block routes its rows anew."""
    model = trained(method, form).train()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], each) for name, each in expected.items())


@pytest.mark.parametrize(("method", "form"), [("lora", "grouped_mm"), ("hra", "batched_mm")])
def test_a_compiled_mixture_computes_the_same(method: str, form: str) -> None:
    """With graph breaks, where rows are counted on the host."""
    torch.compiler.reset()
    model = trained(method, form)
    expected = gradients(model)
    found = gradients(model, torch.compile(model, backend="eager"))
    assert found.keys() == expected.keys()
    assert all(gap(found[name], each) <= 1e-5 for name, each in expected.items())


def test_a_copy_has_adapters_of_its_own() -> None:
    """Training the copy does not change the model."""
    model = trained()
    before, twin = logits(model), copy.deepcopy(model)
    assert torch.equal(logits(twin), before)
    train(twin, 1)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)


def test_a_spawned_process_gets_a_model_that_runs() -> None:
    """Nothing there has imported the plugin: the pickle brings the experts' function."""
    model = trained(form="grouped_mm")
    threads = torch.get_num_threads()  # the last bits of products depend on their number
    with torch.multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (threads,)) as pool:
        found = pool.apply(logits, (model,))
    assert torch.equal(found, logits(model))


@pytest.mark.parametrize("form", FORMS)
def test_generates_what_repeated_forwards_do(form: str) -> None:
    """With a cache, where each step has one row for each sequence and choice."""
    model = trained(form=form)
    model.generation_config.eos_token_id = None
    found = model.generate(IDS[:, :5], max_new_tokens=5, do_sample=False, pad_token_id=0)
    expected = IDS[:, :5]
    with torch.no_grad():
        for _ in range(5):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, expected)


def test_a_switch_of_the_implementation_reaches_the_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, transformers switches from grouped_mm to batched_mm while it decodes, and back."""
    used: list[str] = []
    multiply = Stack.multiply

    def noting(self: Stack, owner: Any, rows: Tensor, route: Any) -> Tensor:
        used.append(route.form)
        return multiply(self, owner, rows, route)

    monkeypatch.setattr(Stack, "multiply", noting)
    model = trained(form="grouped_mm")
    output = logits(model)
    for form in ("batched_mm", "grouped_mm"):
        used.clear()
        model.set_experts_implementation(form)
        assert gap(logits(model), output) <= 1e-5
        assert set(used) == {form}


def test_several_adapters_share_a_stack() -> None:
    """Each alone, both together, and both merged."""
    model = trained()
    first = logits(model)
    tunerkit.wrap(model, "hra", {"targets": ["experts"], "rank": 4}, adapter="second", seed=5)
    assert gap(logits(model), first) <= 1e-6
    tunerkit.activate(model, ["second"])
    train_second = torch.optim.SGD(tunerkit.tuner(model, "second").parameters(), lr=0.5)
    gradients(model)
    train_second.step()
    second = logits(model)
    tunerkit.activate(model, ["default"])
    assert torch.equal(logits(model), first)
    tunerkit.activate(model, ["default", "second"])
    both = logits(model)
    assert min(gap(both, first), gap(both, second)) > 1e-4
    tunerkit.merge(model)
    assert gap(logits(model), both) <= 1e-5
    tunerkit.unmerge(model)
    assert torch.equal(logits(model), both)
