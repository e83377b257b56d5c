"""vLLM: `vllm serve FOLDER` of a composed model, by its backend for models of transformers.

Run with vllm 0.32 (`make test-vllm`). That backend asks of a model what ours have: a processor that says where
placeholders are and how many tokens they become, ``get_image_features``, an attention that can be exchanged,
tensor-parallel plans.
"""

from __future__ import annotations


def register() -> None:
    """What the entry point in ``vllm.general_plugins`` calls, in each process of vLLM: importing this module has made
    our classes known to transformers, and the registry gets the name of the backend's class, not yet imported."""
    from vllm import ModelRegistry

    backend = "vllm.model_executor.models.transformers:TransformersMultiModalForCausalLM"
    ModelRegistry.register_model("SparsightForConditionalGeneration", backend)
