"""A vLLM in this process, without a server."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tunerkit.errors import cut
from tunerkit_serving.findings import Engine
from tunerkit_serving.server import Answer, Draw, Listing, PublishError, Sampling, ServerGone
from tunerkit_serving.vllm import ENGINE

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest


@attrs.frozen(eq=False)
class VllmInProcess:
    """A `vllm.LLM` in this process, for `publisher`, `rollout` and `check_rollout`.

    You build it, with ``enable_lora=True``, ``max_lora_rank`` and ``max_loras`` of keep + 1. It is for one thread.

    Attributes:
        llm: The engine.
    """

    llm: "LLM"
    _loaded: "dict[str, LoRARequest]" = attrs.field(factory=dict, init=False, repr=False)

    @property
    def rules(self) -> Engine:
        """See `Server`."""
        return ENGINE

    def listed(self) -> Listing:
        """See `Server`."""
        with _refused("list its adapters"):
            there = self.llm.llm_engine.list_loras()
        names = frozenset(name for name, request in self._loaded.items() if request.lora_int_id in there)
        return Listing(str(self.llm.model_config.model), names)

    def load(self, name: str, folder: Path) -> None:
        """See `Server`."""
        from vllm.lora.request import LoRARequest

        request = self._loaded.get(name) or LoRARequest(name, _number(name), str(folder))
        with _refused(f"load {name} from {folder}"):
            self.llm.llm_engine.add_lora(request)
        self._loaded[name] = request

    def unload(self, name: str) -> None:
        """See `Server`."""
        request = self._loaded.pop(name, None)
        if request is not None:
            with _refused(f"unload {name}"):
                self.llm.llm_engine.remove_lora(request.lora_int_id)

    def sample(self, model: str, draws: Sequence[Draw]) -> Sequence[Sequence[Answer]]:
        """See `Server`."""
        from vllm import TokensPrompt

        base = str(self.llm.model_config.model)
        if model != base and model not in self._loaded:
            raise ServerGone(f"vLLM has no {model!r}; it has {', '.join((base, *self._loaded))}")
        with _refused(f"draw answers by {model}"):
            found = self.llm.generate(
                [TokensPrompt(prompt_token_ids=list(prompt)) for prompt, _ in draws],
                [_params(sampling) for _, sampling in draws],
                use_tqdm=False,
                lora_request=self._loaded.get(model),
            )
        return [
            [
                Answer(
                    list(each.token_ids),
                    [scores[token].logprob for token, scores in zip(each.token_ids, each.logprobs, strict=True)],
                )
                for each in one.outputs
            ]
            for one in found
        ]

    def chat_prompt(self, model: str, messages: Sequence[Mapping[str, Any]]) -> Sequence[int]:
        """See `Server`."""
        with _refused("apply its chat template"):
            found = self.llm.get_tokenizer().apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True, return_dict=True
            )
        return list(found["input_ids"])


def _params(sampling: Sampling) -> Any:
    from vllm import SamplingParams

    fields = attrs.asdict(sampling, filter=attrs.filters.exclude("stop", "more"))
    return SamplingParams(**{**fields, "stop_token_ids": list(sampling.stop), **sampling.more, "logprobs": 0})


def _number(name: str) -> int:
    """Return vLLM's number for an adapter, made of its name: other adapters in the engine have others."""
    return int.from_bytes(sha256(name.encode()).digest()[:4]) >> 1 or 1


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """Give vLLM's error in our class: its workers' errors come back as plain exceptions of any class."""
    try:
        yield
    except Exception as problem:
        raise PublishError(f"vLLM did not {what}: {cut(' '.join(str(problem).split()), 400)}") from problem
