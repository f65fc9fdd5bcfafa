"""From a model to a smaller one: saving and loading."""
