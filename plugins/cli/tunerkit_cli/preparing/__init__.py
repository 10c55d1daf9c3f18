"""What a run needs before its first step: checks, rows, model, adapter and trainer."""
