"""The suite `instruct` through lm-eval's own task files, with documents of ours for its downloads.

All is real but three things: the data, the metric `code_eval`, which is a download too, and the
model, in whose place stands a table of what it says.
"""

import dataclasses
import hashlib
from pathlib import Path

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from support.models import SMALL
from tinyllama_jax.data.tokenizer import load_tokenizer
from tinyllama_jax.errors import UserError
from tinyllama_jax.evaluation import harness, scores

MODEL = dataclasses.replace(SMALL, context=2048)  # HumanEval asks for 1,024 new tokens

SUBJECTS, BBH = 57, 27  # tasks in the two groups
CHOICES = "\nA. one\nB. two\nC. three\nD. four\nAnswer:"
# What is asked -> what the model says, as far as it would go on.
ANSWERS = {
    "Which letter is the first?": "A",
    "Which letter is the last?": "B",
    "Which letter is wrong?": "A",
    "Is this a question?": " yes\n\nQ: Is this one?\nA: yes",
    "Is this a Question?": " no\n\n",
    "def double(x):\n": "    return 2 * x\n\nprint(double(3)\n",
    "def triple(x):\n": "    return 2 * x\n",
    "A cat ate 3 mice. How many?": " 3. The cat slept.",
    "A red cat ran. Who?": " red dog. It barked.",
}
METRIC = """
import datasets
import evaluate


class CodeEval(evaluate.Metric):
    def _info(self):
        texts = datasets.Sequence(datasets.Value("string"))
        features = {"predictions": texts, "references": datasets.Value("string")}
        return evaluate.MetricInfo("", "", datasets.Features(features))

    def _compute(self, predictions, references, k):
        assert k == [1]
        passed = [self.passes(a, test) for (a,), test in zip(predictions, references)]
        return {"pass@1": sum(passed) / len(passed)}, {}

    def passes(self, program, test):
        try:
            exec(program + "\\n" + test, {})
        except Exception:
            return False
        return True
"""


def mmlu(subject: str) -> dict[str, list[dict]]:
    """One question of each subject and three of anatomy: the first is answered right."""
    asked = ["Which letter is the first?", "Which letter is the last?", "Which letter is wrong?"]
    choices = {"choices": ["one", "two", "three", "four"], "subject": subject}
    rows = [{"question": q, "answer": a, **choices} for q, a in zip(asked, (0, 3, 2), strict=True)]
    shown = [{"question": f"Shown {i}?", "answer": i % 4, **choices} for i in range(6)]
    return {"test": rows if subject == "anatomy" else rows[:1], "dev": shown}


def bbh(task: str) -> dict[str, list[dict]]:
    """One question each, and word sorting has a second, which is answered wrong."""
    rows = [{"input": question, "target": "yes"} for question in list(ANSWERS)[3:5]]
    return {"test": rows if task == "word_sorting" else rows[:1]}


def humaneval(_) -> dict[str, list[dict]]:
    """Two programs, of which the second does not do what its test wants."""
    rows = []
    for prompt, wanted in zip(list(ANSWERS)[5:7], (8, 12), strict=True):
        name = prompt.split("(")[0].removeprefix("def ")
        test = f"def check(candidate):\n    assert candidate(4) == {wanted}\n"
        rows.append({"task_id": name, "prompt": prompt, "test": test, "entry_point": name})
    return {"test": rows}


def drop(_) -> dict[str, list[dict]]:
    """A number that is right, and two words of which one is."""

    def row(text: str, number: str, spans: list[str]) -> dict:
        passage, question = text.rsplit(". ", 1)
        day = {"day": "", "month": "", "year": ""}
        answer = {"number": number, "date": day, "spans": spans}
        again = {"number": [number], "date": [day], "spans": [spans]}
        texts = {"query_id": text, "passage": passage + ".", "question": question}
        return texts | {"answer": answer, "validated_answers": again}

    asked = list(ANSWERS)[7:]
    rows = [row(asked[0], "3", [""]), row(asked[1], "", ["red cat"])]
    return {"train": [row(f"Shown {i}. What?", str(i), [""]) for i in range(4)], "validation": rows}


