"""
Tokenizer, token shards, the mixture and the batches that training reads.

    text --(data/prepare.py)--> DATA/manifest.json, tokenizer.txt, <source>-<split>-00000.bin ...    token shards
    shards --> Source: one long stream of tokens, cut into windows of T + 1 tokens
    sources --> Mix: global sample i -> (source, epoch, window), a pure function of (seed, mix, i)
    Mix --> Loader: micro-batches (inputs, targets) of one rank, prefetched by a thread

Nothing has a state beyond the global sample index: a run resumed on any number of ranks sees the same batches, and
seeking to any step costs the same. Rank and world size are arguments.

A shard is a 128-byte header (see HEADER: magic, version, counts, the tokenizer's sha256) and uint16 tokens, little
endian. Every document begins with `<|bos|>`. A window may span documents; there is no document mask. Validation
documents are chosen by a hash of their text, so that no rank, epoch or re-tokenisation trains on them.

Without a data folder, the text sample embedded in data/sample/ is tokenised in memory.

Not here: downloading and tokenising corpora (data/prepare.py), the model, the loss. torch is imported where batches are made, so
that the worker processes of data/prepare.py do without it.
"""
import base64
import hashlib
import itertools
import json
import lzma
import math
import os
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import tiktoken

HERE = Path(__file__).parent / "data"
BOS = "<|bos|>"
SHARD_MAGIC, SHARD_VERSION = b"poe-toks", 1
HEADER = np.dtype([("magic", "S8"), ("version", "<u4"), ("vocab_size", "<u4"), ("n_tokens", "<u8"), ("n_documents", "<u8"),
                   ("tokenizer_sha256", "S64"), ("reserved", "V32")])       # 128 bytes
SAMPLE_WEIGHTS = {"prose": 40, "encyclopedia": 30, "code": 30}              # percent of tokens, of the embedded sample
SAMPLE_VAL_FRACTION = 0.01                                                  # 126 KB of its text
PIECE = 2 ** 18         # characters encoded at a time: tiktoken's regex overflows its stack near a million spaces
# The split pattern of our tokenizers is GPT-4's with digits in groups of at most two. FAST_PATTERN finds the same matches 1.6 times
# as fast: the engine runs the group, free of look-around and possessive quantifiers, as one automaton. (A possessive quantifier
# changes nothing here, since what follows each of the two cannot match a character that it holds.)
SPLIT_PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
                 r"|\s*[\r\n]|\s+(?!\S)|\s+")
FAST_PATTERN = (r"(?:'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n])|\s+(?!\S)|\s+")
VAL_SEED = 20_260_411                                                       # validation windows are fixed for ever, whatever --seed


# ---------------------------------------------------------------------------------------------------------------
# Tokenizer

