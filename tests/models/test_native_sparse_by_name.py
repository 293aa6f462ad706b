"""Native Sparse Attention in the place of full attention, by its name: in GPT and the Transformer.

What it reads is tested with the milestone (`test_native_sparse.py`); here, that each decoder keeps
with it what it keeps without.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from experiments import gpt as gpt_experiment
from experiments import transformer as transformer_experiment
from experiments.converting import of_run
from experiments.difference import settings
from experiments.saved import Saved, filled
from lineage_jax import sharding
from lineage_jax.cli.terminal import options
from lineage_jax.kernels import NSACache, NSAConfig
from lineage_jax.models import gpt
from lineage_jax.models.gpt import GPT, GPTConfig
from lineage_jax.models.transformer import StackConfig, Transformer, TransformerConfig
from lineage_jax.nn import check_attention
from lineage_jax.sampling.beam import batch_axes, beam_search, length_penalty
from scaling import flops
from tests.nn.closeness import assert_same

SPARSE = NSAConfig(compressed_size=4, stride=2, block_size=4, num_blocks=2, num_local=1, window=3)
BRANCHES = ("compressed", "selected", "window")
VOCAB, ROWS, LENGTH, SOURCE_LENGTH = 67, 4, 14, 5
OF_GPT = GPTConfig(
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    vocab_size=VOCAB,
    max_len=16,
    mlp_dim=48,
    attention="native_sparse",
    sparse=SPARSE,
)
OF_TRANSFORMER = TransformerConfig(
    encoder=StackConfig(num_layers=1, num_heads=2, mlp_dim=24),
    decoder=StackConfig(num_layers=2, num_heads=4, mlp_dim=48),
    embed_dim=32,
    source_vocab_size=23,
    vocab_size=VOCAB,
    max_len=16,
    shared_embeddings=False,
    dropout_rate=0.0,
    attention="native_sparse",
    sparse=SPARSE,
)
RNG = np.random.default_rng(1)
TOKENS = jnp.asarray(RNG.integers(0, VOCAB, (ROWS, LENGTH)), jnp.int32)
SOURCE = jnp.asarray(RNG.integers(0, 23, (ROWS, SOURCE_LENGTH)), jnp.int32)
SOURCE_MASK = jnp.asarray(np.arange(SOURCE_LENGTH) < np.asarray([[5], [2], [4], [1]]))
POSITIONS = jnp.broadcast_to(jnp.arange(LENGTH), TOKENS.shape)
LENGTHS = jnp.asarray([7, 2, 5, 1])  # of prompts
REAL = jnp.arange(8)[None] < LENGTHS[:, None]


@dataclasses.dataclass(frozen=True, eq=False)
class Decoder:
    """One of the two.

    Attributes:
      config: the model's, with native sparse attention.
      module: builds it.
      inputs: what its `init` and its call take.
      logits: of a module, parameters and target tokens, and their mask.
      begin: an empty cache of a module and parameters.
      step: logits and the cache, of tokens at positions, and their mask.
      blocks: its layers, of parameters.
      experiment: as the command line begins with.
    """

    config: Any
    module: Callable[[Any], nn.Module]
    inputs: tuple[jax.Array, ...]
    logits: Callable[..., jax.Array]
    begin: Callable[..., Any]
    step: Callable[..., Any]
    blocks: Callable[[Any], Any]
    experiment: Any

    @functools.cache  # noqa: B019, of two
    def boxed(self, **changes: Any) -> Any:
        """The shapes of its parameters, with the names of their axes."""
        model = self.module(dataclasses.replace(self.config, **changes))
        return jax.eval_shape(model.init, jax.random.key(0), *self.inputs)["params"]

    @functools.cache  # noqa: B019, of two
    def params(self, **changes: Any) -> Any:
        """Every parameter random: zeros and ones would hide mistakes."""
        rng = np.random.default_rng(0)
        return jax.tree.map(
            lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32),
            nn.unbox(self.boxed(**changes)),
        )


def of_gpt(module, params, tokens, mask=None):
    return module.apply({"params": params}, tokens, mask=mask)[0]


def gpt_step(module, params, tokens, positions, cache, mask=None):
    return module.apply({"params": params}, tokens, positions, None, cache, mask=mask)


def of_transformer(module, params, tokens, mask=None):
    return module.apply({"params": params}, SOURCE, tokens, SOURCE_MASK, mask)


@functools.partial(jax.jit, static_argnums=0)
def transformer_start(module, params):
    return module.apply({"params": params}, SOURCE, SOURCE_MASK, LENGTH, method="start")


def transformer_step(module, params, tokens, positions, cache, mask=None):
    inputs = tokens, positions, cache, mask
    return module.apply({"params": params}, *inputs, method="decode")


DECODERS = {
    "gpt": Decoder(
        config=OF_GPT,
        module=GPT,
        inputs=(TOKENS,),
        logits=of_gpt,
        begin=lambda module, params: gpt.empty_cache(module.config, ROWS, LENGTH),
        step=gpt_step,
        blocks=lambda params: params["blocks"],
        experiment=gpt_experiment.tiny,
    ),
    "transformer": Decoder(
        config=OF_TRANSFORMER,
        module=Transformer,
        inputs=(SOURCE, TOKENS, SOURCE_MASK),
        logits=of_transformer,
        begin=transformer_start,
        step=transformer_step,
        blocks=lambda params: params["decoder"]["blocks"],
        experiment=transformer_experiment.tiny,
    ),
}


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request):
    return DECODERS[request.param]


@pytest.fixture(scope="module")
def module(decoder):
    return decoder.module(decoder.config)


@pytest.fixture(scope="module")
def params(decoder):
    return decoder.params()


@pytest.fixture(scope="module")
def forward(decoder, module):
    """Logits of parameters and tokens, and of what is no padding, where that is told."""
    run = jax.jit(functools.partial(decoder.logits, module))
    return lambda params, tokens, real=None: run(
        params, tokens, POSITIONS >= 0 if real is None else real
    )


@pytest.fixture(scope="module")
def full(forward, params):
    return forward(params, TOKENS)


def scored(decoder, module):
    """Logits weighed and summed, of parameters, inputs and weights, with the gradient; and they."""

    def score(params, inputs, weights):
        found = module.apply({"params": params}, *inputs)
        logits = found[0] if decoder.module is GPT else found
        return (weights * logits).sum(), logits

    return jax.jit(jax.value_and_grad(score, has_aux=True))


@pytest.fixture(scope="module")
def gradients(decoder, module):
    return scored(decoder, module)


@pytest.fixture(scope="module")
def step(decoder, module):
    return jax.jit(functools.partial(decoder.step, module))


def test_each_head_has_keys_of_three_branches_and_biases(decoder, params):
    attention = decoder.blocks(params)["attention"]
    kept = {f"{branch}_{what}" for branch in BRANCHES for what in ("key", "value")}
    assert kept | {"query", "out", "gates", "compress_keys", "compress_values"} == set(attention)
    for name in {*kept, "query"}:
        shapes = {kind: leaf.shape for kind, leaf in attention[name].items()}
        assert shapes == {"kernel": (2, 32, 4, 8), "bias": (2, 4, 8)}
    if decoder.module is Transformer:  # the source is read in full
        for name in ("encoder/blocks/attention", "decoder/blocks/cross_attention"):
            heads = functools.reduce(lambda tree, key: tree[key], name.split("/"), params)
            assert set(heads) == {"query", "key", "value", "out"}


def test_where_it_reads_everything_the_model_is_the_one_with_full_attention(decoder):
    everything = dataclasses.replace(SPARSE, num_blocks=4, window=LENGTH)
    config = dataclasses.replace(decoder.config, sparse=everything)
    dense = decoder.module(dataclasses.replace(config, attention="full"))
    params = decoder.params(attention="full")
    expected = jax.jit(functools.partial(decoder.logits, dense))(params, TOKENS)
    run = jax.jit(functools.partial(decoder.logits, decoder.module(config)))
    attention = decoder.blocks(params)["attention"]
    others = decoder.blocks(decoder.params())["attention"]
    for place, branch in list(enumerate(BRANCHES))[1:]:
        # That branch's gate is 1 and the others' 0, to a hundred digits.
        bias = jnp.full_like(others["gates"]["bias"], -300).at[..., place].set(300)
        gates = {"kernel": jnp.zeros_like(others["gates"]["kernel"]), "bias": bias}
        mine = {f"{branch}_{what}": attention[what] for what in ("key", "value")}
        mine |= {"query": attention["query"], "out": attention["out"], "gates": gates}
        sparse = {**decoder.blocks(params), "attention": {**others, **mine}}
        if decoder.module is GPT:
            theirs = {**params, "blocks": sparse}
        else:
            theirs = {**params, "decoder": {**params["decoder"], "blocks": sparse}}
        assert_same(run(theirs, TOKENS), expected)


def test_the_gradient_with_respect_to_the_future_is_exactly_zero(decoder, gradients, params):
    # Each position its own row of the table, so that each has its gradient.
    ids = jnp.broadcast_to(jnp.arange(LENGTH), TOKENS.shape)
    inputs = tuple(ids if one is TOKENS else one for one in decoder.inputs)
    for at in (0, 6, LENGTH - 1):
        # Of words that are not read: they only score.
        weights = jnp.zeros((ROWS, LENGTH, VOCAB)).at[:, at, LENGTH:].set(1)
        _, found = gradients(params, inputs, weights)
        seen = np.abs(found["embed"]["table"][:LENGTH]).max(-1)
        np.testing.assert_array_equal(seen[at + 1 :], 0)
        assert (seen[max(0, at - 4) : at + 1] > 0).all()  # two layers' windows read the last five


def test_cached_decoding_is_the_full_forward_pass_token_by_token(
    decoder, module, step, params, full
):
    cache = decoder.begin(module, params)
    past = cache if decoder.module is GPT else cache.past
    assert isinstance(past, NSACache) and past.pending_keys.shape == (2, ROWS, 4, 4, 8)
    for t in range(LENGTH):
        logits, cache = step(params, TOKENS[:, t : t + 1], POSITIONS[:, t : t + 1], cache)
        assert_same(logits[:, 0], full[:, t])


def test_prompts_of_unequal_length_go_on_each_at_its_own_position(
    decoder, module, step, params, full
):
    prompt = jnp.where(REAL, TOKENS[:, :8], VOCAB - 1)  # padded on the right with any id
    cache = decoder.begin(module, params)
    logits, cache = step(params, prompt, POSITIONS[:, :8], cache, REAL)
    assert_same(logits[REAL], full[:, :8][REAL])
    for t in range(7):  # over the padding, and far enough to compress what was pending
        at = (LENGTHS + t)[:, None]
        logits, cache = step(params, jnp.take_along_axis(TOKENS, at, axis=1), at, cache)
        assert_same(logits, jnp.take_along_axis(full, at[..., None], axis=1))


def test_ids_of_padding_are_not_seen(forward, params, full):
    real = jnp.asarray([[14], [3], [9], [1]]) > POSITIONS
    found = forward(params, jnp.where(real, TOKENS, (TOKENS + 1) % VOCAB), real)
    again = forward(params, jnp.where(real, TOKENS, (TOKENS + 2) % VOCAB), real)
    np.testing.assert_array_equal(found[real], again[real])
    assert_same(found[real], full[real])


def test_documents_that_share_a_block_do_not_meet():
    params = DECODERS["gpt"].params()
    segment_ids = jnp.asarray(np.repeat([1, 2, 3], (5, 4, 5)))[None].repeat(ROWS, 0)

    @jax.jit
    def forward(params, tokens, segment_ids):
        return GPT(OF_GPT).apply({"params": params}, tokens, None, segment_ids)[0]

    before = forward(params, TOKENS, segment_ids)
    other = TOKENS.at[:, 5:9].set((TOKENS[:, 5:9] + 1) % VOCAB)
    after = forward(params, other, segment_ids)
    kept = segment_ids != 2
    np.testing.assert_array_equal(before[kept], after[kept])
    assert (before[~kept] != after[~kept]).any(-1).all()


@pytest.mark.parametrize("decoder", ["transformer"], indirect=True)
def test_beams_have_the_scores_that_their_tokens_have_without_a_cache(
    decoder, module, params, forward
):
    end, count, start = 5, 3, jnp.asarray([1, 7, 3, 60])

    def begin(rows):
        inputs = SOURCE[:rows], SOURCE_MASK[:rows], LENGTH
        return module.apply({"params": params}, *inputs, method="start")

    axes = batch_axes(begin)

    @jax.jit
    def search(params, cache, start):
        step = functools.partial(decoder.step, module, params)
        return beam_search(step, cache, axes, start, LENGTH, end, num_beams=count)

    ids, scores = search(params, decoder.begin(module, params), start)  # B K N, B K
    changed = 0
    for beam in range(count):
        first = jnp.concatenate([start[:, None], ids[:, beam, :-1]], axis=1)
        log_probs = jax.nn.log_softmax(forward(params, first), axis=-1)
        each = jnp.take_along_axis(log_probs, ids[:, beam, :, None], axis=-1)[..., 0]  # B N
        ended = ids[:, beam] == end
        size = jnp.where(ended.any(-1), ended.argmax(-1) + 1, LENGTH)
        total = jnp.where(size[:, None] > POSITIONS, each, 0).sum(-1)
        np.testing.assert_allclose(scores[:, beam], total / length_penalty(size, 0.6), rtol=1e-5)
        changed += int((ids[:, beam] != ids[:, 0]).any())
    assert changed == count - 1  # beams that went on with another's cache among them


def test_sharded_over_eight_devices_is_one_device(decoder, module, forward, gradients, params):
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    weights = jnp.asarray(RNG.standard_normal((ROWS, LENGTH, VOCAB)), jnp.float32)

    def sharded(run, *inputs):
        with sharding.use(mesh):
            placed = jax.device_put(params, sharding.shardings(decoder.boxed(), mesh))
            rows = nn.logical_to_mesh_sharding(P("batch"), mesh)
            return run(placed, *jax.device_put(inputs, rows))

    if decoder.module is Transformer:  # the gradients of its layer are those of the other's
        run = jax.jit(functools.partial(decoder.logits, module))
        assert_same(sharded(run, TOKENS), forward(params, TOKENS))
        return
    whole = gradients(params, decoder.inputs, weights)
    found = sharded(scored(decoder, module), decoder.inputs, weights)
    assert_same(found[0], whole[0])
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(whole[1]))
    for one, other in zip(jax.tree.leaves(found[1]), jax.tree.leaves(whole[1]), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * largest)


def test_a_mesh_that_splits_the_sequence_is_refused(decoder, module, params):
    mesh = sharding.make_mesh(sharding.MeshConfig(data=4, context=2))
    with sharding.use(mesh), pytest.raises(ValueError, match="wanted context=1, got context=2"):
        jax.eval_shape(functools.partial(decoder.logits, module), params, TOKENS)


def test_half_precision_gives_float32_logits(decoder, params):
    half = decoder.module(dataclasses.replace(decoder.config, dtype="bfloat16"))
    logits = jax.eval_shape(functools.partial(decoder.logits, half), params, TOKENS)
    assert logits.dtype == jnp.float32


def test_a_step_lowers_the_loss(decoder, forward, gradients, params, full):
    targets = jax.nn.one_hot(jnp.roll(TOKENS, -1, axis=1), VOCAB)

    def loss(logits):
        return -(targets * jax.nn.log_softmax(logits)).sum(-1).mean()

    before, weights = jax.value_and_grad(loss)(full)
    (_, logits), found = gradients(params, decoder.inputs, weights)
    assert_same(logits, full)
    after = jax.tree.map(lambda p, g: p - 0.03 * g, params, found)
    assert loss(forward(after, TOKENS)) < before - 0.01
    moved = jax.tree_util.tree_leaves_with_path(decoder.blocks(found)["attention"])
    assert all(
        jnp.abs(leaf).max() > 0
        for path, leaf in moved
        if "_key']['bias']" not in jax.tree_util.keystr(path)
    )


def test_the_command_line_names_it_and_its_sizes_and_a_run_remembers_them(decoder):
    start = decoder.experiment()
    words = "--model.attention native_sparse --model.sparse.block-size 16 --model.sparse.stride 8"
    words += " --model.sparse.compressed-size 16"
    chosen = options(type(start), start, words.split(), "lineage train")
    expected = NSAConfig(compressed_size=16, stride=8, block_size=16)
    assert (chosen.model.attention, chosen.model.sparse) == ("native_sparse", expected)
    kept = json.loads(json.dumps(dataclasses.asdict(chosen)))
    assert filled(start, kept) == chosen
    del kept["model"]["attention"], kept["model"]["sparse"]  # of a run before there was a choice
    assert filled(start, kept) == start
    boxed, _ = jax.eval_shape(chosen.program().init, jax.random.key(0))
    assert "compress_keys" in decoder.blocks(nn.unbox(boxed))["attention"]
    assert "attention" in settings(chosen.model) and "sparse.window" in settings(chosen.model)
    assert not {"attention", "sparse.window"} & set(settings(start.model))


def test_flops_are_those_of_the_matrices_the_squeezes_and_the_reads():
    found = flops.gpt(OF_GPT, LENGTH)
    heads = 32 * 4 * (8 + 3 * 8 + 3 * 8 + 3 + 8)  # queries, keys, values, gates, out
    squeezes = 7 * 4 * 2 * (4 * 8 * 8 + 8 * 8)  # seven blocks, four heads, keys and values
    products = 2 * 2 * (heads + 2 * 32 * 48) + round(2 * 2 * squeezes / LENGTH)
    reads = sum(flops.keys_read(SPARSE, LENGTH))
    assert found.blocks == products
    assert found.attention == round(2 * 4 * 4 * 8 * reads / LENGTH)
    assert found.head == flops.gpt(dataclasses.replace(OF_GPT, attention="full"), LENGTH).head


def test_it_becomes_no_folder_of_hugging_face_s(decoder, params, tmp_path):
    model = dataclasses.replace(decoder.config, norm_epsilon=1e-5)
    experiment = dataclasses.replace(decoder.experiment(), model=model)
    made = of_run(Saved("run", experiment, 0, params))
    with pytest.raises(ValueError, match="full attention and no other, got attention='native_sp"):
        made.save(tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="attention must be full or native_sparse, got 'flash'"):
        check_attention("flash")


def test_gpt_3_s_local_layers_have_no_place_beside_it():
    message = "wanted local_window=None with native_sparse, whose own is sparse.window, got local"
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(OF_GPT, local_window=3)
