"""
Download a mix of text corpora, train a tokenizer on it, and write the token shards that dataloader.py reads.

    mix file --download--> RAW/<source>/... --tokenize--> DATA/<source>-<split>-00000.bin, manifest.json

    python data/prepare.py download --raw RAW --max-bytes 1000000000   # 1 GB a source of frontier_v1.json
    python data/prepare.py tokenize --raw RAW --out DATA               # then: python train.py --data DATA
    python data/prepare.py inspect --data DATA --verify
    python data/prepare.py tokenizer --raw RAW --out TOK               # only for a tokenizer of your own

A mix file names sources with their weights; data/frontier_v1.json is one, and a mix of your own files is just
another: {"sources": [{"name": "web", "weight": 3}, {"name": "code", "weight": 1, "text": "content"}]}. The
files of source web are those in RAW/web/, those called RAW/web.*, or what --source web=PATH names: .parquet;
JSON lines (.jsonl, .ndjson, .json); .txt, one document a file; all with .gz, .xz or .zst too. The text of a
record is its field "text", or the one that the mix file names under "text"; "chat" names a list of messages
instead, see `render_chat`. JSON lines of more than 64 MB are skipped. A document is held whole: one of 200 MB
took 0.65 GB in the largest process as .txt and 2.0 GB in parquet.

Environment: HF_ENDPOINT (the hub, default https://huggingface.co), HF_TOKEN (for gated sources; sent to that
host alone). Extras: pyarrow for parquet, backports.zstd for .zst before Python 3.14, rustbpe for the command
tokenizer. Not here: deduplication, filtering, shuffling of documents (the mixture in dataloader.py shuffles
windows).
"""
import functools
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
from array import array
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# the repository's root, one folder up
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import flag, lock, parse_command, run, sha256_of, write_whole
from data.hub import Hub, progress, warn
from data.readers import PACKAGES, corruption, format_of, read_records, require, text_of
from dataloader import HERE, SPLIT_PATTERN, Tokenizer, clean_text, is_validation, open_data, write_shard

# 2 bytes each
SHARD_TOKENS = 1 << 25
# of text that a tokenizer is trained on
SAMPLE_BYTES = 140_000_000
# characters of text given to a worker at a time
BATCH = 1 << 20
# bad records of a source that are named; further ones are only counted
NAMED = 20


# --------------------------------------------------------------------------------------------------
# Flags

@dataclass(frozen=True)
class MixFlags:
    mix: str = flag(str(HERE / "frontier_v1.json"), "mix file: sources and their weights", path=True)
    raw: str = flag("raw", "folder of the downloaded files", path=True)
    only: str = flag("", "names of the sources to take, comma-separated; empty: all")
    source: str = flag("", "local files for a source, name=path (file or folder), comma-separated")


@dataclass(frozen=True)
class DownloadFlags(MixFlags):
    max_bytes: int = flag(-1, "bytes a source, as downloaded: whole files are taken until there are so "
                              "many; -1: all")


@dataclass(frozen=True)
class TokenizerFlags(MixFlags):
    out: str = flag("", "folder to write; it must be given", path=True)
    val_fraction: float = flag(0.005, "share of the documents held out for validation, by a hash of their "
                                      "text; 0.03 suits a few hundred MB", low=0, high=0.99)
    vocab_size: int = flag(None, "ids, <|bos|> included (default: 32768 for a new tokenizer, all of an "
                                 "old one; a lower number takes its first so many)", low=257, high=65_536)

    def __post_init__(self):
        if not self.out:
            raise ValueError("--out must name a folder to write")


@dataclass(frozen=True)
class TokenizeFlags(TokenizerFlags):
    tokenizer: str = flag(str(HERE), "folder of the tokenizer to use", path=True)
    workers: int = flag(-1, "worker processes; -1: one a core; 0: none, encode in this process", low=-1)


@dataclass(frozen=True)
class InspectFlags:
    data: str = flag(".", "folder of token shards", path=True)
    verify: bool = flag(False, "compare the sha256 of every shard with the manifest")


# --------------------------------------------------------------------------------------------------
# Mixes and their files

