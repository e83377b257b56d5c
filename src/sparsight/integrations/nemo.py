"""NeMo AutoModel: `recipe: {_target_: sparsight.integrations.nemo.SparsightRecipeForVLM}` and `sparsight: {...}`.

Its recipes take no callbacks, and of models only their own targets; so this is a recipe that adds to theirs.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from sparsight.errors import UserError
from sparsight.integrations import callback_from
from sparsight.integrations.loop import follow
from sparsight.sparse.attach import attach
from sparsight.sparse.executed import figures

_RECIPES = {"SparsightRecipeForVLM": ("nemo_automodel.recipes.vlm.finetune", "FinetuneRecipeForVLM")}


class Sparse:
    """Before a recipe of NeMo AutoModel, among the bases of a class: attaches what the key ``sparsight`` says."""

    cfg: Any
    model_parts: list[nn.Module]
    optimizer: list[Any]
    step_scheduler: Any

    def setup(self) -> None:
        """Raises UserError for wrong settings, and for parallelism under which nothing can be attached."""
        methods = callback_from(_plain(self.cfg.get("sparsight", None)), "sparsight").methods
        assert methods is not None
        if methods.dense_probe is not None:
            raise UserError("sparsight.dense_probe: this recipe has no probe; leave it out")
        super().setup()  # type: ignore[misc]
        _refuse(getattr(self, "mesh_context", None), self.model_parts, methods.skipper is not None)
        model = getattr(self.model_parts[0], "module", self.model_parts[0])  # of DistributedDataParallel
        model = getattr(model, "_orig_mod", model)  # of torch.compile
        self.handle = attach(model, methods.compressor, methods.skipper, seed=methods.seed)
        follow(self.handle, self.optimizer, self.step_scheduler.max_steps, start=self.step_scheduler.step)

    def log_train_metrics(self, log_data: Any) -> Any:
        """NeMo's own log, with tokens in and out, layers run, and executed FLOPs."""
        if passes := self.handle.take_passes():
            try:
                log_data.metrics.update(figures(self.handle, passes))
            except Exception as error:  # accounting never ends a training
                log_data.metrics["sparsight"] = f"executed FLOPs are left out: {error}"
        return super().log_train_metrics(log_data)  # type: ignore[misc]


def _plain(node: Any) -> Any:
    """A node of NeMo's configuration as a mapping."""
    if node is None:
        raise UserError("no key 'sparsight': expected sparsight: {compressor: {keep: 0.25}}, skipper, or both")
    return node.to_dict() if hasattr(node, "to_dict") else node


def _refuse(mesh: Any, parts: list[nn.Module], skips: bool) -> None:
    """Raises UserError where a rank has but a part of the model, or of each sequence."""
    for size, cut in (("pp_size", "layers"), ("cp_size", "sequences"), ("tp_size", "matrices")):
        if (ranks := getattr(mesh, size, 1)) > 1 or (size == "pp_size" and len(parts) > 1):
            raise UserError(f"{size} {ranks}: ranks share {cut}, with which nothing can be attached; set it to 1")
    kinds = {type(module).__name__ for module in parts[0].modules()}
    flat = "MegatronFSDP" in kinds or any(isinstance(m, FullyShardedDataParallel) for m in parts[0].modules())
    if skips and flat:
        raise UserError(
            "the skipper cannot work on flat shards of all layers: set distributed.strategy to fsdp2 or ddp"
        )


def __getattr__(name: str) -> Any:
    """The recipes, made when NeMo AutoModel asks for them."""
    if name not in _RECIPES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, base = _RECIPES[name]
    made = type(name, (Sparse, getattr(__import__(module, fromlist=[base]), base)), {"__module__": __name__})
    globals()[name] = made
    return made
