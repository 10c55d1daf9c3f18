"""An adapter as PEFT's LoRA or AdaLoRA: its products as PEFT's modules hold them, in one of several forms."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import attrs
import torch
from torch import Tensor, nn

from tunerkit.errors import first
from tunerkit.plugin import AdapterError, ConfigError, Factors, FileError, biases_of, factors_of
from tunerkit_peft.lora_reading import EPSILON
from tunerkit_peft.paths import INNER, modules_of, refuse_convolutions
from tunerkit_peft.stacks import LEVEL, Stack, packed, stacks_of
from tunerkit_peft.targets import pattern_for

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


VERSION: Final = "0.21.2"  # of peft, whose format this is
# The greatest ranks that vLLM can be started for. A server that has room for one of them takes every lower rank too.
# The lowest, 1, is left out: TGI pads each layer type to 8 and then scales the next one by an eighth.
SERVED_RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)


@attrs.frozen(eq=False)
class Written:
    """An adapter in one form.

    Attributes:
        settings: The settings of the form.
        tensors: The tensors by their names in the file, without PEFT's prefix.
        shared: Those that all targets share, without theirs.
    """

    settings: dict[str, object]
    tensors: dict[str, Tensor]
    shared: dict[str, Tensor] = attrs.field(factory=dict)


def uniform(pieces: Sequence[Piece], rank: int | None) -> Written:
    """Pad all products with zeros to one rank R, with r = lora_alpha = R: the scale is 1, whoever computes it.

    Args:
        pieces: The products.
        rank: R; None for the lowest of `SERVED_RANKS` that fits, or the largest rank if none does.

    Raises:
        ConfigError: R is below the rank of a module.
    """
    largest = max(piece.rank for piece in pieces)
    if rank is not None and rank < largest:
        raise ConfigError([f"expected >= {largest}, the largest rank of a module, got {rank} @ $.rank"])
    chosen = rank or next((each for each in SERVED_RANKS if each >= largest), largest)
    return Written(
        {"r": chosen, "lora_alpha": chosen, "rank_pattern": {}, "alpha_pattern": {}},
        dict(_named(pieces, {piece.name: chosen for piece in pieces}, {})),
    )


def compact(pieces: Sequence[Piece]) -> Written:
    """Give each module its own rank k, and multiply P by k/R with lora_alpha = R, the largest rank.

    So PEFT's scale, R/k, gives the product back; vLLM from 0.32 on and llama.cpp compute the same scale. A module of
    rank 0 gets one row and one column of zeros: PEFT does not allow rank 0, and some servers leave out a kind of layer
    if one layer lacks it. PEFT gives both projections of attention one rank.
    """
    ranks: dict[str, int] = {}
    for piece in pieces:
        ranks[piece.owner] = max(ranks.get(piece.owner, 1), piece.rank)
    largest = max(ranks.values())
    owners = list(ranks)
    return Written(
        {
            "r": largest,
            "lora_alpha": largest,
            "rank_pattern": {pattern_for(owner, owners): k for owner, k in ranks.items() if k != largest},
            "alpha_pattern": {},
        },
        dict(
            _named(
                pieces,
                {piece.name: ranks[piece.owner] for piece in pieces},
                {piece.name: ranks[piece.owner] / largest for piece in pieces},
            )
        ),
    )


def adalora(pieces: Sequence[Piece], total_steps: int) -> Written:
    """Write the singular value decomposition of each product as PEFT's AdaLoRA.

    Args:
        pieces: The products.
        total_steps: The length of the training, which PEFT wants to know.

    Raises:
        FileError: PEFT's AdaLoRA does not adapt such a module.
    """
    _refuse_others(pieces)
    triplets = {piece.name: _decomposed(piece) for piece in pieces}
    ranks = {name: len(sigma) for name, (_, sigma, _) in triplets.items()}
    initial = max(1, *ranks.values())
    average = max(1, round(sum(ranks.values()) / len(ranks)))
    tensors = {}
    for name, (p, sigma, q) in triplets.items():
        # PEFT's scale is lora_alpha / (init_r + 1e-5), and lora_alpha = init_r.
        tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = q, p
        tensors[f"{name}.lora_E"] = (sigma * ((initial + EPSILON) / initial)).unsqueeze(1)
    return Written(
        {
            "peft_type": "ADALORA",
            "init_r": initial,
            "target_r": average,
            "r": average,
            "lora_alpha": initial,
            "total_step": max(1, total_steps),
            "rank_pattern": _masks(ranks, initial),
        },
        tensors,
    )


def _masks(ranks: Mapping[str, int], initial: int) -> dict[str, list[bool]] | None:
    if all(rank == initial for rank in ranks.values()):
        return None
    return {f"{name}.lora_E": [number < rank for number in range(initial)] for name, rank in ranks.items()}


def _named(
    pieces: Sequence[Piece], ranks: Mapping[str, int], scales: Mapping[str, float]
) -> Iterator[tuple[str, Tensor]]:
    for piece in pieces:
        a, b = _padded(piece, ranks[piece.name])
        scale = scales.get(piece.name, 1.0)
        b = b if scale == 1 else b * scale
        if piece.stack is not None:
            a, b = packed(Factors(q=a, p=b), piece.stack, VERSION)
        if piece.embeds:
            yield from ((f"{piece.name}.lora_embedding_A", a), (f"{piece.name}.lora_embedding_B", b))
            continue
        if isinstance(piece.module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            kernel = piece.module.kernel_size
            a, b = a.reshape(len(a), -1, *kernel), b.reshape(*b.shape, *[1] * len(kernel))
        yield from ((f"{piece.name}.lora_A.weight", a), (f"{piece.name}.lora_B.weight", b))


def _padded(piece: Piece, rank: int) -> tuple[Tensor, Tensor]:
    """Add rows of zeros to Q and columns of zeros to P."""
    missing = rank - piece.rank
    if missing == 0:
        return piece.q, piece.p
    pad = torch.nn.functional.pad
    return pad(piece.q, (0, 0, 0, missing)), pad(piece.p, (0, missing))


def _decomposed(piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
    """P (out, k), λ (k,) and Q (k, in) with orthonormal columns and rows; what adds nothing is left out."""
    u, sigma, vh = Factors(q=piece.q, p=piece.p).triplets()
    kept = sigma > 0
    # Not in fp64 any longer: all modules together would take twice the memory.
    return u[:, kept].float(), sigma[kept], vh[kept].float()


def _refuse_others(pieces: Collection[Piece]) -> None:
    others = (nn.Embedding, nn.MultiheadAttention, nn.Conv1d, nn.Conv3d)
    if wrong := [
        f"{piece.name} ({type(piece.module).__name__})"
        if piece.stack is None
        else f"{piece.owner} (a stack of experts)"
        for piece in pieces
        if isinstance(piece.module, others) or piece.name.endswith(INNER) or piece.stack is not None
    ]:
        raise FileError(
            "\n- ".join(
                [
                    "PEFT's AdaLoRA adapts linear layers and Conv2d only; write a LoRA with form='uniform' or "
                    "form='compact', which keep the ranks:",
                    *first(wrong),
                ]
            )
        )
