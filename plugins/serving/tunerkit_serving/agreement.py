"""Whether a running engine computes with an adapter what the trainer does, and what is wrong if it does not."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import attrs
import torch
from torch import Tensor

import tunerkit
from tunerkit.errors import FileError
from tunerkit_serving.adapter_folder import CONFIG, WEIGHTS, read_folder
from tunerkit_serving.local_scores import Adapter, Factors, LocalModel, factors, groups, mistakes
from tunerkit_serving.publishing import FOLDER, Export, publisher, server_at
from tunerkit_serving.server import PROBE, Sampling, Server

if TYPE_CHECKING:
    from torch import nn

_PROMPT_TOKENS: Final = 4
_ANSWERS: Final = 12
_ANSWER_TOKENS: Final = 8
_MESSAGES: Final = ({"role": "user", "content": "Is this the same conversation?"},)
# Mean absolute differences of log-probabilities: what float32 leaves, what half precision leaves, and the most that
# another dtype explains.
_FLOAT32, _HALF, _ROUNDING = 2e-3, 0.05, 0.3
_SHARE: Final = 0.2  # of a difference may be left by its cause
_ROUNDS: Final = 3  # groups of modules that may be missing together
_OLD: Final = 8  # earlier versions that are tried
_MOVED: Final = 0.5  # the mean change of log-probabilities by the perturbed adapter


@attrs.frozen(kw_only=True)
class Agreement:
    """What a comparison of trainer and engine found. Differences are absolute, of log-probabilities of tokens.

    Attributes:
        version: The name that was asked for.
        tokens: How many tokens were compared, of those that the engine drew.
        mean: The mean difference with the adapter.
        largest: The largest one.
        base: The mean difference without the adapter.
        ratio: The mean of the trainer's probability over the engine's.
        greedy: How many of the engine's likeliest tokens the model has too, up to the first that differs, in each
            answer.
        perturbed: The mean difference with a perturbed adapter.
        moved: How far the engine's log-probabilities with a perturbed adapter are from the trainer's own, in the mean.
        template_at: The first token at which the engine's chat template differs; None for nowhere, or not compared.
        cause: What is wrong, in a sentence; None if nothing is.
    """

    version: str
    tokens: int
    mean: float
    largest: float
    base: float
    ratio: float
    greedy: tuple[int, ...]
    perturbed: float
    moved: float
    template_at: int | None
    cause: str | None


def check_rollout(
    model: "nn.Module",
    to: str | Server,
    *,
    version: str | None = None,
    tokenizer: Any = None,
    messages: Sequence[Mapping[str, Any]] = _MESSAGES,
    folder: str | os.PathLike[str] | None = None,
    adapter: str | None = None,
    key: str | None = None,
) -> Agreement:
    """Compare what a model and a running engine compute with the model's adapter, and name what is wrong.

    The engine draws twelve answers with the adapter, twelve without it, and twelve with a perturbed one, which must
    change them. The model computes the log-probabilities of their tokens in the same way. Where the numbers differ,
    known mistakes are made in the model, and the one that gives the engine's numbers is the cause.

    Args:
        model: The wrapped model.
        to: The server's URL, or a `tunerkit_serving.Server`, as `tunerkit_serving.publisher` takes it. It needs room
            for two adapters more.
        version: The name of a version that the engine has, which should be the adapter as it is now; None to publish
            one for the comparison, which is unloaded afterwards.
        tokenizer: With a chat template, which is compared with the engine's; None to leave it out.
        messages: For that comparison.
        folder: Where versions are written, which the server must see under the same path, and where earlier ones are
            looked for; None for ``tunerkit-published`` here.
        adapter: The adapter's name. It may be left out if the model has only one.
        key: What the server was given as ``--api-key``; None for the environment's ``VLLM_API_KEY``, for SGLang
            ``SGLANG_API_KEY``.

    Returns:
        The figures and the cause.

    Raises:
        PublishError: The adapter cannot be published, or the server does not answer.
    """
    server, place = server_at(to, key), Path(folder or FOLDER).expanduser().absolute()
    with ExitStack() as used:
        written = Path(used.enter_context(tempfile.TemporaryDirectory(prefix="tunerkit-check-")))
        Export(model, tunerkit.tuner(model, adapter).name)(written / "own")
        own = factors(read_folder(written / "own"))
        name = version or used.enter_context(_loaded(server, written / "own", place))
        base = server.listed().base
        adapted = _Drawn.by(server, name)
        changed = _perturbed(adapted.in_model(model), own)
        _write_changed(written / "own", written / "perturbed", changed)
        other = used.enter_context(_loaded(server, written / "perturbed", place))
        plain, perturbed = _Drawn.by(server, base), _Drawn.by(server, other)
        likeliest = _Drawn.by(server, name, temperature=0.0)
        template_at = None if tokenizer is None else _template_at(server, base, tokenizer, messages)
    found = _Found(model, own, changed, plain, adapted, perturbed)
    differs = found.of_adapted
    return Agreement(
        version=name,
        tokens=len(differs),
        mean=_mean(differs),
        largest=float(differs.abs().max()),
        base=_mean(found.of_plain),
        ratio=float(differs.exp().mean()),
        greedy=tuple(
            _same(own, row[_PROMPT_TOKENS:])
            for own, row in zip(likeliest.in_model(model).likeliest(), likeliest.rows, strict=True)
        ),
        perturbed=_mean(found.of_perturbed),
        moved=_mean(found.moved),
        template_at=template_at,
        cause=found.cause(_earlier(place, name, own)) or _template_cause(template_at),
    )


@attrs.frozen(eq=False)
class _Drawn:
    """Answers of the engine.

    Attributes:
        rows: The token ids of each prompt and its answer.
        scores: The engine's log-probabilities of the answers' tokens, one answer after the other.
    """

    rows: Sequence[Sequence[int]]
    scores: Tensor

    @classmethod
    def by(cls, server: Server, name: str, temperature: float = 1.0) -> Self:
        prompts = [PROBE[at : at + _PROMPT_TOKENS] for at in range(_ANSWERS)]
        drawing = Sampling(max_tokens=_ANSWER_TOKENS, temperature=temperature, more={"ignore_eos": True})
        found = server.sample(name, [(prompt, attrs.evolve(drawing, seed=at)) for at, prompt in enumerate(prompts)])
        answers = [answer for (answer,) in found]
        rows = [[*prompt, *answer.tokens] for prompt, answer in zip(prompts, answers, strict=True)]
        return cls(rows, torch.tensor([each for answer in answers for each in answer.logprobs]))

    def in_model(self, model: "nn.Module") -> LocalModel:
        return LocalModel(model, self.rows, _PROMPT_TOKENS)


@attrs.define(eq=False)
class _Found:
    """What the engine drew without an adapter, with it, and with a perturbed one; how far the model's numbers are."""

    model: "nn.Module"
    own: Adapter
    changed: Adapter
    plain: _Drawn
    adapted: _Drawn
    perturbed: _Drawn
    of_plain: Tensor = attrs.field(init=False)
    of_adapted: Tensor = attrs.field(init=False)
    of_perturbed: Tensor = attrs.field(init=False)
    moved: Tensor = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        perturbed = self.perturbed.in_model(self.model)
        self.of_plain = self.plain.in_model(self.model).scores_with({}) - self.plain.scores
        self.of_adapted = self.adapted.in_model(self.model).scores() - self.adapted.scores
        self.of_perturbed = perturbed.scores_with(self.changed) - self.perturbed.scores
        self.moved = perturbed.scores() - self.perturbed.scores

    def cause(self, earlier: Iterable[tuple[str, Adapter]]) -> str | None:
        dtype = next(each.dtype for each in self.model.parameters() if each.is_floating_point())
        rounding = _FLOAT32 if dtype == torch.float32 else _HALF
        base = _mean(self.of_plain)
        if base > _ROUNDING:
            return (
                "the engine's base is another model, or has other weights: without the adapter the log-probabilities "
                f"differ by {base:.2g} in the mean. Serve the base that the adapter is trained on"
            )
        limit = max(rounding, 2 * base)
        if _mean(self.of_adapted) > limit:
            return self._mistake(earlier, limit)
        if _mean(self.moved) <= limit:
            return (
                "another adapter under another name does not change the engine's answers: it ignores adapters, or "
                "keeps the answers of the first"
            )
        if _mean(self.of_perturbed) > 2 * limit:
            return (
                "the engine computes the adapter rightly, but not a perturbed one: it keeps parts of another version, "
                "or reads some of the matrices from elsewhere"
            )
        if base > rounding:
            return (
                f"the engine computes in another dtype than the trainer, whose is {str(dtype).removeprefix('torch.')}: "
                f"without the adapter too the log-probabilities differ by {base:.2g} in the mean. Start the server "
                "with that --dtype, or train in the server's"
            )
        return None

    def _mistake(self, earlier: Iterable[tuple[str, Adapter]], limit: float) -> str:
        """The first cause that explains the difference, or the nearest one."""
        whole = _mean(self.of_adapted)
        best, least = "", float("inf")
        for said, left in self._tried(earlier):
            if left < least:
                best, least = said, left
            if left <= limit:
                break
        if least <= max(limit, _SHARE * whole):
            return best
        return (
            "the engine computes something else with the adapter, by none of the mistakes that are known here: "
            f"differences of {whole:.2g} in the mean, and {least:.2g} if {best}"
        )

    def _tried(self, earlier: Iterable[tuple[str, Adapter]]) -> Iterator[tuple[str, float]]:
        """Yield mistakes, and what each leaves of the difference."""
        yield (
            "the engine answers as the base does: the adapter is not loaded, or the engine ignores it. Publish it, and "
            "ask for the version's name as the model",
            self._left({}),
        )
        for name, adapter in earlier:
            yield (
                f"the engine computes with {name}, another version: publish the adapter as it is now, and ask for that "
                "name",
                self._left(adapter),
            )
        for said, adapter in mistakes(self.own):
            yield said, self._left(adapter)
        gone: list[str] = []
        rest = self.own
        for _ in range(_ROUNDS):  # the group that explains most, then the next
            without = {
                name: {path: each for path, each in rest.items() if path not in paths}
                for name, paths in groups(rest).items()
            }
            left = {name: self._left(adapter) for name, adapter in without.items() if adapter}
            if not left:
                return
            best = min(left, key=left.__getitem__)
            gone, rest = [*gone, best], without[best]
            yield (
                f"the engine leaves out the adapter of {', '.join(gone)}: it does not support it there, or does not "
                "know the names in the file",
                left[best],
            )

    def _left(self, adapter: Adapter) -> float:
        return _mean(self.adapted.in_model(self.model).scores_with(adapter) - self.adapted.scores)


