import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from synthetic import OURS, write_run

from sparsight.reporting import RunLog, environment, read_run
from sparsight.reporting.runlog import _git

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def started(path, *records, **header):
    with RunLog(path / "run.jsonl") as log:
        log.write("header", **({"version": 1, "run": "a"} | header))
        for record in records:
            log.write(**record)
    return path / "run.jsonl"


def step(number, stage="s", loss=1.0, **fields):
    seconds = {"data": 0.25, "compute": 0.5, "optimizer": 0.25}
    record = {"type": "step", "stage": stage, "step": number, "loss": loss, "samples": 4, "flops": 10.0}
    return record | {"seconds": seconds} | fields


def test_what_is_written_is_read(tmp_path):
    run = read_run(write_run(tmp_path, "sparsight", steps=5))
    assert run == read_run(tmp_path / "run.jsonl")
    assert (run.name, run.problems, run.scores) == ("sparsight", [], OURS)
    assert [(stage.name, stage.layout, stage.visual_tokens, stage.image_size) for stage in run.stages] == [
        ("pretrain", "1:16,4:1", 32, 256),
        ("finetune", "1:16,4:4,16:1", 336, 256),
    ]
    assert [(stage.finished, stage.samples, len(stage.steps)) for stage in run.stages] == [(True, 80, 5)] * 2
    assert len(run.examples) == 8


@given(recipe=st.dictionaries(st.text(), JSON, max_size=3))
def test_any_json_survives(tmp_path_factory, recipe):
    assert read_run(started(tmp_path_factory.mktemp("log"), recipe=recipe)).header["recipe"] == recipe


def test_scalars_of_numpy_and_torch_become_numbers(tmp_path):
    path = started(
        tmp_path, step(1, loss=torch.tensor(0.5, requires_grad=True), flops=np.float32(2), samples=np.int64(3))
    )
    (record,) = read_run(path).stages[0].steps
    assert (record["loss"], record["flops"], record["samples"]) == (0.5, 2.0, 3)
    assert type(record["samples"]) is int


def test_a_value_that_is_not_json_names_its_field(tmp_path):
    with RunLog(tmp_path / "run.jsonl") as log:
        for bad in (torch.zeros(2), np.zeros(2), {1, 2}, object()):
            with pytest.raises(TypeError, match="seconds.data"):
                log.write("step", seconds={"data": bad})
    assert (tmp_path / "run.jsonl").read_bytes() == b""


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), np.float32("nan"), torch.tensor(float("inf"))])
def test_what_is_not_finite_is_null_and_named(tmp_path, bad):
    path = started(tmp_path, step(1, loss=bad), step(2, loss=bad))
    record = json.loads(path.read_text().splitlines()[1])
    assert record["loss"] is None
    assert record["nonfinite"] == ["loss"]
    assert read_run(path).problems == ["loss is not finite in 2 records"]


def test_each_record_is_on_disk_at_once(tmp_path):
    with RunLog(tmp_path / "run.jsonl") as log:
        log.write("header", version=1, run="a")
        assert read_run(tmp_path).name == "a"


def test_a_log_is_never_overwritten(tmp_path):
    path = started(tmp_path)
    with pytest.raises(FileExistsError, match="append=True"):
        RunLog(path)
    assert read_run(path).name == "a"


def test_a_cut_file_is_read_up_to_the_cut_at_every_byte(tmp_path):
    path = started(tmp_path, {"type": "stage", "stage": "s"}, step(1), step(2))
    whole, data = read_run(path).stages[0], path.read_bytes()
    begin = data.rindex(b"\n", 0, -1) + 1
    for end in range(begin, len(data) + 1):
        path.write_bytes(data[:end])
        run = read_run(path)
        complete = end >= len(data) - 1
        assert run.stages[0].steps == whole.steps[: 2 if complete else 1]
        assert not run.stages[0].finished
        assert run.problems == (
            [] if complete or end == begin else ["lines left out: 1; the first is line 4: cut, or not JSON"]
        )


def test_appending_after_a_cut_starts_a_new_line(tmp_path):
    path = started(tmp_path, step(1), step(2))
    path.write_bytes(path.read_bytes()[:-20])
    with RunLog(path, append=True) as log:
        log.write(**step(2, loss=7.0))
    run = read_run(path)
    assert [record["loss"] for record in run.stages[0].steps] == [1.0, 7.0]
    assert run.problems == ["lines left out: 1; the first is line 3: cut, or not JSON"]


