"""The folder of each adapter in a Trainer's checkpoint."""

import hashlib
from pathlib import Path

import pytest

import tunerkit
from tests.support.trainer_toys import Regression
from tunerkit.plugin import Tuner
from tunerkit.serialization.safetensors_file import folder_of

pytestmark = pytest.mark.usefixtures("toys")
ODD = "Adapter A"
DIGEST = hashlib.sha256(ODD.encode()).hexdigest()[:16]


def tuners(*names: str) -> list[Tuner]:
    model = Regression()
    for name in names:
        tunerkit.wrap(model, "toy-shift", {"targets": ["first"]}, adapter=name)
    return list(tunerkit.adapters(model).values())


def test_no_two_adapters_share_a_folder(tmp_path: Path) -> None:
    """A name that equals the digest of another's gets its own folder, as do names that differ in case."""
    found = tuners(ODD, DIGEST, "a", "A", f"name_{DIGEST}")
    folders = [folder_of(tmp_path, found, tuner) for tuner in found]
    assert len({str(folder).lower() for folder in folders}) == len(found)
    assert folders[1:3] == [tmp_path / DIGEST, tmp_path / "a"]


def test_a_checkpoint_of_an_earlier_version_is_still_found(tmp_path: Path) -> None:
    """It has the bare digest as folder, which is used unless another adapter has that name."""
    (tmp_path / DIGEST).mkdir()
    (tmp_path / DIGEST / "adapter.safetensors").write_bytes(b"")
    odd, other = tuners(ODD, "a")
    assert folder_of(tmp_path, [odd, other], odd) == tmp_path / DIGEST
    odd, named = tuners(ODD, DIGEST)
    assert folder_of(tmp_path, [odd, named], odd) != folder_of(tmp_path, [odd, named], named) == tmp_path / DIGEST
