"""One module for each command that runs models: they join data, model, training, evaluation and reports."""

from sparsight.pipeline.analyze import analyze_checkpoint
from sparsight.pipeline.check import check_data
from sparsight.pipeline.compare import run_comparison
from sparsight.pipeline.evaluate import EXAMPLES, autocast, evaluate_checkpoint
from sparsight.pipeline.files import RECIPE_FILE, load, samples_hash
from sparsight.pipeline.inspection import inspect_checkpoint
from sparsight.pipeline.train import enter_stage, max_length, run

__all__ = [
    "EXAMPLES",
    "RECIPE_FILE",
    "analyze_checkpoint",
    "autocast",
    "check_data",
    "enter_stage",
    "evaluate_checkpoint",
    "inspect_checkpoint",
    "load",
    "max_length",
    "run",
    "run_comparison",
    "samples_hash",
]
