"""Adapters of other programs whose method adds no products: a format gives their own tensors, and those they share."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import attrs
import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tunerkit.errors import BaseMismatchError, FileError, UnknownMethodError
from tunerkit.plugin import Adapter, AdapterConfig, BaseLayer, Delta, Foreign, Format, Method, hookimpl
from tunerkit_testing.registering import registered


@attrs.frozen
class Config(AdapterConfig):
    """Only the settings of every method."""


class Pool(nn.Module):
    """One factor ``scale`` () for all targets."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


class Squared(Adapter):
    """Adds scale · (m ∘ m) x with a full matrix ``m`` (out, in)."""

    reads_output: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = False

    def __init__(self, base: BaseLayer) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.zeros(base.out_features, base.in_features))

    def matrix(self) -> Tensor:
        assert isinstance(self.shared, Pool)
        return self.shared.scale * self.m.square()

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return y + x @ self.matrix().T


class Plugin:
    """The method, and a format whose files it reads itself."""

    def __init__(self, found: Callable[[], Foreign], *, has_method: bool = True) -> None:
        self.found, self.has_method = found, has_method

    @hookimpl
    def tunerkit_methods(self) -> Iterator[Method]:
        if self.has_method:
            yield Method("squared", config=Config)

    @hookimpl
    def tunerkit_shared(self) -> Pool:
        return Pool()

    @hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer) -> Squared:
        return Squared(base)

    @hookimpl
    def tunerkit_delta(self, adapter: Squared) -> Delta:
        return Delta(weight=adapter.matrix())

    @hookimpl
    def tunerkit_formats(self) -> Iterator[Format]:
        yield Format(
            "squared",
            sniff=lambda path: path.suffix == ".squared",
            read=lambda path, model: self.found(),
            write=lambda tuner, path, options: [],
        )


def net() -> nn.Sequential:
    """Two layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


M = {"0": {"m": torch.arange(12.0).reshape(3, 4)}, "1": {"m": torch.arange(6.0).reshape(2, 3)}}
SHARED = {"scale": torch.tensor(0.5)}


def load(tmp_path: Path, found: Foreign, *, has_method: bool = True) -> nn.Module:
    """Load what the format reads."""
    with registered(Plugin(lambda: found, has_method=has_method)):
        return tunerkit.load(net(), tmp_path / "x.squared")


def test_tensors_alone_make_an_adapter(tmp_path: Path) -> None:
    """They and the shared ones get their places, in whatever order the format gives the targets."""
    found = Foreign({}, "squared", tensors=dict(reversed(M.items())), shared=SHARED)
    x, plain, model = torch.randn(5, 4), net(), load(tmp_path, found)
    hidden = plain[0](x) + 0.5 * x @ M["0"]["m"].square().T
    assert torch.allclose(model(x), plain[1](hidden) + 0.5 * hidden @ M["1"]["m"].square().T, rtol=1e-5)


@pytest.mark.parametrize(
    ("found", "error", "part"),
    [
        (Foreign({}, "squared", tensors=M), FileError, "missing: 0.tunerkit.scale"),
        (Foreign({}, "squared", tensors=M, shared={**SHARED, "more": torch.ones(2)}), FileError, "unexpected"),
        (Foreign({}, "squared", tensors={"2": M["0"]}, shared=SHARED), BaseMismatchError, "another base model"),
        (Foreign({}, "squared", tensors={"0": M["1"]}, shared=SHARED), FileError, "size mismatch"),
        (Foreign({}, "squared", tensors=M, shared={"scale": torch.tensor(float("nan"))}), FileError, "NaN"),
        (Foreign({}, "squared"), FileError, "it has no targets"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, found: Foreign, error: type[Exception], part: str) -> None:
    """As strictly as those of a file of ours."""
    with pytest.raises(error, match=part):
        load(tmp_path, found)


def test_no_other_method_takes_them(tmp_path: Path) -> None:
    """A LoRA takes products; these say nothing without their method."""
    found = Foreign({}, "squared", tensors=M, shared=SHARED)
    with pytest.raises(UnknownMethodError, match=r"a squared adapter, and no installed method .*\. It needs squared"):
        load(tmp_path, found, has_method=False)
