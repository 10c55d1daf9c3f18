"""Publish an adapter to a running engine while it is trained: versions by content, of which a few stay loaded."""

import os
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

import attrs

import tunerkit
from tunerkit.errors import AdapterError, FileError, TunerkitError, TunerkitWarning, shown
from tunerkit_serving.adapter_folder import CONFIG, WEIGHTS, read_folder
from tunerkit_serving.server import PROBE, Answer, PublishError, Sampling, Server
from tunerkit_serving.sglang_http import SglangServer
from tunerkit_serving.versions import Versions
from tunerkit_serving.vllm import RANKS
from tunerkit_serving.vllm_http import VllmServer

if TYPE_CHECKING:
    from torch import nn

    from tunerkit.plugin import Tuner

FOLDER: Final = "tunerkit-published"
_SGLANG: Final = "sglang+"  # before the URL
# The likeliest tokens: not every engine draws the same by one seed. Several, as a base may be sure of some.
_PROBING: Final = [(PROBE[at:], Sampling(max_tokens=4, temperature=0.0)) for at in range(8)]
_CONVERT: Final = (
    ". Engines load LoRA alone: train with a method that has factors, or turn the saved adapter into a LoRA and "
    "publish that: tunerkit convert OUT --to lora --rank 16"
)


def publisher(
    source: "nn.Module | str | os.PathLike[str]",
    to: str | Server,
    *,
    keep: int = 2,
    rank: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    prefix: str = "tunerkit",
    adapter: str | None = None,
    probe: bool = True,
    key: str | None = None,
    **options: Any,
) -> "Publisher":
    """Return what publishes an adapter to a running vLLM or SGLang, as often as wanted while it is trained.

    Each version is a LoRA of one rank, which stays the same for the whole run, in a folder that the server must see
    under the same path. Its name is by its content, so no cache of the server is ever stale. Start the server with
    ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=1``, ``--enable-lora``, ``--max-lora-rank`` and ``--max-loras`` of keep + 1::

        versions = publisher(model, "http://localhost:8000")
        name = versions.publish()  # at any step
        with versions.using(name):
            ...  # requests with model=name

    Over HTTP only the replica that answers loads a version: behind a load balancer, or with data-parallel replicas,
    the others do not have it, and nothing here can see that. Publish to each replica under its own address.

    Args:
        source: A wrapped model; or a PEFT folder, which is read anew at each publish.
        to: The URL of a vLLM; of an SGLang with ``sglang+`` before it, such as ``"sglang+http://host:30000"``; or a
            `tunerkit_serving.Server` for another engine.
        keep: How many versions stay loaded. While one is loaded there is one more.
        rank: The rank of all versions; None for the least of 8, 16, 32, 64, 128, 256, 320 and 512 that holds the
            largest rank that the adapter can reach without growing, as it is at the first publish.
        folder: Where the versions are written; None for ``tunerkit-published`` here. A folder with a prefix belongs to
            one publisher. After a restart, versions there that the server has are counted among those to keep.
        prefix: What the names start with.
        adapter: The adapter's name. It may be left out if the model has only one.
        probe: Whether to compare a few answers of a version, and their log-probabilities, with the base's, once after
            it is loaded. It finds an adapter that the engine ignores; noise of a busy server can hide one.
        key: What the server was given as ``--api-key``; None for the environment's ``VLLM_API_KEY``, for SGLang
            ``SGLANG_API_KEY``.
        **options: Options of the format ``"peft"``, see `tunerkit.export`, such as ``dtype="bfloat16"``.

    Returns:
        The publisher. Nothing is written or sent before its first `Publisher.publish`.

    Raises:
        PublishError: An argument is invalid.
        AdapterError: The model has no such adapter, or several and none is named.
    """
    if not keep >= 1:
        raise PublishError(f"keep: expected >= 1 versions, got {shown(keep)}")
    if rank is not None and not 1 <= rank <= RANKS[-1]:
        raise PublishError(f"rank: expected 1 to {RANKS[-1]}, which engines take, got {shown(rank)}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", prefix):
        raise PublishError(f"prefix: expected up to 64 letters, digits and '._-', got {shown(prefix)}")
    if isinstance(source, str | os.PathLike):
        if rank is not None or adapter is not None or options:
            raise PublishError("rank, adapter and the format's options are for a model; a folder is published as it is")
        write: Callable[[Path], None] = _Copy(Path(source))
    else:
        write = Export(source, tunerkit.tuner(source, adapter).name, rank, options)
    versions = Versions(Path(FOLDER if folder is None else folder).expanduser().absolute(), prefix)
    return Publisher(write, server_at(to, key), versions, keep, probe)


