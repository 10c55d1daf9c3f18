"""Numbers and names as a report writes them."""

import re

import pytest
from hypothesis import given, strategies as st

from tunerkit_cli.report import wording

finite = st.floats(allow_nan=False, allow_infinity=False)


def value_of(text: str) -> float:
    return float(text.replace(",", "").replace(wording.MINUS, "-"))


@given(finite | st.integers(-(10**18), 10**18))
def test_a_number_is_read_back_with_three_digits_or_more(value: float) -> None:
    """Whatever its size, and in few characters."""
    text = wording.number(value)
    assert value_of(text) == pytest.approx(value, rel=6e-3, abs=1e-300)
    assert len(text) <= 21


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (12345, "12,345"),
        (0.85167, "0.8517"),
        (3.2e-5, "3.2e-05"),
        (1e-3, "0.001"),
        (-0.5, "−0.5"),
        (5e-4, "0.0005"),
    ],
)
def test_numbers_are_written_as_readers_expect(value: float, text: str) -> None:
    """Thousands are separated, and small shares have no exponent."""
    assert wording.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(9_999_999, "9,999,999"), (134_976_000, "135.0 M"), (8_030_261_248, "8.0 B")]
)
def test_large_models_are_counted_in_millions_and_billions(value: int, text: str) -> None:
    """All digits would not fit into a tile."""
    assert wording.count(value).replace(wording.SPACE, " ") == text


@given(st.floats(0, 1))
def test_a_share_is_written_in_percent(share: float) -> None:
    """With a space that does not break, and with the share's size."""
    text = wording.percent(share)
    assert text.endswith(f"{wording.SPACE}%")
    assert value_of(text[:-2]) == pytest.approx(100 * share, rel=0.051, abs=0.051)


@given(st.floats(0, 10**6))
def test_a_duration_adds_up(seconds: float) -> None:
    """The units in the text make up the time, to half a minute where there are hours."""
    units = {"h": 3600, "min": 60, "s": 1}
    found = re.findall(r"([\d.,]+)\s(h|min|s)", wording.duration(seconds))
    assert sum(value_of(number) * units[unit] for number, unit in found) == pytest.approx(seconds, abs=60)


@given(st.text(), st.integers(3, 20))
def test_a_short_text_keeps_both_ends(text: str, width: int) -> None:
    """At most ``width`` characters; whole if it fits."""
    short = wording.short_text(text, width)
    assert len(short) <= width
    assert short == text if len(text) <= width else (short[0], short[-1]) == (text[0], text[-1])


@pytest.mark.parametrize(
    ("name", "title"), [("adalora", "AdaLoRA"), ("lora", "LoRA"), ("my-lora", "my-lora"), ("ia3", "ia3")]
)
def test_names_of_the_family_have_their_spelling(name: str, title: str) -> None:
    """Any other method's name stays as its plugin wrote it."""
    assert wording.method_title(name) == title
