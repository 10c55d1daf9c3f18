"""The arithmetic for models that are not at hand: memory of a process and bytes of a step, from shapes alone."""

from collections.abc import Sequence

import attrs

GB = 1e9
_VALUE = 4  # bytes of fp32


@attrs.frozen
class Model:
    """The adapted matrices of a model: how many there are of each (out, in)."""

    name: str
    matrices: Sequence[tuple[int, int, int]]

    @property
    def row(self) -> int:
        """The values that one rank adds over all targets: P's column and Q's row."""
        return sum(count * (rows + columns) for count, rows, columns in self.matrices)

    @property
    def targets(self) -> int:
        """How many matrices are adapted."""
        return sum(count for count, _, _ in self.matrices)


def block(layers: int, hidden: int, kv: int, inner: int, queries: int | None = None) -> list[tuple[int, int, int]]:
    """The seven matrices of a decoder's blocks; without the MLP if ``inner`` is 0."""
    q = queries or hidden
    attention = [(layers, q, hidden), (2 * layers, kv, hidden), (layers, hidden, q)]
    return attention + ([(2 * layers, inner, hidden), (layers, hidden, inner)] if inner else [])


MODELS = (
    Model("70B (80 layers of 8,192; MLP 28,672)", block(80, 8192, 1024, 28672)),
    Model("400B MoE (48 layers of 5,120), attention", block(48, 5120, 1024, 0)),
    Model(
        "400B MoE, also 128 experts of 8,192 in 24 layers",
        block(48, 5120, 1024, 0) + block(24 * 128, 5120, 0, 8192)[3:],
    ),
)
HEAD = (
    *("model", "ranks", "targets", "values, millions", "GB while pruning", "GB after"),
    *("GB sent a step, 8 GPUs", "64 GPUs", "kB a broadcast of scores", "GB of a checkpoint"),
)


def main() -> None:
    """Print one row for each model and pair of ranks."""
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for model in MODELS:
        for start, final in ((12, 8), (24, 16)):
            print(f"| {model.name} | {start} to {final} | {' | '.join(cells(model, start, final))} |")


def cells(model: Model, start: int, final: int) -> list[str]:
    """The cells of one row.

    While pruning a process holds values, gradients, Adam's two moments and AdaLoRA's two averages, all in fp32; after
    it the values that are left, without averages. A ring sends 2 (N - 1) / N times what it reduces.
    """
    values = model.row * start
    sent = [2 * (number - 1) / number * values * _VALUE / GB for number in (8, 64)]
    return [
        f"{model.targets:,}",
        f"{values / 1e6:,.0f}",
        f"{6 * values * _VALUE / GB:.1f}",
        f"{4 * model.row * final * _VALUE / GB:.1f}",
        *(f"{each:.2f}" for each in sent),
        f"{model.targets * start * _VALUE / 1e3:,.0f}",
        f"{model.row * final * _VALUE / GB:.2f}",
    ]
