"""Every option of a training run, as one tree of frozen dataclasses.

Default values live here and nowhere else. A config file (configs/*.py) defines
`get_config() -> Config`. The docstring under a field is its help text on the command line.
"""

import dataclasses
import itertools
import json
import math
from typing import Any, Literal

from tinyllama_jax.errors import require

AttentionBackend = Literal["auto", "reference", "pallas", "triton", "cudnn"]


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
    """Choices that trade speed for memory. They change results only by rounding."""

    attention: AttentionBackend = "auto"
    """`auto` chooses by device: a Pallas kernel or cuDNN on a GPU, plain JAX on a CPU."""
    recompute: Literal["nothing", "elementwise", "layers"] = "nothing"
    """What the backward pass computes a second time to save memory. `elementwise`: only what needs
    no product with weights (SwiGLU's elementwise part, plain JAX's attention). `layers`: each
    layer."""
    gather: Literal["step", "layer"] = "step"
    """Gather the weights on each device once a `step`, or, to save memory, `layer` by `layer`."""

    def __post_init__(self):
        require(
            self.gather == "step" or self.recompute != "nothing",
            "execution.gather is layer and execution.recompute is nothing, so every gathered "
            "weight would be kept: recompute elementwise or layers.",
        )


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama 2 decoder. The defaults are those of TinyLlama 1.1B."""

    vocab_size: int = 32_000
    """Number of pieces in the tokenizer's vocabulary."""
    layers: int = 22
    width: int = 2048
    """Size of the residual stream."""
    query_heads: int = 32
    kv_heads: int = 4
    """Number of key and value heads; each is shared by query_heads / kv_heads query heads."""
    head_width: int = 64
    """Size of one attention head; even, because RoPE rotates pairs of numbers."""
    swiglu_width: int = 5632
    """Size of the hidden layer of the SwiGLU feed-forward network."""
    context: int = 2048
    """Tokens in a training row. It must divide 8,192, the tokens in a stored record."""
    rope_base: float = 10_000.0
    """Base of the RoPE frequencies, often called theta."""
    rope_factor: float = 1.0
    """RoPE positions are divided by this factor (linear position interpolation); 1 changes none."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm, so that a row of zeros is not divided by zero."""

    def __post_init__(self):
        sizes = {
            field: value for field, value in vars(self).items() if not field.startswith("rope")
        }
        for field, value in sizes.items():
            require(value > 0, f"model.{field} is {value}: it must be above 0.")
        require(
            self.query_heads % self.kv_heads == 0,
            f"model.query_heads ({self.query_heads}) is not divisible by model.kv_heads "
            f"({self.kv_heads}): choose kv heads that divide the query heads.",
        )
        require(
            self.head_width % 2 == 0,
            f"model.head_width is {self.head_width}: RoPE rotates pairs, so it must be even.",
        )
        require(
            self.rope_base > 0 and self.rope_factor > 0,
            "model.rope_base and model.rope_factor must be above 0.",
        )

    def parameters(self) -> int:
        """Returns the number of weights, computed from the shape without building the model."""
        attention = 2 * self.width * self.head_width * (self.query_heads + self.kv_heads)
        swiglu = 3 * self.width * self.swiglu_width
        embedding_and_head = 2 * self.vocab_size * self.width
        return self.layers * (attention + swiglu) + embedding_and_head + self.norm_gains()

    def norm_gains(self) -> int:
        """Number of weights that are gains of norms: two norms in each layer, and the last one."""
        return (2 * self.layers + 1) * self.width


