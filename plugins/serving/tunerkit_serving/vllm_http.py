"""A running vLLM, over its HTTP API."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import attrs

from tunerkit.errors import shown
from tunerkit_serving.findings import Engine
from tunerkit_serving.http_server import NO_ROUTE, HttpServer, words_of
from tunerkit_serving.server import Answer, Draw, PublishError, Sampling
from tunerkit_serving.vllm import ENGINE

_START: Final = "Start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"


@attrs.frozen(kw_only=True)
class VllmServer(HttpServer):
    """A running vLLM. See `HttpServer` for the attributes."""

    engine: ClassVar = "vLLM"
    key_variable: ClassVar = "VLLM_API_KEY"  # vLLM's own name for it
    start: ClassVar = _START
    lost: ClassVar = "does not exist"
    advice: ClassVar = (
        (
            r"max_lora_rank|rank.*(greater|exceed|larger)",
            "Start the server with a larger --max-lora-rank, or publish with a smaller rank",
        ),
        (
            r"max_loras|max_cpu_loras|lora slot",
            "Start the server with --max-loras of one more than keep (and --max-cpu-loras no less), or lower keep",
        ),
        (
            r"max_model_len|maximum context length",
            "Start the server with a larger --max-model-len, or ask for shorter answers",
        ),
        (r"lora.*(not enabled|disabled)|enable.lora", _START),
        (
            r"no adapter found|no such file|not exist|not found",
            "The server must see the same folder under the same path: pass folder=, a place that both can read",
        ),
    )

    @property
    def rules(self) -> Engine:
        """See `Server`."""
        return ENGINE

    def load(self, name: str, folder: Path) -> None:
        """See `Server`."""
        status, text = self.ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        # Names are by content, so what is loaded under the name is this adapter.
        if status != 200 and not re.search(r"already (been )?loaded", text):
            raise self.refusal(f"load {name} from {folder}", status, text)

    def unload(self, name: str) -> None:
        """See `Server`."""
        status, text = self.ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        if status != 200 and (status != 404 or words_of(text) in NO_ROUTE):
            raise self.refusal(f"unload {name}", status, text)

    def sample(self, model: str, draws: Sequence[Draw]) -> Sequence[Sequence[Answer]]:
        """See `Server`. Log-probabilities are those of drawn tokens.

        vLLM computes those of a prompt's tokens (``echo``) without the adapter of the head, and on a CPU a batch with
        an adapter breaks the engine (0.32).
        """
        return self.at_once(lambda draw: self._drawn(model, *draw), draws)

    def chat_prompt(self, model: str, messages: Sequence[Mapping[str, Any]]) -> Sequence[int]:
        """See `Server`."""
        body = {"model": model, "messages": list(messages), "max_tokens": 1, "return_token_ids": True}
        answer = self.answer("POST", "/v1/chat/completions", body, model=model)
        try:
            return [int(each) for each in answer["prompt_token_ids"]]
        except (LookupError, TypeError, ValueError) as problem:
            raise PublishError(
                f"{self.url}: expected prompt_token_ids from /v1/chat/completions for {model}, got {shown(answer)}"
            ) from problem

    def _drawn(self, model: str, prompt: Sequence[int], sampling: Sampling) -> list[Answer]:
        fields = attrs.asdict(sampling, filter=attrs.filters.exclude("stop", "more"))
        body = {
            **fields,
            **{"model": model, "prompt": list(prompt), "stop_token_ids": list(sampling.stop), "logprobs": 0},
            **{"return_token_ids": True, **sampling.more},
        }
        answer = self.answer("POST", "/v1/completions", body, model=model, within=self.sampling_timeout)
        try:
            choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
            return [
                Answer([int(t) for t in each["token_ids"]], [float(p) for p in each["logprobs"]["token_logprobs"]])
                for each in choices
            ]
        except (LookupError, TypeError, ValueError) as problem:
            raise PublishError(
                f"{self.url}: expected token_ids and log-probabilities from /v1/completions for {model}, got "
                f"{shown(answer)}; vLLM returns token ids since 0.10.2"
            ) from problem
