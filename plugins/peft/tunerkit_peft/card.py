"""The model card: a README that says what the adapter is, and how to load it."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from tunerkit_peft.pieces import Piece, are_tied

if TYPE_CHECKING:
    from tunerkit.plugin import Tuner

MARK: Final = "<!-- written by tunerkit -->"  # core replaces a card only if it has this
_REPOSITORY: Final = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_LOADING: Final = """\
## Loading

```python
import peft

model = peft.PeftModel.from_pretrained(base_model, "path/of/this/folder")
```

```python
import tunerkit  # with tunerkit-peft installed

model = tunerkit.load(base_model, "path/of/this/folder")
```
"""


def card(tuner: "Tuner", base: str, settings: Mapping[str, object], pieces: Sequence[Piece]) -> str:
    """Write the card.

    Args:
        tuner: The adapter.
        base: The name of the base model; may be empty.
        settings: The settings of the form.
        pieces: The products.
    """
    kind = "PEFT's AdaLoRA" if settings.get("peft_type") == "ADALORA" else "a PEFT LoRA"
    base_line = f"- Base model: {_code(base)}" if base else "- Base model: not recorded"
    copies = (
        [f"- Trained in full: {', '.join(map(_code, sorted(place.path for place in tuner.copies)))}"]
        if tuner.copies
        else []
    )
    return "\n".join(
        [
            *_front_matter(base),
            MARK,
            "",
            "# Adapter",
            "",
            f"Trained with tunerkit (method {_code(tuner.method)}, {tuner.steps} steps), written as {kind}.",
            "",
            base_line,
            f"- Modules: {len(pieces)}, ranks {_range([piece.rank for piece in pieces])}; `r` in the files is "
            f"{settings['r'] if 'init_r' not in settings else settings['init_r']}",
            *copies,
            *_tied(pieces),
            "",
            *_table(pieces),
            "",
            _LOADING,
        ]
    )


def _tied(pieces: Sequence[Piece]) -> list[str]:
    if not are_tied(pieces):
        return []
    return [
        "- Two of the modules share one weight. Each has its own part of the adapter, so PEFT's `merge_and_unload` is "
        "wrong here: it adds both parts to the shared weight"
    ]


def _front_matter(base: str) -> list[str]:
    known = [f"base_model: {json.dumps(base)}"] if _REPOSITORY.fullmatch(base) else []
    return ["---", *known, "library_name: peft", "tags:", "- lora", "- peft", "- tunerkit", "---"]


def _table(pieces: Sequence[Piece]) -> list[str]:
    """One line for each name of modules, with the ranks that they have in the layers."""
    ranks: dict[str, list[int]] = {}
    for piece in pieces:
        ranks.setdefault(piece.name.rpartition(".")[2], []).append(piece.rank)
    rows = [f"| {_code(name)} | {len(own)} | {_range(own)} |" for name, own in ranks.items()]
    return ["| Modules | Number | Rank |", "|---|---|---|", *rows]


def _range(ranks: Sequence[int]) -> str:
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low} to {high}"


def _code(text: str) -> str:
    return f"`{' '.join(text.replace('`', ' ').replace('|', ' ').split())}`"
