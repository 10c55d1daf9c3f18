"""A running SGLang, over its HTTP API."""

import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import attrs

from tunerkit.errors import shown
from tunerkit_serving.findings import Engine
from tunerkit_serving.http_server import HttpServer
from tunerkit_serving.server import Answer, Draw, PublishError, Sampling
from tunerkit_serving.sglang import ENGINE

_START: Final = "Start it with --enable-lora, --max-lora-rank and --lora-target-modules all"


@attrs.frozen(kw_only=True)
class SglangServer(HttpServer):
    """A running SGLang, by the source of 0.5.23; it has not been run. See `HttpServer` for the attributes.

    One that was started with ``--api-key`` and ``--admin-api-key`` loads adapters by the second alone, and answers by
    the first: leave one of them out.
    """

    engine: ClassVar = "SGLang"
    key_variable: ClassVar = "SGLANG_API_KEY"  # our name: SGLang reads no variable
    start: ClassVar = _START
    lost: ClassVar = "has never been loaded"
    advice: ClassVar = (
        (
            r"max-lora-rank|lora-target-modules|target modules",
            "Start the server with --lora-target-modules all and a larger --max-lora-rank, or publish with a smaller "
            "rank",
        ),
        (r"lora is not enabled", _START),
        (r"internal server error", "SGLang with --dp-size above 1 loads none; its log has the details"),
        (r"context length", "Start the server with a larger --context-length"),
        (
            r"no such file|not exist|not found|repo id",
            "The server must see the same folder under the same path: pass folder=, a place that both can read",
        ),
    )

    @property
    def rules(self) -> Engine:
        """See `Server`."""
        return ENGINE

    def load(self, name: str, folder: Path) -> None:
        """See `Server`."""
        body = {"lora_name": name, "lora_path": str(folder)}
        status, text = self.ask("POST", "/load_lora_adapter", body, self.sampling_timeout)
        # Names are by content, so what is loaded under the name is this adapter.
        if status != 200 and "already loaded" not in text:
            raise self.refusal(f"load {name} from {folder}", status, text)

    def unload(self, name: str) -> None:
        """See `Server`. SGLang answers when the last of its requests has ended, and loads nothing until then."""
        status, text = self.ask("POST", "/unload_lora_adapter", {"lora_name": name}, self.sampling_timeout)
        if status != 200 and not re.search(rf"LoRA with name {re.escape(name)} does not exist", text):
            raise self.refusal(f"unload {name}", status, text)

    def sample(self, model: str, draws: Sequence[Draw]) -> Sequence[Sequence[Answer]]:
        """See `Server`. Log-probabilities are at the request's temperature.

        Seeds count only where the server runs with ``--enable-deterministic-inference``.
        """
        base = self.listed().base
        return self.at_once(lambda draw: self._drawn(None if model == base else model, *draw), draws)

    def chat_prompt(self, model: str, messages: Sequence[Mapping[str, Any]]) -> Sequence[int]:
        """See `Server`."""
        body = {"model": model, "messages": list(messages), "max_tokens": 1, "return_prompt_token_ids": True}
        answer = self.answer("POST", "/v1/chat/completions", body, model=model)
        try:
            return [int(each) for each in answer["choices"][0]["prompt_token_ids"]]
        except (LookupError, TypeError, ValueError) as problem:
            raise PublishError(
                f"{self.url}: expected prompt_token_ids from /v1/chat/completions for {model}, got {shown(answer)}"
            ) from problem

    def _drawn(self, adapter: str | None, prompt: Sequence[int], sampling: Sampling) -> list[Answer]:
        fields = attrs.asdict(sampling, filter=attrs.filters.exclude("max_tokens", "n", "seed", "stop", "more"))
        fields |= {"max_new_tokens": sampling.max_tokens, "stop_token_ids": list(sampling.stop), **sampling.more}
        fields["top_k"] = fields["top_k"] or -1  # all
        body: dict[str, Any] = {"input_ids": [list(prompt)] * sampling.n, "return_logprob": True}
        # One row for each answer, not n: with n all of them have one seed, and without a seed all have SGLang's own.
        seed = random.getrandbits(31) if sampling.seed is None else sampling.seed
        body["sampling_params"] = [{**fields, "sampling_seed": seed + index} for index in range(sampling.n)]
        body |= {} if adapter is None else {"lora_path": adapter}
        found = self.answer("POST", "/generate", body, model=adapter or "", within=self.sampling_timeout, kind=list)
        try:
            rows = [each["meta_info"]["output_token_logprobs"] for each in found]
            return [Answer([int(row[1]) for row in each], [float(row[0]) for row in each]) for each in rows]
        except (LookupError, TypeError, ValueError) as problem:
            raise PublishError(
                f"{self.url}: expected output_token_logprobs from /generate for {adapter or 'the base'}, got "
                f"{shown(found)}"
            ) from problem
