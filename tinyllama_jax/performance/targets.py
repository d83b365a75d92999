"""Describes GPUs that this machine does not have, so that XLA can compile for them.

XLA reads a description as a `stream_executor.GpuTargetConfigProto` in text form. Sizes and clocks
are those that the CUDA driver reports for each card, as XLA records them in its own descriptions
(xla/backends/gpu/target_config/specs). NVLink's bandwidth is from NVIDIA's data sheets.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.experimental import topologies

from tinyllama_jax.errors import UserError, require

NODE_DEVICES = 8  # GPUs that NVLink joins in one node


class CompilerMissing(UserError):
    """Raised when JAX's CUDA plugin, and with it the compiler for GPUs, is not installed."""


@dataclasses.dataclass(frozen=True)
class Target:
    """The figures of one kind of card that the compiler and the roofline need.

    Sizes of memory are in bytes. Bandwidths are in bytes a second; NVLink's is for each direction.
    """

    device_kind: str
    capability: str
    multiprocessors: int
    fp32_units: int
    memory: int
    bandwidth: int
    l2_cache: int
    clock_ghz: float
    shared_memory: int
    shared_memory_per_block: int
    nvlink: int

    def description(self) -> str:
        """The description of the card in the text form that XLA reads."""
        # The limits that are written out as numbers are the same on Ampere and Hopper.
        return f"""
            platform_name: "CUDA"
            device_description_str: "{self.device_kind}"
            dnn_version_info {{ major: 9 minor: 10 }}
            gpu_device_info {{
              cuda_compute_capability {{ {self.capability} }}
              core_count: {self.multiprocessors}
              fpus_per_core: {self.fp32_units}
              device_memory_size: {self.memory}
              memory_bandwidth: {self.bandwidth}
              l2_cache_size: {self.l2_cache}
              clock_rate_ghz: {self.clock_ghz}
              shared_memory_per_core: {self.shared_memory}
              shared_memory_per_block: 49152
              shared_memory_per_block_optin: {self.shared_memory_per_block}
              threads_per_block_limit: 1024
              threads_per_core_limit: 2048
              threads_per_warp: 32
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
            }}"""


A100_40G = Target(
    device_kind="NVIDIA A100-SXM4-40GB",
    capability="major: 8",
    multiprocessors=108,
    fp32_units=64,
    memory=42_331_013_120,
    bandwidth=1_555_200_000_000,
    l2_cache=41_943_040,
    clock_ghz=1.41,
    shared_memory=167_936,
    shared_memory_per_block=166_912,
    nvlink=300_000_000_000,
)
A100_80G = dataclasses.replace(
    A100_40G,
    device_kind="NVIDIA A100-SXM4-80GB",
    memory=85_100_068_864,
    bandwidth=2_039_040_000_000,
)
H100 = Target(
    device_kind="NVIDIA H100 80GB HBM3",
    capability="major: 9 feature_extension: ACCELERATED_FEATURES",
    multiprocessors=132,
    fp32_units=128,
    memory=84_942_979_072,
    bandwidth=3_352_320_000_000,
    l2_cache=52_428_800,
    clock_ghz=1.98,
    shared_memory=233_472,
    shared_memory_per_block=232_448,
    nvlink=450_000_000_000,
)
H200 = dataclasses.replace(
    H100, device_kind="NVIDIA H200", memory=151_397_597_184, bandwidth=4_800_000_000_000
)

CARDS = {"a100": A100_40G, "a100_80g": A100_80G, "h100": H100, "h200": H200}


def parse_mesh_name(name: str) -> tuple[Target, int]:
    """Reads the name of a mesh, such as `a100_80g_16`, as its card and its number of devices.

    Raises:
      UserError: there is no such card, or more than one node would not be filled completely.
    """
    # A card's name may hold an underscore itself, so the count is split off at the last one.
    card, _, count = name.rpartition("_")
    devices = int(count) if count.isdecimal() else 0
    require(
        card in CARDS and 0 < devices and (devices <= NODE_DEVICES or devices % NODE_DEVICES == 0),
        f"There is no mesh {name!r}: give CARD_COUNT, a card of {', '.join(CARDS)} and 1 to "
        f"{NODE_DEVICES} devices or a multiple of {NODE_DEVICES}, such as a100_16 or h100_8.",
    )
    return CARDS[card], devices


def absent_devices(target: Target, hosts: int = 1, per_host: int = 1) -> Sequence[Any]:
    """Makes JAX devices that programs can be compiled for, but that cannot run anything.

    Args:
      target: the kind of card.
      hosts: the number of nodes.
      per_host: the number of cards in each node.

    Raises:
      CompilerMissing: JAX's CUDA plugin is not installed.
    """
    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            target_config=target.description(),
            topology=f"1x{hosts}x{per_host}",
        )
    # JAX raises errors of several types here, among them a bare AssertionError.
    except Exception as error:
        raise CompilerMissing(
            "Compiling for a GPU that is not here needs JAX's CUDA plugin: "
            "pip install -e '.[plan]'."
        ) from error
    return topology.devices
