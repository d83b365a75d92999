# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train a tiny Llama and watch it learn
#
# This page builds a Llama of half a million weights, trains it on the documentation of Python's
# standard library, and lets it write. The text comes with Python, so nothing is downloaded, and two
# CPU cores take less than a minute. The cells call the same functions as `tinyllama train`.

# %%
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import rich
from IPython.display import display

from tinyllama_jax.config import Config, DataConfig, LlamaConfig, OptimizerConfig
from tinyllama_jax.data import mixture
from tinyllama_jax.data.boundaries import loss_weights
from tinyllama_jax.data.tokenizer import EOS, load_tokenizer, train_tokenizer
from tinyllama_jax.evaluation.held_out import evaluate, make_score, unigram_entropy
from tinyllama_jax.inference.generate import Sampler, generate
from tinyllama_jax.preparation.documents import prepare_documents
from tinyllama_jax.preparation.library import standard_library
from tinyllama_jax.runtime.mesh import make_mesh, put_batch
from tinyllama_jax.training.step import compute_dtype, init_state, make_step

# %matplotlib inline
rich.reconfigure(quiet=True, force_jupyter=False)  # its progress bars would ask for ipywidgets

# %% [markdown]
# ## Text to tokens
#
# The corpus consists of the language reference and the docstrings of the Python that runs this
# page. Some documents are held out, and none of their passages occurs in the training text. A
# tokenizer learns 1,024 pieces of words from the training text. Training and held-out text are then
# written to disk as the ids of such pieces, the tokens.

# %%
temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)
prose = standard_library()["prose"]

train_tokenizer([document.text for document in prose["train"]], 1024, folder / "tokenizer.model")
tokenizer = load_tokenizer(folder / "tokenizer.model")
manifest = prepare_documents("prose", prose, folder / "tokenizer.model", folder / "prose")

for split, facts in manifest["splits"].items():
    print(f"{split:10}  {facts['documents']:3} documents  {facts['tokens']:7,} tokens")
print(tokenizer.encode("Return the length of the list.", out_type=str))

# %% [markdown]
# ## The model
#
# The model is one layer of a Llama 2, with rotary positions, SwiGLU, and two key-value heads that
# four query heads share. A row is 64 tokens long, and a step reads 16 rows, which are 1,024 tokens.
# Within a minute a model as small as this gets further than a deeper one. With more time, raise
# `layers` and `steps`.

# %%
model = LlamaConfig(
    vocab_size=tokenizer.get_piece_size(),
    layers=1,
    width=128,
    query_heads=4,
    kv_heads=2,
    head_width=32,
    swiglu_width=352,
    context=64,
)
config = Config(
    run_folder="",
    model=model,
    data=DataConfig(),
    steps=240,
    batch_rows=16,
    optimizer=OptimizerConfig(peak_lr=5e-3, end_lr=5e-4, warmup_steps=20),
)
print(f"{model.parameters():,} weights")

# %% [markdown]
# ## Train
#
# Two lines in the figure say what to expect. The first guesses are random, and a little worse than
# taking every piece as equally likely, whose loss is ln 1,024. A model that knew how often each
# piece occurs, but nothing of the pieces before it, could at best reach the unigram entropy. A loss
# below that line was learned from context.

# %%
train_rows, held_out_rows = (
    mixture.Rows(folder / "prose", split, model.context, model.vocab_size)
    for split in ("train", "validation")
)
targets = np.stack([held_out_rows[i] for i in range(len(held_out_rows))])[:, 1:]
uniform, unigram = np.log(model.vocab_size), unigram_entropy(targets, model.vocab_size)

figure, axes = plt.subplots(figsize=(8, 4.5), dpi=110, layout="constrained")
for level, style, text in [
    (uniform, "--", "ln 1,024: every piece equally likely"),
    (unigram, ":", "unigram entropy: pieces without context"),
]:
    axes.axhline(level, color="0.5", linestyle=style, linewidth=1.2)
    axes.text(config.steps, level + 0.05, text, color="0.35", ha="right", va="bottom")
train_curve = axes.plot([], [], color="#8fb8de", label="training batch")[0]
held_out_curve = axes.plot([], [], color="#c8384f", marker="o", label="64 held-out rows")[0]
axes.set(xlim=(0, config.steps + 2), ylim=(4, 7.5))
axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False, loc="lower left")
plt.close(figure)  # or the cell would show it a second time
picture = display(figure, display_id=True)

# %%
mesh = make_mesh(devices=jax.devices()[:1])
batches = mixture.batches(
    [train_rows], mixture.Mixture([1.0]), seed=0, start=0, micro_batches=1, rows=config.batch_rows
)
some_rows = [held_out_rows[i] for i in range(64)]
losses, held_out = {}, {}

with jax.set_mesh(mesh):
    state, step = init_state(config, mesh), make_step(config, mesh)
    score = make_score(model, mesh, compute_dtype(config, mesh))
    held_out[0] = evaluate(score, state["weights"], some_rows, 32, mesh).loss
    for number in range(1, config.steps + 1):
        tokens = next(batches)
        batch = put_batch(tokens, mesh, 1), put_batch(loss_weights(tokens), mesh, 1)
        state, metrics = step(state, *batch)
        losses[number] = float(metrics["train/loss"])
        if number % 20 == 0:
            held_out[number] = evaluate(score, state["weights"], some_rows, 32, mesh).loss
            train_curve.set_data(list(losses), list(losses.values()))
            held_out_curve.set_data(list(held_out), list(held_out.values()))
            picture.update(figure)

# %% [markdown]
# ## The result
#
# This is the loss on all held-out text, beside the unigram entropy of the same tokens.

# %%
with jax.set_mesh(mesh):
    final = evaluate(score, state["weights"], held_out_rows, 32, mesh)
print(f"held-out loss    {final.loss:.3f} nats per token, over {final.tokens:,} tokens")
print(f"unigram entropy  {unigram:.3f} nats per token")

# %% [markdown]
# ## A sample
#
# The model has read less than a third of the training text, and that only once. It has learned some
# words and the layout of Python's documentation, but not to make sense.

# %%
prompts = [tokenizer.encode(prompt) for prompt in ("Return the", "If the", "The")]
with jax.set_mesh(mesh):
    new = generate(
        model, state["weights"], prompts, max_tokens=64, sampler=Sampler(temperature=0.5), eos=EOS
    )
for prompt, ids in zip(prompts, new, strict=True):
    print(tokenizer.decode(prompt + ids), end="\n\n----\n\n")