def _mean(difference: Tensor) -> float:
    return float(difference.abs().mean())


def _same(likeliest: Sequence[int], answer: Sequence[int]) -> int:
    """How many tokens are equal, up to the first that differs."""
    pairs = enumerate(zip(likeliest, answer, strict=True))
    return next((at for at, pair in pairs if pair[0] != pair[1]), len(answer))


@contextmanager
def _loaded(server: Server, folder: Path, place: Path) -> Iterator[str]:
    """Inside the block, the engine has the adapter of a PEFT folder; yields its name."""
    prefix = f"tunerkit-check-{folder.name}-{os.getpid()}"
    name = publisher(folder, server, folder=place, prefix=prefix, keep=1, probe=False).publish()
    try:
        yield name
    finally:
        server.unload(name)
        shutil.rmtree(place / name, ignore_errors=True)


def _perturbed(local: LocalModel, own: Adapter) -> Adapter:
    """Add noise to B, so much that the log-probabilities move."""
    generator, size, before = torch.Generator().manual_seed(0), 1.0, local.scores_with(own)
    noise = {path: torch.randn(each.b.shape, generator=generator) for path, each in own.items()}
    for _ in range(12):
        changed = {path: attrs.evolve(each, b=each.b + size * _unit(each) * noise[path]) for path, each in own.items()}
        if _mean(local.scores_with(changed) - before) <= 4 * _MOVED:
            break
        size /= 2
    return changed


