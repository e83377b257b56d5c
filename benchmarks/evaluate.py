"""Time of an evaluation: in batches with shared images, against one `generate` after the other; choices by likelihood.

    python benchmarks/evaluate.py --model runs/demo/sparsight/finetune/model [--items 60] [--rounds 3]

Every way asks the same questions of the model's own scenes, without the control, in fp32; ways take turns. One by one,
each question goes through the processor with its image. Choices are the answers that a task has here, so
captions are left out of those.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import device_name, now, timing_options, write_result
from rich.console import Console

from sparsight.data.sources import scene_config
from sparsight.evaluation.ask import Questions, ask, rooms
from sparsight.evaluation.questions import scene_questions
from sparsight.pipeline import load
from sparsight.pipeline.files import own_scenes
from sparsight.scenes.questions import ScenesDataset


@torch.no_grad()
def one_by_one(model: Any, processor: Any, questions: Questions) -> list[str]:
    """By the processor and `generate`, a question at a time, with as much room as `ask` gives."""
    answers, room = [], rooms(processor.tokenizer, questions.items)
    for item in questions.items:
        content = [{"type": "image", "image": questions.image(item.image)}, {"type": "text", "text": item.question}]
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options).to(model.device)
        found = model.generate(**inputs, max_new_tokens=room[item.task], do_sample=False)
        text = processor.tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.append(text.strip())
    return answers


def main() -> None:
    count = {"type": int, "default": 60}
    options, device = timing_options(__doc__, model={"type": Path, "required": True}, items=count)
    model, processor = load(options.model)
    model.float().to(device).eval()
    own = own_scenes(options.model)
    scenes = ScenesDataset(scene_config(own, model.config.image_size), "test", 4 * options.items, tasks=own.tasks)
    questions = scene_questions(scenes, options.items)
    short = [item for item in questions.items if item.task != "caption"]
    answers_of = {task: tuple(dict.fromkeys(i.truth for i in short if i.task == task)) for task in questions.tasks}
    free = Questions(short, questions.image, questions.score)
    chosen = Questions([replace(i, choices=answers_of[i.task]) for i in short], questions.image, questions.score)

    def asked(of: Questions, size: int) -> list[str]:
        return [text for _, text in ask(model, processor, of, size, control=False).answers]

    ways: dict[str, Any] = {
        "one by one": partial(one_by_one, model, processor, questions),
        "shared images, batch 1": partial(asked, questions, 1),
        "shared images, batch 50": partial(asked, questions, 50),
        "short answers, generated": partial(asked, free, 50),
        "short answers, by likelihood": partial(asked, chosen, 50),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    said: dict[str, list[str]] = {}
    for _ in range(options.rounds):
        for name, way in ways.items():
            start = now(device)
            said[name] = way()
            seconds[name].append(now(device) - start)
    medians = {name: statistics.median(own) for name, own in seconds.items()}
    pairs = {
        "shared images, batch 1": "one by one",
        "shared images, batch 50": "one by one",
        "short answers, by likelihood": "short answers, generated",
    }
    console, rows = Console(), {}
    for name, base in pairs.items():
        same = sum(a == b for a, b in zip(said[name], said[base], strict=True))
        rows[name] = {"against": base, "ratio": medians[name] / medians[base], "same": same, "of": len(said[base])}
        console.print(f"{name}: {medians[name]:.2f} s, {rows[name]['ratio']:.2f}x of {base}; {same} answers alike")
    scores = {
        name: statistics.fmean(of.score(of.items, said[name]))
        for name, of in (("short answers, generated", free), ("short answers, by likelihood", chosen))
    }
    facts = {"device": device_name(device), "model": options.model.name, "rounds": options.rounds, "scores": scores}
    write_result(f"evaluate-{device.type}", facts | {"seconds": seconds, "rows": rows}, options.out, console)


if __name__ == "__main__":
    main()
