import io
import json
from dataclasses import replace
from math import comb
from statistics import fmean

import numpy as np
import pytest
from rich.console import Console
from synthetic import ENVIRONMENT, OURS, STANDARD, TASKS, write_points, write_run

from sparsight.reporting import (
    RunLog,
    compare,
    read_run,
    read_runs,
    render_table,
    report,
    verdict,
    write_comparison,
    write_report,
)
from sparsight.reporting.comparison import score_rows
from sparsight.reporting.report import cost_table, score_table
from sparsight.reporting.tables import duration, human, speed_up


def printed(comparison):
    console = Console(file=io.StringIO(), width=160)
    render_table(comparison, console)
    return console.file.getvalue()


def test_figures_equal_those_recomputed_from_the_lines(tmp_path, runs):
    """By other code: straight from the JSON lines, knowing nothing of the reader."""
    result = compare(runs)
    raw = {}
    for name in ("standard", "sparsight"):
        lines = [json.loads(line) for line in (tmp_path / name / "run.jsonl").read_text().splitlines()]
        raw[name] = {line["stage"]: line for line in lines if line["type"] == "stage_end"}
        entry = next(entry for entry in result["runs"] if entry["name"] == name)
        for key in ("seconds", "executed_flops"):
            assert entry[key] == sum(end[key] for end in raw[name].values())
        assert entry["peak_memory_bytes"] == max(line.get("memory_bytes", 0) for line in lines)
    ratios = result["ratios"]["sparsight"]
    for stage in ("pretrain", "finetune"):
        for key in ("seconds", "executed_flops"):
            assert ratios[stage][key] == raw["sparsight"][stage][key] / raw["standard"][stage][key]
    both = [sum(end["seconds"] for end in raw[name].values()) for name in ("sparsight", "standard")]
    assert ratios["total"]["seconds"] == both[0] / both[1]
    assert ratios["score"] == pytest.approx(fmean(OURS.values()) / fmean(STANDARD.values()))
    # (32 + 90) / (256 + 90) of the tokens, and 0.6 of the layers over (336 + 90) / (256 + 90)
    assert ratios["pretrain"]["executed_flops"] == pytest.approx(122 / 346)
    assert ratios["finetune"]["executed_flops"] == pytest.approx(0.6 * 426 / 346)


def test_the_form_is_the_contract(runs):
    result = compare(runs)
    assert list(result) == [
        "runs",
        "chance",
        "items",
        "ratios",
        "busy",
        "tests",
        "by_grade",
        "to_loss",
        "differences",
        "warnings",
        "env",
    ]
    assert [entry["name"] for entry in result["runs"]] == ["standard", "sparsight"]
    keys = {
        "name",
        "stages",
        "scores",
        "shuffled",
        "during",
        "seconds",
        "executed_flops",
        "cpu_seconds",
        "peak_memory_bytes",
    }
    assert set(result["runs"][0]) == keys
    keys = {"name", "seconds", "executed_flops", "visual_tokens", "samples", "bridge", "layout", "finished"}
    keys |= {"peak_memory_bytes", "cpu_seconds", "encoding_seconds", "data_wait", "loss"}
    assert set(result["runs"][0]["stages"][0]) == keys
    assert set(result["ratios"]["sparsight"]) == {"pretrain", "finetune", "total", "score"}
    assert (result["chance"], result["warnings"], result["env"]) == (TASKS, [], ENVIRONMENT)


def test_the_baseline_can_be_chosen(runs):
    ratios = compare(runs, baseline="sparsight")["ratios"]["standard"]
    assert ratios["total"]["seconds"] == pytest.approx(1 / compare(runs)["ratios"]["sparsight"]["total"]["seconds"])


def test_wrong_arguments_say_what_is_wrong(runs):
    with pytest.raises(ValueError, match="no run is named 'x'"):
        compare(runs, baseline="x")
    with pytest.raises(ValueError, match="different names"):
        compare([runs[0], runs[0]])
    with pytest.raises(ValueError, match="different names"):
        compare([])
    with pytest.raises(ValueError, match="cannot be named 'total'"):
        compare([replace(runs[0], stages=[replace(runs[0].stages[0], name="total")])])
    with pytest.raises(ValueError, match="cannot be named 'mean'"):
        compare([replace(runs[0], scores={"mean": 0.5})])


