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
# # To PyTorch and back
#
# This page trains a small model, exports it, opens the export with `transformers` in PyTorch, and
# compares the two. It shows that both give the same logits and write the same texts, and how likely
# each side finds a token. Nothing is downloaded, and the page takes less than a minute on two CPU
# cores.

# %%
import tempfile
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import rich
import torch

from tinyllama_jax.config import Config, DataConfig, LlamaConfig, OptimizerConfig
from tinyllama_jax.conversion import huggingface
from tinyllama_jax.data import mixture
from tinyllama_jax.data.boundaries import loss_weights
from tinyllama_jax.data.tokenizer import load_tokenizer, train_tokenizer
from tinyllama_jax.inference.generate import generate
from tinyllama_jax.model import decoding, llama
from tinyllama_jax.preparation.documents import prepare_documents
from tinyllama_jax.preparation.library import standard_library
from tinyllama_jax.runtime.mesh import make_mesh
from tinyllama_jax.training.step import init_state, make_step

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its progress bars would ask for ipywidgets here
    import transformers

# %matplotlib inline
rich.reconfigure(quiet=True, force_jupyter=False)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# %% [markdown]
# ## A model
#
# The model has two layers, and four query heads that share two key-value heads. It reads one batch
# from the documentation of Python's standard library 120 times, so that it knows these eight half
# pages by heart. The notebook `train_tiny` explains each line of this cell.

# %%
temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)
prose = standard_library()["prose"]
train_tokenizer([document.text for document in prose["train"]], 1024, folder / "tokenizer.model")
prepare_documents("prose", prose, folder / "tokenizer.model", folder / "prose")

model = LlamaConfig(
    vocab_size=1024, layers=2, width=96, query_heads=4, kv_heads=2, head_width=24,
    swiglu_width=256, context=128,
)  # fmt: skip
config = Config(
    run_folder="",
    model=model,
    data=DataConfig(),
    steps=120,
    batch_rows=8,
    optimizer=OptimizerConfig(peak_lr=5e-3, end_lr=5e-4, warmup_steps=10),
)
mesh = make_mesh(devices=jax.devices()[:1])
rows = mixture.Rows(folder / "prose", "train", model.context, model.vocab_size)
batches = mixture.batches(
    [rows], mixture.Mixture([1.0]), seed=0, start=0, micro_batches=1, rows=config.batch_rows
)
tokens = next(batches)
with jax.set_mesh(mesh):
    state, step = init_state(config, mesh), make_step(config, mesh)
    losses = []
    for _ in range(config.steps):
        state, metrics = step(state, tokens, loss_weights(tokens))
        losses.append(float(metrics["train/loss"]))
print(f"loss of the first step {losses[0]:.3f}, of the last {losses[-1]:.3f}")
weights = state["weights"]

# %% [markdown]
# ## To PyTorch
#
# One call writes the folder, and `transformers` opens it without any code of this project. The
# logits of a sentence then agree to within the rounding of fp32.

# %%
huggingface.export(weights, model, folder / "tokenizer.model", folder / "export")
torch_model = transformers.AutoModelForCausalLM.from_pretrained(folder / "export")
torch_tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "export")

text = "Return the number of items in the list."
tokenizer = load_tokenizer(folder / "tokenizer.model")
ids = tokenizer.encode(text)
assert ids == torch_tokenizer(text).input_ids

ours_TV = llama.apply(model, weights, jnp.array([ids]))[0]
with torch.no_grad():
    theirs_TV = torch_model(torch.tensor([ids])).logits[0].numpy()
print(f"{len(ids)} tokens, logits from {theirs_TV.min():.1f} to {theirs_TV.max():.1f}")
print(f"largest difference of a logit: {np.abs(ours_TV - theirs_TV).max():.1e}")

# %% [markdown]
# ## The same text on both sides
#
# Both sides continue the beginnings of three rows of the batch by 60 tokens, always with the
# likeliest one. The beginnings differ in length. This project continues them in one batch, in which
# each gets the text that it would get alone. PyTorch continues one at a time.

