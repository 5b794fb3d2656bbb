"""
data/prepare.py against a hub on the loopback that misbehaves, files that are damaged, and tokens encoded in
one go.

Run: python -m pytest tests/test_prepare.py
"""
import hashlib
import http.server
import json
import lzma
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import train
from data import hub as hub_module
from data import prepare, readers
from data.prepare import DownloadFlags, InspectFlags, TokenizeFlags, TokenizerFlags
from dataloader import Data, Tokenizer, is_validation, open_data, open_shard
from model import PRESETS

LIST = "/api/datasets/o/web/tree/main/web"
def refusing(message):
    """A context in which ValueError is raised with a message like this."""
    return pytest.raises(ValueError, match=message)
WORDS = "the of and to model token stage expert a score, which (never) its bound; 1234 don't 5x\n".split(" ")


# --------------------------------------------------------------------------------------------------
# A hub that misbehaves

class Handler(http.server.BaseHTTPRequestHandler):
    """A hub on the loopback. Its server has `files` {path: content}, `seen` [(path, headers)] and `plans`:
    for a path, what its first requests meet: (status, headers, body), or how the body ends and after how many
    bytes: "short" or "stall".
    """

    def do_GET(self):
        hub = self.server
        path = self.path.partition("?")[0]
        name = path.split("/resolve/main/")[-1]
        hub.seen.append((name, self.headers))
        plan = hub.plans.get(name)
        step = plan.pop(0) if plan else ("", None)
        if isinstance(step[0], int):
            self.answer(*step)
        elif path.startswith("/api/"):
            self.answer(200, {}, listing(hub.files))
        else:
            begin = int(self.headers["Range"][6:-1])
            self.answer(206 if begin else 200, {}, hub.files[name][begin:], *step)

    def answer(self, status, headers, body=b"", end="", sent=None):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:sent])
        if end == "stall":
            time.sleep(0.7)
        self.close_connection = True

    def log_message(self, *_):
        pass


def listing(files):
    """The hub's list of these files."""
    listed = [{"type": "file", "path": name, "size": len(files[name]),
               "lfs": {"oid": hashlib.sha256(files[name]).hexdigest()}} for name in sorted(files)]
    return json.dumps([{"type": "directory", "path": "folder"}, *listed]).encode()


def start_hub():
    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.daemon_threads = True
    hub.files = {"web/a.txt": random.Random(1).randbytes(300_007), "code/b.txt": b"b" * 1009}
    hub.plans = {}
    hub.seen = []
    threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True).start()
    return hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = start_hub()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    mix = {"name": "m", "sources": [
        {"name": "web", "weight": 2, "repository": "o/web", "files": ["web/*.txt"]},
        {"name": "code", "weight": 1, "repository": "o/code", "files": ["code/*.txt"]}]}
    (tmp_path / "mix.json").write_text(json.dumps(mix))
    hub.config = DownloadFlags(mix=str(tmp_path / "mix.json"), raw=str(tmp_path / "raw"))
    for name, value in {"BACKOFF": 0.01, "TIMEOUT": 0.4, "RETRIES": 3, "OFFLINE": 0.01}.items():
        monkeypatch.setattr(hub_module, name, value)
    hub.a = tmp_path / "raw/web/web/a.txt"
    hub.b = tmp_path / "raw/code/code/b.txt"
    yield hub
    hub.shutdown()


def ranges(hub, path):
    return [headers.get("Range") for seen, headers in hub.seen if seen == path]


def test_a_download_goes_on_after_short_bodies_and_a_stall(hub):
    hub.plans["web/a.txt"] = [("short", 50_000), ("short", 40_000), ("stall", 70_000)]
    prepare.download(hub.config)
    assert hub.a.read_bytes() == hub.files["web/a.txt"]
    # each goes on from a later byte
    begun = [int(r[6:-1]) for r in ranges(hub, "web/a.txt")[1:]]
    assert len(begun) == 3 and 0 < begun[0] < begun[1] < begun[2], begun


@pytest.mark.parametrize("with_ranges", [True, False])
def test_an_interrupted_command_goes_on_and_finished_files_are_not_fetched_again(hub, with_ranges):
    if not with_ranges:
        hub.plans["web/a.txt"] = [(200, {}, hub.files["web/a.txt"])]
    hub.a.parent.mkdir(parents=True)
    Path(f"{hub.a}.part").write_bytes(hub.files["web/a.txt"][:123_457])
    for _ in range(2):
        prepare.download(hub.config)
    assert ranges(hub, "web/a.txt") == ["bytes=123457-"] and len(ranges(hub, "code/b.txt")) == 1
    assert hub.a.read_bytes() == hub.files["web/a.txt"]


