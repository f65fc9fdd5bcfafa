"""A fair comparison of pruning criteria: same weights, images, scope and MACs for every arm."""