class Tokenizer:
    """Byte-level BPE of `vocab_size` ids: the first V - 1 ranks of a rank file, and `<|bos|>` = V - 1.

    A shorter list of merges is itself a valid BPE, so that small models share the one tokenizer file.
    """

    def __init__(self, ranks, pattern):
        """ranks: list of token bytes in order of rank, at least the 256 single bytes. pattern: the split regex."""
        self.ranks, self.pattern = ranks, pattern
        self.vocab_size = len(ranks) + 1
        self.bos = len(ranks)
        self.encoding = tiktoken.Encoding("poe", pat_str=FAST_PATTERN if pattern == SPLIT_PATTERN else pattern, special_tokens={BOS: self.bos},
                                          mergeable_ranks={token: rank for rank, token in enumerate(ranks)})
        self.token_bytes = np.array([len(token) for token in ranks] + [0], dtype=np.int64)  # special tokens count no bytes
        self.sha256 = hashlib.sha256(self.rank_text() + pattern.encode()).hexdigest()

    @classmethod
    def load(cls, folder=HERE, vocab_size=None):
        """Read tokenizer.txt (base64 token, rank; as tiktoken writes it) and tokenizer.json (the pattern) of a folder."""
        folder = Path(folder)
        try:
            lines = (folder / "tokenizer.txt").read_bytes().splitlines()
            ranks = [base64.b64decode(line.split()[0], validate=True) for line in lines]
            ordered = [int(line.split()[1]) for line in lines] == list(range(len(lines)))
            pattern = json.loads((folder / "tokenizer.json").read_text())["pattern"]
            tiktoken.Encoding("check", pat_str=pattern, special_tokens={}, mergeable_ranks={b"a": 0})       # is it one?
        except (RecursionError, ValueError, IndexError, KeyError, TypeError) as e:
            raise ValueError(f"the tokenizer in {folder} is not readable ({e}); copy it anew, or make it with data/prepare.py") from None
        if not ordered or len(ranks) >= 2 ** 16 or len(set(ranks)) != len(ranks) or {bytes([b]) for b in range(256)} - set(ranks[:256]):
            raise ValueError(f"{folder / 'tokenizer.txt'} is not a byte-level BPE of at most 65,536 ids in order of rank")
        if vocab_size is not None:
            if not 257 <= vocab_size <= len(ranks) + 1:
                raise ValueError(f"vocab_size {vocab_size} does not fit the tokenizer in {folder}, which has "
                                 f"{len(ranks) + 1} ids; choose --vocab-size from 257 to {len(ranks) + 1}")
            ranks = ranks[:vocab_size - 1]
        return cls(ranks, pattern)

    def rank_text(self):
        """The rank file's content, bytes."""
        return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(self.ranks))

    def files(self):
        """The two files that `load` reads, {name: bytes}."""
        meta = {"name": "poe", "pattern": self.pattern, "special_tokens": [BOS], "vocab_size": self.vocab_size}
        return {"tokenizer.txt": self.rank_text(), "tokenizer.json": json.dumps(meta, indent=1).encode()}

    def encode(self, text):
        """bos + ordinary text (text that spells a special token stays plain text), as a list of ids."""
        return self.encode_array(text).tolist()

    def encode_array(self, text, begins=True):
        """As `encode`, uint16 (n,); without bos where the text goes on from an earlier piece. Long text is encoded in pieces."""
        text, start, parts = clean_text(text), 0, [[self.bos] if begins else []]
        while start < len(text):
            stop = cut_text(text, start)
            parts.append(self.encoding.encode_to_numpy(text[start:stop], disallowed_special=()))
            start = stop
        return np.concatenate(parts, dtype=np.uint16, casting="unsafe")     # ids fit in 16 bits: see `load`

    def encode_documents(self, texts):
        """Concatenate documents, each beginning with bos: uint16 (n,)."""
        with ThreadPoolExecutor(2) as pool:                                 # tiktoken works outside the interpreter lock
            return np.concatenate([np.zeros(0, np.uint16), *pool.map(self.encode_array, texts)])

    def decode_bytes(self, ids):
        """The UTF-8 bytes of ids; bos stands for none."""
        return b"".join(self.ranks[i] for i in ids if i != self.bos)

    def decode(self, ids):
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


def clean_text(text):
    """Replace lone surrogates, which UTF-8 cannot hold, by U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def cut_text(text, start):
    """Where to end a piece of at most PIECE characters from `start` so that encoding pieces gives the tokens of the whole.

    That is before a space that follows something other than white space, or before a newline that follows a letter or a digit: no
    match of a split pattern of GPT-2's or GPT-4's kind lies across it, and none looks behind. Text without such a place is cut
    after PIECE characters, and the tokens at that place may differ from those of the whole.
    """
    stop, found = start + PIECE, -1
    if stop >= len(text):
        return len(text)
    for blank, allowed in ((" ", lambda before: not before.isspace()), ("\n", str.isalnum)):
        place = stop
        while (place := text.rfind(blank, start + 1, place)) > found:
            if allowed(text[place - 1]):
                found = place
    return found if found > 0 else stop


def is_validation(text, fraction):
    """Whether a document is held out: a function of its text alone."""
    return int.from_bytes(hashlib.sha256(clean_text(text).encode()).digest()[:8], "big") < fraction * 2 ** 64


# ---------------------------------------------------------------------------------------------------------------
# Shards

def write_whole(path, *parts):
    """Write a file, whole or not at all: what gets its name is on the disk already, so that a loss of power leaves no empty file."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "wb") as f:
        for part in parts:
            f.write(part)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def write_shard(path, tokens, n_documents, tokenizer):
    """Write tokens (uint16) as one shard, whole or not at all."""
    header = np.zeros(1, HEADER)
    header[0] = (SHARD_MAGIC, SHARD_VERSION, tokenizer.vocab_size, len(tokens), n_documents, tokenizer.sha256.encode(), b"")
    write_whole(path, header.tobytes(), np.ascontiguousarray(tokens, dtype="<u2"))


