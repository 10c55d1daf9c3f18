"""Numbers as a report writes them."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Final

# A line break between a number and its unit would tear them apart.
SPACE: Final = "\N{NO-BREAK SPACE}"
MINUS: Final = "\N{MINUS SIGN}"


def number(value: float) -> str:
    """Write a number with about four digits: ``12,345``, ``0.8517``, ``3.2e-05``. Whole ones have all digits."""
    if isinstance(value, int) or (abs(value) >= 1000 and abs(value) < 1e15):
        return f"{value:,.0f}".replace("-", MINUS) if abs(value) < 1e15 else f"{float(value):.3g}"
    if value and (abs(value) < 1e-4 or abs(value) >= 1e15):
        return f"{float(f'{value:.3g}'):g}".replace("-", MINUS, value < 0)
    return f"{value:.4g}".replace("-", MINUS)


def decimals(value: float, digits: int = 3) -> str:
    """Write a score with a fixed number of decimals, so that scores line up: ``0.852``. Others as `number` does."""
    is_plain = value == 0 or 0.5 * 10**-digits <= abs(value) < 100
    return f"{value:.{digits}f}".replace("-", MINUS) if is_plain else number(value)


def count(value: int) -> str:
    """Write a number of parameters: all digits up to ten million, then ``135.0 M`` or ``8.0 B``."""
    if abs(value) < 10**7:
        return f"{value:,}"
    size, name = (10**9, "B") if abs(value) >= 10**9 else (10**6, "M")
    return f"{value / size:,.1f}{SPACE}{name}"


def stacks(experts: Mapping[str, int]) -> str:
    """Write the numbers of experts of an adapter's stacks, by path, as ``32 stacks of 8 experts``."""
    return " and ".join(f"{count} stacks of {each} experts" for each, count in Counter(experts.values()).items())


def percent(share: float) -> str:
    """Write a share of 1 with two digits or more: ``1.2 %``, ``85.2 %``."""
    value = 100 * share
    digits = f"{value:.0f}" if value in (0, 100) else f"{value:.1f}" if abs(value) >= 1 else f"{value:.2g}"
    return f"{digits}{SPACE}%".replace("-", MINUS, value < 0)


def times(factor: float) -> str:
    """Write how many times greater something is: ``584 times``, ``1.25 times``."""
    return f"{float(f'{factor:.3g}'):,g}{SPACE}times"


def capitalised(text: str) -> str:
    """Return a text with an upper-case first letter, for a heading."""
    return text[:1].upper() + text[1:]


def duration(seconds: float) -> str:
    """Write a time with its two largest units: ``2 h 5 min``, ``1 min 4 s``, ``0.3 s``."""
    if seconds < 10:
        return f"{seconds:.1f}{SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,}{SPACE}h{SPACE}{minutes}{SPACE}min"
    return f"{minutes}{SPACE}min{SPACE}{rest}{SPACE}s" if minutes else f"{rest}{SPACE}s"


def short_text(text: str, width: int = 60) -> str:
    """Return a text of at most ``width`` characters, with an ellipsis for its middle."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def method_title(name: str) -> str:
    """Write a method's name as papers do where the family's spelling is known: ``AdaLoRA``; others stay as they are."""
    found = re.fullmatch(r"(\w*?)(lora)", name)
    return f"{found[1].capitalize()}LoRA" if found else name


def short_baseline(what: str) -> str:
    """Return what the baseline is, without its details: "head alone, base frozen" is "head alone"."""
    return what.partition(",")[0].strip() or "baseline"
