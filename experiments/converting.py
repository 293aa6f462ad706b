"""Weights for others to load: a run, or a Hugging Face folder, as a Hugging Face folder."""

import dataclasses
import os
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp

from experiments.saved import Saved, open_model
from experiments.speaking import ENCODERS, SOURCE_TOKENIZER, tokenizers_of
from lineage_jax.data.labelled import LabelledData, read_labels
from lineage_jax.models import bert, gpt, llama, t5, transformer
from lineage_jax.pretrained import Pretrained
from lineage_jax.pretrained.weights import ARCHITECTURES


def convert(source: str | os.PathLike[str], destination: str | os.PathLike[str]) -> str:
    """Writes a run of ours, or a Hugging Face folder, as a Hugging Face folder.

    A translator with a tokenizer for either language has that of the source in a folder of its own.

    Returns:
      A line that says what was written.

    Raises:
      OSError, ValueError: if the source is neither, theirs has no class for it, or the destination
        holds a model already.
    """
    opened = open_model(source)
    if isinstance(opened, Saved) and getattr(opened.experiment.data, "reverse_source", False):
        raise ValueError(f"{source} reads its source last to first, and no class of theirs does")
    made = of_run(opened) if isinstance(opened, Saved) else opened
    made.save(destination)
    if isinstance(opened, Saved):
        tokenizers = tokenizers_of(opened)
        reads, writes = tokenizers[0], tokenizers[-1]
        writes.save(destination)
        if reads is not writes:
            reads.save(os.path.join(destination, SOURCE_TOKENIZER))
    else:
        for pattern in TOKENIZER_FILES:
            for path in pathlib.Path(source).glob(pattern):
                shutil.copy(path, destination)
        if os.path.isdir(reads_by := os.path.join(source, SOURCE_TOKENIZER)):
            shutil.copytree(reads_by, os.path.join(destination, SOURCE_TOKENIZER))
    size = sum(leaf.size for leaf in jax.tree.leaves(made.params))
    return f"{destination}: {made.architecture.name}, {size:,} parameters"


TOKENIZER_FILES = (
    "tokenizer*",
    "*.model",
    "*.spm",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
"""What a Hugging Face folder holds for its tokenizer, and for `generate`."""


def of_run(run: Saved) -> Pretrained:
    """A run as a model that has a class in Hugging Face's library.

    Raises:
      ValueError: if it has none.
    """
    config, params, name = run.experiment.model, run.params, None
    classifies = isinstance(run.experiment.data, LabelledData)
    if classifies and isinstance(config, bert.BertConfig):
        name = "BertForSequenceClassification"
    elif classifies and isinstance(config, gpt.GPTConfig):
        name = ("GPT2" if config.norm_first else "OpenAIGPT") + "ForSequenceClassification"
    elif isinstance(config, gpt.GPTConfig):
        name = "GPT2LMHeadModel" if config.norm_first else "OpenAIGPTLMHeadModel"
        name = name if config.local_window is None else "GPTNeoForCausalLM"
    elif type(config) is llama.LlamaConfig:  # its children have no class
        name = "LlamaForCausalLM" if config.window is None else "MistralForCausalLM"
    elif isinstance(config, t5.T5Config):
        name = "T5ForConditionalGeneration"
    elif isinstance(config, transformer.TransformerConfig):
        name = "MarianMTModel"
        if not config.score_bias:
            config = dataclasses.replace(config, score_bias=True)
            params = {**params, "score_bias": jnp.zeros(config.vocab_size)}
    elif type(config) in ENCODERS:
        name = ENCODERS[type(config)] + ("ForPreTraining" if "pairs" in params else "ForMaskedLM")
    if name is None:
        raise ValueError(f"no class of theirs is a {type(config).__name__}")
    labels: dict[str, Any] = {}
    if classifies:
        labels = {"id2label": dict(enumerate(read_labels(run.experiment.data)))}
    architecture, end = ARCHITECTURES[name], tokenizers_of(run)[-1].end_of_text
    special = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    return Pretrained(
        config=config,
        module=architecture.module(config),
        params=params,
        architecture=architecture,
        theirs={**dict.fromkeys(special, end), **labels},
    )
