"""What a run would take on GPUs that need not be here: memory, network, time and money."""

import dataclasses
from collections.abc import Callable, Mapping
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

RESERVE = 3 * 2**29  # 1.5 GiB that NCCL and cuBLAS take, which no compiled program counts
MAX_EPOCHS = 4  # repeated tokens are nearly as good as new ones so far (Muennighoff et al. 2023)

Range = tuple[float, float]
"""(low, high)."""


@dataclasses.dataclass(frozen=True)
class PlannedCollective:
    """One collective of the step, or several that are alike but for their schedule.

    `bytes` are of the whole array, `times` its runs a step, seconds of all runs together. Without a
    compiled schedule, what stands beside it is None, and all its time counts as exposed.
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
    """Tokens that the run reads of a source, and how often it reads it whole."""

    name: str
    tokens_read: int
    tokens_available: float | None
    """None: the dataset is not here, and nobody said."""
    epochs: float | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything `tinyllama plan` says. Ranges are (low, high); bytes are of one device."""

    mesh: str
    card: str
    devices: int
    data_axis: int
    compiled: bool
    """False: estimated without a compiler for the card, see `notes`."""
    parameters: int
    flops_per_token_full: int
    flops_per_token_causal: int
    weights_bytes_per_device: int
    optimizer_bytes_per_device: int
    activation_bytes_per_device: int
    """All else at the peak: activations, gradients, gathered weights."""
    peak_bytes_per_device: int
    reserve_bytes_per_device: int
    usable_bytes_per_device: int
    card_bytes: int
    share_of_card: float
    fits: bool
    recompute: str
    rows_per_device: int
    largest_micro_batches: tuple[MicroBatch, ...]
    collectives: tuple[PlannedCollective, ...]
    step_seconds: Range
    exposed_communication_fraction: float
    """Of the shorter step time."""
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
        """Plain JSON values under the names above, `async` for `asynchronous`."""
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

    The step is compiled as it would run, and again for each larger micro-batch that is tried.

    Args:
      config: the run.
      mesh_name: `CARD_COUNT`, as in `a100_16`.
      data_axis: groups of devices that each hold the whole state.
      network: Gb/s into, and out of, a node of 8.
      price: dollars a GPU hour.
      tokens: tokens of a source by name, where its dataset is not here.
      compiler: False estimates at once instead of compiling.
      say: takes a line when something slow begins.

    Raises:
      UserError: no such mesh, or a config that does not fit it.
    """
    target, devices = parse_mesh_name(mesh_name)
    require(network > 0, f"--network is {network}: give the Gb/s of a node, above 0.")
    require(price is None or price >= 0, f"--price is {price}: give dollars a GPU hour, from 0 on.")
    require(
        data_axis > 0 and devices % data_axis == 0,
        f"A data axis of {data_axis} does not divide the {devices} devices of {mesh_name}.",
    )
    fsdp = devices // data_axis
    check_fits(config, AbstractMesh((data_axis, fsdp), BATCH_AXES))
    sources = _plan_sources(config, tokens or {})
    backend = _attention_backend(config, target)
    config = _with_attention(config, "pallas" if backend == "cudnn" else backend)
    notes = []
    if planned_dtype(config) != "bfloat16":
        notes.append("Speeds are those of bfloat16: in float32 the run is slower.")

    mesh = None
    if compiler:
        try:
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
    usable = int(CARD_SHARE * target.memory)

    def estimate(trial: Config) -> int:
        return estimated_peak(trial, devices, fsdp)

    def compiled_peak(trial: Config) -> int:
        assert mesh is not None
        rows = trial.micro_rows // devices
        say(f"compiling recompute {trial.execution.recompute} with {rows} rows a GPU")
        return _known(read_program(compile_step(trial, mesh)).peak_bytes)

    peak_of = estimate if mesh is None else compiled_peak
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
    """The step as it runs, for a mesh whose devices need not be here."""
    rows = batch_sharding(mesh, rows_axis=1)
    shape, context = (config.micro_batches, config.micro_rows), config.model.context
    tokens_ABS = jax.ShapeDtypeStruct((*shape, context + 1), "int32", sharding=rows)
    weights_ABT = jax.ShapeDtypeStruct((*shape, context), "float32", sharding=rows)
    with jax.set_mesh(mesh):
        step = make_step(config, mesh)
        return step.lower(abstract_state(config, mesh), tokens_ABS, weights_ABT)


def compile_step(config: Config, mesh: Mesh) -> jax.stages.Compiled:
    """The same, compiled."""
    return lower_step(config, mesh).compile()


def _known(peak_bytes: int | None) -> int:
    assert peak_bytes is not None, "what was just compiled tells its memory"
    return peak_bytes


def _attention_backend(config: Config, target: Target) -> AttentionBackend:
    """What the run would take on the card. Raises UserError if it cannot do what the run needs."""
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
    """What the step sends by its source code, as one collective each; nothing of a schedule."""
    # The norms' gains stay where they are, folded into other weights.
    size = config.model.parameters() - (2 * config.model.layers + 1) * config.model.width
    item = planned_dtype(config).itemsize
    dtype, runs = {2: "bf16", 4: "f32"}[item], config.micro_batches

    def collective(kind: str, dtype: str, size: int, devices: int, times: int = 1) -> Collective:
        return Collective(kind, dtype, size, devices, False, 0, 0, times)

    found = []
    if fsdp > 1 and config.execution.gather == "step":
        found += [collective("all-gather", dtype, item * size, fsdp)]
        found += [collective("reduce-scatter", "f32", 4 * size, fsdp)]
    elif fsdp > 1:  # gathered twice, because the backward pass computes the layer again
        found += [collective("all-gather", dtype, item * size, fsdp, 2 * runs)]
        found += [collective("reduce-scatter", dtype, item * size, fsdp, runs)]
    if data_axis > 1:
        found += [collective("all-reduce", "f32", 4 * size // fsdp, data_axis)]
    return found


def _planned(collective: Collective, scheduled: bool, wire: float, exposed: float):
    facts = dataclasses.asdict(collective)
    if not scheduled:
        facts |= {"asynchronous": None, "overlapped_flops": None, "overlapped_bytes": None}
    runs = collective.times
    return PlannedCollective(**facts, wire_seconds=runs * wire, exposed_seconds=runs * exposed)


def _plan_sources(config: Config, tokens: Mapping[str, float]) -> tuple[SourcePlan, ...]:
    names = [source.name for source in config.data.sources]
    for name, count in tokens.items():
        require(name in names, f"--tokens names {name!r}: the sources are {', '.join(names)}.")
        require(count > 0, f"--tokens gives {name} {count} tokens: give a number above 0.")
    context = config.model.context
    fills, there = [], {}
    for source in config.data.sources:
        fills.append(Fraction(1))
        if source.name not in tokens and (Path(source.path) / MANIFEST).is_file():
            manifest = read_manifest(source.path)
            fills[-1] = fill_rate(manifest, "train")
            records = manifest["splits"]["train"]["records"]
            there[source.name] = round(records * RECORD * fills[-1])
    counts = make_mixture(config.data, context, fills).counts(config.rows_after(config.steps))
    found = []
    for source, rows, fill in zip(config.data.sources, counts, fills, strict=True):
        available = tokens.get(source.name, there.get(source.name))
        read = round(rows * context * fill)
        epochs = None if available is None else read / available
        found.append(SourcePlan(source.name, read, available, epochs))
    return tuple(found)


def _warnings(sources: tuple[SourcePlan, ...]) -> list[str]:
    return [
        f"{source.name} is read {source.epochs:.1f} times: repeated tokens teach as much as new "
        f"ones up to about {MAX_EPOCHS} times (Muennighoff et al. 2023, arXiv 2305.16264)."
        for source in sources
        if source.epochs is not None and source.epochs > MAX_EPOCHS
    ]


def _range(values) -> Range:
    low, high = sorted(values)
    return low, high