def test_429_waits_as_long_as_it_says_and_503_is_tried_again(hub):
    hub.plans[LIST] = [(503, {})]
    hub.plans["web/a.txt"] = [(429, {"Retry-After": "1"}), (503, {})]
    start = time.monotonic()
    prepare.download(hub.config)
    assert 1 <= time.monotonic() - start < 3 and hub.a.exists()


@pytest.mark.parametrize("path, answer, tries, message", [
    ("web/a.txt", (503, {}), 4, "byte 0: 503 .* given up after 4 failures: run the command again"),
    ("web/a.txt", (403, {}), 1, "byte 0: 403 .* given up after 1 failures: .* accept its terms"),
    ("web/a.txt", (200, {}, bytes(300_007)), 1, "has not the size or the sha256"),
    *[(LIST, (200, {}, answer), 1, "HF_ENDPOINT") for answer in (
        b'{"error": "maintenance"}', b'[{"type": "file"}]', b"<html>")],
    (LIST, (200, {}, listing({"web/../../x.txt": b"x"})), 1, "")])
def test_a_source_that_fails_is_named_and_the_other_is_downloaded(hub, capsys, path, answer, tries, message):
    hub.plans[path] = [answer] * 9
    with refusing("incomplete: web;"):
        prepare.download(hub.config)
    assert len(ranges(hub, path)) == tries and not hub.a.exists() and hub.b.exists()
    assert re.search(message, capsys.readouterr().err)
    assert not any("x.txt" in name for name, _ in hub.seen)


def test_without_a_network_a_source_is_given_up_soon(hub, monkeypatch, capsys):
    # connections to this port are refused
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub_module, "RETRIES", 9)
    monkeypatch.setattr(hub_module, "OFFLINE", 0.05)
    with refusing("incomplete: web, code;"):
        prepare.download(hub.config)
    assert re.search("after [2-6] failures: .*look at the network", capsys.readouterr().err)


def test_the_token_goes_to_the_hub_and_not_where_it_redirects(hub, monkeypatch):
    other = start_hub()
    # as copied over two lines
    monkeypatch.setenv("HF_TOKEN", "hf_sec\nret\n")
    # another host, and the same name at another port
    for host, name in (("localhost", "web/a.txt"), ("127.0.0.1", "code/b.txt")):
        hub.plans[name] = [(302, {"Location": f"http://{host}:{other.server_port}/resolve/main/{name}"})]
    prepare.download(hub.config)
    other.shutdown()
    assert hub.a.exists() and hub.b.exists() and len(other.seen) == 2
    assert {headers.get("Authorization") for _, headers in hub.seen} == {"Bearer hf_secret"}
    assert all("secret" not in headers.get("Authorization", "") for _, headers in other.seen)


def test_max_bytes_takes_whole_files_until_there_is_enough_and_lists_are_paged(hub):
    hub.files |= {f"web/{i}.txt": bytes(400) for i in range(7)}
    first_page = listing({"web/0.txt": bytes(400)})
    hub.plans[LIST] = [(200, {"Link": '<http://127.0.0.1/api?cursor=2>; rel="next"'}, first_page)]
    prepare.download(replace(hub.config, max_bytes=1000, only="web"))
    assert sorted(file.name for file in hub.a.parent.iterdir()) == ["0.txt", "1.txt"]
    prepare.download(replace(hub.config, only="web"))
    assert len(list(hub.a.parent.iterdir())) == 8


def test_gated_sources_are_left_out_until_there_is_a_token(hub, monkeypatch, capsys):
    mix = Path(hub.config.mix)
    more = '"name": "web", "status": "gated", "steps": ["sign in"]'
    mix.write_text(mix.read_text().replace('"name": "web"', more))
    prepare.download(hub.config)
    assert "source:web is not downloaded: sign in" in capsys.readouterr().out and not hub.a.exists()
    flags = TokenizerFlags(mix=hub.config.mix, raw=hub.config.raw, out="nowhere")
    assert len(prepare.find_files(flags)) == 1
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    prepare.download(hub.config)
    assert hub.a.exists()


# --------------------------------------------------------------------------------------------------
# Files

# of the first 1,024 ids of the embedded one
TOKENIZER = Tokenizer.load(vocab_size=1024)


