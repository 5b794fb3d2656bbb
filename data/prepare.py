"""
Download a mix of text corpora, train a tokenizer on it, and write the token shards that dataloader.py reads.

    mix file --download--> RAW/<source>/... --tokenize--> DATA/<source>-<split>-00000.bin, manifest.json

    python data/prepare.py tokenize --raw TEXTS --out DATA --vocab-size 1024   # a folder of your own texts

    python data/prepare.py download --raw RAW --max-bytes 1000000000   # 1 GB a source of frontier_v1.json
    python data/prepare.py tokenize --raw RAW --out DATA               # then: python train.py --data DATA
    python data/prepare.py inspect --data DATA --verify
    python data/prepare.py tokenizer --raw RAW --out TOK               # only for a tokenizer of your own

Each command has a --help of its own; that of tokenize says which files are read. A mix file names sources
with their weights; data/frontier_v1.json is one, and a mix of your own files is just another: {"sources":
[{"name": "web", "weight": 3}, {"name": "code", "weight": 1, "text": "content"}]}. A document is held whole:
one of 200 MB took 0.65 GB in the largest process as .txt and 2.0 GB in parquet.

Environment: HF_ENDPOINT (the hub, default https://huggingface.co), HF_TOKEN (for gated sources; sent to that
host alone). Extras: pyarrow for parquet, backports.zstd for .zst before Python 3.14, rustbpe for the command
tokenizer. Not here: deduplication, filtering, shuffling of documents (the mixture in dataloader.py shuffles
windows).
"""
import contextlib
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
from collections import Counter
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# the repository's root, one folder up
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import flag, lock, parse_command, run, sha256_of, write_whole
from data.hub import Hub, progress, warn
from data.readers import PACKAGES, corruption, format_of, read_records, require, text_of
from dataloader import (
    HERE,
    SPLIT_PATTERN,
    Tokenizer,
    clean_text,
    is_validation,
    open_data,
    reading,
    validation_windows,
    write_shard,
)

# 2 bytes each
SHARD_TOKENS = 1 << 25
# of text that a tokenizer is trained on
SAMPLE_BYTES = 140_000_000
# characters of text given to a worker at a time
BATCH = 1 << 20
# bad records of a file that are named; further ones are only counted
NAMED = 5
# share of a source's records that may be lost before the exit code is 2
MAX_LOST = 0.05
# a source of fewer documents is cut into documents of about 4 KB: at the first blank line after 4,096
# characters, or line end, or after 8,192 characters
FEW = 100
DOCUMENT = re.compile(r"(?s).{4096}(?:.{0,4096}?\n\s*\n|.{0,4096}?\n|.{4096})|.+")
# bytes of a source's files to hold out, by default, where that is between 0.5 and 20 % of them
VAL_BYTES = 250_000
# endings that are read; further ones are plain text
ENDINGS = {"parquet", "jsonl", "ndjson", "json", "txt"}
# presets of train.py, for 10^8 training tokens on or fewer: name, context, tokens of a validation
PRESETS = {True: ("d12", 2048, 10_485_760), False: ("tiny", 256, 36_864)}


# --------------------------------------------------------------------------------------------------
# Flags

@dataclass(frozen=True)
class MixFlags:
    mix: str = flag(None, "mix file: sources and their weights (default: data/frontier_v1.json)", path=True)
    raw: str = flag("raw", "folder of the files to read; download writes them there", path=True)
    only: str = flag("", "names of the sources to take, comma-separated; empty: all")
    source: str = flag("", "local files for a source, name=path (file or folder), comma-separated")


@dataclass(frozen=True)
class DownloadFlags(MixFlags):
    max_bytes: int = flag(-1, "bytes a source, as downloaded: whole files are taken until there are so "
                              "many; -1: all")