def open_shard(path, tokenizer):
    """Map a shard's tokens, uint16 (n,). Raises ValueError when it is cut, foreign or of another tokenizer."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"shard {path} is missing; run data/prepare.py tokenize again")
    size = path.stat().st_size
    if size < HEADER.itemsize:
        raise ValueError(f"shard {path} has {size} bytes, less than a header; run data/prepare.py tokenize again")
    header = np.fromfile(path, HEADER, count=1)[0]
    if header["magic"] != SHARD_MAGIC or header["version"] != SHARD_VERSION:
        raise ValueError(f"{path} is not a token shard of version {SHARD_VERSION} (magic {bytes(header['magic'])!r}); "
                         f"delete it and run data/prepare.py tokenize again")
    expected = HEADER.itemsize + 2 * int(header["n_tokens"])
    if size != expected:
        raise ValueError(f"shard {path} has {size} bytes where its header says {expected}: it was cut; "
                         f"run data/prepare.py tokenize again")
    if header["tokenizer_sha256"] != tokenizer.sha256.encode():
        theirs = header["tokenizer_sha256"][:12].decode(errors="replace")
        raise ValueError(f"shard {path} was written with another tokenizer ({header['vocab_size']} ids, sha256 {theirs}..., "
                         f"expected {tokenizer.vocab_size} and {tokenizer.sha256[:12]}...); tokenise into a folder of its own "
                         f"with data/prepare.py tokenize")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER.itemsize, shape=(int(header["n_tokens"]),))


# ---------------------------------------------------------------------------------------------------------------
# Sources and the mixture

class Source:
    """A stream of tokens made of shards, read in windows. Window w of length T holds tokens [wT, wT + T], T + 1 of them."""

    def __init__(self, name, weight, shards):
        self.name, self.weight, self.shards = name, weight, shards
        self.ends = np.cumsum([len(shard) for shard in shards])             # of each shard in the stream
        self.n_tokens = int(self.ends[-1]) if shards else 0

    def n_windows(self, T):
        return max(0, (self.n_tokens - 1) // T)

    def window(self, w, T):
        """Tokens of window w, uint16 (T + 1,), joined across shards where it crosses an end."""
        start, stop, parts = w * T, w * T + T + 1, []
        s = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            offset = int(self.ends[s]) - len(self.shards[s])
            parts.append(self.shards[s][start - offset:stop - offset])
            start, s = int(self.ends[s]), s + 1
        return np.concatenate(parts)


def _mix64(x):
    """splitmix64's finaliser: a bijection of uint64 (arrays), the hash behind every shuffle here."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index, n, key):
    """Element `index` of a pseudo-random permutation of range(n), chosen by `key`, in O(1) time and memory.

    A four-round Feistel network on the smallest even-bit domain that holds n, walked until it lands inside.
    index: uint64 (B,) < n. key: uint64 (B,), one permutation each. Returns uint64 (B,).
    """
    half = np.uint64(max(1, math.ceil(math.log2(max(n, 2)) / 2)))
    low = np.uint64((1 << int(half)) - 1)
    out = index.copy()
    todo = np.ones(len(index), dtype=bool)
    while todo.any():
        left, right = out[todo] >> half, out[todo] & low
        for round_key in range(4):
            left, right = right, left ^ (_mix64(right + _mix64(key[todo] + np.uint64(round_key))) & low)
        out[todo] = (left << half) | right
        todo = out >= n
    return out


