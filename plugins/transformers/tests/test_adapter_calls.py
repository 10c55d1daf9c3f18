"""transformers' and PEFT's calls for adapters on a wrapped model: each says ours, and transformers' own use goes on."""

import copy
import inspect
import pickle
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import tunerkit
from tunerkit.errors import AdapterError
from tunerkit_transformers.adapter_calls import _OF_PEFT, _OF_TRANSFORMERS
from tunerkit_transformers.transformers_private import ADAPTER_CALLS

if TYPE_CHECKING:
    from tests.support.toys import Toys

COPIES: dict[str, Callable[[Any], Any]] = {
    "itself": lambda model: model,
    "a deep copy": copy.deepcopy,
    "a pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.fixture
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="the methods are transformers'")


def bert(transformers: Any) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=20, **sizes)).eval()


def wrapped(transformers: Any) -> Any:
    return tunerkit.wrap(bert(transformers), "toy-low-rank", {"train_modules": ["classifier"]})


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("name", [*_OF_TRANSFORMERS, *_OF_PEFT])
def test_a_call_for_adapters_of_peft_says_what_to_write(
    toys: "Toys", transformers: Any, name: str, copied: str
) -> None:
    """Without it, transformers tells the user to upgrade PEFT, or looks for PEFT's layers in vain."""
    model = COPIES[copied](wrapped(transformers))
    with pytest.raises(AdapterError, match=rf"^{name} is for adapters of PEFT, and this \w+ has tunerkit's: write "):
        getattr(model, name)("default")


def test_a_part_of_the_model_says_it_too(toys: "Toys", transformers: Any) -> None:
    """The body inside a classifier inherits the methods as well."""
    with pytest.raises(AdapterError, match=r"this BertModel has tunerkit's: write tunerkit\.activate"):
        wrapped(transformers).bert.set_adapter("default")


def test_the_body_says_it_too_of_calls_that_peft_puts_there(toys: "Toys", transformers: Any) -> None:
    """PEFT's pages write ``model.base_model.update_and_allocate(step)``."""
    model = wrapped(transformers)
    with pytest.raises(AdapterError, match=r"write tunerkit\.attach\(model, optimizer, total_steps=...\) once"):
        model.base_model.update_and_allocate(1)
    assert "update_and_allocate" not in vars(tunerkit.unwrap(model).bert)


@pytest.mark.parametrize("copied", COPIES)
def test_generating_with_an_adapter_for_each_row_says_what_to_write(
    toys: "Toys", transformers: Any, copied: str
) -> None:
    """To transformers, the argument is a typo. Without it, the model generates as before."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, **sizes))
    ids = torch.tensor([[3, 4]])
    expected = base.generate(input_ids=ids, max_new_tokens=2, do_sample=False)
    base_generate = type(base).generate
    model = COPIES[copied](tunerkit.wrap(base, "toy-low-rank"))
    with pytest.raises(AdapterError, match=r"adapter_names is for .*: write tunerkit\.activate\(model, \['name'\]\)"):
        model.generate(input_ids=ids, max_new_tokens=2, adapter_names=["default"])
    assert inspect.signature(model.generate) == inspect.signature(base_generate.__get__(model))
    assert (model.generate.__name__, model.generate.__self__, model.generate.__func__) == (
        "generate", model, base_generate
    )  # fmt: skip
    with tunerkit.disabled(model):
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=2, do_sample=False), expected)
    assert "generate" not in vars(tunerkit.unwrap(model))


def test_every_call_that_models_inherit_is_known(transformers: Any) -> None:
    """Law: what transformers adds for PEFT's adapters, in public, is in the table. A new release may add some."""
    mixin = vars(__import__(ADAPTER_CALLS, fromlist=["PeftAdapterMixin"]).PeftAdapterMixin)
    public = {name for name, value in mixin.items() if isinstance(value, types.FunctionType) and name[0] != "_"}
    assert public <= {*_OF_TRANSFORMERS}
    assert public >= {"set_adapter", "load_adapter", "active_adapters"}


@pytest.mark.parametrize("copied", COPIES)
def test_unwrapping_gives_the_calls_back(toys: "Toys", transformers: Any, copied: str) -> None:
    """Nothing stays on the instances, and what somebody put there himself is never touched."""
    model = bert(transformers)
    model.set_adapter = own = print
    before = [set(vars(module)) for module in model.modules()]
    model = COPIES[copied](tunerkit.wrap(model, "toy-low-rank"))
    assert model.set_adapter is own
    tunerkit.unwrap(model)
    assert [set(vars(module)) for module in model.modules()] == before
    assert model.add_adapter.__func__.__module__ == ADAPTER_CALLS


def test_a_call_of_transformers_itself_is_passed_on(
    toys: "Toys", transformers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some models disable their adapters in ``generate``, if they are marked as having some: so are quantised ones."""
    inside = types.ModuleType("transformers.models.some")
    exec("def generate(model): return model.disable_adapters('now')", vars(inside))
    seen: list[object] = []
    model = wrapped(transformers)
    monkeypatch.setattr(transformers.PreTrainedModel, "disable_adapters", lambda self, *how: seen.append((self, how)))
    inside.generate(model)
    assert seen == [(model, ("now",))]


def test_a_method_that_is_the_models_own_stays(toys: "Toys", transformers: Any) -> None:
    """Speech models load another language by ``load_adapter``."""

    class Speech(transformers.BertForSequenceClassification):  # type: ignore[misc, name-defined]
        def load_adapter(self, language: str) -> str:
            return language

    model = tunerkit.wrap(Speech(bert(transformers).config), "toy-low-rank")
    assert model.load_adapter("fra") == "fra"


def test_a_plain_model_has_pefts_calls_until_it_is_unwrapped(toys: "Toys") -> None:
    """It has no methods of transformers."""
    model = tunerkit.wrap(nn.Sequential(nn.Linear(2, 2)), "toy-low-rank")
    with pytest.raises(AdapterError, match=r"write tunerkit\.unwrap\(model, keep_merged=True\)"):
        model.merge_and_unload()  # type: ignore[operator]
    assert not hasattr(model, "set_adapter")
    tunerkit.unwrap(model)
    assert not hasattr(model, "merge_and_unload")