def server_at(to: str | Server, key: str | None = None) -> Server:
    """Return the server at a URL, by its scheme; a `Server` is returned as it is.

    Raises:
        PublishError: It is no URL of HTTP.
    """
    if not isinstance(to, str):
        return to
    url = to.removeprefix(_SGLANG)
    kind = VllmServer if url == to else SglangServer
    return kind.at(url, key or os.environ.get(kind.key_variable))


@attrs.define(eq=False)
class Publisher:
    """Publishes versions to one server. Built by `publisher`.

    Attributes:
        server: The engine.
        versions: The folder of the versions.
        keep: How many stay loaded.
        probe: Whether each is compared with the base.
    """

    _write: Callable[[Path], None]
    server: Server
    versions: Versions
    keep: int
    probe: bool
    _loaded: list[str] = attrs.field(factory=list, init=False)  # the oldest first
    _leaving: list[str] = attrs.field(factory=list, init=False)  # unloaded; their files go at the next publish
    _of_base: dict[str, Sequence[Sequence[Answer]]] = attrs.field(factory=dict, init=False)
    _latest: str | None = attrs.field(default=None, init=False)
    _users: Counter[str] = attrs.field(factory=Counter, init=False)
    _publishing: Lock = attrs.field(factory=Lock, init=False)
    _counting: Lock = attrs.field(factory=Lock, init=False)

    @property
    def loaded(self) -> tuple[str, ...]:
        """The names of the versions that are loaded, the oldest first."""
        return tuple(self._loaded)

    def publish(self) -> str:
        """Publish the adapter as it is now; the same content twice is not loaded again.

        Returns:
            The version's name, which requests name as their model.

        Raises:
            PublishError: The adapter, the folder or the server does not allow it. Earlier versions are as they were.
        """
        with self._publishing:
            served = self.server.listed()
            self._compare(served.adapters)
            self.versions.remove(self._leaving)
            name, adds = self.versions.add(self._write, self.server.rules)
            if name not in self._loaded:
                self._load(name, served.base if adds else None)
            with self._counting:
                self._loaded = [*(each for each in self._loaded if each != name), name]
                self._latest = name
            self._retire()
            return name

    @contextmanager
    def using(self, name: str | None = None) -> Iterator[str]:
        """Inside the block a version stays loaded, for the requests in flight.

        Args:
            name: The version; None for the latest.

        Yields:
            The version's name.

        Raises:
            PublishError: It is not loaded any more, or nothing has been published.
        """
        with self._counting:
            name = self._latest if name is None else name
            if name is None or name not in self._loaded:
                kept = ", ".join(self._loaded) or "none; call publish() first"
                raise PublishError(f"version {shown(name)} is not loaded; those that are: {kept}")
            self._users[name] += 1
        try:
            yield name
        finally:
            with self._counting:
                self._users[name] -= 1

    def _compare(self, served: frozenset[str]) -> None:
        """Take the server's word for what is loaded: it may have been restarted, and so may we."""
        before = [name for name in self.versions.there() if name not in self._loaded]
        if any(name not in served for name in self._loaded):
            self._of_base.clear()  # a restarted server may have another base
        with self._counting:
            self._leaving = [name for name in (*before, *self._loaded) if name not in served]
            self._loaded = [name for name in (*before, *self._loaded) if name in served]

    def _load(self, name: str, base: str | None) -> None:
        """Load a version, and compare it with ``base`` unless that is None."""
        if self.probe and base is not None and base not in self._of_base:
            # Once, before versions are in use: beside their requests, a vLLM on a CPU draws the base's answers by an
            # adapter (vllm #48421).
            self._of_base[base] = self._probed(base)
        try:
            self.server.load(name, self.versions.folder / name)
            if name not in self.server.listed().adapters:
                raise PublishError(
                    f"the server took {name}, and does not list it: are there several replicas behind this address? "
                    "Publish to each under its own"
                )
            if self.probe:
                found = self._probed(name)
                if base is not None and found == self._of_base[base]:
                    raise PublishError(
                        f"{name} answers exactly as the base {base!r} does, although the adapter adds to it. Likely "
                        "the server ignores it: another base model is behind this address, or the engine does not "
                        "support LoRA in these layers. If the adapter has only just begun to learn, the change may be "
                        "too small for the server's precision: publish later, or pass probe=False"
                    )
        except PublishError:
            self._leaving.append(name)
            with suppress(PublishError):  # the first error counts
                self.server.unload(name)
            raise

    def _probed(self, model: str) -> Sequence[Sequence[Answer]]:
        """One after the other: beside others, an engine rounds differently."""
        return [answers for draw in _PROBING for answers in self.server.sample(model, [draw])]

    def _retire(self) -> None:
        """Unload the oldest versions that nobody uses."""
        for _ in range(len(self._loaded) - self.keep):
            with self._counting:
                idle = next((name for name in self._loaded[:-1] if not self._users[name]), None)
                if idle is None:
                    return
                self._loaded.remove(idle)
            try:
                self.server.unload(idle)
            except PublishError:
                with self._counting:
                    self._loaded.insert(0, idle)
                raise
            self._leaving.append(idle)


