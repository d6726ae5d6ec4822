"""Without a GPU, the plugin's Triton kernel is tested in Triton's interpreter, which has to be chosen before triton is imported."""

import os
import sys

import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"
