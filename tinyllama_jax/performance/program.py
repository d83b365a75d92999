"""Reads what a compiled step does from its text: memory, FLOPs, memory traffic and collectives.

The text is the one that XLA prints of an optimized program (HLO). It lists computations, and the
instructions of each in the order in which a GPU receives them. All figures are for one device and
one step.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax

from tinyllama_jax.model import attention

Kind = Literal["matmul", "attention", "memory", "optimizer", "communication"]

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
ITEM_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64"), 8),
    "token": 0,
}
# Opcodes that name or order arrays and move no data.
FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "iota"}
# Opcodes that only run other computations.
CONTROL = {"while", "call", "conditional"}
OPTIMIZER_SCOPE = "optimizer"  # the jax.named_scope around the update in training/step.py
# Kernels of libraries carry names that no instruction has, so a part of the name tells their kind.
# The first pattern that matches decides.
LIBRARY_KERNELS: tuple[tuple[Kind, str], ...] = (
    ("attention", r"fmha|sdpa|cudnn|flash"),
    ("matmul", r"nvjet|gemm|cutlass|xmma|cublas"),
    ("communication", r"nccl"),
    ("memory", r"(?i)^mem(cpy|set)"),
)
# Number of T x T x H matrix products that each of our kernels does for one head (Dao 2023,
# FlashAttention-2, algorithms 1 and 2). Each backward kernel computes the scores again.
KERNEL_PRODUCTS = {"flash_forward": 2, "flash_dq": 3, "flash_dkdv": 4}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange of arrays between devices."""

    kind: str
    """The operation, one of `COLLECTIVES`."""
    dtype: str
    """The dtype that is sent, as HLO writes it: `bf16` or `f32`."""
    bytes: int
    """Size of the whole arrays: the result of an all-gather, the argument of a reduce-scatter."""
    devices: int
    """The number of devices that take part."""
    asynchronous: bool
    """Whether other instructions may run between its start and its end."""
    overlapped_flops: int
    """FLOPs of the matrix products and attention scheduled between its start and its end."""
    overlapped_bytes: int
    """Memory traffic of all other instructions scheduled between its start and its end."""
    times: int
    """How often a step runs this collective."""


@dataclasses.dataclass(frozen=True)
class Program:
    """The memory, work and collectives of a compiled step."""

    peak_bytes: int | None
    """Peak device memory, without the buffers that NCCL and cuBLAS allocate themselves. It is None
    where JAX cannot tell it, as for some programs loaded from the compilation cache on disk."""
    donated_bytes: int | None
    """Size of the arguments whose memory is reused for results; None like `peak_bytes`."""
    collectives: tuple[Collective, ...]
    """All collectives, in the order of the schedule."""
    matmul_flops: int
    """FLOPs of the matrix products outside attention."""
    attention_flops: int
    """FLOPs of attention. Our kernels count the causal half and everything that their backward
    passes compute again; plain JAX's attention counts its matrix products in full."""
    other_bytes: int
    """Memory traffic, reads and writes, of all that is neither a matrix product nor attention."""
    optimizer_bytes: int
    """The part of `other_bytes` that the optimizer causes."""


def read_program(compiled: jax.stages.Compiled) -> Program:
    """Reads the figures of a program that was compiled for GPUs.

    Raises:
      ValueError: the program has a loop whose trip count the compiler did not determine.
    """
    try:
        memory: Any = compiled.memory_analysis()
    except jax.errors.JaxRuntimeError:
        # Some programs from the compilation cache raise here. The rest can still be read.
        memory = None
    schedule = _Schedule(compiled.as_text() or "")
    work = schedule.work(schedule.entry)
    return Program(
        peak_bytes=memory
        and memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        donated_bytes=memory and memory.alias_size_in_bytes,
        collectives=tuple(schedule.collectives(schedule.entry, times=1)),
        matmul_flops=work.matmul_flops,
        attention_flops=work.attention_flops,
        other_bytes=work.other_bytes,
        optimizer_bytes=work.optimizer_bytes,
    )


def read_kinds(compiled: jax.stages.Compiled) -> tuple[str, dict[str, Kind]]:
    """Classifies the instructions of a program, which may be for CPUs or GPUs.

    A fusion counts as a matrix product if it contains one, and as the optimizer's work if it
    contains a part of the update. The kind `memory` is everything that no other kind fits.

    Returns:
      The program's name, and the kind of every instruction that does work, by the instruction's
      name. Our own kernels are listed under their kernel's name as well, since a GPU's trace knows
      them by that one.
    """
    text = compiled.as_text() or ""
    schedule = _Schedule(text)
    kinds: dict[str, Kind] = {}
    for computation in schedule.computations.values():
        for instruction in computation.values():
            if (kind := schedule.kind(instruction)) is not None:
                kinds[instruction.name] = kind
                if kernel := instruction.attribute(r'\bname = "(\w+)"'):
                    kinds[kernel] = kind
    return text.split(maxsplit=2)[1].rstrip(","), kinds


