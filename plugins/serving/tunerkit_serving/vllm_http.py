"""A running vLLM, over its HTTP API."""

import json
import re
import time
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import urlsplit
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, Request

import attrs

from tunerkit.errors import cut, shown
from tunerkit_serving.findings import Engine
from tunerkit_serving.server import Answer, Listing, PublishError, Sampling, ServerGone
from tunerkit_serving.vllm import ENGINE

_LARGEST: Final = 10_000_000  # bytes of an answer
_WORDS: Final = 400  # characters of the server's own words in a message
_NO_ROUTE: Final = ("Not Found", "Method Not Allowed")  # FastAPI's own words, without a message of vLLM
_START: Final = "Start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
# What vLLM's words mean for whoever publishes. The first that matches counts.
_ADVICE: Final = (
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


@attrs.frozen(kw_only=True)
class VllmServer:
    """A running vLLM.

    Attributes:
        url: Where it listens, such as ``"http://host:8000"``.
        key: What it was given as ``--api-key``.
        timeout: Seconds for one answer, but for `sample`.
        sampling_timeout: Seconds for the answers to one prompt.
        waits: Seconds before each further try after a refused or broken connection.
    """

    url: str
    key: str | None = attrs.field(default=None, repr=False)
    timeout: float = 60.0
    sampling_timeout: float = 600.0
    waits: tuple[float, ...] = (0.5, 2.0)

    @classmethod
    def at(cls, url: str, key: str | None = None) -> Self:
        """Return the server at a URL; ``/v1`` at its end is left out.

        Raises:
            PublishError: It is no URL of HTTP.
        """
        try:
            parts = urlsplit(url)
            is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_url = False
        if not is_url:
            raise PublishError(f"expected a URL such as http://host:8000, got {shown(url)}")
        return cls(url=url.rstrip("/").removesuffix("/v1"), key=key)

    @property
    def rules(self) -> Engine:
        """See `Server`."""
        return ENGINE

    def listed(self) -> Listing:
        """See `Server`."""
        answer = self._answer("GET", "/v1/models")
        entries = answer.get("data")
        models = [each for each in entries if isinstance(each, dict)] if isinstance(entries, list) else []
        bases = [str(each.get("id")) for each in models if not each.get("parent")]
        if not bases:
            raise PublishError(f"{self.url}: expected a list with the base model from /v1/models, got {shown(answer)}")
        return Listing(bases[0], frozenset(str(each.get("id")) for each in models if each.get("parent")))

    def load(self, name: str, folder: Path) -> None:
        """See `Server`."""
        status, text = self._ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        # Names are by content, so what is loaded under the name is this adapter.
        if status != 200 and not re.search(r"already (been )?loaded", text):
            raise self._refusal(f"load {name} from {folder}", status, text)

    def unload(self, name: str) -> None:
        """See `Server`."""
        status, text = self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        if status != 200 and (status != 404 or _words(text) in _NO_ROUTE):
            raise self._refusal(f"unload {name}", status, text)

    def logprobs(self, model: str, tokens: Sequence[int]) -> Sequence[float]:
        """See `Server`."""
        body = {"model": model, "prompt": list(tokens), "max_tokens": 1, "temperature": 0, "logprobs": 0, "echo": True}
        answer = self._answer("POST", "/v1/completions", body)
        try:
            return [float(each) for each in answer["choices"][0]["logprobs"]["token_logprobs"][1 : len(tokens)]]
        except (LookupError, TypeError, ValueError) as problem:
            raise PublishError(
                f"{self.url}: expected log-probabilities from /v1/completions for {model}, got {shown(answer)}; pass "
                "probe=False to publish without a probe"
            ) from problem

    def sample(self, model: str, prompt: Sequence[int], sampling: Sampling) -> Sequence[Answer]:
        """See `Server`."""
        fields = attrs.asdict(sampling, filter=attrs.filters.exclude("stop", "more"))
        body = {
            **fields,
            **{"model": model, "prompt": list(prompt), "stop_token_ids": list(sampling.stop), "logprobs": 0},
            **{"return_token_ids": True, **sampling.more},
        }
        answer = self._answer("POST", "/v1/completions", body, within=self.sampling_timeout)
        try:
            choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
            found = [
                Answer([int(t) for t in each["token_ids"]], [float(p) for p in each["logprobs"]["token_logprobs"]])
                for each in choices
            ]
        except (LookupError, TypeError, ValueError) as problem:
            raise PublishError(
                f"{self.url}: expected token_ids and log-probabilities from /v1/completions for {model}, got "
                f"{shown(answer)}; vLLM returns token ids since 0.10.2"
            ) from problem
        if len(found) != sampling.n or any(len(each.tokens) != len(each.logprobs) for each in found):
            raise PublishError(
                f"{self.url}: expected {sampling.n} answers with a log-probability for each token, got {shown(answer)}"
            )
        return found

    def chat_prompt(self, model: str, messages: Sequence[Mapping[str, Any]]) -> Sequence[int]:
        """See `Server`."""
        body = {"model": model, "messages": list(messages), "max_tokens": 1, "return_token_ids": True}
        answer = self._answer("POST", "/v1/chat/completions", body)
        try:
            return [int(each) for each in answer["prompt_token_ids"]]
        except (LookupError, TypeError, ValueError) as problem:
            raise PublishError(
                f"{self.url}: expected prompt_token_ids from /v1/chat/completions for {model}, got {shown(answer)}"
            ) from problem

    def _answer(
        self, verb: str, route: str, body: Mapping[str, Any] | None = None, within: float | None = None
    ) -> dict[str, Any]:
        status, text = self._ask(verb, route, body, within)
        if status == 404 and "does not exist" in text and body is not None:
            raise ServerGone(f"{self.url}: the server has no {body['model']!r}; was it restarted? {_words(text)!r}")
        if status != 200:
            raise self._refusal(f"answer {route}", status, text)
        try:
            answer = json.loads(text)
        except ValueError:
            answer = text
        if not isinstance(answer, dict):
            raise PublishError(f"{self.url}{route}: expected JSON as of vLLM, got {shown(text)}; is it another server?")
        return answer

    def _ask(
        self, verb: str, route: str, body: Mapping[str, Any] | None = None, within: float | None = None
    ) -> tuple[int, str]:
        """Return the status and the text. Only connections are tried again: what timed out may still be at work."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        request = Request(self.url + route, data, headers, method=verb)
        waits, within = iter(self.waits), within or self.timeout
        while True:
            try:
                with _opener().open(request, timeout=within) as answer:
                    return answer.status, answer.read(_LARGEST).decode("utf-8", "replace")
            except (OSError, HTTPException) as problem:
                reason = getattr(problem, "reason", problem)  # urllib's own error has the cause in it
                if isinstance(reason, TimeoutError):
                    raise PublishError(
                        f"{self.url}{route}: no answer within {within:g} s; is the server overloaded?"
                    ) from problem
                wait = next(waits, None)
                if wait is None:
                    raise ServerGone(
                        f"{self.url}{route}: no connection ({reason}), tried {len(self.waits) + 1} times; is the "
                        "server running there?"
                    ) from problem
            time.sleep(wait)

    def _refusal(self, what: str, status: int, text: str) -> PublishError:
        words = _words(text)
        if status in (401, 403):
            advice = "Set VLLM_API_KEY, or pass key=, to what the server has as --api-key"
        elif status in (404, 405) and words in _NO_ROUTE:
            advice = f"It has no such route: it is no vLLM, or does not load adapters while it runs. {_START}"
        else:
            advice = next(
                (advice for pattern, advice in _ADVICE if re.search(pattern, words, re.IGNORECASE)),
                "The server's log has the details",
            )
        return PublishError(f"{self.url}: the server did not {what}: status {status}, {words!r}. {advice}")


def _opener() -> OpenerDirector:
    """Neither proxies, which engines are not behind, nor redirects; and each status is an answer."""
    opener = OpenerDirector()
    for handler in (HTTPHandler(), HTTPSHandler()):
        opener.add_handler(handler)
    return opener


def _words(text: str) -> str:
    """The message in an answer of vLLM, of any version, or of FastAPI."""
    try:
        found = json.loads(text)
        found = found.get("error", found) if isinstance(found, dict) else found
        found = (found.get("message") or found.get("detail") or text) if isinstance(found, dict) else found
    except ValueError:
        found = text
    return cut(" ".join(str(found).split()), _WORDS)
