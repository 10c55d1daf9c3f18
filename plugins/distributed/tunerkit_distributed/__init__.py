"""Training in several processes: replicated adapters, DDP, FSDP2 and DeepSpeed's ZeRO."""
