"""Tables of vectors, looked up by id."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lineage_jax.typing import Array, DTypeLike, Float, Int

COLUMNS = "columns"


@jax.custom_vjp
def inner_products(x: Float[Array, "B T D"], table: Float[Array, "V D"]) -> Float[Array, "B T V"]:
    """x . row for every row of the table: accumulated, and returned, in float32.

    Its gradients are products in the type of x, as those of `project` are.
    """
    return jnp.einsum("btd,vd->btv", x, table, preferred_element_type=jnp.float32)


def inner_products_forward(x, table):
    return inner_products(x, table), (x, table)


def inner_products_backward(saved, grad):
    x, table = saved
    grad = grad.astype(x.dtype)
    return jnp.einsum("btv,vd->btd", grad, table), jnp.einsum("btv,btd->vd", grad, x)


inner_products.defvjp(inner_products_forward, inner_products_backward)


class Embed(nn.Module):
    """One row of a table for each id; the same table can score hidden states (`attend`).

    Ids must be in [0, num_embeddings): inside a compiled program nothing can refuse them, so the
    data package does. The table's axes are named (`axis`, "embed").
    """

    num_embeddings: int
    embed_dim: int
    axis: str = "vocab"
    stddev: float = 0.02
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self):
        init = nn.with_logical_partitioning(
            nn.initializers.normal(self.stddev), (self.axis, "embed")
        )
        self.table = self.param(
            "table", init, (self.num_embeddings, self.embed_dim), self.param_dtype
        )

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return jnp.take(self.table, ids, axis=0).astype(self.dtype)

    def attend(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Scores each id by the inner product with its row; float32."""
        if self.has_variable("params", COLUMNS):  # the table turned round, for decoding
            columns: Any = self.get_variable("params", COLUMNS)
            columns = columns.astype(x.dtype)
            return jnp.einsum("btd,dv->btv", x, columns, preferred_element_type=jnp.float32)
        return inner_products(x, self.table.astype(x.dtype))
