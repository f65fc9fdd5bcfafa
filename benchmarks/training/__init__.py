"""Training of CIFAR-10 networks by one recipe, in a given time: ``python -m benchmarks.training --help``."""
