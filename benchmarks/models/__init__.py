"""Networks of the benchmark's own tasks, and reading of their checkpoints."""
