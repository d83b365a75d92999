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
# # Plan a run before renting a GPU
#
# How much memory does a step take, how many rows fit, and how many days and dollars do 3 trillion
# tokens cost? The function `plan` answers these questions for GPUs that are not here. The command
# `tinyllama plan CONFIG --mesh a100_16` prints the same. The run on this page is TinyLlama 1.1B's.
#
# Nothing on this page was measured while it ran. Memory follows from formulas. Every time is a
# range: its fast end is the least time that the card's measured speeds allow, and its slow end
# falls as far behind that as a real training run on such a card did.

# %%
import itertools

import matplotlib.pyplot as plt
from rich.console import Console

from tinyllama_jax.config import TINYLLAMA_1B, Config, DataConfig, ExecutionConfig, SourceConfig
from tinyllama_jax.performance.targets import CARDS
from tinyllama_jax.planning.plan import plan
from tinyllama_jax.planning.plan_table import render

# %matplotlib inline

# True compiles every step for its card, which gives exact memory and the real schedule of the
# network, and takes half a minute or more for each plan. It needs JAX's CUDA plugin
# (pip install -e '.[plan]') and no GPU.
COMPILE = False
# Dollars for an hour of one GPU. They are made up for this page: put in what you would pay.
EXAMPLE_PRICES = {"a100": 1.0, "a100_80g": 1.25, "h100": 2.0, "h200": 2.5}

SOURCES = (
    SourceConfig("slimpajama", "data/slimpajama", 0.693584),
    SourceConfig("starcoder", "data/starcoder", 0.306416),
)


def run(devices: int, rows: int, recompute="elementwise", gather="step") -> Config:
    """A run of 3 trillion tokens in steps of 1,024 rows, with `rows` on each GPU at a time."""
    return Config(
        run_folder="",
        model=TINYLLAMA_1B,
        data=DataConfig(sources=SOURCES),
        steps=1_430_512,
        batch_rows=1024,
        micro_batches=1024 // (devices * rows),
        execution=ExecutionConfig(recompute=recompute, gather=gather),
    )


# %% [markdown]
# ## One plan
#
# The original trained on sixteen A100-40GB with 8 rows of 2,048 tokens on each. Its two datasets
# had about 950 billion tokens together. How these divide between the two is a guess here.

# %%
tokens = {"slimpajama": 650e9, "starcoder": 300e9}
original = plan(
    run(16, 8), "a100_16", price=EXAMPLE_PRICES["a100"], tokens=tokens, compiler=COMPILE
)
Console(width=90, force_jupyter=False, color_system=None).print(render(original))

# %% [markdown]
# ## What fits on which card
#
# Here a single GPU holds all weights and the whole optimizer state. On several GPUs the blue parts
# of the bars would shrink, because each GPU holds a share of them. For each card there is a bar for
# each choice of what the backward pass computes again, with the largest power of two of rows that
# fits. The dashed line is the memory that a step may use: nine tenths of the card, less 1.5 GiB for
# NCCL and cuBLAS.

# %%
GIB = 2**30
PARTS = {
    "weights": "#1f4e79",
    "optimizer": "#2e86ab",
    "activations, gradients, gathered weights": "#f2a65a",
}
figure, axes = plt.subplots(figsize=(9, 4.8), dpi=110, layout="constrained")
ticks = []
for index, card in enumerate(CARDS):
    largest = plan(run(1, 1), f"{card}_1", compiler=COMPILE).largest_micro_batches
    for offset, micro_batch in enumerate(largest):
        rows = 2 ** (micro_batch.rows.bit_length() - 1)
        fitted = plan(run(1, rows, micro_batch.recompute), f"{card}_1", compiler=COMPILE)
        place, bottom = 4 * index + offset, 0.0
        sizes = (
            fitted.weights_bytes_per_device,
            fitted.optimizer_bytes_per_device,
            fitted.activation_bytes_per_device,
        )
        for size, color in zip(sizes, PARTS.values(), strict=True):
            axes.bar(place, size / GIB, bottom=bottom, color=color, width=0.8)
            bottom += size / GIB
        axes.text(place, bottom - 1, f"{rows}", ha="center", va="top", fontsize=9, weight="bold")
        ticks.append((place, micro_batch.recompute))
    usable = (fitted.usable_bytes_per_device - fitted.reserve_bytes_per_device) / GIB
    axes.hlines(usable, 4 * index - 0.6, 4 * index + 2.6, color="#b03a2e", linestyles="--")
    axes.text(4 * index + 1, -34, fitted.card.removeprefix("NVIDIA "), ha="center", fontsize=9)

