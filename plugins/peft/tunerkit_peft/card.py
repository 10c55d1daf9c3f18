"""The model card: a README that says what the adapter is, and how to load it."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from tunerkit_peft.lora_writing import Site, are_tied

if TYPE_CHECKING:
    from tunerkit.plugin import Tuner

MARK: Final = "<!-- written by tunerkit -->"  # core replaces a card only if it has this
_REPOSITORY: Final = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_KINDS: Final = {"ADALORA": "PEFT's AdaLoRA", "LORA": "a PEFT LoRA"}
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


def card(tuner: "Tuner", base: str, settings: Mapping[str, object], sites: Sequence[Site]) -> str:
    """Write the card.

    Args:
        tuner: The adapter.
        base: The name of the base model; may be empty.
        settings: The settings of the form.
        sites: The adapted modules.
    """
    kind = _KINDS.get(str(settings["peft_type"]), f"PEFT's {settings['peft_type']}")
    base_line = f"- Base model: {_code(base)}" if base else "- Base model: not recorded"
    copies = (
        [f"- Trained in full: {', '.join(map(_code, sorted(place.path for place in tuner.copies)))}"]
        if tuner.copies
        else []
    )
    return "\n".join(
        [
            *_front_matter(base, "lora" if kind in _KINDS.values() else str(settings["peft_type"]).lower()),
            MARK,
            "",
            "# Adapter",
            "",
            f"Trained with tunerkit (method {_code(tuner.method)}, {tuner.steps} steps), written as {kind}.",
            "",
            base_line,
            f"- Modules: {len(sites)}{_ranks(settings, sites)}",
            *copies,
            *_tied(sites),
            "",
            *_table(sites),
            "",
            _LOADING,
        ]
    )


def _ranks(settings: Mapping[str, object], sites: Sequence[Site]) -> str:
    written = settings.get("init_r", settings.get("r"))
    known = [site.rank for site in sites]
    return f", ranks {_range(known)}; `r` in the files is {written}" if written and any(known) else ""


def _tied(sites: Sequence[Site]) -> list[str]:
    if not are_tied(sites):
        return []
    return [
        "- Two of the modules share one weight. Each has its own part of the adapter, so PEFT's `merge_and_unload` is "
        "wrong here: it adds both parts to the shared weight"
    ]


def _front_matter(base: str, kind: str) -> list[str]:
    known = [f"base_model: {json.dumps(base)}"] if _REPOSITORY.fullmatch(base) else []
    return ["---", *known, "library_name: peft", "tags:", f"- {kind}", "- peft", "- tunerkit", "---"]


def _table(sites: Sequence[Site]) -> list[str]:
    """One line for each name of modules, with the ranks that they have in the layers."""
    ranks: dict[str, list[int]] = {}
    for site in sites:
        path = site.owner if site.is_parameter else site.name
        ranks.setdefault(path.rpartition(".")[2], []).append(site.rank)
    rows = [f"| {_code(name)} | {len(own)} | {_range(own)} |" for name, own in ranks.items()]
    return ["| Modules | Number | Rank |", "|---|---|---|", *rows]


def _range(ranks: Sequence[int]) -> str:
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low} to {high}"


def _code(text: str) -> str:
    return f"`{' '.join(text.replace('`', ' ').replace('|', ' ').split())}`"
