"""Which architectures can be pruned at all."""
