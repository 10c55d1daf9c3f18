"""Answers for TRL's GRPO from a running engine, drawn by the adapter as it is at each step."""

import itertools
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import attrs
import torch

import tunerkit
from tunerkit.errors import TunerkitError, shown, warn
from tunerkit.plugin.trainers import adds_nothing
from tunerkit_serving.local_scores import LocalModel
from tunerkit_serving.publishing import Publisher, publisher
from tunerkit_serving.server import PROBE, Answer, PublishError, Sampling, Server, ServerGone

if TYPE_CHECKING:
    from torch import nn

_MADE_FOR: Final = "rollout is made for GRPOTrainer of TRL 1.16, which calls rollout_func(prompts, trainer)"
# GRPO's settings by their names here.
_SETTINGS: Final = {
    "max_tokens": "max_completion_length",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
}
_NEARER: Final = 4  # times must log-probabilities be nearer to those at one temperature than at another
_TOLD: Final = 1e-3  # the least mean difference that is more than rounding


class RolloutError(TunerkitError):
    """A trainer's answers cannot come from the engine."""


def rollout(
    model: "nn.Module",
    to: str | Server,
    *,
    patience: float = 0.0,
    **publishing: Any,
) -> "Rollout":
    """Return a ``rollout_func`` for TRL's GRPOTrainer, whose answers come from a running vLLM or SGLang.

    The adapter as it is at each call is published, see `tunerkit_serving.publisher`; the same content is not loaded
    again. Answers are asked for under that version's name, so none comes from an older one::

        trainer = GRPOTrainer(
            model, reward_funcs=score, args=args, train_dataset=rows, rollout_func=rollout(model, "http://localhost:8000")
        )
        tunerkit.attach(model, trainer)

    Prompts become token ids by the trainer's own tokenizer and chat template. The seed of a draw is made of the
    trainer's seed, its step and the prompt's place, so a resumed run asks for the same draws. Start the server with
    ``--logprobs-mode processed_logprobs`` if the trainer's temperature is not 1.

    Args:
        model: The wrapped model that the trainer trains.
        to: The server's URL, or a `tunerkit_serving.Server`, as `tunerkit_serving.publisher` takes it.
        patience: Seconds to wait for a server that does not answer, or was restarted, before the training stops. The
            version is then published again.
        **publishing: Arguments of `tunerkit_serving.publisher`, such as ``keep``, ``rank``, ``folder`` or ``key``.

    Returns:
        The function. Nothing is published before TRL calls it.

    Raises:
        PublishError: An argument is invalid.
        AdapterError: The model has no such adapter, or several and none is named.
    """
    if not patience >= 0:
        raise PublishError(f"patience: expected >= 0 seconds, got {shown(patience)}")
    tuner = tunerkit.tuner(model, publishing.get("adapter"))
    return Rollout(tuner.model, tuner.name, publisher(model, to, **publishing), patience)


