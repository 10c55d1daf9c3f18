"""A small model with every kind of layer, and helpers for tests with toy methods on it."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tunerkit
from tunerkit.plugin import BaseLayer, Method, ModelLibrary
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import LowRankPlugin, ShiftConfig, ShiftPlugin


class Net(nn.Module):
    """(N, 3, 5, 5) to (N, 3): a convolution, norms of three kinds, linear layers and a head."""

    def __init__(self, *, batch_norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.batch_norm = nn.BatchNorm2d(4) if batch_norm else nn.Identity()
        self.group_norm = nn.GroupNorm(2, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 8)])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(self.batch_norm(self.conv(x))).mean((2, 3))
        for layer in self.layers:
            h = torch.tanh(layer(h))
        result: Tensor = self.head(self.norm(h))
        return result


# Everything that a config of core can ask for at once.
FULL: Mapping[str, Any] = {"targets": ["conv", "layers.0", "layers.1"], "train_modules": ["head"], "bias": "all"}


class Toys:
    """The helpers that the fixture `toys` gives to a test."""

    methods = ("toy-low-rank", "toy-shift")
    full = FULL

    # Any: tests reach for the layers of these models by name, which nn.Module's types do not know.
    def net(self, *, batch_norm: bool = False, seed: int = 0) -> Any:
        """The same small model at every call, with random values, in eval mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Net(batch_norm=batch_norm)
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor.data.copy_(torch.rand_like(tensor) + 0.1)
        return model.eval()

    def x(self) -> Tensor:
        """A batch for `net`."""
        return torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(1))

    def fill_(self, model: nn.Module, *, seed: int = 7) -> nn.Module:
        """Simulate training: change all that adapters train, and the copies' statistics, to random values."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".tunerkit." in name:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
            for name, buffer in model.named_buffers():
                if ".tunerkit." in name and buffer.is_floating_point():
                    buffer.add_(0.3 * torch.rand(buffer.shape, generator=generator).to(buffer.dtype))
        return model

    def trained(self, method: str = "toy-low-rank", *, batch_norm: bool = False, **config: object) -> Any:
        """`net` with an adapter whose values were changed; by default everything that can be trained is."""
        model = tunerkit.wrap(self.net(batch_norm=batch_norm), method, config or dict(FULL), seed=3)
        return self.fill_(model)

    def snapshot(self, model: nn.Module) -> dict[str, Any]:
        """Everything in a model that wrapping could change: values, types, requires_grad, hooks, attributes."""
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return {
            "values": {name: tensor.detach().clone() for name, tensor in tensors.items()},
            "identity": {name: id(tensor) for name, tensor in tensors.items()},
            "grad": {name: p.requires_grad for name, p in model.named_parameters()},
            "types": {name: type(module) for name, module in model.named_modules()},
            "keys": list(model.state_dict()),
            "hooks": {
                name: [list(hooks) for hooks in (m._forward_hooks, m._forward_hooks_with_kwargs, m._forward_pre_hooks)]
                for name, m in model.named_modules()
            },
            "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        }

    def same(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Whether two snapshots are of the same model in the same state, bit for bit."""
        values = zip(one["values"].values(), other["values"].values(), strict=True)
        rest = [{key: value for key, value in each.items() if key != "values"} for each in (one, other)]
        return rest[0] == rest[1] and all(a.is_meta or torch.equal(a, b) for a, b in values)

    def close(self, found: Tensor, expected: Tensor) -> bool:
        """Whether outputs are equal within DESIGN's tolerance for two ways of computing one output."""
        return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


class Running(nn.Module):
    """A model of some parts, which runs a function of itself and its input."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        vars(self)["run"] = run
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Any) -> Any:
        return vars(self)["run"](self, x)


class PastForward(nn.Module):
    """Uses one projection's weight directly, bypassing its forward(), as attention does with its output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.out = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inner(x), self.out.weight, self.out.bias)


class OneMethod:
    """A plugin of one method, which its class names."""

    method: Method

    @tunerkit.hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [self.method]


def answering(hook: str, answer: Any) -> Any:
    """A plugin that answers one hook; an answer that is an exception is raised, and a function is called."""

    def implementation() -> Any:
        if isinstance(answer, BaseException):
            raise answer
        return answer() if isinstance(answer, FunctionType) else answer

    plugin = ModuleType("answering")
    setattr(plugin, hook, tunerkit.hookimpl(implementation))
    return plugin


class ToyLibrary:
    """Knows models whose config is a plain namespace: by which flags it says that weights are tied."""

    @tunerkit.hookimpl
    def tunerkit_model_libraries(self) -> list[ModelLibrary]:
        return [ModelLibrary(tied_flags=_tied_flags)]


def _tied_flags(module: nn.Module) -> list[str]:
    match module:
        case nn.Module(config=SimpleNamespace(tie_word_embeddings=True) as config):
            inner = ["config.text_config.tie_word_embeddings"] if hasattr(config, "text_config") else []
            return ["config.tie_word_embeddings", *inner]
    return []


class Building(OneMethod):
    """A plugin of one method, of which no more is said than what it builds for a base layer."""

    def __init__(self, name: str, build: Callable[[Any], object], config: Any = ShiftConfig, **fields: Any) -> None:
        self.method, self.build = Method(name, config=config, **fields), build

    @tunerkit.hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer) -> object:
        return self.build(base)


def registering(*plugins: object) -> Any:
    """A fixture that registers plugins for all tests of a file."""

    @pytest.fixture(autouse=True, scope="module")
    def fixture() -> Iterator[None]:
        with registered(*plugins):
            yield

    return fixture


@pytest.fixture(scope="module")
def toys() -> Iterator[Toys]:
    """The toy methods, registered in-process for the tests of one file."""
    with registered(LowRankPlugin(), ShiftPlugin(), ToyLibrary()):
        yield Toys()


@pytest.fixture
def group_of_one() -> Iterator[None]:
    """A process group in which this process is alone."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def saved(toys: Toys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of an adapter with everything in it."""
    return tunerkit.save(toys.trained(), tmp_path_factory.mktemp("saved"))
