"""IA³ scales inputs where it is told to, and says where it cannot."""

import copy

import pytest
import torch
from torch import nn

import tunerkit


def test_the_input_of_a_feedforward_layer_is_scaled() -> None:
    """W (l ⊙ x) + b, with one factor for each input; the other target has one for each output."""
    model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 8))
    plain = [nn.Linear(12, 20), nn.Linear(20, 8)]
    for mine, other in zip(plain, model, strict=True):
        mine.load_state_dict(other.state_dict())
    model = tunerkit.wrap(model, "ia3", {"targets": ["0", "1"], "feedforward": ["1"]})
    outputs, inputs = tunerkit.tuner(model).parameters()
    with torch.no_grad():
        outputs.normal_()
        inputs.normal_()
        x = torch.randn(3, 12)
        assert torch.allclose(model(x), plain[1](inputs * outputs * plain[0](x)), atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_channels_of_a_convolution_are_scaled(groups: int) -> None:
    """Conv(l ⊙ x), with one factor for each input channel, also of groups; merged it is the same."""
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, (3, 2), groups=groups, padding=1)
    model = tunerkit.wrap(nn.Sequential(copy.deepcopy(layer)), "ia3", {"targets": "0", "feedforward": ["0"]})
    (factors,) = tunerkit.tuner(model).parameters()
    with torch.no_grad():
        factors.normal_()
        x = torch.randn(2, 4, 5, 5)
        expected = layer(x * factors[:, None, None])
        assert torch.allclose(model(x), expected, atol=1e-5)
        tunerkit.merge(model)
        assert torch.allclose(model(x), expected, atol=1e-5)


def test_the_input_of_another_layer_is_refused() -> None:
    """An embedding's input cannot be scaled, and the error says what to do."""
    model = nn.Sequential(nn.Embedding(4, 4))
    with pytest.raises(tunerkit.errors.TargetError, match="leave other layers out of feedforward"):
        tunerkit.wrap(model, "ia3", {"targets": "0", "feedforward": ["0"]})


def test_a_pattern_that_names_no_target_is_an_error() -> None:
    """A misspelt feed-forward layer would be scaled at its output, in silence."""
    with pytest.raises(tunerkit.errors.ConfigError, match="dwon_proj"):
        tunerkit.wrap(nn.Sequential(nn.Linear(4, 4)), "ia3", {"targets": "0", "feedforward": ["dwon_proj"]})
