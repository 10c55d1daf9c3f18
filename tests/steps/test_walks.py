"""The benchmark of walks: it runs on its tiny model, and says what `attach` promises of a step."""

import pytest

for _module in ("rich", "tunerkit_adalora"):
    pytest.importorskip(_module, reason=f"the benchmark needs {_module}")

from benchmarks import walks  # noqa: E402


def test_a_step_goes_from_the_driver_to_the_method_and_back(capsys: pytest.CaptureFixture[str]) -> None:
    """Few files, and hardly any twice: what a step needs was looked up when the adapter was attached."""
    found = {(each.name, after.name): (each, after) for each, after in walks.steps(walks.walks())}
    for (name, _), (whole, after) in found.items():
        shrinks = "shrink" in name  # which asks the engine whether shapes may change, and notifies it
        assert 0 < len(whole.files) <= 12 + shrinks, name
        assert whole.returns <= 6 + 2 * shrinks, name
        assert not any("registry" in file or "validation" in file for file in whole.files), name
        if "averages" in name:
            assert 0 < len(after.files) <= 9
            assert after.returns <= 2
    assert len(found) == 4
    walks.main()
    assert "step with the final shrink" in capsys.readouterr().out