def read_mix(flags):
    """The sources that --mix, --only and --source choose: dicts of the mix file.

    Each has one key more, "path": where --source says that its files are, or None.
    """
    good = False
    error = "some of its sources are not right"
    try:
        mix = json.loads(Path(flags.mix).read_text(encoding="utf-8"))
        # only those that are right
        sources = {source["name"]: source for source in mix["sources"]
                   if re.fullmatch(r"\w[\w-]*", source["name"], re.ASCII) and 0 < source["weight"] < 1e8}
        good = 0 < len(sources) == len(mix["sources"])
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        error = e
    if not good:
        raise ValueError(f"{flags.mix} is no mix file ({error!r}); sources need names of letters, digits, _ "
                         f"and - that differ, positive weights, and fields as in data/frontier_v1.json")
    chosen = flags.only.split(",") if flags.only else list(sources)
    local = dict(item.partition("=")[::2] for item in flags.source.split(",") if item)
    unknown = {*chosen, *local} - {*sources}
    if unknown or "" in local.values():
        raise ValueError(f"--only {flags.only!r} or --source {flags.source!r} is wrong: {flags.mix} has the "
                         f"sources {', '.join(sources)}, and local files are given as name=path")
    return [source | {"path": local.get(name)} for name, source in sources.items() if name in chosen]


def find_files(flags):
    """Say what to read: [(source, its files, sorted)].

    Raises ValueError where files or packages are missing, so that nothing turns out so hours later.
    """
    plan = []
    for source in read_mix(flags):
        name = source["name"]
        places = [Path(flags.raw, name), *Path(flags.raw).glob(f"{name}.*")]
        if source["path"]:
            places = [Path(source["path"])]
        candidates = [file for place in places for file in [place, *place.rglob("*")]]
        files = sorted(file for file in candidates if format_of(file) and file.is_file())
        for file in files:
            for kind in format_of(file):
                if kind in PACKAGES:
                    require(PACKAGES[kind])
        if files:
            plan.append((source, files))
        elif source["path"] or source.get("status", "open") == "open" or flags.only:
            raise ValueError(f"source {name} has no file that can be read in {places[0]} (--help lists the "
                             f"kinds); download it, give --source {name}=PATH, or leave it out with --only")
        else:
            warn(f"source {name} has no files and is left out; the other weights are normalised. See: "
                 f"data/prepare.py download --only {name}")
    if not plan:
        raise ValueError(f"no source of {flags.mix} has files; see data/prepare.py download")
    return plan


def save_tokenizer(tokenizer, out):
    """Write the tokenizer's files into a folder, which must hold no other one."""
    if (out / "tokenizer.txt").exists() and Tokenizer.load(out).sha256 != tokenizer.sha256:
        raise ValueError(f"{out} has another tokenizer; name another --out, or delete the folder")
    for name, content in tokenizer.files().items():
        write_whole(out / name, content)


# --------------------------------------------------------------------------------------------------
# Documents and their tokens

def read_source(source, files, bad):
    """Yield a source's documents (str). What cannot be read is named, and counted in `bad`."""
    field = source.get("chat") or source.get("text", "text")
    for path in files:
        number = 0
        size = path.stat().st_size
        try:
            with open(path, "rb") as raw:
                for number, read in read_records(path, raw, field):
                    try:
                        text = text_of(read())
                    except (ValueError, RecursionError) as e:
                        bad["records"] += 1
                        if bad["records"] <= NAMED:
                            warn(f"{path}: record {number} skipped: {e}")
                    else:
                        yield clean_text(text)
                    progress(path, raw.tell(), size)
        except corruption() as e:
            bad["files"] += 1
            warn(f"{path}: corrupt in or after record {number} ({e!r}); the documents before are kept. Fetch "
                 f"it again and run the command again")


# once in each process
_load_tokenizer = functools.cache(Tokenizer.load)


def encode_batch(folder, val_fraction, texts):
    """Encode documents: a list of (whether it is held out, the bytes of its tokens, uint16)."""
    tokenizer = _load_tokenizer(folder)
    return [(is_validation(text, val_fraction), tokenizer.encode_array(text).tobytes()) for text in texts]


