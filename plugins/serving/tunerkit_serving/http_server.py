"""What running engines have in common: adapters and answers over HTTP, tries again, and the reason of a refusal."""

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any, ClassVar, Final, Self
from urllib.parse import urlsplit
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, Request

import attrs

from tunerkit.errors import cut, shown
from tunerkit_serving.server import Answer, Draw, Listing, PublishError, ServerGone

_WORDS: Final = 400  # characters of the server's own words in a message
_MESSAGES: Final = ("message", "error_message", "detail")  # the keys that it may have
NO_ROUTE: Final = ("Not Found", "Method Not Allowed")  # FastAPI's own words, without a message of the engine


def _stripped(key: str | None) -> str | None:
    return None if key is None else key.strip()


@attrs.frozen(kw_only=True)
class HttpServer:
    """A running engine that answers over HTTP; one class for each engine has its routes.

    Attributes:
        url: Where it listens, such as ``"http://host:8000"``.
        key: What it was given as ``--api-key``.
        timeout: Seconds for one answer, but for `sample`.
        sampling_timeout: Seconds for the answers to one prompt.
        waits: Seconds before each further try after a refused or broken connection.
        requests: The most prompts that are asked for at once, at least 1.
        engine: The engine's name.
        key_variable: The environment's variable with the key.
        start: How it is started so that it loads adapters while it runs.
        lost: What its words look like where it has no model of a name.
        advice: What its words mean for whoever publishes. The first that matches counts.
    """

    engine: ClassVar[str]
    key_variable: ClassVar[str]
    start: ClassVar[str]
    lost: ClassVar[str]
    advice: ClassVar[Sequence[tuple[str, str]]]

    url: str
    key: str | None = attrs.field(default=None, repr=False, converter=_stripped)
    timeout: float = 60.0
    sampling_timeout: float = 600.0
    waits: tuple[float, ...] = (0.5, 2.0)
    requests: int = attrs.field(default=64)

    @requests.validator
    def _check_requests(self, attribute: object, value: int) -> None:
        if not value >= 1:
            raise PublishError(f"requests: expected >= 1, got {shown(value)}")

    @key.validator
    def _check_key(self, attribute: object, value: str | None) -> None:
        if value is not None and not (value.isascii() and value.isprintable()):
            raise PublishError("key: expected one line of ASCII, which HTTP's headers take; it is not shown here")

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

    def listed(self) -> Listing:
        """See `Server`."""
        answer = self.answer("GET", "/v1/models")
        entries = answer.get("data")
        models = [each for each in entries if isinstance(each, dict)] if isinstance(entries, list) else []
        bases = [str(each.get("id")) for each in models if not each.get("parent")]
        if not bases:
            raise PublishError(f"{self.url}: expected a list with the base model from /v1/models, got {shown(answer)}")
        return Listing(bases[0], frozenset(str(each.get("id")) for each in models if each.get("parent")))

    def at_once(self, ask: Callable[[Draw], Sequence[Answer]], draws: Sequence[Draw]) -> list[list[Answer]]:
        """Ask for each draw, several at once.

        Raises:
            PublishError: One was not answered, or not with as many answers as asked for.
        """

        def asked(draw: Draw) -> list[Answer]:
            found = list(ask(draw))
            if len(found) != draw[1].n or any(len(each.tokens) != len(each.logprobs) for each in found):
                raise PublishError(
                    f"{self.url}: expected {draw[1].n} answers with a log-probability for each token, got "
                    f"{shown(found)}"
                )
            return found

        with ThreadPoolExecutor(max(1, min(self.requests, len(draws)))) as pool:
            return list(pool.map(asked, draws))

    def answer(
        self,
        verb: str,
        route: str,
        body: Mapping[str, Any] | None = None,
        *,
        model: str = "",
        within: float = 0.0,
        kind: type = dict,
    ) -> Any:
        """Return the JSON that a route answers with.

        Args:
            verb: Of HTTP.
            route: Its path.
            body: What is sent.
            model: The model or adapter that is asked for.
            within: Seconds; 0 for `timeout`.
            kind: The class of what is expected.

        Raises:
            ServerGone: It does not answer, or does not have the model any more.
            PublishError: It refuses, or answers with something else.
        """
        status, text = self.ask(verb, route, body, within)
        if status != 200 and model and re.search(self.lost, text):
            raise ServerGone(f"{self.url}: the server has no {model!r}; was it restarted? {words_of(text)!r}")
        if status != 200:
            raise self.refusal(f"answer {route}", status, text)
        try:
            answer = json.loads(text)
        except ValueError:
            answer = text
        if not isinstance(answer, kind):
            raise PublishError(
                f"{self.url}{route}: expected JSON as of {self.engine}, got {shown(text)}; is it another server?"
            )
        return answer

    def ask(self, verb: str, route: str, body: Mapping[str, Any] | None = None, within: float = 0.0) -> tuple[int, str]:
        """Return the status and the text. Only connections are tried again: what timed out may still be at work.

        Raises:
            ServerGone: It does not answer.
            PublishError: It takes longer than ``within`` seconds; 0 for `timeout`.
        """
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        request = Request(self.url + route, data, headers, method=verb)
        waits, within = iter(self.waits), within or self.timeout
        while True:
            try:
                with _opener().open(request, timeout=within) as answer:
                    return answer.status, answer.read().decode("utf-8", "replace")
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

    def refusal(self, what: str, status: int, text: str) -> PublishError:
        """Return the error for what the server did not do, with its own words and what to do."""
        words = words_of(text)
        if status in (401, 403):
            advice = f"Set {self.key_variable}, or pass key=, to what the server has as --api-key"
        elif status in (404, 405) and words in NO_ROUTE:
            advice = (
                f"It has no such route: it is no {self.engine}, or does not load adapters while it runs. {self.start}"
            )
        else:
            advice = next(
                (advice for pattern, advice in self.advice if re.search(pattern, words, re.IGNORECASE)),
                "The server's log has the details",
            )
        return PublishError(f"{self.url}: the server did not {what}: status {status}, {words!r}. {advice}")


def words_of(text: str) -> str:
    """Return the message in an answer of an engine, of any version, or of FastAPI."""
    try:
        found = json.loads(text)
        found = found.get("error", found) if isinstance(found, dict) else found
        found = next(filter(None, map(found.get, _MESSAGES)), text) if isinstance(found, dict) else found
    except ValueError:
        found = text
    return cut(" ".join(str(found).split()), _WORDS)


def _opener() -> OpenerDirector:
    """Neither proxies, which engines are not behind, nor redirects; and each status is an answer."""
    opener = OpenerDirector()
    for handler in (HTTPHandler(), HTTPSHandler()):
        opener.add_handler(handler)
    return opener
