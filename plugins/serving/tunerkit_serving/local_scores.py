"""What the model here computes with an adapter's folder: log-probabilities of tokens, also with known mistakes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import tunerkit
from tunerkit.plugin.trainers import evaluating
from tunerkit_serving.adapter_folder import WEIGHTS, Folder
from tunerkit_serving.scaling import peft_scale

if TYPE_CHECKING:
    from torch import nn


@attrs.frozen(eq=False)
class Factors:
    """What an adapter adds to a module.

    Attributes:
        a: (r, in), or (r, vocabulary) for a lookup.
        b: (out, r).
        scale: Of their product.
        is_embedding: Whether the module looks up rows.
    """

    a: Tensor
    b: Tensor
    scale: float
    is_embedding: bool = False

    def added(self, x: Tensor) -> Tensor:
        """Return what is added to the module's output for the input ``x``: (…, in), or token ids."""
        a, b = self.a.to(x.device), self.b.to(x.device)
        first = a.T[x] if self.is_embedding else x.float() @ a.T
        return self.scale * (first @ b.T)


Adapter = Mapping[str, Factors]


def factors(folder: Folder) -> Adapter:
    """Read the matrices of a PEFT folder in float32, by the path of their module; convolutions are left out."""
    from safetensors import safe_open

    scale = peft_scale(folder)
    with safe_open(folder.path / WEIGHTS, framework="pt") as file:
        return {
            path: Factors(
                file.get_tensor(pair.a).float(), file.get_tensor(pair.b).float(), scale(path), pair.is_embedding
            )
            for path, pair in folder.pairs.items()
            if len(pair.a_shape) == len(pair.b_shape) == 2
        }


def mistakes(adapter: Adapter) -> Iterator[tuple[str, Adapter]]:
    """Yield the mistakes that engines make with all of an adapter's matrices, and what it is with them."""
    for factor in (2.0, 0.5):
        yield (
            f"the engine applies the adapter with {factor:g} times its scale: is it also merged into the served base, "
            "or its scale applied twice or not at all?",
            {path: attrs.evolve(each, scale=each.scale * factor) for path, each in adapter.items()},
        )
    for name, change in (
        ("A", lambda each: attrs.evolve(each, a=_reread(each.a))),
        ("B", lambda each: attrs.evolve(each, b=_reread(each.b))),
        ("both A and B", lambda each: attrs.evolve(each, a=_reread(each.a), b=_reread(each.b))),
        ("their product", _transposed),
    ):
        yield (
            f"the engine reads {name} of the adapter transposed: it expects another layout of the file",
            {path: change(each) for path, each in adapter.items()},
        )


def groups(adapter: Adapter) -> Mapping[str, frozenset[str]]:
    """Return which modules engines may leave out together: those of one name, and those of one layer."""
    found: dict[str, set[str]] = {}
    for path in adapter:
        parts = path.split(".")
        found.setdefault(parts[-1], set()).add(path)
        numbered = next((at for at, part in enumerate(parts) if part.isdecimal()), None)
        if numbered is not None:
            found.setdefault(".".join(parts[max(numbered - 1, 0) : numbered + 1]), set()).add(path)
    return {name: frozenset(paths) for name, paths in found.items()}


@attrs.frozen(eq=False)
class LocalModel:
    """A wrapped model, and the tokens that are scored.

    Attributes:
        model: The model.
        rows: Token ids of a prompt and its answer, in each.
        given: How many of them are the prompt.
    """

    model: "nn.Module"
    rows: Sequence[Sequence[int]]
    given: int

    def scores(self, temperature: float = 1.0) -> Tensor:
        """Return the log-probability of each token of the answers, one answer after the other."""
        drawn = [torch.tensor(row[self.given :])[:, None] for row in self.rows]
        logits = [each / temperature for each in self._logits()]
        return torch.cat(
            [each.log_softmax(-1).gather(-1, tokens)[:, 0] for each, tokens in zip(logits, drawn, strict=True)]
        )

    def scores_with(self, adapter: Adapter) -> Tensor:
        """Return the same for the base with other matrices."""
        with tunerkit.disabled(self.model), _adding(self.model, adapter):
            return self.scores()

    def likeliest(self) -> list[list[int]]:
        """Return the likeliest token at each place of the answers."""
        return [each.argmax(-1).tolist() for each in self._logits()]

    def _logits(self) -> list[Tensor]:
        """The logits for each answer: (tokens, vocabulary). Padding on the right changes nothing before it."""
        padded = pad_sequence([torch.tensor(row) for row in self.rows], batch_first=True)
        device = next(self.model.parameters()).device
        with evaluating(self.model), torch.no_grad():
            logits = self.model(input_ids=padded.to(device)).logits.float().cpu()
        return [one[self.given - 1 : len(row) - 1] for one, row in zip(logits, self.rows, strict=True)]


@contextmanager
def _adding(model: "nn.Module", adapter: Adapter) -> Iterator[None]:
    """Inside the block, the modules' outputs have what the matrices add."""

    def hook(each: Factors) -> Callable[[Any, tuple[Any, ...], Tensor], Tensor]:
        return lambda module, inputs, output: output + each.added(inputs[0]).to(output.dtype)

    with ExitStack() as hooks:
        for path, each in adapter.items():
            handle = model.get_submodule(path).register_forward_hook(hook(each))
            hooks.callback(handle.remove)
        yield


def _reread(matrix: Tensor) -> Tensor:
    """The same memory read in the other order."""
    return matrix.T.reshape(matrix.shape)


def _transposed(each: Factors) -> Factors:
    square = each.a.shape[1] == each.b.shape[0] and not each.is_embedding
    return attrs.evolve(each, a=each.b.T, b=each.a.T) if square else each