@attrs.define(eq=False)
class Export:
    """Writes a model's adapter as a PEFT folder, always with one rank.

    Attributes:
        model: The wrapped model.
        adapter: The adapter's name.
        rank: The rank; None to take the least that fits, at the first call.
        options: Of the format.
    """

    model: "nn.Module"
    adapter: str
    rank: int | None = None
    options: dict[str, Any] = attrs.field(factory=dict)

    def __call__(self, place: Path) -> None:
        """Write the adapter as it is to a folder that does not exist, or raise `PublishError`."""
        tuner = tunerkit.tuner(self.model, self.adapter)
        try:
            _refuse_shared(tuner)
            largest = _reach(tuner)
            if self.rank is None:
                self.rank = next((rank for rank in RANKS if rank >= max(8, largest)), None)
            if self.rank is None:
                raise PublishError(
                    f"the adapter's largest rank is {largest}, and engines take {RANKS[-1]} at most: train a lower one"
                )
            if largest > self.rank:
                raise PublishError(
                    f"the adapter has a rank of {largest}, above the {self.rank} of this publisher's versions, which "
                    "is the same for a whole run: make a publisher with a larger rank="
                )
            with warnings.catch_warnings():
                # Versions are published in the middle of training.
                unspent = r".*if training is over, call tuner\.finish"
                warnings.filterwarnings("ignore", message=unspent, category=TunerkitWarning)
                settings = {"form": "uniform", "rank": self.rank, **self.options}
                tunerkit.export(self.model, place, format="peft", adapter=tuner.name, **settings)
        except PublishError:
            raise
        except TunerkitError as problem:
            hint = _CONVERT if isinstance(problem, AdapterError) and not _has_factors(tuner) else ""
            raise PublishError(f"the adapter cannot be published: {problem}{hint}") from problem


def _refuse_shared(tuner: "Tuner") -> None:
    if tuner.engine.is_shared:
        raise PublishError(
            f"adapter {tuner.name!r} is trained by several processes, and a publisher is for one: call "
            "tunerkit.export(model, folder, form='uniform', rank=...) in all of them, and in the first "
            "publisher(folder, url).publish()"
        )


def _reach(tuner: "Tuner") -> int:
    """The largest rank without growing: AdaLoRA's pruned triplets may come back as long as they are in memory."""
    from tunerkit.plugin import factors_of

    sizes: list[int] = []
    for adapter in tuner.adapters().values():
        own = {**dict(adapter.named_parameters()), **dict(adapter.named_buffers())}
        sizes.append(max((own[name].shape[dim] for name, dim in adapter.rank_dims.items()), default=adapter.rank))
    if not all(sizes):  # the adapters say nothing of it, or some have rank 0
        sizes += [product.q.shape[-2] for product in factors_of(tuner).values()]
    return max(sizes, default=0)


def _has_factors(tuner: "Tuner") -> bool:
    from tunerkit.plugin import factors_of

    try:
        factors_of(tuner)
    except AdapterError:
        return False
    return True


@attrs.frozen
class _Copy:
    """Writes what a PEFT folder has."""

    folder: Path

    def __call__(self, place: Path) -> None:
        try:
            read_folder(self.folder)
        except FileError as problem:
            raise PublishError(str(problem)) from problem
        place.mkdir()
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(self.folder / name, place / name)
