"""Some 60 kinds of models and calls, each checked against slow and independent references."""
