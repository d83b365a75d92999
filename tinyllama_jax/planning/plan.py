"""Plans a run on GPUs that need not be here: the memory, network, time and money that it takes."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from tinyllama_jax.config import AttentionBackend, Config
from tinyllama_jax.data.format import MANIFEST, RECORD, read_manifest
from tinyllama_jax.data.mixture import make_mixture
from tinyllama_jax.data.rows import fill_rate
from tinyllama_jax.errors import require
from tinyllama_jax.model.attention import choose_backend
from tinyllama_jax.performance import roofline
from tinyllama_jax.performance.flops import PEAK_FLOPS, flops_per_token
from tinyllama_jax.performance.program import Collective, read_program
from tinyllama_jax.performance.targets import (
    NODE_DEVICES,
    CompilerMissing,
    Target,
    absent_devices,
    parse_mesh_name,
)
from tinyllama_jax.planning.memory import (
    MicroBatch,
    estimated_peak,
    largest_micro_batches,
    planned_dtype,
    state_bytes,
)
from tinyllama_jax.runtime.allocator import CARD_SHARE
from tinyllama_jax.runtime.mesh import BATCH_AXES, batch_sharding, check_fits, make_mesh
from tinyllama_jax.training.step import abstract_state, check_attention_on, make_step

# 1.5 GiB that NCCL and cuBLAS allocate for themselves, which the compiler's peak does not count.
RESERVE = 3 * 2**29
# Up to this many epochs, repeated tokens are nearly as good as new ones (Muennighoff et al. 2023).
MAX_EPOCHS = 4

Range = tuple[float, float]
"""The low and the high end of a prediction."""


@dataclasses.dataclass(frozen=True)
class PlannedCollective:
    """One collective of the step with its predicted time.

    The fields are those of `program.Collective`. The seconds are of all runs in a step together.
    An estimate without the compiler has no schedule: `asynchronous` and the overlapped work are
    then None, and all of the collective's time counts as exposed.
    """

    kind: str
    dtype: str
    bytes: int
    devices: int
    times: int
    asynchronous: bool | None
    overlapped_flops: int | None
    overlapped_bytes: int | None
    wire_seconds: float
    exposed_seconds: float


@dataclasses.dataclass(frozen=True)
class SourcePlan:
    """The tokens that the run reads from one source of the mixture."""

    name: str
    tokens_read: int
    tokens_available: float | None
    """The tokens of the dataset; None if the dataset is not here and `--tokens` does not say."""
    epochs: float | None
    """How often the run reads the whole source; None if `tokens_available` is."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that `tinyllama plan` reports.

    Ranges are (low, high). Fields that end in `bytes_per_device` are bytes on one device.
    """

    mesh: str
    """The name of the mesh, such as `a100_16`."""
    card: str
    """The kind of the card, as JAX reports it."""
    devices: int
    data_axis: int
    """The number of groups of devices that each hold a copy of weights and optimizer state."""
    compiled: bool
    """Whether the step was compiled for the card. If not, the figures are estimates."""
    parameters: int
    flops_per_token_full: int
    flops_per_token_causal: int
    weights_bytes_per_device: int
    optimizer_bytes_per_device: int
    activation_bytes_per_device: int
    """The rest of the peak: activations, gradients and gathered weights."""
    peak_bytes_per_device: int
    """The most memory that the step uses at one time."""
    reserve_bytes_per_device: int
    """Memory left free for NCCL and cuBLAS, which the peak does not count."""
    usable_bytes_per_device: int
    """The part of the card's memory that JAX allocates."""
    card_bytes: int
    share_of_card: float
    """The peak over the card's memory."""
    fits: bool
    """Whether peak and reserve together are within the usable memory."""
    recompute: str
    rows_per_device: int
    """The rows of a micro-batch on one device."""
    largest_micro_batches: tuple[MicroBatch, ...]
    collectives: tuple[PlannedCollective, ...]
    step_seconds: Range
    exposed_communication_fraction: float
    """The share of the shorter step time in which the step waits for the network."""
    tokens_per_second_per_device: Range
    tokens_per_second: Range
    mfu_full: Range
    mfu_causal: Range
    tokens: int
    days: Range
    gpu_hours: Range
    dollars_per_gpu_hour: float | None
    dollars: Range | None
    sources: tuple[SourcePlan, ...]
    assumptions: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values. `asynchronous` is called `async`, a word that Python
        reserves."""
        plain = dataclasses.asdict(self)
        for collective in plain["collectives"]:
            collective["async"] = collective.pop("asynchronous")
        return plain


def plan(
    config: Config,
    mesh_name: str,
    *,
    data_axis: int = 1,
    network: float = 400,
    price: float | None = None,
    tokens: Mapping[str, float] | None = None,
    compiler: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Plans a run on a mesh of GPUs, none of which need be here.

    The step is compiled as it would run, and once more for each larger micro-batch that is tried.

    Args:
      config: the run.
      mesh_name: the card and the number of devices, as in `a100_16`.
      data_axis: the number of groups of devices that each hold a copy of the state.
      network: Gb/s into a node of 8 GPUs, and as many out of it.
      price: dollars for an hour of one GPU.
      tokens: the number of tokens by name of source, for sources whose dataset is not here.
      compiler: whether to compile the step. False estimates everything within a second.
      say: called with a line for the user before each compilation.

    Raises:
      UserError: there is no such mesh, an option is out of range, or the config does not fit the
        mesh.
    """
    target, devices = parse_mesh_name(mesh_name)
    require(network > 0, f"--network is {network}: give the Gb/s of a node, above 0.")
    require(price is None or price >= 0, f"--price is {price}: give dollars a GPU hour, from 0 on.")
    require(
        data_axis > 0 and devices % data_axis == 0,
        f"A data axis of {data_axis} does not divide the {devices} devices of {mesh_name}.",
    )
    fsdp = devices // data_axis
    # A mesh without devices is enough for this check, which therefore needs no compiler.
    check_fits(config, AbstractMesh((data_axis, fsdp), BATCH_AXES))
    sources = _plan_sources(config, tokens or {})
    # A run on an H100 may choose cuDNN's attention, which no compiler builds without a GPU. Our
    # Pallas kernels compile here and keep arrays of the same shapes, so they stand in for it.
    backend = _attention_backend(config, target)
    config = _with_attention(config, "pallas" if backend == "cudnn" else backend)
    notes = []
    if planned_dtype(config) != "bfloat16":
        notes.append("Speeds are those of bfloat16: in float32 the run is slower.")

    mesh = None
    if compiler:
        try:
            # The compiler must know which devices share a node: it plans collectives by that.
            hosts = max(1, devices // NODE_DEVICES)
            mesh = make_mesh(data_axis, absent_devices(target, hosts, devices // hosts))
        except CompilerMissing as missing:
            notes.append(f"{missing} Until then, what follows is an estimate without the compiler.")

    if mesh is not None:
        if backend == "cudnn":
            notes.append(
                "The run takes cuDNN's attention, which cannot be compiled without a GPU: the "
                "Pallas kernels stand in for it here."
            )
        say(f"compiling the step for {mesh_name}")
        program = read_program(compile_step(config, mesh))
        peak, collectives = _known(program.peak_bytes), list(program.collectives)
        tokens_of_device = config.batch_rows * config.model.context / devices
        work = roofline.work_of_program(program, config, tokens_of_device)
    else:
        peak = estimated_peak(config, devices, fsdp)
        collectives = _by_construction(config, data_axis, fsdp)
        work = roofline.work_by_formula(config, devices, fsdp)
    # A run lets JAX allocate this share of a card (runtime/allocator.py), and no more.
    usable = int(CARD_SHARE * target.memory)

    def estimate(trial: Config) -> int:
        return estimated_peak(trial, devices, fsdp)

    def compiled_peak(trial: Config) -> int:
        assert mesh is not None
        rows = trial.micro_rows // devices
        say(f"compiling recompute {trial.execution.recompute} with {rows} rows a GPU")
        return _known(read_program(compile_step(trial, mesh)).peak_bytes)

    peak_of = estimate if mesh is None else compiled_peak
    # What the compiler schedules beside a collective hides its time; the remainder is added to both
    # ends of the prediction, since the network does not get faster with the kernels.
    planned = []
    for collective in collectives:
        wire = roofline.wire_seconds(collective, target, devices, fsdp, network * 1e9 / 8)
        exposed = roofline.exposed_seconds(collective, wire, target)
        planned.append(_planned(collective, mesh is not None, wire, exposed))
    exposed = sum(collective.exposed_seconds for collective in planned)
    fast = roofline.seconds(work, target) + exposed
    slow = roofline.published_seconds(config, devices, fsdp, target) + exposed
    step_seconds = _range((fast, slow))

    model = config.model
    step_tokens = config.batch_rows * model.context
    total = config.rows_after(config.steps) * model.context
    rates = _range(step_tokens / time for time in step_seconds)
    days = _range(total / rate / 86400 for rate in rates)
    full, causal = (flops_per_token(model, causal=causal) for causal in (False, True))
    card_flops = devices * PEAK_FLOPS[target.device_kind]
    weights, optimizer = state_bytes(config, fsdp)
    return Plan(
        mesh=mesh_name,
        card=target.device_kind,
        devices=devices,
        data_axis=data_axis,
        compiled=mesh is not None,
        parameters=model.parameters(),
        flops_per_token_full=full,
        flops_per_token_causal=causal,
        weights_bytes_per_device=weights,
        optimizer_bytes_per_device=optimizer,
        activation_bytes_per_device=peak - weights - optimizer,
        peak_bytes_per_device=peak,
        reserve_bytes_per_device=RESERVE,
        usable_bytes_per_device=usable,
        card_bytes=target.memory,
        share_of_card=peak / target.memory,
        fits=peak + RESERVE <= usable,
        recompute=config.execution.recompute,
        rows_per_device=config.micro_rows // devices,
        largest_micro_batches=largest_micro_batches(
            config, devices, usable - RESERVE, peak, peak_of, estimate
        ),
        collectives=tuple(planned),
        step_seconds=step_seconds,
        exposed_communication_fraction=exposed / step_seconds[0],
        tokens_per_second_per_device=_range(rate / devices for rate in rates),
        tokens_per_second=rates,
        mfu_full=_range(rate * full / card_flops for rate in rates),
        mfu_causal=_range(rate * causal / card_flops for rate in rates),
        tokens=total,
        days=days,
        gpu_hours=_range(24 * devices * d for d in days),
        dollars_per_gpu_hour=price,
        dollars=None if price is None else _range(24 * devices * d * price for d in days),
        sources=sources,
        assumptions=tuple(roofline.assumptions(target, network * 1e9 / 8)),
        notes=(*notes, *_warnings(sources)),
    )


def lower_step(config: Config, mesh: Mesh) -> jax.stages.Lowered:
    """Lowers the training step of a run for a mesh whose devices need not be here."""
    rows = batch_sharding(mesh, rows_axis=1)
    shape, context = (config.micro_batches, config.micro_rows), config.model.context
    tokens_ABS = jax.ShapeDtypeStruct((*shape, context + 1), "int32", sharding=rows)
    weights_ABT = jax.ShapeDtypeStruct((*shape, context), "float32", sharding=rows)
    with jax.set_mesh(mesh):
        step = make_step(config, mesh)
        return step.lower(abstract_state(config, mesh), tokens_ABS, weights_ABT)


def compile_step(config: Config, mesh: Mesh) -> jax.stages.Compiled:
    """Compiles the training step of a run for a mesh whose devices need not be here."""
    return lower_step(config, mesh).compile()


def _known(peak_bytes: int | None) -> int:
    """The peak of a program that was just compiled, which always tells its memory."""
    assert peak_bytes is not None, "what was just compiled tells its memory"
    return peak_bytes


def _attention_backend(config: Config, target: Target) -> AttentionBackend:
    """The attention that the run would use on the card.

    Raises:
      UserError: the configured attention cannot do what the run needs.
    """
    chip, dtype = roofline.chip_of(target), planned_dtype(config)
    check_attention_on(config, chip, dtype)
    if config.execution.attention != "auto":
        return config.execution.attention
    model, documents = config.model, config.data.mask_documents
    return choose_backend(chip, dtype, model.head_width, model.context, documents)[0]


def _with_attention(config: Config, backend: AttentionBackend) -> Config:
    execution = dataclasses.replace(config.execution, attention=backend)
    return dataclasses.replace(config, execution=execution)


def _by_construction(config: Config, data_axis: int, fsdp: int) -> list[Collective]:
    """The collectives of the step by its design, without compiling it and without a schedule.

    What the compiled step splits into a collective for each weight or layer is one here.
    """
    # The norms' gains are folded into the matrices after them before anything is sent, so they do
    # not cross the network themselves.
    size = config.model.parameters() - config.model.norm_gains()
    item = planned_dtype(config).itemsize
    dtype, runs = {2: "bf16", 4: "f32"}[item], config.micro_batches

    def collective(kind: str, dtype: str, size: int, devices: int, times: int = 1) -> Collective:
        return Collective(kind, dtype, size, devices, False, 0, 0, times)

    collectives = []
    # Gradients that are summed over micro-batches are fp32 and are sent as such. With
    # gather="layer" they leave each device after every micro-batch, in the dtype of the products.
    if fsdp > 1 and config.execution.gather == "step":
        collectives += [collective("all-gather", dtype, item * size, fsdp)]
        collectives += [collective("reduce-scatter", "f32", 4 * size, fsdp)]
    elif fsdp > 1:
        # Weights are gathered for the forward pass and again for the backward pass, which computes
        # each layer again instead of holding its whole weights.
        collectives += [collective("all-gather", dtype, item * size, fsdp, 2 * runs)]
        collectives += [collective("reduce-scatter", dtype, item * size, fsdp, runs)]
    if data_axis > 1:
        collectives += [collective("all-reduce", "f32", 4 * size // fsdp, data_axis)]
    return collectives


def _planned(
    collective: Collective, scheduled: bool, wire: float, exposed: float
) -> PlannedCollective:
    """A collective with the times of its runs; `wire` and `exposed` are seconds of one run."""
    facts = dataclasses.asdict(collective)
    # Without a schedule the values are placeholders, which must not look like measurements.
    if not scheduled:
        facts |= {"asynchronous": None, "overlapped_flops": None, "overlapped_bytes": None}
    runs = collective.times
    return PlannedCollective(**facts, wire_seconds=runs * wire, exposed_seconds=runs * exposed)


def _plan_sources(config: Config, tokens: Mapping[str, float]) -> tuple[SourcePlan, ...]:
    """How much the run reads of each source; `tokens` gives the size of those that are not here."""
    names = [source.name for source in config.data.sources]
    for name, count in tokens.items():
        require(name in names, f"--tokens names {name!r}: the sources are {', '.join(names)}.")
        require(count > 0, f"--tokens gives {name} {count} tokens: give a number above 0.")
    context = config.model.context
    # Rows of packed records may end in padding. The share of real tokens is known for datasets that
    # are here, and taken as 1 for the others. Fractions, because the mixture counts rows exactly.
    fills, there = [], {}
    for source in config.data.sources:
        fills.append(Fraction(1))
        if source.name not in tokens and (Path(source.path) / MANIFEST).is_file():
            manifest = read_manifest(source.path)
            fills[-1] = fill_rate(manifest, "train")
            records = manifest["splits"]["train"]["records"]
            there[source.name] = round(records * RECORD * fills[-1])
    counts = make_mixture(config.data, context, fills).counts(config.rows_after(config.steps))
    plans = []
    for source, rows, fill in zip(config.data.sources, counts, fills, strict=True):
        available = tokens.get(source.name, there.get(source.name))
        read = round(rows * context * fill)
        epochs = None if available is None else read / available
        plans.append(SourcePlan(source.name, read, available, epochs))
    return tuple(plans)


def _warnings(sources: tuple[SourcePlan, ...]) -> list[str]:
    """Warnings about sources that the run repeats more often than repetition pays."""
    return [
        f"{source.name} is read {source.epochs:.1f} times: repeated tokens teach as much as new "
        f"ones up to about {MAX_EPOCHS} times (Muennighoff et al. 2023, arXiv 2305.16264)."
        for source in sources
        if source.epochs is not None and source.epochs > MAX_EPOCHS
    ]


def _range(values: Iterable[float]) -> Range:
    """Two values in rising order."""
    low, high = sorted(values)
    return low, high
