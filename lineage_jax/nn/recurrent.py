"""Recurrences: one state, carried from token to token.

A padded step (False in a `mask`) leaves the state as it was. So a row that is padded on the right
ends in the state of its last real token; a layer that reads from right to left begins there; and
the state of every real token is what it would be without the padding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lineage_jax.nn.embed import Embed
from lineage_jax.typing import Array, Bool, DTypeLike, Float

State = TypeVar("State")
"""A pytree of arrays [B, ...]."""


class LSTMState(NamedTuple):
    """What an LSTM remembers: its output, and the memory behind it.

    The memory is a sum over all steps and is float32; the output has the type of the activations.
    """

    hidden: Float[Array, "B N"]
    cell: Float[Array, "B N"]


class LSTMWeights(NamedTuple):
    """The parameters of one LSTM; gates are input, forget, candidate, output, as in torch."""

    kernel: Float[Array, "M 4 N"]
    recurrent: Float[Array, "N 4 N"]
    bias: Float[Array, "4 N"]

    def project(self, x: Float[Array, "*batch M"]) -> Float[Array, "*batch 4 N"]:
        """W x + b: the share of the gates that does not wait for the state."""
        projected = jnp.einsum("...m,mgn->...gn", x, self.kernel)
        return projected + self.bias.reshape((1,) * (x.ndim - 1) + self.bias.shape)


def lstm_cell(
    projected: Float[Array, "B 4 N"], state: LSTMState, recurrent: Float[Array, "N 4 N"]
) -> LSTMState:
    """One step of the LSTM (Graves 2013, section 2, equations 7 to 11, without peepholes).

    With i, f, g, o the four slices of `projected` + U h:

        cell' = sigmoid(f) cell + sigmoid(i) tanh(g),    hidden' = sigmoid(o) tanh(cell')

    The forget gate is that of Gers et al. 2000; arXiv 1308.0850 for Graves.

    Args:
      projected: W x + b, for all four gates.
      state: of the step before.
      recurrent: U, whose middle axis is the gates.
    """
    hidden, cell = state
    gates = projected + jnp.einsum("bm,mgn->bgn", hidden, recurrent)
    i, f, g, o = (gates[:, gate].astype(jnp.float32) for gate in range(4))
    cell = nn.sigmoid(f) * cell + nn.sigmoid(i) * jnp.tanh(g)
    return LSTMState((nn.sigmoid(o) * jnp.tanh(cell)).astype(hidden.dtype), cell)


def gru_cell(
    projected: Float[Array, "B 3 N"],
    hidden: Float[Array, "B N"],
    recurrent: Float[Array, "N 3 N"],
) -> Float[Array, "B N"]:
    """One step of the gated hidden unit (Cho et al. 2014, section 2.3, arXiv 1406.1078).

    As Bahdanau et al. 2014 write it in appendix A.1.1, with W x + b in `projected`:

        z = sigmoid(W_z x + U_z h)        r = sigmoid(W_r x + U_r h)
        h' = (1 - z) h + z tanh(W x + U (r h))

    This is not the unit of torch and cuDNN, where the reset gate multiplies the product, r (U h),
    and where z is the share of the old state.

    Args:
      projected: for the update gate, the reset gate and the candidate.
      hidden: the state of the step before.
      recurrent: U_z, U_r and U, along the middle axis.
    """
    gates = projected[:, :2] + jnp.einsum("bm,mgn->bgn", hidden, recurrent[:, :2])
    update, reset = nn.sigmoid(gates[:, 0]), nn.sigmoid(gates[:, 1])
    candidate = jnp.tanh(projected[:, 2] + (reset * hidden) @ recurrent[:, 2])
    return (1 - update) * hidden + update * candidate


def over_time(
    step: Callable[[State, Any], tuple[State, Any]],
    state: State,
    inputs: Any,
    mask: Bool[Array, "B T"] | None = None,
    reverse: bool = False,
) -> tuple[State, Any]:
    """Carries a state along the tokens of a batch.

    Args:
      step: from the state and the inputs of one token, the next state and the outputs.
      state: before the first token.
      inputs: a pytree of arrays [B, T, ...].
      mask: True for real tokens; at the others the state stays, and the outputs mean nothing.
      reverse: whether the last token comes first.

    Returns:
      The state after the last token, and the outputs, each [B, T, ...] in the order of the inputs.
    """

    def one_token(state, at):
        inputs, real = at
        after, outputs = step(state, inputs)
        if real is not None:

            def choose(new, old):
                return jnp.where(real.reshape(real.shape + (1,) * (new.ndim - 1)), new, old)

            after = jax.tree.map(choose, after, state)
        return after, outputs

    def time_first(x):
        return jnp.swapaxes(x, 0, 1)

    along = jax.tree.map(time_first, (inputs, mask))

    def whole_rows(x, *axes):
        return nn.with_logical_constraint(x, axes + (None,) * (x.ndim - len(axes)))

    state, outputs = jax.lax.scan(one_token, state, along, reverse=reverse)
    # Said here, or else gradients may come back to the scan with their rows on other devices than
    # the scan's, and be wrong (jax 0.10.2, Shardy, rows and units split at once).
    state = jax.tree.map(lambda x: whole_rows(x, "batch"), state)
    outputs = jax.tree.map(lambda x: whole_rows(time_first(x), "batch", "length"), outputs)
    return state, outputs


def symmetric_uniform(scale: float) -> nn.initializers.Initializer:
    """Uniform in [-scale, scale]."""

    def init(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, -scale, scale)

    return init


def gathered(weight: Array, axes: tuple[str, ...]) -> Array:
    """The weight, whole along "embed" on each device: brought together once, not at each token."""
    return nn.with_logical_constraint(
        weight, tuple(None if axis == "embed" else axis for axis in axes)
    )


class LSTM(nn.Module):
    """One layer of LSTM over a sequence.

    W x + b of the whole sequence is one matrix product ahead of the scan; a step of the scan has
    one product for the four gates. The gates are an axis of their own, so that a mesh splits the
    units and each device has all gates of its own.

    Attributes:
      hidden_dim: units, N.
      init_scale: all parameters start uniform in [-init_scale, init_scale], biases too (Sutskever
        et al. 2014, section 3.4).
      forget_bias: what the forget gate's bias has more at the start. The translators of 2014 and
        2015 add nothing; Gers et al. 2000 and Jozefowicz et al. 2015, section 2.2, advise 1.
      reverse: whether it reads from right to left.
    """

    hidden_dim: int
    init_scale: float
    forget_bias: float = 0.0
    reverse: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def weights(self, input_dim: int) -> LSTMWeights:
        """Its parameters, in the type of the activations, for inputs of that width."""
        uniform, width = symmetric_uniform(self.init_scale), self.hidden_dim

        def init_bias(key, shape, dtype):
            return uniform(key, shape, dtype).at[1].add(self.forget_bias)

        def weight(name, init, axes, shape):
            init = nn.with_logical_partitioning(init, axes)
            value: Any = self.param(name, init, shape, self.param_dtype)
            return gathered(value.astype(self.dtype), axes)

        axes = ("embed", "gates", "mlp")
        return LSTMWeights(
            weight("kernel", uniform, axes, (input_dim, 4, width)),
            weight("recurrent", uniform, axes, (width, 4, width)),
            weight("bias", init_bias, axes[1:], (4, width)),
        )

    def __call__(
        self,
        x: Float[Array, "B T M"],
        state: LSTMState | None = None,
        mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T N"], LSTMState]:
        """The output at each token, and the state after the last.

        Args:
          x: one vector per token.
          state: before the first token read; zeros if not given.
          mask: True for real tokens; the others leave the state as it was.
        """
        weights = self.weights(x.shape[-1])
        before = self.zeros(x.shape[0]) if state is None else state

        def step(state, projected):
            state = lstm_cell(projected, state, weights.recurrent)
            return state, state.hidden

        projected = weights.project(x.astype(self.dtype))  # B T 4 N
        after, outputs = over_time(step, before, projected, mask, self.reverse)
        return outputs, after

    def zeros(self, batch_size: int) -> LSTMState:
        """The state before anything is read."""
        shape = (batch_size, self.hidden_dim)
        return LSTMState(jnp.zeros(shape, self.dtype), jnp.zeros(shape, jnp.float32))


class LSTMStack(nn.Module):
    """LSTMs, each of which reads what the one below puts out.

    The layers are a loop and not a scan: the first is as wide as what comes in, the others are not.
    Their parameters are called layer_0, layer_1, ...

    Attributes:
      dropout_rate: on the input of each layer, never from token to token (Zaremba et al. 2014,
        equation 3, arXiv 1409.2329).
    """

    num_layers: int
    hidden_dim: int
    init_scale: float
    forget_bias: float = 0.0
    dropout_rate: float = 0.0
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self):
        types: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.layers = [
            LSTM(self.hidden_dim, self.init_scale, self.forget_bias, name=f"layer_{layer}", **types)
            for layer in range(self.num_layers)
        ]
        self.dropout = nn.Dropout(self.dropout_rate)

    def __call__(
        self,
        x: Float[Array, "B T M"],
        states: tuple[LSTMState, ...] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B T N"], tuple[LSTMState, ...]]:
        """The top layer's output at each token, and every layer's state after the last."""
        after = []
        for number, layer in enumerate(self.layers):
            x = self.dropout(x, deterministic=not train)
            x, state = layer(x, None if states is None else states[number], mask)
            after.append(state)
        return x, tuple(after)

    def weights(self, input_dim: int) -> tuple[LSTMWeights, ...]:
        """The parameters of each layer, for a model that steps through time by itself."""
        widths = [input_dim] + [self.hidden_dim] * (self.num_layers - 1)
        return tuple(layer.weights(width) for layer, width in zip(self.layers, widths, strict=True))


class GRU(nn.Module):
    """One layer of gated hidden units over a sequence (`gru_cell`).

    Attributes:
      hidden_dim: units, N.
      stddev: of the kernel at the start; recurrent matrices start orthogonal, biases at zero
        (Bahdanau et al. 2014, appendix B.1).
      reverse: whether it reads from right to left.
    """

    hidden_dim: int
    stddev: float
    reverse: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def weights(
        self, input_dim: int
    ) -> tuple[Float[Array, "M 3 N"], Float[Array, "N 3 N"], Float[Array, "3 N"]]:
        """Its kernel, recurrent matrices and bias, in the type of the activations."""
        width = self.hidden_dim

        def orthogonal(key, shape, dtype):
            init = nn.initializers.orthogonal()
            keys = jax.random.split(key, shape[1])
            return jnp.stack([init(key, (shape[0], shape[2]), dtype) for key in keys], axis=1)

        def weight(name, init, axes, shape):
            init = nn.with_logical_partitioning(init, axes)
            value: Any = self.param(name, init, shape, self.param_dtype)
            return gathered(value.astype(self.dtype), axes)

        axes = ("embed", "gates", "mlp")
        normal = nn.initializers.normal(self.stddev)
        return (
            weight("kernel", normal, axes, (input_dim, 3, width)),
            weight("recurrent", orthogonal, axes, (width, 3, width)),
            weight("bias", nn.initializers.zeros, axes[1:], (3, width)),
        )

    def project(self, x: Float[Array, "B T M"]) -> tuple[Float[Array, "B T 3 N"], Array]:
        """W x + b of the whole sequence, and the recurrent matrices [N, 3, N]."""
        kernel, recurrent, bias = self.weights(x.shape[-1])
        projected = jnp.einsum("btm,mgn->btgn", x.astype(self.dtype), kernel)
        return projected + bias[None, None], recurrent

    def __call__(
        self,
        x: Float[Array, "B T M"],
        hidden: Float[Array, "B N"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T N"], Float[Array, "B N"]]:
        """The output at each token, and the state after the last; arguments as `LSTM`'s."""
        projected, recurrent = self.project(x)
        zeros = jnp.zeros((x.shape[0], self.hidden_dim), self.dtype)
        before = zeros if hidden is None else hidden

        def step(hidden, projected):
            hidden = gru_cell(projected, hidden, recurrent)
            return hidden, hidden

        after, outputs = over_time(step, before, projected, mask, self.reverse)
        return outputs, after


class UniformEmbed(Embed):
    """`Embed`, whose table starts uniform in [-init_scale, init_scale]."""

    init_scale: float = 0.08  # Sutskever et al. 2014, section 3.4

    def setup(self):
        init = nn.with_logical_partitioning(
            symmetric_uniform(self.init_scale), (self.axis, "embed")
        )
        self.table = self.param(
            "table", init, (self.num_embeddings, self.embed_dim), self.param_dtype
        )
