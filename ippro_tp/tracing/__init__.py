"""What a forward and backward pass did: taps, channels, rows of samples."""
