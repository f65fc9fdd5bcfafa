"""``ippro-tp``: from a trained network to a smaller one, in one command that can be killed and run again."""