@dataclass(frozen=True)
class TokenizerFlags(MixFlags):
    out: str = flag("", "folder to write; it must be given", path=True)
    extensions: str = flag("", "endings of further files that are plain text, such as md,py")
    val_fraction: float = flag(None, "share of the documents held out for validation, by a hash of their "
                                     "text (default: of each source what holds out about 250 KB of its "
                                     "files, but from 0.005 to 0.2)", low=0, high=0.99)
    vocab_size: int = flag(None, "ids, <|bos|> included (default: 32768 for a new tokenizer, all of an "
                                 "old one; a lower number takes its first so many)", low=257, high=65_536)

    def __post_init__(self):
        if not self.out:
            raise ValueError("--out must name a folder to write")


@dataclass(frozen=True)
class TokenizeFlags(TokenizerFlags):
    tokenizer: str = flag(str(HERE), "folder of the tokenizer to use", path=True)
    workers: int = flag(-1, "worker processes; -1: one for each CPU that this process may use; 0: none, "
                            "encode in this process", low=-1)


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
    path = flags.mix or HERE / "frontier_v1.json"
    only = re.findall("[^,]+", flags.only)
    local = dict(re.findall("([^,=]+)=?([^,]*)", flags.source))
    with reading(f"the mix {path} with --only {flags.only!r} and --source {flags.source!r}",
                 "it needs sources with names of letters, digits, _ and - that differ, positive weights, and "
                 "fields as in data/frontier_v1.json; --only takes some of them, and --source is name=path"):
        rows = json.loads(Path(path).read_text(encoding="utf-8"))["sources"]
        sources = {row["name"]: row | {"path": local.get(row["name"])} for row in rows
                   if re.fullmatch(r"\w[\w-]*", row["name"], re.ASCII) and 0 < row["weight"] < 1e8}
        if not 0 < len(sources) == len(rows) or not {*only, *local} <= {*sources} or "" in local.values():
            raise ValueError(f"of {len(rows)} sources {[*sources]} are right")
    return [source for name, source in sources.items() if not only or name in only]


def places_of(source, raw):
    """Where a source has its files: its path, or RAW/name and RAW/name.*"""
    named = [path for path in Path(raw).glob("*") if path.name.partition(".")[0] == source["name"]]
    return [Path(source["path"])] if source["path"] else named


def walk(path, endings, seen, skipped):
    """Yield the files at or below a path that can be read; count the others in `skipped`, by the reason.

    Linked folders are followed, hidden ones are not; `seen` has the real paths of what was met before.
    """
    real = os.path.realpath(path)
    if not os.access(path, os.R_OK):
        skipped["that cannot be opened"] += 1
    elif real not in seen:
        seen.add(real)
        if path.is_dir():
            for inner in sorted(path.glob("[!.]*")):
                yield from walk(inner, endings, seen, skipped)
        elif path.is_file() and format_of(path)[0] in endings:
            yield path
        else:
            skipped[path.suffix or "without ending"] += 1


def find_files(flags):
    """Say what to read: sources with the keys "files" (sorted), "val_fraction" (the share of documents that
    is held out) and "few" (whether there are so few that they are to be cut).

    Where no mix is named and --raw has none of the files of the default one, all of --raw is one source.
    Raises ValueError where files or packages are missing, so that nothing turns out so hours later.
    """
    plan = []
    missing = []
    sources = read_mix(flags)
    if not (flags.mix or flags.only or flags.source or any(places_of(each, flags.raw) for each in sources)):
        sources = [{"name": "text", "weight": 1, "path": flags.raw}]
    endings = ENDINGS | {*re.findall("[^,.]+", flags.extensions.lower())}
    for source in sources:
        # what an earlier command wrote is no text
        seen = {os.path.realpath(flags.out)}
        skipped = Counter()
        files = sorted(file for place in places_of(source, flags.raw)
                       for file in walk(place, endings, seen, skipped))
        kinds = ", ".join(f"{n} {kind}" for kind, n in skipped.most_common(9))
        print(f"source:{source['name']} files:{len(files)} not read:{kinds or 0}")
        for kind in {kind for file in files for kind in format_of(file)} & {*PACKAGES}:
            require(PACKAGES[kind])
        if files:
            share = flags.val_fraction
            if share is None:
                n_bytes = sum(file.stat().st_size for file in files)
                share = float(np.clip(VAL_BYTES / (1 + n_bytes), 0.005, 0.2))
            source |= {"files": files, "val_fraction": share}
            documents = read_source(source, Counter(), lambda message: None)
            source["few"] = sum(1 for _ in itertools.islice(documents, FEW)) < FEW
            plan.append(source)
        elif source["path"] or source.get("status", "open") == "open" or flags.only:
            missing.append(source["name"])
    if missing or not plan:
        absent = "" if os.path.exists(flags.raw) else ", which does not exist,"
        raise ValueError(f"source {', '.join(missing)} has no file that can be read in {flags.raw}{absent} "
                         f"or at its --source (--help lists the kinds); download it, give --source "
                         f"NAME=PATH, --extensions of plain text, or leave it out with --only. Where files "
                         f"of your own are called like sources of data/frontier_v1.json, rename them")
    return plan


