import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console
from synthetic import write_run

from sparsight.reporting import compare, read_run, render_table, write_report
from sparsight.reporting.comparison import score_rows
from sparsight.reporting.watch import render

ATTACK = "</script><img src=x onerror=alert(1)>\"'&{{ 7*7 }}"
CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


class Page(HTMLParser):
    """Every tag with its attributes, and the text outside scripts."""

    def __init__(self, markup):
        super().__init__()
        self.tags, self.text, self.scripts, self._inside = [], "", {}, None
        self.feed(markup)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        self._id = dict(attrs).get("id")

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[self._id] = data
        elif self._inside != "style":
            self.text += data


def page_of(runs, path, **options):
    write_report(compare(runs), runs, path / "report.html", **options)
    return (path / "report.html").read_text(encoding="utf-8")


def attacked(run):
    header = run.header | {"recipe": {ATTACK: ATTACK}, "environment": {"platform": ATTACK}}
    stages = [replace(stage, name=ATTACK + stage.name) for stage in run.stages]
    stages[0] = replace(stages[0], layout=ATTACK)
    examples = [
        {key: ATTACK for key in ("id", "task", "question", "truth", "answer")},
        run.examples[0] | {"id": "2", "image_png_base64": 'x" onerror="alert(1)'},
        run.examples[1],
    ]
    tables = {key: {ATTACK: 0.5} for key in ("scores", "shuffled", "chance")} | {"items": {ATTACK: 9}}
    changes = {"name": ATTACK + run.name, "problems": [ATTACK]}
    return replace(run, header=header, stages=stages, examples=examples, **tables, **changes)


def dump(path, page, tmp_path, script=""):
    """(DOM after the scripts, messages on the console)"""
    nonce = re.search("nonce-([0-9a-f]+)", page).group(1)
    file = tmp_path / path
    file.write_text(page.replace("</body>", f'<script nonce="{nonce}">{script}</script></body>'))
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", *quiet]
    flags += ["--enable-logging=stderr", "--virtual-time-budget=5000", "--window-size=1280,900", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *flags, file.as_uri()], capture_output=True, text=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_nothing_of_the_data_becomes_markup(tmp_path, runs):
    plain = Page(page_of([replace(run, problems=["cut"]) for run in runs], tmp_path))
    hostile = Page(page_of([attacked(run) for run in runs], tmp_path))
    assert {tag for tag, _ in hostile.tags} == {tag for tag, _ in plain.tags}
    assert not [attributes for _, attributes in hostile.tags if "onerror" in attributes]
    sources = [attributes["src"] for tag, attributes in hostile.tags if "src" in attributes]
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert hostile.text.count(ATTACK) > 10
    figures = json.loads(hostile.scripts["figures"])
    assert figures[0]["data"][0]["y"][0].startswith("&lt;/script&gt;&lt;img")


