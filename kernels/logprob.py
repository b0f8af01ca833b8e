"""Log-probabilities and entropies of chosen tokens, straight from hidden states and the head's weight.

    z = hidden @ weight.T / temperature                    (N, V) logits, never alive for more than one chunk of tokens
    logprob_i = z_i[target_i] - logsumexp(z_i)             Eq. LOGPROB
    entropy_i = logsumexp(z_i) - sum_v softmax(z_i)_v z_iv Eq. ENTROPY

Symbols: N response tokens (prompt and image tokens never reach the head), H hidden size, V vocabulary.
At V = 152 thousand, full fp32 logits of 16 thousand tokens are 10 GB; a chunk of 2,048 is 1.2 GB.
"""
import torch
from torch.utils.checkpoint import checkpoint

CHUNK = 2048  # tokens whose logits are alive at once


def logprob_ref(hidden, weight, targets, temperature):
    """The two equations above for one chunk; statistics in fp32 whatever the weights are.

    hidden (N, H), weight (V, H), targets (N,) int64 -> logprobs (N,), entropies (N,), both at least float32.
    """
    logits = hidden @ weight.T  # (N, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    lse = logits.logsumexp(-1)  # (N,)
    logprobs = logits.gather(-1, targets[:, None])[:, 0] - lse  # Eq. LOGPROB
    entropies = lse - ((logits - lse[:, None]).exp() * logits).sum(-1)  # Eq. ENTROPY
    return logprobs, entropies


def linear_logprob(hidden, weight, targets, temperature=1.0):
    """`logprob_ref` in chunks of tokens; the backward computes each chunk's logits again instead of keeping them.

    hidden (N, H), weight (V, H), targets (N,) -> logprobs (N,), entropies (N,); differentiable in hidden and weight.
    """
    if len(targets) <= CHUNK:
        return logprob_ref(hidden, weight, targets, temperature)
    chunks = zip(hidden.split(CHUNK), targets.split(CHUNK))
    parts = [checkpoint(logprob_ref, h, weight, t, temperature, use_reentrant=False) for h, t in chunks]
    logprobs, entropies = zip(*parts)
    return torch.cat(logprobs), torch.cat(entropies)
