"""Make reference.json: what independent packages answer on hard and on seeded random inputs.

Run it in an environment of its own, as the packages need much that Sparsight does not:

    pip install --no-deps pycocoevalcap==1.2 lmms-eval==0.7.3 loguru numpy sacrebleu portalocker tabulate colorama lxml
    pip install pandas requests datasets
    git clone https://github.com/GT-Vision-Lab/VQA       # VQA's official evaluation, of commit a013f00
    python tests/evaluation/make_reference.py VQA
"""

# ruff: noqa: E501

import copy
import importlib
import importlib.machinery
import importlib.metadata
import json
import random
import re
import subprocess
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
textvqa = submodule("lmms_eval.tasks.textvqa.utils")
metrics = submodule("lmms_eval.api.metrics")
chartqa = submodule("lmms_eval.tasks.chartqa.utils")
scienceqa = submodule("lmms_eval.tasks.scienceqa.utils")
mme = submodule("lmms_eval.tasks.mme.utils")
mmbench = submodule("lmms_eval.tasks.mmbench.mmbench_evals").MMBench_Evaluator()
refcoco = submodule("lmms_eval.tasks.refcoco.utils_rec")

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


def official(folder: str) -> Any:
    """VQA's own evaluation, which is Python 2: its prints get brackets."""
    show = ["git", "-C", folder, "show", "HEAD:PythonEvaluationTools/vqaEvaluation/vqaEval.py"]
    code = subprocess.run(show, check=True, capture_output=True, text=True).stdout.expandtabs(4)
    names: dict[str, Any] = {}
    exec(re.sub(r'print (".*")', r"print(\1)", code), names)
    return names["VQAEval"](types.SimpleNamespace(getQuesIds=list), None)


def normalised(texts: list[str], folder: str) -> dict[str, list[list[str]]]:
    """Pairs of an answer, and what VQA's official evaluation and TextVQA's make of it; and, of lmms-eval's vqav2, an
    answer, what it and the official code make of it, where these differ."""
    own, processor = official(folder), PROCESSOR()
    found: dict[str, list[list[str]]] = {"normalised": [], "normalised_lmms": [], "normalised_textvqa": []}
    for text in texts:
        plain = text.replace("\n", " ").replace("\t", " ").strip()
        for name, each in (("normalised", own), ("normalised_lmms", processor)):
            found[name].append([text, _normal(each, plain)])
        found["normalised_textvqa"].append([text, processor(text)])
    pairs = zip(found["normalised"], found["normalised_lmms"], strict=True)
    return found | {"normalised_lmms": [[*theirs, own[1]] for own, theirs in pairs if own != theirs]}


def _normal(processor: Any, text: str) -> str:
    if hasattr(processor, "process_punctuation"):
        return processor.process_digit_article(processor.process_punctuation(text))
    return processor.processDigitArticle(processor.processPunctuation(text))


def judged(rng: random.Random, texts: list[str]) -> list[dict[str, Any]]:
    """Questions with an answer, ten human answers, and VQA's accuracy."""
    cases = []
    for number in range(200):
        pool = (
            rng.sample(texts, rng.randint(1, 4))
            if number % 2
            else rng.sample(["two", "2", "a cat", "cat", "Cat.", "the dog's", "dog 's"], 3)
        )
        humans = [rng.choice(pool) for _ in range(10)]
        answer = rng.choice([*pool, "something else"])
        doc = {"question_id": 0, "answers": [{"answer": text, "answer_id": n} for n, text in enumerate(humans)]}
        accuracy = vqav2.vqav2_process_results(copy.deepcopy(doc), [answer])["exact_match"]
        as_text = {"question_id": 0, "answers": list(humans)}
        by_textvqa = textvqa.textvqa_process_results(as_text, [answer])["exact_match"]
        cases.append({"answer": answer, "humans": humans, "accuracy": accuracy, "textvqa": by_textvqa})
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


