"""The form in which engines read experts: two matrices for each expert and projection, as if each were a module.

A stack of gate and up becomes both projections, which have one A: B's rows are split as the stack's rows are.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

import attrs
import torch
from torch import Tensor, nn

from tunerkit.errors import first, shown
from tunerkit.plugin import BaseMismatchError, FileError
from tunerkit_peft.lora_reading import rules_for
from tunerkit_peft.lora_writing import Piece
from tunerkit_peft.paths import Place, Rename
from tunerkit_peft.settings import Settings
from tunerkit_peft.stacks import GATED, Stack
from tunerkit_peft.tensors import Parts, Turned, Weights, wrong_parts

# The names in the checkpoints of Mixtral and its like, which engines have kept, by those of all others.
_OLD: Final = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_WITH_OLD: Final = ("mixtral", "minimax", "minimax_m2", "phimoe")  # values of transformers' ``config.model_type``
_BLOCKS: Final = (".mlp.", ".block_sparse_moe.")
_NAME: Final = re.compile(r"(?P<experts>.+)\.(?P<index>\d+)\.(?P<leaf>\w+)")


def split(pieces: Sequence[Piece], model: nn.Module) -> list[Piece]:
    """Split the products at stacks into those of single experts and projections. Other products stay as they are."""
    config: Any = getattr(model, "config", None)
    old = getattr(config, "model_type", "") in _WITH_OLD
    return [single for piece in pieces for single in _singles(piece, old=old)]


def _singles(piece: Piece, *, old: bool) -> Iterator[Piece]:
    stack = piece.stack
    if stack is None:
        yield piece
        return
    experts = f"{stack.experts}.".replace(*_BLOCKS) if old else f"{stack.experts}."
    leaves = _leaves(stack)
    for number in range(stack.count):
        p = piece.p[number]
        rows = [p] if len(leaves) == 1 else p.chunk(2) if stack.is_concatenated else (p[::2], p[1::2])
        for leaf, own in zip(leaves, rows, strict=True):
            name = f"{experts}{number}.{_OLD.get(leaf, leaf) if old else leaf}"
            yield Piece(name, name, piece.module, piece.q[number], own)


def _leaves(stack: Stack) -> tuple[str, ...]:
    """The projections of a stack, in the order of its rows."""
    return ("gate_proj", "up_proj") if stack.parameter == GATED else (stack.parameter,)


@attrs.frozen(eq=False)
class Single:
    """The matrices of one projection of one expert.

    Attributes:
        name: Its path in the file.
        keys: The names of its tensors by part.
        stack: The stack that holds its weight.
        index: The expert's number.
        leaf: The projection's name, such as ``"gate_proj"``.
    """

    name: str
    keys: Mapping[str, str]
    stack: Stack
    index: int
    leaf: str

    @staticmethod
    def match(name: str, experts: Collection[str]) -> re.Match[str] | None:
        """Match a path that may be an expert's: its groups are ``experts``, as in this model, ``index`` and ``leaf``.

        Args:
            name: The path.
            experts: The paths of the model's experts modules.
        """
        new, old = _BLOCKS
        is_old = any(old in path for path in experts)
        return _NAME.fullmatch(name if is_old else name.replace(old, new))


def single_of(
    name: str, keys: Mapping[str, str], groups: Mapping[str, Sequence[Stack]], rename: Rename
) -> Single | None:
    """Return what a path of a file is in a model with stacks, by the path of their experts; None if it is no expert."""
    found = Single.match(name, groups)
    if found is None:
        return None
    leaf = next((own for own, old in _OLD.items() if found["leaf"] == old), found["leaf"])
    for stack in groups.get(rename(found["experts"]), ()):
        if leaf in _leaves(stack):
            return Single(name, keys, stack, int(found["index"]), leaf)
    return None


def as_stacks(settings: Settings, weights: Weights, singles: Iterable[Single]) -> tuple[list[Parts], dict[str, Turned]]:
    """Join the matrices of single experts.

    Gate and up with one A have one in the stack too. If their A's differ, the stack's has both, and twice the rank.

    Returns:
        The parts at the stacks, A (E, r, in) and B (E, out, r), and these tensors by the names of some of the file's.

    Raises:
        FileError: Experts are missing, or have several ranks or scales.
        BaseMismatchError: Their matrices have other sizes than the model's.
    """
    found: dict[str, list[Single]] = defaultdict(list)
    for single in singles:
        found[single.stack.path].append(single)
    if damaged := [line for own in found.values() for line in _damaged(settings, own)]:
        raise FileError("\n- ".join([f"{weights.file} is damaged or incomplete:", *first(damaged)]))
    parts, turned = [], {}
    for path, own in found.items():
        stack, rank = own[0].stack, _rank(settings, weights, own)
        leaves = _leaves(stack)
        table = {(single.leaf, single.index): single.keys for single in own}
        grid = [[table[leaf, number] for number in range(stack.count)] for leaf in leaves]
        shared = all(_one_a(weights, keys) for keys in zip(*grid, strict=True))
        wide = rank if shared else len(leaves) * rank
        keys = grid[0][0]
        parts.append(Parts(Place(path, own[0].name, times=1), name=path, names=keys, rank=rank, is_stack=True))
        a, b = partial(_joined_a, weights, grid, shared), partial(_joined_b, weights, grid, shared, stack)
        turned[keys["A"]] = Turned((stack.count, wide, stack.in_features), a)
        turned[keys["B"]] = Turned((stack.count, stack.out_features, wide), b)
    return parts, turned


def _damaged(settings: Settings, singles: Sequence[Single]) -> Iterator[str]:
    stack = singles[0].stack
    for single in singles:
        yield from wrong_parts(single.keys, ("A", "B"), settings.common.file)
    there = {(single.leaf, single.index) for single in singles}
    for leaf in _leaves(stack):
        for number in range(stack.count):
            if (leaf, number) not in there:
                yield f"{stack.experts}.{number}.{leaf} is missing, and others of the same stack are there"
    if more := {number for _, number in there if number >= stack.count}:
        yield f"{stack.experts} has {stack.count} experts, and the file has number {max(more)}"


def _rank(settings: Settings, weights: Weights, singles: Sequence[Single]) -> int:
    """The rank that all experts of a stack have, with shapes and scales checked."""
    stack = singles[0].stack
    out = stack.out_features // len(_leaves(stack))
    shapes = {(weights.shape(each.keys["A"]), weights.shape(each.keys["B"])): each for each in singles}
    rules = rules_for(settings, [each.name for each in singles])
    if len(shapes) == 1 and len({*rules.values()}) == 1:
        ((a, b),) = shapes
        if len(a) == len(b) == 2 and a[0] == b[1] and (a[1], b[0]) == (stack.in_features, out):
            return a[0]
    listed = [f"{each.name}: A {[*a]}, B {[*b]}, alpha {rules[each.name].alpha:g}" for (a, b), each in shapes.items()]
    fitting = all((a[-1], b[0]) == (stack.in_features, out) for a, b in shapes)
    if fitting:
        raise FileError(
            "\n- ".join(
                [
                    f"{weights.file}: the experts of {shown(stack.owner)} have several ranks or scales, and a stack "
                    "has one. Merge the adapter in PEFT (merge_and_unload), and use the merged model as the base:",
                    *first(listed),
                ]
            )
        )
    raise BaseMismatchError(
        "\n- ".join(
            [
                f"{weights.file} was made for another base model: the experts of {shown(stack.owner)} need A "
                f"[r, {stack.in_features}] and B [{out}, r] here:",
                *first(listed),
            ]
        )
    )


def _one_a(weights: Weights, keys: Sequence[Mapping[str, str]]) -> bool:
    a = [weights.tensor(each["A"]) for each in keys]
    return all(torch.equal(a[0], other) for other in a[1:])


def _stacked(weights: Weights, row: Sequence[Mapping[str, str]], part: str) -> Tensor:
    return torch.stack([weights.tensor(keys[part]) for keys in row])


def _joined_a(weights: Weights, grid: Sequence[Sequence[Mapping[str, str]]], shared: bool) -> Tensor:
    return torch.cat([_stacked(weights, row, "A") for row in (grid[:1] if shared else grid)], dim=1)


def _joined_b(weights: Weights, grid: Sequence[Sequence[Mapping[str, str]]], shared: bool, stack: Stack) -> Tensor:
    """B (E, out, r) of the rows of all projections."""
    own = [_stacked(weights, row, "B") for row in grid]
    if not shared:  # each projection reads its own rows of A
        rank = own[0].shape[-1]
        pad = nn.functional.pad
        own = [pad(b, (number * rank, (len(own) - 1 - number) * rank)) for number, b in enumerate(own)]
    if stack.is_concatenated:
        return torch.cat(own, dim=1)
    return torch.stack(own, dim=2).flatten(1, 2)
