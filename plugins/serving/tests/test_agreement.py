"""What a check of an engine finds: nothing where it is right, and the cause of each planted mistake."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tunerkit_peft", reason="the format comes with it")
pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, AutoTokenizer

import tunerkit
from plugins.serving.tests.planted import PLANTED, Change, Planted, wrapped
from plugins.serving.tests.serving_folders import random_folder
from plugins.serving.tests.stub_vllm import StubVllm, perturb_
from tunerkit_serving import check_rollout, publisher


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("lora", {"rank": 4}),
        ("lora", {"rank": 4, "rslora": True, "alpha": 16}),
        ("adalora", {"target_rank": 2, "total_steps": 100}),
    ],
)
def test_where_engine_and_model_agree_nothing_is_said(
    method: str, config: dict[str, Any], folder: Path, engine: StubVllm, tmp_path: Path
) -> None:
    """And the engine has no adapter more afterwards."""
    model = wrapped(folder, method, **config)
    found = check_rollout(model, engine.url, tokenizer=AutoTokenizer.from_pretrained(folder), folder=tmp_path)
    assert found.cause is None
    assert found.largest < 1e-4
    assert found.base < 1e-5
    assert found.ratio == pytest.approx(1, abs=1e-4)
    assert (found.greedy, found.tokens) == ((8,) * 12, 96)
    assert found.moved > 0.1
    assert (engine.adapters, [*tmp_path.iterdir()]) == ({}, [])


@pytest.mark.parametrize(("change", "cause"), PLANTED.values(), ids=PLANTED)
def test_a_planted_mistake_is_named(
    change: Change,
    cause: str | None,
    folder: Path,
    engine: StubVllm,
    tmp_path: Path,
) -> None:
    """What differs is the cause, and nothing else."""
    found = check_rollout(wrapped(folder), Planted(url=engine.url, change=change), folder=tmp_path / "versions")
    assert (found.cause is None) == (cause is None)
    if cause is not None:
        assert re.search(cause, str(found.cause))
        assert found.mean > 1e-2


def test_an_older_version_is_named(folder: Path, engine: StubVllm, tmp_path: Path) -> None:
    """Which one, of those in the folder."""
    model = wrapped(folder)
    random_folder(tmp_path / "other-0123456789abcdef")  # of another model, which is passed over
    (tmp_path / "damaged-0123456789abcdef").mkdir()
    (tmp_path / "damaged-0123456789abcdef" / "adapter_config.json").write_text("{")
    versions = publisher(model, engine.url, folder=tmp_path)
    names = [versions.publish()]
    for _ in range(2):
        perturb_(model)
        names.append(versions.publish())
    found = check_rollout(model, engine.url, version=names[-1], folder=tmp_path)
    assert (found.version, found.cause) == (names[-1], None)
    perturb_(model)
    found = check_rollout(model, engine.url, version=names[1], folder=tmp_path)
    assert found.cause is not None
    assert found.cause.startswith(f"the engine computes with {names[1]}, another version")


def test_other_bases_dtypes_templates_and_dead_adapters(folder: Path, engine: StubVllm, tmp_path: Path) -> None:
    """Each by what differs without the adapter, or with a perturbed one."""
    model, tokenizer = wrapped(folder), AutoTokenizer.from_pretrained(folder)
    right = engine.model
    assert right is not None

    def cause(base: torch.nn.Module) -> str:
        engine.serve(base, AutoTokenizer.from_pretrained(folder))
        found = check_rollout(model, engine.url, tokenizer=tokenizer, folder=tmp_path)
        assert found.cause is not None
        return found.cause

    other = copy.deepcopy(right)
    torch.nn.init.normal_(other.get_parameter("lm_head.weight"))
    assert "the engine's base is another model" in cause(other)
    assert "computes in another dtype than the trainer, whose is float32" in cause(copy.deepcopy(right).bfloat16())
    tokenizer.chat_template = tokenizer.chat_template.replace("<|assistant|> ", "<|assistant|>  good")
    assert "the engine's chat template is another one, from token" in cause(right)
    engine.ignores = True
    assert "the engine answers as the base does" in cause(right)
    fresh = tunerkit.wrap(AutoModelForCausalLM.from_pretrained(folder), "lora", {"rank": 4})
    found = check_rollout(fresh, engine.url, folder=tmp_path)
    assert "does not change the engine's answers: it ignores adapters" in str(found.cause)
