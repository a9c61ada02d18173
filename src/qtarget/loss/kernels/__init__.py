"""The two operations on a chunk of logits, as PyTorch and as Triton kernels."""
