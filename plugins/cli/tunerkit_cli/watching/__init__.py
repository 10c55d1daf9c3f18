"""What follows a training: progress, Ctrl-C, and whether it learns."""
