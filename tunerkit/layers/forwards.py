"""The class that defines a module's forward, and classes by qualified name: no other library is imported."""

from types import MethodType

from torch import nn

from tunerkit.layers.weights import plugins


def overrides_forward(module: nn.Module) -> bool:
    """Whether the instance has a forward that may differ from its class's."""
    own = vars(module).get("forward")
    if own is None:
        return False
    for each in plugins.holdings():  # a library's forward may only load weights around the one inside
        if (inside := each.forward(module)) is not None:
            own = inside
    # Removing a library's hooks may leave the class's forward on the instance, as a bound method.
    return own != MethodType(type(module).forward, module)


def forward_owner(module: nn.Module) -> type:
    """The class that defines the forward of ``module``; ``object`` if the instance has its own."""
    if overrides_forward(module):
        return object
    return next(owner for owner in type(module).__mro__ if "forward" in vars(owner))


def forward_name(module: nn.Module) -> str:
    """The qualified name of `forward_owner`."""
    return _qualified(forward_owner(module))


def derives_from(candidate: object, name: str) -> bool:
    """Whether the class of ``candidate`` is the one with this qualified name, or derives from it."""
    return is_named(type(candidate), name)


def is_named(kind: type, name: str) -> bool:
    """Whether ``kind`` is the class with this qualified name, or derives from it; or from one in the package ``name.``.

    A name with a dot at its end is a package's.
    """
    names = map(_qualified, kind.__mro__)
    return any(each.startswith(name) for each in names) if name.endswith(".") else name in names


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