def test_what_makes_it_unfair_is_said(tmp_path, runs):
    other = ENVIRONMENT | {
        "dirty": True,
        "versions": ENVIRONMENT["versions"] | {"torch": "2.6.0"},
        "hardware": ENVIRONMENT["hardware"] | {"threads": 2},
    }
    run = read_run(write_run(tmp_path / "other", "other", environment=other, samples_hash="beef"))
    stages = [replace(run.stages[0], samples=8), replace(run.stages[1], name="extra", finished=False)]
    scores = {task: score for task, score in run.scores.items() if task != "text"}
    run = replace(run, stages=stages, scores=scores, items=run.items | {"count": 7}, problems=["line 3: cut"])
    assert compare([runs[1], run])["warnings"] == [
        "other: line 3: cut",
        "other: stage extra is not finished",
        "other: its code had changes that are not committed",
        "other: samples hash is beef, but 5f1e in standard",
        "other: torch is 2.6.0, but 2.13.0 in standard",
        "other: threads is 2, but 8 in standard",
        "other: samples in stage pretrain is 8, but 960 in standard",
        "other: samples in stage finetune is missing, but 960 in standard",
        "other: samples in stage extra is 960, but missing in standard",
        "other: task text is missing, but scored in standard",
        "other: items of task count is 7, but 400 in standard",
    ]


def test_means_are_over_the_tasks_that_all_runs_have(runs):
    ours, standard = runs
    ours = replace(ours, scores={"count": 0.5, "naming": 0.7, "other": 1.0})
    result = compare([ours, standard])
    base = fmean([STANDARD["count"], STANDARD["naming"]])
    assert result["ratios"]["sparsight"]["score"] == pytest.approx(0.6 / base)
    assert score_rows(result)[-1]["scores"] == pytest.approx([base, 0.6])


def test_the_interval_is_that_of_two_proportions(runs):
    rows = {row["task"]: row for row in score_rows(compare(runs))}
    a, b = STANDARD["count"], OURS["count"]
    expected = 1.96 * ((a * (1 - a) + b * (1 - b)) / 400) ** 0.5
    assert rows["count"]["interval"][1] == pytest.approx(100 * expected)
    assert rows["count"]["points"] == pytest.approx([0, -3.0])
    parts = [rows[task]["interval"][1] for task in TASKS]
    assert rows["mean"]["interval"][1] == pytest.approx(sum(part**2 for part in parts) ** 0.5 / len(TASKS))


def test_the_paired_test_is_that_of_the_points_in_the_log(tmp_path, tested):
    """Straight from the lines, by other code: McNemar's test, for points that are 0 or 1."""
    result = compare(tested)
    tests = result["tests"]["mine"]
    assert list(tests) == [*TASKS, "mean"]
    lines = [
        json.loads((tmp_path / "tested" / name / "run.jsonl").read_text().splitlines()[-1])
        for name in ("mine", "standard")
    ]
    drawn = 0
    for task in TASKS:
        gains = [a - b for a, b in zip(*(line["points"][task] for line in lines), strict=True)]
        won, lost = gains.count(1), gains.count(-1)
        tail = sum(comb(won + lost, k) for k in range(max(won, lost), won + lost + 1)) / 2 ** (won + lost)
        assert tests[task]["p_value"] == pytest.approx(min(1, 2 * tail), abs=0 if won + lost < 14 else 0.02)
        drawn += won + lost >= 14
        assert tests[task]["difference"] == pytest.approx(100 * fmean(gains))
        assert tests[task]["interval"][0] <= tests[task]["difference"] <= tests[task]["interval"][1]
    assert drawn < len(TASKS)
    rows = {row["task"]: row for row in score_rows(result)}
    for task, test in tests.items():
        assert rows[task]["points"][1] == pytest.approx(test["difference"])
        assert rows[task]["interval"][1] == pytest.approx((test["interval"][1] - test["interval"][0]) / 2)
        assert rows[task]["p_value"] == [None, test["p_value"]]
    # half of the interval that takes the runs for independent, or so: both find the same images hard
    scores = rows["count"]["scores"]
    unpaired = 196 * sum(p * (1 - p) / 60 for p in scores) ** 0.5
    assert rows["count"]["interval"][1] < 0.8 * unpaired


