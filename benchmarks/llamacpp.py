"""Asks llama.cpp what the original was asked, through exported GGUF files, on the CPU, and compares tokens of the
prompt, visual tokens, logits behind the prompt and greedy answers. The models are small and random: near ties are many.

    pip install llama-cpp-python sparsight[gguf]
    python benchmarks/llamacpp.py [--prompts 50] [--out FILE]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp
import llama_cpp.mtmd_cpp as mtmd
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from sparsight.console import Console
from sparsight.pipeline.export import export_model
from sparsight.reporting import environment
from tiny import TEXTS, ask, make_image, make_language, make_vlm

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
NEW = 12  # tokens of an answer


@llama_cpp.llama_log_callback
def silent(level: int, text: bytes, data: Any) -> None:
    """llama.cpp says much."""


def language(kind: Any, config: Any, **more: Any) -> Any:
    """A language model whose random weights are large enough to prefer some tokens."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokenizer = make_language()[1]
    made = kind(config(**sizes, num_key_value_heads=2, vocab_size=len(tokenizer) + 6, **more))
    for weight in (each for each in made.parameters() if each.ndim > 1):
        torch.nn.init.normal_(weight, std=0.3)
    return made


class LlamaCpp:
    """A model's two GGUF files, loaded by llama.cpp."""

    def __init__(self, folder: Path, image_token: int) -> None:
        self.llama = llama_cpp.Llama(str(folder / "language.gguf"), n_ctx=512, verbose=False, n_threads=1)
        params = mtmd.mtmd_context_params_default()
        params.use_gpu, params.print_timings, params.n_threads = False, False, 1
        self.vision = mtmd.mtmd_init_from_file(str(folder / "mmproj.gguf").encode(), self.llama.model, params)
        self.image_token = image_token

    def logits(self, size: int) -> np.ndarray:
        found = llama_cpp.llama_get_logits_ith(self.llama._ctx.ctx, -1)
        return np.ctypeslib.as_array(found, shape=(size,)).copy()

    def ask(self, prompt: str, image: np.ndarray, width: int, size: int) -> tuple[list[int], Any, Any, list[int]]:
        """Tokens of the prompt, visual tokens (N, E), logits behind it (V), and the answer's tokens."""
        height, across = image.shape[:2]
        pixels = (ctypes.c_uint8 * image.size).from_buffer_copy(image.tobytes())
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(mtmd.mtmd_bitmap_init(across, height, pixels))
        given = mtmd.mtmd_input_text()
        given.text = prompt.replace("<image>", mtmd.mtmd_default_marker().decode()).encode()
        given.text_len, given.add_special, given.parse_special = len(given.text), False, True
        chunks = mtmd.mtmd_input_chunks_init()
        assert mtmd.mtmd_tokenize(self.vision, chunks, ctypes.byref(given), bitmaps, 1) == 0
        tokens: list[int] = []
        visual = None
        for number in range(mtmd.mtmd_input_chunks_size(chunks)):
            chunk = mtmd.mtmd_input_chunks_get(chunks, number)
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                count = ctypes.c_size_t()
                found = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
                tokens += found[: count.value]
                continue
            tokens += [self.image_token] * (images := mtmd.mtmd_input_chunk_get_n_tokens(chunk))
            assert mtmd.mtmd_encode_chunk(self.vision, chunk) == 0
            visual = np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(self.vision), shape=(images, width)).copy()
        self.llama.reset()
        self.llama._ctx.kv_cache_clear()
        end, context = llama_cpp.llama_pos(0), self.llama._ctx.ctx
        start = llama_cpp.llama_pos(0), llama_cpp.llama_seq_id(0)
        done = mtmd.mtmd_helper_eval_chunks(self.vision, context, chunks, *start, 512, True, ctypes.byref(end))
        assert done == 0
        first = logits = self.logits(size)
        answer: list[int] = []
        while len(answer) < NEW and (not answer or answer[-1] != self.llama.token_eos()):
            answer.append(int(logits.argmax()))
            batch = llama_cpp.llama_batch_get_one((llama_cpp.llama_token * 1)(answer[-1]), 1)
            assert llama_cpp.llama_decode(context, batch) == 0
            logits = self.logits(size)
        return tokens, visual, first, answer


def compare(name: str, prompts: int, **options: Any) -> dict[str, Any]:
    """One model and its files, asked the same."""
    siglip = SiglipVisionConfig(patch_size=8, image_size=64, **SIZES)
    model, processor = make_vlm(vision=siglip, tokenizer=make_language()[1], **options)
    side, row = model.config.image_size, {"model": name, "prompts": prompts, "same_tokens": 0, "same_answers": 0}
    row |= dict.fromkeys(("visual_difference", "visual_largest", "logits_difference", "logits_largest"), 0.0)
    with tempfile.TemporaryDirectory() as folder:
        for part in (model, processor):
            part.save_pretrained(f"{folder}/saved")
        there = LlamaCpp(
            export_model(f"{folder}/saved", f"{folder}/gguf", "gguf", Console(quiet=True)), model.config.image_token_id
        )
        for number in range(prompts):
            question = f"{TEXTS[number % len(TEXTS)]} {number}"
            inputs = ask(processor, make_image(number, side), question)
            turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
            prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
            with torch.no_grad():
                visual = model.get_image_features(inputs["pixel_values"]).pooler_output[0].numpy()
                logits = model(**inputs).logits[0, -1].numpy()
                answer = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[
                    0, inputs["input_ids"].shape[1] :
                ]
            found = there.ask(prompt, np.asarray(make_image(number, side)), visual.shape[-1], logits.size)
            row["same_tokens"] += found[0] == inputs["input_ids"][0].tolist()
            row["same_answers"] += found[3] == answer.tolist()
            for key, ours, theirs in (("visual", visual, found[1]), ("logits", logits, found[2])):
                row[f"{key}_difference"] = max(row[f"{key}_difference"], float(np.abs(ours - theirs).max()))
                row[f"{key}_largest"] = max(row[f"{key}_largest"], float(np.abs(ours).max()))
        there.llama.close()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    mtmd.mtmd_log_set(silent, ctypes.c_void_p(0))
    qwen2, llama = (
        language(Qwen2ForCausalLM, Qwen2Config),
        language(LlamaForCausalLM, LlamaConfig, tie_word_embeddings=True),
    )
    models: dict[str, dict[str, Any]] = {
        "mlp, Qwen3": {"bridge": "mlp", "vision_levels": [3], "language": make_language()[0]},
        "mlp, Qwen2": {"bridge": "mlp", "vision_levels": [2], "language": qwen2},
        "linear, Llama, 96 px": {"bridge": "linear", "vision_levels": [-1], "language": llama, "image_size": 96},
    }
    rows = [compare(name, arguments.prompts, **options) for name, options in models.items()]
    result = {"llama_cpp_python": llama_cpp.__version__, "rows": rows, "environment": environment()}
    text = json.dumps(result, indent=1)
    Console().print(text, markup=False)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
