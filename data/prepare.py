"""
Download a mix of text corpora, train a tokenizer on it, and write the token shards that dataloader.py reads.

    mix file --download--> RAW/<source>/... --tokenize--> DATA/<source>-<split>-00000.bin, tokenizer.txt, manifest.json

    python data/prepare.py download --raw RAW --max-bytes 1000000000     # 1 GB a source of data/frontier_v1.json
    python data/prepare.py tokenize --raw RAW --out DATA                 # then: python train.py --data DATA
    python data/prepare.py inspect --data DATA --verify
    python data/prepare.py tokenizer --raw RAW --out TOK                 # only for a tokenizer of your own

A mix file names sources with their weights; data/frontier_v1.json is one, and a mix of your own files is just another:
{"name": "mine", "sources": [{"name": "web", "weight": 3}, {"name": "code", "weight": 1, "text": "content"}]}. The files of
source web are those in RAW/web/, those called RAW/web.*, or what --source web=PATH names: .parquet; JSON lines (.jsonl, .ndjson,
.json); .txt, one document a file; all with .gz, .xz or .zst too. The text of a record is its field "text", or the one that the mix
file names; "chat" names a list of messages instead, see `render_chat`.

One process reads and the workers encode. A long document is read twice: to its end, to find whether it is well formed (of one that
is skipped nothing reaches a shard), and again to be encoded in pieces. A document of 200 MB takes 0.25 GB of resident memory as plain
text, 0.45 GB as a JSON line and 0.95 GB in parquet (pyarrow holds the page that it is in up to three times), and 0.08 GB more for each
worker. JSON lines of more than 256 MB are skipped.

Environment: HF_ENDPOINT (the hub, default https://huggingface.co), HF_TOKEN (for gated sources; sent to that host alone).
Extras: pyarrow for parquet, backports.zstd for .zst before Python 3.14, rustbpe for the command tokenizer.
Not here: deduplication, filtering, shuffling of documents (the mixture in dataloader.py shuffles windows).
"""
import contextlib
import fcntl
import functools
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))             # the repository's root, one folder up
from data.hub import Hub, progress, sha256_of, warn
from data.readers import BLOCK, READ_ERRORS, cut, format_of, in_pieces, read_records, text_of, zstd
from dataloader import HERE, SPLIT_PATTERN, Tokenizer, clean_text, is_validation, open_data, open_shard, write_shard, write_whole
from flags import flag, parse_flags, run, spelled

SHARD_TOKENS = 1 << 25              # 2 bytes each
SAMPLE_BYTES = 140_000_000          # of text that a tokenizer is trained on


# ---------------------------------------------------------------------------------------------------------------
# Flags

@dataclass(frozen=True)
class Config:
    mix: str = flag("", "mix file: sources and their weights; empty: frontier_v1.json beside this script")
    raw: str = flag("raw", "folder of the downloaded files")
    only: str = flag("", "names of the sources to take, comma-separated; empty: all")
    source: str = flag("", "local files for a source, name=path (a file or a folder); several are comma-separated")
    # download
    max_bytes: int = flag(-1, "bytes a source, as downloaded: whole files are taken until there are so many; -1: all")
    # tokenizer and tokenize
    out: str = flag("", "folder to write; it must be given")
    val_fraction: float = flag(0.005, "share of the documents held out for validation, by a hash of their text; 0.03 suits a few hundred MB")
    vocab_size: int = flag(-1, "ids, <|bos|> included; -1: 32768 for a new tokenizer, all of an old one (otherwise its first so many)")
    tokenizer: str = flag("", "folder of the tokenizer to use; empty: the one beside this script")
    workers: int = flag(-1, "worker processes; -1: one a core; 0: none, encode in this process")
    # inspect
    data: str = flag("", "folder of token shards; it must be given")
    verify: bool = flag(False, "compare the sha256 of every shard with the manifest")


# ---------------------------------------------------------------------------------------------------------------
# Mixes, files and folders

