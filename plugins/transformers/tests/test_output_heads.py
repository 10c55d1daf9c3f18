"""Output heads, wherever a module of the model names them."""

import pytest
from torch import nn

from tests.support.target_models import chosen


class Names(nn.Module):
    """A module that names an output head, wherever it lies."""

    def __init__(self, head: nn.Module | None = None, **children: nn.Module) -> None:
        super().__init__()
        self.found = [head if head is not None else self]
        for name, child in children.items():
            self.add_module(name, child)

    def get_output_embeddings(self) -> nn.Module:
        return self.found[0]


def test_any_module_may_name_a_head_that_lies_elsewhere() -> None:
    """Law: all modules are asked first, those without children too; a module may name itself."""
    other = nn.Linear(4, 4)
    model = nn.ModuleDict({"inner": Names(other, q=nn.Linear(4, 4)), "other": other, "q": nn.Linear(4, 4)})
    assert chosen(model, None) == ["inner.q", "q"]
    assert chosen(nn.ModuleDict({"a": Names(other), "b": other, "c": nn.Linear(4, 4)}), None) == ["c"]
    assert chosen(nn.ModuleDict({"a": Names(q=nn.Linear(4, 4)), "b": nn.Linear(4, 4)}), None) == ["b"]


@pytest.mark.parametrize("question", ["get_output_embeddings", "get_classifier"])
def test_a_head_is_known_by_what_the_model_or_a_model_inside_it_says(question: str) -> None:
    """Law: the head that a transformers or timm model reports is left out, whatever its name."""
    inner = nn.ModuleDict({"body": nn.Linear(2, 2), "odd": nn.Linear(2, 2)})
    setattr(inner, question, lambda: inner["odd"])
    assert chosen(inner, "all-linear") == ["body"]
    assert chosen(nn.ModuleDict({"inner": inner}), "all-linear") == ["inner.body"]
