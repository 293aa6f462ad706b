"""Data: text and tokens in, batches of NumPy arrays out; nothing here knows of jax."""

from lineage_jax.data.packing import Batches
from lineage_jax.data.sources import (
    Corpus,
    Document,
    read_huggingface,
    read_text,
    split_documents,
)
from lineage_jax.data.standard_library import python_text
from lineage_jax.data.text import TextData, TextDataset, load_text
from lineage_jax.data.token_files import read_tokens, write_tokens
from lineage_jax.data.tokenizers import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    load_tokenizer,
    train_bpe,
)
from lineage_jax.data.tokens import (
    TokenStream,
    split_tokens,
    tokenize,
    tokenize_cached,
)

__all__ = [
    "Batches",
    "ByteTokenizer",
    "Corpus",
    "Document",
    "HuggingFaceTokenizer",
    "TextData",
    "TextDataset",
    "TokenStream",
    "Tokenizer",
    "load_text",
    "load_tokenizer",
    "python_text",
    "read_huggingface",
    "read_text",
    "read_tokens",
    "split_documents",
    "split_tokens",
    "tokenize",
    "tokenize_cached",
    "train_bpe",
    "write_tokens",
]
