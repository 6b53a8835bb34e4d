"""Real text that every machine has: the source of Python's standard library.

Files are split by a hash of their name into training and validation, turned into tokens by a small
byte-level BPE that is trained on the training files, and kept in the run's folder. The yardstick is
a byte trigram model of the same training files with Witten-Bell smoothing.

Source: Witten and Bell (1991), The zero-frequency problem, method C.
"""

import hashlib
import json
import math
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer

VALIDATION_SHARE = 10
"""One file in so many is for validation."""
SKIPPED_FOLDERS = {
    "site-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "encodings",
    "pydoc_data",
}


@dataclass
class Corpus:
    """Tokens of both splits.

    Attributes:
        train: Token ids, `[train tokens]`.
        validation: Token ids, `[validation tokens]`.
        token_bytes: Bytes of each token id, `[vocabulary]`.
        tokenizer: Text to ids and back.
    """

    train: torch.Tensor
    validation: torch.Tensor
    token_bytes: torch.Tensor
    tokenizer: ByteLevelBPETokenizer


def split_text() -> tuple[str, str]:
    """Return the training and the validation text."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts: tuple[list[str], list[str]] = ([], [])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED_FOLDERS & set(name.parts):
            continue
        number = int(hashlib.sha256(str(name).encode()).hexdigest(), 16)
        texts[number % VALIDATION_SHARE == 0].append(path.read_text(errors="replace"))
    return "\n".join(texts[0]), "\n".join(texts[1])


def prepare(folder: Path, vocabulary: int) -> None:
    """Train the tokenizer and write the tokens to `folder`, once."""
    if (folder / "corpus.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    train, validation = split_text()
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        train.splitlines(keepends=True), vocab_size=vocabulary, show_progress=False
    )
    tokenizer.save_model(str(folder))
    for name, text in (("train", train), ("validation", validation)):
        lines = tokenizer.encode_batch(text.splitlines(keepends=True))
        ids = np.concatenate([np.asarray(line.ids, dtype=np.int32) for line in lines])
        np.save(folder / f"{name}.npy", ids)
    (folder / "corpus.json").write_text(
        json.dumps(
            {"train_bytes": len(train.encode()), "validation_bytes": len(validation.encode())}
        )
    )


def load(folder: Path) -> Corpus:
    """Read what `prepare` wrote."""
    tokenizer = ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    sizes = [len(tokenizer.id_to_token(i)) for i in range(tokenizer.get_vocab_size())]
    arrays = [np.load(folder / f"{name}.npy") for name in ("train", "validation")]
    train, validation = (torch.from_numpy(a.astype(np.int64)) for a in arrays)
    return Corpus(train, validation, torch.tensor(sizes), tokenizer)


def trigram_bits_per_byte(train: bytes, validation: bytes) -> float:
    """Return the cross-entropy of `validation` under a byte trigram model of `train`, in bits."""
    x, y = (np.frombuffer(t, dtype=np.uint8).astype(np.int64) for t in (train, validation))
    lower = np.full((1, 256), 1 / 256)
    for order in range(3):
        width = 256**order
        counts = np.zeros((width, 256))
        np.add.at(counts, (_context(x, order), x[order:]), 1)
        total, kinds = counts.sum(1, keepdims=True), (counts > 0).sum(1, keepdims=True)
        backoff = np.tile(lower, (width // len(lower), 1))  # row i of the shorter context: i mod
        seen = (total + kinds).clip(min=1)
        lower = np.where(total > 0, (counts + kinds * backoff) / seen, backoff)
    return float(-np.log(lower[_context(y, 2), y[2:]]).mean() / math.log(2))


def _context(x: np.ndarray, order: int) -> np.ndarray:
    """Return the number that the `order` bytes before each byte form, the nearest one lowest."""
    result = np.zeros(len(x) - order, dtype=np.int64)
    for back in range(1, order + 1):
        result += x[order - back : len(x) - back] * 256 ** (back - 1)
    return result
