"""The ground floor: every option of a run, as one tree of frozen dataclasses.

Defaults live here and nowhere else. A config file (configs/*.py) defines `get_config() -> Config`.
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
    """How the model is computed: speed and memory, and no number but by rounding."""

    attention: AttentionBackend = "auto"
    """`auto` picks by device: our kernels or cuDNN on a GPU, plain JAX on a CPU."""
    recompute: Literal["nothing", "elementwise", "layers"] = "nothing"
    """What the backward pass computes again instead of keeping it: nothing; the SwiGLU product and
    plain JAX's attention, so that no product of weights runs twice; or all but the input of each
    layer."""
    gather: Literal["step", "layer"] = "step"
    """When the weights are gathered from all devices: once a step, or layer by layer in each
    micro-batch, for models whose weights and gradients do not fit a device."""

    def __post_init__(self):
        require(
            self.gather == "step" or self.recompute != "nothing",
            "execution.gather is layer and execution.recompute is nothing, so every gathered "
            "weight would be kept: recompute elementwise or layers.",
        )


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama 2 decoder."""

    vocab_size: int = 32_000
    layers: int = 22
    width: int = 2048
    query_heads: int = 32
    kv_heads: int = 4
    head_width: int = 64
    swiglu_width: int = 5632
    context: int = 2048
    """Tokens of a row; a divisor of the 8,192 tokens of a record."""
    rope_base: float = 10_000.0
    rope_factor: float = 1.0
    """RoPE positions are divided by this (linear position interpolation)."""
    norm_eps: float = 1e-5

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
        """Number of weights, by hand arithmetic; a test holds it against the real tree."""
        attention = 2 * self.width * self.head_width * (self.query_heads + self.kv_heads)
        swiglu = 3 * self.width * self.swiglu_width
        embedding_and_head = 2 * self.vocab_size * self.width
        return self.layers * (attention + swiglu) + embedding_and_head + self.norm_gains()

    def norm_gains(self) -> int:
        """Number of weights that are gains of norms: two norms in each layer, and the last one."""
        return (2 * self.layers + 1) * self.width


