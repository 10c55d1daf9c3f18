"""Answers for TRL's GRPO from an engine: by the version of the step, as the trainer would draw them; every refusal."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("tunerkit_peft", reason="the format comes with it")
pytest.importorskip("trl")

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

import tunerkit
from plugins.serving.tests.stub_vllm import BASE, StubVllm, perturb_
from tunerkit_serving import PublishError, Rollout, RolloutError, Sampling, ServerGone, VllmServer, rollout

TEXTS = ["the film was", "a plot"]
CHATS = [[{"role": "user", "content": text}] for text in TEXTS]


def wrapped(folder: Path, method: str = "lora", **config: Any) -> Any:
    torch.manual_seed(0)
    model = tunerkit.wrap(AutoModelForCausalLM.from_pretrained(folder), method, config or {"rank": 4})
    if method == "lora":
        perturb_(model)  # AdaLoRA is published after a step
    return model


def to(engine: StubVllm) -> VllmServer:
    return VllmServer(url=engine.url, waits=(0.0, 0.0))


def drawing(model: Any, engine: StubVllm, place: Path, **settings: Any) -> Rollout:
    found = rollout(model, to(engine), folder=place, **settings)
    found._pause = 0.01
    return found


def trainer_of(model: Any, folder: Path, out: Path, draw: Any, prompts: Sequence[Any] = TEXTS, **args: Any) -> Any:
    options: dict[str, Any] = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 6}
    options |= {"max_steps": 6, "learning_rate": 1e-2, "beta": 0.0, "bf16": False}
    options |= {"report_to": "none", "use_cpu": True, "save_strategy": "no"}

    def reward(completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
        return [float(sum(ids)) for ids in completion_ids]

    trainer = GRPOTrainer(
        model,
        reward_funcs=reward,
        args=GRPOConfig(str(out), **{**options, **args}),
        train_dataset=Dataset.from_dict({"prompt": [*prompts] * 8}),
        processing_class=AutoTokenizer.from_pretrained(folder),
        rollout_func=draw,
    )
    tunerkit.attach(model, trainer)
    return trainer


@pytest.mark.parametrize("prompts", [TEXTS, CHATS], ids=["texts", "chats"])
@pytest.mark.parametrize(
    ("method", "config"), [("lora", {"rank": 4}), ("adalora", {"target_rank": 2, "total_steps": 6})]
)
@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_each_step_draws_by_its_own_version(
    method: str, config: dict[str, Any], prompts: Sequence[Any], folder: Path, engine: StubVllm, tmp_path: Path
) -> None:
    """The engine's log-probabilities are the model's own at that moment, and prompts are tokenized as TRL does it."""
    model = wrapped(folder, method, **config)
    draw = drawing(model, engine, tmp_path / "versions")
    names: list[str] = []

    def watched(asked: list[Any], trainer: Any) -> dict[str, Any]:
        found = draw(asked, trainer)
        names.append(draw.publisher.loaded[-1] if names or method == "lora" else BASE)
        ids, _, _ = trainer._tokenize_prompts(asked)
        assert found["prompt_ids"] == [list(each) for each in ids]
        model.eval()
        for prompt, answer, logprobs in zip(*found.values(), strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            own = logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
            assert torch.allclose(own, torch.tensor(logprobs), atol=1e-4)
        model.train()
        return found

    trainer_of(model, folder, tmp_path / "out", watched, prompts).train()
    assert len(names) == len(set(names)) == 6
    drawn = [json.loads(each.split(" ", 2)[2]) for each in engine.asked if '"max_tokens": 6' in each]
    assert [sum(each["n"] for each in drawn if each["model"] == name) for name in names] == [4] * 6


def called(own: Any, folder: Path, **changes: Any) -> Any:
    """What TRL hands over, without a training."""
    args: dict[str, Any] = {"max_completion_length": 6, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None}
    args |= {"repetition_penalty": 1.0, "seed": 3, "generation_kwargs": None}
    args = {name: value for name, value in {**args, **changes.pop("args", {})}.items() if value is not ...}
    fields = {"args": SimpleNamespace(**args), "state": SimpleNamespace(global_step=0), "model": own}
    fields |= {"processing_class": AutoTokenizer.from_pretrained(folder)}
    fields |= {"accelerator": SimpleNamespace(unwrap_model=lambda model: model, num_processes=1), "eos_token_ids": [3]}
    fields |= {"environment_factories": None, "tools": [], "chat_template": None, "chat_template_kwargs": {}}
    return SimpleNamespace(**{**fields, **changes})


def test_draws_depend_on_seed_step_call_and_place(folder: Path, engine: StubVllm, tmp_path: Path) -> None:
    """So a resumed training draws the same again; what has not changed is loaded once, however often it draws."""
    model = wrapped(folder)
    draw, again = (drawing(model, engine, tmp_path) for _ in range(2))
    first, second = (draw(TEXTS * 4, called(model, folder)) for _ in range(2))
    other = draw(TEXTS * 4, called(model, folder, args={"seed": 4}))
    assert [again(TEXTS * 4, called(model, folder)) for _ in range(2)] == [first, second]
    answers = [each["completion_ids"] for each in (first, second, other)]
    assert all(one != two for one, two in zip(answers, [*answers[1:], answers[0]], strict=True))
    assert len({tuple(each) for each in answers[0][::2]}) > 1
    assert engine.count("/load_lora") == 1
    perturb_(model)  # within a step, as averaged weights are put in for an evaluation
    draw(TEXTS, called(model, folder))
    assert engine.count("/load_lora") == 2


def test_a_server_that_was_restarted_gets_the_version_again(folder: Path, engine: StubVllm, tmp_path: Path) -> None:
    """With patience the training waits for it, and says so once; without, it stops with the reason."""
    model = wrapped(folder)
    draw, hasty = drawing(model, engine, tmp_path, patience=60.0), drawing(model, engine, tmp_path)
    wanted, _ = (each(TEXTS, called(model, folder)) for each in (draw, hasty))
    engine.adapters.clear()
    with pytest.raises(ServerGone, match="the server has no 'gone'; was it restarted"):
        to(engine).sample("gone", [([2], Sampling(max_tokens=1))])
    engine.breaks = 3
    with pytest.raises(ServerGone, match="no connection"):
        hasty(TEXTS, called(model, folder))
    engine.breaks = 7
    draw._calls = 0
    with pytest.warns(tunerkit.TunerkitWarning, match="waiting for the server, up to 60 s") as warned:
        assert draw(TEXTS, called(model, folder)) == wanted
    assert (sum("waiting" in str(each.message) for each in warned), len(engine.adapters)) == (1, 1)


def test_log_probabilities_at_another_temperature_are_refused(folder: Path, engine: StubVllm, tmp_path: Path) -> None:
    """TRL's are at the trainer's temperature; a server started for it gives those."""
    model = wrapped(folder)
    draw = drawing(model, engine, tmp_path)
    warm = called(model, folder, args={"temperature": 0.5})
    with pytest.raises(PublishError, match=r"at temperature 1, the trainer has 0\.5.*--logprobs-mode processed_logpro"):
        draw(TEXTS, warm)
    engine.processed = True
    assert len(draw(TEXTS, warm)["logprobs"]) == 2
    sure = AutoModelForCausalLM.from_pretrained(folder)
    sure.lm_head.weight.data *= 1e4
    engine.processed = False
    engine.serve(sure)
    engine.adapters.clear()
    assert len(drawing(model, engine, tmp_path / "sure")(TEXTS, warm)["logprobs"]) == 2  # 0 at any temperature


TWO_PROCESSES = SimpleNamespace(unwrap_model=lambda model: model, num_processes=2)


@pytest.mark.parametrize(
    ("changes", "prompts", "says"),
    [
        ({"args": {"top_k": ...}}, TEXTS, "made for GRPOTrainer of TRL 1.16.*has no attribute 'top_k'"),
        ({"model": torch.nn.Linear(2, 2)}, TEXTS, "trains another model"),
        ({"accelerator": TWO_PROCESSES}, TEXTS, "on 2 processes, and rollout is for one"),
        ({"environment_factories": {}}, TEXTS, "leave environment_factory out"),
        ({}, [[{"role": "user", "content": [{"type": "image"}]}]], "prompts have images"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    changes: dict[str, Any], prompts: list[Any], says: str, folder: Path, engine: StubVllm, tmp_path: Path
) -> None:
    """Before anything is published."""
    model = wrapped(folder)
    with pytest.raises(RolloutError, match=says):
        drawing(model, engine, tmp_path)(prompts, called(model, folder, **changes))
    with pytest.raises(RolloutError, match=r"rollout_func\(prompts, trainer\); got 1 more arguments"):
        drawing(model, engine, tmp_path)(prompts, called(model, folder), None)
    assert engine.asked == []


def test_settings_out_of_range_are_refused(folder: Path, engine: StubVllm) -> None:
    """As soon as they are given."""
    with pytest.raises(PublishError, match=r"patience: expected >= 0"):
        rollout(wrapped(folder), to(engine), patience=-1)
    with pytest.raises(PublishError, match=r"requests: expected >= 1"):
        VllmServer(url=engine.url, requests=0)