DATA = {
    "cais/mmlu": mmlu,
    "SaylorTwift/bbh": bbh,
    "openai/openai_humaneval": humaneval,
    "EleutherAI/drop": drop,
}


def documents(path: str, name: str | None = None, **_) -> datasets.DatasetDict:
    splits = DATA[path](name)
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
    )


@pytest.fixture
def model_says(data, monkeypatch):
    """Puts `ANSWERS` in the place of the model, and keeps the prompts."""
    tokenizer = load_tokenizer(data.tokenizer)
    prompts = []

    def answer_to(prompt: str) -> str:
        prompts.append(prompt)
        asked = prompt.removesuffix("\nA:").removesuffix(CHOICES)
        return next(said for question, said in ANSWERS.items() if asked.endswith(question))

    def generate(model, weights, asked, *, max_tokens, sampler, seed, eos, stop):
        texts = [(tokenizer.decode(ids), ids) for ids in asked]
        new = [tokenizer.encode(text + answer_to(text))[len(ids) :] for text, ids in texts]
        assert all(len(ids) <= max_tokens for ids in new) and sampler.temperature == 0
        return new

    def scorer(weights, tokens_BS, counts_BT):
        sums = []
        for tokens_S, counts_T in zip(*map(np.asarray, (tokens_BS, counts_BT)), strict=True):
            where = np.flatnonzero(counts_T) + 1
            if not len(where):  # a row that fills the batch
                sums.append(0.0)
                continue
            context, choice = tokens_S[: where[0]].tolist(), tokens_S[where].tolist()
            said = answer_to(tokenizer.decode(context))
            sums.append(-1.0 if tokenizer.decode(choice) == said else -9.0)
        return jnp.array(sums), jnp.zeros(len(sums), bool)

    monkeypatch.setattr(harness, "generate", generate)
    monkeypatch.setattr(harness, "make_scorer", lambda *_: scorer)
    return prompts


def test_the_suite_asks_and_counts_as_by_hand(data, model_says, mesh, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", documents)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    import evaluate  # not before `harness`, which tells it whether to ask a network

    assert evaluate.config.HF_EVALUATE_OFFLINE
    with pytest.raises(UserError, match="humaneval, or its metric, is not here .*code_eval"):
        harness.load_tasks(["humaneval"], MODEL)
    digest = hashlib.sha256(METRIC.encode()).hexdigest()
    cache = Path(evaluate.config.HF_MODULES_CACHE) / "evaluate_modules" / "metrics"
    (cache / "evaluate-metric--code_eval" / digest).mkdir(parents=True)
    (cache / "evaluate-metric--code_eval" / digest / "code_eval.py").write_text(METRIC)

    tokenizer = load_tokenizer(data.tokenizer)
    tasks = harness.Tasks(["instruct"], MODEL, tokenizer, mesh, jnp.float32, quiet=True)
    with jax.set_mesh(mesh):
        found = tasks.score({"blocks": []})  # nobody asks the model
    assert found["mmlu_anatomy"]["acc"] == pytest.approx(1 / 3)
    assert found["mmlu"]["acc"] == pytest.approx(SUBJECTS / (SUBJECTS + 2))
    assert found["bbh_fewshot"]["exact_match"] == pytest.approx(BBH / (BBH + 1))
    assert found["humaneval"]["pass@1"] == 0.5
    assert (found["drop"]["em"], found["drop"]["f1"]) == (0.5, 0.75)

    topic = "The following are multiple choice questions (with answers) about anatomy.\n\n"
    shots = [f"Shown {i}?{CHOICES} {'ABCDA'[i]}\n\n" for i in range(5)]
    asked = topic + "".join(shots) + "Which letter is wrong?" + CHOICES
    assert model_says.count(asked) == 4, "one for each choice"
    (prompt,) = (x for x in model_says if x.endswith("Who?"))
    assert prompt.count("Shown") == 3
    assert "def double(x):\n" in model_says

    console = Console(width=80)
    with console.capture() as capture:
        console.print(scores.render("ours", found, ["instruct"], None))
    lines = map(str.split, capture.get().splitlines())
    assert ["ours", "96.61", "96.43", "50.00", "50.00"] in lines
