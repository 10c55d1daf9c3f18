"""SGLang's routes and words, as the source of 0.5.23 has them; SGLang itself was not run."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

pytest.importorskip("tunerkit_peft", reason="the format comes with it")
pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, AutoTokenizer

from plugins.serving.tests.planted import wrapped
from plugins.serving.tests.stub_vllm import BASE, StubVllm, perturb_, running
from tunerkit_serving import (
    Publisher,
    PublishError,
    Sampling,
    ServerGone,
    SglangServer,
    check_rollout,
    publisher,
    rollout,
)

TAKEN = {"max_new_tokens", "stop_token_ids", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
TAKEN |= {"sampling_seed", "ignore_eos"}


class StubSglang(StubVllm):
    """Says what SGLang says. Seeds do not count, as without ``--enable-deterministic-inference``."""

    def answer(self, verb: str, route: str, body: dict[str, Any]) -> tuple[int, Any]:
        if route == "/generate":
            return self._generated(body)
        if route == "/load_lora_adapter":
            return self._updated(body["lora_name"], *super().answer(verb, f"/v1{route}", body))
        if route == "/unload_lora_adapter":
            return self._updated(body["lora_name"], *super().answer(verb, f"/v1{route}", body), "does not exist")
        status, found = super().answer(verb, route, body)
        if route == "/v1/chat/completions":
            return status, {"choices": [{"index": 0, "prompt_token_ids": found["prompt_token_ids"]}]}
        return (404, {"detail": "Not Found"}) if "/v1/" in route and "models" not in route else (status, found)

    def _updated(self, name: str, status: int, answer: Any, says: str = "is already loaded") -> tuple[int, Any]:
        if status == 200:
            return 200, {"success": True, "error_message": None, "loaded_adapters": self.paths}
        words = answer["error"]["message"]
        if "greater than" in words:
            words = f"LoRA adapter {name} is incompatible: is its rank within the configured `--max-lora-rank`?"
        elif says == "does not exist" or "already" in words:
            words = f"LoRA with name {name} {says}"
        return 400, {"success": False, "error_message": words}

    def _generated(self, body: dict[str, Any]) -> tuple[int, Any]:
        assert body["return_logprob"]
        assert set(body) <= {"input_ids", "sampling_params", "return_logprob", "lora_path"}
        found = []
        for at, (prompt, given) in enumerate(zip(body["input_ids"], body["sampling_params"], strict=True)):
            assert set(given) <= TAKEN  # it refuses others
            name = body.get("lora_path", BASE)
            asked = {"model": name, "prompt": prompt, "n": 1, "seed": len(self.asked) * 1000 + at}
            asked |= {each: given[each] for each in ("temperature", "stop_token_ids")}
            asked["max_tokens"] = given["max_new_tokens"]
            status, answer = super().answer("POST", "/v1/completions", asked)
            if status != 200:
                return 400, {"error": {"message": f"Got LoRA adapter that has never been loaded: {name}"}}
            tokens, scores = answer["choices"][0]["token_ids"], answer["choices"][0]["logprobs"]["token_logprobs"]
            rows = [[score, token, None] for score, token in zip(scores, tokens, strict=True)]
            found.append({"text": "", "output_ids": tokens, "meta_info": {"output_token_logprobs": rows}})
        return 200, found


@pytest.fixture
def sglang(folder: Path) -> Iterator[StubSglang]:
    """A server that computes with a small decoder."""
    stub = StubSglang()
    with running(stub):
        stub.processed = True
        stub.serve(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
        yield stub


@pytest.fixture
def model(folder: Path) -> nn.Module:
    return wrapped(folder)


def to(stub: StubSglang) -> SglangServer:
    return SglangServer(url=stub.url, waits=())


def publishing(model: Any, stub: StubSglang, place: Path, **settings: Any) -> Publisher:
    return publisher(model, f"sglang+{stub.url}/v1", folder=place, **settings)


def test_versions_are_loaded_and_the_oldest_leaves(model: nn.Module, sglang: StubSglang, tmp_path: Path) -> None:
    """By the address alone; the key is SGLang's. A name that is loaded, or is not any more, is no error."""
    publish = publishing(model, sglang, tmp_path, keep=1)
    first = publish.publish()
    perturb_(model)
    second = publish.publish()
    assert (tuple(sglang.adapters), publish.loaded) == ((second,), (second,))
    to(sglang).load(second, tmp_path / second)
    to(sglang).unload(first)
    assert tuple(sglang.adapters) == (second,)


