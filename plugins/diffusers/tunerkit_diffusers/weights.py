"""The weights of a file: read, checked against the model, and handed to tunerkit as LoRA."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs
import torch
from torch import Tensor

from tunerkit.errors import shown
from tunerkit.plugin import BaseMismatchError, Factors, FileError, Foreign
from tunerkit_diffusers.keys import Parts
from tunerkit_diffusers.lora_file import tensors_of
from tunerkit_diffusers.peft_patterns import own_patterns
from tunerkit_diffusers.places import Place


@attrs.frozen(eq=False)
class Pair:
    """What a file adds to one module.

    Attributes:
        a: (r, in).
        b: (out, r).
        alpha: The file's alpha; None if it has none here.
    """

    a: Tensor
    b: Tensor
    alpha: float | None

    @property
    def rank(self) -> int:
        """The rank, r."""
        return self.a.shape[0]


def pairs_of(file: Path, modules: Mapping[str, Parts], places: Mapping[str, Place]) -> dict[str, Pair]:
    """Read what a file adds to each module, by its path.

    Raises:
        FileError: A half of a pair is missing; a tensor is damaged; an alpha is not a positive number.
        BaseMismatchError: The shapes are not those of the model.
    """
    for path, parts in modules.items():
        refuse_missing(path, parts, file)
    tensors = tensors_of(file, [name for parts in modules.values() for name in parts.values()])
    return {path: _pair(tensors, parts, places[path], file) for path, parts in modules.items()}


def refuse_missing(path: str, parts: Parts, file: Path) -> None:
    """Raise `FileError` if a half of the pair of a module is missing."""
    for half, name in (("down", "lora_down or lora_A"), ("up", "lora_up or lora_B")):
        if half not in parts:
            raise FileError(
                f"{file}: {next(iter(parts.values()))!r} is there, and the {name} of {path!r} is missing; the "
                "file is incomplete, fetch or export it again"
            )


def _pair(tensors: Mapping[str, Tensor], parts: Parts, place: Place, file: Path) -> Pair:
    down, up = tensors[parts["down"]], tensors[parts["up"]]
    if "mid" in parts:
        down = _composed(down, tensors[parts["mid"]], parts, place, file)
    _refuse_misfit(down.shape, place.inner, parts["down"], f"(r, {', '.join(map(str, place.inner))})", place, file)
    rank = down.shape[0]
    out = (place.out, rank)
    if _stripped(up.shape) != _stripped(out):
        raise BaseMismatchError(_misfit(up.shape, parts["up"], f"{out}", place, file))
    if rank == 0:
        raise FileError(f"{file}: {parts['down']!r} has rank 0, which adds nothing; remove the tensors of this module")
    return Pair(down.reshape(rank, place.in_features), up.reshape(out), _alpha(tensors, parts, rank, file))


def _alpha(tensors: Mapping[str, Tensor], parts: Parts, rank: int, file: Path) -> float | None:
    if "alpha" not in parts:
        return None
    alpha = tensors[parts["alpha"]]
    if alpha.numel() != 1 or alpha.item() <= 0:
        raise FileError(
            f"{file}: {parts['alpha']!r} must be a number above 0, got {shown(alpha.tolist())}; remove it to "
            f"scale by 1, or set it (the scale is alpha / {rank})"
        )
    return float(alpha.item())


def _composed(down: Tensor, mid: Tensor, parts: Parts, place: Place, file: Path) -> Tensor:
    """Multiply a kernel in between, (r, r, *kernel), into (r, in): LyCORIS's Tucker form of a convolution."""
    kernel = tuple(place.inner[1:])
    ranks = (down.shape[0],) * 2
    _refuse_misfit(down.shape, place.inner[:1], parts["down"], f"(r, {place.inner[0]})", place, file)
    if place.is_linear or tuple(mid.shape) != (*ranks, *kernel):
        raise BaseMismatchError(_misfit(mid.shape, parts["mid"], f"{(*ranks, *kernel)}", place, file))
    return torch.einsum("ij...,jc->ic...", mid, down.reshape(down.shape[0], place.inner[0]))


def _refuse_misfit(
    shape: torch.Size, inner: tuple[int, ...], name: str, expected: str, place: Place, file: Path
) -> None:
    # Files hold 1×1 convolutions as linear layers, and the other way round.
    if not shape or _stripped(shape[1:]) != _stripped(inner):
        raise BaseMismatchError(_misfit(shape, name, expected, place, file))


def _misfit(shape: torch.Size, name: str, expected: str, place: Place, file: Path) -> str:
    return (
        f"{file}: {name!r} has shape {tuple(shape)}, expected {expected} for {place.path!r}; load it onto the model "
        "that it was trained on"
    )


def _stripped(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without the ones at its end."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return tuple(shape)


@attrs.frozen(eq=False)
class _Products(Mapping[str, Factors]):
    """Products that are multiplied when they are asked for."""

    pairs: Mapping[str, Pair]
    scales: Mapping[str, float]

    def __getitem__(self, path: str) -> Factors:
        pair = self.pairs[path]
        return Factors(q=pair.a, p=pair.b * self.scales[path])

    def __iter__(self) -> Iterator[str]:
        return iter(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)


def as_lora(
    pairs: Mapping[str, Pair],
    alphas: Mapping[str, float],
    *,
    rslora: bool = False,
    dropout: float = 0.0,
    base: str = "",
    remarks: tuple[str, ...] = (),
) -> Foreign:
    """Return the adapter as LoRA, with the ranks and the scales of the file.

    Args:
        pairs: What is added to each module, by path.
        alphas: Alpha by path. The scale is alpha/r, or alpha/√r with ``rslora``.
        rslora: How to scale.
        dropout: The share of inputs that training drops.
        base: The name of the base model.
        remarks: What the user should know.
    """
    ranks = {path: pair.rank for path, pair in pairs.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    names = own_patterns(pairs)
    scales = {path: alphas[path] / (each**0.5 if rslora else each) for path, each in ranks.items()}
    config = {
        "rank": rank,
        "alpha": alpha,
        "rank_pattern": {names[path]: each for path, each in ranks.items() if each != rank},
        "alpha_pattern": {names[path]: each for path, each in alphas.items() if each != alpha},
        "dropout": dropout,
        "rslora": rslora,
    }
    tensors = {path: {"a": pair.a, "b": pair.b} for path, pair in pairs.items()}
    return Foreign(_Products(pairs, scales), "lora", config=config, tensors=tensors, base=base, remarks=remarks)


def other_parts(groups: Mapping[str, Mapping[str, Parts]], chosen: str) -> tuple[str, ...]:
    """Return a remark for each part of the pipeline that a file adapts besides the chosen one."""
    return tuple(
        f"the file also adapts {part!r}, another model of the pipeline, at {len(modules)} modules; load it there too"
        for part, modules in groups.items()
        if part != chosen
    )