def pairs(rng: random.Random, texts: list[str]) -> dict[str, list[Any]]:
    """[answer, truth, points] by metric; of GQA, DocVQA, ChartQA, ScienceQA, MME, MMBench and RefCOCO."""
    found: dict[str, list[Any]] = {}
    plain = [text for text in texts if text.strip() and "\x00" not in text]

    def told(name: str, answer: str, truth: Any, points: Any) -> None:
        found.setdefault(name, []).append([answer, truth, float(points) if not isinstance(points, str) else points])

    for _ in range(300):
        truth = rng.choice(plain).strip()
        answer = rng.choice([truth, truth.upper(), truth + ".", f"({truth})", rng.choice(plain)]).strip()
        exact = metrics.exact_match_hf_evaluate([answer], [truth], ignore_case=True, ignore_punctuation=True)
        told("bare_match", answer, truth, exact["exact_match"])
        truths = [rng.choice(["0.28", "28 percent", "New  York", "a b c d", truth]) for _ in range(rng.randint(1, 3))]
        answer = "".join(rng.choice([sign, sign, sign, "x", ""]) for sign in rng.choice([truths[0], truth]))
        told("anls", answer, truths, metrics.anls(truths, [answer])["anls"])
        number = rng.choice(
            [f"{rng.uniform(-99, 99):.2f}", str(rng.randint(0, 9)), f"{rng.randint(0, 99)}%", "0", truth]
        )
        near = number
        if re.fullmatch(r"-?[\d.]+%?", number):
            near = f"{float(number.rstrip('%')) * rng.choice([1, 0.951, 0.95, 0.949, 1.05, 1.06]):.6g}"
        answer = rng.choice([near, near + "%", number, number.upper(), "none"])
        told("relaxed_match", answer, number, chartqa.relaxed_correctness(answer, number))
        choices = rng.sample(["red", "blue", "green", "a cat", "no"], rng.randint(2, 5))
        doc = {"choices": choices, "answer": rng.randrange(len(choices))}
        letter = "ABCDE"[rng.randrange(len(choices))]
        answer = rng.choice([letter, letter.lower(), f"{letter}. x", f"{letter.lower()}. x", f"({letter})", "blue", ""])
        told(
            "letter_match", answer, "ABCDE"[doc["answer"]], scienceqa.sqa_process_results(doc, [answer])["exact_match"]
        )
        options = dict(zip("ABCD", [*choices[:4], *[""] * 4], strict=False))
        options = {key: text for key, text in options.items() if text}
        word = rng.choice(choices)
        forms = ["{0}", "{0}.", "({0})", "{0}) {1}", "the answer is {0}", "A {1} is {0}", "{1}", "{1} or {2}", "{0}: {1}", "E",
                 ":{0}.", "{0}, {0}.", "a {1} it is", "", "{0} or A"]  # fmt: skip
        answer = rng.choice(forms).format(letter, word.upper(), rng.choice(choices))
        told("chosen_letter", answer, options, str(mmbench.can_infer(answer, dict(options)) or ""))
        said = rng.choice(
            ["Yes", "no", "Y", "n.", "x", "Yes, it is", "It is no", "nope", "eyes", "yesno", " No.", "", "kno"]
        )
        told("mme_reading", said, "", mme.parse_pred_ans(said))
        boxes = [sorted(rng.sample(range(100), 2)) + sorted(rng.sample(range(100), 2)) for _ in range(2)]
        moved = [value + rng.randint(-15, 15) for value in boxes[0]]
        if moved[0] < moved[1] and moved[2] < moved[3]:
            boxes[1] = moved
        true, said_box = ([each[0] / 100, each[2] / 100, each[1] / 100, each[3] / 100] for each in boxes)
        answer = rng.choice(["{}", "It is {}.", "{}", "no box"]).format(said_box)
        points = refcoco.compute_accuracy(true, refcoco.parse_float_sequence_within(answer))
        told("box_match", answer, json.dumps(true), points)
    return found


def mme_scores(rng: random.Random) -> list[dict[str, Any]]:
    """Answers to pairs of questions by category, and MME's two scores (without what it divides them by)."""
    cases = []
    for size in (1, 3, 20):
        rows, results = [], {"mme_perception_score": [], "mme_cognition_score": []}
        for kinds in mme.eval_type_dict.values():
            for kind in rng.sample(kinds, min(size, len(kinds))):
                for pair in range(rng.randint(1, 4)):
                    for truth in ("Yes", "No"):
                        answer, id = rng.choice(["Yes", "No", truth, "maybe"]), f"{kind}/{pair}"
                        doc = {"answer": truth, "category": kind, "question_id": id}
                        for key, value in mme.mme_process_results(doc, [answer]).items():
                            results[key].append(value)
                        rows.append([kind, id, truth, answer])
        scores = {name: mme.mme_aggregate_results(own) for name, own in results.items()}
        cases.append({"rows": rows, "scores": scores})
    return cases


def circular(rng: random.Random) -> list[dict[str, Any]]:
    """Rolled questions with answers, and MMBench's share of those that are right in every order."""
    cases = []
    for count in (1, 5, 40):
        rows = []
        for index in range(count):
            size = rng.randint(2, 4)
            for by in range(size):
                truth = "ABCD"[(index + by) % size]
                answer = truth if rng.random() < 0.85 else rng.choice("ABCD")
                options = {letter: f"option {(n - by) % size} of it" for n, letter in enumerate("ABCD"[:size])}
                rows.append({"index": index + by * 1000000, "answer": truth, "prediction": answer, "category": "c",
                             **{letter: options.get(letter, float("nan")) for letter in "ABCD"}})  # fmt: skip
        accuracy, *_ = mmbench.eval_result(copy.deepcopy(rows), "static")
        cases.append({"rows": [[r["index"], r["answer"], r["prediction"]] for r in rows], "accuracy": float(accuracy)})
    return cases


if __name__ == "__main__":
    rng = random.Random(0)
    texts = answers(rng)
    reference = {
        "made_by": "tests/evaluation/make_reference.py",
        "versions": VERSIONS,
        **normalised(texts, sys.argv[1]),
    }
    reference |= {"vqa": judged(rng, texts), "pope": yes_no(rng), "cider": captions(rng)}
    reference |= {"pairs": pairs(rng, texts), "mme": mme_scores(rng), "circular": circular(rng)}
    rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in reference.items())
    OUT.write_text(f"{{\n{rows}\n}}\n", encoding="utf-8")
