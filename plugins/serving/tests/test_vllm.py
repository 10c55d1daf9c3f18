"""vLLM itself, on a CPU: what it computes with each adapter, also while they change, and each mistake by its name."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch

pytest.importorskip("tunerkit_peft", reason="the format comes with it")
pytest.importorskip("trl")

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

import tunerkit
from plugins.serving.tests.planted import PLANTED, Planted, wrapped
from plugins.serving.tests.stub_vllm import perturb_
from tunerkit_serving import (
    Answer,
    PublishError,
    Sampling,
    Server,
    VllmInProcess,
    VllmServer,
    check_rollout,
    publisher,
    rollout,
)
from tunerkit_serving.local_scores import LocalModel

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed; make test-vllm runs this")
ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # other work may be on these cores
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
SETTINGS = ("--dtype=float32", "--enforce-eager", "--max-model-len=64", "--logprobs-mode=processed_logprobs")
LORA = ("--enable-lora", "--max-lora-rank=8", "--max-loras=4", "--max-cpu-loras=8")


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with the small base, started once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("vllm") / "log"
    module = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")  # `vllm serve` asks for a package vllm
    command = (*module, f"--model={folder}", "--host=127.0.0.1", f"--port={port}", *SETTINGS, *LORA)
    with log.open("w") as said:
        server = subprocess.Popen(
            command, env={**os.environ, **ENVIRONMENT}, stdout=said, stderr=said, start_new_session=True
        )
    try:
        while True:
            with suppress(URLError), urlopen(f"{url}/v1/models", timeout=60):
                break
            if server.poll() is not None:
                pytest.fail(f"vLLM ended with {server.returncode}:\n{log.read_text()[-4000:]}")
            time.sleep(0.5)
        yield url
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def from_peft(folder: Path, place: Path) -> Any:
    """A model with an adapter that peft wrote."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    targets = ["q_proj", "v_proj", "up_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets, init_lora_weights=False)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).save_pretrained(place)
    return tunerkit.load(AutoModelForCausalLM.from_pretrained(folder), place)


def adapted(kind: str, folder: Path, place: Path) -> Any:
    if kind == "from peft":
        return from_peft(folder, place / "peft")
    if kind == "rslora":
        return wrapped(folder, "lora", rank=4, rslora=True, alpha=16)
    if kind == "adalora":
        model = wrapped(folder, "adalora", init_rank=6, target_rank=2, t_init=0, delta_t=1, t_final=1, total_steps=9)
        ranks = tunerkit.tuner(model).ranks().values()
        assert len(set(ranks)) > 1
        assert min(ranks) == 0
        return model
    return wrapped(folder, "lora", rank=4)


def scores(model: Any, prompt: list[int], answer: Answer) -> torch.Tensor:
    """The model's own log-probabilities of an answer."""
    return LocalModel(model, [[*prompt, *answer.tokens]], len(prompt)).scores()


@pytest.mark.parametrize("kind", ["lora", "rslora", "adalora", "from peft"])
def test_the_engine_computes_what_the_model_does(kind: str, folder: Path, url: str, tmp_path: Path) -> None:
    """Its likeliest tokens are the same, and the check finds nothing wrong."""
    model = adapted(kind, folder, tmp_path)
    found = check_rollout(model, url, tokenizer=AutoTokenizer.from_pretrained(folder), folder=tmp_path)
    assert found.cause is None
    assert found.largest < 1e-3
    assert found.greedy == (8,) * 12
    assert found.ratio == pytest.approx(1, abs=1e-3)
    assert found.moved > 0.1


@pytest.mark.parametrize(("change", "cause"), PLANTED.values(), ids=PLANTED)
def test_a_planted_mistake_is_named(change: Any, cause: str | None, folder: Path, url: str, tmp_path: Path) -> None:
    """As beside the stub."""
    found = check_rollout(wrapped(folder), Planted(url=url, change=change), folder=tmp_path / "versions")
    assert (found.cause is None) == (cause is None)
    assert cause is None or re.search(cause, str(found.cause))


def test_an_older_version_and_another_template_are_named(folder: Path, url: str, tmp_path: Path) -> None:
    """The older one by its name."""
    model, tokenizer = wrapped(folder), AutoTokenizer.from_pretrained(folder)
    name = publisher(model, url, folder=tmp_path, keep=1).publish()
    perturb_(model)
    found = check_rollout(model, url, version=name, folder=tmp_path)
    assert str(found.cause).startswith(f"the engine computes with {name}, another version")
    tokenizer.chat_template = tokenizer.chat_template.replace("<|assistant|> ", "<|assistant|>  good")
    found = check_rollout(model, url, tokenizer=tokenizer, folder=tmp_path)
    assert "the engine's chat template is another one, from token" in str(found.cause)
    VllmServer(url=url).unload(name)


def test_two_adapters_answer_in_one_batch(folder: Path, url: str, tmp_path: Path) -> None:
    """Each as its own model; so does the base alone. In their batch it would not, on a CPU: vllm #48421."""
    server = VllmServer(url=url)
    models = {"one": adapted("lora", folder, tmp_path), "two": adapted("from peft", folder, tmp_path)}
    names = {publisher(models[each], server, folder=tmp_path, prefix=each).publish(): models[each] for each in models}
    prompt = [5, 6, 7]
    draws = [(prompt, Sampling(max_tokens=12, seed=at)) for at in range(6)]
    with ThreadPoolExecutor(len(names)) as pool:
        found = dict(zip(names, pool.map(lambda name: server.sample(name, draws), names), strict=True))
    base = server.listed().base
    names[base], found[base] = AutoModelForCausalLM.from_pretrained(folder), server.sample(base, draws)
    for name, model in names.items():
        differs = [scores(model, prompt, answer) - torch.tensor(answer.logprobs) for (answer,) in found[name]]
        assert torch.cat(differs).abs().max() < 1e-3, name
    assert len({str(each) for each in found.values()}) == len(names)
    for name in list(names)[:2]:
        server.unload(name)


