"""Data: text and tokens in, batches of NumPy arrays out; nothing here knows of jax."""

from lineage_jax.data.labelled import LabelledData, LabelledDataset, load_labelled
from lineage_jax.data.labelled_batches import LabelledBatches, Marks
from lineage_jax.data.packing import Batches
from lineage_jax.data.pair_batches import PairBatches
from lineage_jax.data.pairs import PairsData, PairsDataset, load_pairs
from lineage_jax.data.parallel_text import ParallelText, read_parallel_text, split_pairs
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
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from lineage_jax.data.tokens import (
    TokenStream,
    split_tokens,
    tokenize,
    tokenize_cached,
)
from lineage_jax.data.train_tokenizers import train_bpe, train_tokenizer

__all__ = [
    "Batches",
    "ByteTokenizer",
    "Corpus",
    "Document",
    "HuggingFaceTokenizer",
    "LabelledBatches",
    "LabelledData",
    "LabelledDataset",
    "Marks",
    "PairBatches",
    "PairsData",
    "PairsDataset",
    "ParallelText",
    "SentencePieceTokenizer",
    "TextData",
    "TextDataset",
    "TokenStream",
    "Tokenizer",
    "load_labelled",
    "load_pairs",
    "load_text",
    "load_tokenizer",
    "python_text",
    "read_huggingface",
    "read_parallel_text",
    "read_text",
    "read_tokens",
    "split_documents",
    "split_pairs",
    "split_tokens",
    "tokenize",
    "tokenize_cached",
    "train_bpe",
    "train_tokenizer",
    "write_tokens",
]
