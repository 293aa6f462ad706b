"""What every milestone shares: named axes, scan = loop, sharded = whole, one step that learns.

A milestone enters by its row in `SUBJECTS`; a milestone of `LINEAGE` without one fails here.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from experiments import language, masked, translation
from experiments import ulmfit as ulmfit_experiment
from lineage_jax import sharding
from lineage_jax.kernels import NSAConfig
from lineage_jax.lineage import LINEAGE
from lineage_jax.models import (
    albert,
    bahdanau,
    bert,
    distilbert,
    gpt,
    llama,
    luong,
    moba,
    native_sparse,
    roberta,
    seq2seq,
    t5,
    transformer,
    ulmfit,
)
from lineage_jax.nn import LayerNorm, Mask, RMSNorm, sinusoids
from lineage_jax.sharding import RULES, MeshConfig
from lineage_jax.train.optim import OptimizerConfig, adamw, scale_by_given_learning_rate
from lineage_jax.train.state import TrainState
from lineage_jax.train.step import LossFn, make_train_step, many_steps


@dataclasses.dataclass(frozen=True)
class Subject:
    """What the properties need of a milestone.

    Attributes:
      config: a tiny model, with dropout if the milestone has any, whose widths divide over eight
        devices and whose vocabulary, being odd, does not.
      module: builds the model of a config.
      init: boxed parameters of a model, from a key.
      loss_fn: the objective of a model, as training has it (`train=True`: with dropout) or not.
      batch: 8 rows from a seed, some of whose targets do not count.
      logits: of a model, parameters and a batch.
      by_hand: the same, each block applied in turn in a Python loop; None where depth is no scan.
      refuses: what it says of a mesh that splits the sequence, if it takes none.
    """

    config: Any
    module: Callable[[Any], nn.Module]
    init: Callable[[nn.Module, jax.Array], Any]
    loss_fn: Callable[..., LossFn]
    batch: Callable[[int], Mapping[str, jax.Array]]
    logits: Callable[[nn.Module, Any, Mapping[str, jax.Array]], jax.Array]
    by_hand: Callable[[Any, Any, Mapping[str, jax.Array]], jax.Array] | None
    refuses: str | None = None

    def model(self, **changes) -> nn.Module:
        return self.module(dataclasses.replace(self.config, **changes))


def packed_text(seed: int, rows: int = 8, length: int = 12, vocab_size: int = 67):
    """Rows of two documents each; row r counts about r / 8 of its targets, the first none."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab_size, (rows, length + 1))
    cut = rng.integers(1, length, (rows, 1))
    index = np.arange(length)
    arrays = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.where(index < cut, index, index - cut),
        "segment_ids": 1 + (index >= cut),
        "mask": rng.random((rows, length)) < np.arange(rows)[:, None] / rows,
    }
    return {k: jnp.asarray(v, bool if k == "mask" else jnp.int32) for k, v in arrays.items()}


def some_pairs(seed: int, rows: int = 8, lengths=(10, 12), vocab_size: int = 67):
    """Rows of a source, padded on the right, and a target; row r counts about r / 8 of it."""
    rng = np.random.default_rng(seed)
    source_len, length = lengths
    index = np.arange(source_len)
    tokens = rng.integers(0, vocab_size, (rows, length + 1))
    arrays = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "mask": rng.random((rows, length)) < np.arange(rows)[:, None] / rows,
        "source": rng.integers(0, vocab_size, (rows, source_len)),
        "source_mask": index < rng.integers(1, source_len + 1, (rows, 1)),
    }
    return {k: jnp.asarray(v, bool if "mask" in k else jnp.int32) for k, v in arrays.items()}


def translation_logits(model, params, batch):
    names = ("source", "tokens", "source_mask", "mask")
    return model.apply({"params": params}, *(batch[name] for name in names))


def language_logits(model, params, batch):
    names = ("tokens", "positions", "segment_ids")
    return model.apply({"params": params}, *(batch[name] for name in names))[0]


def shared_by_blocks(batch):
    index, ids = jnp.arange(batch["tokens"].shape[1])[None], batch["segment_ids"]
    return batch["positions"], Mask(index, index, ids, ids)


