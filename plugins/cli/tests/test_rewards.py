"""The task grpo: rewards by functions in files, their mistakes, and runs that are resumed to the bit."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.tiny_models import save_tiny_llama
from tests.support.train_command import command, record_of, signalled, succeeded
from tunerkit.errors import ConfigError
from tunerkit_cli.tasks import EQUAL, task_of
from tunerkit_cli.tasks.functions import _functions
from tunerkit_cli.tasks.rewards import RewardError, refuse_rewards, settle_rewards_
from tunerkit_cli.watching.learning import reached
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import LowRankPlugin

pytest.importorskip("trl")
RULES = """
import math

def vowels(prompts, completions, **columns):
    texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in texts]

def found(prompts, completions, solution, **columns):
    return [float(right in text) for right, text in zip(solution, completions)]

def sometimes(completions, solution, **columns):
    return [None if right == "plot" else 1.0 for right in solution]

def raises(completions, **columns):
    return [1 / len(text) for text in completions]

def later(completions, trainer_state, **columns):
    return [1 / (trainer_state.global_step - 10) for _ in completions]

def nan(completions, **columns):
    return [math.nan] * len(completions)

def few(completions, **columns):
    return []

def words(completions, **columns):
    return ["good"] * len(completions)
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a small language model, rows, and rules."""
    _functions.cache_clear()
    folder = tmp_path_factory.mktemp("given")
    save_tiny_llama(folder / "tiny")
    (folder / "rules.py").write_text(RULES, encoding="utf-8")
    rows = [{"prompt": "the film ", "solution": ("good", "plot")[n % 2], "messages": [1, n]} for n in range(40)]
    chats = [{"prompt": [{"role": "user", "content": "film"}], "level": n} for n in range(40)]
    for name, each in (("texts", rows), ("chats", chats)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each), encoding="utf-8")
    with registered(LowRankPlugin()):
        yield folder


def arguments(given: Path, *rewards: str, data: str = "texts") -> list[str]:
    """A run of 16 steps that checkpoints at each fourth."""
    named = ", ".join(f"{given / 'rules.py'}:{each}" for each in rewards)
    return [
        *("train", "--task", "grpo", "--data", str(given / f"{data}.jsonl"), "--model", str(given / "tiny")),
        *("--method", "toy-low-rank", "--config", "{rank: 2}", "--epochs", "0.5", "--lr", "0.02"),
        *("--set", "save_steps=4", "--max-length", "40", "--set", "training.max_completion_length=8"),
        *("--allow-code", "--set", f"reward=[{named}]"),
    ]


def test_a_run_of_texts_resumes_to_the_bit(given: Path, tmp_path: Path) -> None:
    """It was interrupted between two checkpoints, and may run the code again only if that is allowed again."""
    run = arguments(given, "vowels", "found")
    said = succeeded(*run, "--out", tmp_path / "whole").output
    assert "read by the reward: solution, messages" in said
    with signalled(10, signal.SIGINT):
        assert command(*run, "--out", tmp_path / "out").exit_code == 130
    assert "pass --allow-code" in command("train", "--out", tmp_path / "out", "--resume").stderr
    succeeded("train", "--out", tmp_path / "out", "--resume", "--allow-code")
    whole, resumed = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "out"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    record = record_of(tmp_path / "whole")
    assert record["metrics"]["reward"] == pytest.approx(record_of(tmp_path / "out")["metrics"]["reward"])
    assert {*record["metrics"]} == {"loss", "reward", EQUAL, "answer_tokens"}


def test_a_run_that_uses_answers_twice_says_where_it_cannot_resume_to_the_bit(given: Path, tmp_path: Path) -> None:
    """TRL keeps answers for further steps in memory alone."""
    run = [*arguments(given, "vowels"), "--set", "training.num_iterations=3", "--set", "training.max_steps=8"]
    with signalled(5, signal.SIGINT):
        assert command(*run, "--out", tmp_path / "out").exit_code == 130
    resumed = succeeded("train", "--out", tmp_path / "out", "--resume", "--allow-code")
    assert "while answers were still in use" in resumed.output + resumed.stderr


def test_chats_are_scored_as_messages(given: Path, tmp_path: Path) -> None:
    """As TRL gives them to a function; the run goes on from there with another rule, which must be named."""
    succeeded(*arguments(given, "vowels", data="chats"), "--out", tmp_path / "first")
    again = ["train", "--from", tmp_path / "first", "--data", given / "chats.jsonl", "--out", tmp_path / "second"]
    again += ["--set", "training.max_completion_length=8", "--max-length", "40", "--epochs", "0.1"]
    assert "grpo needs a function that scores answers" in command(*again).stderr
    succeeded(*again, "--set", f"reward={given / 'rules.py'}:vowels", "--allow-code")


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        (["raises"], "reward raises failed: ZeroDivisionError"),
        (["nan"], "reward nan returned nan for the answer ''"),
        (["few"], "reward few returned 0 rewards for 1 answers"),
        (["words"], "reward words failed: ValueError: could not convert string to float: 'good'"),
        (["vowels", "vowels"], "have the same name; leave one out"),
        (["vowls"], "has no function 'vowls'; did you mean 'vowels'?"),
    ],
)
def test_a_wrong_reward_is_told_before_anything_runs(
    rewards: list[str], said: str, given: Path, tmp_path: Path
) -> None:
    """On an empty answer to the first row."""
    refused = command(*arguments(given, *rewards), "--out", tmp_path / "out")
    assert said in refused.stderr
    assert refused.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_reward_that_fails_later_keeps_what_was_trained(given: Path, tmp_path: Path) -> None:
    """The error says at which step, and how to go on."""
    failed = command(*arguments(given, "later"), "--out", tmp_path / "out")
    assert "reward later failed: ZeroDivisionError" in failed.stderr
    assert "after step 10 of 16; correct it, and go on with: tunerkit train --out" in failed.stderr
    assert (tmp_path / "out" / "checkpoints" / "checkpoint-8").is_dir()


def test_none_is_for_functions_beside_others(given: Path) -> None:
    """An answer that no function scores has no reward."""
    task: Any = task_of("grpo")
    row = {"prompt": "the film ", "solution": "plot"}
    rules = [f"{given / 'rules.py'}:{name}" for name in ("sometimes", "found")]
    with pytest.raises(RewardError, match="returned None for the answer '', and no other scores it"):
        settle_rewards_(task, rules[:1], [row])
    settle_rewards_(task, rules, [row])
    assert [each(completions=["plot"], prompts=[""], solution=["plot"]) for each in task.functions] == [[None], [1.0]]


def test_a_reward_is_for_grpo_alone() -> None:
    """And grpo needs one, as does its answer some room."""
    with pytest.raises(ConfigError, match="is for grpo, and the task is causal-lm"):
        refuse_rewards(["rules.py:f"], task_of("causal-lm"), allow_code=True)
    with pytest.raises(ConfigError, match="grpo needs a function"):
        refuse_rewards([], task_of("grpo"), allow_code=True)


def test_an_answer_has_room_beside_its_prompt(given: Path, tmp_path: Path) -> None:
    """TRL would cut no prompt, and generate beyond the model's positions."""
    run = arguments(given, "vowels")
    run[run.index("40")] = "8"
    assert "have no room for a prompt and its answer" in command(*run, "--out", tmp_path / "out").stderr


def test_rewards_that_are_all_equal_are_a_problem() -> None:
    """They give no direction."""
    found = [reached({EQUAL: share, "reward": 0.0}, None, (), rows=40, advice="") for share in (1.0, 0.5)]
    assert [len(each.problems) for each in found] == [1, 0]
    assert "have the same reward" in found[0].problems[0].text