def _start_worker():
    """Run once in each worker process: leave Ctrl-C to the main process, and end when that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def batches(texts):
    """Yield lists of documents of about BATCH characters."""
    batch = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield batch
            batch = []
            size = 0
    yield batch


def encode_all(texts, flags, pool, n_ahead):
    """Yield what `encode_batch` says of each document, in order, `n_ahead` batches of them under way."""
    under_way = deque()
    for batch in batches(texts):
        under_way.append(pool.submit(encode_batch, flags.out, flags.val_fraction, batch))
        if len(under_way) > n_ahead:
            yield from under_way.popleft().result()
    while under_way:
        yield from under_way.popleft().result()


class Shards:
    """Collects the tokens of one source and split, and writes a shard whenever SHARD_TOKENS are there."""

    def __init__(self, prefix, tokenizer):
        # of their paths
        self.prefix = prefix
        self.tokenizer = tokenizer
        # of the shards, for the manifest
        self.entries = []
        # tokens that no shard holds yet, uint16
        self.rest = array("H")

    def extend(self, tokens):
        """Add tokens, the bytes of uint16."""
        self.rest.frombytes(tokens)
        while len(self.rest) >= SHARD_TOKENS:
            self.write(np.array(self.rest[:SHARD_TOKENS]))
            del self.rest[:SHARD_TOKENS]

    def flush(self, n_shards):
        """Write what is left as shards of equal size."""
        for tokens in np.array_split(np.array(self.rest), n_shards):
            if len(tokens):
                self.write(tokens)

    def write(self, tokens):
        path = Path(f"{self.prefix}-{len(self.entries):05d}.bin")
        # of those that begin here
        n_documents = int((tokens == self.tokenizer.bos).sum())
        # in blocks, since a token's count takes 8 bytes
        n_bytes = sum(self.tokenizer.token_bytes[block].sum() for block in np.array_split(tokens, 32))
        write_shard(path, tokens, n_documents, self.tokenizer)
        self.entries.append({"file": path.name, "tokens": len(tokens), "bytes": int(n_bytes),
                             "documents": n_documents, "sha256": sha256_of(path)})


# --------------------------------------------------------------------------------------------------
# Commands

def download(flags):
    """Download the files of a mix.

    Gated and external sources are left out, with what to do, unless HF_TOKEN opens a gated one. Interrupted
    downloads go on where they stopped; a finished file is not fetched again. A source that fails does not
    stop the others; the exit code is 2 then.
    """
    hub = Hub()
    failed = []
    with lock(flags.raw):
        for source in read_mix(flags):
            name = source["name"]
            closed = source.get("status", "open") != "open" and not hub.token
            if source["path"] or closed or not (source.get("repository") and source.get("files")):
                steps = "; ".join(source.get("steps", ["its files are local, or need HF_TOKEN"]))
                print(f"source:{name} is not downloaded: {steps}")
            else:
                n_files = download_source(hub, source, Path(flags.raw, name), flags.max_bytes)
                if not n_files:
                    failed.append(name)
    if failed:
        raise ValueError(f"incomplete: {', '.join(failed)}; what came is kept. Run the command again for the "
                         f"rest, or mend their 'files' in {flags.mix} where no file matched")


def download_source(hub, source, folder, max_bytes):
    """Fetch files of a source, of each pattern in turn, up to `max_bytes` (-1: all).

    Returns how many there are now; 0 where one failed, after a warning.
    """
    n_files = 0
    n_bytes = 0
    lists = [hub.list(source, pattern) for pattern in source["files"]]
    try:
        for file in itertools.chain.from_iterable(itertools.zip_longest(*lists)):
            if 0 <= max_bytes <= n_bytes:
                break
            if file:
                path, size, sha256 = file
                target = folder / path
                if not target.exists() or target.stat().st_size != size:
                    hub.fetch(source, path, size, sha256, target)
                n_files += 1
                n_bytes += size
    except ValueError as e:
        warn(e)
        return 0
    print(f"source:{source['name']} files:{n_files} bytes:{n_bytes} folder:{folder}")
    return n_files


def tokenizer(flags):
    """Train a byte-level BPE on a sample of a mix, by weight: tokenizer.txt and tokenizer.json.

    140 MB of text are shared out by weight and taken evenly from the beginnings of a source's files. Held-out
    documents are left out.
    """
    rustbpe = require("rustbpe")
    plan = find_files(flags)
    bpe = rustbpe.Tokenizer()
    vocab_size = flags.vocab_size or 32_768
    with lock(flags.out):
        texts = sample_texts(plan, flags.val_fraction)
        bpe.train_from_iterator(texts, vocab_size - 1, pattern=SPLIT_PATTERN)
        # they come in order of rank
        made = Tokenizer([bytes(token) for token, _ in bpe.get_mergeable_ranks()], SPLIT_PATTERN)
        save_tokenizer(made, Path(flags.out))
    print(f"tokenizer:{flags.out} vocab_size:{made.vocab_size} asked:{vocab_size} sha256:{made.sha256}")


def sample_texts(plan, val_fraction):
    """Yield the documents that a tokenizer is trained on, SAMPLE_BYTES shared out by weight."""
    weights = sum(source["weight"] for source, _ in plan)
    for source, files in plan:
        budget = SAMPLE_BYTES * source["weight"] / weights
        taken = 0
        for i, path in enumerate(files):
            until = taken + (budget - taken) / (len(files) - i)
            for text in read_source(source, [path], Counter()):
                if taken >= until:
                    break
                if not is_validation(text, val_fraction):
                    taken += len(text.encode())
                    yield text


def tokenize(flags):
    """Tokenise a mix into a folder of shards for train.py --data; the same bytes with any --workers.

    A finished source is not done again while its files and flags stay as they are; one that was interrupted
    is done again (shards that it then needs no more stay in the folder, unnamed). A record that cannot be
    read (invalid UTF-8, not JSON, no text, empty) is skipped, named and counted. A corrupt file ends where it
    is corrupt; what came before is kept, and the exit code is 2. Held-out documents go to eight validation
    shards a source (and one more for every 33,554,432 tokens). manifest.json is written last: without it the
    folder is not data.
    """
    plan = find_files(flags)
    tokenizer = Tokenizer.load(flags.tokenizer, flags.vocab_size)
    out = Path(flags.out)
    workers = multiprocessing.cpu_count() if flags.workers < 0 else flags.workers
    pool = ThreadPoolExecutor(1)
    if workers:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    with lock(out), pool:
        save_tokenizer(tokenizer, out)
        # it comes last: without it the folder is not data
        (out / "manifest.json").unlink(missing_ok=True)
        entries = [tokenize_source(source, files, flags, tokenizer, pool, workers) for source, files in plan]
        manifest = {"format": 1, "name": Path(flags.mix).stem, "tokenizer_sha256": tokenizer.sha256,
                    "vocab_size": tokenizer.vocab_size, "sources": entries}
        write_whole(out / "manifest.json", json.dumps(manifest, indent=1).encode())
    lacking = [entry["name"] for entry in entries if entry["corrupt_files"] or not entry["train"]]
    if lacking:
        raise ValueError(f"{', '.join(lacking)}: corrupt files, or no document to train on (are 'text' and "
                         f"'chat' right in the mix?), see above; {out} is usable without what was lost")


def tokenize_source(source, files, flags, tokenizer, pool, workers):
    """Write the shards of a source, unless they are there; return what the manifest says of them."""
    name = source["name"]
    out = Path(flags.out)
    # what the shards depend on; it stands beside them once they are whole
    key = [tokenizer.sha256, flags.val_fraction, source.get("chat"), source.get("text"),
           [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]]
    record = out / f"{name}.source.json"
    if record.exists():
        done = json.loads(record.read_text())
        entry = done["entry"]
        shards = entry["train"] + entry["val"]
        if done.get("key") == key and all((out / shard["file"]).exists() for shard in shards):
            print(f"source:{name} done before, files and flags are the same")
            # the weight alone may be another one
            return entry | {"weight": source["weight"]}
        record.unlink()
    bad = Counter()
    train = Shards(out / f"{name}-train", tokenizer)
    val = Shards(out / f"{name}-val", tokenizer)
    texts = read_source(source, files, bad)
    for held_out, tokens in encode_all(texts, flags, pool, 2 * workers + 1):
        shards = val if held_out else train
        shards.extend(tokens)
    train.flush(1)
    val.flush(8)
    entry = {"name": name, "weight": source["weight"], "corrupt_files": bad["files"], "train": train.entries,
             "val": val.entries}
    write_whole(record, json.dumps({"key": key, "entry": entry}).encode())
    print(f"source:{name} bad_records:{bad['records']} corrupt_files:{bad['files']}")
    return entry


def inspect(flags):
    """Show the sources of a folder of shards: weights, tokens, bytes per token, first words."""
    folder = Path(flags.data)
    data = open_data(folder)
    # windows of one token
    mix = data.train(1, 0)
    print(f"vocab_size:{data.tokenizer.vocab_size} tokenizer_sha256:{data.tokenizer.sha256}")
    damaged = []
    for source, entry in zip(mix.sources, data.entries):
        n_bytes = sum(shard["bytes"] for shard in entry["train"])
        val_tokens = sum(shard["tokens"] for shard in entry["val"])
        print(f"source:{source.name} weight:{source.weight} train_tokens:{source.n_tokens} "
              f"val_tokens:{val_tokens} bytes_per_token:{n_bytes / source.n_tokens:.2f}")
        print(f"    {data.tokenizer.decode(source.shards[0][:100])!r}")
        for shard in entry["train"] + entry["val"]:
            if flags.verify and sha256_of(folder / shard["file"]) != shard["sha256"]:
                damaged.append(shard["file"])
    print(f"tokens before any window comes twice: {mix.n_in_first_epoch():,}")
    if damaged:
        raise ValueError(f"{', '.join(damaged)} in {folder} are damaged (sha256); delete them and run "
                         f"data/prepare.py tokenize again")
    if flags.verify:
        print("verified: every shard has the sha256 of the manifest")


COMMANDS = {"download": (download, DownloadFlags, ()), "tokenizer": (tokenizer, TokenizerFlags, ()),
            "tokenize": (tokenize, TokenizeFlags, ()), "inspect": (inspect, InspectFlags, ())}


def main(argv=None):
    name, given = parse_command(COMMANDS, __doc__, argv)
    # for who reads along through a pipe
    sys.stdout.reconfigure(line_buffering=True)
    function, cls, _ = COMMANDS[name]
    function(cls(**given))


if __name__ == "__main__":
    run(main)
