"""The composed VLM, a model of transformers.

Shapes: I images in the whole batch, B samples, T text positions, N visual tokens an image, E language width,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForImageTextToText, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import can_return_tuple, torch_compilable_check

from sparsight.bridges import WindowedResampler, build_bridge
from sparsight.compat import CACHE, Generates, slice_logits_to_keep
from sparsight.devices.ranks import several_ranks, touched
from sparsight.errors import UserError
from sparsight.layouts import Scale
from sparsight.modeling.configuration import EfficientNetLiteConfig, Registered, SparsightConfig
from sparsight.modeling.efficientnet_lite import EfficientNetLiteModel
from sparsight.modeling.encoders import encode, sincos_2d

_LEAN = {"levels_only": True, "return_dict": True}


@dataclass
class SparsightCausalLMOutput(CausalLMOutputWithPast):
    """``image_hidden_states``: visual tokens (I, N, E); ``logits`` is None when only the loss was asked for."""

    image_hidden_states: torch.Tensor | None = None


@dataclass
class SparsightModelOutput(BaseModelOutputWithPast):
    """``image_hidden_states``: visual tokens (I, N, E)."""

    image_hidden_states: torch.Tensor | None = None


class SparsightPreTrainedModel(Registered, PreTrainedModel):
    config: SparsightConfig
    config_class = SparsightConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = [CACHE]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True  # or not, as the language model says
    _no_split_modules = ["ScaleResampler"]
    # Quantizers leave these as they are: bridges multiply with weights themselves, and images need few weights.
    _keep_in_fp32_modules = [r"(?:.*\.)?multi_modal_projector", r"(?:.*\.)?vision_tower"]

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """They are not kept in fp32 beside that: where fp16 is asked for, all parts come in fp16."""
        plan = super()._get_dtype_plan(dtype)
        return {name: kept for name, kept in plan.items() if name not in SparsightPreTrainedModel._keep_in_fp32_modules}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, WindowedResampler):
            module.reset_parameters()
        else:
            super()._init_weights(module)


class SparsightModel(SparsightPreTrainedModel):
    """Vision tower, bridge (``multi_modal_projector``) and language model, without the output layer."""

    def __init__(self, config: SparsightConfig) -> None:
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config, trust_remote_code=False)
        self.multi_modal_projector = build_bridge(config.bridge, config.level_widths, config.text_config.hidden_size)
        self.language_model = AutoModel.from_config(config.text_config, trust_remote_code=False)
        self._can_compile_fullgraph = self.language_model._can_compile_fullgraph
        self.post_init()

    encodes_blank_images = True  # `_without_images`; `sparsight.attach` asks

    @property
    def tokens_on_grid(self) -> bool:
        """Whether visual tokens stand in a grid as the patches do, and are no answers to queries."""
        return not isinstance(self.multi_modal_projector, WindowedResampler)

    def encode_images(self, pixel_values: Tensor, image_grid_thw: Tensor | None = None) -> tuple[Tensor, ...]:
        """Feature levels of images (I, 3, h, w), each (I, H, W, C), as a feature cache holds them.

        A native-resolution encoder also takes its own patches with ``image_grid_thw`` (I, 3); maps are then padded.
        """
        return self._encode(pixel_values, image_grid_thw)[0]

    def _encode(
        self, pixel_values: Tensor, image_grid_thw: Tensor | None, **asked: bool
    ) -> tuple[tuple[Tensor, ...], Any]:
        """Feature levels, and what the encoder gave."""
        tower, frozen = self.vision_tower, not any(p.requires_grad for p in self.vision_tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            levels_IHWC, output, _ = encode(tower, pixel_values, self.config.vision_levels, image_grid_thw, **asked)
        return tuple(levels_IHWC), output

    def bridge_features(
        self,
        levels_IHWC: tuple[Tensor, ...],
        image_grid_thw: Tensor | None = None,
        image_index: Tensor | None = None,
    ) -> Tensor:
        """Visual tokens (I, N, E) from feature levels; ``image_index`` as in `forward`."""
        visual_INE = self.multi_modal_projector(*self._bridge_inputs(levels_IHWC, image_grid_thw))
        return visual_INE if image_index is None else visual_INE.index_select(0, image_index)

    def _bridge_inputs(
        self, levels_IHWC: tuple[Tensor, ...], image_grid_thw: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        if self.config.feature_positions:
            levels_IHWC = tuple(
                F.layer_norm(x, x.shape[-1:]) + sincos_2d(*x.shape[1:], x.device, x.dtype)  # type: ignore[call-arg]
                for x in levels_IHWC
            )
        return levels_IHWC, None if image_grid_thw is None else image_grid_thw[:, 1:]

    @torch.no_grad()
    def attention_maps(self, pixel_values: Tensor, image_grid_thw: Tensor | None = None) -> dict[Scale, Tensor]:
        """Where the queries of each scale look, (I, tokens of the scale, H, W): see `WindowedResampler`.

        Raises:
            UserError: the bridge has no queries.
        """
        bridge = self.multi_modal_projector
        if not isinstance(bridge, WindowedResampler):
            kind = self.config.bridge.kind
            raise UserError(f"a bridge of kind {kind} has no queries; expected resampler or chain_of_sight")
        levels_IHWC = self.encode_images(pixel_values, image_grid_thw)
        return bridge.attention_maps(*self._bridge_inputs(levels_IHWC, image_grid_thw))

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        image_grid_thw: Tensor | None = None,
        image_index: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Visual tokens (I, N, E) in ``pooler_output``; with grids a list of I tensors (N, E), by which engines tell
        images of several sizes apart. The rest is the encoder's own: ``last_hidden_state``, and all ``hidden_states``
        and ``attentions`` where they are asked for (``output_hidden_states``, ``output_attentions``), here or in its
        configuration. `forward` asks for ``levels_only``, without these."""
        # No arguments of their own: `generate` hands those to this method alone, and the language model lacks them.
        every = kwargs.get("output_hidden_states") or self.config.vision_config.output_hidden_states
        asked = {"output_attentions": True} if kwargs.get("output_attentions") else {}
        lean = kwargs.get("levels_only") and not (every or asked)
        levels_IHWC, output = self._encode(pixel_values, image_grid_thw, whole=not lean, **asked)
        visual_INE = self.bridge_features(levels_IHWC, image_grid_thw, image_index)
        if lean:
            return BaseModelOutputWithPooling(pooler_output=visual_INE)
        states = getattr(output, "hidden_states", None) or output.feature_maps
        last = getattr(output, "last_hidden_state", None)
        return BaseModelOutputWithPooling(
            last_hidden_state=states[-1] if last is None else last,
            pooler_output=visual_INE if image_grid_thw is None else list(visual_INE),
            # Kept only on request: a frozen encoder's would stay in memory until the backward pass.
            hidden_states=tuple(states) if every else None,
            attentions=getattr(output, "attentions", None),
        )

    def get_placeholder_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
        """Where the visual tokens go, (B, T, 1).

        Raises:
            UserError: placeholders and features differ in number (the message has the counts of each sample) or width.
        """
        if input_ids is None:
            token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            mask_BT = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        else:
            mask_BT = self._is_placeholder(input_ids)
        images, tokens, width = image_features.shape
        if width != inputs_embeds.shape[-1]:
            raise UserError(f"visual tokens are {width} wide, the language model {inputs_embeds.shape[-1]}")
        torch_compilable_check(
            mask_BT.sum() == images * tokens,
            lambda: (
                f"the batch has {images} images of {tokens} visual tokens = {images * tokens}, but its samples hold "
                f"{mask_BT.sum(1).tolist()} image placeholders = {int(mask_BT.sum())}. Was the processor scaled "
                "with the model, or a text truncated?"
            ),
        )
        return mask_BT[..., None]

    def _is_placeholder(self, input_ids: Any) -> Tensor:
        return input_ids == self.config.image_token_id

    def _splice(
        self, visual_INE: Tensor, input_ids: Tensor | None, embeds_BTE: Tensor, visual_index: Tensor | None
    ) -> Tensor:
        """Embeddings with visual tokens in place of their placeholders."""
        visual_ME = visual_INE.flatten(0, 1).to(embeds_BTE.dtype)
        if visual_index is not None and visual_ME.shape == (len(visual_index), embeds_BTE.shape[2]):
            return embeds_BTE.flatten(0, 1).index_copy(0, visual_index, visual_ME).view_as(embeds_BTE)
        return embeds_BTE.masked_scatter(self.get_placeholder_mask(input_ids, embeds_BTE, visual_INE), visual_ME)

    def _without_images(self, embeds_BTE: Tensor) -> Tensor:
        """A batch of text alone: every trainable parameter that it leaves out gets a gradient of zero.

        So it has a backward pass when only the bridge trains, and all ranks reduce the same gradients. Where there are
        several ranks, a blank image goes through encoder and bridge: those may be sharded, and every rank has to be
        there when they are gathered.
        """
        if several_ranks():
            side = self.config.image_size
            blank = self.get_image_features(embeds_BTE.new_zeros(1, 3, side, side), **_LEAN).pooler_output
            embeds_BTE = embeds_BTE + 0.0 * blank.sum().to(embeds_BTE.dtype)
        return touched(embeds_BTE, (*self.multi_modal_projector.parameters(), *self.vision_tower.parameters()))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_grid_thw: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        *,
        image_index: Tensor | None = None,
        visual_index: Tensor | None = None,
        **kwargs: Any,
    ) -> SparsightModelOutput:
        """See [`SparsightForConditionalGeneration.forward`]; ``kwargs`` go to the language model."""
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give exactly one of input_ids and inputs_embeds")
        if pixel_values is not None and mm_encoder_outputs is not None:
            raise UserError("give pixel_values or mm_encoder_outputs, not both")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        encoded = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            encoded = self.get_image_features(pixel_values, image_grid_thw, image_index, **_LEAN)
        visual_INE = None
        if encoded is not None:
            visual_INE = encoded.pooler_output
            if visual_INE is None:  # cached features of a frozen encoder
                # As an encoder gives them: without autocast, weights in fp32 take no bf16.
                levels = tuple(level.float() for level in encoded.hidden_states)
                visual_INE = self.bridge_features(levels, image_grid_thw, image_index)
            elif not isinstance(visual_INE, Tensor):
                visual_INE = torch.stack(tuple(visual_INE))
            inputs_embeds = self._splice(visual_INE, input_ids, inputs_embeds, visual_index)
        elif self.training:  # in eval mode placeholders without images are words, as in other families
            given = input_ids is not None and input_ids.shape[1] > 1
            if given and (len(visual_index) if visual_index is not None else self._is_placeholder(input_ids).any()):
                count = self._is_placeholder(input_ids).sum(1).tolist()
                raise UserError(f"the samples hold {count} image placeholders, but there are no images")
            inputs_embeds = self._without_images(inputs_embeds)
        if encoded is not None and self.training and several_ranks():
            # Blocks above the last feature level get no gradient otherwise.
            inputs_embeds = touched(inputs_embeds, self.vision_tower.parameters())
        kwargs[CACHE] = past_key_values if cache is None else cache
        outputs = self.language_model(inputs_embeds=inputs_embeds, **kwargs)
        return SparsightModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=visual_INE,
        )


