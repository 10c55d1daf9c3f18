"""Registers plugins for the length of a block."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from tunerkit import register, unregister


@contextmanager
def registered(*plugins: object) -> Iterator[None]:
    """Register plugins in this process and unregister them at the end of the block, whatever happens in it.

    In a fixture it holds for each test, or for all tests of a file::

        @pytest.fixture(autouse=True, scope="module")
        def _mine() -> Iterator[None]:
            with registered(MyPlugin()):
                yield

    Args:
        plugins: modules or objects with hook implementations, as `tunerkit.register` takes them.
    """
    with ExitStack() as stack:
        for plugin in plugins:
            register(plugin)
            stack.callback(unregister, plugin)
        yield
