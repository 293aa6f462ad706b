"""Makes the golden folders of encoder-decoders: `python tests/golden/encoder_decoders.py`.

As `make.py` has it, but for what two stacks need: source and target are padded apart, and hidden
states are named encoder.hidden.<i> and decoder.hidden.<i>, their gradients <side>.hidden_grad.<i>.
"""

import json
import pathlib
from typing import Any

import numpy as np

from tests.golden.make import first, weights

FOLDER = pathlib.Path(__file__).parent
PADDING = 5

MARIAN = dict(
    model_type="marian", vocab_size=67, d_model=15, encoder_layers=2, decoder_layers=3,
    encoder_attention_heads=3, decoder_attention_heads=5, encoder_ffn_dim=19, decoder_ffn_dim=23,
    max_position_embeddings=16, activation_function="swish", scale_embedding=True,
    dropout=0.0, pad_token_id=PADDING, decoder_start_token_id=PADDING, eos_token_id=0,
    forced_eos_token_id=0,
)  # fmt: skip
T5 = dict(
    model_type="t5", vocab_size=61, d_model=15, num_layers=2, num_decoder_layers=3, num_heads=5,
    d_kv=4, d_ff=19, relative_attention_num_buckets=7, relative_attention_max_distance=6,
    feed_forward_proj="relu", layer_norm_epsilon=1e-3, dropout_rate=0.0, pad_token_id=PADDING,
    decoder_start_token_id=PADDING, eos_token_id=0, tie_word_embeddings=True,
)  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "marian": MARIAN,
    "marian_apart": dict(
        MARIAN, decoder_vocab_size=53, share_encoder_decoder_embeddings=False,
        activation_function="relu", scale_embedding=False,
    ),
    "t5": T5,
    "t5_v1_1": dict(T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
}  # fmt: skip


def inputs(source_size: int, target_size: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Four pairs: whole, padded on the right, on the left, and in the middle of the source."""
    rng = np.random.default_rng(seed)
    source_kept, kept = np.ones((4, 11), np.int32), np.ones((4, 8), np.int32)
    source_kept[1, -4:] = source_kept[2, :3] = source_kept[3, 5:8] = 0
    kept[1, -3:] = kept[3, -1:] = 0

    def ids(size: int, shape: tuple[int, ...]) -> np.ndarray:
        found = rng.integers(0, size, shape).astype(np.int32)
        return np.where(found == PADDING, PADDING + 1, found)  # torch looks it up without gradient

    return {
        "input_ids": ids(source_size, source_kept.shape),
        "attention_mask": source_kept,
        "decoder_input_ids": ids(target_size, kept.shape),
        "decoder_attention_mask": kept,
        "targets": rng.integers(0, target_size, kept.shape).astype(np.int32),
        "target_mask": kept.astype(bool) & (rng.random(kept.shape) < 0.8),
    }


def reference(config: dict, arrays: dict[str, np.ndarray], seed: int = 0):
    """Random weights, and what `transformers` computes with them: the model, and arrays by name."""
    import torch
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    torch.manual_seed(seed)
    given = {name: value for name, value in config.items() if name != "model_type"}
    given = AutoConfig.for_model(config["model_type"], **given)
    model = AutoModelForSeq2SeqLM.from_config(given, attn_implementation="eager").eval()
    if config["model_type"] == "t5" and not config["tie_word_embeddings"]:
        # They make it the table whatever the config says, until a folder has both.
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "embed_positions" not in name:
                scale = name.endswith("weight") and "norm" in name
                # Of tokens that hardly differ, or that differ much, attention gets no gradient.
                table = "embed" in name or "shared" in name
                wide = table and not config.get("scale_embedding")
                std = 1.0 if wide else 1.2 * config["d_model"] ** -0.5
                value.copy_(float(scale) + std * torch.randn_like(value))
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.copy_(torch.randn_like(model.final_logits_bias))

    hidden: dict[str, Any] = {}

    def keep(side: str, index: int, x: Any) -> None:
        x.retain_grad()
        hidden[f"{side}.hidden.{index}"] = x

    for side, blocks in sides(model).items():
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda _, x, s=side, i=i: keep(s, i, x[0]))
        count = len(blocks)
        blocks[-1].register_forward_hook(lambda _, x, y, s=side, n=count: keep(s, n, first(y)))
    names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
    logits = model(**{name: torch.tensor(arrays[name]).long() for name in names}).logits
    counted = torch.tensor(arrays["target_mask"])
    targets = torch.tensor(arrays["targets"]).long()
    loss = torch.nn.functional.cross_entropy(logits[counted], targets[counted])
    loss.backward()

    expected = {"loss": loss, "logits": logits}
    for name, x in hidden.items():
        expected |= {name: x, name.replace("hidden", "hidden_grad"): x.grad}
    for name, value in model.named_parameters():
        if value.grad is not None:
            expected[f"grad.{name}"] = value.grad
    return model, {name: x.detach().numpy().copy() for name, x in expected.items()}


def sides(model) -> dict[str, Any]:
    """The blocks of the encoder and of the decoder."""
    whole = getattr(model, "model", model)
    stacks = {"encoder": whole.encoder, "decoder": whole.decoder}
    return {side: getattr(x, "layers", None) or x.block for side, x in stacks.items()}


def tensors(model) -> dict[str, np.ndarray]:
    """As a folder holds them: parameters and the bias of the scores, without fixed positions."""
    found = {k: x for k, x in weights(model).items() if "embed_positions" not in k}
    if hasattr(model, "final_logits_bias"):
        found["final_logits_bias"] = model.final_logits_bias.numpy().copy()
    return found


def sizes(config: dict) -> tuple[int, int]:
    """Of the vocabularies of source and target."""
    return config["vocab_size"], config.get("decoder_vocab_size", config["vocab_size"])


def main() -> None:
    from safetensors.numpy import save_file

    for name, config in CONFIGS.items():
        folder = FOLDER / name
        if folder.exists():  # made by another version, it may differ in its last bits
            continue
        folder.mkdir()
        arrays = inputs(*sizes(config))
        model, expected = reference(config, arrays)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors(model), folder / "model.safetensors", {"format": "pt"})
        save_file(arrays, folder / "inputs.safetensors")
        save_file(expected, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