def test_the_page_asks_nothing_of_any_network(tmp_path, runs):
    page = page_of(runs, tmp_path)
    parsed = Page(page)
    for tag, attributes in parsed.tags:
        assert tag not in {"link", "iframe", "object", "embed", "base", "form"}
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "data:").startswith("data:")
    policy = next(a["content"] for t, a in parsed.tags if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'; img-src data:;")
    own = page[: page.index('<script type="application/json"')] + page[page.rindex("<script ") :]
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest", own)
    assert sum(tag == "script" for tag, _ in parsed.tags) == 3


def test_the_page_says_what_the_comparison_says(tmp_path, runs):
    text = Page(page_of(runs, tmp_path)).text
    ratios = compare(runs)["ratios"]["sparsight"]["total"]
    for expected in (
        f"{ratios['seconds']:.2f}x",
        f"{ratios['executed_flops']:.2f}x",
        "32 → 336",
        "no difference could be told on any task.",
        "✗ HARBUR",
        "✓ HARBOR",
    ):
        assert expected in text
    assert "✗ Three" not in text  # a description is not judged by equality
    assert "Mind, before you trust" not in text


def test_F27_only_differences_that_can_be_told_are_coloured(tmp_path, tested):
    """Green marked "+0.0" and differences within their interval."""
    rows = score_rows(compare(tested))
    page = page_of(tested, tmp_path)
    shown = re.findall(r'<td class="(quiet|good|bad)">([+-][\d.]+)', page)
    assert [kind for kind, _ in shown] == [("quiet", "good", "bad")[row["told"][1]] for row in rows]
    assert {kind for kind, _ in shown} == {"quiet", "good"}
    same = [replace(tested[1], name="same"), tested[1]]
    page = page_of(same, tmp_path)
    assert page.count('<td class="quiet">+0.0') == len(rows) and 'class="card figure quiet"' in page


def test_the_page_shows_where_few_tokens_hurt(tmp_path, graded, runs):
    page = Page(page_of(graded, tmp_path))
    rows = compare(graded)["by_grade"]
    figure = next(each for each in json.loads(page.scripts["figures"]) if each["id"] == "grades")
    (bars,) = figure["data"]
    assert bars["name"] == "few" and bars["y"] == [row["task"] for row in rows]
    assert bars["x"] == [row["points"][1] for row in rows]
    assert bars["error_x"]["array"] == [row["interval"][1] for row in rows]
    assert "Scores by content and depth" in page.text and "size: 20" in page.text
    for others in (graded[:1], runs):  # nothing to compare with, or no grades
        page = Page(page_of(others, tmp_path))
        assert "Scores by content and depth" not in page.text
        assert "grades" not in [each["id"] for each in json.loads(page.scripts["figures"])]


def test_F27_no_two_series_look_alike(tmp_path, runs):
    """Colours come again behind the eighth run; then curves are dashed and bars have a pattern."""
    many = [replace(runs[0], name=f"run-{number}") for number in range(20)]
    figures = json.loads(Page(page_of([runs[1], *many], tmp_path)).scripts["figures"])
    for figure in figures:
        named = [trace for trace in figure["data"] if trace.get("showlegend", True) and "run-" in trace["name"]]
        looks = {json.dumps([trace.get("marker"), trace.get("line")]) for trace in named}
        assert len(looks) == len(named) == 20


def test_F21_a_caption_that_is_right_in_part_has_no_mark(tmp_path, runs):
    """It was marked wrong beside a score that counts its right things."""
    example = {"id": "1", "task": "caption", "question": "?", "truth": "a dog", "answer": "a dog , a car"}
    marks = []
    for correct in (True, False, None):
        shown = Page(page_of([replace(runs[0], examples=[example | {"correct": correct}])], tmp_path)).text
        marks.append(re.search("(✓ |✗ |)a dog , a car", shown).group(1))
    assert marks == ["✓ ", "✗ ", ""]


def test_warnings_are_on_the_page(tmp_path, runs):
    text = Page(page_of([replace(runs[0], problems=["line 3: cut"]), runs[1]], tmp_path)).text
    assert "sparsight: line 3: cut" in text


def test_curves_hold_the_logged_losses(tmp_path, runs):
    figures = json.loads(Page(page_of(runs, tmp_path)).scripts["figures"])
    curve = next(figure for figure in figures if figure["id"] == "loss-samples")["data"][0]
    steps = [step for stage in runs[1].stages for step in stage.steps]
    assert [loss for loss in curve["y"] if loss is not None] == [step["loss"] for step in steps]
    assert curve["y"].count(None) == len(runs[1].stages)
    assert max(x for x in curve["x"] if x is not None) == sum(step["samples"] for step in steps)


def test_tokens_and_layers_are_those_of_the_steps(tmp_path, runs):
    fewer = [
        step | {"layers_run": 1 + step["step"] % 6, "visual_tokens_kept": 16 * 5} for step in runs[0].stages[0].steps
    ]
    run = replace(runs[0], stages=[replace(runs[0].stages[0], steps=fewer), runs[0].stages[1]])
    figures = {
        figure["id"]: figure for figure in json.loads(Page(page_of([run, runs[1]], tmp_path)).scripts["figures"])
    }
    raw = {name: [y for y in figures[name]["data"][2]["y"] if y is not None] for name in ("tokens", "layers")}
    assert raw["tokens"] == [5] * 60 + [336] * 60
    assert raw["layers"] == [step["layers_run"] / 6 for step in fewer] + [1] * 60


def test_windows_are_those_of_the_last_layout(tmp_path, runs):
    def choices(*changed):
        inputs = [attributes for tag, attributes in Page(page_of(changed, tmp_path)).tags if tag == "input"]
        return [attributes.get("id") for attributes in inputs]

    # standard has 16:1 in its last stage, and ours 1:16,4:4,16:1; one window draws no line
    assert choices(*runs) == [None, "windows-4", "windows-16"]
    assert choices(*(replace(run, header=run.header | {"recipe": {"resize": "pad"}}) for run in runs)) == []


def test_odd_logs_still_make_a_page(tmp_path, runs):
    bad_steps = [{"step": 1, "stage": "pretrain", "loss": None}, {"step": 2, "stage": "pretrain"}]
    stage = replace(runs[0].stages[0], steps=bad_steps, visual_tokens=None, layout=None)
    odd = replace(runs[0], stages=[stage], scores={"count": 0.5}, shuffled={}, examples=[{"id": "1"}])
    empty = replace(odd, name="empty", stages=[], scores={}, examples=[], header={})
    assert "odd" in page_of([replace(odd, name="odd"), runs[1], empty], tmp_path)
    assert "empty" in page_of([empty], tmp_path)
    with pytest.raises(ValueError, match="missing: \\['standard'\\]"):
        write_report(compare(runs), runs[:1], tmp_path / "no.html")


ODD = [None, "x"]


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_no_field_of_a_log_is_fatal(tmp_path, monkeypatch, odd):
    """Each field of a good log in turn is something else: it is read, compared, watched and drawn."""
    monkeypatch.setattr("plotly.offline.get_plotlyjs", str)  # its 5 MB each time are not what is tried here
    path = write_run(tmp_path, "odd", steps=2) / "run.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    fields = {(record["type"], key) for record in records for key in record if key not in ("type", "run", "version")}
    for kind, key in sorted(fields):
        changed = [record | {key: odd} if record["type"] == kind else record for record in records]
        path.write_text("".join(json.dumps(record) + "\n" for record in changed))
        if kind == "header" and odd is not None and (odd != "x" or key != "samples_hash"):
            with pytest.raises(ValueError, match=f"no header record.*line 1: {key} "):
                read_run(path)  # without its header a log is none
            continue
        run = read_run(path)
        page_of([run, replace(run, name="b")], tmp_path)
        console = Console(file=io.StringIO(), width=100)
        render_table(compare([run, replace(run, name="b")]), console)
        console.print(render(run, 1.0, 80))


def test_examples_left_out_are_counted(tmp_path, runs):
    assert "6 more are in the run logs" in Page(page_of(runs, tmp_path, max_examples=2)).text


@needs_chromium
def test_a_browser_draws_it_without_a_complaint(tmp_path, runs):
    toggle = "document.getElementById('theme').click(); document.body.dataset.width = root.scrollWidth;"
    toggle += "document.body.dataset.requests = performance.getEntriesByType('resource').length;"
    toggle += "Plotly.Fx.hover('loss-seconds', [{curveNumber: 1, pointNumber: 3}]);"
    dom, console = dump("plain.html", page_of(runs, tmp_path), tmp_path, toggle)
    assert console == []
    assert dom.count('class="main-svg"') >= 5
    assert dom.count('class="trace bars"') >= 10 and 'data-requests="0"' in dom
    curves = re.findall('class="trace scatter[^>]*>.*?<path class="js-line" d="([^"]+)"', dom)
    assert len(curves) >= 16 and sum(len(curve) > 200 for curve in curves) >= 8  # 4 plots, 2 runs, faint and bold
    assert 'class="hovertext"' in dom and "pretrain, step 4" in dom
    assert 'data-theme="dark"' in dom or 'data-theme="light"' in dom
    assert int(re.search(r'data-width="(\d+)"', dom).group(1)) <= 1280
    _, console = dump("control.html", page_of(runs, tmp_path), tmp_path, "throw Error('seen')")
    assert len(console) == 1, "an error on the page must show, or the test above proves nothing"


@needs_chromium
@pytest.mark.parametrize("more", [0, 2])
def test_F27_no_column_is_cut_at_1280_pixels(tmp_path, tested, more):
    """Of two runs and of four: the last column of the scores, *items*, was."""
    wide = [replace(tested[0], name=f"sparsight-{number}") for number in range(1 + more)]
    script = "document.body.dataset.cut = [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > "
    script += "e.clientWidth).map(e => e.textContent.trim().slice(0, 9)).join() || 'none';"
    dom, _ = dump("wide.html", page_of([*wide, tested[1]], tmp_path), tmp_path, script)
    assert 'data-cut="none"' in dom, re.search('data-cut="[^"]*"', dom)


@needs_chromium
def test_a_browser_runs_nothing_of_the_data(tmp_path, runs):
    page = page_of([attacked(run) for run in runs], tmp_path)
    dom, console = dump("hostile.html", page, tmp_path)
    assert console == []
    assert dom.count('class="main-svg"') >= 5
    # the plotly text is markup of SVG; an <img> would have been made by the page or by plotly
    assert not re.search(r"<img[^>]*(onerror|src=\"x\")", dom)