def refuse(out, sha256=None, names=()):
    """Raise ValueError where a folder has another tokenizer than this one, or sources besides `names`."""
    others = {file.name.partition(".")[0] for file in Path(out).glob("*.source.json")} - {*names}
    if others or Path(out, "tokenizer.txt").exists() and Tokenizer.load(out).sha256 != sha256:
        raise ValueError(f"{out} has another tokenizer, or sources that this command would drop "
                         f"({', '.join(others) or 'none'}); name another --out, or delete the folder")


def save_tokenizer(tokenizer, out):
    for name, content in tokenizer.files().items():
        write_whole(Path(out, name), content)


# --------------------------------------------------------------------------------------------------
# Documents and their tokens

def read_source(source, lost, say=warn):
    """Yield a source's documents (str), in pieces of about 4 KB where it has few.

    What cannot be read is named by `say`, file by file, and counted in `lost`: "bad_records" of "records",
    and "corrupt_files", which were not read to their end. Empty documents are passed over.
    """
    field = source.get("chat") or source.get("text", "text")
    for path in source["files"]:
        n_records = 0
        n_bad = 0
        n_given = 0
        errors = []
        size = path.stat().st_size
        try:
            with open(path, "rb") as raw:
                for read in read_records(path, raw, field):
                    n_records += 1
                    # less than all: documents of what was read are still to come
                    progress(path, 1 + raw.tell(), 2 + size)
                    try:
                        text = clean_text(text_of(read()))
                    except (ValueError, RecursionError) as e:
                        n_bad += 1
                        errors = [*errors, f"record {n_records}: {e}"][:NAMED]
                        continue
                    # without those of white space alone
                    pieces = DOCUMENT.findall(text) if source.get("few") else [text]
                    given = [*filter(str.strip, pieces)]
                    n_given += len(given)
                    yield from given
        except corruption() as e:
            lost["corrupt_files"] += 1
            errors.append(f"not read on after record {n_records}: {e!r}; if it is damaged, fetch it again")
        lost["records"] += n_records
        lost["bad_records"] += n_bad
        # a file of bad records alone is of another kind than its ending says
        lost["corrupt_files"] += n_bad == n_records > 0
        if errors or not n_given:
            say(f"{path}: {n_bad} of {n_records} records skipped: {'; '.join(errors)} (where it is JSON it "
                f"must be a record a line: jq -c '.[]' makes lines of an array, jq -c . of a document)"
                if errors else f"{path}: no text in it")


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


@contextlib.contextmanager
def start_workers(n):
    """Processes that encode, or a thread for n = 0. Raises ValueError where one was killed."""
    pool = ThreadPoolExecutor(1)
    if n:
        pool = ProcessPoolExecutor(n, multiprocessing.get_context("spawn"), _start_worker)
    try:
        with pool:
            yield pool
    except BrokenExecutor as e:
        raise ValueError("a worker process was killed, as the system does where memory is short; give fewer "
                         "--workers and run the command again") from e


