"""Native Sparse Attention in float64 and in loops: one query head, one key, one block at a time.

Written from the paper (Yuan et al. 2025, section 3), and not from our kernels.
"""

import math

import numpy as np


def softmax_average(query, keys, values):
    """softmax(q k / sqrt(K)) v over a list of keys, and its weights; zero where there are none."""
    if not len(keys):
        return 0.0, []
    scores = [query @ key / math.sqrt(len(query)) for key in keys]
    weights = [math.exp(score - max(scores)) for score in scores]
    weights = [weight / sum(weights) for weight in weights]
    return sum(w * value for w, value in zip(weights, values, strict=True)), weights


def compressed_reads(t, start, count, c):
    """Compressed keys of which every position is behind query t, or its own, in its document."""
    places = {i: range(i * c.stride, i * c.stride + c.compressed_size) for i in range(count)}
    return [i for i, at in places.items() if start <= at[0] and at[-1] <= t]


def selected_blocks(weights_of_heads, t, start, c):
    """The blocks that the heads of a group read, from the weights of their compressed keys."""
    own, first = t // c.block_size, start // c.block_size
    worth = {block: 0.0 for block in range(first, own + 1)}
    for weights in weights_of_heads:
        for i, weight in weights.items():
            for stride in range(c.compressed_size // c.stride):
                block = (i * c.stride + stride * c.stride) // c.block_size
                if block in worth:
                    worth[block] += weight
    for block in worth:
        if block < first + c.num_first or block > own - c.num_local:
            worth[block] = math.inf
    best = sorted(worth, key=lambda block: (-worth[block], block))[: c.num_blocks]
    return sorted(best)


def native_sparse_attention(query, keys, values, gates, c, segment_ids=None, offset=0):
    """Attended values [B, T, H, E], and the blocks each query and group reads, lists of lists."""
    batch, length, num_heads, _ = query.shape
    groups = values[1].shape[2]
    out = np.zeros((batch, length, num_heads, values[1].shape[-1]))
    blocks = {}
    for b, i, g in np.ndindex(batch, length, groups):
        t = offset + i
        start = 0
        if segment_ids is not None:
            start = int(np.flatnonzero(segment_ids[b] == segment_ids[b, t])[0])
        heads = range(g * num_heads // groups, (g + 1) * num_heads // groups)
        whole = compressed_reads(t, start, keys[0].shape[1], c)
        compressed = {
            h: softmax_average(query[b, i, h], keys[0][b, whole, g], values[0][b, whole, g])
            for h in heads
        }
        of_heads = [dict(zip(whole, compressed[h][1], strict=True)) for h in heads]
        blocks[b, i, g] = selected_blocks(of_heads, t, start, c)
        chosen = [s for s in range(start, t + 1) if s // c.block_size in blocks[b, i, g]]
        window = range(max(start, t - c.window + 1), t + 1)
        for h in heads:
            selected, _ = softmax_average(
                query[b, i, h], keys[1][b, chosen, g], values[1][b, chosen, g]
            )
            near, _ = softmax_average(
                query[b, i, h], keys[2][b, window, g], values[2][b, window, g]
            )
            branches = (compressed[h][0], selected, near)
            out[b, i, h] = sum(gate * x for gate, x in zip(gates[b, i, h], branches, strict=True))
    return out, blocks
