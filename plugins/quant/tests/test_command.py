"""``quantisation`` in a recipe: the base is loaded so, in training and afterwards, and merged to a dense one."""

import importlib.util
from pathlib import Path

import pytest
import torch

# Imports after a statement: without the extra this file is skipped, not broken.
for _module in ("datasets", "platformdirs", "pyarrow", "rich", "sklearn", "transformers", "typer", "yaml"):
    pytest.importorskip(_module, reason="the command needs the extra [cli]")
for _module in ("bitsandbytes", "tunerkit_lora"):
    pytest.importorskip(_module)

import transformers  # noqa: E402

import tunerkit  # noqa: E402
from tests.support.tiny_models import save_tiny_mixtral  # noqa: E402
from tests.support.train_command import arguments_of, command, record_of, succeeded  # noqa: E402
from tunerkit_transformers import quantising  # noqa: E402
from tunerkit_transformers.quantising import sizes_of  # noqa: E402


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments of a run, without ``--out``."""
    return [*arguments_of(tmp_path_factory.mktemp("quant"), "lora", "{rank: 2}"), "--epochs", "1"]


@pytest.mark.parametrize("name", ["nf4", "int8"])
@pytest.mark.filterwarnings("ignore:.*4 bits")
def test_a_run_on_a_quantised_base(name: str, arguments: list[str], tmp_path: Path) -> None:
    """It says what that saves; the folder says it too, loads the base so, and merges to a dense folder."""
    out = tmp_path / "out"
    done = succeeded(*arguments, "--out", out, "--set", f"quantisation={name}")
    assert f"base: quantised as {name}, " in done.output
    assert record_of(out)["model"]["quantisation"] == name
    assert name in succeeded("show", out).output
    model, _ = tunerkit.from_folder(out)
    assert model.is_quantized
    assert {p.dtype for p in tunerkit.tuner(model).parameters()} == {torch.float32}
    succeeded("merge", out, "--out", tmp_path / "plain")
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    ids = torch.arange(1, 7)[None]
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, model(ids).logits, atol=0.05)
    assert not hasattr(plain.config, "quantization_config")


def test_a_run_on_a_mixture_packs_its_experts(tmp_path: Path) -> None:
    """In training and afterwards; what needs dense experts is refused in one line."""
    pytest.importorskip("tunerkit_experts")
    base, data, out = save_tiny_mixtral(tmp_path / "base"), tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text('{"prompt": "the film ", "completion": "very good"}\n' * 8, encoding="utf-8")
    run = ["train", "--task", "causal-lm", "--method", "lora", "--config", "{rank: 2}", "--epochs", "1"]
    rows = ["--data", data, "--eval-data", data, "--batch-size", "4", "--precision", "fp32"]
    done = succeeded(*run, *rows, "--model", base, "--out", out, "--set", "quantisation=nf4")
    assert "; 4 stacks of experts are packed too, which saves 0.00 GiB" in done.output
    assert "left 4 stacks of experts in full precision" not in done.output
    assert "lora on 8 matrices and 4 stacks of 4 experts" in done.output
    model, _ = tunerkit.from_folder(out)
    packed = [parameter for name, parameter in model.named_parameters() if name.endswith("_proj.original")]
    assert [parameter.dtype for parameter in packed] == [torch.uint8] * 4
    assert sizes_of(model).saved == 2 * 4 * (128 * 64 + 64 * 64) * (4 - 1 / 2)
    refused = command("merge", out, "--out", tmp_path / "plain")
    assert refused.exit_code == 2
    assert "(4, 128, 64) is stored as bitsandbytes nf4 and cannot be made dense. Load the adapter" in refused.stderr


def test_an_unknown_quantisation_is_named(arguments: list[str], tmp_path: Path) -> None:
    """With the closest that there is, before anything is loaded."""
    done = command(*arguments, "--out", tmp_path / "out", "--set", "quantisation=nf8")
    assert done.exit_code == 2
    assert "quantisation" in done.stderr
    assert "nf4" in done.stderr


def test_a_missing_library_is_named(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says what to install."""
    found = importlib.util.find_spec
    hidden = lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest)  # noqa: E731
    monkeypatch.setattr(quantising.importlib.util, "find_spec", hidden)
    done = command(*arguments, "--out", tmp_path / "out", "--set", "quantisation=nf4")
    assert done.exit_code == 2
    assert "needs bitsandbytes (pip install bitsandbytes)" in done.stderr


def test_doctor_lists_the_quantisers() -> None:
    """With their versions, and what to install of those that are missing."""
    output = command("doctor").output
    for name in ("bitsandbytes", "torchao", "hqq", "optimum-quanto", "tunerkit-quant"):
        assert name in output
