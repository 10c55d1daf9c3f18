"""The cost of adapters: time, operations and memory, ours and PEFT's measured together in one process."""
