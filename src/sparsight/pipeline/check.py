"""`sparsight data check`: every sample, as training would see it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.text import Text

from sparsight.console import Console, Progress
from sparsight.data.check import check_rows
from sparsight.data.collate import TrainingSet
from sparsight.data.conversations import Sample, unused_fields
from sparsight.data.sources import Source, open_source
from sparsight.errors import UserError
from sparsight.modeling.build import build_processor, load_tokenizer
from sparsight.modeling.scratch import scratch_tokenizer
from sparsight.pipeline.evaluate import EXAMPLES, png
from sparsight.pipeline.files import settle_image_size
from sparsight.pipeline.train import texts
from sparsight.reporting import check_table, environment, write_check
from sparsight.reporting.tables import write_atomic
from sparsight.settings.data import ConversationData
from sparsight.settings.recipe import Recipe, ScratchLanguage, Stage


def check_data(
    recipe: Recipe, out: str | Path, workers: int, console: Console, stage_name: str | None = None
) -> dict[str, Any]:
    """Look at every sample as the stage with most visual tokens would see it; no language model is built.

    Args:
        stage_name: the stage whose data to look at; needed where stages have data of their own.
        out: gets ``check.json`` and ``index.html``.
        workers: processes that look at samples.

    Returns:
        The record of ``check.json``: ``bad`` samples with reasons, those ``too_long`` for the language model, lengths.

    Raises:
        UserError: the encoder or the tokenizer cannot be loaded, the data cannot be opened at all, or no such stage.
    """
    recipe = settle_image_size(recipe).model_copy(update={"on_bad_sample": "quarantine"})  # all bad rows are to be told
    stage, processor, context = _seen_by(recipe, stage_name)
    conversations = sum(each.samples for each in recipe.of_the_same_data(stage))
    source = open_source(recipe.data_of(stage), conversations, stage.side, strict=False)
    with Progress(console=console) as bar:
        task = bar.add_task("looking at samples", total=len(source))
        data = TrainingSet(source, processor, len(source))
        found = check_rows(data, workers, lambda done: bar.update(task, completed=done))
    out, own = Path(out), recipe.source_of(stage)
    name = own.path if isinstance(own, ConversationData) else own.kind
    made_by = {"recipe": recipe.name, "stage": stage.name, "data": name, "environment": environment()}
    record = made_by | found.record(stage.max_length or context)
    record["visual_tokens_per_image"] = processor.num_image_tokens
    write_atomic(out / "check.json", json.dumps(record, indent=2, allow_nan=False) + "\n")
    shown = [source[row["row"]] for row in found.rows if row["images"]][:EXAMPLES]
    write_check(record, [_shown(sample, source) for sample in shown], out / "index.html")
    console.print(check_table(record))
    for entry in record["bad"][:EXAMPLES]:
        console.print(Text.assemble(("bad: ", "red"), f"{entry['id']}: {entry['reason']}"), soft_wrap=True)
    if len(record["bad"]) > EXAMPLES:
        console.print(f"and {len(record['bad']) - EXAMPLES} more")
    if found.unused:
        console.print(Text(unused_fields(name, found.unused, record["samples"])), soft_wrap=True)
    console.print(f"Page: [bold]{out / 'index.html'}[/], figures: {out / 'check.json'}")
    return record


def _seen_by(recipe: Recipe, stage_name: str | None) -> tuple[Stage, Any, int | None]:
    """The stage with most visual tokens, or that of this name; its processor; and the language model's context."""
    names = [stage.name for stage in recipe.stages]
    if stage_name not in (None, *names):
        raise UserError(f"--stage {stage_name}: no such stage; expected one of {', '.join(names)}")
    if stage_name is None and len(recipe.all_data()) > 1:
        raise UserError(f"stages have data of their own: name one of them, --stage {'|'.join(names)}")
    tokenizer, context = _tokenizer(recipe, recipe.stages[0])
    options: dict[str, Any] = {"vision_levels": recipe.vision_levels, "resize": recipe.resize}
    made = [
        (stage, build_processor(recipe.vision, tokenizer, stage.bridge, image_size=stage.image_size, **options))
        for stage in recipe.stages
        if stage_name in (None, stage.name)
    ]
    return *max(made, key=lambda each: each[1].num_image_tokens), context


def _tokenizer(recipe: Recipe, stage: Stage) -> tuple[Any, int | None]:
    """The language model's tokenizer, and how many positions it knows, if it says so."""
    language = recipe.language
    if isinstance(language, ScratchLanguage):
        return scratch_tokenizer(language, texts(recipe, stage)), language.context
    tokenizer, config = load_tokenizer(language if isinstance(language, str) else language.path)
    return tokenizer, getattr(config.get_text_config(), "max_position_embeddings", None)


def _shown(sample: Sample, source: Source) -> dict[str, str]:
    parts = [part["text"] for message in sample.messages for part in message["content"] if part["type"] == "text"]
    return {"id": sample.id, "text": " / ".join(parts)[:300], "image": png(source.image(sample.images[0]), 320)}