def test_steps_redone_after_a_resume_supersede(tmp_path):
    first = [step(n, loss=1.0) for n in range(1, 6)]
    again = [step(n, loss=2.0) for n in range(3, 5)]
    path = started(tmp_path, *first, {"type": "resume", "stage": "s", "step": 2}, *again)
    (stage,) = read_run(path).stages
    # step 5 was lost with the process: the weights have not seen it
    assert [(record["step"], record["loss"]) for record in stage.steps] == [(1, 1), (2, 1), (3, 2), (4, 2)]
    assert (stage.samples, stage.seconds, stage.executed_flops) == (16, 4.0, 40.0)


def test_a_resume_touches_its_stage_alone(tmp_path):
    end = {"type": "stage_end", "stage": "a", "seconds": 9.0, "executed_flops": 30.0, "samples": 8}
    resume = {"type": "resume", "stage": "b", "step": 0}
    path = started(tmp_path, step(1, "a"), step(2, "a"), end, step(1, "b"), resume, step(1, "b", loss=3.0))
    a, b = read_run(path).stages
    assert (a.finished, a.seconds, len(a.steps)) == (True, 9.0, 2)
    assert (b.finished, [record["loss"] for record in b.steps]) == (False, [3.0])


def test_unknown_things_are_named_and_the_rest_is_kept(tmp_path):
    path = started(tmp_path, step(1), version=9)
    with path.open("ab") as file:
        file.write(b'{"type": "dream"}\n[3]\n{"type": "step", "step": "x", "stage": "s"}\n\xff\xfe\n')
        file.write(b'{"type": "step", "stage": "s", "step": 2, "loss": NaN, "new": "key"}\n')
    run = read_run(path)
    assert [record["step"] for record in run.stages[0].steps] == [1, 2]
    assert run.stages[0].executed_flops == 10.0
    assert run.problems == ["lines left out: 4; the first is line 3: Value error, type 'dream' is not known"]


def test_a_second_run_in_the_file_is_not_mixed_in(tmp_path):
    path = started(tmp_path, {"type": "stage", "stage": "s"}, step(1, loss=1.0))
    second = started(tmp_path / "b", step(1, loss=9.0), step(2, loss=9.0), run="b")
    path.write_bytes(path.read_bytes() + second.read_bytes())
    run = read_run(path)
    assert [record["loss"] for record in run.stages[0].steps] == [1.0]
    assert run.problems == ["lines left out: 3; the first is line 4: of another run, behind its own header"]


def test_a_log_can_be_read_while_it_is_written(tmp_path):
    path = started(tmp_path, step(1), step(2))
    whole, seen = path.read_bytes(), []
    for end in range(whole.index(b"\n") + 1, len(whole) + 1, 7):
        path.write_bytes(whole[:end])
        run = read_run(path, live=True)
        assert run.problems == []
        seen.append(len(run.stages[0].steps) if run.stages else 0)
    assert seen == sorted(seen) and {0, 1} <= set(seen)


def test_a_log_knows_what_it_has_written(tmp_path):
    with RunLog(tmp_path / "run.jsonl") as log:
        log.write("header", version=1, run="a")
        log.write(**step(1, loss=float("nan")))
        assert log.run() == read_run(tmp_path)
    with RunLog(tmp_path / "run.jsonl", append=True) as log:
        log.write(**step(2))
        assert log.run() == read_run(tmp_path) and len(log.run().stages[0].steps) == 2


def test_a_folder_of_runs_is_told_from_a_run(tmp_path):
    started(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match=f"there are logs in {tmp_path / 'a'}"):
        read_run(tmp_path)


def test_a_run_has_ended_when_its_recipe_is_done(tmp_path):
    recipe = {"stages": [{"name": "a"}, {"name": "b"}], "evaluation": {"kind": "scenes"}}
    ends = [{"type": "stage_end", "stage": name} for name in "ab"]
    scored = {"type": "eval", "scores": {"count": 0.5}}
    for number, (records, ended) in enumerate([(ends[:1], False), (ends, False), ([*ends, scored], True)]):
        assert read_run(started(tmp_path / str(number), *records, recipe=recipe)).ended is ended
    recipe["evaluation"]["kind"] = "none"
    assert read_run(started(tmp_path / "none", *ends, recipe=recipe)).ended
    # What is held out is asked last, and by itself where scenes are not.
    held_out = {"type": "eval", "scores": {"pets": 0.5}}
    for number, (kind, records, ended) in enumerate(
        (
            ("none", ends, False),
            ("none", [*ends, held_out], True),
            ("scenes", [*ends, scored], False),
            ("scenes", [*ends, held_out], False),
            ("scenes", [*ends, scored, held_out], True),
        )
    ):
        recipe["evaluation"] = {"kind": kind, "held_out": {"pets": {}}}
        folder = tmp_path / f"held out {number}"
        assert read_run(started(folder, *records, recipe=recipe)).ended is ended


