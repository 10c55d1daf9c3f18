"""The frozen records that flow through tunerkit."""

from collections.abc import Mapping

import attrs
from torch import Tensor, nn


@attrs.frozen
class Method:
    """A way of tuning, as a plugin yields it from ``tunerkit_methods``.

    ``config`` is a frozen attrs class derived from `tunerkit.AdapterConfig`. ``needs_steps`` says that the method
    is useless unless the optimizer drives it: saving it untrained is then an error.
    """

    name: str
    config: type
    needs_steps: bool = False


@attrs.frozen
class MethodInfo:
    """Where a method comes from, and what went wrong with it if anything did."""

    distribution: str
    version: str
    error: str | None = None


@attrs.frozen(eq=False)
class Target:
    """A place in the model: the dotted path and the module there."""

    path: str
    module: nn.Module


@attrs.frozen
class DefaultTargets:
    """The default targets of architectures, as a plugin yields them from ``tunerkit_default_targets``.

    Args:
        model_types: The values of ``model.config.model_type`` that have these targets.
        names: Plain names, each the end of a path: the attention and MLP matrices of the repeated blocks. An
            architecture need not have all of them.
    """

    model_types: tuple[str, ...]
    names: tuple[str, ...]


@attrs.frozen
class WeightReader:
    """A class that uses its children's weights directly, bypassing their forward, where no hook would be called.

    A plugin yields it from ``tunerkit_weight_readers``.

    Args:
        owner: The qualified name of the class that defines the forward: ``"package.module.Class"``.
        children: The names of the children whose weights that forward uses.
    """

    owner: str
    children: tuple[str, ...]


@attrs.frozen(eq=False)
class Delta:
    """What an adapter adds to its base layer, densely: ``weight`` (out, in) and ``bias`` (out,), or nothing."""

    weight: Tensor | None = None
    bias: Tensor | None = None


@attrs.frozen(eq=False)
class State:
    """What training needs to go on, apart from the adapter's weights: tensors by name, and JSON values."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, object]


@attrs.frozen
class RankChange:
    """One allocation, for the history: at which step, the budget in force from then on, live ranks by target."""

    step: int
    budget: int
    ranks: Mapping[str, int]
