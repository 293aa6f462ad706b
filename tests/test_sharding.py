"""Meshes that fit, shards that lie where the rules say, and refusals that say what would do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from lineage_jax import sharding
from lineage_jax.sharding import MeshConfig


@pytest.mark.parametrize(
    ("config", "num_devices", "sizes"),
    [
        (MeshConfig(), 1, (1, 1, 1, 1, 1, 1)),
        (MeshConfig(), 8, (8, 1, 1, 1, 1, 1)),
        (MeshConfig(fsdp=4), 8, (2, 1, 4, 1, 1, 1)),
        (MeshConfig(data=2, fsdp=-1, tensor=2), 8, (2, 1, 2, 1, 1, 2)),
        (MeshConfig(data=1, tensor=-1), 6, (1, 1, 1, 1, 1, 6)),
        (MeshConfig(stage=2, context=2, expert=2), 8, (1, 2, 1, 2, 2, 1)),
    ],
)
def test_the_free_axis_takes_the_devices_that_are_left(config, num_devices, sizes):
    assert config.sizes(num_devices) == sizes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=3), "mesh data=3 needs 3 devices, got 8"),
        (MeshConfig(data=4), "needs 4 devices, got 8; choose axes whose product is 8"),
        (MeshConfig(data=16), "needs 16 devices, got 8"),
        (MeshConfig(fsdp=3), "data=-1 x fsdp=3 needs a multiple of 3 devices, got 8"),
        (MeshConfig(fsdp=-1), "must be 1 or more, at most one of them -1; got data=-1 x fsdp=-1"),
        (MeshConfig(tensor=0), "must be 1 or more, at most one of them -1; got .*tensor=0"),
        (MeshConfig(tensor=-2), "must be 1 or more, at most one of them -1; got .*tensor=-2"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        config.sizes(8)


def test_a_mesh_has_all_axes_and_the_devices_it_is_given():
    mesh = sharding.make_mesh(MeshConfig(fsdp=2), jax.devices()[:4])
    assert {axis: size for axis, size in mesh.shape.items() if size > 1} == {"data": 2, "fsdp": 2}
    assert mesh.axis_names == sharding.AXES
    assert set(mesh.devices.flat) == set(jax.devices()[:4])


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def boxed(shape, *names):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


@pytest.mark.parametrize(
    ("shape", "names", "spec"),
    [
        ((3, 4, 6), ("layers", "embed", "mlp"), P(None, ("fsdp",), ("tensor",))),
        ((4, 2, 5), ("embed", "heads", "head"), P(("fsdp",), ("tensor",), None)),
        ((8, 4), ("vocab", "embed"), P(("tensor",), ("fsdp",))),
        ((7, 4), ("vocab", "embed"), P(None, ("fsdp",))),  # an odd vocabulary stays whole
        ((5,), ("embed_vector",), P(None)),
    ],
)
def test_a_parameter_is_split_as_its_axes_are_named(mesh, shape, names, spec):
    assert sharding.shardings(boxed(shape, *names), mesh).spec == spec


def test_what_has_no_names_is_whole_on_every_device(mesh):
    assert sharding.shardings(jnp.zeros(4), mesh) == sharding.replicated(mesh)


def test_an_axis_that_the_mesh_does_not_divide_is_named_with_the_sizes_that_would():
    mesh = sharding.make_mesh(MeshConfig(tensor=8))
    tree = {"blocks": {"query": {"kernel": boxed((30, 6), "embed", "heads")}}}
    with pytest.raises(ValueError) as error:
        sharding.shardings(tree, mesh)
    assert str(error.value) == (
        "parameter blocks/query/kernel: axis 'heads' of 6 does not divide over mesh axis "
        "tensor=8; sizes that would: 1, 2, 3, 6"
    )


def text(rows, length=4):
    return sharding.named({"tokens": ((rows, length), jnp.int32)}, ("batch", "length"))


@pytest.mark.parametrize(("size", "fits"), [(4, True), (8, True), (6, False), (1, False)])
def test_a_batch_divides_over_the_replicas_or_is_refused(mesh, size, fits):
    if fits:
        assert sharding.Feed(text(size), mesh).shardings["tokens"].spec == P(("data", "fsdp"), None)
        return
    with pytest.raises(ValueError) as error:
        sharding.Feed(text(size), mesh)
    assert str(error.value).startswith(f"batch tokens: axis 'batch' of {size} does not divide over")
    assert str(error.value).endswith("or a multiple of 4 rows a batch")


def test_a_sequence_divides_over_the_context_axis_or_is_refused():
    mesh = sharding.make_mesh(MeshConfig(context=4))
    with pytest.raises(ValueError, match="axis 'length' of 6 does not divide over mesh axis cont"):
        sharding.Feed(text(8, 6), mesh)


def test_a_mesh_axis_splits_the_first_axis_that_claims_it():
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, expert=2, context=2))
    experts = sharding.shardings(boxed((4, 8, 6), "experts", "embed", "mlp"), mesh)
    assert experts.spec == P(("expert",), ("fsdp", "context"), None)
    dense = sharding.shardings(boxed((8, 6), "embed", "mlp"), mesh)
    assert dense.spec == P(("fsdp", "expert", "context"), None)


def test_parameters_made_in_place_are_those_made_whole(mesh):
    normal = nn.initializers.normal()

    def init():
        keys = jax.random.split(jax.random.key(0), 2)
        return {
            "table": nn.LogicallyPartitioned(normal(keys[0], (7, 8)), ("vocab", "embed")),
            "kernel": nn.LogicallyPartitioned(normal(keys[1], (8, 6)), ("embed", "mlp")),
            "step": jnp.zeros((), jnp.int32),
        }

    made = sharding.init_sharded(init, mesh)
    whole = jax.jit(lambda: nn.meta.unbox(init()))()
    jax.tree.map(np.testing.assert_array_equal, made, whole)
    assert made["kernel"].sharding.spec == P(("fsdp",), ("tensor",))
    assert {shard.data.shape for shard in made["kernel"].addressable_shards} == {(4, 3)}
    assert {shard.data.shape for shard in made["table"].addressable_shards} == {(7, 4)}
    assert len(made["step"].devices()) == 8


def test_a_batch_is_split_over_data_and_fsdp_and_repeated_over_tensor(mesh):
    rows = np.arange(16, dtype=np.int32).reshape(4, 4)
    feed = sharding.Feed(text(4), mesh)
    np.testing.assert_array_equal(feed.rows, np.arange(4))
    placed = feed({"tokens": rows})["tokens"]
    np.testing.assert_array_equal(placed, rows)
    held = sorted(shard.data.ravel().tolist() for shard in placed.addressable_shards)
    assert held == sorted([row.tolist() for row in rows] * 2)
    stacked = feed.stack({"tokens": np.stack([rows, rows + 16])})["tokens"]
    assert {shard.data.shape for shard in stacked.addressable_shards} == {(2, 1, 4)}
    np.testing.assert_array_equal(stacked[1], rows + 16)