def gpt_by_hand(config, params, batch):
    shared = shared_by_blocks(batch)
    table = params["embed"]["table"]
    x = table[batch["tokens"]] + params["positions"]["table"][batch["positions"]]
    for layer, window in enumerate(gpt.windows(config)):
        block = jax.tree.map(lambda p, layer=layer: p[layer], params["blocks"])
        x, _ = gpt.Block(config).apply({"params": block}, x, shared, (window, None))
    return LayerNorm().apply({"params": params["final_norm"]}, x) @ table.T


def llama_by_hand(config, params, batch, block_of=llama.Block):
    shared = shared_by_blocks(batch)
    x = params["embed"]["table"][batch["tokens"]]
    for layer in range(config.num_layers):
        block = jax.tree.map(lambda p, layer=layer: p[layer], params["blocks"])
        x, _ = block_of(config).apply({"params": block}, x, shared, None)
    return RMSNorm().apply({"params": params["final_norm"]}, x) @ params["head"]["table"].T


def moba_by_hand(config, params, batch):
    shared, full = shared_by_blocks(batch), moba.full_layers(config)
    x = params["embed"]["table"][batch["tokens"]]
    for layer in range(config.num_layers):
        block = jax.tree.map(lambda p, layer=layer: p[layer], params["blocks"])
        x, _ = moba.Block(config).apply({"params": block}, x, shared, (full[layer], None))
    return RMSNorm().apply({"params": params["final_norm"]}, x) @ params["head"]["table"].T


def transformer_by_hand(config, params, batch):
    def placed(table, ids):
        index = jnp.arange(ids.shape[1])[None]
        return index, 32**0.5 * params[table]["table"][ids] + sinusoids(index, 32)

    def looped(block, x, shared, side, layers):
        for layer in range(layers):
            layer = jax.tree.map(lambda p, layer=layer: p[layer], params[side]["blocks"])
            x, _ = block(config).apply({"params": layer}, x, shared, None)
        return x

    index, x = placed("source_embed", batch["source"])
    reads = Mask(index, index, readable=batch["source_mask"], causal=False)
    encoded = looped(transformer.EncoderBlock, x, (index, reads), "encoder", 2)
    index, x = placed("embed", batch["tokens"])
    reads = Mask(index, index, readable=batch["mask"])
    sources = transformer.to_source(batch["tokens"], batch["source"], batch["source_mask"])
    x = looped(transformer.DecoderBlock, x, (index, reads, encoded, sources), "decoder", 2)
    return x @ params["embed"]["table"].T


def masked_text(seed: int, rows: int = 8, length: int = 12, vocab_size: int = 67):
    """Rows of two parts, padded on the right; row r predicts about r / 8 of its tokens.

    No token is 1, RoBERTa's padding, which has a position of its own.
    """
    rng = np.random.default_rng(seed)
    index = np.arange(length)
    arrays = {
        "tokens": rng.integers(2, vocab_size, (rows, length)),
        "targets": rng.integers(2, vocab_size, (rows, length)),
        "types": index >= rng.integers(1, length, (rows, 1)),
        "mask": index < rng.integers(2, length + 1, (rows, 1)),
        "target_mask": rng.random((rows, length)) < np.arange(rows)[:, None] / rows,
    }
    return {k: jnp.asarray(v, bool if "mask" in k else jnp.int32) for k, v in arrays.items()}


def masked_logits(model, params, batch):
    return model.apply({"params": params}, batch["tokens"], mask=batch["mask"])