TINYLLAMA_1B = LlamaConfig()
TINYLLAMA_CODE_8K = dataclasses.replace(TINYLLAMA_1B, context=8192, rope_factor=4.0)
TINYLLAMA_120M = LlamaConfig(layers=12, width=768, query_heads=12, kv_heads=1, swiglu_width=2048)
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
    """One dataset of the mixture."""

    name: str
    """Its name in metrics: `val/<name>/loss`, `data/<name>/tokens`."""
    path: str
    """Folder written by `tinyllama prepare`."""
    weight: float = 1.0
    """Share of the training tokens, relative to the other sources; 0: from a later stage on."""
    max_epochs: float | None = None
    """A run that would read the source more often than this is refused."""


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """From some token of the run on, other weights of the sources."""

    start_tokens: int
    """Tokens read before it; a row that this would cut belongs to it."""
    weights: tuple[float, ...]
    """One per source, in the order of the sources."""
    ramp_tokens: int = 0
    """Over this many tokens the shares move linearly from those before; 0: at once."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What the model reads."""

    sources: tuple[SourceConfig, ...] = ()
    stages: tuple[StageConfig, ...] = ()
    """Changes of the weights on the way, in order; until the first, the sources' own hold."""
    tokenizer: str = "tokenizer.model"
    """The sentencepiece model that the sources were prepared with."""
    mask_documents: bool = False
    """A token sees its own document alone, not all that stands before it in the row."""
    first_tokens: bool = True  # though nothing of the document tells it
    """The first token of a document counts in the loss."""

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
        for name, weights in zip(names, zip(*in_turn, strict=True), strict=True):
            require(
                any(weights),
                f"data source {name!r} has weight 0 throughout: give it a weight above 0, or "
                "leave it out.",
            )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with clipping by global norm, and its learning rate."""

    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """From `peak_lr` after the warm-up to `end_lr` at the last step, by a cosine or a line; `wsd`
    stays at the peak until the last `decay_steps` and takes the line then."""
    peak_lr: float = 4e-4
    end_lr: float = 4e-5
    warmup_steps: int = 2000
    decay_steps: int = 0
    """Of `wsd`: how many of the last steps decay. The others decay from the warm-up to the end."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_matrices_only: bool = False
    """Leave the norm gains without weight decay; the original decayed every parameter."""
    clip_norm: float = 1.0

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
        # A weight whose gradient was always 0, as of a token never seen, would be 0 / 0 without it.
        require(self.eps > 0, "optimizer.eps must be above 0.")
        require(self.weight_decay >= 0, "optimizer.weight_decay must not be negative.")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name} must lie in [0, 1).")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved. One more checkpoint is written at the end and after a signal."""

    every: int = 5000
    keep: int = 3
    """Newest checkpoints to keep."""
    permanent_every: int = 0
    """Checkpoints at multiples of this step are never deleted; 0: none is permanent."""

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
    """Held-out loss and bits per byte per source, over all devices; once more at the end."""

    every: int = 5000
    rows: int = 512
    """Held-out rows per source at intervals; the last validation reads all of them."""

    def __post_init__(self):
        require(self.every > 0 and self.rows > 0, "validation.every and .rows must be above 0.")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Text that the model writes on the way, into `samples/`."""

    every: int = 5000
    prompts: tuple[str, ...] = ("The",)
    max_tokens: int = 64
    temperature: float = 0.8

    def __post_init__(self):
        positive = self.every > 0 and self.max_tokens > 0
        require(positive, "sample.every and sample.max_tokens must be above 0.")
        require(self.temperature >= 0, "sample.temperature must not be negative.")
        require(len(self.prompts) > 0, "sample.prompts is empty: give at least one prompt.")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Tasks of lm-evaluation-harness, as `eval/<task>/<metric>`; once more at the end."""

    every: int = 0
    """0: never, not at the end either."""
    tasks: tuple[str, ...] = ()
    """Their names, or `commonsense`: the seven of the original."""
    limit: int | None = None
    """Only the first documents of each task."""
    include_path: str | None = None
    """Folder of task files of one's own."""

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
    """After some step of the run, another batch size, in the memory of the same micro-batch."""

    after_step: int
    micro_batches: int
    """Micro-batches of each later step, of as many rows as those before."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. A step is one optimizer update over `batch_rows` rows of `model.context` tokens."""

    run_folder: str
    model: LlamaConfig
    data: DataConfig
    steps: int
    batch_rows: int
    """Rows of an optimizer step, over all devices and micro-batches."""
    micro_batches: int = 1
    """The rows of a step are split into this many micro-batches, whose gradients are added."""
    batch_stages: tuple[BatchStageConfig, ...] = ()
    """Changes of the batch size on the way, in order; the learning rate does not know them."""
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Weights and optimizer stay fp32; `auto` computes in bf16, on CPU (slower there) in fp32."""
    init_from: str | None = None
    """Begin with the weights of `RUN[@STEP]` (newest checkpoint by default) or of a Hugging Face
    Llama folder, and all else fresh. Context and RoPE factor may differ from theirs."""
    seed: int = 0
    log_every: int = 10
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
        """Rows of a micro-batch, over all devices; the same in every step."""
        return self.batch_rows // self.micro_batches

    def batch_sizes(self) -> list[tuple[int, int]]:
        """(steps before, micro-batches of a step) of each stretch of the run."""
        later = [(stage.after_step, stage.micro_batches) for stage in self.batch_stages]
        return [(0, self.micro_batches), *later]

    def rows_after(self, step: int) -> int:
        """Rows that the first `step` steps read: the position in the data."""
        sizes = self.batch_sizes()
        ends = [start for start, _ in sizes[1:]] + [step]
        return self.micro_rows * sum(
            max(min(end, step) - start, 0) * micro_batches
            for (start, micro_batches), end in zip(sizes, ends, strict=True)
        )


@dataclasses.dataclass(frozen=True)
class Launch:
    """Where a run is computed, which decides no number of it but by rounding."""

    coordinator: str | None = None
    """HOST:PORT of process 0; Slurm's is found."""
    num_processes: int | None = None
    """How many processes, one a machine; Slurm's is found."""
    process_id: int | None = None
    """Which one this is, from 0; Slurm's is found."""
    data_axis: int = 1
    """Groups of devices that each hold the whole state."""

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


# What a run may change when it goes on. All else decides the numbers it has already made; `steps`
# decides only those to come, by a longer or shorter decay.
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
    """The config as plain JSON values (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines `name: old -> new` for what differs between two configs of one run."""
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
