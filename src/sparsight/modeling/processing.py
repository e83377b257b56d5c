"""The processor: pictures and text in, placeholders expanded to the model's number of visual tokens."""

from __future__ import annotations

from typing import Any

from transformers import AutoProcessor
from transformers.processing_utils import MultiModalData, ProcessorMixin

from sparsight.modeling.configuration import SparsightConfig

IMAGE_TOKEN = "<image>"


class SparsightProcessor(ProcessorMixin):
    """Image processor + tokenizer. ``num_image_tokens`` comes from the model's layout and travels with it."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        num_image_tokens: int = 1,
        image_token: str = IMAGE_TOKEN,
        **_: Any,
    ) -> None:
        if num_image_tokens < 1:
            raise ValueError(f"num_image_tokens: expected 1 or more, found {num_image_tokens}")
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **_: Any) -> str:
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **_: Any) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)


AutoProcessor.register(SparsightConfig, SparsightProcessor, exist_ok=True)
