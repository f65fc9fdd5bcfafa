"""One thread a process: networks this small run slower on several, and `-n 2` uses the second core."""

import torch

torch.set_num_threads(1)
