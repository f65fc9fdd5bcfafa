"""`prune()` as its users call it, under several importances."""
