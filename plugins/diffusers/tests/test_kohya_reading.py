"""What sd-scripts and LyCORIS write under Kohya's names, tunerkit loads."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tunerkit
from tunerkit.plugin import factors_of

pytest.importorskip("diffusers", reason="it has the models")
pytest.importorskip("peft", reason="diffusers loads adapters with it")
from plugins.diffusers.tests.pipelines import (
    TOLERANCE,
    error,
    load_as_diffusers,
    output,
    sdxl_unet,
    text_encoder,
    transformer,
    unet,
)

Spell = Callable[[str], str]


def kohya_file(
    file: Path,
    model: nn.Module,
    *,
    dim: int,
    alpha: float | None,
    conv_dim: int,
    conv_alpha: float | None,
    spell: Spell,
) -> dict[str, Tensor]:
    """Write a file as sd-scripts names and shapes it, at all linear layers and convolutions.

    3×3 convolutions have a rank and an alpha of their own.

    Returns:
        What each layer's weight gains by sd-scripts' rule, up · down · alpha / rank, by the weight's name.
    """
    draw = torch.Generator().manual_seed(5)
    tensors, deltas = {}, {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        out, width, *kernel = module.weight.shape
        own, scale = (conv_dim, conv_alpha) if kernel == [3, 3] else (dim, alpha)
        down, up = torch.randn(own, width, *kernel, generator=draw), torch.randn(out, own, generator=draw) * 0.05
        name = spell(path)
        tensors[f"{name}.lora_down.weight"] = down.half()
        tensors[f"{name}.lora_up.weight"] = up.reshape(out, own, *[1] * len(kernel)).half()
        if scale is not None:
            tensors[f"{name}.alpha"] = torch.tensor(scale).half()
        product = up.half().float() @ down.half().float().flatten(1) * ((own if scale is None else scale) / own)
        deltas[f"{path}.weight"] = product.reshape(module.weight.shape)
    save_file(tensors, file, {"ss_network_module": "networks.lora", "ss_network_dim": str(dim)})
    return deltas


@torch.no_grad()
def merged(model: nn.Module, deltas: dict[str, Tensor]) -> nn.Module:
    """The model with the weights' gains added: the oracle."""
    for name, delta in deltas.items():
        model.get_parameter(name).add_(delta)
    return model


def of_unet(path: str) -> str:
    return f"lora_unet_{path}".replace(".", "_")


def of_text_encoder(path: str) -> str:
    return f"lora_te_text_model_{path}".replace(".", "_")


def of_sdxl(path: str) -> str:
    """The original names, as the tables of `ORIGINAL` spell out for `sdxl_unet`: the longest beginning counts."""
    start = max((start for start in ORIGINAL if f"{path}.".startswith(f"{start}.")), key=len)
    rest = path.removeprefix(start)
    for here, there in RESNET.items():
        rest = rest.replace(here, there) if "resnets" in start else rest
    return f"lora_unet_{ORIGINAL[start]}{rest}".replace(".", "_")


RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
ORIGINAL = {
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.resnets.1": "input_blocks.2.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.resnets.0": "input_blocks.4.0",
    "down_blocks.1.attentions.0": "input_blocks.4.1",
    "down_blocks.1.resnets.1": "input_blocks.5.0",
    "down_blocks.1.attentions.1": "input_blocks.5.1",
    "down_blocks.1.downsamplers.0.conv": "input_blocks.6.0.op",
    "down_blocks.2.resnets.0": "input_blocks.7.0",
    "down_blocks.2.attentions.0": "input_blocks.7.1",
    "down_blocks.2.resnets.1": "input_blocks.8.0",
    "down_blocks.2.attentions.1": "input_blocks.8.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.resnets.2": "output_blocks.2.0",
    "up_blocks.0.attentions.2": "output_blocks.2.1",
    "up_blocks.0.upsamplers.0": "output_blocks.2.2",
    "up_blocks.1.resnets.0": "output_blocks.3.0",
    "up_blocks.1.attentions.0": "output_blocks.3.1",
    "up_blocks.1.resnets.1": "output_blocks.4.0",
    "up_blocks.1.attentions.1": "output_blocks.4.1",
    "up_blocks.1.resnets.2": "output_blocks.5.0",
    "up_blocks.1.attentions.2": "output_blocks.5.1",
    "up_blocks.1.upsamplers.0": "output_blocks.5.2",
    "up_blocks.2.resnets.0": "output_blocks.6.0",
    "up_blocks.2.resnets.1": "output_blocks.7.0",
    "up_blocks.2.resnets.2": "output_blocks.8.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
CASES: dict[str, tuple[Callable[[], nn.Module], Spell, float | None]] = {
    "unet": (unet, of_unet, 2.0),
    "unet without alpha": (unet, of_unet, None),
    "sdxl": (sdxl_unet, of_sdxl, 2.0),
    "text encoder": (text_encoder, of_text_encoder, 2.0),
}


@pytest.mark.parametrize(("build", "spell", "alpha"), CASES.values(), ids=CASES)
def test_a_file_with_one_rank_gives_the_output_of_diffusers(
    build: Callable[[], nn.Module], spell: Spell, alpha: float | None, tmp_path: Path
) -> None:
    """And that of the merged weights, with alpha and without."""
    file = tmp_path / "style.safetensors"
    deltas = kohya_file(file, build(), dim=4, alpha=alpha, conv_dim=4, conv_alpha=alpha, spell=spell)
    expected = output(merged(build(), deltas))
    assert error(output(build()), expected) > 0.05
    assert error(output(tunerkit.load(build(), file)), expected) <= TOLERANCE
    assert error(output(load_as_diffusers(build(), file)), expected) <= TOLERANCE


def test_several_ranks_and_alphas_follow_the_rule_of_sd_scripts(tmp_path: Path) -> None:
    """Each module is scaled by its own alpha / rank; diffusers does not do that, which is why we never write it."""
    file = tmp_path / "style.safetensors"
    deltas = kohya_file(file, unet(), dim=4, alpha=2.0, conv_dim=2, conv_alpha=6.0, spell=of_unet)
    expected = output(merged(unet(), deltas))
    loaded = tunerkit.load(unet(), tmp_path, trainable=True)  # the folder, with its one file
    assert error(output(loaded), expected) <= TOLERANCE
    assert set(tunerkit.tuner(loaded).ranks().values()) == {2, 4}
    for format in ("kohya", "diffusers"):
        tunerkit.export(loaded, tmp_path / format, format=format)
        assert error(output(load_as_diffusers(unet(), tmp_path / format)), expected) <= TOLERANCE


def test_a_kernel_in_between_is_multiplied_in(tmp_path: Path) -> None:
    """``lora_mid`` of a convolution: ΔW[o, i] = Σ up[o, a] mid[a, b] down[b, i] · alpha / rank."""
    draw = torch.Generator().manual_seed(6)
    down, up = torch.randn(3, 4, 1, 1, generator=draw), torch.randn(8, 3, 1, 1, generator=draw)
    mid = torch.randn(3, 3, 3, 3, generator=draw)
    file = one_layer(tmp_path, {DOWN: down, UP: up, "lora_unet_conv_in.lora_mid.weight": mid})
    expected = torch.zeros(8, 4, 3, 3)
    for a in range(3):
        for b in range(3):
            expected += (
                up[:, a, :, :, None, None].squeeze()[:, None, None, None] * mid[a, b] * down[b, :, 0, 0][:, None, None]
            )
    (added,) = factors_of(tunerkit.tuner(tunerkit.load(unet(), file))).values()
    torch.testing.assert_close((added.p @ added.q).reshape(8, 4, 3, 3), expected)


DOWN, UP, ALPHA = (f"lora_unet_conv_in.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha"))


def one_layer(folder: Path, more: dict[str, Tensor | None]) -> Path:
    """A file that adapts ``conv_in`` of `unet` with rank 2, and what else is given; None removes a tensor."""
    tensors: dict[str, Tensor | None] = {DOWN: torch.ones(2, 4, 3, 3), UP: torch.ones(8, 2, 1, 1), **more}
    file = folder / "style.safetensors"
    save_file({name: each for name, each in tensors.items() if each is not None}, file)
    return file


