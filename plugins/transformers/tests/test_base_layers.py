"""The kinds of layers of transformers' own, compared with layers that have merged weights."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from tests.support.layer_law import check_law, described, random_
from tunerkit.hooks import gather_knowledge
from tunerkit.layers import BaseLayer, as_base_layer
from tunerkit_transformers.base_layers import Conv1DLayer, FalconLinearLayer

batches = st.lists(st.integers(0, 3), max_size=3)


def kind_of(module: nn.Module) -> BaseLayer | None:
    """The module as a base layer, with the kinds of all plugins."""
    return as_base_layer(module, gather_knowledge().kinds)


@settings(deadline=None)
@given(batches, st.integers(1, 5), st.integers(1, 5), st.integers(1, 7))
def test_transformers_conv1d_keeps_the_law(batch: list[int], n_in: int, n_out: int, rank: int) -> None:
    """Its weight is (in, out)."""
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    module = random_(conv1d(n_out, n_in))
    assert isinstance(described(module), Conv1DLayer)
    check_law(module, torch.randn(*batch, n_in, dtype=torch.float64).reshape(-1, n_in), rank)


@pytest.mark.parametrize("bias", [False, True])
def test_falcons_linear_layer_keeps_the_law(bias: bool) -> None:
    """Its custom forward computes the same as ``nn.Linear``."""
    falcon = pytest.importorskip("transformers.models.falcon.modeling_falcon")
    module = random_(falcon.FalconLinear(4, 3, bias=bias))
    assert isinstance(described(module), FalconLinearLayer)
    check_law(module, torch.randn(2, 5, 4, dtype=torch.float64), 2)


def scaled_embeddings() -> list[Any]:
    """Every scaled embedding of the installed transformers."""
    transformers = pytest.importorskip("transformers")
    found = []
    for file in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        name = re.search(r"class (\w+ScaledWordEmbedding)\(nn\.Embedding\)", file.read_text(encoding="utf-8"))
        if name is not None:
            module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
            found.append(getattr(module, name[1]))
    return found


def test_scaled_embeddings_of_transformers_keep_the_law_or_are_refused() -> None:
    """Gemma's scale is a tensor, BART's a number; T5Gemma2's forward inserts a separate row."""
    classes = {cls.__name__: cls for cls in scaled_embeddings()}
    assert {"Gemma3TextScaledWordEmbedding", "BartScaledWordEmbedding"} <= classes.keys()
    refused = set()
    for name, cls in classes.items():
        module = random_(cls(7, 4, 2, embed_scale=3.0))
        if kind_of(module) is None:
            refused.add(name)
        else:
            check_law(module, torch.arange(7).reshape(1, 7), 3)
            assert float(described(module).scale) == 3.0
    assert refused == {"T5Gemma2TextScaledWordEmbedding"}


def test_a_tensor_scale_is_rounded_as_the_forward_rounds_it() -> None:
    """In bf16, Gemma multiplies by its scale in bf16: 19.6 becomes 19.625, and an adapter must do the same."""
    gemma = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    module = gemma.Gemma3TextScaledWordEmbedding(5, 3, 0, embed_scale=384**0.5).bfloat16()
    module.embed_scale = torch.tensor(384**0.5)
    base = described(module)
    assert float(base.scale) == float(torch.tensor(384**0.5).bfloat16())
    h = base.project_out(torch.eye(3), torch.eye(3))
    assert h.dtype == torch.float32
    assert torch.equal(h, torch.eye(3) * float(base.scale))


def test_a_transformers_class_with_its_own_forward_has_no_kind() -> None:
    """Subclasses of Conv1D and of Gemma's embedding match only while they inherit the forward."""
    utils = pytest.importorskip("transformers.pytorch_utils")
    gemma = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    for parent, arguments in ((utils.Conv1D, (2, 3)), (gemma.Gemma3TextScaledWordEmbedding, (5, 3, 0))):
        kept = type("Kept", (parent,), {})
        changed = type(parent.__name__, (parent,), {"forward": lambda self, x: x})
        assert type(kind_of(kept(*arguments))) is type(kind_of(parent(*arguments)))
        assert kind_of(kept(*arguments)) is not None
        assert kind_of(changed(*arguments)) is None
        own: Any = parent(*arguments)
        own.forward = lambda x: x
        assert kind_of(own) is None


def test_an_embedding_of_transformers_has_a_kind_only_if_it_is_a_scaled_one() -> None:
    """Name, parent and scale decide; BART's position embeddings are shifted, and not scaled embeddings."""
    bart = pytest.importorskip("transformers.models.bart.modeling_bart")
    positions = bart.BartLearnedPositionalEmbedding(5, 3)
    positions.embed_scale = 2.0
    assert kind_of(positions) is None
    body = {"forward": lambda self, x: x, "__module__": "transformers.models.new"}
    for parent, scale in ((nn.Linear, 2.0), (nn.Embedding, None)):
        module = type("NewScaledWordEmbedding", (parent,), body)(5, 3)
        module.register_parameter("bias", None)
        del module._parameters["bias"]
        module.embed_scale = scale
        assert kind_of(module) is None
