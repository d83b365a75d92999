"""Tasks of lm-evaluation-harness, held against lm-eval's own `hf` model on the exported weights."""

import dataclasses
import functools
import importlib
import json
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from support.models import SMALL
from support.paths import GOLDEN
from tinyllama_jax.cli import main
from tinyllama_jax.config import EvaluationConfig
from tinyllama_jax.conversion import huggingface
from tinyllama_jax.data.tokenizer import BOS, load_tokenizer
from tinyllama_jax.errors import UserError
from tinyllama_jax.evaluation import harness
from tinyllama_jax.model import llama
from tinyllama_jax.runtime.mesh import make_mesh, on_every_device
from tinyllama_jax.training import loop
from tinyllama_jax.training.metrics import read_metrics

TASKS = {
    "own_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "own_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "own_answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["e", "\n\n"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}
# What the model of 64 tokens cannot do.
REFUSED = {
    "own_long": {"until": ["\n"], "max_gen_toks": 64},
    "own_beams": {"until": ["\n"], "max_gen_toks": 8, "num_beams": 4},
    "own_cold": {"until": ["\n"], "max_gen_toks": 8, "do_sample": True},
    "own_sharp": {"until": ["\n"], "max_gen_toks": 8, "temperature": 0.8, "top_p": 1.5},
}


def documents() -> list[dict]:
    """Questions from one word to more than the context of 64 tokens, also without a context."""
    words = (GOLDEN / "text.txt").read_text().split()
    rows = []
    for i in range(13):
        question = " ".join(words[7 * i : 7 * i + 1 + 9 * (i % 5)])
        choices = [" " + " ".join(words[at : at + 1 + i % 4]) for at in (3 * i, 5 * i + 1, 90 + i)]
        text = " ".join(words[2 * i : 2 * i + 5 + 20 * (i % 4)])
        rows.append({"question": question, "choices": choices, "answer": i % 3, "text": text})
    return [*rows, rows[4] | {"question": ""}]


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory) -> Path:
    """A folder with the task files and their documents."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = documents()
    tasks = dict(TASKS)
    for name, how in REFUSED.items():
        tasks[name] = TASKS["own_answer"] | {"generation_kwargs": how}
    for name, task in tasks.items():
        file = folder / f"{name}.jsonl"
        # An empty prompt can be scored but not continued.
        chosen = rows[:6] if task["output_type"] == "generate_until" else rows
        file.write_text("".join(json.dumps(row) + "\n" for row in chosen))
        where = {"dataset_path": "json", "dataset_kwargs": {"data_files": str(file)}}
        task = {"task": name, "test_split": "train", "target_delimiter": "", **where, **task}
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return folder


@pytest.fixture(scope="module")
def weights():
    # Larger than at the start, so that the likeliest token depends on the text; and never a byte:
    # where bytes are no UTF-8, sentencepiece and transformers show other marks for them.
    weights = jax.tree.map(lambda w: 2 * w, llama.init_weights(SMALL, jax.random.key(3)))
    return weights | {"head_DV": weights["head_DV"].at[:, 3:259].set(0)}


def make_lm(weights, data, devices):
    mesh = make_mesh(devices=jax.devices()[:devices])
    weights = on_every_device(weights, mesh, jnp.float32)
    scorer = harness.make_scorer(SMALL, mesh, jnp.float32)
    tokenizer = load_tokenizer(data.tokenizer)
    lm = harness.TinyLlamaLM(SMALL, tokenizer, mesh, scorer, jnp.float32, weights, quiet=True)
    return mesh, lm


@pytest.mark.parametrize("devices", [1, 8])
def test_answers_are_those_of_the_bare_forward_pass_whatever_the_devices(weights, data, devices):
    mesh, lm = make_lm(weights, data, devices)
    asked = [(row["question"], choice) for row in documents()[-5:] for choice in row["choices"]]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(asked)]
    with jax.set_mesh(mesh):
        answers = lm.loglikelihood(requests)
    encode = load_tokenizer(data.tokenizer).encode
    apply = jax.jit(functools.partial(llama.apply, SMALL))
    for (context, continuation), (score, _) in zip(asked, answers, strict=True):
        ids = encode(context + continuation) if context else [BOS, *encode(continuation)]
        first = len(encode(context)) if context else 1
        targets = ids[first:]
        ids = ids[-SMALL.context - 1 :]
        padded_T = np.pad(ids[:-1], (0, SMALL.context + 1 - len(ids)))
        scores_TV = jax.nn.log_softmax(apply(weights, padded_T[None])[0])
        places = np.arange(len(ids) - 1 - len(targets), len(ids) - 1)
        by_hand = float(scores_TV[places, np.array(targets)].sum())
        assert score == pytest.approx(by_hand, abs=1e-3)
    # 32 and 64 tokens: two programs for all lengths.
    assert lm._scorer._cache_size() == 2


@pytest.mark.torch
def test_every_answer_is_that_of_lm_evals_own_hf_model(weights, data, own_tasks, tmp_path):
    huggingface.export(weights, SMALL, Path(data.tokenizer), tmp_path / "export")
    manager = TaskManager(include_path=str(own_tasks), include_defaults=False)
    options = {"tasks": list(TASKS), "task_manager": manager, "bootstrap_iters": 0}
    options["log_samples"] = True
    theirs = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "export"), "dtype": "float32"},
        device="cpu",
        batch_size=4,
        **options,
    )
    mesh, lm = make_lm(weights, data, devices=8)
    with jax.set_mesh(mesh):
        ours = simple_evaluate(model=lm, **options)
    for name in TASKS:
        for a, b in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            assert a["arguments"] == b["arguments"]
            for one, other in zip(a["filtered_resps"], b["filtered_resps"], strict=True):
                if name == "own_choice":
                    assert one == (pytest.approx(other[0], abs=1e-3), other[1])
                elif name == "own_text":
                    assert one == pytest.approx(other, abs=1e-3)
                else:
                    assert one == other
        for metric, value in theirs["results"][name].items():
            exact = metric.startswith(("acc", "exact_match"))
            assert ours["results"][name][metric] == (value if exact else pytest.approx(value))
    scores = ours["results"]["own_choice"]
    assert 0 < scores["acc,none"] < 1, "a model that is always right or wrong would prove little"
    answers = {sample["filtered_resps"][0] for sample in ours["samples"]["own_answer"]}
    assert len(answers) > 2


# With what a task may say of samples, and leave to lm-eval's and transformers' defaults.
SAMPLED = [
    {"do_sample": True, "temperature": 0.7},
    {"temperature": 1.0, "top_k": 0, "top_p": 0.3},
    {"temperature": 3.0, "top_k": 4, "num_beams": 1},
    {"do_sample": False, "temperature": 0.7, "top_k": 4},
]


@pytest.mark.torch
def test_samples_are_spread_as_those_of_lm_evals_own_hf_model(weights, data, tmp_path):
    """First tokens of many samples of one prompt."""
    import torch
    from lm_eval.models.huggingface import HFLM

    flat = weights | {"head_DV": weights["head_DV"] / 2}  # or one token has nearly all samples
    huggingface.export(flat, SMALL, Path(data.tokenizer), tmp_path / "export")
    theirs = HFLM(str(tmp_path / "export"), dtype="float32", device="cpu", batch_size=100)
    mesh, ours = make_lm(flat, data, devices=8)
    torch.manual_seed(0)
    for how in SAMPLED:
        how = {"until": ["\n"], "max_gen_toks": 1} | how
        asked = [Instance("generate_until", {}, ("The file", how), 0)] * 512
        with jax.set_mesh(mesh):
            a = Counter(ours.generate_until(asked))
        b = Counter(theirs.generate_until(asked, disable_tqdm=True))
        apart = sum(abs(a[text] - b[text]) for text in a | b) / 2 / 512
        assert apart < 0.2 and (len(a) > 3) == how.get("do_sample", True), how


def test_a_sample_is_the_same_twice_whatever_goes_together(weights, data, monkeypatch):
    how = {"until": ["\n"], "max_gen_toks": 8, "temperature": 1.5}
    prompts = ["The", "A mesh of", "The", "class"] * 4
    asked = [Instance("generate_until", {}, (prompt, how), 0) for prompt in prompts]
    found = []
    for devices, together in ((8, 2), (8, 2), (1, 8)):
        monkeypatch.setattr(harness, "PROMPTS", together)
        mesh, lm = make_lm(weights, data, devices)
        with jax.set_mesh(mesh):
            found.append(lm.generate_until(asked))
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) > 12, "equal prompts want unequal samples"


@pytest.fixture
def scored_run(config, own_tasks):
    """A run that is scored on the way, on eight devices."""
    tasks = EvaluationConfig(2, ("own_choice", "own_text"), 5, str(own_tasks))
    config = dataclasses.replace(config, steps=4, evaluation=tasks)
    assert loop.run(config)
    return config


def test_a_run_scores_itself_on_the_way_as_the_command_does_later(scored_run, own_tasks, capsys):
    folder = Path(scored_run.run_folder)
    logged = read_metrics(folder)
    scores = {
        step: {name: value for name, value in values.items() if name.startswith("eval/")}
        for step, values in logged.items()
    }
    assert [step for step, values in scores.items() if values] == [2, 4]
    names = {"eval/own_choice/acc", "eval/own_choice/acc_norm", "eval/own_text/bits_per_byte"}
    assert set(scores[2]) == set(scores[4]) == names
    assert scores[2]["eval/own_text/bits_per_byte"] > scores[4]["eval/own_text/bits_per_byte"]
    command = ["eval", folder, "--tasks", "own_choice", "own_text", "--limit", "5"]
    assert main([str(x) for x in [*command, "--include-path", own_tasks]]) == 0
    kept = json.loads((folder / "results.json").read_text())["4"]
    for name, value in scores[4].items():
        _, task, metric = name.split("/")
        assert kept[task][metric] == pytest.approx(value, rel=1e-5)
    assert kept["own_choice"]["limit"] == 5 and kept["own_choice"]["acc_stderr"] > 0
    out = capsys.readouterr().out
    assert "acc_norm" in out and "first 5 documents" in out
    # Another task joins those that are there.
    assert main([str(x) for x in [*command[:3], "own_answer", "--include-path", own_tasks]]) == 0
    assert len(json.loads((folder / "results.json").read_text())["4"]) == 3


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["hellaswagg"], "no task 'hellaswagg': did you mean hellaswag"),
        (["commonsense"], "data of task hellaswag.* is not here .* set HF_HOME"),
        (["instruct"], "set HF_ALLOW_CODE_EVAL=1"),
        (["own_long"], "own_long asks for up to 64 new tokens and the model's context is 64"),
        (["own_beams"], "own_beams wants texts with num_beams = 4"),
        (["own_cold"], "own_cold wants samples but tells no temperature"),
        (["own_sharp"], "own_sharp wants samples with top_k = 50 and top_p = 1.5"),
    ],
)
def test_what_cannot_be_asked_is_told_in_one_sentence(own_tasks, names, words):
    with pytest.raises(UserError, match=words):
        harness.load_tasks(names, SMALL, own_tasks)


def test_an_own_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match="There is no folder"):
        harness.load_tasks(["hellaswag"], SMALL, tmp_path / "nowhere")


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, harness.__name__)
    with pytest.raises(UserError, match=r"pip install 'tinyllama-jax\[eval\]'"):
        importlib.import_module(harness.__name__)