def kernel_kind(kernel: str, kinds: Mapping[str, Kind]) -> Kind | None:
    """The kind of work that a GPU kernel does, judged by its name alone.

    Args:
      kernel: the kernel's name in a trace.
      kinds: the kinds of the program's instructions, from `read_kinds`.

    Returns:
      The kind, or None if the name matches no instruction and no pattern of a library.
    """
    # XLA names a kernel that it compiled after its instruction with the dot replaced, so
    # `loop_add_fusion_12` belongs to `loop_add_fusion.12`; equal instructions share one kernel.
    # It adds `__1`, `__2` and so on to the names of our own kernels where there are several.
    for name in (kernel, re.sub(r"_(\d+)$", r".\1", kernel), re.sub(r"__\d+$", "", kernel)):
        if name in kinds:
            return kinds[name]
    return next((kind for kind, words in LIBRARY_KERNELS if re.search(words, kernel)), None)


def read_traffic(compiled: jax.stages.Compiled) -> list[tuple[str, int]]:
    """Lists the memory-bound instructions of a program for GPUs, in the order of its schedule.

    Returns:
      For each instruction its name and the bytes that it reads and writes in one step. The name is
      JAX's name of the operation, which includes named scopes and derivatives; a fusion has the
      name of its last operation.
    """
    schedule = _Schedule(compiled.as_text() or "")
    return list(schedule.traffic(schedule.entry, times=1))


@dataclasses.dataclass(frozen=True)
class _Work:
    """The work of one or several instructions, which can be added and repeated."""

    matmul_flops: int = 0
    attention_flops: int = 0
    other_bytes: int = 0
    optimizer_bytes: int = 0

    def __add__(self, other: "_Work") -> "_Work":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return _Work(*map(sum, pairs))

    def __mul__(self, times: int) -> "_Work":
        return _Work(*(times * value for value in dataclasses.astuple(self)))


Array = tuple[str, tuple[int, ...]]  # dtype and shape


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # its results
    operands: tuple[str, ...]
    line: str
    is_root: bool

    @property
    def bytes(self) -> int:
        """Size of the results."""
        return sum(map(_bytes, self.arrays))

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression in the instruction's text; None if no match."""
        match = re.search(pattern, self.line)
        return match and match[1]


def _bytes(array: Array) -> int:
    dtype, shape = array
    return ITEM_BYTES[dtype] * math.prod(shape)


def _arrays(text: str) -> tuple[Array, ...]:
    """Every array that a text describes, such as `(bf16[64,2048], f32[64])`."""
    return tuple(
        (dtype, tuple(map(int, filter(None, dims.split(",")))))
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", text)
    )


