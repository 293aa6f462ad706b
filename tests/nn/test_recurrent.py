"""Recurrences are their equations, step by step; padding, direction and pieces change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lineage_jax.nn import GRU, LSTM, LSTMStack, LSTMState, UniformEmbed, lstm_cell, over_time
from tests.nn.closeness import assert_same

BATCH, LENGTH, WIDTH, UNITS = 3, 6, 5, 7
LENGTHS = np.asarray([6, 2, 4])
KINDS = {"lstm": LSTM(UNITS, init_scale=0.7), "gru": GRU(UNITS, stddev=0.5)}
BACKWARD = {
    "lstm": LSTM(UNITS, init_scale=0.7, reverse=True),
    "gru": GRU(UNITS, stddev=0.5, reverse=True),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (BATCH, LENGTH, WIDTH))


@pytest.fixture(scope="module")
def params(x):
    """Every parameter random, the biases too."""
    rng = np.random.default_rng(0)

    def randomized(module):
        shapes = jax.eval_shape(module.init, jax.random.key(0), x)
        return jax.tree.map(
            lambda leaf: jnp.asarray(0.5 * rng.standard_normal(leaf.shape), jnp.float32),
            nn.unbox(shapes["params"]),
        )

    return {kind: randomized(module) for kind, module in KINDS.items()}


@pytest.fixture(scope="module")
def states():
    hidden, cell = jax.random.normal(jax.random.key(1), (2, BATCH, UNITS))
    return {"lstm": LSTMState(hidden, cell), "gru": hidden}


def apply(module, params, x, state=None, mask=None):
    call = jax.jit(lambda *arguments: module.apply({"params": params}, *arguments))
    return call(x, state, mask)


def right_padding():
    return jnp.arange(LENGTH)[None] < LENGTHS[:, None]


def row_of(state, row):
    return jax.tree.map(lambda leaf: leaf[row], state)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm_by_hand(params, x, hidden, cell):
    """One row in float64: each gate by its own matrices."""
    w, u, b = (np.asarray(params[name], np.float64) for name in ("kernel", "recurrent", "bias"))
    outputs = []
    for token in np.asarray(x, np.float64):
        i, f, g, o = (w[:, k].T @ token + u[:, k].T @ hidden + b[k] for k in range(4))
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        hidden = sigmoid(o) * np.tanh(cell)
        outputs.append(hidden)
    return np.stack(outputs), (hidden, cell)


def gru_by_hand(params, x, hidden):
    """One row in float64, as Bahdanau et al. 2014, appendix A.1.1, print it."""
    w, u, b = (np.asarray(params[name], np.float64) for name in ("kernel", "recurrent", "bias"))
    outputs = []
    for token in np.asarray(x, np.float64):
        z = sigmoid(w[:, 0].T @ token + u[:, 0].T @ hidden + b[0])
        r = sigmoid(w[:, 1].T @ token + u[:, 1].T @ hidden + b[1])
        proposed = np.tanh(w[:, 2].T @ token + u[:, 2].T @ (r * hidden) + b[2])
        hidden = (1 - z) * hidden + z * proposed
        outputs.append(hidden)
    return np.stack(outputs), (hidden,)


@each_kind
def test_each_recurrence_is_its_equations_in_float64(kind, params, x, states):
    outputs, after = apply(KINDS[kind], params[kind], x, states[kind])
    by_hand = {"lstm": lstm_by_hand, "gru": gru_by_hand}[kind]
    for row in range(BATCH):
        given = [np.asarray(state[row], np.float64) for state in jax.tree.leaves(states[kind])]
        expected, last = by_hand(params[kind], x[row], *given)
        assert_same(outputs[row], expected)
        assert_same([state[row] for state in jax.tree.leaves(after)], list(last))


@each_kind
def test_without_a_state_it_begins_with_zeros(kind, params, x, states):
    zeros = jax.tree.map(jnp.zeros_like, states[kind])
    one, other = (apply(KINDS[kind], params[kind], x, state) for state in (None, zeros))
    jax.tree.map(np.testing.assert_array_equal, one, other)


@each_kind
@pytest.mark.parametrize("modules", [KINDS, BACKWARD], ids=["forward", "backward"])
def test_a_padded_row_is_what_it_is_alone(kind, modules, params, x, states):
    outputs, after = apply(modules[kind], params[kind], x, states[kind], right_padding())
    for row, length in enumerate(LENGTHS):
        state = jax.tree.map(lambda leaf: leaf[None], row_of(states[kind], row))
        alone, last = apply(modules[kind], params[kind], x[row : row + 1, :length], state)
        assert_same(outputs[row, :length], alone[0])
        assert_same(
            jax.tree.map(lambda s, row=row: s[row], after), jax.tree.map(lambda s: s[0], last)
        )


@each_kind
@pytest.mark.parametrize("modules", [KINDS, BACKWARD], ids=["forward", "backward"])
def test_padding_anywhere_is_as_if_it_were_cut_out(kind, modules, params, x, states):
    mask = jnp.asarray([[1, 1, 0, 1, 0, 1], [0, 0, 1, 1, 0, 0], [0, 1, 0, 1, 1, 1]], bool)
    outputs, after = apply(modules[kind], params[kind], x, states[kind], mask)
    for row in range(BATCH):
        state = jax.tree.map(lambda leaf: leaf[None], row_of(states[kind], row))
        alone, last = apply(modules[kind], params[kind], x[row, mask[row]][None], state)
        assert_same(outputs[row, mask[row]], alone[0])
        assert_same(
            jax.tree.map(lambda s, row=row: s[row], after), jax.tree.map(lambda s: s[0], last)
        )


@each_kind
def test_padding_has_no_gradient_and_gives_the_weights_none(kind, params, x):
    mask = right_padding()

    @jax.jit
    def gradients(x):
        def loss(params, x):
            outputs, after = KINDS[kind].apply({"params": params}, x, None, mask)
            kept = jnp.where(mask[..., None], jnp.sin(outputs), 0.0)
            return kept.sum() + sum(jnp.cos(leaf).sum() for leaf in jax.tree.leaves(after))

        return jax.grad(loss, (0, 1))(params[kind], x)

    of_weights, of_x = gradients(x)
    others, _ = gradients(jnp.where(mask[..., None], x, 1e3))
    assert (np.asarray(of_x)[~np.asarray(mask)] == 0).all()
    assert (np.abs(np.asarray(of_x)[np.asarray(mask)]).max(-1) > 0).all()
    jax.tree.map(np.testing.assert_array_equal, of_weights, others)


@each_kind
def test_from_right_to_left_is_from_left_to_right_of_the_flipped_row(kind, params, x, states):
    outputs, after = apply(BACKWARD[kind], params[kind], x, states[kind])
    flipped, expected = apply(KINDS[kind], params[kind], x[:, ::-1], states[kind])
    assert_same((outputs[:, ::-1], after), (flipped, expected))


@each_kind
def test_two_pieces_are_the_whole(kind, params, x, states):
    whole = apply(KINDS[kind], params[kind], x, states[kind])
    first, state = apply(KINDS[kind], params[kind], x[:, :2], states[kind])
    second, state = apply(KINDS[kind], params[kind], x[:, 2:], state)
    assert_same((jnp.concatenate([first, second], axis=1), state), whole)


def test_a_stack_is_its_layers_in_turn_each_with_its_own_state(x):
    stack = LSTMStack(3, UNITS, init_scale=0.7)
    variables = nn.unbox(stack.init(jax.random.key(2), x))
    states = tuple(
        LSTMState(*jax.random.normal(jax.random.key(layer), (2, BATCH, UNITS)))
        for layer in range(3)
    )
    mask = right_padding()
    outputs, after = apply(stack, variables["params"], x, states, mask)
    for layer in range(3):
        one = variables["params"][f"layer_{layer}"]
        x, state = apply(KINDS["lstm"], one, x, states[layer], mask)
        assert_same(after[layer], state)
    assert_same(outputs, x)


def test_dropout_of_a_stack_acts_between_layers_and_never_from_token_to_token(x):
    # Layers that are deaf to their inputs have nothing left to drop but their states.
    stack = LSTMStack(2, UNITS, init_scale=0.7, dropout_rate=0.5)
    params = nn.unbox(stack.init(jax.random.key(2), x))["params"]

    def run(params, seed):
        call = jax.jit(
            lambda key: stack.apply({"params": params}, x, train=True, rngs={"dropout": key})[0]
        )
        return call(jax.random.key(seed))

    assert (run(params, 0) != run(params, 1)).any()
    deaf = {
        name: {**layer, "kernel": jnp.zeros_like(layer["kernel"])} for name, layer in params.items()
    }
    np.testing.assert_array_equal(run(deaf, 0), run(deaf, 1))
    np.testing.assert_array_equal(run(deaf, 0), apply(stack, deaf, x)[0])


def test_parameters_start_uniform_and_the_forget_gate_higher_by_its_bias():
    x = jnp.zeros((1, 1, 40))
    init = jax.jit(LSTM(50, init_scale=0.08, forget_bias=1.0).init)
    params = nn.unbox(init(jax.random.key(0), x))["params"]
    bias = params["bias"].at[1].add(-1.0)
    for value in (params["kernel"], params["recurrent"], bias):
        # Within float32 of the ends, as 1 was added and taken away.
        assert np.abs(value).max() <= 0.08 + 1e-6
        # A uniform variable has a standard deviation of 0.08 / sqrt(3); 200 and more of them.
        assert float(value.std()) == pytest.approx(0.08 / 3**0.5, rel=0.15)
    table = UniformEmbed(40, 50, init_scale=0.08).init(jax.random.key(0), jnp.zeros((1, 1), int))
    table = nn.unbox(table)["params"]["table"]
    assert np.abs(table).max() <= 0.08
    assert float(table.std()) == pytest.approx(0.08 / 3**0.5, rel=0.15)


def test_recurrent_matrices_of_the_gated_unit_start_orthogonal_gate_by_gate():
    params = nn.unbox(jax.jit(GRU(9, stddev=0.01).init)(jax.random.key(0), jnp.zeros((1, 1, 4))))
    recurrent, bias = params["params"]["recurrent"], params["params"]["bias"]
    for gate in range(3):
        product = recurrent[:, gate].T @ recurrent[:, gate]
        np.testing.assert_allclose(product, np.eye(9), rtol=0, atol=1e-5)
    assert (recurrent[:, 0] != recurrent[:, 1]).any()
    np.testing.assert_array_equal(bias, 0.0)


@each_kind
def test_parameters_name_their_axes(kind, x):
    params = KINDS[kind].init(jax.random.key(0), x)["params"]
    names = {name: leaf.names for name, leaf in params.items()}
    matrix = ("embed", "gates", "mlp")
    assert names == {"kernel": matrix, "recurrent": matrix, "bias": ("gates", "mlp")}


def test_a_cell_counts_in_float32_though_all_else_is_half_as_precise():
    # Nothing is forgotten, and sigmoid(-6.25) = 1 / 519 comes in at each step: bfloat16, with its
    # eight bits, would add no more of that beyond 1.
    gates = jnp.asarray([-6.25, 30.0, 30.0, 0.0], jnp.bfloat16)[None, :, None]
    recurrent = jnp.zeros((1, 4, 1), jnp.bfloat16)
    state = LSTMState(jnp.zeros((1, 1), jnp.bfloat16), jnp.zeros((1, 1)))

    def step(state, _):
        return lstm_cell(gates, state, recurrent), None

    state, _ = jax.jit(lambda state: over_time(step, state, jnp.zeros((1, 1024))))(state)
    assert state.cell.dtype == jnp.float32 and state.hidden.dtype == jnp.bfloat16
    # 1024 sums near 2, each rounded by 2^-24 of itself.
    np.testing.assert_allclose(state.cell, 1024 * sigmoid(-6.25), rtol=1024 * 2**-24)
