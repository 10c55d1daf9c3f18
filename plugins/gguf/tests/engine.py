"""llama.cpp, through the libraries in the package llama-cpp-py-sync: logits of a model with or without an adapter."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

_bindings = pytest.importorskip(
    "llama_cpp_py_sync._cffi_bindings", reason="llama.cpp's libraries come with llama-cpp-py-sync"
)

ffi: Any = _bindings.get_ffi()
lib: Any = _bindings.get_lib()
_F32 = 0
_NO_FLASH_ATTENTION = 0


@ffi.callback("void(enum ggml_log_level, const char *, void *)")  # type: ignore[untyped-decorator]
def _silent(level: int, text: object, data: object) -> None:
    """Drop llama.cpp's log, which has a line for each tensor."""


class Engine:
    """A model of llama.cpp in fp32 with one thread, and the adapter that it applies."""

    def __init__(self, model: Any, context: Any) -> None:
        self.model = model
        self.context = context
        self.vocabulary: int = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def apply(self, adapter: Path | None) -> bool:
        """Apply an adapter and no other. Whether llama.cpp accepted the file."""
        if adapter is None:
            return bool(lib.llama_set_adapters_lora(self.context, ffi.NULL, 0, ffi.NULL) == 0)
        loaded = lib.llama_adapter_lora_init(self.model, str(adapter).encode())
        if loaded == ffi.NULL:
            return False
        adapters, scales = ffi.new("struct llama_adapter_lora *[]", [loaded]), ffi.new("float[]", [1.0])
        return bool(lib.llama_set_adapters_lora(self.context, adapters, 1, scales) == 0)

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """The logits (tokens, vocabulary) after each token of a text."""
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place] = token, place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = 1
        done = lib.llama_decode(self.context, batch)
        lib.llama_batch_free(batch)
        assert done == 0, f"llama_decode returned {done}"
        size = 4 * len(tokens) * self.vocabulary
        found = np.frombuffer(ffi.buffer(lib.llama_get_logits(self.context), size), np.float32)
        return torch.from_numpy(found.reshape(len(tokens), self.vocabulary).copy())


@contextmanager
def opened(base: Path, *, tokens: int = 64) -> Iterator[Engine]:
    """Load a GGUF file, for texts of up to ``tokens`` tokens."""
    lib.llama_log_set(_silent, ffi.NULL)
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(str(base).encode(), lib.llama_model_default_params())
    assert model != ffi.NULL, f"llama.cpp does not load {base}"
    settings = lib.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = tokens
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = _F32
    settings.flash_attn_type = _NO_FLASH_ATTENTION
    context = lib.llama_init_from_model(model, settings)
    assert context != ffi.NULL
    try:
        yield Engine(model, context)
    finally:
        lib.llama_free(context)
        lib.llama_model_free(model)