class Mix:
    """Sources mixed by weight: global sample i maps to a window by arithmetic alone.

    A deck of cards, as many of each source as its weight says, is dealt over and over. Its order is stratified: the j-th
    of a source's c cards stands at a random place of the j-th c-th of the deck, so the count of any source in any prefix is
    within one card of its share. The n-th card of a source takes window n of its stream; each epoch of the stream is
    reshuffled by its own permutation.
    """

    def __init__(self, sources, sequence_len, seed, vocab_size=2 ** 16):
        self.sources, self.T, self.seed, self.vocab_size = sources, sequence_len, seed, vocab_size
        self.windows = np.array([source.n_windows(sequence_len) for source in sources], dtype=np.uint64)
        for source, n in zip(sources, self.windows):
            if n == 0:
                raise ValueError(f"source {source.name} has {source.n_tokens} tokens, less than one window of {sequence_len + 1}; "
                                 f"add text to it, drop it, lower --sequence-len or, for validation, hold out more with data/prepare.py "
                                 f"tokenize --val-fraction")
        tenths = np.array([10 * source.weight for source in sources])
        if not np.all((tenths > 0) & (tenths < 1e9)):
            raise ValueError(f"source weights must be positive, not {[source.weight for source in sources]}; mend the mix")
        if np.abs(tenths - tenths.round()).max() > 1e-6 or tenths.sum() > 1e5:      # not tenths of a percent: take a thousand cards
            tenths = np.maximum(1, 1000 * tenths / tenths.sum())
        cards = tenths.round().astype(np.int64)
        cards //= np.gcd.reduce(cards)
        owner = np.repeat(np.arange(len(sources)), cards)                   # source of each card
        number = np.concatenate([np.arange(c) for c in cards])              # its number among the cards of its source
        draw = np.random.Generator(np.random.PCG64(seed)).random(len(owner))
        order = np.argsort(number / cards[owner] + draw / cards[owner], kind="stable")
        self.cards, self.deck, self.number = cards.astype(np.uint64), owner[order], number[order].astype(np.uint64)

    def locate(self, indices):
        """Map global samples to (source, epoch, window), three integer arrays as long as `indices`."""
        indices = np.asarray(indices, dtype=np.uint64)
        deal, card = indices // np.uint64(len(self.deck)), (indices % np.uint64(len(self.deck))).astype(np.int64)
        source = self.deck[card]
        n = deal * self.cards[source] + self.number[card]                   # n-th sample of its source
        epoch, place = n // self.windows[source], n % self.windows[source]
        window = np.empty_like(place)
        for s in np.unique(source):
            rows = source == s
            key = _mix64(np.uint64(self.seed) ^ _mix64((np.uint64(s) << np.uint64(48)) + epoch[rows] + np.uint64(1)))
            window[rows] = permute(place[rows], int(self.windows[s]), key)
        return source, epoch, window

    def window(self, source, window):
        """Tokens of a window of the source of that number, uint16 (T + 1,). Raises ValueError where one is beyond the vocabulary."""
        source = self.sources[source]
        tokens = source.window(int(window), self.T)
        if tokens.max() >= self.vocab_size:
            raise ValueError(f"source {source.name} holds token {tokens.max()}, beyond the vocabulary of {self.vocab_size}: its shards are "
                             f"damaged; run data/prepare.py tokenize again")
        return tokens

    def batch(self, indices):
        """Read samples: (inputs, targets), int64 tensors (B, T); targets are inputs shifted by one."""
        source, _, window = self.locate(indices)
        tokens = np.stack([self.window(s, w) for s, w in zip(source, window)]).astype(np.int64)
        import torch
        tokens = torch.from_numpy(tokens)                                   # (B, T + 1)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def n_in_first_epoch(self):
        """How many samples can be drawn before any window comes twice."""
        decks = min(int(w) // int(c) for w, c in zip(self.windows, self.cards))
        indices = np.arange(decks * len(self.deck), (decks + 2) * len(self.deck) + 1)
        _, epoch, _ = self.locate(indices)
        return int(indices[np.argmax(epoch > 0)])


class Data:
    """A tokenised corpus: its tokenizer, and `train` and `val` sources; sha256 names the content and the weights. See `open_data`."""

    def __init__(self, path, tokenizer, sha256, read_sources):
        self.path, self.tokenizer, self.sha256, self._read_sources = path, tokenizer, sha256, read_sources

    def train(self, sequence_len, seed):
        return Mix(self._read_sources("train"), sequence_len, seed, self.tokenizer.vocab_size)

    def val(self, sequence_len):
        return Mix(self._read_sources("val"), sequence_len, VAL_SEED, self.tokenizer.vocab_size)


def open_data(path="", vocab_size=None):
    """Open a folder of token shards, or the embedded sample where `path` is empty.

    vocab_size: ids that the model has; must be the folder's, or at most the embedded tokenizer's. None takes what is there.
    Raises FileNotFoundError or ValueError naming the file and the remedy.
    """
    if not path:
        tokenizer = Tokenizer.load(vocab_size=vocab_size)
        content = b"".join((HERE / "sample" / f"{name}.jsonl.xz").read_bytes() for name in SAMPLE_WEIGHTS)
        return Data("", tokenizer, hashlib.sha256(content + tokenizer.sha256.encode()).hexdigest(), lambda split: _read_sample(tokenizer, split))
    folder = Path(path)
    if not (folder / "manifest.json").exists():
        raise FileNotFoundError(f"{folder} has no manifest.json: it is not a folder of token shards; make one with data/prepare.py tokenize, "
                                f"or leave --data out for the embedded sample")
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        sources = [(s["name"], float(s["weight"]), {split: [f["file"] + "" for f in s[split]] for split in ("train", "val")})
                   for s in manifest["sources"]]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise ValueError(f"{folder / 'manifest.json'} is not readable ({e!r}); run data/prepare.py tokenize again") from None
    tokenizer = Tokenizer.load(folder)
    if vocab_size not in (None, tokenizer.vocab_size):
        raise ValueError(f"{folder} was tokenised with {tokenizer.vocab_size} ids, the model has vocab_size {vocab_size}: "
                         f"use --vocab-size {tokenizer.vocab_size}, or tokenise with data/prepare.py tokenize --vocab-size {vocab_size}")
    if not sources:
        raise ValueError(f"{folder / 'manifest.json'} names no sources; run data/prepare.py tokenize again")
    content = [(s["name"], s["weight"], [f.get("sha256", f["file"]) for split in ("train", "val") for f in s[split]]) for s in manifest["sources"]]
    sha256 = hashlib.sha256(json.dumps([content, tokenizer.sha256]).encode()).hexdigest()
    return Data(str(path), tokenizer, sha256, lambda split: [
        Source(name, weight, [open_shard(folder / file, tokenizer) for file in files[split]]) for name, weight, files in sources])


def _read_sample(tokenizer, split):
    """Tokenise one split of data/sample/*.jsonl.xz in memory: a list of sources."""
    sources = []
    for name, weight in SAMPLE_WEIGHTS.items():
        with lzma.open(HERE / "sample" / f"{name}.jsonl.xz", "rt", encoding="utf-8") as f:
            texts = [json.loads(line)["text"] for line in f]
        texts = [t for t in texts if is_validation(t, SAMPLE_VAL_FRACTION) == (split == "val")]
        sources.append(Source(name, weight, [tokenizer.encode_documents(texts)]))
    return sources


def validation_windows(mix, n_tokens, flag):
    """The first windows of a validation mix that hold `n_tokens` targets, which `flag` asked for: a count of windows.

    Raises ValueError when the mix has fewer (a window that came twice would be counted twice).
    """
    n, most = n_tokens // mix.T, mix.n_in_first_epoch()
    if n < 1:
        raise ValueError(f"{flag} {n_tokens} is less than one window of {mix.T} tokens; raise it")
    if n > most:
        raise ValueError(f"{flag} {n_tokens}: the validation text holds {most * mix.T} tokens in the mix's proportions; lower it, or hold out more of "
                         f"your own data with data/prepare.py tokenize --val-fraction")
    return n


# ---------------------------------------------------------------------------------------------------------------
# Batches

class Loader:
    """One rank's micro-batches for ever, by `next`, from global sample `start`; a thread reads ahead.

    A step takes the next `batch` samples, whatever the world size: they are cut into micro-batches of `micro_batch`, and rank r takes
    the r-th, the (r + world)-th, ... of them, `n_micro` a step. Gives (inputs, targets), int64 (micro_batch, T) on `device`.
    """

    def __init__(self, mix, start, batch, micro_batch, device="cpu", rank=0, world=1):
        assert batch % micro_batch == 0, f"batch {batch} is not a multiple of {micro_batch} sequences"
        import torch
        self.mix, self.start, self.batch, self.micro_batch = mix, start, batch, micro_batch
        self.mine = range(rank * micro_batch, batch, world * micro_batch)   # where this rank's micro-batches begin within a step
        self.n_micro = len(self.mine)
        self.device = torch.device(device)
        self.queue, self.stopped = queue.Queue(maxsize=4), threading.Event()
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self):
        for first in itertools.count(self.start, self.batch):
            for i in self.mine:
                try:
                    item = self.mix.batch(first + np.arange(i, i + self.micro_batch))
                    if self.device.type == "cuda":
                        item = tuple(tensor.pin_memory() for tensor in item)
                except Exception as error:                                  # raised again in the consumer, by __next__
                    item = error
                self.queue.put(item)
                if self.stopped.is_set():
                    return

    def __next__(self):
        item = self.queue.get()
        if isinstance(item, Exception):
            raise item
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in item)

    def close(self):
        self.stopped.set()
        with suppress(queue.Empty):                                         # room for what the thread may be waiting to put
            self.queue.get_nowait()
        self.thread.join()
