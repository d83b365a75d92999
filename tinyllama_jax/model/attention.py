"""Grouped-query attention: one function with four backends, and another for decoding.

Shapes: B batch, T query length, S key length, N query heads, K kv heads, G = N / K, H head width,
R = G T.
"""

import functools
import importlib
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tinyllama_jax.config import AttentionBackend
from tinyllama_jax.model.flash_attention import HEAD_WIDTHS, flash_attention, padded_width
from tinyllama_jax.model.tiles import TILES

# A part of the name that a device reports -> the chip whose tiles it uses. An H200 is an H100 with
# more memory.
CHIPS = {"A100": "A100", "H100": "H100", "H200": "H100"}
COMPUTE_CAPABILITY = {"A100": 80, "H100": 90}
# Stands for -inf as the score of a pair that must not see each other. It is finite, because the
# softmax of a row of -inf, which has no visible key at all, would be NaN.
LOWEST = jnp.finfo(jnp.float32).min
# The named scope of all operations of `attention`. `tinyllama_jax/performance/` recognizes them by
# it in a compiled program.
SCOPE = "attend"

# (chip, whether there are documents) -> the backend that `auto` chooses, and the reason it prints.
AUTO: dict[tuple[str, bool], tuple[AttentionBackend, str]] = {
    ("A100", False): ("pallas", "gives the same bits twice; cuDNN was not measured on this chip"),
    ("A100", True): ("pallas", "skips what documents do not see, which cuDNN cannot do"),
    ("H100", False): ("cudnn", "402 TFLOP/s forward, the fastest one measured on this chip"),
    ("H100", True): ("pallas", "skips what documents do not see, which cuDNN cannot do"),
}


