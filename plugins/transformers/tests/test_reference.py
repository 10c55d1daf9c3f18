"""The reference of a wrapped model: what it computes, and what it holds."""

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tests.support.toy_readers import ScalePlugin
from tunerkit_testing.registering import registered
from tunerkit_transformers.reference import end_generation_

if TYPE_CHECKING:
    from tests.support.toys import Toys


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(x)
    return found


def fresh(toys: "Toys", method: str = "toy-low-rank", **options: Any) -> nn.Module:
    model: nn.Module = tunerkit.wrap(toys.net(), method, dict(toys.full), seed=3, **options)
    return model


def test_the_reference_of_a_fresh_adapter_is_the_base(toys: "Toys") -> None:
    """Nothing is copied, and training changes nothing in what the reference computes."""
    x, model = toys.x(), fresh(toys)
    base = output(toys.net(), x)
    reference = tunerkit.reference(model)
    toys.fill_(model)
    trained = output(model, x)
    assert torch.equal(reference(x), base)
    assert torch.equal(output(model, x), trained)
    assert not torch.equal(trained, base)
    assert copied(reference) == []


def copied(reference: Any) -> list[Tensor]:
    """The tensors that a reference keeps beside those of its model."""
    own = {id(tensor) for tensor in (*reference.source.parameters(), *reference.source.buffers())}
    frozen = [slot for slots in reference._snapshot.frozen.values() for slot in slots.values()]
    return [p for slot in frozen for p in slot.parameters() if id(p) not in own]


@pytest.mark.parametrize("method", ["toy-low-rank", "toy-shift"])
def test_the_reference_of_a_trained_adapter_is_the_model_as_it_stood(toys: "Toys", method: str) -> None:
    """Adapter, trained copy and trained biases are kept; no step was counted, so their values decide."""
    x, model = toys.x(), toys.fill_(fresh(toys, method))
    before = output(model, x)
    reference = tunerkit.reference(model)
    toys.fill_(model, seed=9)
    after = output(model, x)
    assert torch.equal(reference(x), before)
    assert torch.equal(output(model, x), after)
    assert not torch.equal(after, before)
    assert all(not tensor.requires_grad and tensor.grad is None for tensor in copied(reference))


def test_a_reference_applies_several_adapters_as_the_model_does(toys: "Toys") -> None:
    """One that reads the layer's own output comes before one that may write into it, whichever is named first."""
    x, model = toys.x(), toys.net()
    with registered(ScalePlugin()):
        tunerkit.wrap(model, "toy-low-rank", {"targets": ["layers.0"]}, adapter="adds")
        tunerkit.wrap(model, "toy-scale", {"targets": ["layers.0"]}, adapter="scales")
        tunerkit.activate(model, ["adds", "scales"])
        toys.fill_(model)
        assert torch.equal(tunerkit.reference(model)(x), output(model, x))


def test_only_adapters_that_add_something_are_copied(toys: "Toys") -> None:
    """A trained adapter below a fresh one: the copy has the size of the first alone."""
    x, model = toys.x(), toys.net()
    tunerkit.wrap(model, "toy-low-rank", {"targets": ["layers.0"]}, adapter="sft")
    toys.fill_(model)
    tunerkit.wrap(model, "toy-low-rank", {"targets": ["layers.1"]}, adapter="dpo")
    before = output(model, x)
    reference = tunerkit.reference(model)
    expected = sum(p.numel() for p in tunerkit.tuner(model, "sft").parameters())
    assert sum(tensor.numel() for tensor in copied(reference)) == expected
    toys.fill_(model, seed=5)
    assert torch.equal(reference(x), before)


def test_the_base_is_held_once(toys: "Toys") -> None:
    """A reference has no parameters, buffers or children, whatever it shows."""
    reference = tunerkit.reference(toys.trained())
    assert list(reference.parameters()) == list(reference.buffers()) == list(reference.children()) == []


def test_a_reference_is_shown_in_eval_mode_and_leaves_the_model_s_modes(toys: "Toys") -> None:
    """A trainer keeps its model in training mode; a reference must not use dropout or batch statistics."""
    x, model = toys.x(), toys.trained(batch_norm=True)
    before = output(model.eval(), x)
    reference = tunerkit.reference(model)
    model.train()
    model.head.eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(reference(x), before)
    assert [module.training for module in model.modules()] == modes


def test_a_call_in_the_middle_of_a_backward_pass_disturbs_nothing(toys: "Toys") -> None:
    """Preference training runs the reference between the model's forward and its backward."""
    x, model = toys.x(), toys.trained()
    reference = tunerkit.reference(model)
    gradients = []
    for shown in (False, True):
        model.zero_grad()
        loss = model(x).square().mean()
        if shown:
            assert not reference(x).requires_grad
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_the_model_is_restored_after_an_error(toys: "Toys") -> None:
    """A wrong input to the reference leaves the model's adapters as they were."""
    model = toys.trained()
    reference = tunerkit.reference(model)
    before = toys.snapshot(model)
    with pytest.raises(RuntimeError):
        reference(torch.ones(1))
    assert toys.same(toys.snapshot(model), before)


