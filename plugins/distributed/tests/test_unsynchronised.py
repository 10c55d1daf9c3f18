"""An adapter that DistributedDataParallel does not know is refused at its first forward."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import tunerkit
from tunerkit.errors import AdapterError
from tunerkit.layers.torch_private import has_hook
from tunerkit_distributed.unsynchronised import refuse_unsynchronised

if TYPE_CHECKING:
    from tests.support.toys import Toys


@pytest.fixture
def _process_group(tmp_path: Path) -> Iterator[None]:
    """A process group with this process only."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def ddp(model: nn.Module) -> nn.Module:
    parallel: nn.Module = nn.parallel.DistributedDataParallel(model)
    return parallel


INTO: dict[str, Callable[[Any, Path], object]] = {
    "its module": lambda model, path: tunerkit.wrap(model, "toy-low-rank"),
    "a part of it": lambda model, path: tunerkit.wrap(model.head, "toy-low-rank"),
    "what it is a part of": lambda model, path: tunerkit.wrap(nn.Sequential(model), "toy-low-rank"),
    "loaded": lambda model, path: tunerkit.load(model, path, trainable=True),
}


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("put", INTO.values(), ids=INTO)
def test_an_adapter_that_ddp_does_not_know_is_refused_at_its_first_forward(
    toys: "Toys", tmp_path: Path, put: Callable[[Any, Path], object]
) -> None:
    """Inside `ddp.module`, or around it, wrap cannot see DDP, which does not synchronise the new adapters.

    The error comes whatever ran before outside DDP, and again at each call, until the model is put into a new DDP.
    """
    path = tunerkit.save(toys.trained(), tmp_path)
    model = toys.net()
    parallel = ddp(model)
    put(model, path)
    model(toys.x())
    for _ in range(2):
        with pytest.raises(AdapterError, match="already inside DistributedDataParallel when adapter 'default'"):
            parallel(toys.x())
    parallel = ddp(model)
    assert torch.equal(parallel(toys.x()), model(toys.x()))


@pytest.mark.usefixtures("_process_group")
def test_an_adapter_that_ddp_knows_is_checked_once(toys: "Toys", tmp_path: Path) -> None:
    """A model wrapped before DDP passes, also next to other DDP models or after DDP is gone. No hook remains."""
    free, model = toys.net(), toys.trained()
    parallel = ddp(free)
    expected = model(toys.x())
    assert [module for module in model.modules() if has_hook(module, refuse_unsynchronised)] != []
    assert toys.close(ddp(model)(toys.x()), expected)
    assert [module for module in model.modules() if has_hook(module, refuse_unsynchronised)] == []
    del parallel
    before = toys.snapshot(free)
    tunerkit.load(free, tunerkit.save(model, tmp_path))
    assert toys.close(free(toys.x()), expected)
    assert toys.same(toys.snapshot(tunerkit.unwrap(free)), before)


@pytest.mark.usefixtures("_process_group")
def test_the_check_for_ddp_breaks_no_compiled_graph(toys: "Toys") -> None:
    """With a process group but without DDP, a compiled model stays one graph."""
    model = toys.trained(targets=["layers.*"])
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    assert toys.close(compiled(toys.x()), model(toys.x()))
