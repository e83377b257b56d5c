"""R23: the bridge is saved and loaded alone; where ranks hold shards of it: test_ranks.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import sparsight

LAYOUT = "1:4,2:2"


def test_a_bridge_goes_from_model_to_model(tmp_path: Path, tiny_vlm: Any) -> None:
    first, second = (tiny_vlm(LAYOUT)[0] for _ in range(2))
    with torch.no_grad():
        for parameter in first.model.multi_modal_projector.parameters():
            parameter.add_(1)
    sparsight.save_bridge(first, tmp_path / "new" / "bridge.safetensors")
    others = {n: t.clone() for n, t in second.state_dict().items() if "multi_modal_projector" not in n}
    sparsight.load_bridge(second, tmp_path / "new" / "bridge.safetensors")
    found = second.state_dict()
    for name, tensor in first.model.multi_modal_projector.state_dict().items():
        assert torch.equal(found[f"model.multi_modal_projector.{name}"], tensor)
    assert all(torch.equal(found[name], tensor) for name, tensor in others.items())


def test_a_bridge_that_does_not_fit_is_told_and_changes_nothing(tmp_path: Path, tiny_vlm: Any) -> None:
    file, model = tmp_path / "bridge.safetensors", tiny_vlm(LAYOUT)[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sparsight.save_bridge(tiny_vlm("1:4,4:2")[0], file)
    with pytest.raises(
        ValueError, match=r"holds the bridge .*1:4,4:2.* and the model's is .*1:4,2:2.*: expected the same"
    ):
        sparsight.load_bridge(model, file)
    save_file({"weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match="holds the bridge None"):
        sparsight.load_bridge(model, file)
    sparsight.save_bridge(tiny_vlm(LAYOUT, vision_levels=[2])[0], file)
    with pytest.raises(ValueError, match=r"another encoder or language model, these differ \(model, file\): "):
        sparsight.load_bridge(model, file)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="Linear has no bridge of Sparsight's"):
        sparsight.save_bridge(torch.nn.Linear(2, 2), file)
