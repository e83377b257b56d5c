"""The cost of a run in closed form: parameters, executed FLOPs, memory, hours. No torch, no weights."""

from sparsight.cost.flops import bridge_flops, language_flops
from sparsight.cost.shapes import LanguageShape, Trains, encoder_shape, language_shape

__all__ = ["LanguageShape", "Trains", "bridge_flops", "encoder_shape", "language_flops", "language_shape"]
