"""What a config trains on."""

from __future__ import annotations

from ..config import Config
from ..data import Corpus, open_corpus


def read_corpus(config: Config) -> Corpus:
    """Opens it. Raises: ValueError: it cannot be read, or is too little; it names the settings."""
    data = config.data
    try:
        corpus = open_corpus(
            data.kind,
            data.files,
            max_bytes=int(data.max_mb * 1e6),
            tokenizer=data.tokenizer,
            token_dtype=data.token_dtype,
            vocab_size=data.vocab_size,
        )
        for split in ("train", "validation"):
            corpus.batch(split, step=0, batch_size=1, seq_len=data.seq_len, seed=0)
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(f"data.files, data.max_mb or data.seq_len: {error}") from error
    return corpus
