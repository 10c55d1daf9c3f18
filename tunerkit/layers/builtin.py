"""The base-layer kinds that core brings, and all that it knows of layers and models as one record."""

from collections.abc import Callable, Iterable
from typing import NoReturn

import attrs
from torch import nn

from tunerkit.layers.base import BaseLayer
from tunerkit.layers.kinds import AttentionLayer, ConvLayer, EmbeddingLayer, LinearLayer
from tunerkit.records import DefaultTargets, ModelLibrary, WeightReader

KINDS: tuple[type[BaseLayer], ...] = (LinearLayer, ConvLayer, EmbeddingLayer, AttentionLayer)


def _raise(kind: type[BaseLayer], error: BaseException) -> NoReturn:
    raise error


@attrs.frozen(eq=False)
class Knowledge:
    """What is known of layers and models. If two records describe the same class or architecture, the first counts.

    Attributes:
        kinds: The base-layer kinds.
        weight_readers: The classes that use a child's weight directly.
        default_targets: The default targets of architectures.
        leave_out: Called with a kind that raised while it was asked about a module, and with what it raised. If it
            returns, the kind is left out. By default it raises that again.
        libraries: What libraries know of their models.
        unserved: Says how to get the plugin that knows the library of an object; empty if it is there.
    """

    kinds: tuple[type[BaseLayer], ...]
    weight_readers: tuple[WeightReader, ...]
    default_targets: tuple[DefaultTargets, ...]
    leave_out: Callable[[type[BaseLayer], BaseException], None] = _raise
    libraries: tuple[ModelLibrary, ...] = ()
    unserved: Callable[[object], str] = lambda thing: ""


# torch's own attention uses the weight of its output projection without calling it.
_READERS = (WeightReader("torch.nn.modules.activation.MultiheadAttention", ("out_proj",)),)
CORE = Knowledge(KINDS, _READERS, ())


def as_base_layers(modules: Iterable[nn.Module], knowledge: Knowledge) -> dict[nn.Module, BaseLayer]:
    """Return each module that tunerkit can adapt as the first kind that matches it.

    A kind that raises for one module counts for none of them: half of a model in another kind would be a surprise.
    """
    found: dict[nn.Module, BaseLayer] = {}
    waiting = list(modules)
    for kind in knowledge.kinds:
        try:
            matched = {module: kind(module) for module in waiting if kind.matches(module)}
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            knowledge.leave_out(kind, error)
        else:
            found |= matched
            waiting = [module for module in waiting if module not in matched] if matched else waiting
    return found


def as_base_layer(module: nn.Module, kinds: tuple[type[BaseLayer], ...] = KINDS) -> BaseLayer | None:
    """The module as the first of ``kinds`` that matches it; None if tunerkit cannot adapt it."""
    return next((kind(module) for kind in kinds if kind.matches(module)), None)
