"""`sparsight data check` and `sparsight analyze`, as tables and as pages, from the records of their JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from sparsight.reporting.inspection import RAMP
from sparsight.reporting.page import examples as shown_examples
from sparsight.reporting.page import folded, plot, plots, section, shown_table, write_page
from sparsight.reporting.tables import Column, Table, decimals, share, table

SHOWN = 500  # bad samples on the page; check.json has all
_ADVICE = (
    "For the Sparse Training Scheme. They come from simple rules on the figures below: starting points, and no "
    "measured optimum. Only training runs tell."
)
_LAYERS = (
    "Mean cosine similarity of a layer's input and output: 1 is a layer that changes no direction. Attention: of text "
    "behind an image to visual tokens, and if it attended evenly to all that it sees. Importance: 1 - mean similarity."
)
_REDUNDANCY = (
    "Redundancy: how similar a token is to its neighbours on the image's grid (along the sequence, where an image's "
    "tokens form no square), as the first layer gets them. Of a resampler's queries, read the mean alone."
)


def check_table(record: Mapping[str, Any]) -> Table:
    """Figures of a check of data, in the order to be read."""
    lengths, context, ratio = record["lengths"], record["context"], record["text_to_visual"]
    quantiles = ", ".join(f"{lengths['quantiles'][share]:.0f}" for share in ("0.5", "0.9", "0.99"))
    rows = [
        ("samples", f"{record['samples']:,}"),
        ("bad samples", f"{len(record['bad']):,}"),
        (f"longer than {context:,} tokens", f"{len(record['too_long']):,}") if context else ("context", "not known"),
        ("tokens of a sample, mean", f"{lengths['mean']:.1f}"),
        ("tokens of a sample, quantiles 0.5, 0.9, 0.99", quantiles),
        ("longest sample", f"{lengths['longest']:,} tokens (id {lengths['longest_id']})"),
        ("images", f"{record['images']:,}"),
        ("visual tokens of an image", f"{record['visual_tokens_per_image']:,}"),
        (
            "text tokens : visual tokens",
            f"{record['text_tokens']:,} : {record['visual_tokens']:,}" + ("" if ratio is None else f" = {ratio:.3g}"),
        ),
    ]
    return table(f"{record['data']}, as stage {record['stage']} of {record['recipe']} sees it", ("", ""), rows)


def write_check(record: Mapping[str, Any], examples: Sequence[Mapping[str, str]], path: str | Path) -> None:
    """Write the page, atomically.

    Args:
        examples: ``id``, ``text`` and ``image`` (PNG in base64) of images to show.
    """
    bad, too_long, histogram = record["bad"], record["too_long"], record["lengths"]["histogram"]
    bounds = [*pairwise(histogram["edges"])]
    bars = {
        "type": "bar",
        "name": "samples",
        "x": [(low + high) / 2 for low, high in bounds],
        "width": [high - low for low, high in bounds],
        "y": histogram["counts"],
        "marker": {"color": {"$css": "--run-1"}},
        "hovertemplate": "%{x:.0f} tokens: %{y} samples<extra></extra>",
    }
    across, up = ({"title": {"text": text}} for text in ("tokens of a sample", "samples"))
    lengths = plots(("Lengths of the good samples", plot("lengths", [bars], across, up)), beside=check_table(record))
    sections = [section("", "", lengths)]
    for title, found, heads in (
        ("Bad samples", bad, ("row", "id", "reason")),
        (f"Longer than {record['context']} tokens", too_long, ("row", "id", "text tokens", "visual tokens")),
    ):
        rows = [[entry[head.replace(" ", "_")] for head in heads] for entry in found[:SHOWN]]
        more = f" The first {SHOWN} of {len(found)}; check.json has all." if len(found) > SHOWN else ""
        if rows:
            sections.append(section(title, more, shown_table(table("", heads, rows, left=len(heads)))))
    shown = [{"image": each["image"], "tag": each["id"], "text": each["text"], "lines": []} for each in examples]
    sections += [section("Examples", "The first good samples with images.", shown_examples(shown))] if shown else []
    lead = f"{record['samples']} samples, as stage {record['stage']} of {record['recipe']} sees them. "
    lead += f"Bad: {len(bad)}." if bad else "None is bad."
    lead += f" Longer than {record['context']} tokens: {len(too_long)}." if too_long else ""
    write_page(path, "check of data", (record["data"], ""), lead, sections)


def layer_table(record: Mapping[str, Any]) -> Table:
    """A row for each layer: cosines, shares in %, 1 - similarity; empty where nothing was measured."""
    seen = record["analysis"]
    counts = (f"{seen[key]} {key.replace('_', ' ')}" for key in ("samples", "images", "visual_tokens", "text_tokens"))
    heads = ("layer", "similarity, visual", "similarity, text", "attention to visual", "if even", "importance")
    rows = [
        (
            number,
            *(decimals(layer[key]) for key in ("visual_similarity", "text_similarity")),
            *(share(layer[key]).replace("-", "") for key in ("attention", "even_attention")),
            decimals(importance),
        )
        for number, (layer, importance) in enumerate(
            zip(seen["layers"], record["suggestion"]["importance"], strict=True)
        )
    ]
    return table(f"{record['model']}: {', '.join(counts)}", heads, rows, left=0)


def write_analysis(record: Mapping[str, Any], path: str | Path) -> None:
    """Write the page, atomically.

    Args:
        record: ``model``, ``data``, ``environment``, ``analysis`` (fields of `Analysis`) and ``suggestion`` (those of
            `Suggestion`, and ``code`` and ``rules``), as in ``analysis.json``.
    """
    seen, advice = record["analysis"], record["suggestion"]
    chosen = {**advice["compressor"], **advice["skipper"]}
    columns = [Column("setting", left=True), Column("value"), Column("why", left=True)]
    settings = Table(columns, [[key, str(chosen[key]), reason] for key, reason in advice["reasons"].items()])
    lead = f"{seen['samples']} samples of {record['data']}: {seen['images']} images, "
    lead += f"{seen['visual_tokens']} visual tokens, {seen['text_tokens']} text tokens."
    if record["without_images"]:
        lead += f" Samples without an image, passed over: {record['without_images']}."
    redundant = [
        ["redundancy: similarity with neighbours", f"{seen['redundancy']:.3f}"],
        ["similarity of any two tokens of an image", f"{seen['any_two']:.3f}"],
    ]
    tokens = Table([Column("", left=True), Column("")], redundant)  # type: ignore[arg-type]
    layers = layer_table(record)
    layers.title = "Figures of each layer"
    sections = [
        section("Settings to start from", _ADVICE, shown_table(settings), folded("As code", advice["code"])),
        section("Layers", _LAYERS, _layer_plots(seen)),
        section("Visual tokens", _REDUNDANCY, plots(*_map(seen), beside=tokens)),
        section("Details", "All figures are in analysis.json.", shown_table(layers, foldable=True)),
        section("", "", folded("The rules of the settings", advice["rules"])),
        section("", "", folded("Environment", json.dumps(record["environment"], indent=2))),
    ]
    warnings = [seen["without_attention"]] if seen["without_attention"] else []
    write_page(path, "analysis of layers and visual tokens", (record["model"], ""), lead, sections, warnings=warnings)


def _layer_plots(seen: Mapping[str, Any]) -> dict[str, Any]:
    layers = seen["layers"]
    similar = [_curve(layers, "visual_similarity", "visual positions", "--run-1")]
    similar.append(_curve(layers, "text_similarity", "text positions", "--run-2"))
    shown = [("Similarity of input and output", _plot("similarity", "cosine similarity", similar))]
    if any(layer["attention"] is not None for layer in layers):
        given = _curve(layers, "attention", "given", "--run-1")
        even = _curve(layers, "even_attention", "if even", "--run-0", dash="4px,4px")
        figure = _plot("attention", "share of attention", [given, even], {"tickformat": ".0%", "rangemode": "tozero"})
        shown.append(("Attention of text to visual tokens", figure))
    return plots(*shown)


def _map(seen: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    if not seen["redundancy_map"]:
        return []
    scale = [[number / (len(RAMP) - 1), f"rgb{colour}"] for number, colour in enumerate(RAMP)]
    heat = {"type": "heatmap", "z": seen["redundancy_map"], "colorscale": scale, "xgap": 1, "ygap": 1}
    heat |= {"hovertemplate": "row %{y}, column %{x}: %{z:.3f}<extra></extra>", "colorbar": {"thickness": 12}}
    wide = {"constrain": "domain", "showgrid": False, "dtick": 1}
    figure = plot("map", [heat], wide, wide | {"autorange": "reversed", "scaleanchor": "x"})
    return [(f"Redundancy by position, mean of {seen['map_images']} images", figure)]


def _plot(name: str, unit: str, curves: list[dict[str, Any]], axis: Mapping[str, Any] | None = None) -> dict[str, Any]:
    up = {"title": {"text": unit}, "fixedrange": True, **(axis or {})}
    return plot(name, curves, {"title": {"text": "layer"}, "fixedrange": True}, up)


def _curve(layers: list[Mapping[str, Any]], key: str, name: str, colour: str, dash: str = "solid") -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "y": [layer[key] for layer in layers],
        "line": {"color": {"$css": colour}, "width": 2.5, "dash": dash},
        "hovertemplate": "layer %{x}: %{y:.3f}<extra>%{fullData.name}</extra>",
    }
