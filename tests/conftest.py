"""Tests import the modules at the top of the repository and run torch on one thread: small tensors gain nothing from more."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)
