"""Registers plugins for the length of a block."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from tunerkit import TunerkitError, hooks, register, unregister


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


@contextmanager
def method_of(plugin: object) -> Iterator[str]:
    """Give the name of a plugin's one method, which is registered for the length of the block.

    Args:
        plugin: What `tunerkit.method` returns, or any plugin with one method. A name is given back as it is.

    Raises:
        TunerkitError: It is no plugin, or has several methods.
    """
    if isinstance(plugin, str):
        yield plugin
        return
    given: Any = plugin
    names = [method.name for method in given.tunerkit_methods()] if hasattr(plugin, "tunerkit_methods") else []
    if len(names) != 1:
        raise TunerkitError(
            f"expected a method's name, or a plugin with one method, such as what @tunerkit.method returns; got "
            f"{type(plugin).__name__}" + (f" with the methods {', '.join(names)}: pass one of these" if names else "")
        )
    owner = hooks.registry.loaded().owners.get(names[0])
    with ExitStack() as stack:
        if owner is None or owner.plugin is not plugin:
            stack.enter_context(registered(plugin))
        yield names[0]
