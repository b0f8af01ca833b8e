"""The operations where training spends its memory and sampling its time: Triton on a GPU, plain torch everywhere else.

    ops.py      what the rest of the trainer calls, with the plain torch reference of each operation; no Triton
    logprob.py  log-probs and entropies from hidden states and the head's weight, alone or with a loss on top
    grpo.py     the clipped policy loss; its reference is train.py's `grpo_loss`
    decode.py   attention of one new token per row over a static cache
    sample.py   drawing a token from logits without sorting them
    twins.py    do a Triton function and its reference compute the same? asked at start, on a GPU

Nothing is imported here: macOS has no Triton, and transformers looks into a package of this name for its version.
"""
