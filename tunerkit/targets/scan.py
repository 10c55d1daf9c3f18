"""A survey of a model: its modules by path, its parameters and which are shared, and its output heads."""

from collections import defaultdict
from collections.abc import Collection, Mapping

import attrs
from torch import nn

from tunerkit.libraries import identity, read_children, torch_private
from tunerkit.paths import is_injected, is_number, is_under, join, layer_number, parent

# Names of output heads in transformers, timm and torchvision. A head is found by name only before the first numbered
# block: a "score" or "head" inside a block belongs to its attention. "proj_out" is missing on purpose: Whisper's is
# found through get_output_embeddings, and in diffusion models it is an ordinary projection.
OUTPUT_HEADS = frozenset({"head", "lm_head", "score", "classifier", "qa_outputs", "cls", "embed_out", "predictions"})
OUTPUT_HEADS |= {"pre_classifier", "vocab_transform", "vocab_projector", "logits_proj"}
_HEAD_ENDINGS = ("_head", "_heads", "_classifier", "_predictions")


@attrs.frozen(eq=False)
class Place:
    """A module of the model; ``paths`` has several entries where one module is registered at several places.

    ``owners`` are the modules it is registered in, each once.
    """

    paths: tuple[str, ...]
    module: nn.Module
    owners: tuple[nn.Module, ...]

    @property
    def path(self) -> str:
        return self.paths[0]

    @property
    def inside_attention(self) -> bool:
        """Whether torch's attention holds it in a form that is not known to read it."""
        return any(isinstance(owner, nn.MultiheadAttention) and not read_children(owner) for owner in self.owners)

    @property
    def is_read(self) -> bool:
        """Whether a module that holds it is known to read its weight past its forward."""
        names = {path.rpartition(".")[2] for path in self.paths}
        return any(not names.isdisjoint(read_children(owner)) for owner in self.owners)

    @property
    def read_and_called(self) -> bool:
        """Whether several modules hold it, and one of them is known to read its weight past its forward."""
        return len(self.owners) > 1 and self.is_read


@attrs.frozen(eq=False)
class Survey:
    """What selection reads of a model, gathered once."""

    places: tuple[Place, ...]
    parameters: Mapping[str, nn.Parameter]
    sharers: Mapping[int, tuple[str, ...]]
    heads: Collection[str]


def survey(model: nn.Module) -> Survey:
    """Gather what target selection reads of ``model``, once; adapters already in it are left out."""
    by_path = dict(model.named_modules(remove_duplicate=False))
    paths_of: dict[int, list[str]] = defaultdict(list)
    for path, module in by_path.items():
        if module is not model and not is_injected(path):
            paths_of[id(module)].append(path)
    places = tuple(
        Place(
            paths=tuple(paths),
            module=by_path[paths[0]],
            owners=tuple({id(owner): owner for owner in (by_path[parent(path)] for path in paths)}.values()),
        )
        for paths in paths_of.values()
    )
    parameters = {name: parameter for name, parameter in model.named_parameters() if not is_injected(name)}
    return Survey(places, parameters, tied(model), _head_paths(by_path))


def _head_paths(by_path: Mapping[str, nn.Module]) -> frozenset[str]:
    """The paths of output heads, as the model (or a model inside it) names them itself, or by their names."""
    heads: set[int] = set()
    for module in by_path.values():
        for question in ("get_output_embeddings", "get_classifier"):
            ask = getattr(module, question, None)
            answer = ask() if callable(ask) and not isinstance(ask, nn.Module) else None  # a child may have any name
            answers = answer if isinstance(answer, list | tuple) else (answer,)
            heads.update(id(head) for head in answers if isinstance(head, nn.Module) and head is not by_path[""])
    return frozenset(path for path, module in by_path.items() if id(module) in heads or _is_head_name(path))


def _is_head_name(path: str) -> bool:
    *before, name = path.split(".")
    return not any(map(is_number, before)) and (name in OUTPUT_HEADS or name.endswith(_HEAD_ENDINGS))


def is_linear(module: nn.Module) -> bool:
    """Whether ``"all-linear"`` means this module: nn.Linear, attention's projection, Conv1D, or one by its sizes."""
    return (
        isinstance(module, nn.Linear | nn.MultiheadAttention)
        or any(cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers") for cls in type(module).__mro__)
        or all(isinstance(getattr(module, size, None), int) for size in ("in_features", "out_features"))
    )


def may_be_linear(place: Place) -> bool:
    """Whether someone who says all linear layers may mean this module, also a router with a matrix of its own."""
    module = place.module
    if isinstance(module, nn.Embedding | nn.EmbeddingBag | nn.LayerNorm) or torch_private.is_convolution(module):
        return False
    weight = torch_private.own_parameters(module).get("weight")
    return is_linear(module) or (weight is not None and weight.ndim == 2)


def default_convolutions(scanned: Survey) -> tuple[Place, ...]:
    """The convolutions of a model whose numbered blocks hold some, and no linear layer; none of any other model.

    A model that numbers no block has all its convolutions taken, if they are all it has beside its head. Depthwise
    ones are left out: their matrix is as narrow as one kernel, so a low rank saves nothing.
    """
    body = [place for place in scanned.places if not any(is_under(path, scanned.heads) for path in place.paths)]
    blocks = [place for place in body if layer_number(place.path) is not None]
    found = [place for place in blocks if _is_wide_convolution(place.module)]
    if not found:
        blocks, found = body, [place for place in body if _is_wide_convolution(place.module)]
    return () if any(is_linear(place.module) for place in blocks) else tuple(found)


def _is_wide_convolution(module: nn.Module) -> bool:
    return torch_private.is_convolution(module) and (module.groups == 1 or module.groups < module.in_channels)


def tied(model: nn.Module) -> Mapping[int, tuple[str, ...]]:
    """The parameters that several modules hold: ``id(parameter)`` to the full names, adapters' own left out."""
    names: dict[int, list[str]] = defaultdict(list)
    keys: dict[int, int] = {}
    for path, module in model.named_modules():
        if not is_injected(path):
            for name, parameter in torch_private.own_parameters(module).items():
                if parameter is not None:
                    keys[id(parameter)] = identity(module, name, parameter)
                    names[keys[id(parameter)]].append(join(path, name))
    return {own: tuple(names[key]) for own, key in keys.items() if len(names[key]) > 1}
