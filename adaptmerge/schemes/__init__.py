"""How quantised checkpoints store weights: one file per scheme, tensors in, tensors out."""
