"""Make reference.json: what independent packages answer on hard and on seeded random inputs.

Run it in an environment of its own, as the packages need much that Sparsight does not:

    pip install --no-deps pycocoevalcap==1.2 lmms-eval==0.7.3 loguru numpy
    python tests/evaluation/make_reference.py
"""

import copy
import importlib
import importlib.machinery
import importlib.metadata
import json
import random
import sys
import types
from pathlib import Path
from typing import Any

VERSIONS = {name: importlib.metadata.version(name) for name in ("pycocoevalcap", "lmms_eval")}
OUT = Path(__file__).with_name("reference.json")


def submodule(name: str) -> Any:
    """A module without what the packages above it import at their start."""
    parts = name.split(".")
    root = Path(str(importlib.machinery.PathFinder.find_spec(parts[0]).submodule_search_locations[0]))
    for depth in range(1, len(parts)):
        package = types.ModuleType(".".join(parts[:depth]))
        package.__path__ = [str(root.joinpath(*parts[1:depth]))]
        sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(name)


scorer = submodule("pycocoevalcap.cider.cider_scorer")
vqa = submodule("lmms_eval.tasks._task_utils.vqa_eval_metric")
vqav2 = submodule("lmms_eval.tasks.vqav2.utils")
pope = submodule("lmms_eval.tasks.pope.utils")
PROCESSOR = vqa.EvalAIAnswerProcessor

HARD_ANSWERS = [
    "", " ", "A", "the", "The cat.", "a  red\tcar\n", "Yes!", "no, it isnt", "1,000", "1,000 (about)", "1,,000",
    "3.5", "3. 5", ".5", "5.", "e.g.", "T-shirt", "t - shirt", "black/white", "black / white",
    "black and white", "one", "None", "ten", "eleven", "One two THREE", "it's", "its", "Dont", "DONT", "Im",
    "i'm", "somebody'd", "y'allll", "what is this?", "?", "...", "<br>", "\"quoted\"", "it's 5 o'clock",
    "oclock", "50%", "$5", "a:b", "5:30", "don't; won't", "an apple, a pear", "@home", "caf\u00e9",
    "\u4e24\u53ea\u732b", "3,5,7", "x" + "." * 40, "2 , 3", "-5", "1-2", "o'clock the an a", "(a) the",
    "the_end", "\\n", "let's", "lets", "she's", "shes", "Id've", "id've",
]  # fmt: skip
WORDS = [
    "a",
    "the",
    "red",
    "cat",
    "dog",
    "two",
    "on",
    "mat",
    "sits",
    "none",
    "dont",
    "1,000",
    "T-shirt",
    "yes",
    "no",
    ".",
]


def answers(rng: random.Random) -> list[str]:
    """Hard ones, each contraction and its whole, and random strings of what is treated apart."""
    known = [text for pair in PROCESSOR.CONTRACTIONS.items() for text in pair]
    signs = [*PROCESSOR.PUNCTUATIONS, ".", "'", ":", " ", "\n", "\t", "0", "7", "a", "the ", "Two", "x"]
    mixed = ["".join(rng.choice(signs) for _ in range(rng.randint(1, 14))) for _ in range(300)]
    return [*HARD_ANSWERS, *known, *mixed]


def normalised(texts: list[str]) -> list[list[str]]:
    """Pairs of an answer, and what the official evaluation makes of it (as its VQA task calls the processor)."""
    processor = PROCESSOR()
    pairs = []
    for text in texts:
        plain = text.replace("\n", " ").replace("\t", " ").strip()
        pairs.append([text, processor.process_digit_article(processor.process_punctuation(plain))])
    return pairs


def judged(rng: random.Random, texts: list[str]) -> list[dict[str, Any]]:
    """Questions with an answer, ten human answers, and VQA's accuracy."""
    cases = []
    for number in range(200):
        pool = (
            rng.sample(texts, rng.randint(1, 4)) if number % 2 else rng.sample(["two", "2", "a cat", "cat", "Cat."], 3)
        )
        humans = [rng.choice(pool) for _ in range(10)]
        answer = rng.choice([*pool, "something else"])
        doc = {"question_id": 0, "answers": [{"answer": text, "answer_id": n} for n, text in enumerate(humans)]}
        accuracy = vqav2.vqav2_process_results(copy.deepcopy(doc), [answer])["exact_match"]
        cases.append({"answer": answer, "humans": humans, "accuracy": accuracy})
    return cases


def yes_no(rng: random.Random) -> list[dict[str, Any]]:
    """Answers "yes" or "no", truths, and POPE's figures; its yes-ratio is not taken: it counts the truths."""
    fixed = [(["no"] * 4, ["yes", "no"] * 2), (["yes"] * 3, ["no"] * 3), (["no"], ["no"]), (["yes"], ["yes"])]
    chosen = [
        tuple([rng.choice(["yes", "no"]) for _ in range(size)] for _ in range(2)) for size in (1, 2, 3, 7, 50, 300) * 3
    ]
    cases = []
    for said, true in [*fixed, *chosen]:
        results = [
            pope.pope_process_results({"answer": truth, "question_id": n}, [answer])["pope_accuracy"]
            for n, (answer, truth) in enumerate(zip(said, true, strict=True))
        ]
        names = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "f1_score"}
        scores = {key: getattr(pope, f"pope_aggregate_{name}")(results) for key, name in names.items()}
        cases.append({"answers": said, "truths": true, "scores": scores})
    return cases


def captions(rng: random.Random) -> list[dict[str, Any]]:
    """Sets of captions and references, with the scorer's CIDEr-D of each."""

    def sentence(longest: int = 14) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(0, longest)))

    hard = [
        (["a cat"], [["a cat"]]),  # one image: all weights are 0
        (["a cat", ""], [["a cat", ""], ["a dog"]]),
        (["cat cat cat cat", "dog"], [["a cat on a mat"], ["dog", "dog dog"]]),
        (["a cat on a mat", "a dog"], [["a cat on a mat"], ["a dog"]]),
        (["a", "two words", "three words here"], [["a"], ["two words"], ["three words here and many more of them"]]),
        (["same", "same", "same"], [["same"], ["same"], ["same"]]),
    ]
    mixed = []
    for size in (2, 3, 5, 20, 60):
        references = [[sentence() or "x" for _ in range(rng.randint(1, 5))] for _ in range(size)]
        candidates = [rng.choice([sentence(), rng.choice(texts), rng.choice(texts) + " cat"]) for texts in references]
        mixed.append((candidates, references))
    cases = []
    for candidates, references in [*hard, *mixed]:
        cider = scorer.CiderScorer(n=4, sigma=6.0)
        for candidate, texts in zip(candidates, references, strict=True):
            cider += (candidate, texts)
        _, scores = cider.compute_score()
        cases.append({"candidates": candidates, "references": references, "scores": [float(score) for score in scores]})
    return cases


if __name__ == "__main__":
    rng = random.Random(0)
    texts = answers(rng)
    reference = {"made_by": "tests/evaluation/make_reference.py", "versions": VERSIONS, "normalised": normalised(texts)}
    reference |= {"vqa": judged(rng, texts), "pope": yes_no(rng), "cider": captions(rng)}
    rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in reference.items())
    OUT.write_text(f"{{\n{rows}\n}}\n", encoding="utf-8")
