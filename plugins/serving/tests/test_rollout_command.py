"""The key ``engine`` of the task grpo, and ``tunerkit check-rollout``: what they print, and their exit codes."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

for _module in ("rich", "typer", "yaml", "trl", "tunerkit_peft", "tunerkit_lora"):
    pytest.importorskip(_module, reason="the command needs the extras [cli,lm,lora,peft]")

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from plugins.serving.tests.stub_vllm import StubVllm, running, save_base  # noqa: E402
from tests.support.train_command import command, succeeded  # noqa: E402

REWARD = "def score(completions, **columns):\n    return [float(len(text)) for text in completions]\n"


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[StubVllm]:
    """A server with the base that the rows' model is."""
    save_base(tmp_path / "tiny")
    (tmp_path / "rewards.py").write_text(REWARD, encoding="utf-8")
    rows = "".join(json.dumps({"prompt": "the film "}) + "\n" for _ in range(40))
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    with running() as stub:
        stub.serve(
            AutoModelForCausalLM.from_pretrained(tmp_path / "tiny"), AutoTokenizer.from_pretrained(tmp_path / "tiny")
        )
        yield stub


def test_a_run_draws_its_answers_from_the_engine_and_agrees_with_it(
    stub: StubVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions are named after the run; afterwards the finished run is compared with the engine."""
    monkeypatch.chdir(tmp_path)
    run = ["train", "--task", "grpo", "--data", "rows.jsonl", "--model", "tiny", "--method", "lora", "--config"]
    run += ["{rank: 2}", "--epochs", "0.2", "--lr", "0.02", "--max-length", "40", "--allow-code"]
    run += ["--set", "reward=rewards.py:score", "--set", "training.max_completion_length=6"]
    succeeded(*run, "--set", f"engine={stub.url}", "--out", "mine")
    steps = sum("/load_lora" in each for each in stub.asked)
    assert steps >= 4
    drawn = [each for each in stub.asked if '"max_tokens": 6' in each]
    names = [json.loads(each.split(" ", 2)[2])["model"].partition("-")[0] for each in drawn]
    assert names == ["base"] * names.count("base") + ["mine"] * names.count("mine")  # until there is something learned
    assert 0 < names.count("base") < names.count("mine")
    assert any(each.any() for name, each in load_file("mine/adapter.safetensors").items() if name.endswith("b"))

    done = command("check-rollout", "mine", "--engine", stub.url)
    assert (done.exit_code, "engine and trainer agree" in done.stdout) == (0, True), done.output
    stub.ignores = True
    done = command("check-rollout", "mine", "--engine", stub.url, "--json")
    found = json.loads(done.stdout)
    assert (done.exit_code, found["tokens"]) == (1, 96)
    assert "the engine answers as the base does" in found["cause"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--task", "grpo", "--set", "engine=localhost"],
            "by http, https, sglang+http, sglang+https; got 'localhost'",
        ),
        (["--task", "causal-lm", "--set", "engine=http://localhost:8000"], "engine: is for grpo, and the task is"),
    ],
)
def test_an_engine_that_cannot_be_is_refused(
    arguments: list[str], says: str, stub: StubVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a model is loaded."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "the film ", "completion": "good"}\n' * 40, encoding="utf-8")
    reward = ["--set", "reward=rewards.py:score", "--allow-code"] if "grpo" in arguments else []
    done = command("train", "--data", "rows.jsonl", "--model", "tiny", *reward, *arguments)
    assert (done.exit_code, stub.asked) == (2, [])
    assert says in " ".join(done.stderr.split())
