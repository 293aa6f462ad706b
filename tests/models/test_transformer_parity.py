"""The Transformer computes what Marian's does in `transformers`, its tables shared or apart."""

import jax.numpy as jnp
import pytest

from lineage_jax.models.transformer import DecoderBlock, EncoderBlock, to_source
from lineage_jax.nn import Mask
from tests.models.encoder_decoder_parity import cases, check_blocks, check_end_to_end

ODD = dict(
    d_model=30, encoder_layers=3, decoder_layers=1, encoder_attention_heads=5,
    decoder_attention_heads=2, encoder_ffn_dim=31, decoder_ffn_dim=17, activation_function="gelu",
)  # fmt: skip


pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", params=cases(["marian", "marian_apart"], **ODD))
def case(request):
    return request.param()


def test_loss_logits_and_every_gradient_are_those_of_transformers(case):
    check_end_to_end(case)


def test_each_block_and_its_gradients_are_those_of_transformers(case):
    x = {name: jnp.asarray(array) for name, array in case.inputs.items()}
    source_mask, mask = (x[f"{side}attention_mask"].astype(bool) for side in ("", "decoder_"))
    source_index, index = (jnp.arange(m.shape[1])[None] for m in (source_mask, mask))

    def encode(params, x, encoded, layer):
        shared = source_index, Mask(source_index, source_index, readable=source_mask, causal=False)
        return EncoderBlock(case.config).apply({"params": params}, x, shared, None)[0]

    def decode(params, x, encoded, layer):
        reads = Mask(index, index, readable=mask)
        shared = index, reads, encoded, to_source(mask, source_mask, source_mask)
        return DecoderBlock(case.config).apply({"params": params}, x, shared, None)[0]

    check_blocks(case, "encoder", encode, "model.encoder.layers.{}.", 16)
    check_blocks(case, "decoder", decode, "model.decoder.layers.{}.", 26)
