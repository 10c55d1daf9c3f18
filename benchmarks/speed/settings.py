"""The settings of a benchmark run."""

import attrs

GAMMA = 0.5  # the regulariser's weight when it is on, PEFT's default
BLOCK_LINEARS = 7  # adapted layers in one Llama block
DRAWS = 2000  # of the bootstrap


@attrs.frozen
class Size:
    """A BERT-like encoder: layers x hidden, the MLP four times as wide, heads of 32 (below 512) or 64."""

    layers: int
    hidden: int

    @property
    def name(self) -> str:
        return f"{self.layers}x{self.hidden}"

    @property
    def heads(self) -> int:
        return max(1, self.hidden // (32 if self.hidden < 512 else 64))


def read_sizes(text: str) -> tuple[Size, ...]:
    """Sizes from "6x384,12x256". Raises `ValueError`, which names the bad size and what is allowed."""
    return tuple(_read_size(part.strip()) for part in text.split(","))


def _read_size(text: str) -> Size:
    layers, _, hidden = text.partition("x")
    if not (layers.isdecimal() and hidden.isdecimal() and int(layers) and int(hidden)):
        raise ValueError(f"expected layers x hidden, such as 6x384, got {text!r}")
    return Size(int(layers), int(hidden))


@attrs.frozen
class Settings:
    """The settings of all parts; the defaults are those of the published run.

    ``pairs`` are the rounds in which every contender takes one timed step, after ``warmup`` untimed ones. ``blocks``
    are those of the counted Llama models, ``start_blocks`` those of the model that is wrapped, saved and loaded,
    ``select_blocks`` those of the large one whose targets are selected. ``small_rows`` and
    ``small_widths`` are those of the part `small`.
    """

    sizes: tuple[Size, ...] = read_sizes("6x384,12x256,4x1024")
    pairs: int = 80  # ten designs of eight contenders, one round in ten a mask step
    warmup: int = 8
    seed: int = 0
    batch: int = 4
    tokens: int = 128
    init_rank: int = 8
    target_rank: int = 4
    blocks: tuple[int, ...] = (28, 143)
    growth_blocks: tuple[int, ...] = (4, 28, 64, 143)
    start_blocks: int = 64
    start_hidden: int = 128
    select_blocks: int = 80
    small_rows: tuple[int, ...] = (1, 8, 64)
    small_widths: tuple[int, ...] = (64, 576)
    delta_t: int = 10  # steps between two allocations, our default
    backend: str = "inductor"

    @property
    def lasting(self) -> int:
        """The length of a training in which every timed step is before the last allocation."""
        return 4 * max(self.pairs + self.warmup, 2 * self.delta_t)
