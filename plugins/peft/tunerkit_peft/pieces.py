"""The products of an adapter as PEFT's modules hold them, with what PEFT cannot hold refused."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Final

import attrs
import torch
from torch import Tensor, nn

from tunerkit.errors import first
from tunerkit.plugin import AdapterError, FileError, biases_of, factors_of
from tunerkit_peft.places import INNER, modules_of, refuse_convolutions
from tunerkit_peft.stacks import LEVEL, Stack, stacks_of

if TYPE_CHECKING:
    from tunerkit.plugin import Tuner

_MERGE: Final = "Call tunerkit.unwrap(model, keep_merged=True) and save the whole model instead"


@attrs.frozen(eq=False)
class Site:
    """One adapted module.

    Attributes:
        name: What PEFT calls the module in the file: its path, or for attention's output projection a path inside.
        owner: The path that PEFT's patterns and targets use: of the module, of the attention around it, or of a
            parameter.
        module: The module.
        rank: The rank, which may be 0.
        is_parameter: Whether PEFT targets a parameter there.
    """

    name: str
    owner: str
    module: nn.Module
    rank: int
    is_parameter: bool = False


@attrs.frozen(eq=False)
class Piece:
    """The product at one module.

    Attributes:
        name: What PEFT calls the module in the file, see `Site`.
        owner: The path that PEFT's patterns and targets use.
        module: The module.
        q: (r, in), in fp32 or wider; of a stack (E, r, in).
        p: (out, r), in fp32 or wider; of a stack (E, out, r).
        stack: The stack of experts, if it is one.
    """

    name: str
    owner: str
    module: nn.Module
    q: Tensor
    p: Tensor
    stack: Stack | None = None

    @property
    def rank(self) -> int:
        """The rank r, which may be 0."""
        return self.q.shape[-2]

    @property
    def site(self) -> Site:
        """Where it is."""
        return Site(self.name, self.owner, self.module, self.rank, is_parameter=self.stack is not None)

    @property
    def embeds(self) -> bool:
        """Whether PEFT treats the module as an embedding."""
        return isinstance(self.module, nn.Embedding)


def pieces_of(tuner: "Tuner") -> list[Piece]:
    """Return what the adapter adds, module by module.

    PEFT always adapts both projections of ``nn.MultiheadAttention``, so one that is not a target gets a product of rank
    0. It adds the output projection's product twice, so half of it is written. An embedding's padding row, to which
    tunerkit adds nothing, gets zeros.

    Raises:
        FileError: PEFT cannot add these products.
        AdapterError: The method adds no products, or there are none.
    """
    modules = modules_of(tuner.model)
    if "" in modules and any(target.path == "" for target in tuner.targets):
        raise FileError(f"the model is itself a target, and PEFT adapts modules inside a model. {_MERGE}")
    refuse_convolutions("this adapter", modules, [target.path for target in tuner.targets], "LORA", _MERGE)
    products = factors_of(tuner)
    if not products:
        raise AdapterError("the adapter adds nothing to any weight, so there is no LoRA to write")
    stacks = {path: stack for path, stack in stacks_of(modules).items() if path in products}
    names = _nested(stacks.values())
    found = [
        Piece(names[path], stack.owner, modules[path], q, p, stack)
        if (stack := stacks.get(path))
        else _piece(path, q, p, modules)
        for path, (q, p) in products.items()
    ]
    return [*found, *_other_halves(found, modules)]


def _nested(stacks: Iterable[Stack]) -> dict[str, str]:
    """The names of PEFT's wrappers around the parameters of experts: those of the first one are the innermost."""
    groups: dict[str, list[Stack]] = defaultdict(list)
    for stack in stacks:
        groups[stack.experts].append(stack)
    return {
        stack.path: experts + LEVEL * depth
        for experts, own in groups.items()
        for depth, stack in enumerate(reversed(own))
    }


def _piece(path: str, q: Tensor, p: Tensor, modules: Mapping[str, nn.Module]) -> Piece:
    module = modules[path]
    around, _, leaf = path.rpartition(".")
    if leaf == "out_proj" and isinstance(modules.get(around), nn.MultiheadAttention):
        return Piece(around + INNER, around, module, q, p / 2)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None and q.shape[0]:
        q = q.clone()
        q[:, module.padding_idx] = 0
    return Piece(path, path, module, q, p)


def _other_halves(found: list[Piece], modules: Mapping[str, nn.Module]) -> Iterator[Piece]:
    names = {piece.name for piece in found}
    for piece in found:
        if piece.name.endswith(INNER) and piece.owner not in names:
            attention = modules[piece.owner]
            assert isinstance(attention, nn.MultiheadAttention)
            yield _empty(piece.owner, piece.owner, attention, attention.embed_dim, 3 * attention.embed_dim)
        elif isinstance(piece.module, nn.MultiheadAttention) and piece.name + INNER not in names:
            size = piece.module.embed_dim
            yield _empty(piece.name + INNER, piece.name, piece.module.out_proj, size, size)


def _empty(name: str, owner: str, module: nn.Module, inputs: int, outputs: int) -> Piece:
    return Piece(name, owner, module, torch.zeros(0, inputs), torch.zeros(outputs, 0))


def are_tied(sites: Collection[Site]) -> bool:
    """Whether two of the modules share one weight."""
    weights = [id(site.module.weight) for site in sites if hasattr(site.module, "weight")]  # attention has another
    return len(set(weights)) < len(weights)


@attrs.frozen(eq=False)
class Biases:
    """Trained biases.

    Attributes:
        tensors: Their tensors by name in the file.
        setting: PEFT's setting ``bias``; for those of the targets alone, the word of the type.
    """

    tensors: dict[str, Tensor]
    setting: str


def trained_biases(tuner: "Tuner", sites: Collection[Site], word: str) -> Biases:
    """Return the trained biases.

    Args:
        tuner: The adapter.
        sites: The adapted modules.
        word: PEFT's value of ``bias`` for those of the targets; empty if its type trains none.

    Raises:
        FileError: The bias of attention's projections is trained, which PEFT does not save; or the type trains none.
    """
    trained = biases_of(tuner)
    modules = modules_of(tuner.model)
    if lost := [path for path in trained if isinstance(modules[path], nn.MultiheadAttention)]:
        raise FileError(
            "\n- ".join(
                [
                    "PEFT does not save the bias of the projections of nn.MultiheadAttention, which this adapter "
                    f"trains. {_MERGE}:",
                    *first(lost),
                ]
            )
        )
    if trained and not word:
        title = f"PEFT trains no biases with this type of adapter, and this one does. {_MERGE}:"
        raise FileError("\n- ".join([title, *first([*trained])]))
    targets = {_path(site): f"{site.name}.base_layer.bias" for site in sites}
    named = {targets.get(path, f"{path}.bias"): bias for path, bias in trained.items()}
    inside = all(path in targets for path in trained)
    return Biases(named, "none" if not trained else word if inside else "all")


def _path(site: Site) -> str:
    return f"{site.owner}.out_proj" if site.name.endswith(INNER) else site.name