def test_the_mean_is_tested_with_whole_images(tested):
    """All tasks are about the same images: the mean is as sure as so many images let it be, not so many items."""
    ours, theirs = ([run.points[task].scores for task in TASKS] for run in tested)
    by_image = [fmean(a) - fmean(b) for a, b in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True)]
    expected = 1.96 * np.std(by_image) / len(by_image) ** 0.5
    low, high = compare(tested)["tests"]["mine"]["mean"]["interval"]
    assert (high - low) / 2 == pytest.approx(100 * expected, rel=0.1)


def test_p_values_stand_in_table_and_page(tmp_path, tested):
    result = compare(tested)
    write_report(result, tested, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for task, test in result["tests"]["mine"].items():
        shown = f"{test['p_value']:.3f}" if test["p_value"] >= 0.001 else "<0.001"
        assert shown in next(line for line in printed(result).splitlines() if f" {task} " in line)
        assert f'<td class="quiet">{shown.replace("<", "&lt;")}</td>' in page
    assert "paired permutation test" in page and "p: paired test" in " ".join(printed(result).split())


def test_only_the_same_items_are_tested(tmp_path, runs, tested):
    """Other questions, other images, or logs without points: no test; the figures stay."""
    assert compare(runs)["tests"] == {"sparsight": {}} and " p " not in printed(compare(runs))
    other = read_run(write_points(write_run(tmp_path / "other", "other"), 0.1, count="ffff"))
    result = compare([tested[1], other])
    assert list(result["tests"]["other"]) == [task for task in TASKS if task != "count"]  # nor the mean of all
    assert "other: questions of task count is ffff, but a1b2 in standard" in result["warnings"]
    row = next(row for row in score_rows(result) if row["task"] == "count")
    assert row["p_value"] == [None, None] and row["interval"][1] > 0
    fewer = read_run(write_points(write_run(tmp_path / "fewer", "fewer"), 0.1, items=50))
    assert compare([tested[1], fewer])["tests"] == {"fewer": {}}
    assert compare([tested[1], runs[0]])["tests"] == {"sparsight": {}}


def test_the_verdict_hides_nothing(runs):
    result = compare(runs)
    total = result["ratios"]["sparsight"]["total"]
    assert verdict(result) == (
        f"sparsight took {total['seconds']:.2f}x of the time of standard: speed-up {1 / total['seconds']:.1f}x of "
        f"{1 / total['executed_flops']:.1f}x possible; score -0.6 points on average, within what chance allows; "
        "no difference could be told on any task."
    )
    worse = STANDARD | {"text": 0.4, "count": 0.9}
    mixed = compare([replace(runs[0], scores=worse, problems=["cut"]), runs[1]])
    assert verdict(mixed).endswith(
        "worse on: text (-21.0); better on: count (+16.5); no difference could be told on the other tasks. "
        "1 warning: the comparison may not be fair."
    )
    assert "no scores to compare" in verdict(compare([replace(runs[0], scores={}), runs[1]]))
    assert verdict(compare(runs[:1])) == "one run: nothing to compare it with."


def test_F27_only_differences_that_hold_after_correction_are_named(tmp_path):
    """Seven tasks with points: the verdict names those whose corrected p-value is small, and no other."""
    logs = [write_points(write_run(tmp_path / name, name), better) for name, better in (("mine", 0.1), ("standard", 0))]
    result = compare([read_run(log) for log in logs])
    tests = result["tests"]["mine"]
    ordered = sorted(TASKS, key=lambda task: tests[task]["p_value"])
    below = [(len(TASKS) - rank) * tests[task]["p_value"] < 0.05 for rank, task in enumerate(ordered)]
    held = set(ordered[: below.index(False)])
    alone = {task for task in TASKS if tests[task]["p_value"] < 0.05}
    assert held < alone  # else nothing is tried here
    rows = {row["task"]: row for row in score_rows(result)}
    assert {task for task in TASKS if rows[task]["named"][1]} == held
    assert {task for task in TASKS if f"{task} (+" in verdict(result)} == held
    assert {task for task in TASKS if rows[task]["told"][1]} == {t for t in alone if tests[t]["interval"][0] > 0}


@pytest.mark.parametrize("flipped, told", [(0, 0), (1, 0), (12, -1)])
def test_F21_one_item_in_sixty_is_no_difference(tested, flipped, told):
    """-1.7 points with p = 1 was "worse on: existence"; twelve items are a difference, and are coloured and named."""
    base = tested[1]
    points = base.points["existence"]
    right = [place for place, score in enumerate(points.scores) if score == 1][:flipped]
    scores = [0.0 if place in right else score for place, score in enumerate(points.scores)]
    ours = base.points | {"existence": points._replace(scores=scores)}
    mean = {task: fmean(own.scores) for task, own in ours.items()}
    result = compare([replace(base, name="mine", points=ours, scores=mean), base])
    row = next(row for row in score_rows(result) if row["task"] == "existence")
    assert (row["told"], row["named"]) == ([0, told], [0, told])
    assert ("worse on: existence (-20.0)" in verdict(result)) == bool(told)
    assert ("no difference could be told on any task" in verdict(result)) == (not told)
    console = Console(file=io.StringIO(), width=160, force_terminal=True, color_system="standard", no_color=False)
    console.print(score_table(result))
    assert ("\x1b[1;31m" in console.file.getvalue()) == bool(told) and "\x1b[32m" not in console.file.getvalue()


def test_few_items_without_pairs_tell_nothing(runs):
    """And where all answers are wrong, the interval is not zero wide."""
    none, right = (dict.fromkeys(TASKS, share) for share in (0.0, 1.0))
    for items, told in ((2, 0), (400, 1)):
        few = dict.fromkeys(TASKS, items)
        pair = [replace(run, scores=own, items=few) for run, own in zip(runs, (right, none), strict=True)]
        rows = score_rows(compare(pair))
        assert all(row["interval"][1] > 0 for row in rows)
        assert [row["told"][1] for row in rows[:-1]] == [told] * len(TASKS)


def test_the_tables_show_every_figure(runs):
    result = compare(runs)
    text = printed(result)
    ratios = result["ratios"]["sparsight"]["pretrain"]
    for expected in (
        f"{ratios['seconds']:.2f}x",
        f"{1 / ratios['seconds']:.1f}x of {1 / ratios['executed_flops']:.1f}x",
        "-5.0 ±6.8",
        "+1.5",
        "70.5",
        "shuffled",
        "336",
    ):
        assert expected in text


def test_losses_waits_and_memory_equal_those_recomputed_from_the_lines(tmp_path, runs):
    """Also with numpy's convolution in place of our running mean."""
    result = compare(runs)
    for name in ("standard", "sparsight"):
        entry = next(entry for entry in result["runs"] if entry["name"] == name)
        lines = [json.loads(line) for line in (tmp_path / name / "run.jsonl").read_text().splitlines()]
        for stage in entry["stages"]:
            steps = [line for line in lines if line["type"] == "step" and line["stage"] == stage["name"]]
            waited, spent = (sum(sum(step["seconds"][key] for key in keys) for step in steps)
                             for keys in (["data"], ["data", "compute", "optimizer"]))  # fmt: skip
            assert stage["data_wait"] == pytest.approx(waited / spent)
            assert stage["peak_memory_bytes"] == max(step["memory_bytes"] for step in steps) == 10**9 + 60
            losses = np.array([step["loss"] for step in steps])
            mean = np.convolve(losses, np.ones(3), "same") / np.convolve(np.ones(60), np.ones(3), "same")
            assert stage["loss"] == pytest.approx(mean[-1])
            found = result["to_loss"][stage["name"]]
            if name == "standard":
                assert found["loss"] == stage["loss"]
            place = list(result["runs"]).index(entry)
            reached = np.flatnonzero(mean <= found["loss"] + 1e-12)
            seconds = np.cumsum([sum(step["seconds"].values()) for step in steps])
            expected = [None, None] if len(reached) == 0 else [seconds[reached[0]], 16 * (reached[0] + 1)]
            assert [found["seconds"][place], found["samples"][place]] == pytest.approx(expected)


def test_encoding_counts_in_the_time_to_a_loss(runs):
    encoded = replace(runs[1].stages[0], encoding_seconds=100.0)
    other = replace(runs[1], stages=[encoded], name="encoded")
    found = compare([runs[1], other])["to_loss"]["pretrain"]["seconds"]
    assert found[1] == pytest.approx(found[0] + 100)
    said = [cost_table(compare([base, runs[0]])).hint for base in (other, runs[1])]
    assert ["of pretrain are for encoding images" in hint for hint in said] == [True, False]


def test_what_is_not_finished_has_no_ratio(runs):
    ours, standard = runs
    ours_cut, standard_cut = (
        replace(run, stages=[run.stages[0], replace(run.stages[1], finished=False)]) for run in runs
    )
    begun = replace(ours, stages=ours.stages[:1])  # stopped between two stages: all that it has is finished
    for cut in ([ours_cut, standard], [ours, standard_cut], [begun, standard]):
        ratios = compare(cut)["ratios"]["sparsight"]
        assert ratios["pretrain"]["seconds"] is not None
        assert ratios.get("finetune", ratios["total"]) == ratios["total"] == {"seconds": None, "executed_flops": None}
        assert "speed-up ? of ? possible" in verdict(compare(cut))


def test_more_speed_than_work_saved_is_doubted(runs):
    quick = [replace(stage, seconds=stage.seconds / 10) for stage in runs[0].stages]
    said = compare([replace(runs[0], stages=quick), runs[1]])["warnings"]
    assert len(said) == 2 and "x possible: more than the work that was saved" in said[0]


def test_many_runs_fit_a_terminal(runs):
    many = [replace(runs[0], name=f"run-with-a-name-{number}") for number in range(5)]
    text = printed(compare([runs[1], *many]))
    assert all(task in text for task in TASKS) and "70.5" in text and "-3.0" in text


def test_what_differs_in_the_recipes_is_listed(runs):
    def recipe(layout, **stage):
        stages = [{"name": "a", "bridge": {"layout": layout}} | stage, {"name": "b", "samples": 3}]
        return {"name": layout, "precision": "fp32", "stages": stages}

    other = replace(
        runs[0], header=runs[0].header | {"recipe": recipe("4:1", lora={"rank": 2}) | {"precision": "bf16"}}
    )
    base = replace(runs[1], header=runs[1].header | {"recipe": recipe("1:1")})
    result = compare([other, base])
    assert result["differences"] == {
        "precision": ["fp32", "bf16"],
        "stages.a.bridge.layout": ["1:1", "4:1"],
        "stages.a.lora.rank": [None, 2],
    }
    assert result["warnings"] == ["sparsight: precision is bf16, but fp32 in standard"]
    assert "stages.a.lora.rank" in printed(result)


def test_a_report_of_folders_is_the_comparison_of_their_logs(tmp_path, runs):
    console = Console(file=io.StringIO(), width=100)
    result = report([tmp_path / "sparsight", tmp_path / "standard"], tmp_path / "out", console)
    assert result == compare(runs, "sparsight") == json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert "report.html" in {path.name for path in (tmp_path / "out").iterdir()}
    assert "Time to the same loss" in console.file.getvalue()


def test_runs_of_one_name_go_by_their_folders(tmp_path):
    paths = [write_run(tmp_path / folder, "same", steps=2) for folder in "ab"]
    assert [run.name for run in read_runs(paths)] == [str(path) for path in paths]
    with pytest.raises(ValueError, match="given twice: .*a; expected different runs"):
        read_runs([paths[0], tmp_path / "b" / ".." / "a"])


def test_names_are_not_markup_in_the_terminal(runs):
    assert "[red]x[/red]" in printed(compare([replace(runs[0], name="[red]x[/red]"), runs[1]]))


def test_runs_with_nothing_in_them_are_shown(runs):
    empty = replace(runs[0], stages=[], scores={}, shuffled={}, header={"environment": None})
    result = compare([empty, runs[1]])
    assert result["ratios"]["sparsight"] == {"total": {"seconds": None, "executed_flops": None}, "score": None}
    assert "has not been evaluated" in printed(result)
    assert "has no stages" in printed(compare([empty]))


def test_the_file_is_written_whole(tmp_path, runs):
    result = compare(runs)
    write_comparison(result, tmp_path / "new" / "comparison.json")
    assert json.loads((tmp_path / "new" / "comparison.json").read_text()) == result
    with pytest.raises(ValueError):
        write_comparison({"bad": float("nan")}, tmp_path / "new" / "comparison.json")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["comparison.json"]
    assert json.loads((tmp_path / "new" / "comparison.json").read_text()) == result


@pytest.mark.parametrize(
    "value, shown",
    [(0, "0 FLOP"), (999, "999 FLOP"), (999.9, "1 kFLOP"), (1.2e14, "120 TFLOP"), (2.5e18, "2.5 EFLOP")],
)
def test_human_units(value, shown):
    assert human(value, "FLOP") == shown


def test_durations_and_speed_ups():
    assert [duration(each) for each in (0.25, 119.9, 120, 3599.6, 7384)] == [
        "0.2 s",
        "119.9 s",
        "2 min 00 s",
        "1 h 00 min",
        "2 h 03 min",
    ]
    assert speed_up({"seconds": 0.25, "executed_flops": 0.2}) == "4.0x of 5.0x possible"
    assert speed_up({"seconds": None, "executed_flops": 0.0}) == "? of ? possible"


def timed_run(folder, slower, cpu):
    """A run of one finished stage, whose steps took so many seconds by the clock, and as many of CPU time."""
    folder.mkdir()
    with RunLog(folder / "run.jsonl") as log:
        log.write("header", version=1, run=folder.name, recipe={"stages": [{"name": "a"}]}, environment=ENVIRONMENT)
        log.write("stage", stage="a", steps=2)
        for step in (1, 2):
            own = {} if cpu is None else {"cpu_seconds": 2.0 * cpu}
            log.write("step", stage="a", step=step, seconds={"compute": slower}, flops=1e9 * (cpu or 1), **own)
        log.write("stage_end", stage="a", seconds=2 * slower, executed_flops=2e9 * (cpu or 1))
    return read_run(folder)


def test_F20_where_the_machine_was_busy_cpu_time_is_taken_and_said_first(tmp_path):
    base = timed_run(tmp_path / "standard", 1.0, 1.0)
    busy = compare([base, timed_run(tmp_path / "busy", 5.86, 0.4)])
    assert busy["busy"]["busy"] == pytest.approx({"clock": 5.86, "cpu": 0.4})
    said = verdict(busy)
    assert said.startswith("The machine had other work while one of busy and standard trained: the clock gives 5.86x")
    assert "busy took 0.40x of the CPU time of standard: speed-up 2.5x of 2.5x possible" in said
    assert said.split(" possible")[0] in " ".join(printed(busy).split())
    quiet = compare([base, timed_run(tmp_path / "quiet", 0.42, 0.4)])
    assert quiet["busy"] == {} and "quiet took 0.42x of the time of standard" in verdict(quiet)


def test_F20_logs_without_cpu_seconds_are_compared_by_the_clock(tmp_path):
    result = compare([timed_run(tmp_path / "standard", 1.0, None), timed_run(tmp_path / "old", 5.86, None)])
    assert result["busy"] == {} and "old took 5.86x of the time" in verdict(result)
    assert result["runs"][0]["cpu_seconds"] is None


def test_scores_by_grade_stand_where_all_runs_have_the_same_items(tmp_path, graded, tested):
    result = compare(graded)
    rows = {row["task"]: row for row in result["by_grade"]}
    assert list(rows) == ["size: 20", "size: 26", "size: 32", "things: 1 to 2", "things: 3 to 4", "things: 5 to 6"]
    few, base = graded
    for name, row in rows.items():
        low, _, high = name.partition(": ")[2].partition(" to ")
        kept = [n for n, value in enumerate(base.points["count"].grades[name.partition(":")[0]])
                if int(low) <= value <= int(high or low)]  # fmt: skip
        means = [fmean(run.points[task].scores[n] for task in TASKS for n in kept) for run in (base, few)]
        assert row["scores"] == pytest.approx(means) and row["items"] == len(TASKS) * len(kept)
        assert row["points"] == pytest.approx([0, 100 * (means[1] - means[0])]) and row["interval"][0] == 0
    assert [rows[f"size: {size}"]["told"] for size in (20, 26, 32)] == [[0, -1], [0, 0], [0, 0]]
    assert json.loads(json.dumps(result["by_grade"])) == result["by_grade"]
    text = printed(result)
    assert "Scores by grade" in text and "size: 26" in text and f"{rows['size: 20']['points'][1]:.1f}" in text
    # older logs have no grades: then there is nothing to show, and the tests of tasks stay
    older = [graded[1], replace(tested[0], points=tested[0].points)]
    assert compare(older)["tests"]["mine"] and compare(older[::-1], "mine")["by_grade"] == []
    other = replace(few, points={task: own._replace(questions="ffff") for task, own in few.points.items()})
    assert compare([other, base])["by_grade"] == [] and compare([base])["by_grade"]
