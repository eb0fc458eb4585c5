"""One thread for every test: results do not depend on the machine, and two runs can share it. No prepared data set of
the user's is read or made."""

import os
import tempfile

import torch

torch.set_num_threads(1)
EMPTY = tempfile.TemporaryDirectory(prefix="nelbo-data-")
os.environ["NELBO_DATA"] = EMPTY.name
