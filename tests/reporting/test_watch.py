import io
import json
import threading
import time

import pytest
from rich.console import Console
from synthetic import write_run

from sparsight.reporting import read_run, watch
from sparsight.reporting.watch import figures, render, sparkline


def shown(run, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(render(run, 3.0, width))
    return console.file.getvalue()


def cut(folder, lines):
    """A log up to so many lines."""
    path = write_run(folder, "sparsight") / "run.jsonl"
    kept = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(kept[:lines]))
    return kept[lines:]


def test_the_figures_are_those_of_the_last_steps(tmp_path):
    cut(tmp_path, 2 + 40)  # header, stage, 40 of 60 steps
    run = read_run(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()[2:]]
    seconds = sum(sum(step["seconds"].values()) for step in lines[20:])
    assert figures(run.stages[0]) == {
        "loss": f"{lines[-1]['loss']:.3f}",
        "samples/s": f"{20 * 16 / seconds:.1f}",
        "data wait": f"{100 * 20 * 0.02 / seconds:.1f}%",
        "executed so far": f"{sum(step['flops'] for step in lines) / 1e12:.3g} TFLOP",
        "memory": "1 GB",
        "layers run": "6 of 6",
        "visual tokens kept, a sample": "32 of 32",
        "time so far": f"{sum(sum(step['seconds'].values()) for step in lines):.1f} s",
        "time left": f"{20 * seconds / 20:.1f} s",
    }
    text = shown(run)
    assert "sparsight: last record 3.0 s ago" in text and "40 of 60 steps" in text and "▁" in text


def test_fewer_layers_and_tokens_are_seen(tmp_path):
    cut(tmp_path, 4)
    (stage,) = read_run(tmp_path).stages
    for step, layers in zip(stage.steps, (3, 4), strict=True):
        step |= {"layers_run": layers, "visual_tokens_kept": 16 * 8}
    assert figures(stage)["layers run"] == "3.5 of 6"
    assert figures(stage)["visual tokens kept, a sample"] == "8 of 32"


@pytest.mark.parametrize("lines", [1, 2, 3, 62, 63, 64, 90])
def test_every_state_of_a_log_can_be_shown(tmp_path, lines):
    cut(tmp_path, lines)
    for width in (40, 80, 200):
        text = shown(read_run(tmp_path), width)
        assert "no stage has begun" in text if lines == 1 else "no step yet" in text if lines == 2 else "loss" in text
    assert max(len(line) for line in shown(read_run(tmp_path)).splitlines()) <= 80


def test_what_cannot_be_read_is_named(tmp_path):
    cut(tmp_path, 5)
    with (tmp_path / "run.jsonl").open("a") as file:
        file.write("[red]\n")
    assert "! lines left out: 1; the first is line 6: cut, or not JSON" in shown(read_run(tmp_path))


def test_a_run_that_has_ended_is_printed_once(tmp_path):
    write_run(tmp_path, "sparsight")
    console = Console(file=io.StringIO(), width=80)
    watch(tmp_path, console)
    text = console.file.getvalue()
    assert text.count("sparsight: ended") == 1 and text.count("finished  ") >= 1 and "60 of 60 steps" in text
    assert "score: 72.3%, the mean of 7 tasks" in text


def test_a_run_is_followed_until_it_ends(tmp_path):
    rest = cut(tmp_path, 10)

    def run():
        for number, line in enumerate(rest):
            with (tmp_path / "run.jsonl").open("ab") as file:
                file.write(line[:20])
                file.flush()
                file.write(line[20:])
            time.sleep(0.02 if number % 40 == 0 else 0)

    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    writer = threading.Thread(target=run)
    writer.start()
    found = watch(tmp_path, console, every=0.001)
    writer.join(timeout=30)
    assert found.ended and found.problems == []
    assert "last record" in console.file.getvalue() and "sparsight: ended" in console.file.getvalue()


def test_curves_of_blocks():
    assert sparkline([], 10) == sparkline([None], 10) == ""
    assert sparkline([1, 2, None, 3], 10) == "▁▅█"
    assert sparkline([5.0, 5.0], 10) == "▁▁"
    assert sparkline(range(1000), 8) == "▁▂▃▄▅▆▇█"
