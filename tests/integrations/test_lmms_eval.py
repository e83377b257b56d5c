"""lmms-eval's own command line on a local task, offline; `make test-lmms` installs it and runs this."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import AutoModelForImageTextToText, AutoProcessor

from evaluation.test_any_model import save_llava
from sparsight.errors import UserError
from sparsight.modeling import SparsightProcessor
from sparsight.pipeline import evaluate_checkpoint
from sparsight.settings.recipe import held_out_file
from sparsight.sparse.forward import NoEffectWarning
from tiny import make_vlm

ROOT = Path(__file__).parents[2]
needs_lmms_eval = pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="needs `make test-lmms`")
QUESTIONS = ["How many apples?", "What stands left of the red car?", "Read the number.", "Describe the image."]
TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
doc_to_visual: !function utils.images
doc_to_text: question
"""
GENERATED = """task: local
output_type: generate_until
doc_to_target: answer
generation_kwargs: {max_new_tokens: 24, until: ["<never>"]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}]
"""
CHOSEN = """task: local_choices
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: "{{choices.index(likely)}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
UTILS = """
from PIL import Image
def images(doc):
    return [Image.open(doc["path"])]
"""


ANSWERS = ["12", "a small dog", "it is 47", "two trees and a boat", "3", "a house"] * 2


def trained(model, processor, folder: Path) -> Path:
    """The model, which has learnt most of `ANSWERS` by heart."""
    chats = [
        [
            *question(number),
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        for number, answer in enumerate(ANSWERS)
    ]
    inputs = processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )
    unsupervised = (inputs["attention_mask"] == 0) | (inputs["input_ids"] == processor.image_token_id)
    labels = inputs["input_ids"].masked_fill(unsupervised, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    model.train()
    for _ in range(60):
        optimizer.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def question(number: int) -> list[dict]:
    content = [{"type": "image", "image": picture(number)}, {"type": "text", "text": QUESTIONS[number % 4]}]
    return [{"role": "user", "content": content}]


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (64 + 8 * (number % 3), 64), (20 * number, 255 - 20 * number, 128))


@pytest.fixture(scope="module", params=["ours", "llava"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "ours":
        return trained(*make_vlm(), folder)
    save_llava(folder)
    own = AutoModelForImageTextToText.from_pretrained(folder)
    return trained(own, AutoProcessor.from_pretrained(folder), folder)


def write_rows(folder: Path, answers: list[str]) -> Path:
    """A LLaVA file of twelve questions, whose answers are these."""
    rows = []
    for number, answer in enumerate(answers):
        picture(number).save(folder / f"{number}.png")
        turns = [
            {"from": "human", "value": f"<image>\n{QUESTIONS[number % 4]}"},
            {"from": "gpt", "value": answer},
        ]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def said_by(model: Path, rows: Path) -> tuple[list[str], float]:
    (result,) = evaluate_checkpoint(
        model, 100, "test", Console(file=StringIO()), held_out_file(rows, None, "bare_match", 100)
    )
    return [answer for _, answer in result.answers], result.scores["rows"]


def lmms_eval(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """lmms-eval's command line, which finds our entry point as an installation would show it."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    info = folder / "sparsight_checkout-0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sparsight-checkout\nVersion: 0\n")
    lines = [f"{name} = {target}" for name, target in declared.items()]
    (info / "entry_points.txt").write_text("\n".join(["[lmms_eval.models]", *lines, ""]))
    paths = [str(folder), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_DATASETS_CACHE": str(folder / "cache")}
    command = [sys.executable, "-W", "ignore", "-m", "lmms_eval", "--model", "sparsight", *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=240)


@needs_lmms_eval
def test_lmms_eval_scores_as_we_do(model: Path, tmp_path: Path) -> None:
    """Of a third of the questions the file has another answer than the model has learnt; both agree on each item."""
    answers = [answer if number % 3 else "it is a cat" for number, answer in enumerate(ANSWERS)]
    rows = write_rows(tmp_path, answers)
    said_by_us, score = said_by(model, rows)
    assert 0.1 < score < 0.9 and len(set(said_by_us)) > 2
    docs = [
        {
            "question": row["conversations"][0]["value"].removeprefix("<image>\n"),
            "answer": row["conversations"][1]["value"],
            "path": str(tmp_path / row["image"]),
            "choices": ["a boat of trees", answer],
            "likely": answer,
        }
        for row, answer in zip(json.loads(rows.read_text()), ANSWERS, strict=True)
    ]
    (tmp_path / "docs.json").write_text("\n".join(map(json.dumps, docs)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/utils.py").write_text(UTILS)
    for name, text in (("local", GENERATED), ("local_choices", CHOSEN)):
        (tmp_path / f"tasks/{name}.yaml").write_text(text + TASK.format(rows=tmp_path / "docs.json"))
    given = ["--tasks", "local,local_choices", "--include_path", str(tmp_path / "tasks"), "--batch_size", "5"]
    more = ["--output_path", str(tmp_path / "out"), "--log_samples", "--model_args", f"pretrained={model}"]
    done = lmms_eval(tmp_path, *given, *more)
    made = [*(tmp_path / "out").rglob("*_results.json")]  # it ends with 0 also after an error
    assert done.returncode == 0 and len(made) == 1, done.stdout[-3000:] + done.stderr[-3000:]
    sys.stdout.write("\n".join(["", *(line for line in done.stdout.splitlines() if line.startswith("|")), ""]))
    found = json.loads(made[0].read_text())["results"]
    assert found["local"]["exact_match,none"] == score
    (samples,) = (tmp_path / "out").rglob("*_samples_local.jsonl")
    said = {row["doc_id"]: row["filtered_resps"] for row in map(json.loads, samples.read_text().splitlines())}
    assert [said[number] for number in range(12)] == said_by_us
    chosen = found["local_choices"]["acc,none"]  # of what it has learnt, and another text
    assert chosen >= 0.75


def instances(kind: str, second: list, task: str = "t", images: int | None = 1) -> list:
    """Requests about so many images each; none given: of none, one and two in turn."""
    from lmms_eval.api.instance import Instance

    def shown(doc: int) -> list[Image.Image]:
        return [picture(doc + 5 * at) for at in range(doc % 3 if images is None else images)]

    return [
        Instance(
            kind,
            (QUESTIONS[number % 4], each, shown, number, task, "test"),
            0,
            metadata={"task": task, "doc_id": number, "repeats": 1},
        )
        for number, each in enumerate(second)
    ]


def apart(one: Sequence, other: Sequence) -> list:
    """Two of one, then two of the other: what belongs to a document does not stand together."""
    return [each for start in range(0, len(one), 2) for own in (one, other) for each in own[start : start + 2]]


@needs_lmms_eval
def test_batches_change_nothing_and_likelihoods_are_the_models_own(model: Path) -> None:
    from sparsight.pipeline.lmms import Sparsight

    answered, likely = [], []
    for size in (1, "5"):
        own = Sparsight(str(model), batch_size=size, max_batch_size=None)
        own.task_dict = {"t": {"test": list(range(12))}}
        options = [{"max_new_tokens": 3 + 9 * (number % 2), "until": ["boat"]} for number in range(12)]
        answered.append(own.generate_until(instances("generate_until", options)))
        answered.append(own.generate_until(instances("generate_until", options, images=None)))
        two = [instances("loglikelihood", texts) for texts in ([f" {answer}" for answer in ANSWERS], ["a boat"] * 12)]
        asked = apart(*two)
        likely.append([result.text for result in own.loglikelihood(asked)])
        ragged = own.loglikelihood(instances("loglikelihood", ANSWERS, images=None))
        answered.append([f"{result.text[0]:.3f}" for result in ragged])
    assert answered[:3] == answered[3:] and not any("boat" in text for text in answered[0])
    assert answered[0] != answered[1]
    assert [loss for loss, _ in likely[0]] == pytest.approx([loss for loss, _ in likely[1]], abs=1e-4)
    assert len({greedy for _, greedy in likely[0]}) == 2
    wanted = zip(apart(range(12), range(12)), apart(ANSWERS, ["a boat"] * 12), likely[0], strict=True)
    for number, text, (loss, greedy) in wanted:
        chat = [*question(number), {"role": "assistant", "content": [{"type": "text", "text": text}]}]
        inputs = own.processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
        count = len(own.tokenizer(text)["input_ids"]) + 1  # with <|end|>
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, -count:] = inputs["input_ids"][:, -count:]
        with torch.no_grad():
            found = own.model(**inputs, labels=labels)
        assert count * float(found.loss) == pytest.approx(loss, abs=1e-3)
        assert greedy == bool((found.logits[:, -count - 1 : -1].argmax(-1) == labels[:, -count:]).all())


@needs_lmms_eval
def test_arguments_are_taken_or_refused(model: Path) -> None:
    from sparsight.pipeline.lmms import Sparsight

    for arguments, said in (
        ("layuot=cos-80", "model_args: unknown 'layuot'; did you mean 'layout'"),
        ("batch_size=auto", "a --batch_size of 1 or more; found .*batch_size=auto"),
    ):
        with pytest.raises(UserError, match=said):
            Sparsight.create_from_arg_string(f"pretrained={model},{arguments}")
    own = Sparsight(str(model))
    own.task_dict = {"t": {"test": [0]}}
    with pytest.raises(UserError, match="expected a text as an answer, found ' '"):
        own.loglikelihood(instances("loglikelihood", [" "]))
    with pytest.warns(NoEffectWarning, match=r"task t: \{'temperature': 0.7\} has no effect, answers are greedy"):
        own.generate_until(instances("generate_until", [{"max_new_tokens": 1, "temperature": 0.7}]))
    if not isinstance(own.processor, SparsightProcessor):
        with pytest.raises(UserError, match="layout=cos-80, image_size=None: only models of ours have them"):
            Sparsight(str(model), layout="cos-80")
        return
    finer = Sparsight.create_from_arg_string(f"pretrained={model},layout='1:4,2:1,4:1'")
    assert (own.processor.num_image_tokens, finer.processor.num_image_tokens) == (8, 24)
    finer.task_dict = own.task_dict
    assert len(finer.generate_until(instances("generate_until", [{"max_new_tokens": 2}]))) == 1
