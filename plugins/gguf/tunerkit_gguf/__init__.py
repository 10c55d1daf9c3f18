"""LoRA adapters for llama.cpp and Ollama: one GGUF file, written and read."""

from tunerkit_gguf.options import GgufOptions

__all__ = ["GgufOptions"]
