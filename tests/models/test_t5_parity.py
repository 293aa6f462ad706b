"""T5 computes what it does in `transformers`: as first published, and version 1.1."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import pytest

from lineage_jax.models.t5 import DecoderBlock, EncoderBlock, RelativeBias, to_source
from lineage_jax.nn import Mask, RMSNorm
from tests.models.encoder_decoder_parity import cases, check_blocks, check_end_to_end, live
from tests.models.parity import Case

# Heads together are not as wide as the stream.
ODD = dict(
    d_model=30, num_layers=3, num_decoder_layers=1, num_heads=3, d_kv=7, d_ff=17,
    relative_attention_num_buckets=10, relative_attention_max_distance=9,
)  # fmt: skip
SILU = pytest.param(
    lambda: live("t5_v1_1", feed_forward_proj="gated-silu"), id="silu", marks=pytest.mark.oracle
)


@dataclasses.dataclass(frozen=True)
class WithoutBiases(Case):
    """A case whose tables of biases are not among its tensors: all blocks have them in common."""

    biases: Mapping[str, np.ndarray]

    def params(self, tensors):
        return super().params({**tensors, **self.biases})


pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", params=[*cases(["t5", "t5_v1_1"], **ODD), SILU])
def case(request):
    return request.param()


def test_loss_logits_and_every_gradient_are_those_of_transformers(case):
    check_end_to_end(case)


def test_each_block_and_its_gradients_are_those_of_transformers(case):
    c, x = case.config, {name: jnp.asarray(array) for name, array in case.inputs.items()}
    source_mask, mask = (x[f"{side}attention_mask"].astype(bool) for side in ("", "decoder_"))
    source_index, index = (jnp.arange(m.shape[1])[None] for m in (source_mask, mask))
    within_source = Mask(source_index, source_index, readable=source_mask, causal=False)
    within_target = Mask(index, index, readable=mask)
    ours = case.params(case.tensors)

    def bias(side, mask):
        return RelativeBias(c).apply({"params": ours[side]["relative_bias"]}, mask)

    def encode(params, x, encoded, layer):
        shared = within_source, bias("encoder", within_source)
        return EncoderBlock(c).apply({"params": params}, x, shared, None)[0]

    def decode(params, x, encoded, layer):
        norm, sources = RMSNorm(c.norm_epsilon), to_source(mask, source_mask, source_mask)
        encoded = norm.apply({"params": ours["encoder"]["final_norm"]}, encoded)
        shared = within_target, bias("decoder", within_target), encoded, sources
        return DecoderBlock(c).apply({"params": params}, x, shared, None)[0]

    biases = {name: x for name, x in case.tensors.items() if "relative" in name}
    tensors = {name: x for name, x in case.tensors.items() if name not in biases}
    blocks = WithoutBiases(case.theirs, tensors, case.inputs, case.expected, biases)
    gated = c.feed_forward != "relu"
    check_blocks(blocks, "encoder", encode, "encoder.block.{}.", 8 + gated)
    check_blocks(blocks, "decoder", decode, "decoder.block.{}.", 13 + gated)