def _unit(each: Factors) -> float:
    """The size of B with which the product has entries of about a tenth."""
    return 0.1 / max(abs(each.scale) * float(each.a.norm(dim=0).mean()), 1e-6)


def _write_changed(folder: Path, copy: Path, changed: Adapter) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, copy)
    tensors, pairs = load_file(folder / WEIGHTS), read_folder(folder).pairs
    tensors |= {pairs[path].b: each.b.to(tensors[pairs[path].b].dtype) for path, each in changed.items()}
    save_file(tensors, copy / WEIGHTS)


def _earlier(place: Path, name: str, own: Adapter) -> Iterator[tuple[str, Adapter]]:
    """Yield the versions in a folder by name, the newest first; those of other models are passed over."""
    found = [each.parent for each in place.glob(f"*/{CONFIG}") if re.search(r"-[0-9a-f]{16}$", each.parent.name)]
    for path in sorted(found, key=lambda each: (each.name == name, each.stat().st_mtime_ns), reverse=True)[:_OLD]:
        with suppress(FileError):
            adapter = factors(read_folder(path))
            if _sizes(adapter) == _sizes(own):
                yield path.name, adapter


def _sizes(adapter: Adapter) -> dict[str, tuple[int, int]]:
    return {path: (each.a.shape[1], each.b.shape[0]) for path, each in adapter.items()}


def _template_at(server: Server, base: str, tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> int | None:
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    own = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True, return_dict=True)
    here, there = list(own["input_ids"]), list(server.chat_prompt(base, messages))
    if here == there:
        return None
    return next(
        (at for at, pair in enumerate(zip(here, there, strict=False)) if pair[0] != pair[1]),
        len(min(here, there, key=len)),
    )


def _template_cause(at: int | None) -> str | None:
    if at is None:
        return None
    return (
        f"the engine's chat template is another one, from token {at} on: give the server the tokenizer's, with "
        "--chat-template FILE"
    )
