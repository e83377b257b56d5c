import io
import json
from copy import deepcopy

from rich.console import Console
from test_report import ATTACK, Page, dump, needs_chromium

from sparsight.reporting import layer_table, write_analysis

LAYERS = [
    {"visual_similarity": 0.5, "text_similarity": 0.6, "attention": 0.25, "even_attention": 0.75},
    {"visual_similarity": 0.9, "text_similarity": 0.8, "attention": None, "even_attention": None},
]
RECORD = {
    "model": "my-vlm",
    "data": "scenes",
    "without_images": 0,
    "environment": {"platform": "Linux"},
    "analysis": {
        "samples": 3,
        "images": 4,
        "visual_tokens": 64,
        "text_tokens": 30,
        "layers": LAYERS,
        "without_attention": "layers [1] gave none",
        "redundancy": 0.75,
        "any_two": 0.25,
        "redundancy_map": [[0.5, 1.0], [0.75, 0.75]],
        "map_images": 4,
    },
    "suggestion": {
        "compressor": {"keep": 0.25, "method": "uniform"},
        "skipper": {"alpha": 0.6, "epsilon": 0.3, "protected": [1, 0]},
        "importance": [0.45, 0.15],
        "reasons": {"keep": "neighbours", "protected": "low", "alpha": "like", "epsilon": "depth"},
        "code": "sparsight.attach(model)",
        "rules": "keep: 1 - redundancy",
    },
}


def page_of(record, path):
    write_analysis(record, path / "new" / "index.html")
    return (path / "new" / "index.html").read_text(encoding="utf-8")


def attacked(value):
    """Every text of a record, replaced."""
    if isinstance(value, dict):
        return {key: attacked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [attacked(item) for item in value]
    return ATTACK if isinstance(value, str) else value


def test_the_page_and_the_table_say_what_the_record_says(tmp_path):
    page = Page(page_of(RECORD, tmp_path))
    table = Console(width=120, record=True, file=io.StringIO())
    table.print(layer_table(RECORD))
    for cell in ("0.500", "0.600", "25.0%", "75.0%", "0.450", "0.900", "0.150"):
        assert cell in page.text and cell in table.export_text(clear=False)
    for said in ("layers [1] gave none", "sparsight.attach(model)", "no measured optimum", "keep: 1 - redundancy"):
        assert said in page.text
    figures = {figure["id"]: figure for figure in json.loads(page.scripts["figures"])}
    assert [trace["y"] for trace in figures["similarity"]["data"]] == [[0.5, 0.9], [0.6, 0.8]]
    assert [trace["y"] for trace in figures["attention"]["data"]] == [[0.25, None], [0.75, None]]
    assert figures["map"]["data"][0]["z"] == RECORD["analysis"]["redundancy_map"]


def test_what_was_not_measured_has_no_plot(tmp_path):
    record = deepcopy(RECORD)
    record["analysis"]["redundancy_map"] = None
    record["analysis"]["layers"] = [layer | {"attention": None, "even_attention": None} for layer in LAYERS]
    page = Page(page_of(record, tmp_path))
    assert [figure["id"] for figure in json.loads(page.scripts["figures"])] == ["similarity"]
    assert not {"map", "attention"} & {attributes.get("id") for _, attributes in page.tags}


def test_nothing_of_the_data_becomes_markup(tmp_path):
    hostile = Page(page_of(attacked(RECORD), tmp_path))
    assert {tag for tag, _ in hostile.tags} == {tag for tag, _ in Page(page_of(RECORD, tmp_path)).tags}
    assert hostile.text.count(ATTACK) >= 9
    assert not [attributes for _, attributes in hostile.tags if {"src", "onerror"} & attributes.keys()]


@needs_chromium
def test_a_browser_draws_it_without_a_complaint(tmp_path):
    dom, console = dump("page.html", page_of(RECORD, tmp_path), tmp_path)
    assert console == []
    assert dom.count('class="main-svg"') >= 3 and "heatmaplayer" in dom
    _, console = dump("hostile.html", page_of(attacked(RECORD), tmp_path), tmp_path)
    assert console == []
