"""Pure maths: tensors and index tensors in, tensors out. No Torch-Pruning, no hooks."""
