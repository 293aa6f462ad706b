"""Makes the golden folders beside this file: `python tests/golden/make.py` (the extra `oracle`).

Each folder holds a tiny model of `transformers` in its own format (config.json, model.safetensors),
the inputs, and what that library computed from them (expected.safetensors):

    loss                 mean cross-entropy of the kept targets, nats per token
    logits               B T V
    hidden.<i>           the residual stream into block i; <num_layers>: out of the last one
    hidden_grad.<i>      the gradient of the loss with respect to it
    grad.<parameter>     the gradient of the loss with respect to each parameter

Every weight is random, norms and biases too: ones and zeros hide mistakes. Widths are odd, padding
lies left, right and in the middle of a row, and positions skip it.
"""

import json
import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent

ODD = dict(vocab_size=67, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True)
LLAMA = dict(
    ODD, model_type="llama", num_hidden_layers=3, hidden_size=20, num_attention_heads=4,
    num_key_value_heads=2, head_dim=6, intermediate_size=37, max_position_embeddings=16,
    rms_norm_eps=1e-3, rope_parameters=dict(rope_type="default", rope_theta=30.0),
)  # fmt: skip
CONFIGS = {
    "gpt1": dict(
        ODD, model_type="openai-gpt", n_layer=3, n_embd=15, n_head=5, n_positions=16,
        layer_norm_epsilon=1e-3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "gpt2": dict(
        ODD, model_type="gpt2", n_layer=3, n_embd=15, n_head=5, n_positions=16, n_inner=37,
        layer_norm_epsilon=1e-3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "gpt_neo": dict(
        ODD, model_type="gpt_neo", num_layers=3, hidden_size=15, num_heads=5,
        max_position_embeddings=16, intermediate_size=37, window_size=3,
        attention_types=[[["global", "local"], 1], [["global"], 1]], layer_norm_epsilon=1e-3,
        resid_dropout=0.0, embed_dropout=0.0, attention_dropout=0.0,
    ),
    "llama": dict(LLAMA, tie_word_embeddings=False),
    "llama_tied": LLAMA,
    "llama_scaled": dict(
        LLAMA, rope_parameters=dict(
            rope_type="llama3", rope_theta=30.0, factor=3.0, low_freq_factor=0.6,
            high_freq_factor=2.0, original_max_position_embeddings=15,
        ),
    ),
    "mistral": dict(
        LLAMA, model_type="mistral", sliding_window=3, tie_word_embeddings=False,
        num_key_value_heads=1,
    ),
}  # fmt: skip
"""What the folders hold; GPT-Neo's layers, global and local in turn, are GPT-3's. In LLaMA's, the
heads together are wider than the residual stream, and turn fast enough to show in 13 tokens; where
they are scaled, one pair is fast, one slow, and one between."""


def inputs(vocab_size: int, length: int = 13, seed: int = 0) -> dict[str, np.ndarray]:
    """Four rows: whole, padded on the right, padded on the left, and padded in the middle."""
    rng = np.random.default_rng(seed)
    kept = np.ones((4, length), np.int32)
    kept[1, -4:] = kept[2, :3] = kept[3, 5:8] = 0
    tokens = rng.integers(0, vocab_size, kept.shape).astype(np.int32)
    counted = kept.astype(bool) & (rng.random(kept.shape) < 0.8)
    return {
        "input_ids": tokens,
        "attention_mask": kept,
        "position_ids": np.maximum(kept.cumsum(1) - 1, 0).astype(np.int32),
        "targets": rng.integers(0, vocab_size, kept.shape).astype(np.int32),
        "target_mask": counted,
    }


def reference(config: dict, arrays: dict[str, np.ndarray], seed: int = 0):
    """Random weights, and what `transformers` computes with them.

    Returns:
      The model, and the expected arrays by name.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    given = {name: value for name, value in config.items() if name != "model_type"}
    given = AutoConfig.for_model(config["model_type"], **given)
    model = AutoModelForCausalLM.from_config(given, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            scale = name.endswith("weight") and ("ln_" in name or "norm" in name)
            value.copy_(float(scale) + 0.3 * torch.randn_like(value))

    blocks, hidden = layers(model), []
    for block in blocks:
        block.register_forward_pre_hook(lambda _, x: hidden.append(x[0]))
    blocks[-1].register_forward_hook(lambda _, x, y: hidden.append(first(y)))
    names = ("input_ids", "attention_mask", "position_ids")
    logits = model(**{name: torch.tensor(arrays[name]).long() for name in names}).logits
    for x in hidden:
        x.retain_grad()
    counted = torch.tensor(arrays["target_mask"])
    targets = torch.tensor(arrays["targets"]).long()
    loss = torch.nn.functional.cross_entropy(logits[counted], targets[counted])
    loss.backward()

    expected = {"loss": loss, "logits": logits}
    for i, x in enumerate(hidden):
        expected |= {f"hidden.{i}": x, f"hidden_grad.{i}": x.grad}
    expected |= {f"grad.{name}": value.grad for name, value in model.named_parameters()}
    return model, {name: x.detach().numpy().copy() for name, x in expected.items()}


def layers(model):
    """The blocks, by the name that they have there."""
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def first(outputs):
    """The hidden states among what a block returns, whether or not there is more."""
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs


def weights(model) -> dict[str, np.ndarray]:
    """The parameters by their names there; what is tied appears once."""
    return {name: value.detach().numpy().copy() for name, value in model.named_parameters()}


def main() -> None:
    from safetensors.numpy import save_file

    for name, config in CONFIGS.items():
        folder = FOLDER / name
        if folder.exists():  # made by another version, it may differ in its last bits
            continue
        folder.mkdir()
        arrays = inputs(config["vocab_size"])
        model, expected = reference(config, arrays)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(weights(model), folder / "model.safetensors", {"format": "pt"})
        save_file(arrays, folder / "inputs.safetensors")
        save_file(expected, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
