"""Write an adapter as one GGUF file for llama.cpp and Ollama."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from torch import Tensor, nn

from tunerkit.plugin import Factors, FileError, Tuner, biases_of, copies_of, factors_of
from tunerkit_gguf.architectures import EMBEDDING, INSTEAD, OUTPUT, Layout, layout_of
from tunerkit_gguf.options import GgufOptions
from tunerkit_gguf.tensors import pair_of, permute, without

if TYPE_CHECKING:
    import gguf

FILE: Final = "adapter.gguf"
_SHOWN: Final = 5


def write(tuner: Tuner, path: Path, options: GgufOptions) -> list[Path]:
    """Write an adapter into a folder. Targets of rank 0 are left out.

    Args:
        tuner: The adapter.
        path: The folder.
        options: How numbers are stored.

    Returns:
        The file.

    Raises:
        FileError: llama.cpp cannot hold this adapter: another architecture, a target that it cannot adapt, modules
            trained in full, trained biases, nothing but rank 0, or numbers that are not finite.
    """
    layout = layout_of(tuner.model)
    _refuse_full(tuner)
    names = _names(tuner, layout)
    products = {at: product for at, product in factors_of(tuner).items() if product.rank > 0}
    if not products:
        raise FileError(
            f"adapter {tuner.name!r} adds nothing: each of its targets has rank 0, and llama.cpp has no pairs of rank "
            "0. Serve the base model itself"
        )
    # A whole number, since Ollama reads integers; the largest rank, so that no pair is scaled up.
    alpha = max(product.rank for product in products.values())
    writer = _writer(path / FILE, tuner, layout, alpha, options)
    for name, array in _arrays(tuner, products, names, layout, alpha):
        writer.add_tensor(name, _stored(array, name, options))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [path / FILE]


def _refuse_full(tuner: Tuner) -> None:
    for what, paths in (("modules trained in full", copies_of(tuner)), ("trained biases", biases_of(tuner))):
        if paths:
            raise FileError(
                f"format 'gguf' holds no {what}, which adapter {tuner.name!r} has: {_few(paths)}. {INSTEAD}"
            )


def _names(tuner: Tuner, layout: Layout) -> dict[str, str]:
    """The name of the weight of each target in llama.cpp, by the target's path."""
    names = {target.path: layout.name_of(target.path) for target in tuner.targets}
    if unknown := [path for path, name in names.items() if name is None]:
        raise FileError(
            f"llama.cpp adapts the embedding, the attention and MLP matrices and the head of architecture "
            f"{layout.architecture!r}, not {_few(unknown)}. {INSTEAD}"
        )
    if layout.tied and (tied := [path for path, name in names.items() if name in (EMBEDDING, OUTPUT)]):
        raise FileError(
            f"the output head of this model is its embedding, and llama.cpp cannot adapt such a weight: it holds it "
            f"once, and stops when an adapter has {_few(tied)}. Leave it out with exclude={tied!r} when you wrap the "
            f"model. For the adapter as it is: {INSTEAD}"
        )
    return {path: name for path, name in names.items() if name is not None}


def _arrays(
    tuner: Tuner, products: Mapping[str, Factors], names: Mapping[str, str], layout: Layout, alpha: int
) -> Iterator[tuple[str, Tensor]]:
    modules: dict[str, nn.Module] = {target.path: target.module for target in tuner.targets}
    for path, product in products.items():
        name, pair = names[path], pair_of(product, alpha=alpha)
        heads = layout.heads_of(name)
        if name == EMBEDDING:
            # llama.cpp looks up rows of lora_a, so it is transposed: (vocabulary, r).
            yield f"{name}.lora_a", without(pair.a, getattr(modules[path], "padding_idx", None)).T
        else:
            yield f"{name}.lora_a", pair.a
        yield f"{name}.lora_b", pair.b if heads is None else permute(pair.b, heads)


def _stored(tensor: Tensor, name: str, options: GgufOptions) -> "np.ndarray[Any, Any]":
    with np.errstate(over="ignore"):  # reported below
        array = np.ascontiguousarray(tensor.numpy(), dtype=np.float16 if options.dtype == "f16" else np.float32)
    if not np.isfinite(array).all():
        raise FileError(
            f"{name} has NaN or inf in {options.dtype}: "
            + ("use dtype='f32', or " if options.dtype == "f16" else "")
            + "use an earlier checkpoint of the training"
        )
    return array


def _writer(place: Path, tuner: Tuner, layout: Layout, alpha: int, options: GgufOptions) -> "gguf.GGUFWriter":
    """A writer with the metadata: the keys that llama.cpp's convert_lora_to_gguf.py writes."""
    import gguf

    writer = gguf.GGUFWriter(place, layout.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    kinds = gguf.LlamaFileType
    writer.add_file_type(kinds.MOSTLY_F16 if options.dtype == "f16" else kinds.ALL_F32)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    # Only the last part: the rest may be a path of the machine where the model was trained.
    base = PurePath(str(getattr(getattr(tuner.model, "config", None), "_name_or_path", ""))).name
    writer.add_name(f"{base} {tuner.method}".strip())
    if base:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base)
    return writer


def _few(paths: Collection[str]) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(list(paths)[:_SHOWN]) + more
