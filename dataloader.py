"""
Tokenizer, token shards, the mixture and the batches that training reads.

    text --(data/prepare.py)--> DATA/manifest.json, tokenizer.txt, <source>-<split>-00000.bin ...
    shards --> Source: one long stream of tokens, cut into windows of T + 1 tokens
    sources --> Mix: global sample i -> (source, epoch, window), a pure function of (seed, mix, i)
    Mix --> Loader: micro-batches (inputs, targets) of one rank, prefetched by a thread

Nothing has a state beyond the global sample index: a run resumed on any number of ranks sees the same
batches, and seeking to any step costs the same. Rank and world size are arguments.

A shard is a 128-byte header (see HEADER: magic, version, counts, the tokenizer's sha256) and uint16 tokens,
little endian. Every document begins with `<|bos|>`. A window may span documents; there is no document mask.
Validation documents are chosen by a hash of their text, so that no rank or epoch trains on them, and no
re-tokenisation with the same --val-fraction. Without a data folder, the text sample embedded in data/sample/
is tokenised in memory.

Not here: downloading and tokenising corpora (data/prepare.py), the model, the loss. torch is imported where
batches are made, so that the worker processes of data/prepare.py do without it.
"""
import base64
import contextlib
import hashlib
import itertools
import json
import lzma
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken

from common import write_whole

HERE = Path(__file__).parent / "data"
BOS = "<|bos|>"
SHARD_MAGIC = b"poe-toks"
SHARD_VERSION = 1
# 128 bytes
HEADER = np.dtype([("magic", "S8"), ("version", "<u4"), ("vocab_size", "<u4"), ("n_tokens", "<u8"),
                   ("n_documents", "<u8"), ("tokenizer_sha256", "S64"), ("reserved", "V32")])
# the embedded sample: percent of tokens, and the share of its text (126 KB) that is held out
SAMPLE = [{"name": "prose", "weight": 40}, {"name": "encyclopedia", "weight": 30},
          {"name": "code", "weight": 30}]
SAMPLE_VAL_FRACTION = 0.01
# characters encoded at a time: tiktoken's regex overflows its stack near a million spaces
PIECE = 2 ** 18
# the most text that ends where it can be cut, see `cut`
CUT = re.compile(r"(?s).+(?:(?<=\S)(?= )|(?<=[^\W_])(?=\n))")
# The split pattern of our tokenizers is GPT-4's with digits in groups of at most two. FAST_PATTERN finds the
# same matches 1.6 times as fast: the engine runs the group, free of look-around and possessive quantifiers,
# as one automaton. (A possessive quantifier changes nothing here, since what follows each of the two cannot
# match a character that it holds.)
SPLIT_PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
                 r"|\s*[\r\n]|\s+(?!\S)|\s+")
FAST_PATTERN = (r"(?:'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n])|\s+(?!\S)|\s+")
# validation windows are fixed for ever, whatever --seed
VAL_SEED = 20_260_411
# micro-batches
READ_AHEAD = 4


@contextlib.contextmanager
def reading(what, remedy):
    """Raise ValueError, naming what and remedy, where a file that the block reads is missing or damaged."""
    try:
        yield
    except Exception as e:
        raise ValueError(f"{what} cannot be read ({e!r}); {remedy}") from None


# --------------------------------------------------------------------------------------------------
# Tokenizer