TINYLLAMA_1B = LlamaConfig()
# Rows are four times as long as in pretraining, so RoPE positions are divided by 4 and stay in the
# range that the model was pretrained on.
TINYLLAMA_CODE_8K = dataclasses.replace(TINYLLAMA_1B, context=8192, rope_factor=4.0)
TINYLLAMA_120M = LlamaConfig(layers=12, width=768, query_heads=12, kv_heads=1, swiglu_width=2048)
# Small enough to train in minutes on two CPU cores.
DEMO = LlamaConfig(
    vocab_size=4096,
    layers=4,
    width=192,
    query_heads=4,
    kv_heads=2,
    head_width=48,
    swiglu_width=512,
    context=256,
)


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One dataset of the training mixture."""

    name: str
    """The name in metrics such as `val/<name>/loss` and `data/<name>/tokens`."""
    path: str
    """The folder that `tinyllama prepare` wrote."""
    weight: float = 1.0
    """Share of the training tokens relative to the other sources; 0: unused until a later stage."""
    max_epochs: float | None = None
    """A run that would read the source more often than this is refused; None: no limit."""


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """A later part of the run, in which the sources have other weights."""

    start_tokens: int
    """Tokens of the run before the stage, counted over all sources and rounded down to a row."""
    weights: tuple[float, ...]
    """One weight for each source, in the order of the sources; 0: the source is not read."""
    ramp_tokens: int = 0
    """Tokens over which the shares move linearly to the new ones; 0: they change at once."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data that the model is trained on."""

    sources: tuple[SourceConfig, ...] = ()
    """The datasets of the mixture."""
    stages: tuple[StageConfig, ...] = ()
    """Later changes of the source weights, in order; the run begins with the sources' own."""
    tokenizer: str = "tokenizer.model"
    """Path of the sentencepiece model with which the sources were prepared."""
    mask_documents: bool = False
    """Let a token attend only to its own document, not to earlier documents in the same row."""
    first_tokens: bool = True
    """Count the first token of a document in the loss, although only other text precedes it."""

    def __post_init__(self):
        names = [source.name for source in self.sources]
        require(len(names) == len(set(names)), f"data sources share a name: {names}.")
        end = 0
        for index, stage in enumerate(self.stages):
            require(
                len(stage.weights) == len(names),
                f"data.stages.{index} has {len(stage.weights)} weights for {len(names)} sources: "
                "give one for each source, 0 where it is not read.",
            )
            require(
                stage.start_tokens >= max(end, 1) and stage.ramp_tokens >= 0,
                f"data.stages.{index} starts at {stage.start_tokens} tokens with a ramp of "
                f"{stage.ramp_tokens}: it must start after token 0 and after the stage and ramp "
                f"before it, which end at {end}.",
            )
            end = max(stage.start_tokens + stage.ramp_tokens, stage.start_tokens + 1)
        in_turn = [tuple(source.weight for source in self.sources)]
        in_turn += [stage.weights for stage in self.stages]
        for weights in in_turn if names else ():
            require(
                all(math.isfinite(weight) and weight >= 0 for weight in weights) and any(weights),
                f"The weights {weights} of the data sources must be numbers from 0 on, one of them "
                "above 0.",
            )
        # Weight 0 is allowed for a time, since a source may be meant for a later stage, but not
        # for the whole run: its path would be checked and its validation run for nothing.
        for name, weights in zip(names, zip(*in_turn, strict=True), strict=True):
            require(
                any(weights),
                f"data source {name!r} has weight 0 throughout: give it a weight above 0, or "
                "leave it out.",
            )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, gradient clipping and the learning rate. The defaults are TinyLlama's."""

    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """How the rate falls to `end_lr`; `wsd`: linearly, during the last `decay_steps` steps."""
    peak_lr: float = 4e-4
    """Learning rate at the end of the warm-up."""
    end_lr: float = 4e-5
    """Learning rate at the last step."""
    warmup_steps: int = 2000
    """Steps over which the learning rate rises linearly from 0 to `peak_lr`; 0: no warm-up."""
    decay_steps: int = 0
    """Steps of the final decay under `wsd`; 0 for the others, which decay from the warm-up on."""
    beta1: float = 0.9
    """Decay rate of AdamW's running mean of the gradients."""
    beta2: float = 0.95
    """Decay rate of AdamW's running mean of the squared gradients."""
    eps: float = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: float = 0.1
    """Each step subtracts this times the learning rate times the weight; 0: no decay."""
    decay_matrices_only: bool = False
    """Apply no weight decay to the norm gains. TinyLlama decayed every weight, so it is off."""
    clip_norm: float = 1.0
    """Largest norm of all gradients together; gradients with a larger one are scaled down."""

    def __post_init__(self):
        require(
            0 <= self.end_lr <= self.peak_lr,
            f"optimizer.end_lr ({self.end_lr}) must lie between 0 and "
            f"optimizer.peak_lr ({self.peak_lr}).",
        )
        require(self.warmup_steps >= 0, "optimizer.warmup_steps must not be negative.")
        require(
            (self.decay_steps > 0) == (self.schedule == "wsd") and self.decay_steps >= 0,
            f"optimizer.decay_steps is {self.decay_steps} and optimizer.schedule {self.schedule}: "
            "wsd needs a number above 0, and the other schedules take none.",
        )
        require(self.clip_norm > 0, "optimizer.clip_norm must be above 0.")
        # The embedding of a token that never occurs has a gradient of exactly 0 and hence moments
        # of 0. With eps = 0 its update is 0 / 0, although loss and gradient norm stay finite.
        require(self.eps > 0, "optimizer.eps must be above 0.")
        require(self.weight_decay >= 0, "optimizer.weight_decay must not be negative.")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name} must lie in [0, 1).")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved. It is also saved at the end and when a signal stops it."""

    every: int = 5000
    """Steps between checkpoints."""
    keep: int = 3
    """Number of newest checkpoints to keep; older ones are deleted."""
    permanent_every: int = 0
    """Never delete the checkpoints at multiples of this step; 0: every old one is deleted."""

    def __post_init__(self):
        require(self.every > 0, "checkpoint.every must be above 0.")
        require(self.keep > 0, "checkpoint.keep must be above 0.")
        require(self.permanent_every >= 0, "checkpoint.permanent_every must not be negative.")
        require(
            self.permanent_every % self.every == 0,
            f"checkpoint.permanent_every ({self.permanent_every}) must be a multiple of "
            f"checkpoint.every ({self.every}), or no checkpoint falls on it.",
        )


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """When the loss on held-out rows of each source is measured. It is also measured at the end."""

    every: int = 5000
    """Steps between validations."""
    rows: int = 512
    """Held-out rows read from each source; the validation at the end reads all of them."""

    def __post_init__(self):
        require(self.every > 0 and self.rows > 0, "validation.every and .rows must be above 0.")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Texts that the model generates during training, written to `samples/` in the run folder."""

    every: int = 5000
    """Steps between samples."""
    prompts: tuple[str, ...] = ("The",)
    """The beginnings of the texts."""
    max_tokens: int = 64
    """Largest number of tokens that are added to each prompt."""
    temperature: float = 0.8
    """The logits are divided by this before a token is drawn; 0: always the likeliest token."""

    def __post_init__(self):
        positive = self.every > 0 and self.max_tokens > 0
        require(positive, "sample.every and sample.max_tokens must be above 0.")
        require(self.temperature >= 0, "sample.temperature must not be negative.")
        require(len(self.prompts) > 0, "sample.prompts is empty: give at least one prompt.")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Scores on tasks of lm-evaluation-harness, logged as `eval/<task>/<metric>`."""

    every: int = 0
    """Steps between evaluations; there is one more at the end. 0: no evaluation at all."""
    tasks: tuple[str, ...] = ()
    """Names of tasks; `commonsense` stands for the seven tasks that TinyLlama reported."""
    limit: int | None = None
    """Number of documents to use from each task, the first ones; None: all."""
    include_path: str | None = None
    """Folder with task files of your own, in lm-evaluation-harness's format."""

    def __post_init__(self):
        require(
            self.every >= 0 and (self.limit is None or self.limit > 0),
            "evaluation.every must not be negative, and evaluation.limit must be above 0.",
        )
        require(
            (self.every > 0) == (len(self.tasks) > 0),
            f"evaluation.every is {self.every} and evaluation.tasks is {self.tasks}: give both, or "
            "neither.",
        )


