"""TRL's trainers, each with its own class: policy, reference and rollouts see the same, or it is refused."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from test_callback import preferences, steps
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from sparsight.settings.methods import CompressorConfig, SkipperConfig
from sparsight.sparse.callback import SparsightCallback
from tiny import conversation, make_image, make_vlm

IDLE = {"compressor": CompressorConfig(keep=1.0), "skipper": SkipperConfig(alpha=0.0, epsilon=0.0)}
METHODS = {"compressor": CompressorConfig(keep=0.25, final=0.5), "skipper": SkipperConfig(), "seed": 4}
LORA = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
COMMON = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1, "bf16": False}
COMMON |= {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "dataloader_pin_memory": False}
COMMON |= {"use_cpu": True, "seed": 3}
TIMES = ("time", "runtime", "per_second")


def log_of(trainer, ours=None):
    """What TRL itself has logged, without times; of keys that another log has, if one is given."""
    found = []
    for number, entry in enumerate(trainer.state.log_history):
        keys = entry if ours is None else ours[number]
        found.append({key: entry[key] for key in keys if not any(time in key for time in TIMES)})
    return found


def sft(folder, *callbacks, **options):
    torch.manual_seed(0)
    model, processor = make_vlm("1:16")
    answers = [[{"role": "assistant", "content": [{"type": "text", "text": f"It is {n}."}]}] for n in range(8)]
    rows = [
        {"prompt": conversation(f"Read {n}.", None), "completion": answer, "images": [make_image(n)]}
        for n, answer in enumerate(answers)
    ]
    arguments = SFTConfig(str(folder), **COMMON | {"max_length": None} | options)
    data = Dataset.from_list(rows)
    return SFTTrainer(model, arguments, train_dataset=data, processing_class=processor, callbacks=list(callbacks))


def dpo(folder, *callbacks, peft=None, **options):
    torch.manual_seed(0)
    model, processor = make_vlm("1:16")
    reference = None if peft else copy.deepcopy(model).eval()
    arguments = DPOConfig(str(folder), **COMMON | {"max_length": None, "per_device_train_batch_size": 2} | options)
    data, callbacks = preferences(processor), list(callbacks)
    given = {"train_dataset": data, "processing_class": processor, "callbacks": callbacks, "peft_config": peft}
    return DPOTrainer(model, reference, arguments, **given)


class Recorded(GRPOTrainer):
    """Keeps what it compares: log-probabilities of the policy, of the policy before and of the reference."""

    def _get_per_token_logps_and_entropies(self, *given, **more):
        found = super()._get_per_token_logps_and_entropies(*given, **more)
        self.scored = found[0].detach()
        return found

    def compute_loss(self, model, inputs, *given, **more):
        loss = super().compute_loss(model, inputs, *given, **more)
        seen = {name: inputs.get(f"{name}_per_token_logps") for name in ("old", "ref")}
        mask = inputs["completion_mask"].bool()
        self.seen = [
            *getattr(self, "seen", []),
            (self.scored, seen["old"], seen["ref"], inputs["completion_ids"], mask),
        ]
        return loss


def grpo(folder, *callbacks, peft=None, **options):
    torch.manual_seed(0)
    model, processor = make_vlm("1:16")
    if options.get("beta") and peft is None:  # TRL loads the reference from where the model comes from
        model.save_pretrained(folder / "model")
        model.config._name_or_path = str(folder / "model")
    rows = [{"prompt": conversation(f"Read {n}.", None), "image": make_image(n)} for n in range(8)]
    options = {"max_completion_length": 4, "num_generations": 2, "beta": 0.0} | options
    arguments = GRPOConfig(str(folder), **COMMON | options)
    given = {"train_dataset": Dataset.from_list(rows), "processing_class": processor, "peft_config": peft}

    def reward(completion_ids, **_):
        return [float(sum(ids) % 7) for ids in completion_ids]

    return Recorded(model, reward, arguments, callbacks=list(callbacks), **given)


@pytest.mark.parametrize("made_by, options", [(sft, {}), (dpo, {}), (grpo, {"steps_per_generation": 2})])
def test_idle_methods_are_the_plain_training(tmp_path, made_by, options):
    plain = made_by(tmp_path, **options)
    plain.train()
    ours = made_by(tmp_path, SparsightCallback(**IDLE), **options)  # seeds anew what rollouts are drawn with
    ours.train()
    assert len(steps(plain)) == 3 and log_of(ours, log_of(plain)) == log_of(plain)
    weights = ours.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in plain.model.state_dict().items())


@pytest.mark.parametrize("peft", [None, LORA])
def test_dpo_begins_at_ln_2(tmp_path, peft, recwarn):
    callback = SparsightCallback(**METHODS)
    trainer = dpo(tmp_path, callback, peft=peft, learning_rate=0.0)
    if peft is not None:
        trainer.model.set_adapter("default")
        for name, tensor in trainer.model.named_parameters():  # the policy begins as the base
            if "lora_B" in name:
                torch.nn.init.zeros_(tensor)
    trainer.train()
    for entry in steps(trainer):
        assert entry["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert 0 < entry["visual_tokens_out"] < entry["visual_tokens_in"]
    assert min(entry["layers_run"] for entry in steps(trainer)) < 1
    assert len(callback.handles) == (1 if peft else 2) and not any(handle.attached for handle in callback.handles)
    assert not [warning for warning in recwarn if "reference model" in str(warning.message)]


@pytest.mark.parametrize("options", [{"beta": 0.1}, {"beta": 0.1, "peft": LORA}, {"num_iterations": 2}])
def test_grpo_compares_like_with_like(tmp_path, options):
    """Of the slices of a generation batch, all see the layers and tokens that it was scored with."""
    options = {"steps_per_generation": 2, "learning_rate": 0.0, "max_steps": 5} | options
    trainer = grpo(tmp_path, SparsightCallback(**METHODS), **options)
    trainer.train()
    logged = steps(trainer)
    assert min(entry["layers_run"] for entry in logged) < 1
    for policy, old, reference, _, mask in trainer.seen:
        ratio = torch.exp(policy - old)[mask]
        assert (ratio - 1).abs().max() < 1e-5  # measured: 1e-6, as slices are other batches than those scored
        if reference is not None and "peft" not in options:
            assert (policy - reference)[mask].abs().max() < 1e-5
    share = 2 * options.get("num_iterations", 1)
    runs = [entry["layers_run"] for entry in logged]
    assert all(runs[n] == runs[n - n % share] for n in range(5))
    keeps = [entry["keep"] for entry in logged]
    assert all(keeps[n] == keeps[n - n % share] for n in range(5)) and keeps[0] < keeps[4]


def test_grpo_generates_dense(tmp_path):
    plain = grpo(tmp_path, max_steps=1)
    plain.train()
    ours = grpo(tmp_path, SparsightCallback(**METHODS), max_steps=1)
    ours.train()
    (policy, *_, ids, _), (sparse, *_, own, _) = plain.seen[0], ours.seen[0]
    assert torch.equal(ids, own) and not torch.equal(policy, sparse)


def test_grpo_that_could_not_compare_is_refused(tmp_path):
    random = SparsightCallback(compressor=CompressorConfig(keep=0.25, method="random"))
    for options in ({"steps_per_generation": 2}, {"beta": 0.1}):
        with pytest.raises(ValueError, match="method random would keep other tokens each time. Use another method"):
            grpo(tmp_path, random, **options).train()
    grpo(tmp_path, random, max_steps=1).train()  # nothing is scored beforehand
    odd = {"steps_per_generation": 3, "gradient_accumulation_steps": 2}
    with pytest.raises(ValueError, match="for 3 micro-batches, which is no multiple of gradient_accumulation_steps=2"):
        grpo(tmp_path, SparsightCallback(**METHODS), **odd).train()


def test_a_reward_model_is_refused(tmp_path):
    """TRL's RewardTrainer takes text alone, and its models have a score in place of an output layer."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = make_vlm("1:16")[1].tokenizer
    rows = [{"prompt": f"Read {n}.", "chosen": f" It is {n}.", "rejected": " No."} for n in range(8)]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 4}
    model = LlamaForSequenceClassification(LlamaConfig(**sizes, vocab_size=len(tokenizer), num_labels=1))
    data, arguments = Dataset.from_list(rows), RewardConfig(str(tmp_path), **COMMON)
    for methods, why in ((METHODS, "has no vision tower"), ({"skipper": SkipperConfig()}, "has no output layer")):
        callbacks = [SparsightCallback(**methods)]
        trainer = RewardTrainer(model, arguments, train_dataset=data, processing_class=tokenizer, callbacks=callbacks)
        with pytest.raises(ValueError, match=f"LlamaForSequenceClassification {why}"):
            trainer.train()


def test_a_reference_beforehand_is_refused(tmp_path):
    trainer = dpo(tmp_path, SparsightCallback(**METHODS))
    trainer.args.precompute_ref_log_probs = True  # TRL itself refuses it with images
    with pytest.raises(ValueError, match="DPOConfig has precompute_ref_log_probs=True: a reference that has seen all"):
        trainer.train()
