"""The operations where a large-vocabulary trainer spends its memory, each with its plain-torch reference beside it."""
from kernels.logprob import linear_logprob

__all__ = ["linear_logprob"]
