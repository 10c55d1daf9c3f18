"""PEFT's LoRA and AdaLoRA folders for tunerkit: read and written."""