def test_points_a_hair_above_one_are_points(tmp_path):
    """CIDEr-D of the right caption is 10 but for rounding; older logs hold it as it came."""
    points = [1.0000000000000002, 0.0]
    scored = {"type": "eval", "scores": {"c": 0.5}, "points": {"c": points}, "images": {"c": [0, 1]}}
    run = read_run(started(tmp_path, scored | {"questions": {"c": "x"}}))
    assert run.points["c"].scores == points and run.problems == []


def test_the_last_checkpoint_evaluated_counts(tmp_path):
    def scored(checkpoint, **scores):
        return {"type": "eval", "checkpoint": checkpoint, "scores": scores}

    path = started(tmp_path, scored("1", a=0.1, b=0.1), scored("2", a=0.2), scored("2", c=0.3))
    assert read_run(path).scores == {"a": 0.2, "c": 0.3}


def test_points_are_read_where_they_fit(tmp_path):
    def scored(**changes):
        record = {"type": "eval", "checkpoint": "1", "scores": {"a": 0.5}, "points": {"a": [0, 1.0]}}
        return record | {"images": {"a": [3, 4]}, "questions": {"a": "ff"}} | changes

    run = read_run(started(tmp_path / "whole", scored()))
    assert run.points == {"a": ([0, 1.0], [3, 4], "ff", {})} and run.problems == []
    graded = {"a": {"size": [19, None]}}
    assert read_run(started(tmp_path / "graded", scored(grades=graded))).points["a"].grades == graded["a"]
    short = read_run(started(tmp_path / "short", scored(grades={"a": {"size": [19]}})))
    assert short.points == run.points  # grades of other items are nobody's
    older = read_run(started(tmp_path / "older", scored(), {"type": "eval", "checkpoint": "1", "scores": {"a": 0.7}}))
    assert older.points == {} and older.scores == {"a": 0.7} and older.problems == []
    wrong = (
        {"points": {"a": [0, 1, 0.5]}},
        {"points": {"a": []}, "images": {"a": []}},
        {"images": {}},
    )
    for number, changes in enumerate(wrong):
        run = read_run(started(tmp_path / str(number), scored(**changes)))
        assert run.points == {} and run.scores


def test_questions_on_one_image_are_several_examples(tmp_path):
    def asked(question, answer):
        return {"type": "example", "id": "scenes/test/3", "task": "count", "question": question, "answer": answer}

    examples = read_run(started(tmp_path, asked("a?", "1"), asked("b?", "2"), asked("a?", "3"))).examples
    assert [(record["question"], record["answer"]) for record in examples] == [("a?", "3"), ("b?", "2")]


def test_missing_or_headless_files_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run log at"):
        read_run(tmp_path)
    path = tmp_path / "run.jsonl"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="no header record in its 0 lines"):
        read_run(path)
    path.write_text(json.dumps(step(1)) + "\n")
    with pytest.raises(ValueError, match="no header record in its 1 lines"):
        read_run(path)


def test_environment_is_json_and_says_what_ran(tmp_path):
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["torch"] == torch.__version__
    assert found["hardware"]["cores"] >= 1
    assert found["hardware"]["memory_bytes"] > 2**28
    assert found["hardware"]["gpus"] == [
        torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
    ]


def test_the_commit_is_that_of_the_checkout_with_the_file(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True)

    file = tmp_path / "code.py"
    file.write_text("1")
    assert _git(file) == (None, None)
    git("init")
    assert _git(file) == (None, None)
    git("add", ".")
    git("commit", "-m", "one")
    head = git("rev-parse", "HEAD").stdout.decode().strip()
    assert _git(file) == (head, False)
    file.write_text("2")
    assert _git(file) == (head, True)


def test_importing_does_not_import_torch():
    code = "import sys, sparsight.reporting as r; r.environment(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_runs_are_frozen(runs):
    with pytest.raises(AttributeError):
        runs[0].name = "b"
    assert replace(runs[0], name="b").stages is runs[0].stages
