"""Two steps of each stage in a process of its own: resident memory at the peak beyond the imports, and the forecast.

    python tests/memory_peak.py CASES_AS_JSON FOLDER

Processes are forked behind the imports. One thread alone, as threads do not survive that.
"""

import gc
import json
import os
import resource
import sys
from pathlib import Path

import psutil
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from sparsight.cost.forecast import forecast
from sparsight.modeling.build import build
from sparsight.settings.recipe import Recipe
from sparsight.training.stages import add_lora, parameter_groups, select_trainable
from tiny import make_language

VISION = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
VISION |= {"patch_size": 16, "image_size": 224}
LANGUAGE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 5, "num_attention_heads": 8}
LANGUAGE |= {"vocab_size": 8000}


def measured(stage: dict, precision: str, folder: Path) -> dict[str, float]:
    vision, language = CLIPVisionConfig(**VISION), LlamaConfig(**LANGUAGE)
    vision.save_pretrained(folder / "vision")
    language.save_pretrained(folder / "language")
    values = {
        "name": "s",
        "image_size": 224,
        "batch_size": 6,
        "samples": 12,
        "conversation": {"text": 64, "supervised": 32},
    }
    recipe = Recipe.model_validate(
        {
            "vision": str(folder / "vision"),
            "language": str(folder / "language"),
            "precision": precision,
            "stages": [values | stage],
        }
    )
    _, tokenizer = make_language()
    gc.collect()
    before = psutil.Process().memory_info().rss
    cost = forecast(recipe)[0]
    stage = cost.stage
    model, _ = build(vision, language, stage.bridge, tokenizer=tokenizer, image_size=224)
    add_lora(model, stage.lora, 0)
    select_trainable(model, stage)
    model.train()
    if not cost.trains.vision:
        model.model.vision_tower.eval()
    if stage.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(6, 300, (6, cost.tokens + 64))
    ids[:, : cost.tokens] = model.config.image_token_id
    labels = ids.clone()
    labels[:, :-32] = -100
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    optimizer = torch.optim.AdamW(parameter_groups(model, stage), fused=True)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            pixels = torch.randn(6, 3, 224, 224)
            loss = model(**batch, pixel_values=pixels, loss_only=True, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"measured": peak, "forecast": sum(cost.memory().values())}


def main() -> None:
    for name, (stage, precision) in json.loads(sys.argv[1]).items():
        if not (child := os.fork()):
            found = measured(stage, precision, Path(sys.argv[2]))
            sys.stdout.write(json.dumps({"name": name} | found) + "\n")
            sys.stdout.flush()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, name


if __name__ == "__main__":
    main()
