"""Compiles the small programs beside this file for TPU slices, with libtpu and no TPU.

    python tests/pods/hlo/make.py [NAME ...]

The first line of each file says for which slice and mesh; metadata and the bodies of kernels,
which hold paths and no costs, are left out. After a new release of libtpu, run it and look at what
changed.
"""

import json
import os
import pathlib
import re
import sys

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", LIBTPU_INIT_ARGS="")

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec

from lineage_jax import sharding
from lineage_jax.pods.topologies import Topology
from lineage_jax.sharding import MeshConfig

HERE = pathlib.Path(__file__).parent
MESH = MeshConfig(fsdp=4, tensor=2)


def matmul(x, w):
    return x @ w


def scan(x, w):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]


def exchange(kind, axes):
    """One collective inside a `shard_map`, of an array that every axis of the mesh splits."""
    local = {
        "all_gather": lambda x: jax.lax.all_gather(x, axes, tiled=True),
        "all_reduce": lambda x: jax.lax.psum(x, axes),
        "reduce_scatter": lambda x: jax.lax.psum_scatter(x, axes, tiled=True),
        "all_to_all": lambda x: jax.lax.all_to_all(x, axes, 1, 0, tiled=True),
        "permute": lambda x: jax.lax.ppermute(x, axes, [(i, (i + 1) % 4) for i in range(4)]),
    }[kind]

    def run(x):
        return jax.shard_map(
            local,
            in_specs=PartitionSpec(("fsdp", "tensor")),
            out_specs=PartitionSpec(("fsdp", "tensor")),
            check_vma=False,
        )(x)

    return run


def kernel(x):
    """A Pallas call that states its costs."""

    def double(x_ref, o_ref):
        o_ref[...] = x_ref[...] * 2

    block = pl.BlockSpec((128, 512), lambda i: (i, 0))
    return pl.pallas_call(
        double,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(8,),
        in_specs=[block],
        out_specs=block,
        cost_estimate=pl.CostEstimate(flops=2**19, transcendentals=0, bytes_accessed=2**22),
    )(x)


ONE, SPLIT = PartitionSpec(), PartitionSpec(("fsdp", "tensor"))


def array(shape, spec=ONE, dtype=jnp.bfloat16):
    return shape, spec, dtype


PROGRAMS = {
    "matmul": ("v5e:1x1", MeshConfig(), matmul, [array((4096, 4096))] * 2),
    **{
        f"product_{name.partition(':')[0]}": (name, MeshConfig(), matmul, [array((8192, 8192))] * 2)
        for name in ("v4:1x1x1", "v5e:1x1", "v5p:1x1x1", "v6e:1x1", "tpu7x:1x1x1")
    },
    "scan": ("v5e:1x1", MeshConfig(), scan, [array((2048, 2048)), array((12, 2048, 2048))]),
    "kernel": ("v5e:1x1", MeshConfig(), kernel, [array((1024, 512), dtype=jnp.float32)]),
    **{
        f"{kind}_{'_'.join(axes)}_{name.partition(':')[0]}": (
            name,
            MESH,
            exchange(kind, axes),
            [array((1024, 512), SPLIT, jnp.float32)],
        )
        for name in ("v5e:2x4", "v5p:2x2x2")
        for kind in ("all_gather", "all_reduce", "reduce_scatter", "all_to_all", "permute")
        for axes in (("fsdp",), ("tensor",), ("fsdp", "tensor"))
        if kind != "permute" or axes == ("fsdp",)
    },
}


def compiled(name, config, function, arrays):
    """The first line, and the text of the compiled module."""
    mesh = Topology.parse(name).mesh(config)
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, spec, dtype in arrays
    ]
    with sharding.use(mesh):
        text = jax.jit(function).lower(*arguments).compile().as_text()
    coords = [list(device.coords) for device in mesh.devices.flat]
    return {"topology": name, "axes": dict(mesh.shape), "coords": coords}, text


def tidy(text):
    """Leaves out what holds paths."""
    text = re.sub(r',? metadata=\{(?:[^{}"]|"[^"]*")*\}', "", text)
    text = re.sub(r"\n(FileNames|FunctionNames|FileLocations|StackFrames)\n(.+\n)*", "", text)
    return re.sub(r'"body":"[^"]*"', '"body":""', text)


if __name__ == "__main__":
    for name in sys.argv[1:] or PROGRAMS:
        head, text = compiled(*PROGRAMS[name])
        (HERE / f"{name}.hlo").write_text(f"// {json.dumps(head)}\n{tidy(text)}")
        print(name, len(text))
