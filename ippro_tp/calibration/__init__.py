"""One observation of a model: loops and batches, losses, sums, ranks, and leaving it as it was."""