@dataclasses.dataclass(frozen=True)
class BatchStageConfig:
    """A change of the batch size. Micro-batches keep their rows, so a step needs no more memory."""

    after_step: int
    """The last step with the previous batch size."""
    micro_batches: int
    """Number of micro-batches in each later step."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. A step is one optimizer update over `batch_rows` rows of `model.context` tokens."""

    run_folder: str
    """Folder for all that the run writes; a run that is found there is continued."""
    model: LlamaConfig
    data: DataConfig
    steps: int
    """Optimizer updates in the whole run."""
    batch_rows: int
    """Rows in a step, over all devices and micro-batches."""
    micro_batches: int = 1
    """Parts of a step that are computed one after the other, which needs less memory."""
    batch_stages: tuple[BatchStageConfig, ...] = ()
    """Later changes of the batch size, in order. The learning rate is not adapted to them."""
    # The stored weights and the optimizer are always float32: a typical update is too small to
    # change a weight in bfloat16. CPUs are slower in bfloat16, for which few have fast products.
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of the computation with float32 weights; `auto`: bfloat16, but float32 on a CPU."""
    # Of the model only `context` and `rope_factor` may differ from that of these weights
    # (training/warm_start.py); the optimizer, the step and the data begin anew.
    init_from: str | None = None
    """Start from weights of `RUN[@STEP]` (newest by default) or a Hugging Face Llama folder."""
    seed: int = 0
    """Seed of the initial weights, of the order of the data, and of the samples."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    optimizer: OptimizerConfig = OptimizerConfig()
    execution: ExecutionConfig = ExecutionConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    sample: SampleConfig = SampleConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self):
        for field in ("steps", "batch_rows", "micro_batches", "log_every"):
            value = getattr(self, field)
            require(value > 0, f"{field} is {value}: it must be above 0.")
        require(
            0 <= self.seed < 2**32, f"seed is {self.seed}: it must lie between 0 and {2**32 - 1}."
        )
        require(
            self.batch_rows % self.micro_batches == 0,
            f"batch_rows ({self.batch_rows}) is not divisible by micro_batches "
            f"({self.micro_batches}).",
        )
        require(
            all(stage.micro_batches > 0 for stage in self.batch_stages),
            "batch_stages: micro_batches must be above 0 in every stage.",
        )
        after = [0, *(stage.after_step for stage in self.batch_stages)]
        require(
            all(a < b for a, b in itertools.pairwise(after)),
            f"batch_stages come after the steps {after[1:]}: they must rise, from 1 on.",
        )
        require(
            self.optimizer.warmup_steps < self.steps,
            f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) must be fewer than steps "
            f"({self.steps}): shorten the warm-up with --optimizer.warmup-steps.",
        )
        require(
            self.optimizer.warmup_steps + self.optimizer.decay_steps <= self.steps,
            f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) and optimizer.decay_steps "
            f"({self.optimizer.decay_steps}) are more than steps ({self.steps}): shorten the decay "
            "with --optimizer.decay-steps.",
        )

    @property
    def micro_rows(self) -> int:
        """Number of rows in a micro-batch, over all devices; the same in every step."""
        return self.batch_rows // self.micro_batches

    def batch_sizes(self) -> list[tuple[int, int]]:
        """Returns a pair (steps before it, micro-batches per step) for each batch size in turn."""
        later = [(stage.after_step, stage.micro_batches) for stage in self.batch_stages]
        return [(0, self.micro_batches), *later]

    def rows_after(self, step: int) -> int:
        """Returns how many rows the first `step` steps read, which is the position in the data."""
        sizes = self.batch_sizes()
        ends = [start for start, _ in sizes[1:]] + [step]
        return self.micro_rows * sum(
            max(min(end, step) - start, 0) * micro_batches
            for (start, micro_batches), end in zip(sizes, ends, strict=True)
        )