# %%
prompts = [tokens[0, row, :length].tolist() for row, length in enumerate((6, 12, 24))]
ours = generate(model, weights, prompts, max_tokens=60, eos=None)
for prompt, new in zip(prompts, ours, strict=True):
    with torch.no_grad():
        theirs = torch_model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=60, do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    theirs = theirs[0, len(prompt) :].tolist()
    same = sum(a == b for a, b in zip(new, theirs, strict=True))
    print(f"{same} of 60 tokens are the same:")
    print(f"{tokenizer.decode(prompt)} ... {tokenizer.decode(new)}", end="\n\n----\n\n")

# %% [markdown]
# ## Behind a token
#
# The model does not know this sentence. On the left are the five tokens that it finds likeliest
# after the sentence, by both sides. On the right is the probability that it gave to each token of
# the sentence, knowing only the tokens before.

# %%
ours_V = jax.nn.softmax(ours_TV[-1])
theirs_V = torch.from_numpy(theirs_TV[-1]).softmax(-1).numpy()
likeliest = np.argsort(-theirs_V)[:5]

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), dpi=110, layout="constrained")
for values_V, offset, color, label in (
    (ours_V, -0.2, "#c8384f", "JAX"),
    (theirs_V, 0.2, "#8fb8de", "PyTorch"),
):
    left.barh(
        np.arange(5) + offset, np.asarray(values_V)[likeliest], 0.38, color=color, label=label
    )
left.set_yticks(range(5), [repr(tokenizer.id_to_piece(int(i))).strip("'") for i in likeliest])
left.invert_yaxis()
left.set(xlabel="probability", title="of what may follow")
left.legend(frameon=False, loc="lower right")
given_T = np.asarray(jax.nn.softmax(ours_TV))[np.arange(len(ids) - 1), ids[1:]]
right.bar(range(1, len(ids)), given_T, color="#c8384f")
names = [tokenizer.id_to_piece(token) for token in ids[1:]]
right.set_yscale("log")
right.set_xticks(range(1, len(ids)), names, rotation=60, ha="right", fontsize=8)
right.set(ylabel="probability", title="of each token of the sentence")
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## The cache
#
# Generation is fast because it keeps the keys and values of all tokens so far, for the two
# key-value heads alone. Reading a prompt fills this cache, and each new token adds a column to it,
# so that no token is computed twice. Both sides keep the same numbers. The figure shows the keys of
# the last layer's first head after the sentence and one more token. The white columns on the right
# are still empty.

# %%
ready = decoding.for_decoding(weights)
logits_BV, cache = decoding.prefill(
    model, ready, jnp.array([ids]), jnp.array([len(ids)]), columns=32
)
newest = logits_BV.argmax(-1)
place = len(ids)
logits_BV, cache = decoding.decode(model, ready, newest, jnp.array([place]), place, cache)

with torch.no_grad():
    read = torch_model(torch.tensor([[*ids, int(newest[0])]]), use_cache=True)
kept = read.past_key_values.layers[-1].keys[0, 0].numpy()
ours_SH = np.asarray(cache.keys_BKSH[-1][0, 0])
print(f"largest difference of a key: {np.abs(ours_SH[: place + 1] - kept).max():.1e}")

figure, shown = plt.subplots(1, 2, figsize=(9, 3), dpi=110, layout="constrained", sharey=True)
limit = np.abs(kept).max()
theirs_SH = np.full_like(ours_SH, np.nan)
theirs_SH[: len(kept)] = kept
for axes, keys_SH, title in zip(shown, (ours_SH, theirs_SH), ("JAX", "PyTorch"), strict=True):
    filled_SH = np.where(np.arange(32)[:, None] <= place, keys_SH, np.nan)
    image = axes.imshow(filled_SH.T, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    axes.set(title=title, xlabel="column of the cache")
shown[0].set_ylabel("width of the head")
figure.colorbar(image, ax=shown, label="key")
plt.show()
