"""The prototypes of docs/authors/prompts.md compute what peft's prompt tuning and prefix tuning do."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import tunerkit

PAGE = Path(__file__).parents[2] / "docs" / "authors" / "prompts.md"
IDS = torch.randint(1, 37, (2, 5), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


@pytest.fixture(scope="module")
def page() -> Iterator[dict[str, Any]]:
    """What the page's Python blocks define; the plugins that they register are taken out again."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    module = sys.modules["prompts_page"] = ModuleType("prompts_page")  # so that its classes can be pickled
    before = tunerkit.methods().keys()
    registered: list[object] = []
    register = tunerkit.register

    def noting(plugin: object) -> None:
        register(plugin)
        registered.append(plugin)

    tunerkit.register = noting
    try:
        text = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
        exec(compile(text, str(PAGE), "exec"), vars(module))
        yield vars(module)
    finally:
        tunerkit.register = register
        for plugin in registered:
            tunerkit.unregister(plugin)
        del sys.modules["prompts_page"]
    assert tunerkit.methods().keys() == before


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    settings: Any = {"vocab_size": 37, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 1}
    return GPT2LMHeadModel(GPT2Config(**settings)).eval()


def bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=37, **sizes)).eval()


@pytest.mark.parametrize(("name", "target"), [("llama", "embed_tokens"), ("gpt2", "wte"), ("bert", "word_embeddings")])
def test_the_prompt_is_that_of_peft(page: dict[str, Any], name: str, target: str) -> None:
    """Logits, loss and gradient in fp64, with a mask and labels."""
    import peft

    build: Any = {"llama": page["llama"], "gpt2": gpt2, "bert": bert}[name]
    task, labels = ("SEQ_CLS", torch.tensor([0, 1])) if name == "bert" else ("CAUSAL_LM", IDS)
    model = tunerkit.wrap(build().double(), "prompt", {"targets": [target], "adapter_dtype": "float64"}, seed=0)
    (prompt,) = tunerkit.tuner(model).parameters()
    config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=4)
    theirs: Any = peft.get_peft_model(build().double(), config).eval()
    weight = theirs.prompt_encoder["default"].embedding.weight
    weight.data = prompt.detach().clone()
    assert_same(model, theirs, labels)
    torch.testing.assert_close(prompt.grad, weight.grad, rtol=0, atol=1e-12)


def test_the_prefix_is_that_of_peft(page: dict[str, Any]) -> None:
    """Logits, loss and gradient in fp64, with a mask and labels; peft keeps all layers' vectors in one matrix."""
    import peft

    config = {"targets": ["self_attn"], "adapter_dtype": "float64"}
    model = tunerkit.wrap(page["llama"]().double(), "prefix", config, seed=0)
    own = list(tunerkit.tuner(model).parameters())
    their_config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    theirs: Any = peft.get_peft_model(page["llama"]().double(), their_config).eval()
    weight = theirs.prompt_encoder["default"].embedding.weight

    def joined(values: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(values).permute(3, 0, 1, 2, 4).reshape(4, -1)  # (tokens, layers · 2 · heads · size)

    weight.data = joined([each.detach() for each in own])
    assert_same(model, theirs, IDS)
    torch.testing.assert_close(
        joined([each.grad for each in own if each.grad is not None]), weight.grad, rtol=0, atol=1e-12
    )


def assert_same(ours: Any, theirs: Any, labels: torch.Tensor) -> None:
    """Equal logits and losses, whose gradients are computed."""
    found, expected = (each(input_ids=IDS, attention_mask=MASK, labels=labels) for each in (ours, theirs))
    for one, other in ((found.logits, expected.logits), (found.loss, expected.loss)):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    found.loss.backward()
    expected.loss.backward()


def test_of_the_kits_checks_the_prompt_fails_those_that_the_page_names(page: dict[str, Any]) -> None:
    """Those that a longer output and another start break."""
    from tunerkit_testing import check_method
    from tunerkit_testing.known_cases import named

    results = check_method("prompt", {"targets": ["embed_tokens"]}, named(["llama"]))
    assert {each.check for each in results if each.status in ("failed", "error")} == {
        "start",
        "output_dtype",
        "state_is_all",
    }