@attrs.define(eq=False)
class Rollout:
    """Draws answers for a trainer. Built by `rollout`.

    Attributes:
        model: The wrapped model.
        adapter: The adapter's name.
        publisher: What loads its versions.
        patience: Seconds to wait for a server that is gone.
        last: The latest prompts with their answers, for a look at what was drawn.
    """

    model: "nn.Module"
    adapter: str
    publisher: Publisher
    patience: float
    last: Sequence[tuple[Sequence[int], Answer]] = attrs.field(factory=tuple, init=False, repr=False)
    _step: int | None = attrs.field(default=None, init=False)  # of the latest call
    _calls: int = attrs.field(default=0, init=False)  # at that step
    _is_checked: bool = attrs.field(default=False, init=False)
    _pause: float = attrs.field(default=2.0, init=False)  # seconds between looks at a server that is gone

    def __call__(self, prompts: Sequence[Any], trainer: Any, *more: Any, **fields: Any) -> dict[str, Any]:
        """Draw an answer to each prompt. Called by TRL.

        Args:
            prompts: Texts or lists of messages, each as often as answers to it are wanted.
            trainer: The trainer.
            *more: Nothing, with the TRL that this is made for.
            **fields: Nothing, likewise.

        Returns:
            ``prompt_ids``, ``completion_ids`` and the engine's ``logprobs`` of the completions, a list for each prompt.

        Raises:
            PublishError: The version cannot be published, or the server does not answer.
            RolloutError: The trainer is not one that this is made for, or trains another model.
        """
        if more or fields:
            raise RolloutError(f"{_MADE_FOR}; got {len(more)} more arguments and {sorted(fields)}. Use that TRL")
        try:
            rows, sampling = _token_ids(prompts, trainer), _sampling(trainer)
            seed, step = trainer.args.seed, int(trainer.state.global_step)
        except AttributeError as problem:
            raise RolloutError(f"{_MADE_FOR}; {problem}. Use that TRL") from problem
        self._refuse_other(trainer)
        groups = [(row, len(list(same))) for row, same in itertools.groupby(rows)]
        calls = 0 if step != self._step else self._calls
        draws = [
            (row, attrs.evolve(sampling, n=count, seed=random.Random(f"{seed} {step} {calls} {at}").getrandbits(31)))
            for at, (row, count) in enumerate(groups)
        ]
        answers = self._drawn(draws)
        self._step, self._calls = step, calls + 1
        self.last = list(zip(rows, answers, strict=True))
        return {
            "prompt_ids": rows,
            "completion_ids": [list(each.tokens) for each in answers],
            "logprobs": [list(each.logprobs) for each in answers],
        }

    def _refuse_other(self, trainer: Any) -> None:
        """Raise `RolloutError` if the trainer trains another model, or in several processes."""
        found = tunerkit.adapters(trainer.accelerator.unwrap_model(trainer.model))
        if all(tuner.model is not self.model for tuner in found.values()):
            raise RolloutError(
                "the trainer trains another model than the one whose adapter is published: pass rollout(model, ...) of "
                "the trainer's own model"
            )
        if trainer.accelerator.num_processes > 1:
            raise RolloutError(
                f"this training runs on {trainer.accelerator.num_processes} processes, and rollout is for one: train "
                "on one, or leave rollout_func out"
            )

    def _drawn(self, draws: Sequence[tuple[Sequence[int], Sampling]]) -> list[Answer]:
        """Publish and draw; wait for a server that is gone, which may come back without the version."""
        end, is_gone = time.monotonic() + self.patience, False
        while True:
            try:
                with self._published() as name:
                    self._check_temperature(name, draws[0][1])
                    return [each for answers in self.publisher.server.sample(name, draws) for each in answers]
            except ServerGone as problem:
                if time.monotonic() >= end:
                    raise
                if not is_gone:
                    warn(f"waiting for the server, up to {self.patience:g} s: {problem}")
                is_gone = True
            time.sleep(self._pause)

    @contextmanager
    def _published(self) -> Iterator[str]:
        """The name of the adapter as it is, loaded inside the block; the base's while the adapter adds nothing."""
        if adds_nothing(tunerkit.tuner(self.model, self.adapter)):
            yield self.publisher.server.listed().base
            return
        with self.publisher.using(self.publisher.publish()) as name:
            yield name

    def _check_temperature(self, name: str, sampling: Sampling) -> None:
        """Refuse log-probabilities at temperature 1 where the trainer's are at another one."""
        if self._is_checked or sampling.temperature == 1:
            return
        drawing = attrs.evolve(sampling, n=1, max_tokens=8)
        ((drawn,),) = self.publisher.server.sample(name, [(PROBE, drawing)])
        own = LocalModel(self.model, [[*PROBE, *drawn.tokens]], len(PROBE))
        found, warm, plain = torch.tensor(drawn.logprobs), own.scores(sampling.temperature), own.scores()
        from_warm, from_plain = (float((found - each).abs().mean()) for each in (warm, plain))
        if max(from_warm, from_plain) < _TOLD:  # likely tokens' log-probabilities are near 0 at any temperature
            return
        if _NEARER * from_plain < from_warm:
            raise PublishError(
                f"the server returns log-probabilities at temperature 1, the trainer has {sampling.temperature:g}. "
                "Start vLLM with --logprobs-mode processed_logprobs, SGLang without SGLANG_RETURN_ORIGINAL_LOGPROB, or "
                "train at temperature 1"
            )
        self._is_checked = _NEARER * from_warm < from_plain


def _sampling(trainer: Any) -> Sampling:
    """How TRL's trainer draws."""
    values = {name: getattr(trainer.args, own) for name, own in _SETTINGS.items()}
    values = {name: value for name, value in values.items() if value is not None}
    return Sampling(**values, stop=tuple(trainer.eos_token_ids), more=trainer.args.generation_kwargs or {})


def _token_ids(prompts: Sequence[Any], trainer: Any) -> list[list[int]]:
    """Prompts as TRL makes token ids of them."""
    if trainer.environment_factories is not None:
        raise RolloutError(
            "rollout does not draw for environments, whose tools differ for each prompt: leave environment_factory out"
        )
    tokenizer = trainer.processing_class
    if isinstance(prompts[0], str):
        return [list(row) for row in tokenizer(text=list(prompts))["input_ids"]]
    if any(_has_images(message) for prompt in prompts for message in prompt):
        raise RolloutError("rollout sends token ids alone, and the prompts have images: leave rollout_func out")
    found = tokenizer.apply_chat_template(
        conversation=list(prompts),
        tools=trainer.tools or None,  # some templates write an empty list of tools
        chat_template=trainer.chat_template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **trainer.chat_template_kwargs,
    )
    return [list(row) for row in found["input_ids"]]


def _has_images(message: Mapping[str, Any]) -> bool:
    parts = message["content"]
    return isinstance(parts, list) and any(part.get("type") != "text" for part in parts)