axes.set_xticks(*zip(*ticks, strict=True), rotation=45, ha="right", fontsize=8)
axes.set_ylabel("GiB of a GPU")
axes.set_ylim(0, 140)
axes.set_title(
    "Peak memory of a step with the most rows that fit: their number in each bar", fontsize=11
)
handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in PARTS.values()]
handles.append(plt.Line2D([], [], color="#b03a2e", linestyle="--"))
axes.legend(handles, [*PARTS, "usable"], loc="upper left", frameon=False)
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## Days and dollars against chips
#
# Each bar reaches from the fast end of a prediction, on its left, to the slow end on its right.
# More GPUs shorten the run and make it a little more expensive: each has less work in a step, and
# waits as long for the network as before. The prices are the made-up ones from above.

# %%
COLORS = {"a100": "#2e86ab", "a100_80g": "#1f4e79", "h100": "#f2a65a", "h200": "#b03a2e"}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.8), dpi=110, layout="constrained")
counts = (8, 16, 32, 64)
for (row, count), (offset, card) in itertools.product(enumerate(counts), enumerate(CARDS)):
    planned = plan(run(count, 8), f"{card}_{count}", price=EXAMPLE_PRICES[card], compiler=COMPILE)
    place = row + 0.2 * (offset - 1.5)
    for axes, (low, high), scale in ((left, planned.days, 1), (right, planned.dollars, 1000)):
        width = (high - low) / scale
        axes.barh(place, width, left=low / scale, height=0.17, color=COLORS[card],
                  label=planned.card.removeprefix("NVIDIA ") if row == 0 else None)  # fmt: skip
for axes, title in ((left, "days"), (right, "thousand dollars, at example prices")):
    axes.set_yticks(range(len(counts)), [f"{count} GPUs" for count in counts])
    axes.invert_yaxis()
    axes.set_xlim(0)
    axes.set_title(title, fontsize=11)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
left.legend(frameon=False, loc="lower right")
plt.show()

# %% [markdown]
# ## Days and dollars against the micro-batch
#
# With `gather="step"` the weights cross the network once in each step, whatever the size of the
# micro-batch. With `gather="layer"`, which larger models need, they cross it for every micro-batch,
# so that small micro-batches spend most of their time waiting. The figure is for sixteen A100-80GB
# in two nodes that are joined by 400 or by 100 Gb/s. It shows the fast end of each range, and
# assumes that no other work hides the network's time.

# %%
figure, axes = plt.subplots(figsize=(9, 4.5), dpi=110, layout="constrained")
all_rows = (1, 2, 4, 8, 16, 32)
for (gather, color), (network, style) in itertools.product(
    (("step", "#2e86ab"), ("layer", "#b03a2e")), ((400, "-"), (100, "--"))
):
    days = [
        plan(run(16, rows, gather=gather), "a100_80g_16", network=network, compiler=COMPILE).days[0]
        for rows in all_rows
    ]
    axes.plot(all_rows, days, style, marker="o", color=color, label=f"{gather}, {network} Gb/s")
axes.set_xscale("log", base=2)
axes.set_yscale("log")
axes.set_xticks(all_rows, all_rows)
axes.set_ylim(50, 800)
axes.set_yticks((50, 100, 200, 400, 800), (50, 100, 200, 400, 800))
axes.minorticks_off()
axes.set_xlabel("rows of a micro-batch on each GPU")
axes.set_ylabel("days")
dollars = EXAMPLE_PRICES["a100_80g"] * 24 * 16 / 1000
thousands = axes.secondary_yaxis(
    "right", functions=(lambda days: dollars * days, lambda cost: cost / dollars)
)
thousands.set_yticks((30, 60, 120, 240), (30, 60, 120, 240))
thousands.minorticks_off()
thousands.set_ylabel("thousand dollars, at the example price")
axes.legend(title="weights gathered every", frameon=False)
axes.grid(alpha=0.3)
axes.spines["top"].set_visible(False)
plt.show()