def texts(n, words=60, ending=""):
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=words)) + f" {i}{ending}" for i in range(n)]


def lines(documents):
    return "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()


def setup(tmp_path, **files):
    """RAW with the given files (name__suffix: content), a mix of them, and flags that tokenise them here."""
    raw = tmp_path / "raw"
    raw.mkdir()
    for name, content in files.items():
        (raw / name.replace("__", ".")).write_bytes(content)
    mix = {"sources": [{"name": name.partition("__")[0], "weight": 1} for name in files]}
    (tmp_path / "m.json").write_text(json.dumps(mix))
    return TokenizeFlags(mix=str(tmp_path / "m.json"), raw=str(raw), out=str(tmp_path / "out"),
                         vocab_size=1024, workers=0, val_fraction=0.0)


def stream(config, source=0, split="train"):
    """All tokens of a source, from the shards that the manifest names."""
    paths = [Path(config.out, shard["file"]) for shard in open_data(config.out).entries[source][split]]
    return [token for path in paths for token in open_shard(path, TOKENIZER).tolist()]


def whole(documents):
    """What a stream should be: documents encoded in one go."""
    return [token for text in documents for token in TOKENIZER.encode(text)]


def test_every_kind_of_json_lines_gives_the_same_tokens(tmp_path):
    documents = texts(300) + ["a document\nof three\n\nlines", "Grüße, 世界 😀 \u2028 <|bos|>"]
    plain = lines(documents)
    config = setup(tmp_path, a__jsonl=plain, b__ndjson=b"\xef\xbb\xbf" + plain.strip(),
                   c__json=plain.replace(b"\n", b"\n\r\n"))
    prepare.tokenize(config)
    for i in range(3):
        assert stream(config, i) == whole(documents)


