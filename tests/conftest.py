"""One thread for every test: results do not depend on the machine, and two runs can share it."""

import torch

torch.set_num_threads(1)