class Tokenizer:
    """Byte-level BPE of `vocab_size` ids: the first V - 1 ranks of a rank file, and `<|bos|>` = V - 1.

    A shorter list of merges is itself a valid BPE, so that small models share the one tokenizer file.
    """

    def __init__(self, ranks, pattern):
        """ranks: list of token bytes in order, the 256 single bytes first. pattern: the split regex."""
        self.ranks = ranks
        self.pattern = pattern
        self.bos = len(ranks)
        self.vocab_size = len(ranks) + 1
        self.encoding = tiktoken.Encoding(
            "poe", pat_str=FAST_PATTERN if pattern == SPLIT_PATTERN else pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(ranks)}, special_tokens={BOS: self.bos})
        # special tokens count no bytes
        self.token_bytes = np.array([len(token) for token in ranks] + [0], dtype=np.int64)
        self.sha256 = hashlib.sha256(self.rank_text() + pattern.encode()).hexdigest()

    @classmethod
    def load(cls, folder=HERE, vocab_size=None):
        """Read a folder's tokenizer.txt (lines of base64 token, rank) and tokenizer.json (pattern).

        vocab_size: how many of its ids to take; None takes all, 65,536 at most. Raises ValueError, naming the
        folder.
        """
        with reading(f"the tokenizer in {folder}", "copy it anew"):
            lines = Path(folder, "tokenizer.txt").read_bytes().splitlines()
            table = {int(rank): base64.b64decode(token, validate=True)
                     for token, rank in map(bytes.split, lines)}
            ranks = [table[rank] for rank in range(len(lines))]
            # every byte must be a token: the last of them and bos are the fewest ids that there can be
            least = 2 + max(ranks.index(bytes([b])) for b in range(256))
            most = min(len(ranks) + 1, 2 ** 16)
            vocab_size = vocab_size or most
            pattern = json.loads(Path(folder, "tokenizer.json").read_text())["pattern"]
            # refuses what is no regex
            tokenizer = cls(ranks[:vocab_size - 1], pattern)
        if not least <= vocab_size <= most:
            raise ValueError(f"vocab_size {vocab_size} does not fit the tokenizer in {folder}, which has "
                             f"{most} ids; choose --vocab-size from {least} to {most}")
        return tokenizer

    def rank_text(self):
        """The rank file's content, bytes."""
        return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(self.ranks))

    def files(self):
        """The two files that `load` reads, {name: bytes}."""
        meta = {"name": "poe", "pattern": self.pattern, "special_tokens": [BOS],
                "vocab_size": self.vocab_size}
        return {"tokenizer.txt": self.rank_text(), "tokenizer.json": json.dumps(meta, indent=1).encode()}

    def encode(self, text):
        """bos + ordinary text (text that spells a special token stays plain text), as a list of ids."""
        return self.encode_array(text).tolist()

    def encode_array(self, text):
        """As `encode`, uint16 (n,). Long text is encoded in pieces, see `cut`."""
        # ids fit in 16 bits: see `load`
        parts = [self.encoding.encode_to_numpy(piece, disallowed_special=()).astype(np.uint16)
                 for piece in cut(clean_text(text))]
        return np.concatenate([np.uint16([self.bos]), *parts])

    def encode_documents(self, texts):
        """Concatenate documents, each beginning with bos: uint16 (n,)."""
        return np.concatenate([*map(self.encode_array, texts)])

    def decode_bytes(self, ids):
        """The UTF-8 bytes of ids; bos stands for none."""
        return b"".join(self.ranks[i] for i in ids if i != self.bos)

    def decode(self, ids):
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


