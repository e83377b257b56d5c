"""`sparsight analyze`: how layers and visual tokens of any VLM behave."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from inspect import cleandoc
from pathlib import Path
from typing import Any

from rich.text import Text

from sparsight.console import Console, Progress
from sparsight.data.conversations import Sample
from sparsight.data.sources import Source, open_source
from sparsight.errors import UserError
from sparsight.pipeline.files import load_any, own_scenes
from sparsight.reporting import environment, layer_table, write_analysis
from sparsight.reporting.tables import write_atomic
from sparsight.settings.data import ConversationData
from sparsight.sparse.analysis import Analysis, measure, suggest


def analyze_checkpoint(
    name: str | Path,
    data: str | Path | None,
    images: str | Path | None,
    samples: int,
    out: str | Path,
    console: Console,
) -> dict[str, Any]:
    """Measure how layers and visual tokens of a VLM of transformers behave, and suggest settings to start from.

    Args:
        name: a folder, or an id on the hub.
        data: LLaVA JSON or messages; scenes of the model's own recipe, or the embedded ones, if not given.
        images: folder of the data's images; the file's own if not given.
        samples: conversations with images to look at, from the first one.
        out: gets ``analysis.json`` and ``index.html``.

    Returns:
        The record of ``analysis.json``.

    Raises:
        UserError: the model or its processor cannot be loaded or measured, or no sample has an image.
    """
    name, out = str(name), Path(out)
    if images is not None and data is None:
        raise UserError(f"--images {images}: expected --data as well, the conversations about these images")
    source = open_source(
        ConversationData(path=str(data), images=str(images) if images else None) if data else own_scenes(name),
        samples,
        256,
    )
    chosen, without = _with_images(source, samples)
    if not chosen:
        raise UserError(f"{data}: none of its {without} samples has an image; visual tokens need some")
    model, processor = load_any(name, attn_implementation="eager")

    def inputs() -> Iterator[Any]:
        for sample in chosen:
            yield _inputs(sample, source, processor).to(model.device, dtype=model.dtype)

    with Progress(console=console) as bar:
        measured = measure(model, bar.track(inputs(), total=len(chosen), description="looking at samples"))
    settings = {"model": name, "data": str(data or "scenes"), "images": str(images) if images else None}
    found = {"without_images": without, "environment": environment(), "analysis": asdict(measured)}
    record = settings | found | {"suggestion": _suggestion(measured)}
    write_atomic(out / "analysis.json", json.dumps(record, indent=2, allow_nan=False) + "\n")
    write_analysis(record, out / "index.html")
    _print_analysis(record, out, console)
    return record


def _suggestion(measured: Analysis) -> dict[str, Any]:
    advice = suggest(measured)
    return {
        "compressor": advice.compressor.model_dump(mode="json"),
        "skipper": advice.skipper.model_dump(mode="json"),
        "importance": advice.importance,
        "reasons": advice.reasons,
        "code": advice.code,
        "rules": cleandoc(suggest.__doc__ or ""),
    }


def _with_images(source: Source, samples: int) -> tuple[list[Sample], int]:
    """The first samples that have images, and how many without were passed over on the way."""
    chosen: list[Sample] = []
    for index in range(len(source)):
        if len(chosen) == samples:
            return chosen, index - samples
        chosen += [sample for sample in [source[index]] if sample.images]
    return chosen, len(source) - len(chosen)


def _inputs(sample: Sample, source: Source, processor: Any) -> Any:
    """One conversation as the model's inputs, its images put into its messages."""
    images = iter(sample.images)
    messages = []
    for message in sample.messages:
        content = [
            part | {"image": source.image(next(images))} if part["type"] == "image" else part
            for part in message["content"]
        ]
        messages.append(message | {"content": content})
    try:
        return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    except ValueError as error:  # such as no chat template
        raise UserError(f"sample '{sample.id}': {error}") from None


def _print_analysis(record: dict[str, Any], out: Path, console: Console) -> None:
    seen, advice = record["analysis"], record["suggestion"]
    console.print(layer_table(record))
    if seen["without_attention"]:
        console.print(Text(f"! {seen['without_attention']}", style="yellow"))
    if record["without_images"]:
        console.print(f"samples without an image, passed over: {record['without_images']}")
    console.print(
        f"visual tokens: similarity with neighbours {seen['redundancy']:.3f}, of any two {seen['any_two']:.3f}\n"
    )
    for name, reason in advice["reasons"].items():
        console.print(Text.assemble((name, "bold"), f": {reason}"))
    console.print("\nSettings to start from, by simple rules, no measured optimum:\n")
    console.print(Text(advice["code"], style="bold"), soft_wrap=True)
    console.print(f"\nPage: [bold]{out / 'index.html'}[/], figures: {out / 'analysis.json'}")
