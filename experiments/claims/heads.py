"""Vaswani et al. 2017: one head of attention is worse than eight."""

import dataclasses

from experiments import transformer
from experiments.study import Claim, Study, find, mean_difference
from experiments.study.translation import TranslationArm, number_pairs
from lineage_jax.models.transformer import StackConfig, Transformer


def claim(study: Study) -> Claim:
    """Vaswani et al. 2017, table 3, rows A: one head of 64 against eight of 8, all else alike.

    Both have the same weights in number and cost the same: heads only share them out.
    """
    # Norms after each sublayer want smaller rates than LSTMs: "tiny" has 2e-3.
    study = dataclasses.replace(study, learning_rates=(1e-3, 3e-3))
    pairs = number_pairs(
        quick=study.quick,
        target_language="de",
        tokenizer="bpe",  # a German number is a word or two
        vocab_size=512,
        source_len=32,
        target_len=24,
    )

    def arm(num_heads):
        side = StackConfig(num_layers=2, num_heads=num_heads, mlp_dim=256)
        model = dataclasses.replace(
            transformer.tiny().model,
            encoder=side,
            decoder=side,
            source_vocab_size=512,
            vocab_size=512,
            max_len=64,
            shared_embeddings=True,
        )
        return TranslationArm(name=f"heads-{num_heads}", module=Transformer(model), data=pairs)

    def findings(one, eight):
        return [
            find(
                "cross-entropy, one head - eight heads, nats per token",
                mean_difference,
                one["loss"],
                eight["loss"],
                wanted=(0.0, None),
            )
        ]

    return study.claim(
        "heads",
        [arm(1), arm(8)],
        findings,
        milestone="transformer",
        statement="one head of attention is worse than eight that cost the same",
        where="Vaswani et al. 2017, table 3, rows A",
        criterion="cross-entropy with one head above that with eight after 400 updates, interval "
        "above 0",
        setting="English to German numbers of 3 to 9 digits, 8000 pairs, byte-pair encoding of 512 "
        "tokens; two layers of 64 on each side; the learning rate of each arm is the best of a "
        "grid on a seed that is not counted",
    )
