"""The chips that a plan can be for: what each does in a second, what it holds, how it is wired.

Sources, by the key in each entry's comments:
  docs   https://docs.cloud.google.com/tpu/docs/v4, v5e, v5p-training, v6e and tpu7x: the tables of
         key specifications. HBM is in GiB there, whatever the unit is called.
  book   Austin et al. 2025, "How to Scale Your Model", part 2 and part 3,
         https://jax-ml.github.io/scaling-book: one-way ICI bandwidth, wrap-around, time per hop.
  sky    SkyPilot's catalogue of Google Cloud's list prices (catalogs/v8/gcp/vms.csv), on demand, in
         us-central1 (us-central2 for v4). Prices change: look before you rely on one.
"""

import dataclasses
from collections.abc import Mapping

GIB = 2**30

ASYNC_COLLECTIVES = (
    "--xla_enable_async_all_gather=true",
    "--xla_enable_async_all_reduce=true",
    "--xla_tpu_enable_async_collective_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
)
"""Collectives that start, let the chip compute, and end: without them none is hidden."""

CONTINUATION_FUSION = ("--xla_tpu_overlap_compute_collective_tc=true",)
"""A collective inside the loop of a matrix product; v5p and v6e refuse to compile with it."""

SPARSE_CORES = (
    "--xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=true",
    "--xla_tpu_enable_sparse_core_collective_offload_all_reduce=true",
    "--xla_tpu_use_tc_device_shape_on_sc=true",
    "--xla_sc_disable_megacore_partitioning=true",
)
"""Sums over devices by the SparseCores of a v6e, beside whatever the chip computes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One generation of TPU, by the chip (not by the core).

    Attributes:
      name: as in the name of a topology, "v5e" in "v5e:16x16".
      device_kind: what `jax.Device.device_kind` says.
      peak_flops: dense bfloat16 FLOPs per second.
      hbm_bytes: of memory.
      hbm_bandwidth: bytes per second.
      clock: cycles per second that the compiler's `estimated_cycles` are taken to be of: the
        peak divided by the FLOPs of one cycle, 2 for each cell of the chip's matrix units.
      link_bandwidth: bytes per second, one way, of one link to a neighbour.
      torus_dims: dimensions of the network, with two links in each.
      wraps_at: the extent at which a dimension closes to a ring: that extent alone on a 2D torus;
        on a 3D one every multiple of it, if all three dimensions are multiples.
      devices: how many JAX devices the chip is.
      config: what libtpu calls the arrangement of its cores, if it is not the first.
      price: US dollars an hour on demand; None if unknown.
      products: the share of the peak that the compiler estimates for a large matrix product, of
        8192 x 8192 by 8192 x 8192 numbers.
      kernels: Pallas kernels, and the shares of the peak that each reaches in blocks of scores of
        which some are masked, and of which none is: the cycles that its products need at the peak,
        over the instructions (VLIW bundles, a cycle each) that the compiler has made of it, and at
        most 1. Others count at the peak.
      flags: for LIBTPU_INIT_ARGS, to plan with and to run with.
    """

    name: str
    device_kind: str
    peak_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    clock: float
    link_bandwidth: float
    torus_dims: int
    wraps_at: int
    devices: int = 1
    config: str | None = None
    price: float | None = None
    products: float
    kernels: tuple[tuple[str, tuple[float, float]], ...]
    flags: tuple[str, ...] = ASYNC_COLLECTIVES


def flash(**shares: tuple[float, float]) -> tuple[tuple[str, tuple[float, float]], ...]:
    """Shares of the peak of attention's kernels, whose tiles are 1024 x 1024 x 128.

    (Backward on v4, for want of memory on the chip, 512 x 512 x 128.)

    Products of 2^29 and 5 x 2^28 FLOPs (`experiments/LOG.md` has the bundles).
    """
    return tuple((f"flash_attention_{name}", both) for name, both in shares.items())


def sparse(
    *,
    window: tuple[float, float],
    compressed: float,
    selected: tuple[float, float, float],
) -> tuple[tuple[str, tuple[float, float]], ...]:
    """Shares of the peak of the sparse branches' kernels, of scores masked or not.

    They are of Yuan et al.'s shape at 65,536 tokens, and hardly depend on it, but for those of
    compressed keys, which at 8192 are half as large (`experiments.benchmarks.attention --static`).

    Args:
      window: forward, and backward.
      compressed: forward; its gradients are flash attention's.
      selected: forward, and the gradients of queries and of keys.
    """
    shares = {
        "window_forward": window[0],
        "window_backward": window[1],
        "compressed_forward": compressed,
        "selected_forward": selected[0],
        "selected_backward_queries": selected[1],
        "selected_backward_keys": selected[2],
    }
    return tuple((name, (share, share)) for name, share in shares.items())


