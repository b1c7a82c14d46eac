"""The language-model head: hidden states in, per-row results and gradients out, a chunk of logits at a time."""
