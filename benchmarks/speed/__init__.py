"""What adapters cost: time, operations and memory, ours and PEFT's side by side in one process."""