def n_cpus(quota=Path("/sys/fs/cgroup/cpu.max")):
    """How many CPUs this process may use: by its affinity, and by the quota of its cgroup (version 2)."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # the quota, which may be "max", and its period
    words = quota.read_text().split() if quota.exists() else ["max"]
    return min(n, max(1, int(words[0]) // int(words[1]))) if words[0].isdigit() else n


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


def encode_all(texts, folder, val_fraction, pool, n_ahead):
    """Yield what `encode_batch` says of each document, in order, `n_ahead` batches of them under way."""
    under_way = []
    for batch in batches(texts):
        under_way.append(pool.submit(encode_batch, folder, val_fraction, batch))
        if len(under_way) > n_ahead:
            yield from under_way.pop(0).result()
    while under_way:
        yield from under_way.pop(0).result()


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
        # of each token; <|bos|>, the last, begins a document
        counts = np.bincount(tokens, minlength=self.tokenizer.vocab_size)
        write_shard(path, tokens, counts[-1], self.tokenizer)
        self.entries.append({"file": path.name, "tokens": len(tokens), "documents": int(counts[-1]),
                             "bytes": int(counts @ self.tokenizer.token_bytes), "sha256": sha256_of(path)})


# --------------------------------------------------------------------------------------------------
# Commands

def download(flags):
    """Download the files of a mix from the hub into RAW/<source>/.

    python data/prepare.py download --raw RAW --max-bytes 1000000000 --only wikipedia,openwebmath

    The mix file names each source's repository and files; --mix, --only and --source choose sources. Gated
    and external ones are left out, with what to do, unless HF_TOKEN opens a gated one. Interrupted downloads
    go on where they stopped; a finished file is not fetched again. A source that fails does not stop the
    others, and without a network each is given up within a minute; the exit code is 2 then.

    Environment: HF_ENDPOINT (the hub, default https://huggingface.co), HF_TOKEN (sent to that host alone).
    """
    hub = Hub()
    failed = []
    with lock(flags.raw):
        for source in read_mix(flags):
            name = source["name"]
            closed = source.get("status", "open") != "open" and not hub.token
            if source["path"] or closed or not source.get("files"):
                steps = "; ".join(source.get("steps", ["its files are local, or need HF_TOKEN"]))
                print(f"source:{name} is not downloaded: {steps}")
            elif not download_source(hub, source, Path(flags.raw, name), flags.max_bytes):
                failed.append(name)
    if failed:
        raise ValueError(f"incomplete: {', '.join(failed)}; what came is kept. Run the command again for the "
                         f"rest, or mend their 'files' in the mix where no file matched")


def download_source(hub, source, folder, max_bytes):
    """Fetch files of a source, of each pattern in turn, up to `max_bytes` (-1: all).

    Returns how many there are now; 0 where one failed, after a warning.
    """
    n_files = 0
    n_bytes = 0
    rounds = itertools.zip_longest(*(hub.list(source, pattern) for pattern in source["files"]))
    try:
        for path, size, sha256 in filter(None, itertools.chain.from_iterable(rounds)):
            if 0 <= max_bytes <= n_bytes:
                break
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
    """Train a byte-level BPE on a sample of text, and write it to OUT/tokenizer.txt and tokenizer.json.

    python data/prepare.py tokenizer --raw RAW --out TOK --vocab-size 16384
    python data/prepare.py tokenize --raw RAW --out DATA --tokenizer TOK

    This is only for a tokenizer of your own: tokenize takes the one in data/ otherwise. It reads the files
    that tokenize reads (see its --help). 140 MB of text are shared out by the weights of the sources and
    taken evenly from the beginnings of a source's files. Held-out documents are left out: give both commands
    the same --val-fraction. Needs the package rustbpe.
    """
    bpe = require("rustbpe").Tokenizer()
    plan = find_files(flags)
    vocab_size = flags.vocab_size or 32_768
    refuse(flags.out)
    with lock(flags.out):
        bpe.train_from_iterator(sample_texts(plan), vocab_size - 1, pattern=SPLIT_PATTERN)
        # they come in order of rank
        made = Tokenizer([bytes(token) for token, _ in bpe.get_mergeable_ranks()], SPLIT_PATTERN)
        if made.vocab_size < vocab_size:
            raise ValueError(f"this text gives no more than {made.vocab_size} ids; give more text, or "
                             f"--vocab-size {made.vocab_size}")
        save_tokenizer(made, flags.out)
    print(f"tokenizer:{flags.out} vocab_size:{vocab_size} sha256:{made.sha256}")


def sample_texts(plan):
    """Yield the documents that a tokenizer is trained on, SAMPLE_BYTES shared out by weight."""
    weights = sum(source["weight"] for source in plan)
    for source in plan:
        taken = 0
        for i, path in enumerate(source["files"], 1):
            # of a short file the next one takes the rest
            until = SAMPLE_BYTES * source["weight"] / weights * i / len(source["files"])
            for text in read_source(source | {"files": [path]}, Counter()):
                if taken >= until:
                    break
                if not is_validation(text, source["val_fraction"]):
                    taken += len(text.encode())
                    yield text


def tokenize(flags):
    """Tokenise text into a folder of token shards, for train.py --data.

    python data/prepare.py tokenize --raw TEXTS --out DATA --vocab-size 1024   # a folder of your own texts
    python data/prepare.py tokenize --raw RAW --out DATA                       # what download fetched
    python data/prepare.py tokenize --raw RAW --out DATA --mix MIX.json

    Files: .parquet; and, with .gz, .xz or .zst too, JSON lines (.jsonl, .ndjson, .json), .txt and what
    --extensions names, one document a file. Linked folders are followed, hidden files passed over, and what
    is not read is named. The files of source web of a mix are those in RAW/web/, those called RAW/web.*, or
    what --source web=PATH names. Without --mix, and with no source of data/frontier_v1.json in RAW, all of
    RAW is one source, text.

    The text of a record is its field "text", or the one that the mix file names under "text"; "chat" there
    names a list of messages instead, {"role", "content"} or {"from", "value"}. A source of fewer than 100
    documents is cut into documents of about 4 KB, at blank lines where it has them, so that some can be held
    out. --val-fraction says how many are; manifest.json records it. Held-out documents go to eight validation
    shards a source (and one more for every 33,554,432 tokens).

    What cannot be read is named and skipped: records (invalid UTF-8, not JSON, no text, JSON lines of more
    than 64 MB), and a corrupt file from where it is corrupt on. The exit code is 2 where a file was corrupt
    or had bad records alone, or where more than 5 % of a source's records were lost; what was read is data
    all the same.

    A finished source is not done again while its files and flags stay as they are; one that was interrupted
    is done again (shards that it then needs no more stay in the folder, unnamed). The shards are the same
    with any --workers. manifest.json is written last: without it the folder is not data. Needs pyarrow for
    .parquet, and backports.zstd for .zst before Python 3.14.
    """
    plan = find_files(flags)
    tokenizer = Tokenizer.load(flags.tokenizer, flags.vocab_size)
    out = Path(flags.out)
    workers = n_cpus() if flags.workers < 0 else flags.workers
    with lock(out), start_workers(workers) as pool:
        refuse(out, tokenizer.sha256, [source["name"] for source in plan])
        save_tokenizer(tokenizer, out)
        # it comes last: without it the folder is not data
        (out / "manifest.json").unlink(missing_ok=True)
        entries = [tokenize_source(source, out, tokenizer, pool, 2 * workers + 1) for source in plan]
        write_whole(out / "manifest.json", json.dumps({
            "format": 1, "tokenizer_sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size, "sources": entries}, indent=1).encode())
    check_validation(open_data(out))
    lacking = [entry["name"] for entry in entries if entry["corrupt_files"] or not entry["train"]
               or entry["bad_records"] > MAX_LOST * entry["records"]]
    if lacking:
        raise ValueError(f"{', '.join(lacking)}: corrupt files, more than {MAX_LOST:.0%} of the records "
                         f"lost, or no document to train on (are 'text' and 'chat' right in the mix?), see "
                         f"above; mend or remove those files and run the command again, or use {out} without "
                         f"what was lost")


def tokenize_source(source, out, tokenizer, pool, n_ahead):
    """Write the shards of a source, unless they are there; return what the manifest says of them."""
    name = source["name"]
    # what the shards depend on; it stands beside them once they are whole
    key = [tokenizer.sha256, source["val_fraction"], source["few"], source.get("chat"), source.get("text"),
           [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in source["files"]]]
    record = out / f"{name}.source.json"
    if record.exists():
        entry = json.loads(record.read_text())
        # the record of an earlier version has another key
        if entry.pop("key") == key and all((out / shard["file"]).exists()
                                           for shard in entry["train"] + entry["val"]):
            print(f"source:{name} done before, files and flags are the same")
            # the weight alone may be another one
            return entry | {"weight": source["weight"]}
        record.unlink()
    lost = Counter(corrupt_files=0)
    train = Shards(out / f"{name}-train", tokenizer)
    val = Shards(out / f"{name}-val", tokenizer)
    for is_val, tokens in encode_all(read_source(source, lost), out, source["val_fraction"], pool, n_ahead):
        (val if is_val else train).extend(tokens)
    train.flush(1)
    val.flush(8)
    entry = {"name": name, "weight": source["weight"], "val_fraction": source["val_fraction"], **lost,
             "train": train.entries, "val": val.entries}
    write_whole(record, json.dumps(entry | {"key": key}).encode())
    counts = {f"{split}_tokens": sum(shard["tokens"] for shard in entry[split]) for split in ("train", "val")}
    print(f"source:{name}", *(f"{what}:{n}" for what, n in (counts | lost).items()))
    return entry


def check_validation(data):
    """Warn where train.py, with the preset for so much text, would not validate: too little is held out."""
    try:
        preset, T, n_tokens = PRESETS[data.train(1, 0).windows.sum() >= 1e8]
        validation_windows(data.val(T), n_tokens, f"train.py --preset {preset} --eval-tokens")
    except ValueError as e:
        warn(e)


def inspect(flags):
    """Show the sources of a folder of shards: weights, tokens, bytes per token, first words.

    python data/prepare.py inspect --data DATA --verify

    It reads what tokenize wrote, and writes nothing. A warning says where too little text is held out for the
    validation of train.py; --verify compares every shard with the sha256 in manifest.json.
    """
    folder = Path(flags.data)
    data = open_data(folder)
    # windows of one token
    mix = data.train(1, 0)
    print(f"vocab_size:{data.tokenizer.vocab_size} tokenizer_sha256:{data.tokenizer.sha256}")
    shards = []
    for source, entry in zip(mix.sources, data.entries):
        shards += entry["train"] + entry["val"]
        n_bytes = sum(shard["bytes"] for shard in entry["train"])
        val_tokens = sum(shard["tokens"] for shard in entry["val"])
        print(f"source:{source.name} weight:{source.weight} train_tokens:{source.n_tokens} "
              f"val_tokens:{val_tokens} bytes_per_token:{n_bytes / source.n_tokens:.2f}")
        print(f"    {data.tokenizer.decode(source.shards[0][:100])!r}")
    check_validation(data)
    if flags.verify:
        damaged = [shard["file"] for shard in shards if sha256_of(folder / shard["file"]) != shard["sha256"]]
        if damaged:
            raise ValueError(f"{', '.join(damaged)} in {folder} are damaged (sha256); delete them and run "
                             f"data/prepare.py tokenize again")
        print("verified: every shard has the sha256 of the manifest")


COMMANDS = {"download": (download, DownloadFlags, ()), "tokenizer": (tokenizer, TokenizerFlags, ()),
            "tokenize": (tokenize, TokenizeFlags, ()), "inspect": (inspect, InspectFlags, ())}


def main(argv=None):
    name, given = parse_command(COMMANDS, __doc__, argv)
    function, cls, _ = COMMANDS[name]
    function(cls(**given))


if __name__ == "__main__":
    run(main)
