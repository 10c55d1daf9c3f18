"""Print the results of the commands on adapters: as lines, or as JSON."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
from rich.console import Console

from tunerkit.paths import few
from tunerkit_cli.telling import say

if TYPE_CHECKING:  # they import torch, and `tunerkit show` does not
    from tunerkit_cli.converting.comparison import Compared
    from tunerkit_cli.converting.conversion import Converted
    from tunerkit_cli.converting.verification import Verified

OWN = "tunerkit"  # the name of our own format
_SHOWN = 10  # targets in a list


def print_converted(found: "Converted", *, as_json: bool) -> None:
    """Print what was written."""
    facts = {
        "format": found.format,
        "written": f"{found.out} ({', '.join(found.files)})" if found.files != (found.out,) else found.out,
        "method": found.method,
        "base": "" if found.format in (OWN, "lora") else found.base,  # our own file does not hold it
        "ranks": ranks_in_words(found.ranks),
        "size": size_in_words(found.size),
    }
    if found.error is not None:
        path, largest = next(iter(found.errors.items()))
        facts["error"] = f"{found.error:.2e} of what it adds (Frobenius norm); the largest is {largest:.2e}, at {path}"
    print_facts(attrs.asdict(found), facts, as_json=as_json)


def print_verified(found: "Verified", *, as_json: bool) -> None:
    """Print the differences."""
    effect = "none: A changes no output" if found.of_effect is None else f"{found.of_effect:.2e} of the effect of A"
    facts = {
        "compared": f"{found.outputs:,} outputs, the largest {found.largest:.4g}",
        "difference": f"{found.difference:.2e} at most",
        "relative": f"{found.relative:.2e} of the largest output, {effect}",
        "verdict": f"{'equal within' if found.is_equal else 'differ by more than'} {found.tolerance:g}",
    }
    print_facts(attrs.asdict(found), facts, as_json=as_json)


def print_compared(found: "Compared", *, as_json: bool) -> None:
    """Print how two adapters differ."""
    facts = {
        "method": " and ".join(dict.fromkeys(found.methods)),
        "settings": "; ".join(f"{name}: {a} and {b}" for name, (a, b) in found.settings.items()),
        "only in A": few(found.only[0], shown=_SHOWN),
        "only in B": few(found.only[1], shown=_SHOWN),
        "ranks": few([f"{path}: {a} and {b}" for path, (a, b) in found.ranks.items()], shown=_SHOWN),
        "products": _differences(found.products),
        "copies": _differences(found.copies),
        "biases": _differences(found.biases),
        "verdict": f"{'equal' if found.is_equal else 'different'}: at most {found.largest:.2e} apart",
    }
    print_facts(attrs.asdict(found), facts, as_json=as_json)


def ranks_in_words(ranks: Mapping[str, int]) -> str:
    """Return the ranks of an adapter in a few words: ``"8 at each of 64 targets"``."""
    least, greatest = min(ranks.values(), default=0), max(ranks.values(), default=0)
    if least == greatest:
        return f"{least} at each of {len(ranks)} targets"
    return f"{least} to {greatest}, {sum(ranks.values())} in all at {len(ranks)} targets"


def size_in_words(size: int) -> str:
    """Return a number of bytes as ``"0.25 MiB"``."""
    return f"{size / 2**20:.2f} MiB"


def _differences(found: Mapping[str, float]) -> str:
    """The largest differences, the worst first."""
    return few([f"{name} {value:.2e}" for name, value in found.items()], shown=_SHOWN)


def print_facts(found: Mapping[str, Any], facts: Mapping[str, str], *, as_json: bool) -> None:
    """Print everything that was found as JSON, or the facts that say something, and the remarks below them."""
    console = Console()
    if as_json:
        say(console, json.dumps(found, indent=2, ensure_ascii=False, default=str))
        return
    for name, value in facts.items():
        if value:
            say(console, f"{name:<11} {value}")
    for remark in found.get("remarks", ()):
        say(console, f"note: {remark}")