def test_parquet_gives_texts_and_chats_and_what_came_before_a_damaged_row_group(tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    documents = texts(400, words=200)
    chats = [[{"role": "user", "content": "Hi "}], None]
    config = setup(tmp_path, a__parquet=b"", b__parquet=b"", c__parquet=b"")
    for name, column in (("a", {"text": documents}), ("b", {"messages": chats}), ("c", {"Text": ["c"]})):
        path = tmp_path / f"raw/{name}.parquet"
        parquet.write_table(pyarrow.table(column), path, row_group_size=100)
    with open(tmp_path / "raw/a.parquet", "r+b") as f:
        f.seek(f.seek(0, 2) * 6 // 10)
        f.write(bytes(3000))
    mix = Path(config.mix)
    mix.write_text(mix.read_text().replace('"name": "b"', '"name": "b", "chat": "messages"'))
    with refusing("^a, b, c: corrupt files"):
        prepare.tokenize(config)
    assert stream(config) == whole(documents[:200]) and stream(config, 1) == whole(["User: Hi"])
    err = capsys.readouterr().err
    for expected in ("a.parquet: 0 of 200 records skipped: not read on after record 200: ",
                     "b.parquet: 1 of 2 records skipped: record 2: no text", "no column 'text' but ['Text']"):
        assert expected in err


@pytest.mark.parametrize("messages, text", [
    ([{"from": "gpt", "value": "Hello. "}], "Assistant: Hello."), (["Hi"], None), ([{"who": "user"}], None),
    ([{"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "image"}, {"text": "a"}]}],
     "User: Look:\na"), ([{"role": "user", "content": None}], None)])
def test_a_chat_is_the_text_that_is_there(messages, text):
    assert readers.render_chat(messages) == text


def test_losses_are_counted_and_named_by_file_and_more_than_a_twentieth_ends_with_an_error(
        tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(readers, "MAX_LINE", 150_000)
    good = texts(200)
    bad = [b'{"text": "caf\xe9"}', b"not JSON", b'{"Text": "x"}', b"[" * 100_000, lines(["x" * 500_000])[:-1]]
    few = lines(good) + b"\n".join(bad) + b'\n\n{"text": " "}\n'
    config = setup(tmp_path, web__jsonl=few, book__txt=b"caf\xe9", many__jsonl=few * 2 + b"{}\n" * 20,
                   array__json=b'[\n{"text": "x"},', document__json=b'{\n "text": "x"\n}\n')
    # of the same source, behind a file with many losses
    (tmp_path / "raw/many.z.txt").write_bytes(b"caf\xe9")
    with refusing("^book, many, array, document: corrupt files, more than 5%"):
        prepare.tokenize(config)
    out, err = capsys.readouterr()
    assert stream(config) == whole(good)
    assert "records:206 bad_records:5\n" in out and "bad_records:31\n" in out
    for expected in ("web.jsonl: 5 of 206 records skipped: record 201: 'utf-8' ", "longer than 150,",
                     "many.jsonl: 30 of", "many.z.txt: 1 of 1", "book.txt: 1 of 1", "array.json: 2 of 2",
                     "document.json: 3 of 3", "makes lines of an array", "before training"):
        assert expected in err, expected


@pytest.mark.parametrize("between, n_read", [(b"", 2), (bytes(8), 2), (b"damage!!", 1)])
def test_an_xz_file_is_read_to_its_end_or_named(tmp_path, between, n_read):
    first, second = (lzma.compress(text) for text in (b"first\n" * 9000, b"second"))
    path = tmp_path / "a.txt.xz"
    path.write_bytes(first + between + second + bytes(4))
    lost = Counter()
    found = list(prepare.read_source({"files": [path]}, lost))
    assert found == ["first\n" * 9000 + "second"] * (n_read == 2) and lost["corrupt_files"] == 2 - n_read


@pytest.mark.parametrize("kind", ["gz", "xz", "zst"])
def test_a_corrupt_file_keeps_what_came_before_and_is_done_again_when_whole(tmp_path, capsys, kind):
    content = pytest.importorskip(readers.PACKAGES[kind]).compress(lines(texts(300, words=300)))
    config = setup(tmp_path, **{f"web__jsonl__{kind}": b"", "code__jsonl": lines(texts(5))})
    path = tmp_path / f"raw/web.jsonl.{kind}"
    expected = whole(texts(300, words=300))
    place = len(content) * 2 // 3
    # gzip is cut, the others have a hole
    path.write_bytes(content[:place] + (b"" if kind == "gz" else bytes(500) + content[place + 500:]))
    with refusing("^web: corrupt files"):
        prepare.tokenize(config)
    kept = stream(config)
    # whole documents only
    assert kept == expected[:len(kept)] and expected[len(kept)] == TOKENIZER.bos
    assert f"{path}: 0 of" in capsys.readouterr().err
    path.write_bytes(content)
    prepare.tokenize(config)
    assert stream(config) == expected and "source:code done before" in capsys.readouterr().out


def test_our_own_bugs_are_not_told_as_corrupt_files(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_parse_line", None)
    with pytest.raises(TypeError):
        prepare.tokenize(setup(tmp_path, web__jsonl=lines(texts(1))))


# --------------------------------------------------------------------------------------------------
# Folders of shards

def test_validation_documents_are_chosen_by_hash_into_eight_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 90_001)
    documents = texts(1500)
    config = replace(setup(tmp_path, web__jsonl=lines(documents)), val_fraction=0.4)
    prepare.tokenize(config)
    val, train = ([text for text in documents if is_validation(text, 0.4) == held_out] for held_out in (1, 0))
    assert stream(config, split="val") == whole(val) and 500 < len(val) < 700
    assert stream(config) == whole(train)
    entry = open_data(config.out).entries[0]
    assert len(entry["val"]) == 8 and [shard["tokens"] for shard in entry["train"]] == [90_001, 31_335]
    assert sum(shard["documents"] for shard in entry["train"]) == len(train)
    assert sum(shard["bytes"] for shard in entry["train"]) == len("".join(train))


def test_two_processes_exclude_each_other_and_a_killed_one_leaves_nothing_half_done(tmp_path):
    config = setup(tmp_path, code__jsonl=lines(texts(500)), web__jsonl=lines(texts(6000)))
    out = Path(config.out)
    out.mkdir()
    (out / "manifest.json").touch()
    flags = f"--raw raw --mix m.json --out {out} --vocab-size 1024 --workers 1 --val-fraction 0".split()
    first = subprocess.Popen([sys.executable, prepare.__file__, "tokenize", *flags], start_new_session=True,
                             cwd=tmp_path, stdout=subprocess.DEVNULL)
    while not (out / "code.source.json").exists():
        assert first.poll() is None
        time.sleep(0.01)
    with refusing("another process is writing into"):
        prepare.tokenize(config)
    first.kill()
    first.wait()
    # its worker ends by itself
    with pytest.raises(ProcessLookupError):
        for _ in range(3000):
            os.killpg(first.pid, 0)
            time.sleep(0.01)
    assert not (out / "manifest.json").exists()
    prepare.tokenize(config)
    # all of it in this process: the same bytes
    prepare.tokenize(replace(config, out=str(tmp_path / "fresh")))
    for name in ("code-train-00000.bin", "web-train-00000.bin", "manifest.json"):
        assert (tmp_path / "fresh" / name).read_bytes() == (out / name).read_bytes()


def test_a_source_is_done_again_when_its_file_or_a_flag_is_another(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 1000)
    config = setup(tmp_path, **{"web-train__jsonl": lines(texts(50)), "web__jsonl": lines(texts(50))})
    prepare.tokenize(config)
    (tmp_path / "raw/web.jsonl").write_bytes(lines(texts(10)))
    prepare.tokenize(config)
    assert stream(config) == whole(texts(50)) and stream(config, 1) == whole(texts(10))
    prepare.tokenize(replace(config, val_fraction=0.5))
    assert len(stream(config)) < len(whole(texts(50))) and capsys.readouterr().out.count("done before") == 1
    with refusing("has another tokenizer"):
        prepare.tokenize(replace(config, vocab_size=512))


def test_inspect_names_a_damaged_shard_and_its_remedy_mends_it(tmp_path, capsys):
    config = setup(tmp_path, web__jsonl=lines(texts(1000)), code__jsonl=lines(texts(3000)))
    prepare.tokenize(config)
    show = InspectFlags(data=config.out, verify=True)
    prepare.inspect(show)
    out = capsys.readouterr().out
    assert "verified" in out
    shard = Path(config.out, "web-train-00000.bin")
    content = shard.read_bytes()
    for damaged, message in ((content[:-1] + b"\xff", "are damaged"), (content[:-2], "was cut")):
        shard.write_bytes(damaged)
        with refusing(f"web-train-00000.bin .*{message}.* delete"):
            prepare.inspect(show)
        shard.unlink()
        prepare.tokenize(config)
        assert shard.read_bytes() == content


def test_a_missing_package_is_named_before_anything_is_done(tmp_path, monkeypatch):
    # as when it is not installed
    monkeypatch.setitem(sys.modules, readers.ZSTD, None)
    with refusing(f"the package {readers.ZSTD} is missing; pip install"):
        prepare.tokenize(setup(tmp_path, a__jsonl=lines(texts(2)), b__jsonl__zst=b""))
    assert not (tmp_path / "out").exists()


def test_a_trained_tokenizer_is_read_by_the_loader_and_did_not_see_validation_text(tmp_path):
    pytest.importorskip("rustbpe")
    secret = [text for text in texts(400, words=50, ending=" zqzqzq") if is_validation(text, 0.3)]
    config = setup(tmp_path, web__jsonl=lines(secret + texts(400)))
    flags = TokenizerFlags(mix=config.mix, raw=config.raw, out=config.out, vocab_size=350, val_fraction=0.3)
    prepare.tokenizer(flags)
    made = Tokenizer.load(config.out)
    assert made.vocab_size == 350 and b" model" in made.ranks
    assert not any(b"zq" in token for token in made.ranks)
    with refusing("--vocab-size"):
        prepare.tokenizer(replace(flags, out=str(tmp_path / "other"), vocab_size=30_000))
    with refusing("has another tokenizer"):
        prepare.tokenizer(flags)


def test_a_folder_without_a_mix_is_one_source_cut_at_blank_lines(tmp_path, capsys):
    raw = tmp_path / "my texts"
    story = "\n\n".join(texts(3000))
    for name, content in {"a.txt": story, "sub/b.md": "second", "c.csv": "third", ".git/h.txt": "hidden",
                          "../else/l.txt": "linked"}.items():
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / name).write_text(content)
    for name, target in (("link", "../else"), ("sub/loop", ".."), ("dead.txt", "nowhere")):
        (raw / name).symlink_to(target)
    # the second command finds what the first wrote
    for _ in range(2):
        prepare.tokenize(TokenizeFlags(raw=str(raw), out=str(raw / "out"), vocab_size=1024, workers=0,
                                       extensions=".md"))
    out, err = capsys.readouterr()
    assert not err and out.count("source:text files:3 not read:1 .csv, 1 that cannot be opened\n") == 2, out
    data = open_data(raw / "out")
    assert data.entries[0]["val_fraction"] == 0.2
    n_documents = sum(shard["documents"] for split in ("train", "val") for shard in data.entries[0][split])
    assert 4096 < len(story) / (n_documents - 2) < 4400


@pytest.mark.parametrize("text, sizes", [("a" * 9000, [8192, 808]), ("a\n" * 4000, [4098, 3902]),
                                         (("a" * 5000 + "\n \n") * 2, [5003, 5003])])
def test_a_text_is_cut_at_a_blank_line_or_a_line_end_or_anywhere(text, sizes):
    assert [len(piece) for piece in prepare.DOCUMENT.findall(text)] == sizes


@pytest.mark.parametrize("n_bytes, share", [(5_000_000, 0.05), (0, 0.2)])
def test_so_much_is_held_out_by_default(tmp_path, n_bytes, share):
    config = setup(tmp_path, web__txt=b"")
    os.truncate(tmp_path / "raw/web.txt", n_bytes)
    source, = prepare.find_files(replace(config, val_fraction=None))
    assert source["val_fraction"] == pytest.approx(share)


@pytest.mark.parametrize("preset, n_train", [("tiny", 1000), ("d12", 10 ** 8 + 2)])
def test_a_preset_that_could_not_validate_is_named_with_the_source_that_limits_it(
        capsys, monkeypatch, preset, n_train):
    _, T, n_tokens = prepare.PRESETS[preset == "d12"]
    assert (T, n_tokens) == (PRESETS[preset].sequence_len, train.RECIPES[preset].eval_tokens)
    tokens = {"train": np.zeros(n_train, np.uint8), "rich": np.zeros(10 ** 8), "poor": np.zeros(7000)}
    monkeypatch.setattr(Data, "_shards", lambda _, entry, split: [tokens.get(split, tokens[entry["name"]])])
    data = Data("", TOKENIZER, "", [{"name": name, "weight": 1} for name in ("rich", "poor")])
    prepare.check_validation(data)
    assert re.search(f"{preset} --eval-tokens {n_tokens} must .* source poor has", capsys.readouterr().err)


@pytest.mark.parametrize("quota, most", [("max 100000", 10 ** 6), ("150000 100000", 1)])
def test_the_cpus_are_those_that_may_be_used(tmp_path, quota, most):
    (tmp_path / "cpu.max").write_text(quota)
    assert prepare.n_cpus(tmp_path / "cpu.max") == min(most, len(os.sched_getaffinity(0)))


def test_a_killed_worker_is_named():
    with refusing("fewer --workers"), prepare.start_workers(1) as pool:
        pool.submit(os._exit, 1).result()


def test_sources_are_chosen_and_replaced_by_name(tmp_path):
    config = setup(tmp_path, web__jsonl=lines(texts(3)), code__jsonl=lines(texts(3)))
    mine = tmp_path / "mine"
    mine.mkdir()
    for name, content in (("b.txt", "second"), ("a.txt", "first"), ("a.txt.part", "half")):
        (mine / name).write_text(content)
    prepare.tokenize(replace(config, source=f"code={mine}", only="code"))
    assert stream(config) == whole(["first", "second"])
    for wrong, message in (("only=web", "would drop .code"), ("only=cod", "--only 'cod'"), ("out=", "--out"),
                           ("source=web=/nowhere", "source web has no file"), ("source=x=y", "'x=y'"),
                           ("source=web", "--source 'web'")):
        name, _, value = wrong.partition("=")
        with refusing(message):
            prepare.tokenize(replace(config, **{name: value}))


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, *['{"sources": %s}' % sources for sources in (
    "[]", '{"x": 1}', '[{"name": "../x", "weight": 1}]', '[{"name": "x", "weight": 0}]', '[{"name": "x"}]',
    '[{"name": "x", "weight": Infinity}]', '[{"name": "x", "weight": 1}, {"name": "x", "weight": 2}]')]])
def test_what_is_no_mix_file_is_named(tmp_path, content):
    (tmp_path / "mix.json").write_text(content)
    with refusing("the mix .*mix.json .* cannot be read"):
        prepare.read_mix(DownloadFlags(mix=str(tmp_path / "mix.json")))


@pytest.mark.parametrize("argv, expected", [
    ([], "error: the following arguments are required: download|tokenizer|tokenize|inspect"),
    (["tokenize", "--max-bytes", "5"], "error: unrecognized arguments: --max-bytes 5"),
    (["tokenize"], "--out must name a folder"), (["inspect", "--data", ""], "an empty path")])
def test_the_command_line_says_one_line_and_ends_with_2(argv, expected, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    assert expected in refused(prepare.main, *argv)


@pytest.mark.parametrize("command", prepare.COMMANDS)
def test_each_command_has_a_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit):
        prepare.main([command, "--help"])
    assert f"\npython data/prepare.py {command} --" in capsys.readouterr().out
