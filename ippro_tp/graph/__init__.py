"""All that is known of Torch-Pruning: groups as index tensors, units, costs."""