V4 = Chip(
    name="v4",
    device_kind="TPU v4",
    peak_flops=275e12,  # docs
    hbm_bytes=32 * GIB,  # docs
    hbm_bandwidth=1.2e12,  # docs
    clock=1.05e9,  # 2 cores x 4 units x 128 x 128
    link_bandwidth=45e9,  # book
    torus_dims=3,
    wraps_at=4,
    config="megacore",  # as on Cloud TPU: both cores are one device
    price=3.22,  # sky
    products=0.93,
    kernels=flash(forward=(0.47, 0.61), backward=(0.57, 0.78)),
)

V5E = Chip(
    name="v5e",
    device_kind="TPU v5 lite",
    peak_flops=197e12,  # docs
    hbm_bytes=16 * GIB,  # docs
    hbm_bandwidth=819e9,  # docs
    clock=1.5e9,  # 1 core x 4 units x 128 x 128
    link_bandwidth=45e9,  # docs print 400 GB/s, both ways over 4 links; book: 0.9 of that arrives
    torus_dims=2,
    wraps_at=16,
    price=1.20,  # sky
    flags=ASYNC_COLLECTIVES + CONTINUATION_FUSION,
    products=0.88,
    kernels=flash(forward=(0.73, 0.82), backward=(0.98, 1.00))
    + sparse(window=(0.73, 0.95), compressed=0.54, selected=(0.33, 0.39, 0.29)),
)

V5P = Chip(
    name="v5p",
    device_kind="TPU v5",
    peak_flops=459e12,  # docs
    hbm_bytes=95 * GIB,  # docs
    hbm_bandwidth=2765e9,  # docs
    clock=1.75e9,  # 2 cores x 4 units x 128 x 128
    link_bandwidth=90e9,  # docs print 1200 GB/s, both ways over 6 links; 0.9 of that
    torus_dims=3,
    wraps_at=4,
    price=4.20,  # sky
    products=0.90,
    kernels=flash(forward=(0.69, 0.79), backward=(0.93, 1.00))
    + sparse(window=(0.73, 0.96), compressed=0.52, selected=(0.33, 0.39, 0.30)),
)

V6E = Chip(
    name="v6e",
    device_kind="TPU v6 lite",
    peak_flops=918e12,  # docs
    hbm_bytes=32 * GIB,  # docs
    hbm_bandwidth=1638e9,  # docs
    clock=1.75e9,  # assumed: 4 x 256 x 256 cells (docs print two units, at an unprinted clock)
    link_bandwidth=90e9,  # docs print 800 GB/s, both ways over 4 links; 0.9 of that
    torus_dims=2,
    wraps_at=16,
    price=2.70,  # sky
    flags=ASYNC_COLLECTIVES + SPARSE_CORES,
    products=0.70,
    kernels=flash(forward=(0.28, 0.37), backward=(0.45, 0.55))
    + sparse(window=(0.40, 0.53), compressed=0.24, selected=(0.10, 0.11, 0.09)),
)

TPU7X = Chip(
    name="tpu7x",
    device_kind="TPU7x",
    peak_flops=2307e12,  # docs
    hbm_bytes=192 * GIB,  # docs
    hbm_bandwidth=7380e9,  # docs
    clock=2.2e9,  # assumed: 2 cores x 4 x 256 x 256 cells
    link_bandwidth=90e9,  # docs print 1200 GB/s, both ways over 6 links; 0.9 of that
    torus_dims=3,
    wraps_at=4,
    devices=2,  # one for each core, with half of all this
    products=0.81,
    kernels=flash(forward=(0.27, 0.35), backward=(0.41, 0.56))
    + sparse(window=(0.40, 0.54), compressed=0.24, selected=(0.09, 0.10, 0.08)),
)

SHAPES_2D = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SHAPES_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")

CHIPS: Mapping[str, Chip] = {chip.name: chip for chip in (V4, V5E, V5P, V6E, TPU7X)}
"""By name."""

SLICES: Mapping[str, tuple[str, ...]] = {
    "v4": (*SHAPES_3D, "8x16x16", "16x16x16"),
    "v5e": SHAPES_2D,
    "v5p": (*SHAPES_3D, "8x16x16", "16x16x16", "16x16x24"),
    "v6e": SHAPES_2D,
    "tpu7x": SHAPES_3D,
}
"""Shapes that Google Cloud sells of each chip, the smallest first (docs: tables of configurations).
"""