@jax.named_scope(SCOPE)
def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    causal: bool = True,
    segment_ids: jax.Array | None = None,
    scale: float | None = None,
    backend: AttentionBackend = "auto",
) -> jax.Array:
    """Computes softmax(scale q k^T + mask) v (Vaswani et al. 2017, section 3.2.1).

    The softmax is computed in fp32. Under `jax.set_mesh` each device runs the kernels on its own
    rows of the batch. A caller inside `jax.shard_map` must pass `check_vma=False` to it, because
    the kernels do not declare over which mesh axes their results vary.

    Args:
      q_BTNH: queries; query head n reads kv head n // (N / K).
      k_BSKH: keys, with S equal to T.
      v_BSKH: values.
      causal: whether query t sees only the keys up to t.
      segment_ids: integers of shape (B, T); a token sees only tokens with its own segment id.
      scale: factor on the scores, above 0; by default 1 / sqrt(H).
      backend: which implementation computes it.
        `reference` is plain JAX. It runs on every device that has memory for the (B, N, T, T)
        scores.
        `pallas` and `triton` are this project's FlashAttention kernels for A100, H100 and H200, in
        bf16 or fp32, for heads up to 128 wide. On a CPU `pallas` runs in an interpreter, for tests.
        `cudnn` is the function of that library, through JAX, in bf16 or fp16, for an even T and
        without segment_ids.
        `auto` is `reference` on a CPU. On a GPU it is what the table `AUTO` says, or another
        backend if that one cannot do what is asked, and the choice is printed once.

    Returns:
      o_BTNH in the dtype of the queries.

    Raises:
      ValueError: the shapes do not fit together, or the backend cannot do what is asked.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    if k_BSKH.shape != (B, S, K, H) or v_BSKH.shape != k_BSKH.shape or N % K:
        raise ValueError(f"q {q_BTNH.shape}, k {k_BSKH.shape} and v {v_BSKH.shape} do not fit.")
    if T != S:
        raise ValueError(
            f"{T} queries and {S} keys: use cached_attention to decode from a cache of keys."
        )
    if segment_ids is not None and segment_ids.shape != (B, T):
        raise ValueError(f"segment_ids {segment_ids.shape} must have shape {(B, T)}.")
    if segment_ids is not None:
        # JAX would convert 64-bit NumPy integers to 32 bits without a warning, and two segments
        # whose ids differ by a multiple of 2^32 would become one.
        if isinstance(segment_ids, np.ndarray) and segment_ids.size:
            if segment_ids.min() < -(2**31) or segment_ids.max() >= 2**31:
                raise ValueError("segment_ids go beyond 32 bits: number the documents of a row.")
        segment_ids = jnp.asarray(segment_ids, jnp.int32)
    scale = 1 / math.sqrt(H) if scale is None else scale
    if scale <= 0:
        raise ValueError(f"scale is {scale}: it must be above 0.")

    chip = device_chip()
    documents = segment_ids is not None
    if backend == "auto":
        backend, reason = choose_backend(chip, q_BTNH.dtype, H, T, documents)
        if chip != "cpu":  # on a CPU there is nothing to choose, hence nothing to say
            _say_once(f"attention on {chip}: {backend} ({reason})")
    elif complaint := why_not(backend, chip, q_BTNH.dtype, H, T, documents):
        raise ValueError(f"attention backend {backend!r} {complaint}.")

    if backend == "reference":
        return _reference(q_BTNH, k_BSKH, v_BSKH, segment_ids, causal=causal, scale=scale)
    if backend == "cudnn":
        return jax.nn.dot_product_attention(
            q_BTNH, k_BSKH, v_BSKH, is_causal=causal, scale=scale, implementation="cudnn"
        )
    run = functools.partial(
        flash_attention,
        causal=causal,
        scale=scale,
        # Imported only when it is used, because not every machine can import Triton.
        kernels=importlib.import_module(f"tinyllama_jax.model.{backend}_kernels"),
        # The interpreter on a CPU accepts any tiles, so those of the A100 serve there.
        tiles=TILES[backend, "A100" if chip == "cpu" else chip, str(q_BTNH.dtype), padded_width(H)],
        interpret=chip == "cpu",
        compute_capability=COMPUTE_CAPABILITY.get(chip),
    )
    return _on_own_rows(run)(q_BTNH, k_BSKH, v_BSKH, segment_ids)


def device_chip() -> str:
    """Returns the chip to compile for: a value of `CHIPS`, "cpu", or the name of another device."""
    mesh = jax.sharding.get_abstract_mesh()
    # The mesh is asked first, not the process: `tinyllama plan` compiles on a laptop for a mesh of
    # GPUs that are elsewhere.
    device = jax.devices()[0] if mesh.empty else mesh.abstract_device
    return next(
        (chip for name, chip in CHIPS.items() if name in device.device_kind), device.device_kind
    )


def has_kernels() -> bool:
    """Returns whether this project has GPU kernels for the chip to compile for."""
    return device_chip() in CHIPS.values()


def why_not(
    backend: AttentionBackend,
    chip: str,
    dtype: jax.typing.DTypeLike,
    head_width: int,
    T: int,
    documents: bool,
) -> str | None:
    """Returns why a backend cannot compute such an attention, or None if it can.

    The reason completes a sentence that begins with the backend's name. A case for which a backend
    has only a forward pass counts as one that it cannot compute, because whoever calls `attention`
    may ask for gradients later.
    """
    if backend == "cudnn":
        if chip not in CHIPS.values() and "NVIDIA" not in chip:
            return "needs an NVIDIA GPU"
        if documents:
            return "takes no segment_ids: ask for pallas, triton or reference"
        if dtype not in (jnp.bfloat16, jnp.float16):
            return f"computes in bfloat16 or float16, not in {dtype}"
        if head_width % 8 or head_width > 128:
            return f"takes heads of a multiple of 8 up to 128 wide, not {head_width}"
        if T % 2:
            return f"has gradients for rows of an even number of tokens alone, not of {T}"
    if backend in ("pallas", "triton"):
        if chip not in CHIPS.values() and (chip, backend) != ("cpu", "pallas"):
            return f"has no tiles for {chip}: it runs on {', '.join(CHIPS)}"
        if dtype not in (jnp.bfloat16, jnp.float32):
            return f"computes in bfloat16 or float32, not in {dtype}"
        if head_width > HEAD_WIDTHS[-1]:
            return f"takes heads up to {HEAD_WIDTHS[-1]} wide, not {head_width}"
    return None


def choose_backend(
    chip: str, dtype: jax.typing.DTypeLike, head_width: int, T: int, documents: bool
) -> tuple[AttentionBackend, str]:
    """Returns the backend that `auto` stands for, and the reason for the choice."""
    unknown = ("cudnn", "no kernel of ours is tuned for this chip")
    candidates: list[tuple[AttentionBackend, str]] = [
        ("reference", "plain JAX; the kernels are for GPUs")
        if chip == "cpu"
        else AUTO.get((chip, documents), unknown),
        ("pallas", "the fastest that can do what is asked"),
        ("reference", "no other can do what is asked"),
    ]
    return next(
        candidate
        for candidate in candidates
        if not why_not(candidate[0], chip, dtype, head_width, T, documents)
    )


@functools.cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr)


def _on_own_rows(run):
    """Wraps `run` so that every device of the mesh computes its own rows of the batch.

    Without this the compiler, which cannot partition a custom kernel, would gather all rows on
    every device. If the number of rows is not divisible by the number of devices, as for a single
    prompt, each device computes all rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # Only axes that the compiler partitions (Auto) count. Inside a `jax.shard_map` the axes are
    # Manual, and the arrays hold the device's own rows already.
    axes = tuple(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    )
    devices = math.prod(mesh.shape[axis] for axis in axes)
    if devices == 1:
        return run

    def run_on_mesh(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
        rows = P(axes if q_BTNH.shape[0] % devices == 0 else None)
        specs = (rows, rows, rows, None if segment_ids_BT is None else rows)
        return jax.shard_map(run, in_specs=specs, out_specs=rows, check_vma=False)(
            q_BTNH, k_BTKH, v_BTKH, segment_ids_BT
        )

    return run_on_mesh


def _reference(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, *, causal, scale):
    B, T, N, H = q_BTNH.shape
    visible_BTS = jnp.ones((1, T, T), bool)
    if causal:
        visible_BTS &= jnp.tri(T, dtype=bool)
    if segment_ids_BT is not None:
        visible_BTS &= segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    # The heads stand before the tokens, and the queries of the G heads that share a kv head form
    # one axis of R = G T rows. Then each product sums over a single axis that is the first or the
    # last one; for any other layout XLA on CPUs makes transposed copies.
    K = k_BSKH.shape[2]
    q_BKGTH = jnp.moveaxis(q_BTNH.reshape(B, T, K, N // K, H), 1, 3)
    k_BKSH, v_BKSH = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)
    scores_BKRS = scale * jnp.einsum(
        "BKRH,BKSH->BKRS", q_BKGTH.reshape(B, K, -1, H), k_BKSH, preferred_element_type=jnp.float32
    )
    scores_BKGTS = jnp.where(
        visible_BTS[:, None, None], scores_BKRS.reshape(B, K, -1, T, T), LOWEST
    )
    # The softmax is written out instead of calling jax.nn.softmax, so that the division by the sum
    # can follow the second product. That saves a pass over T T numbers in each direction. The
    # maximum needs no gradient, since it cancels out of the quotient.
    peaks_BKGT1 = jax.lax.stop_gradient(jnp.max(scores_BKGTS, axis=-1, keepdims=True))
    weights_BKRS = jnp.exp(scores_BKGTS - peaks_BKGT1).reshape(B, K, -1, T)
    sums_BKRH = jnp.einsum(
        "BKRS,BKSH->BKRH",
        weights_BKRS.astype(v_BSKH.dtype),
        v_BKSH,
        preferred_element_type=jnp.float32,
    )
    o_BKRH = sums_BKRH / jnp.sum(weights_BKRS, axis=-1, keepdims=True)
    o_BTKGH = jnp.moveaxis(o_BKRH.reshape(B, K, -1, T, H), 3, 1)
    return o_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype)


def cached_attention(
    q_B1NH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    filled_BS: jax.Array,
    *,
    scale: float | None = None,
) -> jax.Array:
    """Computes attention for the newest token of each row over a cache of keys, for decoding.

    The cache must already hold the keys and values of the newest token itself.

    Args:
      q_B1NH: queries of the newest token.
      k_BKSH: cached keys, in any order of the tokens. The heads stand before the tokens because
        one head is read at a time.
      v_BKSH: cached values.
      filled_BS: bool, which columns of the cache hold a token of the row; others are not seen.
      scale: factor on the scores; by default 1 / sqrt(H).

    Returns:
      o_B1NH, equal to the last row of `attention` over the tokens in the cache.
    """
    B, _, N, H = q_B1NH.shape
    K = k_BKSH.shape[1]
    scale = 1 / math.sqrt(H) if scale is None else scale
    q_BKGH = q_B1NH.reshape(B, K, N // K, H)
    scores_BKGS = scale * jnp.einsum(
        "BKGH,BKSH->BKGS", q_BKGH, k_BKSH, preferred_element_type=jnp.float32
    )
    scores_BKGS = jnp.where(filled_BS[:, None, None], scores_BKGS, LOWEST)
    probabilities_BKGS = jax.nn.softmax(scores_BKGS, axis=-1).astype(v_BKSH.dtype)
    o_BKGH = jnp.einsum("BKGS,BKSH->BKGH", probabilities_BKGS, v_BKSH)
    return o_BKGH.reshape(B, 1, N, H).astype(q_B1NH.dtype)
