"""
data/prepare.py against a hub on the loopback that misbehaves, files that are damaged, and tokens encoded in one go.

Run: python -m pytest tests/test_prepare.py
"""
import gzip
import hashlib
import http.server
import json
import lzma
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import dataloader
from data import hub as hub_module
from data import prepare, readers
from data.prepare import Config
from dataloader import Tokenizer, is_validation, open_data, open_shard
from flags import run

SCRIPT = Path(prepare.__file__)
WORDS = "the of and to model token stage expert holds a score, which is (never) its bound; 1234 prefixes don't 5x\n".split(" ")


# ---------------------------------------------------------------------------------------------------------------
# A hub that misbehaves

class FakeHub:
    """A hub on the loopback: `files` {path: content}, `seen` [(path, headers)], and `plans`: for a path, what its first requests
    meet, either (status, headers) or a way to stop in the middle of the body (see `send`)."""

    def __init__(self):
        self.files, self.plans, self.seen, self.ranges, self.lies, self.page = {}, {}, [], True, {}, 1000
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self)

            def log_message(self, *_):
                pass
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def answer(self, handler):
        path, _, query = handler.path.partition("?")
        hub_path = path.split("/resolve/main/")[-1]
        self.seen.append((hub_path, dict(handler.headers)))
        if path.startswith("/api/") and self.plans.get(path):
            status, answer = self.plans[path].pop(0)
            return self.send(handler, status, answer or b"")
        if path.startswith("/api/"):
            folder, start = path.partition("/tree/main/")[2], int(query.partition("cursor=")[2] or 0)
            names = sorted(name for name in self.files if name.startswith(folder))
            listed = [{"type": "file", "path": name, "size": len(self.files[name]), "oid": "-", "lfs": {"size": len(self.files[name]),
                       "oid": self.lies.get(name, hashlib.sha256(self.files[name]).hexdigest())}} for name in names[start:start + self.page]]
            link = {"Link": f'<http://127.0.0.1:{self.port}{path}?recursive=true&cursor={start + self.page}>; rel="next"'} if start + self.page < len(names) else {}
            return self.send(handler, 200, json.dumps([{"type": "directory", "path": folder}] + listed).encode(), link)
        plan = self.plans.get(hub_path)
        step = plan.pop(0) if plan else None
        if step and isinstance(step[0], int):
            return self.send(handler, step[0], b"", step[1])
        body, wanted = self.files.get(hub_path), handler.headers.get("Range")
        if body is None:
            return self.send(handler, 404, b"")
        begin = int(wanted[6:-1]) if wanted and self.ranges else 0
        headers = {"Content-Range": f"bytes {begin}-{len(body) - 1}/{len(body)}"} if wanted and self.ranges else {}
        self.send(handler, 206 if headers else 200, body[begin:], headers, stop=step)

    def send(self, handler, status, body, headers={}, stop=None):
        """stop: ("short" | "reset" | "stall", bytes sent before it), or ("less", bytes) with a Content-Length to match."""
        body = body[:stop[1]] if stop and stop[0] == "less" else body
        handler.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body[:stop[1]] if stop else body)
        handler.wfile.flush()
        if stop and stop[0] == "stall":
            time.sleep(0.7)
        if stop and stop[0] == "reset":                                     # close with RST, not with FIN
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
        handler.close_connection = True


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = FakeHub()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.port}")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    mix = {"name": "m", "sources": [{"name": "web", "weight": 2, "repository": "o/web", "revision": "main", "files": ["web/*.txt"]},
                                    {"name": "code", "weight": 1, "repository": "o/code", "revision": "main", "files": ["code/*.txt"]}]}
    (tmp_path / "mix.json").write_text(json.dumps(mix))
    hub.files = {"web/a.txt": random.Random(1).randbytes(300_007), "code/b.txt": b"b" * 1009}
    hub.config = Config(mix=str(tmp_path / "mix.json"), raw=str(tmp_path / "raw"))
    for name, value in {"BACKOFF": 0.01, "TIMEOUT": 0.4, "RETRIES": 3}.items():
        monkeypatch.setattr(hub_module, name, value)
    hub.a, hub.b = tmp_path / "raw/web/web/a.txt", tmp_path / "raw/code/code/b.txt"
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def ranges(hub, path):
    return [headers.get("Range") for seen, headers in hub.seen if seen == path]


def test_a_download_goes_on_after_a_reset_a_short_body_and_a_stall(hub):
    hub.plans["web/a.txt"] = [("reset", 100_000), ("short", 50_000), ("less", 40_000), ("stall", 70_000)]
    prepare.download(hub.config)
    assert hub.a.read_bytes() == hub.files["web/a.txt"]
    begun = [int((r or "bytes=0-")[6:-1]) for r in ranges(hub, "web/a.txt")[1:]]   # the reset may lose all of its bytes
    assert len(begun) == 4 and 32_768 <= begun[1] == begun[2] - 40_000 < begun[3] < 300_007, begun   # a body that ends early loses less than 32 KiB of what came
    assert not list(hub.a.parent.glob("*.part"))


def test_an_interrupted_command_goes_on_and_finished_files_are_not_fetched_again(hub):
    hub.a.parent.mkdir(parents=True)
    Path(f"{hub.a}.part").write_bytes(hub.files["web/a.txt"][:123_457])
    prepare.download(hub.config)
    assert ranges(hub, "web/a.txt") == ["bytes=123457-"] and hub.a.read_bytes() == hub.files["web/a.txt"]
    prepare.download(hub.config)
    assert len(ranges(hub, "web/a.txt")) == len(ranges(hub, "code/b.txt")) == 1


def test_a_server_without_range_starts_the_file_again(hub):
    hub.ranges = False
    hub.a.parent.mkdir(parents=True)
    Path(f"{hub.a}.part").write_bytes(hub.files["web/a.txt"][:1000])
    prepare.download(hub.config)
    assert hub.a.read_bytes() == hub.files["web/a.txt"] and ranges(hub, "web/a.txt") == ["bytes=1000-"]


def test_429_waits_as_long_as_it_says_and_503_is_tried_again(hub, capsys):
    hub.plans["web/a.txt"] = [(429, {"Retry-After": "1"}), (503, {}), (503, {})]
    start = time.monotonic()
    prepare.download(hub.config)
    assert 1 <= time.monotonic() - start < 3
    assert hub.a.read_bytes() == hub.files["web/a.txt"]
    err = capsys.readouterr().err
    assert "429" in err and "attempt 2 in 1.0 s" in err


def test_retries_end(hub):
    hub.plans["web/a.txt"] = [(503, {})] * 9
    with pytest.raises(ValueError, match="incomplete: web;"):
        prepare.download(hub.config)
    assert len(ranges(hub, "web/a.txt")) == 4 and not hub.a.exists() and hub.b.exists()


def test_404_and_403_name_the_file_and_the_remedy_and_the_other_source_is_downloaded(hub, capsys):
    for status in (404, 403):
        hub.plans["web/a.txt"] = [(status, {})]
        with pytest.raises(ValueError, match="incomplete: web;"):
            prepare.download(hub.config)
        err = capsys.readouterr().err
        assert f"o/web/web/a.txt: HTTPError at byte 0: {status}" in err and "accept its terms" in err and "correct the mix file" in err
        assert not hub.a.exists() and hub.b.exists()


def test_a_wrong_hash_never_becomes_a_file(hub, capsys):
    hub.lies["web/a.txt"] = "0" * 64
    with pytest.raises(ValueError, match="incomplete: web;"):
        prepare.download(hub.config)
    err = capsys.readouterr().err
    assert "o/web/web/a.txt: 300,007 bytes and sha256" in err and "run the command again" in err
    assert not list(hub.a.parent.glob("a.txt*")) and hub.b.exists()


def test_the_token_goes_to_the_hub_and_not_where_it_redirects(hub, monkeypatch, capsys, tmp_path):
    other = FakeHub()
    other.files = {"/elsewhere": hub.files["web/a.txt"]}
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login l password netrc-secret\n")   # must not take the token's place
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.plans["web/a.txt"] = [(503, {}), (302, {"Location": f"http://localhost:{other.port}/elsewhere"})]
    hub.plans["code/b.txt"] = [(302, {"Location": f"http://127.0.0.1:{other.port}/elsewhere"})]  # the same name, another port
    hub.files["code/b.txt"] = hub.files["web/a.txt"]
    prepare.download(hub.config)
    other.server.shutdown()
    other.server.server_close()
    assert hub.a.read_bytes() == hub.b.read_bytes() == hub.files["web/a.txt"]
    assert {headers.get("Authorization") for _, headers in hub.seen} == {"Bearer hf_secret"}
    assert len(other.seen) == 2 and all("hf_secret" not in headers.get("Authorization", "") for _, headers in other.seen)
    assert "secret" not in "".join(capsys.readouterr())


def test_a_server_that_is_no_hub_is_named(hub, monkeypatch, capsys):
    mix = json.loads(Path(hub.config.mix).read_text())
    for answer in (b'{"error": "maintenance"}', b'[{"type": "file"}]', b"[1]"):
        hub.plans["/api/datasets/o/web/tree/main/web"] = [(200, answer)]
        with pytest.raises(ValueError, match="incomplete: web;"):
            prepare.download(hub.config)
        assert "o/web/web: http://127.0.0.1" in (err := capsys.readouterr().err) and "look at HF_ENDPOINT" in err, answer
    monkeypatch.setenv("HF_ENDPOINT", "huggingface.co")
    with pytest.raises(ValueError, match="HF_ENDPOINT must be a URL like"):
        prepare.download(hub.config)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.port}")
    with pytest.raises(ValueError, match="--max-bytes must be positive"):
        prepare.download(replace(hub.config, max_bytes=0))
    del mix["sources"][0]["files"]
    Path(hub.config.mix).write_text(json.dumps(mix))
    with pytest.raises(ValueError, match="incomplete: web;"):
        prepare.download(hub.config)
    assert "o/web: no file matches" in capsys.readouterr().err


def test_a_list_is_asked_for_again_after_a_503(hub):
    hub.plans["/api/datasets/o/web/tree/main/web"] = [(503, {})]
    prepare.download(hub.config)
    assert hub.a.read_bytes() == hub.files["web/a.txt"]


def test_a_token_that_cannot_be_one_is_not_printed(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_sec\nret")
    with pytest.raises(ValueError, match="HF_TOKEN holds characters") as error:
        prepare.download(hub.config)
    assert "hf_sec" not in str(error.value)


def test_max_bytes_takes_whole_files_until_there_is_enough_and_lists_are_paged(hub, capsys):
    hub.files |= {f"web/{i}.txt": bytes(400) for i in range(7)}
    hub.page = 3
    prepare.download(replace(hub.config, max_bytes=1000, only="web"))
    assert sorted(file.name for file in hub.a.parent.iterdir()) == ["0.txt", "1.txt", "2.txt"]
    assert "files:3 bytes:1200" in capsys.readouterr().out
    prepare.download(replace(hub.config, only="web"))
    assert len(list(hub.a.parent.iterdir())) == 8


def test_gated_sources_print_their_steps_and_the_open_stand_in_until_there_is_a_token(hub, monkeypatch, capsys):
    mix = json.loads(Path(hub.config.mix).read_text())
    mix["sources"][0] |= {"status": "gated", "steps": ["ask first"], "stand_in": {"repository": "o/free"}}
    Path(hub.config.mix).write_text(json.dumps(mix))
    prepare.download(hub.config)
    out = capsys.readouterr().out
    assert "1. ask first" in out and "o/free is open" in out and not hub.a.exists() and hub.b.exists()
    with pytest.raises(ValueError, match="no source of the mix m has files"):
        prepare.find_files(replace(hub.config, only="web", out="out"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    prepare.download(hub.config)
    assert hub.a.exists()


def test_the_frontier_mix_is_the_cards():
    name, sources, _ = prepare.read_mix(Config())
    assert name == "frontier_v1"
    assert [source["weight"] for source in sources] == [33.5, 24, 16, 5, 5, 4, 4, 4, 2, 1, 0.6]
    for source in sources:
        assert source["exercised"] is False and source["licence"] and ("text" in source) != ("chat" in source)
        assert source["status"] == "open" or (source["steps"] and source["stand_in"]["files"] and source["stand_in"]["text"])


# ---------------------------------------------------------------------------------------------------------------
# Files

@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A folder with the first 1,024 ids of the embedded tokenizer, and that tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("tokenizer"), Tokenizer.load(vocab_size=1024)
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)
    return str(folder), tokenizer


def texts(n, seed=0, words=60):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=words)) + f" {i}" for i in range(n)]


def lines(documents):
    return "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()


def setup(tmp_path, small, **files):
    """RAW with the given files (name__suffix: content), a mix of their sources, and a config that tokenises them in this process."""
    (tmp_path / "raw").mkdir(exist_ok=True)
    for name, content in files.items():
        (tmp_path / "raw" / name.replace("__", ".")).write_bytes(content)
    mix = {"name": "m", "sources": [{"name": name.partition("__")[0], "weight": 1} for name in files]}
    (tmp_path / "mix.json").write_text(json.dumps(mix))
    return Config(mix=str(tmp_path / "mix.json"), raw=str(tmp_path / "raw"), out=str(tmp_path / "out"), tokenizer=small[0], workers=0)


def stream(config, tokenizer, split="train", source=0):
    """All tokens of a source, from the shards that the manifest names."""
    manifest = json.loads((Path(config.out) / "manifest.json").read_text())
    shards = [open_shard(Path(config.out) / file["file"], tokenizer) for file in manifest["sources"][source][split]]
    return np.concatenate(shards).tolist() if shards else []


def whole(tokenizer, documents):
    """What a stream should be: documents encoded in one go."""
    return [token for text in documents for token in tokenizer.encode(text)]


def test_every_format_gives_the_same_tokens(tmp_path, small):
    documents = texts(300) + ["a document\nof three\n\nlines", "Grüße, 世界 😀 \u2028 <|bos|>"]
    plain = lines(documents)
    contents = {"a__jsonl": plain, "b__jsonl__gz": gzip.compress(plain), "c__json__xz": lzma.compress(plain), "d__ndjson": b"\xef\xbb\xbf" + plain.strip(),
                "f__jsonl": plain.replace(b"\n", b"\n\r\n")}
    if readers.zstd:
        contents["g__jsonl__zst"] = readers.zstd.compress(plain)
    config = replace(setup(tmp_path, small, **contents), val_fraction=0.0)
    prepare.tokenize(config)
    for i, name in enumerate(contents):
        assert stream(config, small[1], source=i) == whole(small[1], documents), name


def test_parquet_reads_texts_chats_and_long_documents_and_names_a_corrupt_file(tmp_path, small, monkeypatch, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    monkeypatch.setattr(readers, "LONG", 5000)
    documents = texts(700) + [" ".join(texts(30))]
    config = replace(setup(tmp_path, small, a__parquet=b"", b__parquet=b"", c__parquet=b"PAR1 not parquet", d__parquet=b""), val_fraction=0.0)
    pyarrow.parquet.write_table(pyarrow.table({"id": range(701), "text": documents}), tmp_path / "raw/a.parquet", row_group_size=101)
    chats = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}], None]
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([b"good", b"caf\xe9"])}), tmp_path / "raw/d.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"messages": chats}), tmp_path / "raw/b.parquet")
    mix = json.loads(Path(config.mix).read_text())
    mix["sources"][1]["chat"] = "messages"
    Path(config.mix).write_text(json.dumps(mix))
    with pytest.raises(ValueError, match="corrupt files in c"):
        prepare.tokenize(config)
    assert stream(config, small[1]) == whole(small[1], documents)
    assert stream(config, small[1], source=1) == whole(small[1], ["User: Hi\n\nAssistant: Hello."])
    assert stream(config, small[1], source=3) == whole(small[1], ["good"])
    err = capsys.readouterr().err
    assert "d.parquet: record 2 skipped: 'utf-8' codec can't decode" in err
    assert "c.parquet: corrupt in or after record 0 (" in err and "b.parquet: record 2 skipped: no text field 'messages'" in err


def test_bad_records_are_named_counted_and_skipped(tmp_path, small, capsys):
    good = texts(4)
    content = (lines(good[:1]) + b'{"text": "caf\xe9"}\n' + b"not JSON\n" + lines(good[1:2]) + b'{"title": "x"}\n' + b'{"text": " \\n"}\n' + b'{"text": 5}\n' + b"[1]\n"
               + b"\n" + lines(good[2:3]) + b"[" * 100_000 + b"\n" + b"{}\n" * 5 + lines(good[3:]))
    config = replace(setup(tmp_path, small, web__jsonl=content, book__txt=b"caf\xe9 and more"), val_fraction=0.0)
    with pytest.raises(ValueError, match='no document of book is there to train on: look at its files and at its "text"'):
        prepare.tokenize(config)
    out, err = capsys.readouterr()
    assert stream(config, small[1]) == whole(small[1], good)
    assert "bad_records:12 " in out
    for expected in ("web.jsonl: record 2 skipped: 'utf-8' codec can't decode", "record 3 skipped: Expecting value", "record 5 skipped: no text field 'text'",
                     "record 6 skipped: an empty document", "record 7 skipped: no text", "record 8 skipped: no text", "record 11 skipped: maximum recursion",
                     "book.txt: record 1 skipped: 'utf-8' codec can't decode"):
        assert expected in err, expected


@pytest.mark.parametrize("name", ["web__jsonl__gz", "web__jsonl__xz", "web__jsonl__zst"])
def test_a_corrupt_file_keeps_what_came_before_and_is_done_again_when_it_is_whole(tmp_path, small, capsys, name):
    documents = texts(300, words=300)
    plain = lines(documents)
    if name.endswith("zst") and not readers.zstd:
        pytest.skip("no zstd")
    pack = {"gz": gzip.compress, "xz": lzma.compress, "zst": readers.zstd and readers.zstd.compress}.get(name[-3:].strip("_"), bytes)
    content = pack(plain)
    config = replace(setup(tmp_path, small, **{name: content[:len(content) * 2 // 3], "code__jsonl": lines(texts(5))}), val_fraction=0.0)
    with pytest.raises(ValueError, match="corrupt files in web"):
        prepare.tokenize(config)
    kept, expected = stream(config, small[1]), whole(small[1], documents)
    assert kept == expected[:len(kept)] and len(kept) >= len(expected) * 0.5, (len(kept), len(expected))
    assert expected[len(kept)] == small[1].bos                  # whole documents only
    assert f"{name.replace('__', '.')}: corrupt in or after record" in capsys.readouterr().err
    (tmp_path / "raw" / name.replace("__", ".")).write_bytes(content)
    prepare.tokenize(config)
    assert stream(config, small[1]) == expected
    assert "source:code done before" in capsys.readouterr().out


LONG_TEXT = " ".join(texts(40, seed=3)) + ' 😀"quoted\\" \\u0041 é世界\t\x01 /' * 2000 + "x" * 9000 + "\ud83d 😀\ude00\ud83d end\r\n"


def shrink(monkeypatch):
    """Make a document of 100 KB what one of 200 MB is."""
    for module, constant, value in ((prepare, "BLOCK", 4096), (readers, "BLOCK", 4096), (readers, "LONG", 20_000), (readers, "PIECE", 8192), (dataloader, "PIECE", 8192),
                                    (readers, "PARSED", 6000)):
        monkeypatch.setattr(module, constant, value)


def test_a_damaged_parquet_and_gzip_keep_the_documents_before(tmp_path, small, monkeypatch, capsys):
    shrink(monkeypatch)                                         # the book is encoded in pieces
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    documents = texts(400, words=200)
    config = replace(setup(tmp_path, small, web__parquet=b"", code__jsonl__gz=b"", cut__parquet=b"", book__txt__gz=b""), val_fraction=0.0)
    raw = tmp_path / "raw"
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), raw / "web.parquet", row_group_size=100, compression="gzip")
    whole_file = (raw / "web.parquet").read_bytes()
    (raw / "cut.parquet").write_bytes(whole_file[:-1000])
    packed = gzip.compress(lines(documents))
    for file, content in (("web.parquet", whole_file), ("code.jsonl.gz", packed)):
        place = len(content) * 6 // 10
        (raw / file).write_bytes(content[:place] + bytes(b ^ 255 for b in content[place:place + 100]) + content[place + 100:])
    (raw / "book.txt.gz").write_bytes(gzip.compress(" ".join(documents).encode())[:-20])
    with pytest.raises(ValueError, match="corrupt files in web, code, cut, book: .*out is usable without what was lost; fetch them again"):
        prepare.tokenize(config)
    expected = whole(small[1], documents)
    kept = stream(config, small[1])
    assert kept == expected[:len(kept)] and len(expected) * 0.4 < len(kept) < len(expected) * 0.6 and expected[len(kept)] == small[1].bos
    before = len(expected) // 2                                 # of deflate, damage is certain only at the end, where the checksum is
    assert stream(config, small[1], source=1)[:before] == expected[:before]
    assert stream(config, small[1], source=2) == stream(config, small[1], source=3) == []       # nothing of half a book
    err = capsys.readouterr().err
    assert "web.parquet: corrupt in or after record 200 (" in err and "cut.parquet: corrupt in or after record 0 (" in err
    assert "code.jsonl.gz: corrupt" in err and "book.txt.gz: corrupt in or after record 1 (" in err and err.count("Fetch it again") == 4


@pytest.mark.parametrize("ascii", [True, False])
@pytest.mark.parametrize("block", [37, 4096])
def test_a_long_json_line_gives_the_text_of_the_whole(monkeypatch, ascii, block):
    shrink(monkeypatch)
    monkeypatch.setattr(readers, "BLOCK", block)
    text = LONG_TEXT if ascii else dataloader.clean_text(LONG_TEXT)
    chat = [{"role": "user", "content": text}, {"role": "assistant", "content": "Short."}, {"role": "user", "content": text[:5000]}]
    for record, source, expected in (({"id": "x" * 2000, "text": text, "other": [text]}, {}, text), ({"text": "short", "other": text}, {}, "short"),
                                     ({"messages": chat}, {"chat": "messages"}, f"User: {text}\n\nAssistant: Short.\n\nUser: {text[:5000]}")):
        for prefix in (b"", b"\xef\xbb\xbf"):
            line = bytearray(prefix + json.dumps(record, ensure_ascii=ascii).encode())
            assert len(line) > readers.PARSED
            blocks = [dataloader.clean_text(block) for block in readers.text_of(line, source)()]    # each alone: no pair is split
            assert "".join(blocks) == dataloader.clean_text(expected)


def test_a_long_record_that_is_bad_is_one_bad_record_and_leaves_no_tokens(tmp_path, small, monkeypatch, capsys):
    shrink(monkeypatch)
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    good, line = texts(3), lines([LONG_TEXT])[:-1]
    bad = [line[:-2] + b"\xe9" + line[-2:], line[:-2] + b"\\x" + line[-2:], line[:-2] + b"\x01" + line[-2:], line[:-2], line + b"]", b"[" * 9000,
           line.replace(b'"text"', b'"title"'), b'{"text": "", "ids": [' + b"1, " * 5000 + b"1]}", b'{"text": [' + line + b"]}"]
    content = b"\n".join([lines(good[:1])[:-1], *bad, lines(good[1:2])[:-1]]) + b"\n"
    long = dataloader.clean_text(LONG_TEXT).encode()
    config = replace(setup(tmp_path, small, web__jsonl=content, book__txt=long + b"\xe9", gone__parquet=b""), val_fraction=0.0)
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([good[0].encode(), long + b"\xe9", None, good[1].encode(), long])}), tmp_path / "raw/gone.parquet")
    with pytest.raises(ValueError, match="no document of book is there"):
        prepare.tokenize(config)
    assert stream(config, small[1]) == whole(small[1], good[:2]) and stream(config, small[1], source=1) == []
    assert stream(config, small[1], source=2) == whole(small[1], [*good[:2], long.decode()])
    out, err = capsys.readouterr()
    assert "bad_records:9 " in out and err.count("skipped") == 12
    for expected in (f"record 2 skipped: 'utf-8' codec can't decode byte 0xe9 in position {len(line) - 2}", "record 3 skipped: the string at byte 9 has no end, a wrong escape",
                     "record 4 skipped: the string at byte 9", "record 5 skipped: the string at byte 9", "record 6 skipped: Extra data",
                     "record 7 skipped: more than 6,000 bytes beside its long strings; split it", "record 8 skipped: no text field",
                     "record 9 skipped: more than 6,000", "record 10 skipped: no text field",
                     f"book.txt: record 1 skipped: 'utf-8' codec can't decode byte 0xe9 in position {len(long)}",
                     f"gone.parquet: record 2 skipped: 'utf-8' codec can't decode byte 0xe9 in position {len(long)}", "gone.parquet: record 3 skipped: an empty document"):
        assert expected in err, expected


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "raw.jsonl", "escaped.jsonl", "surrogates.jsonl", "jsonl.gz", "parquet"])
def test_memory_does_not_grow_with_the_copies_of_a_long_document(tmp_path, monkeypatch, kind):
    """What 200 MB take at the module's sizes, in small: pieces alone, and for JSON the line besides. Parquet: what is not pyarrow's."""
    shrink(monkeypatch)
    text = "\U0001f642" * 250_000 if kind == "surrogates.jsonl" else "word 😀 " * 250_000
    path, content = tmp_path / f"web.{kind}", text.encode()
    if "json" in kind:
        content = json.dumps({"text": text}, ensure_ascii=kind != "raw.jsonl").encode()
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), path)
    else:
        path.write_bytes(gzip.compress(content, 1) if kind.endswith("gz") else content)
    size, n, source = len(content), len(text), {"name": "web"}
    del text, content
    prepare.read_source(source, [path], {}), json.loads("1")                # what is imported late is not counted
    tracemalloc.start()
    try:
        pieces = sum(len(piece) for piece, _ in prepare.read_source(source, [path], prepare.Counter()))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert pieces == n
    assert peak < 600_000 + (1.3 * size if "json" in kind else 0), (peak, size)


@pytest.mark.parametrize("name", ["web__jsonl", "web__txt"])
def test_a_long_document_is_encoded_in_pieces_to_the_tokens_of_the_whole_and_always_trains(tmp_path, small, monkeypatch, name):
    shrink(monkeypatch)
    long = dataloader.clean_text(LONG_TEXT)
    config = replace(setup(tmp_path, small, **{name: long.encode() if name == "web__txt" else lines([LONG_TEXT])}), val_fraction=0.9999)
    prepare.tokenize(config)
    assert stream(config, small[1]) == whole(small[1], [long])


def test_a_line_beyond_the_limit_is_skipped_and_named(tmp_path, small, monkeypatch, capsys):
    monkeypatch.setattr(readers, "MAX_LINE", 1000)
    documents = [texts(1)[0], "x" * 999, "x" * 5000, "end"]
    config = replace(setup(tmp_path, small, web__jsonl=lines(documents)), val_fraction=0.0)
    prepare.tokenize(config)
    assert stream(config, small[1]) == whole(small[1], [documents[0], "end"])
    err = capsys.readouterr().err
    assert "record 2 skipped: longer than 1,000 bytes; split it" in err and "record 3 skipped: longer" in err


def test_a_chat_of_parquet_that_is_not_utf8_is_one_bad_record(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    content = pyarrow.array([b"one", b"caf\xe9", b"three"]).view(pyarrow.string())
    turns = pyarrow.StructArray.from_arrays([pyarrow.array(["user"] * 3), content], names=["role", "content"])
    table = pyarrow.table({"messages": pyarrow.ListArray.from_arrays(pyarrow.array([0, 1, 2, 3], pyarrow.int32()), turns)})
    pyarrow.parquet.write_table(table, tmp_path / "chats.parquet")
    found = []
    with open(tmp_path / "chats.parquet", "rb") as f:
        for number, record in readers.read_records(tmp_path / "chats.parquet", f, "messages"):
            try:
                found.append("".join(readers.text_of(record, {"chat": "messages"})()))
            except ValueError as e:
                found.append(f"{number}: {type(e).__name__}")
    assert found == ["User: one", "2: UnicodeDecodeError", "User: three"]


def test_chats_are_rendered_by_one_template():
    expected = "System: Be brief.\n\nUser: Hi\n\nAssistant: Hello."
    assert readers.render_chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi "}, {"role": "assistant", "content": "Hello."}]) == expected
    assert readers.render_chat([{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]) == expected
    with pytest.raises(ValueError, match="not a list of messages"):
        readers.render_chat([{"speaker": "user"}])


# ---------------------------------------------------------------------------------------------------------------
# Folders of shards

def test_validation_documents_are_chosen_by_hash_into_eight_shards(tmp_path, small, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 83_003)
    documents = texts(1500)
    config = replace(setup(tmp_path, small, web__jsonl=lines(documents)), val_fraction=0.4)
    prepare.tokenize(config)
    held_out = [text for text in documents if is_validation(text, 0.4)]
    assert stream(config, small[1], "val") == whole(small[1], held_out) and 500 < len(held_out) < 700
    assert stream(config, small[1]) == whole(small[1], [text for text in documents if text not in set(held_out)])
    entry = json.loads((Path(config.out) / "manifest.json").read_text())["sources"][0]
    assert len(entry["val"]) == 8 and [file["tokens"] for file in entry["train"]] == [83_003, 135_161 - 83_003]
    assert sum(file["documents"] for file in entry["train"] + entry["val"]) == 1500
    assert sum(file["bytes"] for file in entry["train"] + entry["val"]) == sum(len(text.encode()) for text in documents)
    mix = open_data(config.out).train(64, seed=0)                           # and the loader reads it
    assert mix.batch([0, 1])[0].shape == (2, 64)


def test_two_processes_exclude_each_other_and_a_killed_one_leaves_nothing_half_done(tmp_path, small):
    config = replace(setup(tmp_path, small, code__jsonl=lines(texts(500)), web__jsonl=lines(texts(6000))), val_fraction=0.1)
    flags = ["--mix", config.mix, "--raw", config.raw, "--out", config.out, "--tokenizer", config.tokenizer, "--val-fraction", "0.1", "--workers", "1"]
    first = subprocess.Popen([sys.executable, str(SCRIPT), "tokenize", *flags], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not Path(config.out, "code.source.json").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    with pytest.raises(ValueError, match="another process is writing into"):
        prepare.tokenize(config)
    first.send_signal(signal.SIGKILL)
    first.wait()
    deadline = time.monotonic() + 5
    while _alive(first.pid) and time.monotonic() < deadline:                # its worker ends by itself
        time.sleep(0.02)
    outlived = _alive(first.pid)
    if outlived:
        os.killpg(first.pid, signal.SIGKILL)
    assert not outlived, "a worker outlived its parent"
    with pytest.raises(FileNotFoundError, match="no manifest.json"):
        open_data(config.out)
    code = Path(config.out, "code-train-00000.bin").stat().st_mtime_ns
    prepare.tokenize(config)
    assert Path(config.out, "code-train-00000.bin").stat().st_mtime_ns == code  # was finished before, by a worker process
    fresh = replace(config, out=str(tmp_path / "fresh"))
    prepare.tokenize(fresh)                                                 # all of it in this process: the same bytes
    names = sorted(file.name for file in Path(fresh.out).glob("*.bin"))
    assert names == sorted(file.name for file in Path(config.out).glob("*.bin")) and len(names) == 18
    assert all((Path(fresh.out) / name).read_bytes() == (Path(config.out) / name).read_bytes() for name in names + ["manifest.json"])


def _alive(group):
    try:
        os.killpg(group, 0)
        return True
    except ProcessLookupError:
        return False


def test_another_tokenizer_refuses_and_other_flags_do_the_source_again(tmp_path, small, capsys):
    config = setup(tmp_path, small, web__jsonl=lines(texts(100)))
    prepare.tokenize(config)
    with pytest.raises(ValueError, match="is of another tokenizer"):
        prepare.tokenize(replace(config, vocab_size=512))
    before = stream(config, small[1])
    prepare.tokenize(replace(config, val_fraction=0.5))
    assert "done before" not in capsys.readouterr().out and len(stream(config, small[1])) < len(before)


def test_a_source_whose_name_begins_like_anothers_keeps_its_shards(tmp_path, small):
    config = replace(setup(tmp_path, small, **{"web-train__jsonl": lines(texts(50)), "web__jsonl": lines(texts(50, seed=1))}), val_fraction=0.0)
    prepare.tokenize(config)
    (tmp_path / "raw/web.jsonl").write_bytes(lines(texts(60, seed=2)))
    prepare.tokenize(config)
    assert stream(config, small[1]) == whole(small[1], texts(50)) and stream(config, small[1], source=1) == whole(small[1], texts(60, seed=2))


def test_a_write_error_leaves_no_manifest_of_what_was_there_before(tmp_path, small, monkeypatch):
    config = setup(tmp_path, small, web__jsonl=lines(texts(100)))
    prepare.tokenize(config)

    def full(path, *_):                                                     # the disk, not what is under test
        raise OSError(28, "No space left on device", str(path))
    monkeypatch.setattr(prepare, "write_shard", full)
    with pytest.raises(OSError, match="No space left"):
        prepare.tokenize(replace(config, val_fraction=0.3))
    with pytest.raises(FileNotFoundError, match="no manifest.json"):
        open_data(config.out)


def test_inspect_names_a_damaged_shard(tmp_path, small, capsys):
    config = setup(tmp_path, small, web__jsonl=lines(texts(3000)))
    prepare.tokenize(config)
    prepare.inspect(Config(data=config.out, verify=True))
    out = capsys.readouterr().out
    assert "asked:100.00% realised:100.00%" in out and "verified" in out and texts(1)[0][:50].split("\n")[0] in out
    shard = Path(config.out, "web-train-00000.bin")
    content = shard.read_bytes()
    for damaged, message in ((content[:-2] + bytes([content[-2] ^ 1, content[-1]]), "web-train-00000.bin in .* damaged"),
                             (content[:-2], "web-train-00000.bin has .* it was cut"), (b"x" + content[1:], "web-train-00000.bin is not a token shard")):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            prepare.inspect(Config(data=config.out, verify=True))
        if len(damaged) < len(content) or damaged[0] != content[0]:
            prepare.tokenize(config)                                        # the remedy that the message names
            assert shard.read_bytes() == content
    for record in ("5", "[]", '{"entry": 5}', "{", json.dumps(json.loads(Path(config.out, "web.source.json").read_text()) | {"entry": {}})):
        Path(config.out, "web.source.json").write_text(record)
        prepare.tokenize(config)
    shard.write_bytes(content)
    manifest = Path(config.out, "manifest.json")
    for key in ("name", "sha256", "documents"):
        whole_manifest = manifest.read_text()
        manifest.write_text(whole_manifest.replace(f'"{key}"', '"other"') if key != "name" else whole_manifest.replace('"name"', '"other"', 1))
        with pytest.raises(ValueError, match="manifest.json is not readable .*run data/prepare.py tokenize again"):
            prepare.inspect(Config(data=config.out))
        manifest.write_text(whole_manifest)


def test_a_missing_package_is_named_before_anything_is_done(tmp_path, small, monkeypatch):
    config = setup(tmp_path, small, a__jsonl=lines(texts(2)), b__parquet=b"", c__jsonl__zst=b"")
    for package in ("pyarrow", "rustbpe"):
        monkeypatch.setitem(sys.modules, package, None)                     # as when it is not installed
    monkeypatch.setattr(prepare, "zstd", None)
    for command, only, package in ((prepare.tokenize, "a,b", "pyarrow"), (prepare.tokenize, "a,c", "backports.zstd"), (prepare.tokenizer, "a", "rustbpe")):
        with pytest.raises(ValueError, match=f"needs? the package {package}"):
            command(replace(config, only=only))
    assert not Path(config.out).exists()


def test_a_trained_tokenizer_is_read_by_the_loader_and_did_not_see_validation_text(tmp_path, small):
    pytest.importorskip("rustbpe")
    secret = [text + " zqzqzq" * 50 for text in texts(400, seed=9) if is_validation(text + " zqzqzq" * 50, 0.3)]
    config = setup(tmp_path, small, web__jsonl=lines(secret + texts(400)), code__jsonl=lines(["if x == 1234: return [x]\n" * 20]))
    prepare.tokenizer(Config(mix=config.mix, raw=config.raw, out=config.out, vocab_size=400, val_fraction=0.3))
    made = Tokenizer.load(config.out)
    with pytest.raises(ValueError, match="has a tokenizer already"):
        prepare.tokenizer(Config(mix=config.mix, raw=config.raw, out=config.out))
    assert made.vocab_size == 400 and made.decode(made.encode("the model, 12345")) == "the model, 12345"
    assert b" model" in made.ranks and not any(b"zq" in token for token in made.ranks)
    with pytest.raises(ValueError, match="lower --vocab-size"):
        prepare.tokenizer(Config(mix=config.mix, raw=config.raw, out=str(tmp_path / "big"), vocab_size=30_000))


def test_sources_are_chosen_and_replaced_by_name(tmp_path, small):
    config = setup(tmp_path, small, web__jsonl=lines(texts(3)), code__jsonl=lines(texts(3)))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "b.txt").write_text("second")
    (mine / "a.txt").write_text("first")
    (mine / "a.txt.part").write_text("half")
    prepare.tokenize(replace(config, source=f"code={mine}", only="code", val_fraction=0.0))
    assert stream(config, small[1]) == whole(small[1], ["first", "second"])
    for wrong, message in ((dict(only="cod"), "--only or --source names cod"), (dict(source="x=y"), "names x"), (dict(source="web=/nowhere"), "no such file"),
                           (dict(raw=str(mine)), "source web has no file .*--source web=PATH"), (dict(val_fraction=1.0), "--val-fraction"), (dict(out=""), "--out")):
        with pytest.raises(ValueError, match=message):
            prepare.tokenize(replace(config, **wrong))
    for content in ("{", "[]", '{"name": "m"}', '{"name": "m", "sources": []}', '{"name": "m", "sources": [{"name": "../x", "weight": 1}]}',
                    '{"name": "m", "sources": [{"name": "x", "weight": 0}]}', '{"name": "m", "sources": [{"name": "x", "weight": 1, "chat": {}}]}',
                    '{"name": "m", "sources": [{"name": "x", "weight": Infinity}]}', '{"name": "m", "sources": {"x": 1}}', '{"name": "m", "sources": [{"name": "x", "weight": 1, "files": [5]}]}',
                    '{"name": "m", "sources": [{"name": "x", "weight": 1, "files": "web.parquet"}]}',
                    '{"name": "m", "sources": [{"name": "x", "weight": 1, "stand_in": 5}]}', "[" * 100_000):
        Path(config.mix).write_text(content)
        with pytest.raises(ValueError, match="mix.json"):
            prepare.tokenize(config)


def test_sources_that_the_manifest_would_lose_are_named(tmp_path, small):
    config = replace(setup(tmp_path, small, web__jsonl=lines(texts(5)), book__txt=b"A book."), val_fraction=0.0)
    prepare.tokenize(config)
    before = (Path(config.out) / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match="book too, which its manifest would lose"):
        prepare.tokenize(replace(config, only="web"))
    assert (Path(config.out) / "manifest.json").read_bytes() == before


def test_the_command_line_says_one_line_and_ends_with_2(tmp_path, small, monkeypatch, capsys):
    config = setup(tmp_path, small, web__jsonl=b"", code__jsonl=b"")
    known = ["tokenize", "--mix", config.mix, "--raw", config.raw, "--out", config.out]
    for argv, code, expected in (
            ([], 2, "prepare.py: error: the following arguments are required: command"), (["bogus"], 2, "prepare.py: error: no command 'bogus'"),
            (["tokenize", "--workers", "x"], 2, "prepare.py: error: argument --workers: invalid int value: 'x'"),
            (known + ["--source=code=a", "--source", "web=b"], 2, "--source is given more than once"),
            (known + ["--source", f"code=/nowhere,web={config.raw}"], 2, "--source code=/nowhere: no such file"),
            (known + ["--tokenizer", str(tmp_path)], 2, "tokenizer.txt"),
            (known + ["--source", f"web={config.raw},web={config.out}"], 2, "names one source twice"),
            (known + ["--max-bytes", "5"], 2, "--max-bytes does nothing in tokenize"), (["inspect", "--workers", "2", "--out", "x"], 2, "--workers, --out does nothing in inspect"),
            (["inspect", "--data", str(tmp_path)], 2, "has no manifest.json"),
            (["--help"], 0, "A mix file names sources")):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *argv])
        with pytest.raises(SystemExit) as stopped:
            run(prepare.main)
        out, err = capsys.readouterr()
        assert expected in (err if code else out), (argv, out, err)
        assert code == 0 or (stopped.value.code == 2 and err.count("\n") == 1 and not out), (argv, out, err)
