"""A model with random weights, its tokenizer, and texts of random words: to measure and to test without a download.

python examples/random_model.py --shape bge-base FOLDER
"""

from __future__ import annotations

import argparse
import string
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import BertWordPieceTokenizer
from transformers import AutoModel, BertTokenizerFast, PreTrainedConfig

from hf_flashinfer_attn.tools.bench.workload import chat_lengths, shape_config

__all__ = ["random_texts", "random_words", "save_random_model"]

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# A word in so many is none of the vocabulary, and is cut into pieces.
_RARE = 20


def random_words(count: int, generator: np.random.Generator) -> list[str]:
    """Makes distinct words of 3 to 9 letters."""
    found: dict[str, None] = {}
    letters = np.array(list(string.ascii_lowercase))
    while len(found) < count:
        lengths = generator.integers(3, 10, count)
        found.update(dict.fromkeys("".join(generator.choice(letters, length)) for length in lengths))
    return list(found)[:count]


def save_random_model(folder: Path, config: PreTrainedConfig) -> None:
    """Saves a model of random weights, always the same, and a WordPiece tokenizer with its vocabulary.

    Args:
        folder: To write to.
        config: Of an encoder; its `vocab_size` is at least 100.
    """
    pieces = [*_SPECIAL, *string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
    words = random_words(config.vocab_size - len(pieces), np.random.default_rng(0))
    vocabulary = {piece: index for index, piece in enumerate([*pieces, *words])}
    backend = BertWordPieceTokenizer(vocab=vocabulary)
    longest = config.max_position_embeddings
    BertTokenizerFast(tokenizer_object=backend._tokenizer, model_max_length=longest).save_pretrained(folder)
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)


def random_texts(folder: Path, lengths: Sequence[int]) -> Iterator[str]:
    """Makes texts for a saved model, always the same.

    Args:
        folder: That `save_random_model` wrote.
        lengths: Words of each text, about as many as its tokens.
    """
    vocabulary = BertTokenizerFast.from_pretrained(folder).get_vocab()
    known = sorted(word for word in vocabulary if len(word) > 2 and word.isalpha())
    generator = np.random.default_rng(1)
    words = np.array([*known, *random_words(len(known) // _RARE + 1, np.random.default_rng(2))], dtype=object)
    for length in lengths:
        yield " ".join(words[generator.integers(0, len(words), length)])


def random_lengths(count: int, seed: int = 0) -> list[int]:
    """Draws lengths as of chats: lognormal, median 55, at most 500."""
    return chat_lengths(count, torch.Generator().manual_seed(seed)).clamp(max=500).tolist()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="bge-base")
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    arguments = parser.parse_args()
    save_random_model(arguments.folder, shape_config(arguments.shape, arguments.layers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
