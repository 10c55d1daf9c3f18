"""The gallery says what there is: every installed method, every type of PEFT, and nothing else."""

import re
from pathlib import Path

import pytest

import tunerkit

PAGE = (Path(__file__).parents[2] / "docs/concepts/gallery.md").read_text(encoding="utf-8")
IDEAS, TYPES = (
    PAGE.partition(f"## {heading}")[2].partition("\n## ")[0] for heading in ("What each does", "From a PEFT")
)
ROWS = re.findall(r"^\| `([a-z0-9-]+)` \|(.*)\|$", IDEAS, re.MULTILINE)


def test_every_installed_method_has_a_row_with_its_paper() -> None:
    """And no row names a method that is not there; a row without a paper says why."""
    pytest.importorskip("tunerkit_methods")
    installed = {name for name, info in tunerkit.methods().items() if info.distribution.startswith("tunerkit-")}
    assert sorted(name for name, _ in ROWS) == sorted(installed)
    without = [name for name, row in ROWS if not re.search(r"\[(\d{4}\.\d{5})\]\(https://arxiv\.org/abs/\1\)", row)]
    assert without == ["growing", "trainable-tokens"]


def test_every_type_of_peft_is_named_once_with_a_method_or_a_reason() -> None:
    """A name here is an installed method; otherwise the row begins with no."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("tunerkit_methods")
    rows = re.findall(r"^\| (`[A-Z0-9_`, ]+`) \| (.*) \|$", TYPES, re.MULTILINE)
    named = [name for cell, _ in rows for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(named) == sorted(each.value for each in peft.PeftType)
    for _, here in rows:
        name = re.match(r"`([a-z0-9-]+)`", here)
        assert here.startswith("no; ") if name is None else name[1] in tunerkit.methods()


def test_the_measured_table_has_every_method() -> None:
    """Each installed method has a number of parameters, of operations and of bytes."""
    pytest.importorskip("tunerkit_methods")
    from scripts.docs.gallery import measured

    rows = re.findall(r"^\| `([a-z0-9-]+)` \| ([\d,]+) \| (\d+) \| (-?[\d,]+) \|", measured(), re.MULTILINE)
    assert [name for name, *_ in rows] == sorted(name for name, info in tunerkit.methods().items() if not info.error)
    assert all(int(count) > 0 and int(trained.replace(",", "")) > 0 for _, trained, count, _ in rows)
