"""vLLM itself answers as our models do, on the CPU; `make test-vllm` installs it and runs this."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2VLImageProcessorPil, SiglipVisionConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from sparsight.console import Console
from sparsight.modeling.configuration import EfficientNetLiteConfig
from sparsight.pipeline.export import export_model
from tiny import make_image, make_language, make_vlm

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs `make test-vllm`")
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
NATIVE = Qwen2_5_VLVisionConfig(
    **{"depth": 4, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 48},
    **{"patch_size": 8, "window_size": 32, "fullatt_block_indexes": [3]},
)
OWN = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=2)
SIGLIP = SiglipVisionConfig(patch_size=8, image_size=64, num_hidden_layers=4, **SIZES)
MODELS = {
    "chain_of_sight": {},
    "two ranks": {"bridge": "1:4,4:1"},
    "tied": {"bridge": "mlp", "vision": SIGLIP},
    "native": {"vision": NATIVE, "image_processor": OWN, "image_size": 96},
    "remote-code": {"vision": EfficientNetLiteConfig(image_size=64)},
}
QUESTIONS = ["How many apples?", "What stands left of the red car?", "Describe the images."]
# In its own process: vLLM changes classes of transformers. Of every prompt its tokens, how likely each is after those
# before it, and the greedy answer.
SCRIPT = """
import json, sys
from pathlib import Path
folder, given, options = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
if options.get("trust_remote_code"):
    class Absent:
        def find_spec(self, name, path, target=None):
            if name.partition(".")[0] == "sparsight":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, Absent())
from PIL import Image
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    prompts = [
        {"prompt": text, "multi_modal_data": {"image": [Image.open(file) for file in files]}} if files
        else {"prompt": text} for text, files in given
    ]
    asked = SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=0)
    llm = LLM(str(folder), dtype="float32", max_model_len=256, limit_mm_per_prompt={"image": 2}, **options)
    found = []
    for out in llm.generate(prompts, asked):
        ids = out.prompt_token_ids
        likely = [each[id].logprob for each, id in zip(out.prompt_logprobs[1:], ids[1:])]
        found.append((ids, likely, list(out.outputs[0].token_ids)))
    (folder.parent / "found.json").write_text(json.dumps(found))
"""


def language(tied):
    made, tokenizer = make_language(hidden=64)  # heads of 32, as vLLM's kernels want
    if tied:
        torch.manual_seed(3)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        made = LlamaForCausalLM(
            LlamaConfig(**sizes, vocab_size=len(tokenizer), tie_word_embeddings=True, eos_token_id=1)
        )
    return {"language": made, "tokenizer": tokenizer}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", MODELS)
def test_answers_are_the_models_own(tmp_path, name):
    model, processor = make_vlm(**language(name == "tied"), **MODELS[name])
    model.eval()
    images = [make_image(0), make_image(1, 90).crop((0, 0, 90, 40)), make_image(2, 64)]
    shown = [images[:1], images[1:], []]
    wanted, given = [], []
    for number, (question, own) in enumerate(zip(QUESTIONS, shown, strict=True)):
        content = [*[{"type": "image"} for _ in own], {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        files = [str(tmp_path / f"{number}-{index}.png") for index in range(len(own))]
        for image, file in zip(own, files, strict=True):
            image.save(file)
        given.append((text, files))
        inputs = processor(images=own or None, text=text, return_tensors="pt", add_special_tokens=False)
        ids = inputs["input_ids"][0].tolist()
        with torch.no_grad():
            likely = model(**inputs).logits[0].log_softmax(-1)
            answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
        wanted.append((ids, likely[torch.arange(len(ids) - 1), ids[1:]], answer))
    folder = tmp_path / "saved"
    for part in (model, processor):
        part.save_pretrained(folder)
    options = {"enforce_eager": True}
    if name == "two ranks":
        options |= {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    if name == "remote-code":
        folder = export_model(folder, tmp_path / "exported", "remote-code", Console(quiet=True))
        options |= {"trust_remote_code": True, "model_impl": "transformers"}
    (tmp_path / "ask.py").write_text(SCRIPT, encoding="utf-8")
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    settings |= {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if name == "two ranks" else {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, str(tmp_path / "ask.py"), str(folder), json.dumps(given), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    errors = []
    for (ids, likely, answer), (own_ids, own, own_answer) in zip(
        json.loads(Path(tmp_path / "found.json").read_text(encoding="utf-8")), wanted, strict=True
    ):
        assert ids == own_ids
        errors.append((torch.tensor(likely) - own).abs().max().item())
        assert answer == own_answer
    assert max(errors) <= 1e-5, errors  # measured 1e-6
