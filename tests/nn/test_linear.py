import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lineage_jax import sharding
from lineage_jax.nn import Linear, project
from lineage_jax.sharding import MeshConfig


def plain(x, kernel):
    return x @ kernel


def loss(product):
    """A scalar whose gradient differs at every element."""
    return lambda x, kernel: jnp.sum(jnp.sin(product(x, kernel)))


def factors(batch=(3, 5), width_in=4, width_out=6, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (*batch, width_in), dtype)
    return x, jax.random.normal(keys[1], (width_in, width_out), dtype)


def assert_close(actual, expected, rtol=1e-5):
    def close(a, b):
        assert a.dtype == b.dtype and a.shape == b.shape
        scale = float(jnp.abs(b.astype(jnp.float32)).max())
        assert float(jnp.abs((a - b).astype(jnp.float32)).max()) <= rtol * scale

    jax.tree.map(close, actual, expected)


@pytest.mark.parametrize("batch", [(), (7,), (3, 5), (2, 3, 2)])
@pytest.mark.parametrize("widths", [(4, 6), (6, 4), (5, 5)])
def test_gradients_are_those_of_the_plain_product(batch, widths):
    arguments = factors(batch, *widths)
    gradients = jax.jit(jax.grad(loss(project), (0, 1)))(*arguments)
    assert_close(gradients, jax.grad(loss(plain), (0, 1))(*arguments))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradients_keep_the_type_of_what_they_are_of(dtype):
    arguments = factors(dtype=dtype)
    gradients = jax.jit(jax.grad(loss(project), (0, 1)))(*arguments)
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    assert_close(gradients, jax.grad(loss(plain), (0, 1))(*arguments), tolerance)


@pytest.mark.parametrize("widths", [(4, 6), (6, 4)])
def test_gradients_of_gradients_are_those_of_the_plain_product(widths):
    def curvature(product):
        def squared(*arguments):
            gradients = jax.grad(loss(product), (0, 1))(*arguments)
            return sum(jnp.sum(g**2) for g in gradients)

        return jax.jit(jax.grad(squared, (0, 1)))

    assert_close(
        curvature(project)(*factors((5,), *widths)), curvature(plain)(*factors((5,), *widths))
    )


def test_gradients_survive_scan_remat_and_vmap():
    lanes, layers, width = 2, 3, 4
    x = jax.random.normal(jax.random.key(1), (lanes, 5, width))
    kernels = jax.random.normal(jax.random.key(2), (lanes, layers, width, width))

    def gradients(product):
        @jax.checkpoint
        def layer(x, kernel):
            return jnp.tanh(product(x, kernel)), None

        def lane_loss(x, kernels):
            return jnp.sum(jax.lax.scan(layer, x, kernels)[0] ** 2)

        return jax.jit(jax.vmap(jax.grad(lane_loss, (0, 1))))(x, kernels)

    assert_close(gradients(project), gradients(plain))


@pytest.mark.parametrize("spec", [("fsdp", "tensor"), ("tensor", "fsdp"), (None, "tensor"), ()])
@pytest.mark.parametrize("widths", [(8, 16), (16, 8)])
def test_sharded_gradients_are_those_of_one_device(spec, widths):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    x, kernel = factors((4, 3), *widths)
    expected = jax.jit(jax.grad(loss(project), (0, 1)))(x, kernel)
    shardings = (
        NamedSharding(mesh, PartitionSpec(("data", "fsdp"))),
        NamedSharding(mesh, PartitionSpec(*spec)),
    )
    run = jax.jit(jax.grad(loss(project), (0, 1)), in_shardings=shardings, out_shardings=shardings)
    gradients = run(*jax.device_put((x, kernel), shardings))
    assert gradients[1].sharding.is_equivalent_to(shardings[1], 2)
    assert_close(jax.device_get(gradients), jax.device_get(expected))


def test_only_the_cpu_holds_a_transposed_copy():
    traced = jax.jit(jax.grad(loss(project), 1)).trace(*factors())
    assert "optimization_barrier" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "optimization_barrier" not in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_linear_maps_its_last_axes_and_names_them():
    layer = Linear((2, 3), (4, 5), ("heads", "head", "mlp", "out"), stddev=0.5)
    x = jax.random.normal(jax.random.key(0), (7, 2, 3))
    boxed = layer.init(jax.random.key(1), x)["params"]
    assert boxed["kernel"].names == ("heads", "head", "mlp", "out")
    assert boxed["bias"].names == ("mlp", "out")
    params = jax.tree.map(jnp.ones_like, nn.unbox(boxed))
    params["kernel"] = nn.unbox(boxed)["kernel"]
    expected = jnp.einsum("bhk,hkmn->bmn", x, params["kernel"]) + 1.0
    assert_close(layer.apply({"params": params}, x), expected)


def on_a_mesh(config, axes, batch):
    """Gradients of a product on a mesh, what they are, and the compiled program."""
    x, kernel = factors(batch, 8, 16)
    mesh = sharding.make_mesh(config)
    rows = NamedSharding(mesh, PartitionSpec(sharding.RULES["batch"], sharding.RULES["length"]))
    split = PartitionSpec(*(sharding.RULES[name] for name in axes))
    where = (rows, NamedSharding(mesh, split))
    if x.shape[0] % mesh.shape["fsdp"]:
        where = (NamedSharding(mesh, PartitionSpec()), where[1])
    with sharding.use(mesh):
        gradient = jax.grad(loss(lambda x, kernel: project(x, kernel, axes)), (0, 1))
        jitted = jax.jit(gradient, in_shardings=where, out_shardings=where)
        text = jitted.lower(x, kernel).compile().as_text()
        found = jitted(*map(jax.device_put, (x, kernel), where))
    return found, jax.grad(loss(plain), (0, 1))(x, kernel), text


@pytest.mark.parametrize("axes", [("embed", "mlp"), ("heads", "embed")])
@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(data=1, fsdp=8),
        MeshConfig(data=2, fsdp=2, tensor=2),
        MeshConfig(data=1, fsdp=2, context=2, tensor=2),
        MeshConfig(data=1, fsdp=2, expert=2, context=2),
    ],
)
def test_gradients_are_scattered_over_the_devices_that_share_the_kernel(config, axes):
    found, expected, text = on_a_mesh(config, axes, (8, 6))
    assert_close(found, expected)
    assert "reduce-scatter" in text


def test_rows_that_the_mesh_does_not_divide_are_summed_as_the_compiler_will():
    found, expected, text = on_a_mesh(MeshConfig(data=1, fsdp=8), ("embed", "mlp"), (3, 6))
    assert_close(found, expected)
    assert "reduce-scatter" not in text