@dataclasses.dataclass(frozen=True)
class Launch:
    """The processes and devices that compute a run. They change its results only by rounding."""

    coordinator: str | None = None
    """HOST:PORT at which process 0 listens for the others; detected under Slurm."""
    num_processes: int | None = None
    """Number of processes, one for each machine; detected under Slurm."""
    process_id: int | None = None
    """Number of this process, counted from 0; detected under Slurm."""
    data_axis: int = 1
    """Number of device groups that each keep a full copy of weights and optimizer; 1: no copies."""

    def __post_init__(self):
        given = (self.coordinator, self.num_processes, self.process_id)
        require(
            None not in given or not any(value is not None for value in given),
            "--coordinator, --num-processes and --process-id belong together: give all or none.",
        )
        require(
            self.num_processes is None or 0 <= (self.process_id or 0) < self.num_processes,
            f"--process-id is {self.process_id} of --num-processes {self.num_processes}: count "
            "the processes from 0.",
        )
        require(self.data_axis > 0, f"--data-axis is {self.data_axis}: it must be above 0.")


# The options that may change when a run is continued. All others have shaped the steps that were
# already made, so a continued run with other values would be neither the old run nor a new one.
# `steps` shaped them too, by the decay of the learning rate. It may change all the same, because
# to lengthen a finished run is the first thing that people try; the run prints a line about it.
CHANGEABLE = (
    "run_folder",
    "steps",
    "log_every",
    "checkpoint",
    "validation",
    "sample",
    "evaluation",
)


def to_json(config: Any) -> dict[str, Any]:
    """Returns a config as plain JSON values, in which tuples have become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Compares two configs of one run, as `to_json` gives them.

    Returns:
      A line `name: old -> new` for each option that differs, without those in `CHANGEABLE`.
    """
    lines = []
    for key in sorted(old.keys() | new.keys()):
        if not prefix and key in CHANGEABLE:
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a} -> {b}")
    return lines