class _Schedule:
    """The computations of a program, parsed from its text, and the sums over them."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, _Instruction]] = {}
        instructions = {}
        for line in text.splitlines():
            if line.endswith("{") and not line.startswith(" "):
                instructions = {}
                words = line.removeprefix("ENTRY ").split()
                self.computations[name := words[0].lstrip("%")] = instructions
                if line.startswith("ENTRY "):
                    self.entry = name
            elif match := re.match(r"\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)", line):
                root, name, result, opcode, rest = match.groups()
                operands = re.findall(r"%([\w.-]+)", rest[: rest.index(")")])
                instructions[name] = _Instruction(
                    name, opcode, _arrays(result), tuple(operands), line, bool(root)
                )

    def collectives(self, computation: str, times: int) -> Iterator[Collective]:
        """Yields the collectives of a computation, of its calls and of its loops.

        `times` says how often a step runs the computation.
        """
        instructions = list(self.computations[computation].values())
        for index, instruction in enumerate(instructions):
            kind = instruction.opcode.removesuffix("-start")
            if instruction.opcode == "while":
                body, trips = _loop(instruction)
                yield from self.collectives(body, times * trips)
            if instruction.opcode == "call":
                yield from self.collectives(_called(instruction), times)
            if kind not in COLLECTIVES:
                continue
            asynchronous = kind != instruction.opcode
            between = _Work()
            if asynchronous:
                for later in instructions[index + 1 :]:
                    if later.opcode == f"{kind}-done" and instruction.name in later.operands:
                        break
                    between += self._cost(computation, later)
            # The operands are measured and not the result: an asynchronous start returns a tuple
            # that holds operands and results alike. Only an all-gather's result is larger.
            operands = [self.computations[computation][name] for name in instruction.operands]
            sent = sum(operand.bytes for operand in operands)
            devices = _devices(instruction)
            yield Collective(
                kind=kind,
                dtype=operands[0].arrays[0][0],
                bytes=sent * devices if kind == "all-gather" else sent,
                devices=devices,
                asynchronous=asynchronous,
                overlapped_flops=between.matmul_flops + between.attention_flops,
                overlapped_bytes=between.other_bytes,
                times=times,
            )

    def traffic(self, computation: str, times: int) -> Iterator[tuple[str, int]]:
        """Yields (name, bytes a step) of the memory-bound instructions, calls and loops included.

        `times` says how often a step runs the computation.
        """
        for instruction in self.computations[computation].values():
            if instruction.opcode == "while":
                body, trips = _loop(instruction)
                yield from self.traffic(body, times * trips)
            elif instruction.opcode == "call":
                yield from self.traffic(_called(instruction), times)
            elif self.kind(instruction) in ("memory", "optimizer"):
                name = instruction.attribute(r'op_name="([^"]*)"') or instruction.opcode
                yield name, times * self._traffic(computation, instruction)

    @functools.cache  # noqa: B019 (a schedule lives for one reading)
    def work(self, computation: str) -> _Work:
        """The work of one run of a computation, including its calls and all rounds of its loops."""
        costs = (self._cost(computation, i) for i in self.computations[computation].values())
        return sum(costs, start=_Work())

    def kind(self, instruction: _Instruction) -> Kind | None:
        """The kind of work that an instruction does; None if it does none itself."""
        opcode = instruction.opcode
        if opcode.removesuffix("-start").removesuffix("-done") in COLLECTIVES:
            return "communication"
        # The work of an asynchronous instruction is counted once, at its start.
        if opcode in FREE | CONTROL or opcode.endswith("-done"):
            return None
        parts = list(self._parts(instruction))
        if products := [part for part in parts if _is_product(part)]:
            attends = all(_is_under(attention.SCOPE, part) for part in products)
            return "attention" if attends else "matmul"
        # JAX's call of cuDNN's attention may lack the named scope.
        if "__cudnn$fmha" in instruction.line:
            return "attention"
        if any(_is_under(attention.SCOPE, part) for part in parts):
            return "attention"
        if any(_is_under(OPTIMIZER_SCOPE, part) for part in parts):
            return "optimizer"
        return "memory"

    def _parts(self, instruction: _Instruction) -> Iterator[_Instruction]:
        """Yields the instruction itself, or the instructions inside a fusion."""
        fused = _fused(instruction)
        if fused is None:
            yield instruction
            return
        for other in self.computations[fused].values():
            yield from self._parts(other)

    def _cost(self, computation: str, instruction: _Instruction) -> _Work:
        """The work of one run of an instruction in a computation."""
        if instruction.opcode == "while":
            body, trips = _loop(instruction)
            return self.work(body) * trips
        if instruction.opcode == "call":
            return self.work(_called(instruction))
        match self.kind(instruction):
            case "matmul":
                return _Work(matmul_flops=self._matmul_flops(computation, instruction))
            case "attention":
                # A kernel is opaque to HLO, so its FLOPs come from its shapes. Attention in plain
                # JAX consists of visible matrix products.
                flops = _kernel_flops(instruction) or self._matmul_flops(computation, instruction)
                return _Work(attention_flops=flops)
            case "memory":
                return _Work(other_bytes=self._traffic(computation, instruction))
            case "optimizer":
                traffic = self._traffic(computation, instruction)
                return _Work(other_bytes=traffic, optimizer_bytes=traffic)
        return _Work()

    def _matmul_flops(self, computation: str, instruction: _Instruction) -> int:
        """FLOPs of a matrix product, or of all matrix products inside a fusion."""
        if fused := _fused(instruction):
            inside = self.computations[fused].values()
            return sum(self._matmul_flops(fused, other) for other in inside)
        if not _is_product(instruction):
            return 0
        # HLO's own `dot` and the JSON options of a cuBLAS call spell this attribute differently.
        dims = instruction.attribute(r'lhs_contracting_dim(?:ension)?s"?[=:][{\["]*([\d,"]*)')
        left = self.computations[computation][instruction.operands[0]].arrays[0][1]
        contracted = [left[int(dim)] for dim in (dims or "").replace('"', "").split(",") if dim]
        return 2 * math.prod(instruction.arrays[0][1]) * math.prod(contracted)

    def _traffic(self, computation: str, instruction: _Instruction) -> int:
        """Bytes that an instruction reads and writes.

        A slice, and an update in place, touch only a part of their array: that part counts.
        """
        if fused := _fused(instruction):
            inside = self.computations[fused]
            parameters = [i for i in inside.values() if i.opcode == "parameter"]
            root = next(i for i in inside.values() if i.is_root)
            results = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
            read = sum(_read(inside, parameter) for parameter in parameters)
            return read + sum(_written(inside, result) for result in results)
        around = self.computations[computation]
        if instruction.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * instruction.bytes
        if instruction.opcode == "dynamic-update-slice":
            return 2 * around[instruction.operands[1]].bytes
        return instruction.bytes + sum(around[name].bytes for name in instruction.operands)


def _is_product(instruction: _Instruction) -> bool:
    return instruction.opcode == "dot" or "__cublas" in instruction.line


def _is_under(scope: str, instruction: _Instruction) -> bool:
    """Whether the instruction, or what it is a derivative of, lies in this `jax.named_scope`."""
    name = instruction.attribute(r'op_name="([^"]*)"') or ""
    # JAX writes the scope between slashes, and as `jvp(scope)` or `transpose(...)` in derivatives.
    return re.search(rf"[/(]{scope}[/)]", name) is not None


def _kernel_flops(instruction: _Instruction) -> int:
    """FLOPs of one of our attention kernels; 0 for any other instruction."""
    for kernel, products in KERNEL_PRODUCTS.items():
        if instruction.opcode == "custom-call" and _is_under(kernel, instruction):
            # The largest four-dimensional array has the shape of the queries, BTNH.
            shapes = [shape for _, shape in _arrays(instruction.line) if len(shape) == 4]
            B, T, N, H = max(shapes, key=math.prod)
            # Two FLOPs for each multiplication and addition, for the causal half of the pairs.
            return products * B * N * T * T * H
    return 0


def _fused(instruction: _Instruction) -> str | None:
    """The name of the computation inside a fusion; None for any other instruction."""
    if instruction.opcode not in ("fusion", "fusion-start"):
        return None
    return instruction.attribute(r"calls=%?([\w.-]+)")


def _through_bitcasts(inside: dict[str, _Instruction], name: str) -> str:
    """Follows an instruction of a fusion back over those that only rename, cast or reshape."""
    while inside[name].opcode in ("bitcast", "copy", "reshape", "convert"):
        name = inside[name].operands[0]
    return name


def _read(inside: dict[str, _Instruction], parameter: _Instruction) -> int:
    """Bytes of a fusion's parameter that the fusion reads."""
    # A loop over layers passes the stack of all layers to a fusion that slices one of them.
    # Counting whole parameters would charge every round for all layers.
    total = 0
    pending = [parameter.name]
    while pending:
        name = pending.pop()
        for user in inside.values():
            if name not in user.operands:
                continue
            if user.opcode == "bitcast":
                pending.append(user.name)
            elif user.opcode in ("dynamic-slice", "slice", "gather"):
                total += user.bytes
            elif user.opcode != "dynamic-update-slice" or name != user.operands[0]:
                return parameter.bytes
    return min(total, parameter.bytes)


