"""llama.cpp itself, with the files of this plugin: the logits are those of torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tunerkit
from plugins.gguf.tests.base_files import ARCHITECTURES, LINEAR, causal_lm, randomize, write_base
from plugins.gguf.tests.engine import Engine, opened
from tunerkit_gguf import writing
from tunerkit_gguf.tensors import Pair

pytest.importorskip("tunerkit_lora", reason="the adapters are LoRA")

TOKENS = [3, 5, 7, 9, 40, 2, 11, 3, 17, 5, 30]
EVERYWHERE = [*LINEAR, "embed_tokens", "lm_head"]
UNEQUAL = {"q_proj": 3, "k_proj": 2, "v_proj": 7, "o_proj": 1, "gate_proj": 0, "embed_tokens": 5, "lm_head": 6}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """The logits (tokens, vocabulary) in torch."""
    found: Tensor = model.eval()(torch.tensor([TOKENS])).logits[0]
    return found


def adapted(model_type: str, targets: Sequence[str]) -> Any:
    config = {"rank": 4, "alpha": 3.0, "targets": targets, "rank_pattern": {t: UNEQUAL.get(t, 4) for t in targets}}
    model = tunerkit.wrap(causal_lm(model_type), "lora", config)
    randomize(model)
    return model


def error(engine: Engine, wanted: Tensor) -> float:
    return float((engine.logits(TOKENS) - wanted).abs().max())


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_llama_cpp_computes_what_torch_does(model_type: str, tmp_path: Path) -> None:
    """For each architecture, with an adapter at every weight, of unequal ranks, one of them 0."""
    base = causal_lm(model_type)
    plain, model = logits(base), adapted(model_type, EVERYWHERE)
    wanted = logits(model)
    with opened(write_base(base, tmp_path / "base.gguf")) as engine:
        assert error(engine, plain) <= 1e-5 * float(plain.abs().max())
        assert engine.apply(tunerkit.export(model, tmp_path / "adapter.gguf", format="gguf"))
        assert error(engine, wanted) <= 1e-5 * float(wanted.abs().max())
        assert engine.apply(tunerkit.export(model, tmp_path / "half.gguf", format="gguf", dtype="f16"))
        assert error(engine, wanted) <= 1e-2 * float((wanted - plain).abs().max())
        engine.apply(None)
        assert error(engine, plain) <= 1e-5 * float(plain.abs().max())


def test_an_adapter_that_adalora_pruned_is_served(tmp_path: Path) -> None:
    """Its ranks differ, and some are 0."""
    pytest.importorskip("tunerkit_adalora", reason="the adapter is AdaLoRA")
    base = write_base(causal_lm(), tmp_path / "base.gguf")
    config = {"target_rank": 1, "init_rank": 3, "t_init": 2, "t_final": 4, "targets": LINEAR}
    model = tunerkit.wrap(causal_lm(), "adalora", config, seed=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    tunerkit.attach(model, optimizer, total_steps=12)
    ids = torch.tensor([TOKENS])
    for _ in range(12):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert min(tunerkit.tuner(model).ranks().values()) == 0
    wanted = logits(model)
    with opened(base) as engine:
        assert engine.apply(tunerkit.export(model, tmp_path / "adapter.gguf", format="gguf"))
        assert error(engine, wanted) <= 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("trap", ["q and k in torch's order", "one scale for all ranks"])
def test_llama_cpp_accepts_a_wrong_file_without_a_word(
    trap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits are then far off, so that the tests above would fail."""
    if trap == "one scale for all ranks":
        monkeypatch.setattr(writing, "pair_of", lambda product, alpha: Pair(a=product.q, b=product.p))
    else:
        monkeypatch.setattr(writing, "permute", lambda rows, heads: rows)
    base = causal_lm()
    plain, model = logits(base), adapted("llama", LINEAR)
    wanted = logits(model)
    with opened(write_base(base, tmp_path / "base.gguf")) as engine:
        assert engine.apply(tunerkit.export(model, tmp_path / "adapter.gguf", format="gguf"))
        assert error(engine, wanted) > 0.1 * float((wanted - plain).abs().max())


def test_llama_cpp_has_no_head_to_adapt_if_the_embedding_is_the_head(tmp_path: Path) -> None:
    """So writing refuses it, and a pair for the embedding too, at which llama.cpp ends the process."""
    file = tunerkit.export(adapted("llama", ["lm_head"]), tmp_path / "adapter.gguf", format="gguf")
    with opened(write_base(causal_lm(tie_word_embeddings=True), tmp_path / "base.gguf")) as engine:
        assert not engine.apply(file)
