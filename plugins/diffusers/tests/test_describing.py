"""What ``tunerkit show`` says of the files of diffusers and Kohya, without a model."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tunerkit
from tunerkit.plugin import Description
from tunerkit_diffusers.describing import describe_diffusers, describe_kohya

FILE = "pytorch_lora_weights.safetensors"
Describe = Callable[[Path], Description]
SETTINGS = {"r": 4, "lora_alpha": 6, "rank_pattern": {"conv_in": 2}, "base_model_name_or_path": "org/unet"}


def pair(rank: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.ones(rank, 6, dtype=dtype), torch.ones(5, rank, dtype=dtype)


def diffusers_file(folder: Path, ranks: Mapping[str, int], settings: Mapping[str, object] | None = None) -> Path:
    """A file with ``lora_A`` and ``lora_B`` of each module."""
    tensors = {}
    for name, rank in ranks.items():
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = pair(rank)
    save_file(tensors, folder / FILE, {} if settings is None else {"lora_adapter_metadata": json.dumps(settings)})
    return folder / FILE


def kohya_file(file: Path, ranks: Mapping[str, int], metadata: Mapping[str, str]) -> Path:
    """A file with both halves and the alpha of each module."""
    tensors = {}
    for name, rank in ranks.items():
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = pair(rank, torch.float16)
        tensors[f"{name}.alpha"] = torch.tensor(3.0)
    save_file(tensors, file, dict(metadata))
    return file


def test_a_file_of_diffusers_is_described(tmp_path: Path) -> None:
    """Of one part of the pipeline: the paths are those of its model, and the settings are those of peft."""
    settings = {f"unet.{name}": value for name, value in SETTINGS.items()}
    diffusers_file(tmp_path, {"unet.conv_in": 2, "unet.mid_block.to_q": 4}, settings)
    found = describe_diffusers(tmp_path)
    assert (found.method, found.base) == ("lora", "org/unet")
    assert found.ranks == {"conv_in": 2, "mid_block.to_q": 4}
    assert found.settings == {
        "parts": ["unet"], "dtype": "f32", "rank": 4, "alpha": 6, "dropout": 0.0, "rslora": False,
        "rank_pattern": {"conv_in": 2}, "alpha_pattern": {},
    }  # fmt: skip


def test_a_file_for_several_parts_tells_them_apart(tmp_path: Path) -> None:
    """Paths and settings begin with the part; no base is named if they have two."""
    settings: dict[str, object] = {f"unet.{name}": value for name, value in SETTINGS.items()}
    settings |= {"transformer.r": 3, "transformer.base_model_name_or_path": "org/other"}
    found = describe_diffusers(diffusers_file(tmp_path, {"unet.conv_in": 2, "transformer.proj": 3}, settings))
    assert found.ranks == {"unet.conv_in": 2, "transformer.proj": 3}
    assert (found.settings["unet.alpha"], found.settings["transformer.rank"]) == (6, 3)
    assert found.base == ""


def test_a_file_of_diffusers_without_settings_or_parts_is_described(tmp_path: Path) -> None:
    """By its tensors alone."""
    found = describe_diffusers(diffusers_file(tmp_path, {"blocks.0.to_q": 2}))
    assert found == Description("lora", ranks={"blocks.0.to_q": 2}, settings={"parts": [], "dtype": "f32"})


def test_a_file_of_kohya_is_described(tmp_path: Path) -> None:
    """Names are those of the file; alphas are not read, and the trainer's settings are told."""
    metadata = {
        "ss_network_dim": "4", "ss_network_alpha": "3", "ss_sd_model_name": "sd.safetensors", "ss_epoch": "9"
    }  # fmt: skip
    ranks = {"lora_unet_conv_in": 4, "lora_te1_text_model_fc1": 2, "lora_te2_text_model_fc1": 1}
    found = describe_kohya(kohya_file(tmp_path / "style.safetensors", ranks, metadata))
    assert (found.method, found.base, found.ranks) == ("lora", "", ranks)
    assert found.settings == {
        "parts": ["text_encoder", "text_encoder_2", "unet"], "dtype": "f16",
        "rank": "4", "alpha": "3", "base_name": "sd.safetensors",
    }  # fmt: skip


def test_the_command_shows_both(tmp_path: Path) -> None:
    """As lines and as JSON; a file that is cut off is one line."""
    pytest.importorskip("typer", reason="the command needs the extra [cli]")
    from tests.support.train_command import command, succeeded

    files = {
        "diffusers": diffusers_file(tmp_path, {"unet.conv_in": 2}),
        "kohya": kohya_file(tmp_path / "style.safetensors", {"lora_unet_conv_in": 2}, {}),
    }
    for format, file in files.items():
        lines = succeeded("show", file).output
        assert format in lines
        assert "2 at each of 1 targets" in lines
        told = json.loads(succeeded("show", file, "--json").output)
        assert (told["format"], told["method"], list(told["ranks"].values())) == (format, "lora", [2])
        assert told["size"] == file.stat().st_size
        file.write_bytes(file.read_bytes()[:-1])
        done = command("show", file)
        assert done.exit_code == 2
        assert "cannot be read as a safetensors file" in " ".join(done.output.split())


DOWN, UP = pair(2)


@pytest.mark.parametrize(
    ("describe", "tensors", "settings", "said"),
    [
        (describe_diffusers, {"unet.a.lora_A.weight": DOWN}, "", "lora_up or lora_B of 'a' is missing"),
        (describe_diffusers, {"unet.a.lora_A.weight": DOWN, "unet.a.lora_B.weight": UP[:, :1]}, "", r"\(5, 1\)"),
        (describe_diffusers, {"unet.a.lora_A.weight": DOWN[:0], "unet.a.lora_B.weight": UP[:, :0]}, "", r"\(0, 6\)"),
        (describe_diffusers, {"unet.a.lora_A.weight": DOWN[0, 0], "unet.a.lora_B.weight": UP}, "", r"shape \(\)"),
        (describe_diffusers, {"unet.a.dora_scale": DOWN}, "", "DoRA"),
        (describe_diffusers, {"unet.a.lora_A.weight": DOWN, "b.lora_A.weight": UP}, "", "no part of a pipeline"),
        (describe_diffusers, {"unet.a.lora_A.weight": DOWN, "unet.a.lora_B.weight": UP}, "{", "is not JSON"),
        (describe_kohya, {"lora_unet_a.lora_up.weight": UP}, "", "lora_down or lora_A of 'a' is missing"),
        (describe_kohya, {"lora_unet_a.hada_w1_a": UP}, "", "LoHa"),
    ],
    ids=["half", "shapes", "rank 0", "number", "method", "mixed", "settings", "half of kohya", "method of kohya"],
)
def test_a_wrong_file_is_refused(
    describe: Describe, tensors: Mapping[str, Tensor], settings: str, said: str, tmp_path: Path
) -> None:
    """With its name and what is wrong."""
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(kept, tmp_path / FILE, {"lora_adapter_metadata": settings})
    with pytest.raises(tunerkit.errors.FileError, match=f"(?s){FILE}.*{said}"):
        describe(tmp_path)


@pytest.mark.parametrize("describe", [describe_diffusers, describe_kohya])
def test_where_no_such_file_is_nothing_is_described(describe: Describe, tmp_path: Path) -> None:
    """An empty folder, and a name that is neither."""
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(tunerkit.errors.FileError, match="holds no"):
            describe(path)
