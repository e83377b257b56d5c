"""The Sparse Training Scheme: fewer visual tokens, fewer layers, in training alone. Knows tensors, not our model."""