def _written(inside: dict[str, _Instruction], result: _Instruction) -> int:
    """Bytes of a fusion's result that the fusion writes: of an update in place, the new part."""
    update = inside[_through_bitcasts(inside, result.name)]
    if update.opcode == "dynamic-update-slice":
        return inside[update.operands[1]].bytes
    return 0 if result.opcode == "parameter" else result.bytes


def _called(instruction: _Instruction) -> str:
    """The name of the computation that a `call` runs, which a GPU receives as one CUDA graph."""
    called = instruction.attribute(r"to_apply=%?([\w.-]+)")
    assert called is not None
    return called


def _loop(instruction: _Instruction) -> tuple[str, int]:
    """The name of a loop's body, and its trip count."""
    body = instruction.attribute(r"body=%?([\w.-]+)")
    trips = instruction.attribute(r'known_trip_count":\{"n":"(\d+)"')
    if body is None or trips is None:
        raise ValueError(f"the compiler does not say how often {instruction.name} runs")
    return body, int(trips)


def _devices(instruction: _Instruction) -> int:
    """The number of devices that take part in a collective."""
    # HLO has three notations: a list of the devices in each group, as in {{0,1},{2,3}}; the number
    # of groups and the size of each, as in [2,2]<=[4]; and names of mesh axes beside their sizes.
    groups = instruction.attribute(r"replica_groups=(.*?), [a-z_]+=") or ""
    if listed := re.match(r"\{\{([\d,]*)\}", groups):
        return len(listed[1].split(","))
    if counted := re.match(r"\[\d+,(\d+)\]", groups):
        return int(counted[1])
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups))
    axes = re.findall(r"'(\w+)'", groups.split("]")[-1])
    return math.prod(int(sizes[axis]) for axis in axes)
