"""Makes the golden folders beside this file: `python tests/golden/make.py` (the extra `oracle`).

Each folder holds a tiny model of `transformers` in its own format (config.json, model.safetensors),
the inputs, and what that library computed from them (expected.safetensors):

    loss                 mean cross-entropy of the kept targets, nats per token
    logits               B T V; of an encoder, each of its outputs under the name it has there
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
GPT1 = dict(
    ODD, model_type="openai-gpt", n_layer=3, n_embd=15, n_head=5, n_positions=16,
    layer_norm_epsilon=1e-3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip
GPT2 = dict(GPT1, model_type="gpt2", n_inner=37)
CONFIGS = {
    "gpt1": GPT1,
    "gpt2": GPT2,
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
"""What the folders of decoders hold; GPT-Neo's layers, global and local in turn, are GPT-3's. In
LLaMA's, the heads together are wider than the residual stream, and turn fast enough to show in 13
tokens; where they are scaled, one pair is fast, one slow, and one between."""

QUIET = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
BERT = dict(
    QUIET, vocab_size=67, hidden_size=15, num_hidden_layers=3, num_attention_heads=5,
    intermediate_size=37, max_position_embeddings=16, type_vocab_size=3, layer_norm_eps=1e-3,
    hidden_act="gelu", pad_token_id=None,
)  # fmt: skip
ROBERTA = dict(
    BERT, model_type="roberta", type_vocab_size=1, pad_token_id=3, max_position_embeddings=18,
    hidden_act="gelu_new",
)  # fmt: skip
DISTILBERT = dict(
    model_type="distilbert", vocab_size=67, dim=15, n_layers=3, n_heads=5, hidden_dim=37,
    max_position_embeddings=16, activation="gelu", pad_token_id=None, dropout=0.0,
    attention_dropout=0.0, seq_classif_dropout=0.0, qa_dropout=0.0,
)  # fmt: skip
ENCODERS = {
    "bert": dict(BERT, model_type="bert", architectures=["BertForPreTraining"]),
    "bert_answers": dict(
        BERT, model_type="bert", hidden_act="relu", architectures=["BertForQuestionAnswering"]
    ),
    "roberta": dict(ROBERTA, architectures=["RobertaForMaskedLM"]),
    "roberta_classifier": dict(
        ROBERTA, num_labels=4, architectures=["RobertaForSequenceClassification"]
    ),
    "albert": dict(
        BERT, model_type="albert", embedding_size=7, classifier_dropout_prob=0.0,
        architectures=["AlbertForPreTraining"],
    ),
    "albert_tagger": dict(
        BERT, model_type="albert", embedding_size=21, classifier_dropout_prob=0.0, num_labels=5,
        hidden_act="gelu_new", architectures=["AlbertForTokenClassification"],
    ),
    "distilbert": dict(DISTILBERT, architectures=["DistilBertForMaskedLM"]),
    "distilbert_classifier": dict(
        DISTILBERT, num_labels=3, architectures=["DistilBertForSequenceClassification"]
    ),
}  # fmt: skip
"""What the folders of encoders hold. A `pad_token_id` would keep `torch` from giving that row of a
table its gradient; RoBERTa must have one, and no token that is read is it."""

CLASSIFIERS = {
    "gpt1_classifier": dict(
        GPT1, pad_token_id=3, num_labels=4, architectures=["OpenAIGPTForSequenceClassification"]
    ),
    "gpt2_classifier": dict(
        GPT2, pad_token_id=3, num_labels=3, architectures=["GPT2ForSequenceClassification"]
    ),
}
"""What the folders of decoders that tell labels apart hold: they read the last token that is not
padding's."""


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