def test_answers_have_a_seed_each(model: nn.Module, sglang: StubSglang, tmp_path: Path) -> None:
    """With SGLang's own ``n`` all of a prompt's would have one."""
    name = publishing(model, sglang, tmp_path).publish()
    ((first, second),) = to(sglang).sample(name, [([1, 2], Sampling(max_tokens=4, n=2, seed=7, stop=(1,)))])
    assert '"n"' not in sglang.asked[-1]
    assert '"top_k": -1' in sglang.asked[-1]
    assert '"sampling_seed": 7' in sglang.asked[-1]
    assert '"sampling_seed": 8' in sglang.asked[-1]
    assert all(len(each.tokens) == len(each.logprobs) for each in (first, second))


def test_answers_without_a_seed_differ(model: nn.Module, sglang: StubSglang, tmp_path: Path) -> None:
    """SGLang's own seed is the same for all."""
    name = publishing(model, sglang, tmp_path).publish()
    to(sglang).sample(name, [([1, 2], Sampling(max_tokens=4, n=2))])
    params = json.loads(sglang.asked[-1].split(" ", 2)[2])["sampling_params"]
    assert params[0]["sampling_seed"] != params[1]["sampling_seed"]


def test_a_check_finds_nothing_and_names_a_fault(model: nn.Module, sglang: StubSglang, folder: Path) -> None:
    """Its draws, its chat template and its log-probabilities are read rightly."""
    place, tokenizer = folder.parent / "sglang", AutoTokenizer.from_pretrained(folder)
    found = check_rollout(model, to(sglang), tokenizer=tokenizer, folder=place)
    assert (found.cause, found.template_at) == (None, None)
    assert found.largest < 1e-3
    sglang.ignores = True
    cause = check_rollout(model, to(sglang), folder=place).cause
    assert cause is not None
    assert "the adapter is not loaded" in cause


def test_an_adapter_that_it_ignores_is_found_without_seeds(model: Any, sglang: StubSglang, tmp_path: Path) -> None:
    """The likeliest tokens are the same at each draw."""
    sglang.ignores = True
    with pytest.raises(PublishError, match="exactly as the base"):
        publishing(model, sglang, tmp_path).publish()


def test_what_it_refuses_is_quoted_with_advice(
    model: Any, sglang: StubSglang, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its own words, wherever they are in its answer."""
    sglang.max_rank = 4
    with pytest.raises(PublishError, match=r"the configured `--max-lora-rank`.*--lora-target-modules all and a larger"):
        publishing(model, sglang, tmp_path).publish()
    with pytest.raises(ServerGone, match="the server has no 'gone'"):
        to(sglang).sample("gone", [([1], Sampling(max_tokens=1))])
    sglang.key = "secret"
    with pytest.raises(PublishError, match="SGLANG_API_KEY"):
        publishing(model, sglang, tmp_path).publish()
    sglang.max_rank = 8
    monkeypatch.setenv("SGLANG_API_KEY", "secret")
    assert publishing(model, sglang, tmp_path).publish() in sglang.adapters


def test_vllm_at_the_address_is_named(model: Any, stub: StubVllm, tmp_path: Path) -> None:
    """It has no such routes."""
    with pytest.raises(PublishError, match="it is no SGLang"):
        publisher(model, f"sglang+{stub.url}", folder=tmp_path).publish()


def test_rollout_takes_the_address(model: Any, sglang: StubSglang, tmp_path: Path) -> None:
    """As `publisher` does."""
    assert isinstance(rollout(model, f"sglang+{sglang.url}", folder=tmp_path).publisher.server, SglangServer)
