"""Sampling: from logits to tokens and logprobs, with state on the device.

sampler    the host side: rows, a step's plan, the order of the ops
state      what lives on the device
params     layouts of parameters and flags, random numbers
logprobs   results on their way to the host
reference  the ops in plain torch
kernel     the ops in Triton; threshold: the search of top-k and top-p
"""

from light_core.engine.sampling.logprobs import PendingLogprobs, Sampled, SampledTokens
from light_core.engine.sampling.params import STATUS_TEXT
from light_core.engine.sampling.sampler import Prepared, Sampler, Staged

__all__ = ["STATUS_TEXT", "PendingLogprobs", "Prepared", "Sampled", "SampledTokens", "Sampler", "Staged"]