def encoder_by_hand(config, params, batch):
    """Of BERT and its children with blocks of their own; all tokens of the first type."""
    tables, head = params["encoder"]["embeddings"], params["masked_lm"]
    index = jnp.arange(batch["tokens"].shape[1])[None]
    first = config.num_positions - config.max_len
    x = tables["tokens"]["table"][batch["tokens"]] + tables["positions"]["table"][first + index]
    if config.num_types:
        x += tables["types"]["table"][0][None, None]
    norm = LayerNorm(config.norm_epsilon)
    x = norm.apply({"params": tables["norm"]}, x)
    reads = Mask(index, index, readable=batch["mask"], causal=False)
    for layer in range(config.num_layers):
        blocks = params["encoder"]["blocks"]
        block = jax.tree.map(lambda p, layer=layer: p[layer], blocks)
        x, _ = bert.Block(config).apply({"params": block}, x, reads, None)
    dense = head["dense"]
    x = x @ dense["kernel"] + dense["bias"][None, None]
    x = norm.apply({"params": head["norm"]}, jax.nn.gelu(x, approximate=False))
    return x @ tables["tokens"]["table"].T + head["bias"][None, None]


def masked_lm(encoder):
    return lambda config: bert.MaskedLM(encoder(config))


MASKED: dict[str, Any] = dict(
    init=masked.init,
    loss_fn=masked.loss_fn,
    batch=masked_text,
    logits=masked_logits,
)
ENCODER: dict[str, Any] = dict(
    num_layers=2, embed_dim=32, num_heads=4, vocab_size=67, max_len=16, dropout_rate=0.1
)
TRANSLATION: dict[str, Any] = dict(
    init=translation.init,
    loss_fn=translation.loss_fn,
    batch=some_pairs,
    logits=translation_logits,
)


def t5_by_hand(config, params, batch):
    def side(name, block, ids, reads, *others):
        stack, norm = params[name], RMSNorm(config.norm_epsilon)
        x = params["embed"]["table"][ids]
        bias = t5.RelativeBias(config).apply({"params": stack["relative_bias"]}, reads)
        for layer in range(2):
            layer = jax.tree.map(lambda p, layer=layer: p[layer], stack["blocks"])
            x, _ = block(config).apply({"params": layer}, x, (reads, bias, *others), None)
        return norm.apply({"params": stack["final_norm"]}, x)

    def index(ids):
        return jnp.arange(ids.shape[1])[None]

    source, tokens = batch["source"], batch["tokens"]
    reads = Mask(index(source), index(source), readable=batch["source_mask"], causal=False)
    encoded = side("encoder", t5.EncoderBlock, source, reads)
    reads = Mask(index(tokens), index(tokens), readable=batch["mask"])
    sources = transformer.to_source(tokens, source, batch["source_mask"])
    x = side("decoder", t5.DecoderBlock, tokens, reads, encoded, sources)
    return x @ params["embed"]["table"].T / 32**0.5