def encoder_inputs(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """The same rows with types, a label for each, and where an answer starts and ends.

    RoBERTa, which counts positions itself, has its padding's id where they have padding.
    """
    rng = np.random.default_rng(seed + 100)
    arrays = inputs(config["vocab_size"], seed=seed)
    num_rows, length = arrays["input_ids"].shape
    if config["model_type"] == "roberta":
        padding = config["pad_token_id"]
        arrays["attention_mask"][2, 0] = 1  # a classifier reads it, and padding's row is not taught
        tokens, kept = arrays["input_ids"], arrays["attention_mask"] == 1
        tokens = np.where(tokens == padding, padding + 1, tokens)
        arrays["input_ids"] = np.where(kept, tokens, padding).astype(np.int32)
        del arrays["position_ids"]
    if config["model_type"] != "distilbert":
        types = rng.integers(0, config["type_vocab_size"], (num_rows, length))
        arrays["token_type_ids"] = types.astype(np.int32)
    arrays["label"] = (rng.permutation(num_rows) % config.get("num_labels", 2)).astype(np.int32)
    arrays["ends"] = rng.integers(0, length, (2, num_rows)).astype(np.int32)
    return arrays


def encoder_labels(name: str, arrays: dict[str, np.ndarray], num_labels: int) -> dict:
    """What a class of theirs compares its outputs with, under the names of its arguments."""
    missing = -100  # what they leave out of a mean
    tokens = np.where(arrays["target_mask"], arrays["targets"], missing)
    if name.endswith("ForQuestionAnswering"):
        return dict(zip(("start_positions", "end_positions"), arrays["ends"], strict=True))
    if name.endswith("ForSequenceClassification"):
        return {"labels": arrays["label"]}
    if name.endswith("ForTokenClassification"):
        return {"labels": np.where(tokens == missing, missing, tokens % num_labels)}
    pair = {"Bert": "next_sentence_label", "Albert": "sentence_order_label"}
    pairs = {pair[name.removesuffix("ForPreTraining")]: arrays["label"]} if "Pre" in name else {}
    return {"labels": tokens, **pairs}


INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def encoder_reference(config: dict, arrays: dict[str, np.ndarray], seed: int = 0):
    """Random weights, and what `transformers` computes with them: every output under its name.

    Returns:
      The model, and the expected arrays by name.
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    (name,) = config["architectures"]
    given = {key: x for key, x in config.items() if key not in ("model_type", "architectures")}
    given = transformers.AutoConfig.for_model(config["model_type"], **given)
    given._attn_implementation = "eager"
    model = getattr(transformers, name)(given).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            scale = key.endswith("weight") and "norm" in key.lower()
            value.copy_(float(scale) + 0.3 * torch.randn_like(value))

    hidden = []
    for block in encoder_layers(model):
        block.register_forward_pre_hook(lambda _, x: hidden.append(x[0]))
    model.base_model.register_forward_hook(lambda _, x, y: hidden.append(y.last_hidden_state))
    told = {key: arrays[key] for key in INPUTS if key in arrays}
    told |= encoder_labels(name, arrays, given.num_labels)
    outputs = model(**{key: torch.tensor(x).long() for key, x in told.items()})
    for x in hidden:
        x.retain_grad()
    outputs.loss.backward()

    expected = dict(outputs)
    for i, x in enumerate(hidden):
        expected |= {f"hidden.{i}": x, f"hidden_grad.{i}": x.grad}
    expected |= {f"grad.{key}": value.grad for key, value in model.named_parameters()}
    return model, {key: x.detach().numpy().copy() for key, x in expected.items()}


def classifier_inputs(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """The same rows with a label for each, and padding's id where there is padding alone."""
    arrays = inputs(config["vocab_size"], seed=seed)
    padding, tokens = config["pad_token_id"], arrays["input_ids"]
    tokens = np.where(tokens == padding, padding + 1, tokens)
    kept = arrays["attention_mask"] == 1
    label = np.arange(len(tokens)) % config["num_labels"]
    return {
        "input_ids": np.where(kept, tokens, padding).astype(np.int32),
        "attention_mask": arrays["attention_mask"],
        "position_ids": arrays["position_ids"],
        "label": label.astype(np.int32),
    }


def classifier_reference(config: dict, arrays: dict[str, np.ndarray], seed: int = 0):
    """Random weights, and what `transformers` computes with them: loss, logits and gradients.

    Returns:
      The model, and the expected arrays by name.
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    (name,) = config["architectures"]
    given = {key: x for key, x in config.items() if key not in ("model_type", "architectures")}
    given = transformers.AutoConfig.for_model(config["model_type"], **given)
    given._attn_implementation = "eager"
    model = getattr(transformers, name)(given).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            scale = key.endswith("weight") and "ln_" in key
            value.copy_(float(scale) + 0.3 * torch.randn_like(value))
    told = {key: torch.tensor(arrays[key]).long() for key in INPUTS if key in arrays}
    outputs = model(**told, labels=torch.tensor(arrays["label"]).long())
    outputs.loss.backward()
    expected = {"loss": outputs.loss, "logits": outputs.logits}
    expected |= {f"grad.{key}": value.grad for key, value in model.named_parameters()}
    return model, {key: x.detach().numpy().copy() for key, x in expected.items()}


def encoder_layers(model):
    """The blocks; the one of ALBERT, which is called again and again."""
    base = model.base_model
    if hasattr(base, "transformer"):
        return base.transformer.layer
    if hasattr(base.encoder, "layer"):
        return base.encoder.layer
    return base.encoder.albert_layer_groups[0].albert_layers


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

    for name, config in {**CONFIGS, **ENCODERS, **CLASSIFIERS}.items():
        folder = FOLDER / name
        if folder.exists():  # made by another version, it may differ in its last bits
            continue
        folder.mkdir()
        if name in ENCODERS:
            arrays = encoder_inputs(config)
            model, expected = encoder_reference(config, arrays)
        elif name in CLASSIFIERS:
            arrays = classifier_inputs(config)
            model, expected = classifier_reference(config, arrays)
        else:
            arrays = inputs(config["vocab_size"])
            model, expected = reference(config, arrays)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(weights(model), folder / "model.safetensors", {"format": "pt"})
        save_file(arrays, folder / "inputs.safetensors")
        save_file(expected, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