def read_mix(config):
    """Read the mix file, --only and --source: (name of the mix, its chosen sources (dicts), {name: path} of local files)."""
    path = Path(config.mix or HERE / "frontier_v1.json")
    if not path.is_file():
        raise FileNotFoundError(f"--mix {path} is not there; give a mix file (README, \"Your own data\"), or leave it out for data/frontier_v1.json")
    try:
        mix = json.loads(path.read_text(encoding="utf-8"))
        label, sources, names, wrong = mix["name"], mix["sources"], [source["name"] for source in mix["sources"]], []
        for source in sources:
            texts = [source.get(key, "") for key in ("status", "repository", "revision", "text", "chat")]
            texts += [*source.get("files", []), *source.get("steps", []), source.get("stand_in", {"repository": ""})["repository"]]
            if not (re.fullmatch(r"\w[\w-]*", source["name"], re.ASCII) and 0 < source["weight"] < 1e8
                    and all(isinstance(text, str) for text in texts) and all(isinstance(source.get(key, []), list) for key in ("files", "steps"))):
                wrong.append(source["name"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{path} is not a mix file ({e!r}); data/frontier_v1.json shows the form") from None
    if wrong or not names or len(set(names)) < len(names):
        raise ValueError(f"{path}: sources need names of letters, digits, _ and - that differ, positive weights, and fields as in "
                         f"data/frontier_v1.json; look at {wrong or names}")
    chosen = config.only.split(",") if config.only else names
    given = [item.partition("=")[::2] for item in config.source.split(",") if item]
    local = dict(given)
    if len(local) < len(given):
        raise ValueError(f"--source {config.source} names one source twice; put its files into one folder")
    if unknown := {*chosen} - {*names} or {*local} - {*chosen}:
        raise ValueError(f"--only or --source names {', '.join(sorted(unknown))}; {path} has {', '.join(names)}, and --source must be among --only")
    for source, place in local.items():
        if not place or not Path(place).exists():
            raise ValueError(f"--source {source}={place}: no such file or folder; write --source name=path")
    return label, [source for source in sources if source["name"] in chosen], local


def find_files(config):
    """Say what to read: (name of the mix, [(source, its files, sorted)]), checked so that nothing turns out missing hours later."""
    if not config.out:
        raise ValueError("--out must name a folder")
    if not 0 <= config.val_fraction < 1:
        raise ValueError(f"--val-fraction must be from 0 to below 1, not {config.val_fraction}")
    mix, sources, local = read_mix(config)
    plan, raw = [], Path(config.raw)
    for source in sources:
        name = source["name"]
        places = [Path(local[name])] if name in local else [raw / name, *raw.glob(f"{name}.*")]
        files = sorted(file for place in places for file in [place, *place.rglob("*")] if format_of(file) and file.is_file())
        if files:
            plan.append((source, files))
        elif name in local or source.get("status", "open") == "open":
            raise ValueError(f"source {name} has no file that can be read in {local.get(name, raw / name)} (.parquet, .jsonl, .ndjson, .json, .txt; "
                             f".gz, .xz, .zst); download it, give --source {name}=PATH, or leave it out with --only")
        else:
            warn(f"source {name} ({source['status']}, weight {source['weight']}) has no files and is left out; "
                 f"the other weights are normalised. See: data/prepare.py download --only {name}")
    if not plan:
        raise ValueError(f"no source of the mix {mix} has files; see data/prepare.py download")
    suffixes = {suffix for _, files in plan for file in files for suffix in format_of(file)}
    for suffix, package, found in (("parquet", "pyarrow", importlib.util.find_spec("pyarrow")), ("zst", "backports.zstd", zstd)):
        if suffix in suffixes and not found:
            raise ValueError(f".{suffix} files need the package {package}; pip install {package}")
    return mix, plan


@contextlib.contextmanager
def locked(folder):
    """Hold a folder for this process alone; the system lets go when the process ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing into {folder}; wait for it to end or name another folder") from None
        yield


# ---------------------------------------------------------------------------------------------------------------
# Documents

def read_source(source, files, bad):
    """Yield (text, part) of the documents of a source, see `in_pieces`. What cannot be read is named and counted in `bad`."""
    done, show = 0, progress(f"source:{source['name']}", sum(path.stat().st_size for path in files))
    for path in files:
        number = 0
        try:
            with open(path, "rb") as raw:
                for number, record in read_records(path, raw, source.get("chat") or source.get("text", "text")):
                    try:
                        blocks = text_of(record, source)
                        for _ in blocks():                                  # to its end: a bad document shall leave no pieces behind
                            pass
                        yield from in_pieces(blocks())
                    except (ValueError, RecursionError) as e:
                        bad["records"] += 1
                        if bad["records"] <= 20:
                            warn(f"{path}: record {number} skipped: {e}" + "; further ones are only counted" * (bad["records"] == 20))
                    record = blocks = None                                  # they may be large, and the next ones too
                    show(lambda: done + raw.tell())
        except READ_ERRORS as e:
            bad["files"] += 1
            warn(f"{path}: corrupt in or after record {number} ({e}); the documents before are kept. Fetch it again and run the command again")
        done += path.stat().st_size


# ---------------------------------------------------------------------------------------------------------------
# Encoding

_load_tokenizer = functools.cache(Tokenizer.load)                           # once in each process


def encode_batch(folder, val_fraction, batch):
    """Encode pairs (text, part): (tokens that train, tokens held out, both uint16 (n,), CPU seconds)."""
    begun, tokenizer, train, val = time.thread_time(), _load_tokenizer(folder), [np.zeros(0, np.uint16)], [np.zeros(0, np.uint16)]
    for text, part in batch:
        held_out = part == "whole" and is_validation(text, val_fraction)
        (val if held_out else train).append(tokenizer.encode_array(text, begins=part != "next"))
    return np.concatenate(train), np.concatenate(val), time.thread_time() - begun


def _start_worker():
    """Run once in each worker process: leave Ctrl-C to the main process, and end when that ends, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def encode_all(pieces, pool, n_ahead, folder, val_fraction):
    """Yield what `encode_batch` returns for batches of about BLOCK characters, in order, with at most `n_ahead` of them under way."""
    batch, size, under_way = [], 0, deque()
    for piece in itertools.chain(pieces, [None]):                           # None pushes out the last batch
        if piece:
            batch.append(piece)
            size += len(piece[0])
        if size >= BLOCK or not piece:
            under_way.append(pool.submit(encode_batch, folder, val_fraction, batch))
            batch, size = [], 0
        while len(under_way) > (n_ahead if piece else 0):
            yield under_way.popleft().result()


class Shards:
    """Collect the tokens of one source and split; write a shard whenever SHARD_TOKENS are there."""

    def __init__(self, folder, prefix, tokenizer):
        self.folder, self.prefix, self.tokenizer = folder, prefix, tokenizer
        self.files, self.buffer, self.fill = [], np.empty(SHARD_TOKENS, dtype=np.uint16), 0

    def add(self, tokens):
        while len(tokens):
            n = min(len(tokens), len(self.buffer) - self.fill)
            self.buffer[self.fill:self.fill + n] = tokens[:n]
            self.fill, tokens = self.fill + n, tokens[n:]
            if self.fill == len(self.buffer):
                self.flush(1)

    def flush(self, parts):
        """Write what is there as `parts` shards of equal size."""
        for tokens in np.array_split(self.buffer[:self.fill], parts):
            if len(tokens):
                path = self.folder / f"{self.prefix}-{len(self.files):05d}.bin"
                counts = sum(np.bincount(block, minlength=self.tokenizer.vocab_size) for block in cut(tokens))
                documents, text_bytes = int(counts[self.tokenizer.bos]), int(counts @ self.tokenizer.token_bytes)   # those that begin here
                write_shard(path, tokens, documents, self.tokenizer)
                self.files.append({"file": path.name, "tokens": len(tokens), "bytes": text_bytes, "documents": documents, "sha256": sha256_of(path)})
        self.fill = 0


# ---------------------------------------------------------------------------------------------------------------
# Commands

def download(config):
    """Download the files of a mix. Gated and external sources print what to do instead, unless HF_TOKEN opens them.

    Interrupted downloads go on where they stopped; a finished file is not fetched again. A source that fails does not
    stop the others; the exit code is 2 then."""
    (_, sources, local), hub, failed = read_mix(config), Hub(), []
    if config.max_bytes == 0 or config.max_bytes < -1:
        raise ValueError(f"--max-bytes must be positive, or -1 for all, not {config.max_bytes}")
    with locked(Path(config.raw)):
        for source in sources:
            name, status, folder, files, taken = source["name"], source.get("status", "open"), Path(config.raw) / source["name"], 0, 0
            if name in local or "repository" not in source:
                print(f"source:{name} local files, nothing to download")
                continue
            if status == "external" or (status == "gated" and not hub.token):
                print(f"source:{name} is {status}, not downloaded:")
                for i, step in enumerate(source.get("steps", []), 1):
                    print(f"  {i}. {step}")
                if "stand_in" in source:
                    print(f"  Or put its \"stand_in\" in its place in a copy of the mix file: {source['stand_in']['repository']} is open", flush=True)
                continue
            try:
                lists = [hub.list(source, pattern) for pattern in source.get("files", [])]
                for path, size, sha256 in filter(None, itertools.chain.from_iterable(itertools.zip_longest(*lists))):    # of each in turn
                    if 0 <= config.max_bytes <= taken:
                        break
                    if not ((folder / path).exists() and (folder / path).stat().st_size == size):
                        hub.fetch(source, path, size, sha256, folder / path)
                    files, taken = files + 1, taken + size
                if not files:
                    raise ValueError(f"{source['repository']}: no file matches {', '.join(source.get('files', []))}; correct the mix file")
            except ValueError as e:
                warn(e)
                failed.append(name)
            print(f"source:{name} files:{files} bytes:{taken} repository:{source['repository']} folder:{folder}", flush=True)
    if failed:
        raise ValueError(f"incomplete: {', '.join(failed)}; what came is kept, run the command again for the rest")


def tokenizer(config):
    """Train a byte-level BPE on a sample of a mix, by weight: tokenizer.txt and tokenizer.json.

    140 MB of text are shared out by weight and taken evenly from the beginnings of a source's files. Held-out documents are left out."""
    try:
        import rustbpe                                                      # only this command needs it
    except ImportError:
        raise ValueError("training a tokenizer needs the package rustbpe; pip install rustbpe") from None
    mix, plan = find_files(config)
    vocab_size = 32_768 if config.vocab_size < 0 else config.vocab_size
    if not 257 <= vocab_size <= 65_536:
        raise ValueError(f"--vocab-size must be from 257 to 65536 (shards hold 2 bytes a token), not {vocab_size}")
    out, weights = Path(config.out), sum(source["weight"] for source, _ in plan)

    def sample():
        for source, files in plan:
            budget, taken = SAMPLE_BYTES * source["weight"] / weights, 0
            for i, path in enumerate(files):
                until = taken + (budget - taken) / (len(files) - i)
                for text, part in read_source(source, [path], Counter()):
                    if taken >= until:
                        break
                    if part != "whole" or not is_validation(text, config.val_fraction):
                        text = clean_text(text)
                        taken += len(text.encode())
                        yield text
            print(f"source:{source['name']} sample_bytes:{taken} asked:{budget:.0f}", flush=True)

    with locked(out):
        if (out / "tokenizer.txt").exists():
            raise ValueError(f"{out} has a tokenizer already; name another --out, or delete it")
        bpe = rustbpe.Tokenizer()
        bpe.train_from_iterator(sample(), vocab_size - 1, pattern=SPLIT_PATTERN)
        ranks = [bytes(token) for token, _ in sorted(bpe.get_mergeable_ranks(), key=lambda pair: pair[1])]
        if len(ranks) < vocab_size - 1:
            raise ValueError(f"the sample gives {len(ranks) + 1:,} ids, not {vocab_size:,}; give more text or a lower --vocab-size")
        made = Tokenizer(ranks, SPLIT_PATTERN)
        for name, content in made.files().items():
            write_whole(out / name, content)
    print(f"tokenizer:{out} vocab_size:{made.vocab_size} sha256:{made.sha256} mix:{mix}")


def total(files, key):
    """Sum one count over the entries of shards in the manifest."""
    return sum(file[key] for file in files)


def tokenize_source(source, files, config, tokenizer, pool, workers):
    """Write the shards of one source; return its entry in the manifest."""
    name, out, bad, start, seconds = source["name"], Path(config.out), Counter(), time.monotonic(), -time.process_time()
    train, val = (Shards(out, f"{name}-{split}", tokenizer) for split in ("train", "val"))
    for train_tokens, val_tokens, spent in encode_all(read_source(source, files, bad), pool, 2 * workers + 1, config.out, config.val_fraction):
        train.add(train_tokens)
        val.add(val_tokens)
        seconds += spent if workers else 0                                  # without workers it is time of this process
    train.flush(1)
    val.flush(8)
    seconds, every = seconds + time.process_time(), train.files + val.files
    n_tokens, megabytes = total(every, "tokens"), total(every, "bytes") / 1e6
    print(f"source:{name} documents:{total(every, 'documents')} train_tokens:{total(train.files, 'tokens')} val_tokens:{total(val.files, 'tokens')} "
          f"bytes_per_token:{1e6 * megabytes / max(1, n_tokens):.2f} bad_records:{bad['records']} corrupt_files:{bad['files']} "
          f"text:{megabytes:.1f}MB rate:{megabytes / (time.monotonic() - start):.1f}MB/s per_core:{megabytes / seconds:.1f}MB/s", flush=True)
    return {"name": name, "weight": source["weight"], "corrupt_files": bad["files"], "train": train.files, "val": val.files}


def tokenize(config):
    """Tokenise a mix into a folder of shards that train.py --data reads; the same bytes whatever --workers is.

    A finished source is not done again while its files and flags stay as they are; one that was interrupted is done again.
    A record that cannot be read (invalid UTF-8, not JSON, no text field, empty) is skipped, named and counted. A corrupt file ends
    where it is corrupt; what came before is kept, and the exit code is 2. A document of more than 4,194,304 characters always trains.
    Held-out documents go to eight validation shards a source (and one more for every 33,554,432 tokens). manifest.json is written
    last: without it the folder is not data."""
    mix, plan = find_files(config)
    tokenizer = Tokenizer.load(config.tokenizer or HERE, None if config.vocab_size < 0 else config.vocab_size)
    if config.workers < -1:
        raise ValueError(f"--workers must be at least -1, not {config.workers}")
    out, entries = Path(config.out), []
    workers = multiprocessing.cpu_count() if config.workers < 0 else config.workers
    with locked(out):
        if (out / "tokenizer.txt").exists() and (other := Tokenizer.load(out).sha256) != tokenizer.sha256:
            raise ValueError(f"{out} is of another tokenizer (sha256 {other[:12]}..., this one is {tokenizer.sha256[:12]}...); "
                             f"name another --out, or delete the folder")
        made = {file.name.removesuffix(".source.json") for file in out.glob("*.source.json")}
        if lost := made - {source["name"] for source, _ in plan}:
            raise ValueError(f"{out} holds {', '.join(sorted(lost))} too, which its manifest would lose; take these sources along (--only, --mix), name "
                             f"another --out, or delete {', '.join(f'{name}.source.json' for name in sorted(lost))} there first")
        for name, content in tokenizer.files().items():
            write_whole(out / name, content)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, spawn, _start_worker) if workers else ThreadPoolExecutor(1) as pool:
            for source, files in plan:
                record = out / f"{source['name']}.source.json"
                key = {"tokenizer_sha256": tokenizer.sha256, "val_fraction": config.val_fraction, "fields": [source.get("chat"), source.get("text")],
                       "files": [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]}
                try:
                    before = json.loads(record.read_text())
                    entry = before.pop("entry") | {"weight": source["weight"]}
                    for shard in entry["train"] + entry["val"]:
                        open_shard(out / shard["file"], tokenizer)
                    done = before == key
                except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):        # no record, or it or a shard is damaged
                    done = False
                if done:
                    print(f"source:{source['name']} done before, files and flags are the same", flush=True)
                else:
                    shards = [shard for split in ("train", "val") for shard in out.glob(f"{source['name']}-{split}-{'[0-9]' * 5}.bin*")]
                    for stale in (out / "manifest.json", record, *shards):
                        stale.unlink(missing_ok=True)
                    entry = tokenize_source(source, files, config, tokenizer, pool, workers)
                    write_whole(record, json.dumps(key | {"entry": entry}).encode())
                entries.append(entry)
        manifest = {"format": 1, "name": mix, "tokenizer_sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size, "sources": entries}
        write_whole(out / "manifest.json", json.dumps(manifest, indent=1).encode())
    try:
        open_data(out).val(2048)
    except ValueError as e:
        warn(f"validation: {e}, or raise --val-fraction")
    if corrupt := [entry["name"] for entry in entries if entry["corrupt_files"]]:
        raise ValueError(f"corrupt files in {', '.join(corrupt)}: {out} is usable without what was lost; fetch them again and run again for the rest")
    if empty := [entry["name"] for entry in entries if not total(entry["train"], "tokens")]:
        raise ValueError(f"no document of {', '.join(empty)} is there to train on: look at its files and at its \"text\" or \"chat\" in the mix, then run "
                         f"again, or leave it out with --only")


def inspect(config):
    """Show a folder of shards: tokens, bytes per token, the share asked for and the share that training sees, documents."""
    if not config.data:
        raise ValueError("--data must name a folder of token shards")
    folder, data, n = Path(config.data), open_data(config.data), 20_000
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        name, sources, weights = manifest["name"], manifest["sources"], sum(source["weight"] for source in manifest["sources"])
        shards = [shard for source in sources for shard in source["train"] + source["val"]]
        [(shard["sha256"], total([shard], "bytes") + total([shard], "documents")) for shard in shards]      # all fields are there
        T = max(1, min(2048, *(total(source["train"], "tokens") - 1 for source in sources)))
    except (KeyError, TypeError) as e:
        raise ValueError(f"{folder / 'manifest.json'} is not readable ({e!r}); run data/prepare.py tokenize again") from None
    print(f"data:{folder} mix:{name} vocab_size:{data.tokenizer.vocab_size} tokenizer_sha256:{data.tokenizer.sha256}")
    mix = data.train(T, 0)
    seen = np.bincount(mix.locate(np.arange(n))[0], minlength=len(sources)) / n
    for source, share in zip(sources, seen):
        train, tokens = source["train"], total(source["train"], "tokens")
        print(f"source:{source['name']} train_tokens:{tokens} val_tokens:{total(source['val'], 'tokens')} train_documents:{total(train, 'documents')}",
              f"bytes_per_token:{total(train, 'bytes') / max(1, tokens):.2f}",
              f"asked:{100 * source['weight'] / weights:.2f}% realised:{100 * share:.2f}%")
    print(f"realised: of the first {n:,} samples of {T} tokens. Before any window comes twice: {mix.n_in_first_epoch() * T:,} tokens")
    for source in sources[:3]:
        head = open_shard(folder / source["train"][0]["file"], data.tokenizer)[:2048]
        stop = np.flatnonzero(np.append(head[1:], data.tokenizer.bos) == data.tokenizer.bos)[0] + 1
        print(f"--- {source['name']}, first document\n{data.tokenizer.decode(head[:stop])[:600]}")
    if config.verify:
        if damaged := [shard["file"] for shard in shards if sha256_of(folder / shard["file"]) != shard["sha256"]]:
            raise ValueError(f"{', '.join(damaged)} in {folder} are damaged (sha256); delete them and run data/prepare.py tokenize again")
        print("verified: every shard has the sha256 of the manifest")


OF_A_MIX = ("mix", "raw", "only", "source")
COMMANDS = {"download": (download, (*OF_A_MIX, "max_bytes")), "tokenizer": (tokenizer, (*OF_A_MIX, "out", "val_fraction", "vocab_size")),
            "tokenize": (tokenize, (*OF_A_MIX, "out", "val_fraction", "vocab_size", "tokenizer", "workers")),
            "inspect": (inspect, ("data", "verify"))}


def main():
    given = parse_flags(Config, __doc__, positionals=[(
        "command", None, ", ".join(COMMANDS) + ". --max-bytes is of download; --out, --val-fraction and --vocab-size are of tokenizer and "
        "tokenize; --tokenizer and --workers of tokenize; --data and --verify of inspect; the rest is of all but inspect")])
    command = given.pop("command")
    if command not in COMMANDS:
        raise ValueError(f"no command {command!r}; choose from {', '.join(COMMANDS)} (see --help)")
    if sum(word.partition("=")[0] == "--source" for word in sys.argv) > 1:
        raise ValueError("--source is given more than once; give it once, comma-separated: --source a=PATH,b=PATH")
    function, names = COMMANDS[command]
    if foreign := [spelled(name) for name in given if name not in names]:
        raise ValueError(f"{', '.join(foreign)} does nothing in {command}; leave it out (see --help)")
    function(Config(**given))


if __name__ == "__main__":
    run(main)