SUBJECTS = {
    "t5": Subject(
        config=t5.T5Config(
            num_encoder_layers=2,
            num_decoder_layers=2,
            embed_dim=32,
            num_heads=4,
            head_dim=6,
            mlp_dim=64,
            vocab_size=67,
            num_buckets=8,
            max_distance=9,
            feed_forward="geglu",
            dropout_rate=0.1,
        ),
        module=t5.T5,
        by_hand=t5_by_hand,
        **TRANSLATION,
    ),
    "bert": Subject(
        config=bert.BertConfig(**ENCODER),
        module=masked_lm(bert.Bert),
        by_hand=encoder_by_hand,
        **MASKED,
    ),
    "roberta": Subject(
        config=roberta.RobertaConfig(**ENCODER),
        module=roberta.masked_lm,
        by_hand=encoder_by_hand,
        **MASKED | dict(loss_fn=functools.partial(masked.loss_fn, first_position=2)),
    ),
    "albert": Subject(
        config=albert.AlbertConfig(**ENCODER, table_dim=24),
        module=masked_lm(albert.Albert),
        by_hand=None,
        **MASKED,
    ),
    "distilbert": Subject(
        config=distilbert.DistilBertConfig(**ENCODER),
        module=masked_lm(distilbert.DistilBert),
        by_hand=encoder_by_hand,
        **MASKED,
    ),
    "seq2seq": Subject(
        config=seq2seq.Seq2SeqConfig(
            num_layers=2,
            embed_dim=24,
            hidden_dim=32,
            source_vocab_size=67,
            vocab_size=67,
            init_scale=0.5,  # four steps from the paper's are hardly seen
        ),
        module=seq2seq.Seq2Seq,
        by_hand=None,
        **TRANSLATION,
    ),
    "bahdanau": Subject(
        config=bahdanau.BahdanauConfig(
            embed_dim=24,
            hidden_dim=32,
            alignment_dim=16,
            maxout_dim=16,
            source_vocab_size=67,
            vocab_size=67,
        ),
        module=bahdanau.Bahdanau,
        by_hand=None,
        **TRANSLATION,
    ),
    "luong": Subject(
        config=luong.LuongConfig(
            num_layers=2,
            embed_dim=24,
            hidden_dim=32,
            source_vocab_size=67,
            vocab_size=67,
            alignment="local_p",
            window=3,
            init_scale=0.5,
            dropout_rate=0.2,
        ),
        module=luong.Luong,
        by_hand=None,
        **TRANSLATION,
    ),
    "transformer": Subject(
        config=transformer.TransformerConfig(
            encoder=transformer.StackConfig(num_layers=2, num_heads=4, mlp_dim=96),
            decoder=transformer.StackConfig(num_layers=2, num_heads=2, mlp_dim=64),
            embed_dim=32,
            source_vocab_size=67,
            vocab_size=67,
            max_len=16,
            shared_embeddings=False,
            # Smooth: in bfloat16 a ReLU has units whose rounding flips them, gradients and all.
            activation="gelu",
            dropout_rate=0.1,
        ),
        module=transformer.Transformer,
        by_hand=transformer_by_hand,
        **TRANSLATION,
    ),
    "ulmfit": Subject(
        config=ulmfit.ULMFiTConfig(
            num_layers=2,
            embed_dim=24,
            hidden_dim=32,
            vocab_size=67,
            max_len=16,
            init_scale=0.5,
            input_dropout_rate=0.1,
            hidden_dropout_rate=0.1,
            dropout_rate=0.1,
            weight_dropout_rate=0.1,
        ),
        module=ulmfit.ULMFiT,
        init=language.init,
        loss_fn=ulmfit_experiment.loss_fn,
        batch=packed_text,
        logits=language_logits,
        by_hand=None,
    ),
    "gpt": Subject(
        config=gpt.GPTConfig(
            num_layers=2,
            embed_dim=32,
            num_heads=4,
            vocab_size=67,
            max_len=16,
            local_window=3,
            dropout_rate=0.1,
        ),
        module=gpt.GPT,
        init=language.init,
        loss_fn=language.loss_fn,
        batch=packed_text,
        logits=language_logits,
        by_hand=gpt_by_hand,
    ),
    "llama": Subject(
        config=llama.LlamaConfig(
            num_layers=2,
            embed_dim=32,
            num_heads=4,
            num_kv_heads=2,
            mlp_dim=96,
            vocab_size=67,
            max_len=16,
        ),
        module=llama.Llama,
        init=language.init,
        loss_fn=language.loss_fn,
        batch=packed_text,
        logits=language_logits,
        by_hand=llama_by_hand,
    ),
    "native_sparse": Subject(
        config=native_sparse.NativeSparseConfig(
            num_layers=2,
            embed_dim=32,
            num_heads=4,
            num_kv_heads=2,
            value_dim=6,
            mlp_dim=96,
            vocab_size=67,
            max_len=16,
            sparse=NSAConfig(
                compressed_size=4, stride=2, block_size=4, num_blocks=2, num_local=1, window=3
            ),
        ),
        module=native_sparse.NativeSparse,
        init=language.init,
        loss_fn=language.loss_fn,
        batch=packed_text,
        logits=language_logits,
        by_hand=functools.partial(llama_by_hand, block_of=native_sparse.Block),
        refuses="takes whole sequences: wanted context=1, got context=2",
    ),
    "moba": Subject(
        config=moba.MobaConfig(
            num_layers=2,
            embed_dim=32,
            num_heads=4,
            num_kv_heads=2,
            mlp_dim=96,
            vocab_size=67,
            max_len=16,
            block_size=3,
            top_k=2,
            full_layers=1,
        ),
        module=moba.Moba,
        init=language.init,
        loss_fn=language.loss_fn,
        batch=packed_text,
        logits=language_logits,
        by_hand=moba_by_hand,
        refuses="takes whole sequences: wanted context=1, got context=2",
    ),
}