class SparsightForConditionalGeneration(Generates, SparsightPreTrainedModel, GenerationMixin):
    """A VLM from any vision encoder and any causal LM; `sparsight.build` makes one."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}  # the language model has its own

    def __init__(self, config: SparsightConfig) -> None:
        super().__init__(config)
        self.model = SparsightModel(config)
        self._can_compile_fullgraph = self.model._can_compile_fullgraph
        text = config.text_config
        self.lm_head: nn.Module = nn.Linear(text.hidden_size, text.vocab_size, bias=config.lm_head_bias)
        embeddings = self.model.language_model.get_input_embeddings()
        path = next(name for name, module in self.model.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"model.{path}.weight"}
        self.post_init()
        # transformers lists the encoder family's, also its text tower's, for which FSDP would look in vain.
        there = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = there.intersection(self._no_split_modules)  # type: ignore[assignment]

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See [`SparsightModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        *,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_grid_thw: Tensor | None = None,
        image_index: Tensor | None = None,
        loss_only: bool = False,
        visual_index: Tensor | None = None,
        supervised_index: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> SparsightCausalLMOutput:
        """Predict the next token.

        Args:
            pixel_values: images of the whole batch in reading order, (I, 3, h, w); samples may have 0 to k.
            image_grid_thw: (I, 3), when the pixels are the patches of a native-resolution encoder's own processor.
            image_index: of each image in the text its row among those given, if one that is given stands there twice.
            mm_encoder_outputs: ``{"image": output}`` instead of pixels: visual tokens in ``pooler_output``, or
                feature levels (I, H, W, C) in ``hidden_states``.
            labels: (B, T); -100 is not supervised.
            loss_only: project only the positions with a label on the vocabulary, and return no logits.
            visual_index: where placeholders stand in the flattened batch, (images * tokens,), if that is known: looking
                for them, the host would wait for the device.
            supervised_index: the same of positions whose next one has a label, for ``loss_only``.
            cache: the same as ``past_key_values``, which transformers calls so from 5.24 on.

        Raises:
            UserError: image placeholders and visual tokens differ in number, or ``loss_only`` without labels.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            image_grid_thw=image_grid_thw,
            image_index=image_index,
            visual_index=visual_index,
            **kwargs,
        )
        hidden_BTE, loss, logits = outputs.last_hidden_state, None, None
        if loss_only:
            loss = self._sparse_loss(hidden_BTE, labels, kwargs.get("num_items_in_batch"), supervised_index)
        else:
            logits = self.lm_head(slice_logits_to_keep(hidden_BTE, logits_to_keep))
            if labels is not None:
                loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        rest = {key: value for key, value in outputs.items() if key != "last_hidden_state"}
        return SparsightCausalLMOutput(loss=loss, logits=logits, **rest)

    def _sparse_loss(
        self, hidden_BTE: Tensor, labels: Any, items: Tensor | int | None, index_M: Tensor | None
    ) -> Tensor:
        """The causal loss, with the vocabulary projection paid only where there is a label."""
        if labels is None:
            raise UserError("loss_only needs labels")
        target_X = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
        index_M = (target_X != -100).nonzero()[:, 0] if index_M is None else index_M
        logits_MV = self.lm_head(hidden_BTE.flatten(0, 1)[index_M]).float()
        total = F.cross_entropy(logits_MV, target_X[index_M], reduction="sum")
        return total / (items if items is not None else len(index_M))


AutoModelForImageTextToText.register(SparsightConfig, SparsightForConditionalGeneration, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)
AutoModel.register(SparsightConfig, SparsightModel, exist_ok=True)
