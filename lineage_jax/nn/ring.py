"""Attention over a sequence that is split over devices: keys and values go round in a ring.

Liu et al. 2023, "Ring Attention with Blockwise Transformers" (arXiv 2310.01889, section 3): each
device keeps its queries, and in each of n turns meets the keys and values of another device, which
it passes on while it computes. Softmax is accumulated block by block (Dao et al. 2022, algorithm 1,
arXiv 2205.14135), so that no device ever holds more than one block of scores.

Under a causal mask, whoever has the end of the sequence would work at every turn and whoever has
the start at one. So the sequence is cut in 2n chunks, and device i trades its two for chunks i and
2n - 1 - i: then every device has two blocks to compute at every turn (the "zigzag" of Llama 3's
context parallelism, Grattafiori et al. 2024, section 3.3.2, arXiv 2407.21783).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lineage_jax.nn.masks import Mask
from lineage_jax.nn.split import undivided
from lineage_jax.typing import Array, Float

put = functools.partial(jax.lax.dynamic_update_index_in_dim, axis=0)

MASKED = -1e30  # finite, so that differences of two masked scores are not NaN


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def ring_attention(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B T G K"],
    values: Float[Array, "B T G K"],
    mask: Mask,
    axis: str,
) -> Float[Array, "B T H K"]:
    """softmax(q k / sqrt(K)) v, the sequence split over the mesh axis `axis`.

    The same as `dot_product_attention` with `mask.dense()`, but for rounding.

    Args:
      query, keys, values: projected heads; T is a multiple of the axis' extent (of twice that for
        balanced work). Query head h reads key-value head h // (H / G).
      mask: where queries and keys are the same positions, of rising index if it is causal.
      axis: of the mesh in use.
    """
    return _forward(query, keys, values, mask, axis)[0]


def _forward(query, keys, values, mask, axis):
    ways = jax.sharding.get_abstract_mesh().shape[axis]
    chunks = 2 if mask.causal and query.shape[1] % (2 * ways) == 0 else 1
    turn = Turns(axis, ways, chunks, mask.causal)
    groups = keys.shape[2]

    def local(query, keys, values, mask):
        mask = jax.tree.map(lambda x: turn.deal(x) if x.ndim == 2 else x, mask)
        query = turn.deal_heads(query, groups)
        keys, values = (turn.deal_heads(x, groups)[:, :, :, 0] for x in (keys, values))
        out, log_total = attend(query, keys, values, mask, turn)
        return turn.collect_heads(out), (query, keys, values, mask, out, log_total)

    along = P(None, axis)
    masks = jax.tree.map(lambda x: along if jnp.ndim(x) == 2 else P(), mask)
    mapped = jax.shard_map(
        local,
        in_specs=(along, along, along, masks),
        out_specs=(along, _saved_specs(mask, axis)),
        axis_names={axis},
    )
    return undivided(mapped)(query, keys, values, mask)


def _backward(axis, saved, out_grad):
    query, _, _, mask, _, _ = saved
    ways = jax.sharding.get_abstract_mesh().shape[axis]
    turn = Turns(axis, ways, query.shape[0], mask.causal)

    def local(saved, out_grad):
        dealt = turn.deal_heads(out_grad, query.shape[2])
        query_grad, keys_grad, values_grad = attend_backward(*saved, dealt, turn)
        return (
            turn.collect_heads(query_grad),
            turn.collect_heads(keys_grad[:, :, :, None]),
            turn.collect_heads(values_grad[:, :, :, None]),
        )

    along = P(None, axis)
    mapped = jax.shard_map(
        local,
        in_specs=(_saved_specs(mask, axis), along),
        out_specs=(along, along, along),
        axis_names={axis},
    )
    return (*undivided(mapped)(saved, out_grad), None)


ring_attention.defvjp(_forward, _backward)


def _saved_specs(mask: Mask, axis: str) -> tuple[Any, ...]:
    """How what the backward pass needs, dealt, is split: queries, keys, values, mask, out, log."""
    ids = jax.tree.map(lambda x: P(None, None, axis) if jnp.ndim(x) >= 2 else P(), mask)
    queries, keys = P(None, None, None, None, axis), P(None, None, None, axis)
    return queries, keys, keys, ids, queries, queries


class Turns(NamedTuple):
    """Who meets whom: n devices along `axis`, each with `chunks` chunks of the sequence."""

    axis: str
    ways: int
    chunks: int
    causal: bool

    def blocks(self, turn: int | Array) -> list[tuple[Any, Any]]:
        """(chunk of queries, chunk of keys) to compute at a turn, when keys have come so far."""
        if self.chunks == 1:
            return [(0, 0)]
        if isinstance(turn, int) and turn == 0:
            return [(0, 0), (1, 0), (1, 1)]
        # Keys from before our first chunk: all of ours read their first. Keys from after it: our
        # second chunk reads both of theirs.
        same = jnp.where(jax.lax.axis_index(self.axis) >= turn, 0, 1)
        return [(1, 0), (same, same)]

    def pass_on(self, tree: Any) -> Any:
        """What the device before had."""
        ring = [(i, (i + 1) % self.ways) for i in range(self.ways)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, ring), tree)

    def deal(self, x: Array) -> Array:
        """[B, t, ...] of this device's part of the sequence to its chunks [C, B, t, ...]."""
        x = x.reshape(x.shape[0], self.chunks, -1, *x.shape[2:]).swapaxes(0, 1)
        if self.chunks == 1:
            return x
        even = jax.lax.ppermute(x[0], self.axis, self._trades(0))
        odd = jax.lax.ppermute(x[1], self.axis, self._trades(1))
        return self._by_parity(even, odd)

    def deal_heads(self, x: Array, groups: int) -> Array:
        """The same for [B, t, H, K], the heads by groups: [C, B, G, R, t, K], R to a group."""
        x = self.deal(x)
        return x.reshape(*x.shape[:3], groups, -1, x.shape[-1]).transpose(0, 1, 3, 4, 2, 5)

    def collect_heads(self, x: Array) -> Array:
        """The inverse: chunks [C, B, G, R, t, K] to this device's part, [B, t, H, K]."""
        if self.chunks == 2:
            back = [[(to, of) for of, to in self._trades(parity)] for parity in (0, 1)]
            both = zip(self._by_parity(x[0], x[1]), back, strict=True)
            x = jnp.stack([jax.lax.ppermute(half, self.axis, trades) for half, trades in both])
        x = x.transpose(1, 0, 4, 2, 3, 5)  # B C t G R K
        return x.reshape(x.shape[0], x.shape[1] * x.shape[2], -1, x.shape[-1])

    def _trades(self, parity: int) -> list[tuple[int, int]]:
        """(from, to) of the chunks of one parity."""
        last = 2 * self.ways - 1
        return [(c // 2, min(c, last - c)) for c in range(parity, 2 * self.ways, 2)]

    def _by_parity(self, a: Array, b: Array) -> Array:
        """[a, b] on devices whose first chunk, of their own number, is even; else [b, a]."""
        even = jax.lax.axis_index(self.axis) % 2 == 0
        return jnp.stack([jnp.where(even, a, b), jnp.where(even, b, a)])


def attend(query, keys, values, mask, turn):
    """Attention of dealt chunks: queries [C B G R t K], keys and values [C B G t K].

    Returns:
      The attended values, and the logarithm of the sum under each softmax, float32.
    """
    by_row = query[..., 0]  # C B G R t
    state = (
        jnp.full_like(by_row, MASKED, jnp.float32),  # largest score so far
        jnp.zeros_like(by_row, jnp.float32),  # sum of exponentials
        jnp.zeros_like(query, jnp.float32),  # sum of values under them
    )

    def meet(state, theirs, number):
        keys, values, their_mask = theirs
        for a, b in turn.blocks(number):
            score, visible = _scores(query[a], keys[b], mask, their_mask, a, b)
            old = state[0][a]
            largest = jnp.maximum(old, score.max(-1))
            weights = jnp.where(visible, jnp.exp(score - largest[..., None]), 0.0)
            keep = jnp.exp(old - largest)
            summed = jnp.einsum(
                "bgrts,bgsk->bgrtk",
                weights.astype(values.dtype),
                values[b],
                preferred_element_type=jnp.float32,
            )
            new = (
                largest,
                state[1][a] * keep + weights.sum(-1),
                state[2][a] * keep[..., None] + summed,
            )
            state = jax.tree.map(lambda all, one, a=a: put(all, one, a), state, new)
        return state

    largest, total, summed = _round(meet, state, (keys, values, _of_keys(mask)), turn)
    return (summed / total[..., None]).astype(query.dtype), largest + jnp.log(total)


def attend_backward(query, keys, values, mask, out, log_total, out_grad, turn):
    """The gradients of dealt queries, keys and values."""
    # Dao et al. 2022, appendix B.2: the sum over keys of weight times its gradient.
    inner = (out_grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    scale = 1 / math.sqrt(query.shape[-1])

    def meet(query_grad, theirs, number):
        keys, values, their_mask, keys_grad, values_grad = theirs
        for a, b in turn.blocks(number):
            score, visible = _scores(query[a], keys[b], mask, their_mask, a, b)
            weights = jnp.where(visible, jnp.exp(score - log_total[a][..., None]), 0.0)
            weights_grad = jnp.einsum(
                "bgrtk,bgsk->bgrts", out_grad[a], values[b], preferred_element_type=jnp.float32
            )
            score_grad = scale * weights * (weights_grad - inner[a][..., None])
            product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
            kind = query.dtype
            score_grad, weights = score_grad.astype(kind), weights.astype(kind)
            for_query = product("bgrts,bgsk->bgrtk", score_grad, keys[b])
            for_keys = product("bgrts,bgrtk->bgsk", score_grad, query[a])
            for_values = product("bgrts,bgrtk->bgsk", weights, out_grad[a])
            query_grad = put(query_grad, query_grad[a] + for_query, a)
            keys_grad = put(keys_grad, keys_grad[b] + for_keys, b)
            values_grad = put(values_grad, values_grad[b] + for_values, b)
        return query_grad, (keys, values, their_mask, keys_grad, values_grad)

    zeros = functools.partial(jnp.zeros_like, dtype=jnp.float32)
    theirs = (keys, values, _of_keys(mask), zeros(keys), zeros(values))

    def body(carry, number):
        query_grad, theirs = meet(*carry, number)
        return (query_grad, turn.pass_on(theirs)), None

    carry, _ = body((zeros(query), theirs), 0)
    (query_grad, theirs), _ = jax.lax.scan(body, carry, jnp.arange(1, turn.ways))
    *_, keys_grad, values_grad = theirs  # home again
    return (
        query_grad.astype(query.dtype),
        keys_grad.astype(keys.dtype),
        values_grad.astype(values.dtype),
    )


def _round(meet: Callable, state: Any, theirs: Any, turn: Turns) -> Any:
    """All n turns, each of which sends on what it reads; the last has nobody to send to."""

    def body(carry, number):
        state, theirs = carry
        sent = turn.pass_on(theirs)
        return (meet(state, theirs, number), sent), None

    carry, _ = body((state, theirs), 0)
    (state, theirs), _ = jax.lax.scan(body, carry, jnp.arange(1, turn.ways - 1))
    return meet(state, theirs, turn.ways - 1)


def _scores(query, keys, mask, their_mask, a, b):
    """Scores of one block, float32 and masked, and which of them count: [B G R t s]."""
    scores = jnp.einsum("bgrtk,bgsk->bgrts", query, keys, preferred_element_type=jnp.float32)
    scores = scores / math.sqrt(query.shape[-1])
    keys_of, segments_of = their_mask
    block = mask.replace(
        queries=mask.queries[a],
        keys=keys_of[b],
        query_segments=None if mask.query_segments is None else mask.query_segments[a],
        key_segments=None if segments_of is None else segments_of[b],
    )
    visible = block.dense()[:, :, None]  # B 1 1 t s
    return jnp.where(visible, scores, MASKED), visible


def _of_keys(mask: Mask) -> tuple[Any, Any]:
    """What of a mask goes round with the keys."""
    return mask.keys, mask.key_segments