def test_a_reference_stays_when_adapters_are_managed(toys: "Toys") -> None:
    """Activating, freezing, renaming, disabling and adding an adapter change the model and not its reference."""
    x, model = toys.x(), toys.trained()
    before = output(model, x)
    reference = tunerkit.reference(model)
    tunerkit.freeze(model, "default")
    tunerkit.rename(model, "default", "old")
    tunerkit.wrap(model, "toy-shift", {"targets": ["layers.0", "layers.1"]}, adapter="new")
    toys.fill_(model, seed=4)
    tunerkit.activate(model, [])
    assert torch.equal(reference(x), before)
    tunerkit.activate(model, ["new"])
    with tunerkit.disabled(model):
        assert torch.equal(reference(x), before)


def test_a_reference_that_can_no_longer_be_shown_says_so(toys: "Toys") -> None:
    """Merged, the base is not there; unwrapped, its weights may be others; deleted, there is no place for the copy."""
    x, model = toys.x(), toys.trained()
    reference = tunerkit.reference(model)
    tunerkit.merge(model)
    with pytest.raises(tunerkit.errors.AdapterError, match="unmerge before you use its reference"):
        reference(x)
    with pytest.raises(tunerkit.errors.AdapterError, match="unmerge before making a reference"):
        tunerkit.reference(model)
    tunerkit.unmerge(model)
    tunerkit.wrap(model, "toy-shift", {"targets": ["layers.1"]}, adapter="new")
    tunerkit.delete(model, "default")
    with pytest.raises(tunerkit.errors.AdapterError, match="where the model has none any more"):
        reference(x)
    tunerkit.unwrap(model)
    with pytest.raises(tunerkit.errors.AdapterError, match="was unwrapped after its reference was made"):
        reference(x)
    with pytest.raises(tunerkit.errors.AdapterError, match="has no adapter"):
        tunerkit.reference(model)


def test_unwrapping_is_seen_on_a_model_that_was_wrapped_without_this_plugin(toys: "Toys") -> None:
    """Such a model has no token yet, as one from an earlier version's pickle."""
    model = toys.trained()
    end_generation_(model)
    reference = tunerkit.reference(model)
    tunerkit.unwrap(model)
    with pytest.raises(tunerkit.errors.AdapterError, match="was unwrapped after its reference was made"):
        reference(toys.x())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_has_its_own_model(toys: "Toys", copied: Any) -> None:
    """Model and reference copied together belong together; training the first model changes neither copy."""
    x, model = toys.x(), toys.trained()
    before = output(model, x)
    twin, reference = copied((model, tunerkit.reference(model)))
    toys.fill_(model, seed=4)
    toys.fill_(twin, seed=5)
    assert reference.source is twin
    assert torch.equal(reference(x), before)


def test_a_reference_follows_its_model_to_another_dtype_of_the_base(toys: "Toys") -> None:
    """The base that moved is the model's own; the copy is moved when it is used."""
    x, model = toys.x(), toys.trained()
    reference = tunerkit.reference(model)
    before = output(model, x)
    model.double()
    assert toys.close(reference(x.double()).float(), before)


def test_a_reference_has_the_plain_attributes_of_its_model_and_no_methods(toys: "Toys") -> None:
    """A method such as `generate` would run the trained adapters; while the reference runs, all parts are its own."""
    model = toys.trained()
    model.config, model.generate = {"size": 8}, lambda: None
    reference = tunerkit.reference(model)
    assert reference.config == {"size": 8}
    for name in ("generate", "head"):
        with pytest.raises(AttributeError, match=f"can only be called; the model's own '{name}'"):
            getattr(reference, name)
    with pytest.raises(AttributeError, match="nothing"):
        _ = reference.nothing
    seen: list[object] = []
    reference.register_forward_pre_hook(lambda module, args: seen.append(module.head))
    reference(toys.x())
    assert seen == [model.head]


def test_the_state_dict_is_what_the_reference_computes_with(toys: "Toys") -> None:
    """A trainer that caches by a digest of the reference's tensors must tell two references apart."""
    model = fresh(toys)
    base = toys.net().state_dict()
    reference = tunerkit.reference(model)
    toys.fill_(model)
    found = reference.state_dict()
    assert found.keys() == base.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in base.items())
    trained = tunerkit.reference(model)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    toys.fill_(model, seed=4)
    assert trained.state_dict().keys() == own.keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in trained.state_dict().items())
    assert nn.ModuleList([trained]).state_dict() == {}