# A larger epsilon than any run's: where a gradient is all rounding (a key's bias moves no softmax),
# Adam would else divide noise by noise, and its first step be of either sign.
OPTIMIZER = OptimizerConfig(epsilon=1e-3)
RATE = 1e-2
# Keeps the gradients that it is given as its state, so that a test can see them.
RECORD = optax.GradientTransformation(
    lambda params: params, lambda grads, state, params: (grads, grads)
)
# With few sums of its own to compile: what Adam does on a mesh, it does for all milestones.
RECORDING = optax.chain(RECORD, scale_by_given_learning_rate())
FAR = 1.0  # its rate: clipped gradients are small, and a small move of a parameter is rounding


@pytest.fixture(scope="session", params=[milestone.name for milestone in LINEAGE])
def subject(request) -> Subject:
    return SUBJECTS[request.param]


@pytest.fixture(scope="session")
def boxed(subject):
    return jax.jit(lambda: subject.init(subject.model(), jax.random.key(0)))()


@pytest.fixture(scope="session")
def params(boxed):
    """Random everywhere: biases of zero and scales of one would hide what is done to them."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: leaf + jnp.asarray(0.1 * rng.standard_normal(leaf.shape), leaf.dtype),
        nn.meta.unbox(boxed),
    )


@pytest.fixture(scope="session")
def batch(subject):
    return subject.batch(0)


def loss_and_gradients(model, subject, params, batch):
    """Without dropout."""

    def loss(params):
        return subject.loss_fn(model, train=False)(params, {}, batch, jax.random.key(0))[0]

    return jax.value_and_grad(loss)(params)


def compiled_loss_and_gradients(model, subject, params, batch):
    return jax.jit(lambda params, batch: loss_and_gradients(model, subject, params, batch))(
        params, batch
    )


@pytest.fixture(scope="session")
def plain(subject, params, batch):
    """Loss and gradients of the model as it is, on one device."""
    return compiled_loss_and_gradients(subject.model(), subject, params, batch)


@dataclasses.dataclass
class CountedStep:
    """The compiled training step, and how many times its loss has been traced."""

    step: Callable = None
    traces: int = 0


@pytest.fixture(scope="session")
def counted(subject):
    """The step of training, dropout included."""
    counted = CountedStep()
    loss_fn = subject.loss_fn(subject.model(), train=True)

    def counting(*inputs):
        counted.traces += 1
        return loss_fn(*inputs)

    counted.step = jax.jit(make_train_step(counting, adamw(OPTIMIZER)))
    return counted


def assert_close(ours, theirs, tolerance):
    """Each leaf within `tolerance` of the largest entry in any leaf of theirs."""
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(theirs))

    def check(path, a, b):
        error = float(np.abs(np.asarray(a) - np.asarray(b)).max()) / largest
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error:.1e}"

    jax.tree_util.tree_map_with_path(check, ours, theirs)


def moved(before, after):
    """How far a step went: what a tolerance is then relative to."""
    return jax.tree.map(lambda a, b: np.asarray(b) - np.asarray(a), before, after)


def test_each_parameter_names_its_axes_and_each_name_has_a_rule(boxed):
    leaves = jax.tree_util.tree_leaves_with_path(
        boxed, is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)
    )
    for path, leaf in leaves:
        where = jax.tree_util.keystr(path)
        assert isinstance(leaf, nn.LogicallyPartitioned), f"{where} is not boxed"
        assert len(leaf.names) == leaf.unbox().ndim, where
        assert set(leaf.names) <= set(RULES), f"{where} has names without a rule: {leaf.names}"
        axes = [axis for name in leaf.names for axis in RULES[name]]
        assert len(axes) == len(set(axes)), f"{where} is split twice over one mesh axis"


@pytest.fixture(scope="session")
def scanned(subject):
    """What only milestones with a scan over depth are asked for."""
    if subject.by_hand is None:
        pytest.skip("its layers are no scan")


def test_the_scan_over_depth_is_the_loop_over_depth(scanned, subject, params, batch):
    found = jax.jit(lambda p, b: subject.logits(subject.model(), p, b))(params, batch)
    looped = jax.jit(lambda p, b: subject.by_hand(subject.config, p, b))(params, batch)
    assert_close(found, looped, 1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        dict(unroll=2, remat="full"),
        *(
            pytest.param(dict(remat=x), marks=pytest.mark.slow)
            for x in ("dots", "inner", "attention")
        ),
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_neither_unrolling_nor_recomputing_changes_loss_or_gradients(
    scanned, subject, params, batch, plain, changes
):
    model = subject.model(**changes)
    assert_close(compiled_loss_and_gradients(model, subject, params, batch), plain, 1e-6)


@pytest.fixture(scope="session")
def recorded_step(subject):
    """A step without dropout whose optimiser's state holds the (clipped) gradients that it got."""
    loss_fn = subject.loss_fn(subject.model(), train=False)
    return make_train_step(loss_fn, RECORDING, max_grad_norm=0.1)


