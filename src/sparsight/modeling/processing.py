"""The processor: images and text in, placeholders expanded to the model's number of visual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from transformers import AutoProcessor, BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessorMixin

from sparsight.errors import UserError
from sparsight.modeling.configuration import SparsightConfig, WithStub

IMAGE_TOKEN = "<image>"
_NO_VIDEOS = "this processor takes a video as its frames: give them as images, in their order, as training data does"
_THINNEST = 200  # the largest ratio of sides that native resolution takes


class SparsightProcessor(WithStub, ProcessorMixin):
    """Image processor + tokenizer. ``num_image_tokens`` comes from the model's layout and travels with it.

    Its chat template is the tokenizer's: setting one, here or later, sets the other. Raises UserError where
    ``num_image_tokens`` is below 1.
    """

    _auto_map = {"AutoProcessor": "SparsightProcessor"}

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
            raise UserError(f"num_image_tokens: expected 1 or more, found {num_image_tokens}")
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.tokenizer = tokenizer  # before the template, which is kept there
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    @property
    def chat_template(self) -> Any:
        """The tokenizer's: training, evaluation and `apply_chat_template` read the same one."""
        return self.tokenizer.chat_template

    @chat_template.setter
    def chat_template(self, template: Any) -> None:
        self.tokenizer.chat_template = template

    def pixels(self, images: Sequence[Image.Image]) -> BatchFeature:
        """The encoder's inputs for images in RGB: ``pixel_values``, and the images' grids of patches where
        these differ."""
        shaped = [_tamed(image, self.image_processor) for image in images]
        return self.image_processor(shaped, return_tensors="pt")

    @property
    def native(self) -> bool:
        """Whether an image has as many patches as its shape asks for, and `patches` can count them beforehand."""
        counts = hasattr(self.image_processor, "get_number_of_image_patches")
        return counts and resize_mode(self.image_processor) == "keep"

    def patches(self, width: int, height: int) -> int:
        """Patches that `pixels` makes of an image of that size, at native resolution."""
        sides = [max(side, -(-max(width, height) // _THINNEST)) for side in (height, width)]
        return self.image_processor.get_number_of_image_patches(*sides)

    def validate_inputs(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> None:
        """Raises UserError for videos, which would be left out else."""
        if videos is not None:
            raise UserError(_NO_VIDEOS)
        super().validate_inputs(images=images, text=text, videos=videos, **kwargs)

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. Raises UserError for parts of type video, which would be left out else."""
        for turn in (turn for each in conversation for turn in (each if isinstance(each, list) else [each])):
            content = turn.get("content")
            if isinstance(content, list) and any("video" in str(part.get("type")) for part in content):
                raise UserError(_NO_VIDEOS)
        return super().apply_chat_template(conversation, *args, **kwargs)

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[Any, list[str]]:
        flat = make_flat_list_of_images(images)
        flat = [_tamed(each, self.image_processor) if isinstance(each, Image.Image) else each for each in flat]
        return super()._process_images(flat, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **_: Any) -> str:
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **_: Any) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)


def resize_mode(image_processor: Any) -> str:
    """How an image processor shapes images: ``square``, ``pad``, ``crop`` or ``keep``."""
    if hasattr(image_processor, "merge_size"):
        return "keep"
    crops = getattr(image_processor, "do_center_crop", False)
    return "crop" if crops else "pad" if getattr(image_processor, "do_pad", False) else "square"


def _tamed(image: Image.Image, image_processor: Any) -> Image.Image:
    """An image that its image processor can shape: only extreme ratios change.

    Padding needs a shorter side that is still 2 pixels when the longer one fits, native resolution a ratio of 200 at
    most: thinner images are made thicker. Cropping takes the middle alone, so the ends of one thinner than 1:256
    are cut off before it is enlarged: its enlargement could be larger than memory.
    """
    mode, (short, long) = resize_mode(image_processor), sorted(image.size)
    if mode == "square" or long <= 2 * short:
        return image
    wide = image.width == long
    if mode == "crop":
        most = min(long, 256 * short)
        start = (long - most) // 2
        return image.crop((start, 0, start + most, short) if wide else (0, start, short, start + most))
    side = image_processor.size["max_height"] // 2 if mode == "pad" else _THINNEST
    thick = max(short, -(-long // side))
    return image.resize((long, thick) if wide else (thick, long))


AutoProcessor.register(SparsightConfig, SparsightProcessor, exist_ok=True)
