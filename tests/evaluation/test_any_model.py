"""Scores of models that are not ours, by their own processors."""

import json
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from sparsight.modeling.chat_templates import FLATTEN, LEAN
from sparsight.pipeline import evaluate_checkpoint, inspect_checkpoint
from sparsight.settings.recipe import held_out_file
from tiny import ask, clip_config, make_image, make_language


def save_llava(folder: Path) -> Path:
    """A Llava of transformers with random weights, and its processor."""
    _, tokenizer = make_language()
    torch.manual_seed(0)
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=400,
        initializer_range=0.5,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=clip_config(initializer_factor=4.0),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=FLATTEN + LEAN,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return save_llava(tmp_path_factory.mktemp("llava"))


def conversations(folder: Path) -> Path:
    rows = []
    for number, (question, answer) in enumerate(
        [("what ?", "a red dog"), ("how many are in it ?", "2"), ("why ?", "so")]
    ):
        make_image(number, 60 + 10 * number).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def test_F06_a_model_of_transformers_is_asked_by_its_own_processor(llava, tmp_path, monkeypatch):
    """Answers in batches are those of one question after the other, by the model's own generate."""
    # In bf16, which `auto` takes where the CPU has it, rounding decides between the words of random weights.
    monkeypatch.setattr("sparsight.pipeline.evaluate.precision_on", lambda device, precision: "fp32")
    held_out = held_out_file(conversations(tmp_path), None, "exact_match", 10)
    out = StringIO()
    (result,) = evaluate_checkpoint(llava, 10, "test", Console(file=out, width=120), held_out)
    model, processor = AutoModelForImageTextToText.from_pretrained(llava), AutoProcessor.from_pretrained(llava)
    said = []
    room = max(len(processor.tokenizer(item.truth)["input_ids"]) for item, _ in result.answers) + 8
    for item, answer in result.answers:
        inputs = ask(processor, make_image(item.image, 60 + 10 * item.image), item.question)
        ids = model.generate(**inputs, max_new_tokens=room, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        said.append(processor.tokenizer.decode(ids, skip_special_tokens=True).strip())
        assert said[-1] == answer
    assert len(set(said)) > 1 and result.items == {"rows": 3} and "rows" in out.getvalue()


def test_F06_and_about_the_embedded_scenes(llava):
    (result,) = evaluate_checkpoint(llava, 1, "test", Console(file=StringIO()))
    assert (
        len(result.items) > 3 and set(result.items.values()) == {1} and result.shuffled.keys() == result.scores.keys()
    )


def test_F06_a_processor_without_a_chat_template_is_told(llava, tmp_path):
    folder = save_llava(tmp_path / "bare")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="LlavaProcessor has no chat template"):
        evaluate_checkpoint(folder, 1, "test", Console(file=StringIO()))


def test_F06_inspect_says_what_it_needs(llava, tmp_path):
    said = "needs a model of Sparsight with a bridge of kind resampler or chain_of_sight, found one of type 'llava'"
    with pytest.raises(ValueError, match=said):
        inspect_checkpoint(llava, None, tmp_path, Console(file=StringIO()))