@pytest.fixture(scope="session")
def whole(recorded_step, params, batch):
    """The step on one device."""
    return jax.jit(recorded_step)(TrainState.create(params, RECORDING), batch, FAR)


MESHES = (
    MeshConfig(data=2, fsdp=2, tensor=2),
    MeshConfig(data=2, context=2, tensor=2),
    MeshConfig(data=1, stage=2, fsdp=2, context=2),
)
# With the rest of the axes, and others beside stages: for a decoder, for a translator, and for what
# takes whole sequences.
MORE_MESHES = (MeshConfig(data=2, expert=2, context=2), MeshConfig(data=2, stage=2, tensor=2))


def shown(config: MeshConfig) -> str:
    sizes = dataclasses.asdict(config).items()
    return ",".join(f"{axis}={size}" for axis, size in sizes if size > 1)


@pytest.fixture(scope="session")
def check_sharded(subject, boxed, params, batch, recorded_step, whole):
    """Holds the step on a mesh to that on one device."""
    return functools.partial(sharded, subject, boxed, params, batch, recorded_step, whole)


@pytest.mark.parametrize(
    "config", [MESHES[0], *(pytest.param(x, marks=pytest.mark.slow) for x in MESHES[1:])], ids=shown
)
def test_sharded_over_eight_devices_is_one_device(check_sharded, config):
    check_sharded(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    "subject", ["gpt", "transformer", "native_sparse", "moba"], indirect=True, scope="session"
)
@pytest.mark.parametrize("config", MORE_MESHES, ids=shown)
def test_sharded_over_more_meshes_is_one_device(check_sharded, config):
    check_sharded(config)


def sharded(subject, boxed, params, batch, recorded_step, whole, config):
    if config.stage > 1 and subject.by_hand is None:
        pytest.skip("a pipeline is made of a scan over layers")
    mesh = sharding.make_mesh(config)
    rebox = jax.tree.map(
        lambda box, value: box.replace_boxed(value),
        boxed,
        params,
        is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata),
    )
    state = TrainState.create(rebox, RECORDING)
    state = jax.device_put(nn.meta.unbox(state), sharding.shardings(state, mesh))
    arrays = {name: (x.shape, x.dtype) for name, x in batch.items()}
    rows = sharding.Feed(sharding.named(arrays, ("batch", "length")), mesh)(
        {name: np.asarray(x) for name, x in batch.items()}
    )
    with sharding.use(mesh):
        if subject.refuses is not None and config.context > 1:
            with pytest.raises(ValueError, match=subject.refuses):
                jax.jit(recorded_step)(state, rows, FAR)
            return
        new, metrics = jax.jit(recorded_step)(state, rows, FAR)

    # The same sums in another order: float32 rounding (1.2e-7) of some hundred terms. A reduction
    # over the wrong axis, or one that is missing, is wrong by a factor.
    for name in ("loss", "grad_norm", "accuracy"):
        assert_close(metrics[name], whole[1][name], 1e-6)
    assert_close(new.opt_state[0], whole[0].opt_state[0], 1e-5)
    assert_close(moved(params, new.params), moved(params, whole[0].params), 1e-4)
    leaves = jax.tree.leaves(state.params)
    assert all(len(leaf.devices()) == 8 for leaf in leaves)
    held = sum(leaf.addressable_shards[0].data.size for leaf in leaves)
    # All axes but `data` split parameters; a half more, for the odd vocabulary and small vectors.
    assert held < 1.5 * config.data / 8 * sum(leaf.size for leaf in leaves)