def test_versions_change_while_others_ask(folder: Path, url: str, tmp_path: Path) -> None:
    """Each answer has its version's log-probabilities; what keep allows is loaded, one in use and one more."""
    model, server, over = wrapped(folder), VllmServer(url=url), Event()
    versions = publisher(model, server, keep=2, folder=tmp_path)
    weights = {versions.publish(): {name: each.clone() for name, each in model.state_dict().items()}}
    loaded: list[int] = []

    def asking(at: int) -> list[tuple[str, list[int], Answer]]:
        found: list[tuple[str, list[int], Answer]] = []
        while not over.is_set():
            with versions.using() as name:
                prompt = [5 + at, 6, 7]
                ((answer,),) = server.sample(name, [(prompt, Sampling(max_tokens=6, seed=len(found)))])
                loaded.append(len(server.listed().adapters))
                found.append((name, prompt, answer))
        return found

    with ThreadPoolExecutor(2) as pool:
        askers = [pool.submit(asking, at) for at in range(2)]
        try:
            for _ in range(8):
                perturb_(model)
                weights[versions.publish()] = {name: each.clone() for name, each in model.state_dict().items()}
        finally:
            over.set()
        found = [each for asker in askers for each in asker.result()]
    assert max(loaded) <= 4  # the latest, two in use, and one that is being loaded
    assert len({name for name, _, _ in found}) > 2
    for name, prompt, answer in found:
        model.load_state_dict(weights[name])
        assert torch.allclose(scores(model, prompt, answer), torch.tensor(answer.logprobs), atol=1e-3)
    for name in versions.loaded:
        server.unload(name)


def test_grpo_draws_from_the_engine(folder: Path, url: str, tmp_path: Path) -> None:
    """At another temperature too, the trainer's own probabilities are the engine's at each step."""
    model = wrapped(folder)
    draw = rollout(model, url, folder=tmp_path / "versions")
    ratios: list[float] = []

    def watched(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        found = draw(prompts, trainer)
        for prompt, tokens, logprobs in zip(*found.values(), strict=True):
            own = LocalModel(model, [[*prompt, *tokens]], len(prompt)).scores(trainer.args.temperature)
            ratios.append(float((own - torch.tensor(logprobs)).exp().mean()))
        return found

    def reward(completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
        return [float(sum(ids)) for ids in completion_ids]

    args = GRPOConfig(
        str(tmp_path / "out"), per_device_train_batch_size=4, num_generations=2, max_completion_length=6, max_steps=3,
        learning_rate=1e-2, beta=0.0, temperature=0.7, bf16=False, report_to="none", use_cpu=True, save_strategy="no",
    )  # fmt: skip
    trainer = GRPOTrainer(
        model,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["the film was", "a plot"] * 8}),
        processing_class=AutoTokenizer.from_pretrained(folder),
        rollout_func=watched,
    )
    tunerkit.attach(model, trainer)
    trainer.train()
    assert len(ratios) == 12
    assert ratios == pytest.approx([1] * 12, abs=1e-3)
    for name in draw.publisher.loaded:
        draw.publisher.server.unload(name)


def test_what_the_engine_refuses_has_advice(folder: Path, url: str, tmp_path: Path) -> None:
    """In its own words of this version."""
    with pytest.raises(PublishError, match=r"larger --max-lora-rank"):
        publisher(wrapped(folder), url, rank=16, folder=tmp_path).publish()
    with pytest.raises(PublishError, match=r"same folder under the same path"):
        VllmServer(url=url).load("elsewhere", tmp_path / "elsewhere")
    with pytest.raises(PublishError, match=r"has no 'gone'; was it restarted"):
        VllmServer(url=url).sample("gone", [([5], Sampling(max_tokens=1))])
    with pytest.raises(PublishError, match=r"larger --max-model-len"):
        VllmServer(url=url).sample(str(folder), [([5] * 70, Sampling(max_tokens=1))])


def test_an_engine_in_this_process_does_the_same(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions, answers, the check, and what it refuses."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    from vllm import LLM

    llm = LLM(
        model=str(folder), dtype="float32", enforce_eager=True, max_model_len=64, enable_lora=True, max_lora_rank=8,
        max_loras=3, logprobs_mode="processed_logprobs",
    )  # fmt: skip
    server: Server = VllmInProcess(llm)
    model = adapted("adalora", folder, tmp_path)
    versions = publisher(model, server, keep=1, folder=tmp_path)
    first = versions.publish()
    found = check_rollout(
        model, server, version=first, tokenizer=AutoTokenizer.from_pretrained(folder), folder=tmp_path
    )
    assert (found.cause, found.greedy) == (None, (8,) * 12)
    assert found.largest < 1e-3
    perturb_(model)
    second = versions.publish()
    assert server.listed().adapters == {second} != {first}
    assert check_rollout(model, VllmInProcess(llm), folder=tmp_path).cause is None  # versions of another object
    with pytest.raises(PublishError, match=f"vLLM has no '{first}'; it has .*, {second}"):
        server.sample(first, [([5], Sampling(max_tokens=1))])
    with pytest.raises(PublishError, match=r"vLLM did not load .* rank"):
        publisher(model, server, rank=16, folder=tmp_path).publish()
    with pytest.raises(PublishError, match="top_p must be in"):
        server.sample(second, [([5], Sampling(max_tokens=1, top_p=7.0))])
    assert json.loads((tmp_path / second / "adapter_config.json").read_text())["r"] == 8
