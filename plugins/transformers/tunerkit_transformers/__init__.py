"""transformers for tunerkit: its Trainer and TRL's, checkpoints, default targets, and models loaded by name."""
