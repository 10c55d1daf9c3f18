"""What the tests of core and of all plugins share: the machine, and where garbage is looked for."""

import gc
from collections.abc import Generator

import pytest

from tests.support import machines

machines.believe_()


def pytest_collection_finish() -> None:
    """Take what was imported out of each garbage collection.

    A Trainer collects all garbage at the end of training. Among the objects of all imported libraries, that takes
    longer than the training of a tiny model.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    """After each file, take what its tests imported out of them too: 300,000 objects more after a few files."""
    result = yield
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()
    return result