def clean_text(text):
    """Replace lone surrogates, which UTF-8 cannot hold, by U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def cut(text):
    """Yield text in pieces of at most PIECE characters, so that their tokens are those of the whole.

    A piece ends before a space that follows something other than white space, or before a newline that
    follows a letter or a digit: no match of a split pattern of GPT-2's or GPT-4's kind lies across it, and
    none looks behind. Text without such a place is cut after PIECE characters, and the tokens at that place
    may differ from those of the whole.
    """
    start = 0
    while start < len(text):
        end = start + PIECE
        match = end < len(text) and CUT.match(text, start, end)
        if match:
            end = match.end()
        yield text[start:end]
        start = end


def is_validation(text, fraction):
    """Whether a document is held out: a function of its text alone."""
    return int(hashlib.sha256(clean_text(text).encode()).hexdigest()[:16], 16) < fraction * 2 ** 64


# --------------------------------------------------------------------------------------------------
# Shards

def _header(tokenizer, n_tokens, n_documents):
    return np.array([(SHARD_MAGIC, SHARD_VERSION, tokenizer.vocab_size, n_tokens, n_documents,
                      tokenizer.sha256.encode(), b"")], HEADER)


def write_shard(path, tokens, n_documents, tokenizer):
    """Write tokens (uint16) as one shard, whole or not at all."""
    header = _header(tokenizer, len(tokens), n_documents)
    write_whole(path, header.tobytes(), np.ascontiguousarray(tokens, dtype="<u2"))


def open_shard(path, tokenizer):
    """Map a shard's tokens, uint16 (n,). Raises OSError or ValueError when it is missing, cut or foreign."""
    with open(path, "rb") as f:
        header = np.frombuffer(f.read(HEADER.itemsize).ljust(HEADER.itemsize), HEADER)
        n_tokens = max(0, f.seek(0, 2) - HEADER.itemsize) // 2
    if header != _header(tokenizer, n_tokens, header["n_documents"][0]):
        raise ValueError(f"{path} was cut, is not a token shard of version {SHARD_VERSION}, or was written "
                         f"with another tokenizer, of {header['vocab_size'][0]} ids, than this one of "
                         f"{tokenizer.vocab_size}; give the --vocab-size of the data, or delete it and run "
                         f"data/prepare.py tokenize again")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER.itemsize, shape=n_tokens)


# --------------------------------------------------------------------------------------------------
# Sources and the mixture

class Source:
    """A stream of tokens made of shards. Window w of length T holds T + 1 of them, from token w T on."""

    def __init__(self, name, weight, shards):
        self.name = name
        self.weight = weight
        self.shards = shards
        # of each shard in the stream, and last the stream's end
        self.starts = np.cumsum([0, *map(len, shards)])
        self.n_tokens = int(self.starts[-1])

    def window(self, w, T):
        """Tokens of window w, uint16 (T + 1,), joined across shards where it crosses an end."""
        start = w * T
        stop = start + T + 1
        # the shards of its first token to that of its last
        first = np.searchsorted(self.starts, start, side="right") - 1
        end = np.searchsorted(self.starts, stop)
        return np.concatenate([self.shards[i][max(0, start - self.starts[i]):stop - self.starts[i]]
                               for i in range(first, end)])


