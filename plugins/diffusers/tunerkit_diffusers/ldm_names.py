"""The names of a UNet's modules in Stability's original code, which Kohya's trainer uses for Stable Diffusion XL.

There, the blocks of each half are numbered through: ``input_blocks.4.1`` is ``down_blocks.1.attentions.0``.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Final

import attrs

_TOP: Final = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_MIDDLE: Final = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_RESNET: Final = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MID = re.compile(r"mid_block\.((?:resnets|attentions)\.\d+)\.(.+)")


@attrs.frozen
class _Layout:
    """How many resnets each block has, and which blocks have attention and downsamplers, by half and number."""

    resnets: Counter[tuple[str, int]]
    attention: frozenset[tuple[str, int]]
    downsampled: frozenset[tuple[str, int]]

    def start(self, half: str, block: int) -> int:
        """Return the number of a block's first part."""
        before = [(half, number) for number in range(block)]
        return sum(self.resnets[each] + (each in self.downsampled) for each in before) + (half == "down")


def ldm_names(paths: Iterable[str]) -> dict[str, str]:
    """Return the original name by path, for those modules of a UNet that have one."""
    paths = list(paths)
    layout = _layout(paths)
    found = {path: name for path in paths if (name := _TOP.get(path) or _middle(path) or _block(path, layout))}
    return found


def _layout(paths: Iterable[str]) -> _Layout:
    parts = {(m[1], int(m[2]), m[3], int(m[4])) for path in paths if (m := _BLOCK.fullmatch(path))}
    return _Layout(
        resnets=Counter((half, block) for half, block, kind, _ in parts if kind == "resnets"),
        attention=frozenset((half, block) for half, block, kind, _ in parts if kind == "attentions"),
        downsampled=frozenset((half, block) for half, block, kind, _ in parts if kind == "downsamplers"),
    )


def _middle(path: str) -> str | None:
    match = _MID.fullmatch(path)
    if match is None or match[1] not in _MIDDLE:
        return None
    return f"middle_block.{_MIDDLE[match[1]]}.{_inner(match[1], match[2])}"


def _block(path: str, layout: _Layout) -> str | None:
    match = _BLOCK.fullmatch(path)
    if match is None:
        return None
    half, block, kind, rest = match[1], int(match[2]), match[3], match[5]
    start, resnets = layout.start(half, block), layout.resnets[half, block]
    whole = "input_blocks" if half == "down" else "output_blocks"
    if kind == "downsamplers":
        return f"{whole}.{start + resnets}.0.op" if rest == "conv" else None
    if kind == "upsamplers":
        # It comes after the block's last resnet, and after the attention if there is one.
        return f"{whole}.{start + resnets - 1}.{1 + ((half, block) in layout.attention)}.{rest}"
    return f"{whole}.{start + int(match[4])}.{int(kind == 'attentions')}.{_inner(kind, rest)}"


def _inner(kind: str, rest: str) -> str:
    return _RESNET.get(rest, rest) if kind.startswith("resnets") else rest