def test_steps_on_one_batch_lower_its_loss(subject, params, batch, counted):
    state, losses = TrainState.create(params, adamw(OPTIMIZER)), []
    for _ in range(4):
        state, metrics = counted.step(state, batch, RATE)
        total, count = metrics["loss"]
        losses.append(float(total / count))
    assert losses == sorted(losses, reverse=True) and losses[3] < losses[0] - 0.1, losses


def test_a_step_is_traced_once_whatever_the_learning_rate_and_the_batch(subject, params, counted):
    state = TrainState.create(params, adamw(OPTIMIZER))
    for i, rate in enumerate((1e-3, 2e-3, 0.0, 1.0)):
        state, _ = counted.step(state, subject.batch(i), rate)
    assert counted.traces == 1


def test_the_same_seed_gives_the_same_loss_bit_for_bit_and_another_other_dropout(
    subject, params, batch, counted
):
    def losses(seed):
        state, found = TrainState.create(params, adamw(OPTIMIZER), seed=seed), []
        for i in range(3):
            state, metrics = counted.step(state, subject.batch(i), RATE)
            found.append(float(metrics["loss"][0]))
        return found

    assert losses(5) == losses(5)
    dropout = getattr(subject.config, "dropout_rate", 0) > 0
    assert all((a != b) is dropout for a, b in zip(losses(5), losses(6), strict=True))


@pytest.mark.parametrize(
    "subject", ["ulmfit", "t5", "native_sparse"], indirect=True, scope="session"
)
def test_many_steps_in_one_program_are_the_steps_one_by_one(subject, params, counted):
    batches, rates = [subject.batch(i) for i in range(3)], jnp.asarray([1e-2, 0.0, 3e-2])
    one = TrainState.create(params, adamw(OPTIMIZER), seed=3)
    losses = []
    for batch, rate in zip(batches, rates, strict=True):
        one, metrics = counted.step(one, batch, rate)
        losses.append(metrics["loss"][0])
    state = TrainState.create(params, adamw(OPTIMIZER), seed=3)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    many, metrics = jax.jit(many_steps(counted.step))(state, stacked, rates)
    assert int(many.step) == 3
    assert_close(metrics["loss"][0], jnp.stack(losses), 1e-6)
    assert_close(many.params, one.params, 1e-6)


def test_bfloat16_compute_gives_float32_logits_and_a_close_loss(subject, params, batch, plain):
    model = subject.model(dtype="bfloat16")
    loss, gradients = compiled_loss_and_gradients(model, subject, params, batch)
    logits = jax.eval_shape(lambda: subject.logits(model, params, batch))
    assert logits.dtype == jnp.float32 and loss.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradients))
    # bfloat16 has 8 bits: 2^-8 per product, averaged over the tokens.
    assert 0 < abs(float(loss / plain[0]) - 1) < 2**-8
    assert_close(gradients, plain[1], 2**-4)


@pytest.mark.parametrize(  # one of each objective
    "subject", ["t5", "roberta", "ulmfit", "llama"], indirect=True, scope="session"
)
def test_eight_micro_batches_of_unequal_masks_are_the_whole_batch(subject, params, batch, whole):
    loss_fn = subject.loss_fn(subject.model(), train=False)
    step = make_train_step(loss_fn, RECORDING, accumulate=8, max_grad_norm=0.1)
    state, metrics = jax.jit(step)(TrainState.create(params, RECORDING), batch, FAR)
    counted = batch.get("target_mask", batch["mask"])
    assert metrics["loss"][1] == counted.sum()
    assert_close(metrics["loss"], whole[1]["loss"], 1e-6)
    assert_close(moved(params, state.params), moved(params, whole[0].params), 1e-4)
