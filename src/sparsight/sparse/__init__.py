"""The Sparse Training Scheme: fewer visual tokens, fewer layers, in training alone. Knows tensors, not our model."""

from sparsight.compat import check_attaching

check_attaching()