def _mix64(x):
    """splitmix64's finaliser: a bijection of uint64 (arrays), the hash behind every shuffle here."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


def permute(index, n, key):
    """Elements of pseudo-random permutations of range(n), chosen by `key`, in O(1) time and memory.

    A four-round Feistel network on the smallest even-bit domain that holds n, walked until it lands inside.
    index: uint64 (B,) < n. n, key: uint64 (B,), one permutation each. Returns uint64 (B,).
    """
    half = np.array([max(1, (int(size) - 1).bit_length() + 1 >> 1) for size in n], dtype=np.uint64)
    low = (1 << half) - 1
    out = index
    todo = n > 0
    while todo.any():
        left = out >> half
        right = out & low
        for round_key in range(4):
            mixed = left ^ (_mix64(right + _mix64(key + round_key)) & low)
            left = right
            right = mixed
        out = np.where(todo, (left << half) | right, out)
        todo = out >= n
    return out


class Mix:
    """Sources mixed by weight: global sample i maps to a window by arithmetic alone.

    A deck of cards, as many of each source as its weight says, is dealt over and over. Its order is
    stratified: the j-th of a source's c cards is drawn a random place in the j-th c-th of the deck, so the
    count of any source in any prefix stays near its share: within 2.6 of the 991 cards for frontier_v1 (2,000
    seeds), and in every mix within one card more than there are sources. The n-th card of a source takes
    window n of its stream; each epoch of the stream is reshuffled by its own permutation.
    """

    def __init__(self, sources, sequence_len, seed, vocab_size=2 ** 16):
        self.sources = sources
        self.T = sequence_len
        self.seed = seed
        self.vocab_size = vocab_size
        for source in sources:
            if source.n_tokens <= sequence_len:
                raise ValueError(f"source {source.name} has {source.n_tokens} tokens, less than one window "
                                 f"of {sequence_len + 1}; add text to it, drop it, lower --sequence-len or, "
                                 f"for validation, hold out more (data/prepare.py tokenize --val-fraction) "
                                 f"before training")
        self.windows = np.array([(source.n_tokens - 1) // sequence_len for source in sources], np.uint64)
        # A card is a tenth of a percent. Where weights are no tenths, or many, take about a thousand cards.
        tenths = np.array([10 * source.weight for source in sources])
        if np.abs(tenths - tenths.round()).max() > 1e-6 or tenths.sum() > 1e5:
            tenths = 1000 * tenths / tenths.sum()
        cards = np.maximum(1, tenths.round()).astype(np.int64)
        cards //= np.gcd.reduce(cards)
        # of each card: its source, its number among the cards of its source, its place in the deck (0 to 1)
        owner = np.repeat(np.arange(len(sources)), cards)
        number = np.concatenate([np.arange(c) for c in cards])
        jitter = np.random.Generator(np.random.PCG64(seed)).random(len(owner))
        order = np.argsort(number / cards[owner] + jitter / cards[owner], kind="stable")
        self.cards = cards.astype(np.uint64)
        self.deck = owner[order]
        self.number = number[order].astype(np.uint64)

    def locate(self, indices):
        """Map global samples to (source, epoch, window), three integer arrays as long as `indices`."""
        indices = np.asarray(indices, dtype=np.uint64)
        deal = indices // len(self.deck)
        card = indices % len(self.deck)
        source = self.deck[card]
        # it is the n-th sample of its source
        n = deal * self.cards[source] + self.number[card]
        epoch = n // self.windows[source]
        place = n % self.windows[source]
        key = _mix64(self.seed ^ _mix64((source.astype(np.uint64) << 48) + epoch + 1))
        return source, epoch, permute(place, self.windows[source], key)

    def window(self, source, window):
        """Tokens of a window of a source, uint16 (T + 1,). Raises ValueError at one beyond the ids."""
        source = self.sources[source]
        tokens = source.window(int(window), self.T)
        if tokens.max() >= self.vocab_size:
            raise ValueError(f"source {source.name} holds token {tokens.max()}, beyond the vocabulary of "
                             f"{self.vocab_size}: a shard is damaged, see data/prepare.py inspect --verify")
        return tokens

    def batch(self, indices):
        """Read samples: (inputs, targets), int64 tensors (B, T); targets are inputs shifted by one."""
        source, _, window = self.locate(indices)
        tokens = np.stack([self.window(s, w) for s, w in zip(source, window)]).astype(np.int64)
        import torch
        # (B, T + 1)
        tokens = torch.from_numpy(tokens)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def first_repeats(self):
        """For each source, the first sample that is a window of it for the second time."""
        repeats = []
        for s, n in enumerate(self.windows.tolist()):
            # sample n of the source, counted from 0, is its first window again
            places = np.flatnonzero(self.deck == s)
            repeats.append(n // len(places) * len(self.deck) + int(places[n % len(places)]))
        return repeats


@dataclass(frozen=True)
class Data:
    """A tokenised corpus, see `open_data`. `sha256` names its content and weights.

    entries: its sources, dicts as in manifest.json. The embedded sample has no shards (and `path` is empty):
    it is tokenised when it is asked for.
    """

    path: str
    tokenizer: Tokenizer
    sha256: str
    entries: list

    def train(self, sequence_len, seed, split="train"):
        sources = [Source(entry["name"], entry["weight"], self._shards(entry, split))
                   for entry in self.entries]
        return Mix(sources, sequence_len, seed, self.tokenizer.vocab_size)

    def val(self, sequence_len):
        return self.train(sequence_len, VAL_SEED, "val")

    def _shards(self, entry, split):
        if self.path:
            return [open_shard(Path(self.path, shard["file"]), self.tokenizer) for shard in entry[split]]
        with lzma.open(_sample_file(entry), "rt", encoding="utf-8") as f:
            texts = [json.loads(line)["text"] for line in f]
        texts = [text for text in texts if is_validation(text, SAMPLE_VAL_FRACTION) == (split == "val")]
        return [self.tokenizer.encode_documents(texts)]


def _sample_file(entry):
    return HERE / "sample" / f"{entry['name']}.jsonl.xz"


def open_data(path="", vocab_size=None):
    """Open a folder of token shards, or the embedded sample where `path` is empty: a Data.

    vocab_size: ids that the model has. None takes the tokenizer whole; a lower one takes its first ids, which
    the embedded sample alone can be read with: shards keep to the tokenizer that they were written with.
    Raises ValueError naming the file and the remedy.
    """
    if not path:
        tokenizer = Tokenizer.load(vocab_size=vocab_size)
        content = b"".join(_sample_file(entry).read_bytes() for entry in SAMPLE)
        return Data("", tokenizer, hashlib.sha256(content + tokenizer.sha256.encode()).hexdigest(), SAMPLE)
    with reading(f"manifest.json in {path}", "make it with data/prepare.py tokenize, or leave --data out for "
                                             "the embedded sample"):
        entries = json.loads(Path(path, "manifest.json").read_text())["sources"]
        content = [[entry["name"], entry["weight"],
                    [shard.get("sha256", shard["file"]) for shard in entry["train"] + entry["val"]]]
                   for entry in entries]
    tokenizer = Tokenizer.load(path, vocab_size)
    sha256 = hashlib.sha256(json.dumps([content, tokenizer.sha256]).encode()).hexdigest()
    return Data(str(path), tokenizer, sha256, entries)


def validation_windows(mix, n_tokens, flag):
    """How many first windows of a validation mix hold `n_tokens` targets, which `flag` asked for.

    Raises ValueError when the mix has fewer (a window that came twice would be counted twice), or it is none.
    """
    n = n_tokens // mix.T
    repeats = mix.first_repeats()
    most = min(repeats)
    if not 1 <= n <= most:
        scarce = mix.sources[repeats.index(most)].name
        raise ValueError(f"{flag} {n_tokens} must be from {mix.T} (one window) to {most * mix.T}, where "
                         f"source {scarce} has no more validation text: give --data with more text (presets "
                         f"beyond tiny want it), lower the flag, or, before anything is trained, hold out "
                         f"more with data/prepare.py tokenize --val-fraction")
    return n


# --------------------------------------------------------------------------------------------------
# Batches

class Loader:
    """One rank's micro-batches for ever, by `next`, from global sample `start`; a thread reads ahead.

    A step takes the next `batch` samples, whatever the world size: they are cut into micro-batches of
    `micro_batch`, and rank r takes the r-th, the (r + world)-th, ... of them, `n_micro` a step. Gives
    (inputs, targets), int64 (micro_batch, T) on `device`.
    """

    def __init__(self, mix, start, batch, micro_batch, device="cpu", rank=0, world=1):
        import torch
        self.mix = mix
        self.device = torch.device(device)
        # where this rank's micro-batches begin within a step
        mine = range(rank * micro_batch, batch, world * micro_batch)
        self.n_micro = len(mine)
        self.samples = (np.arange(first + i, first + i + micro_batch)
                        for first in itertools.count(start, batch) for i in mine)
        self.thread = ThreadPoolExecutor(1)
        # what the thread will give next
        self.ahead = []

    def _read(self, samples):
        tensors = self.mix.batch(samples)
        if self.device.type == "cuda":
            return [tensor.pin_memory() for tensor in tensors]
        return tensors

    def __next__(self):
        while len(self.ahead) <= READ_AHEAD:
            self.ahead.append(self.thread.submit(self._read, next(self.samples)))
        # an error of the thread is raised here
        tensors = self.ahead.pop(0).result()
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors)

    def close(self):
        self.thread.shutdown(cancel_futures=True)