BAD: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "a missing half": ({UP: None}, r"conv_in\.lora_down.*lora_up or lora_B of 'conv_in' is missing"),
    "alpha alone": ({UP: None, DOWN: None, ALPHA: torch.ones(1)}, r"conv_in\.alpha.*lora_down or lora_A"),
    "NaN": ({UP: torch.full((8, 2, 1, 1), float("nan"))}, r"conv_in\.lora_up.*NaN or inf"),
    "infinite alpha": ({ALPHA: torch.tensor(float("inf"))}, r"conv_in\.alpha.*NaN or inf"),
    "an alpha of 0": ({ALPHA: torch.tensor(0)}, r"conv_in\.alpha' must be a number above 0, got 0"),
    "another kernel": ({DOWN: torch.ones(2, 4, 5, 5)}, r"conv_in\.lora_down.*\(2, 4, 5, 5\), expected \(r, 4, 3, 3\)"),
    "another width": ({UP: torch.ones(9, 2, 1, 1)}, r"conv_in\.lora_up.*\(9, 2, 1, 1\), expected \(8, 2\)"),
    "a number": ({DOWN: torch.tensor(1.0)}, r"conv_in\.lora_down.*shape \(\)"),
    "another kernel in between": ({"lora_unet_conv_in.lora_mid.weight": torch.ones(2, 2, 5, 5)}, "expected"),
    "an unknown key": ({"lora_unet_conv_in.lora_side.weight": torch.ones(2)}, "lora_side.weight' is unknown; expected"),
    "a foreign prefix": (
        {"lycoris_conv_in.alpha": torch.ones(1)},
        "'lycoris_conv_in.alpha' is unknown; expected one of",
    ),
    "an unknown layer": ({"lora_unet_conv_on.alpha": torch.ones(1)}, "conv_on.*no linear.*did you mean 'conv_in'"),
    "LoHa": ({"lora_unet_conv_in.hada_w1_a": torch.ones(2, 2)}, "hada_w1_a' belongs to LoHa.*Merge"),
    "LoKr": ({"lora_unet_conv_in.lokr_w1": torch.ones(2, 2)}, "lokr_w1' belongs to LoKr"),
    "DoRA": ({"lora_unet_conv_in.dora_scale": torch.ones(8)}, "dora_scale' belongs to DoRA"),
    "a full weight": ({"lora_unet_conv_in.diff": torch.ones(8)}, "diff' belongs to a weight trained in full"),
    "IA3": ({"lora_unet_conv_in.on_input": torch.ones(8)}, "IA3"),
    "two names": ({"lora_unet_input_blocks_0_0.alpha": torch.ones(1)}, "both adapt 'conv_in'; remove one"),
}


@pytest.mark.parametrize(("more", "message"), BAD.values(), ids=BAD)
def test_a_bad_file_is_refused_by_its_key(more: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    """One error names the file and the key, and the model stays as it was."""
    file, model = one_layer(tmp_path, more), unet()
    with pytest.raises(tunerkit.errors.FileError, match=message) as caught:
        tunerkit.load(model, file)
    assert file.name in str(caught.value)
    assert not any("tunerkit" in path for path, _ in model.named_modules())


def test_a_name_that_may_mean_two_modules_is_refused(tmp_path: Path) -> None:
    """``a_b`` and ``a.b`` have one name. A file that does not use it is read."""

    def build() -> nn.Module:
        return nn.ModuleDict({"a_b": nn.Linear(4, 4), "a": nn.ModuleDict({"b": nn.Linear(4, 4)}), "c": nn.Linear(4, 4)})

    pair = {"lora_down.weight": torch.ones(1, 4), "lora_up.weight": torch.ones(4, 1)}
    save_file({f"lora_unet_a_b.{part}": tensor for part, tensor in pair.items()}, tmp_path / "a.safetensors")
    save_file({f"lora_unet_c.{part}": tensor for part, tensor in pair.items()}, tmp_path / "c.safetensors")
    with pytest.raises(tunerkit.errors.FileError, match=r"may stand for 'a_b' or 'a\.b'"):
        tunerkit.load(build(), tmp_path / "a.safetensors")
    assert tunerkit.tuner(tunerkit.load(build(), tmp_path / "c.safetensors")).ranks() == {"c": 1}
    with pytest.raises(tunerkit.errors.FileError, match=r"2 adapters.*a\.safetensors, c\.safetensors"):
        tunerkit.load(build(), tmp_path)


def test_another_part_of_the_pipeline_is_named(tmp_path: Path) -> None:
    """A UNet's file does not go onto a text encoder, and nothing under these names onto a transformer."""
    file = one_layer(tmp_path, {})
    with pytest.raises(tunerkit.errors.BaseMismatchError, match=r"adapts 'unet'.*CLIPTextModel is 'text_encoder'"):
        tunerkit.load(text_encoder(), file)
    with pytest.raises(
        tunerkit.errors.BaseMismatchError, match=r"SD3Transformer2DModel follow the original checkpoint"
    ):
        tunerkit.load(transformer(), file)


def test_a_text_encoders_tensors_are_told_of(tmp_path: Path) -> None:
    """A file for UNet and text encoder goes onto each; a 1×1 convolution may be written as a linear layer."""
    name = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    more: dict[str, Tensor | None] = {
        f"{name}.lora_down.weight": torch.ones(2, 16, 1, 1),
        f"{name}.lora_up.weight": torch.ones(32, 2),
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(2, 16),
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.ones(16, 2),
    }
    file = one_layer(tmp_path, more)
    with pytest.warns(tunerkit.TunerkitWarning, match=r"also adapts 'text_encoder'.* at 1 modules"):
        assert len(tunerkit.tuner(tunerkit.load(unet(), file)).ranks()) == 2
    with pytest.warns(tunerkit.TunerkitWarning, match=r"also adapts 'unet'.* at 2 modules"):
        assert len(tunerkit.tuner(tunerkit.load(text_encoder(), file)).ranks()) == 1
