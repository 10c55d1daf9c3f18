"""The frozen records that tunerkit and its plugins exchange."""

from collections.abc import Mapping

import attrs
from torch import Tensor, nn


@attrs.frozen
class Method:
    """A way of fine-tuning, as a plugin returns it from ``tunerkit_methods``.

    Attributes:
        name: The name that users pass to `tunerkit.wrap`.
        config: The config class: a frozen attrs class derived from `tunerkit.AdapterConfig`.
        needs_steps: Whether the method only works if optimizer steps drive it, as AdaLoRA does. Saving such an adapter
            untrained is an error.
    """

    name: str
    config: type
    needs_steps: bool = False


@attrs.frozen
class MethodInfo:
    """The distribution that provides a method.

    Attributes:
        distribution: The distribution's name, or ``"in-process"``.
        version: The distribution's version; empty for an in-process plugin.
        error: Why the plugin or the method cannot be used; None if it can.
    """

    distribution: str
    version: str
    error: str | None = None


@attrs.frozen(eq=False)
class Target:
    """A place in the model.

    Attributes:
        path: The dotted path.
        module: The module at this path.
    """

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
    """What an adapter adds to the parameters of its base layer, as dense tensors.

    Attributes:
        weight: Added to the weight, (out, in); None adds nothing.
        bias: Added to the bias, (out,); None adds nothing.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None


@attrs.frozen(eq=False)
class State:
    """What a method needs to resume training, in addition to the adapter's weights.

    Attributes:
        tensors: Tensors by name.
        values: Values that JSON can hold, by name.
    """

    tensors: Mapping[str, Tensor]
    values: Mapping[str, object]


@attrs.frozen
class RankChange:
    """One allocation, as `Tuner.history` records it.

    Attributes:
        step: The optimizer step of the allocation.
        budget: The budget in force from this step on.
        ranks: The live rank by target path.
    """

    step: int
    budget: int
    ranks: Mapping[str, int]
