"""
data/prepare.py against a hub on the loopback that misbehaves, files that are damaged, and tokens encoded in
one go.

Run: python -m pytest tests/test_prepare.py
"""
import hashlib
import http.server
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from data import hub as hub_module
from data import prepare, readers
from data.prepare import DownloadFlags, InspectFlags, TokenizeFlags, TokenizerFlags
from dataloader import Tokenizer, is_validation, open_data, open_shard

LIST = "/api/datasets/o/web/tree/main/web"
WORDS = "the of and to model token stage expert a score, which (never) its bound; 1234 don't 5x\n".split(" ")


# --------------------------------------------------------------------------------------------------
# A hub that misbehaves

class Handler(http.server.BaseHTTPRequestHandler):
    """A hub on the loopback. Its server has `files` {path: content}, `seen` [(path, headers)] and `plans`:
    for a path, what its first requests meet: (status, headers, body), or how the body ends and after how many
    bytes: "short", "less" (with a Content-Length to match) or "stall".
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
            begin = int(self.headers.get("Range", "bytes=0-")[6:-1])
            self.answer(206 if begin else 200, {}, hub.files[name][begin:], *step)

    def answer(self, status, headers, body=b"", end="", sent=None):
        self.send_response(status)
        length = len(body[:sent] if end == "less" else body)
        for name, value in ({"Content-Length": str(length)} | headers).items():
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
    listed = [{"type": "directory", "path": "folder"}]
    for name, content in sorted(files.items()):
        sha256 = hashlib.sha256(content).hexdigest()
        listed.append({"type": "file", "path": name, "size": len(content), "lfs": {"oid": sha256}})
    return json.dumps(listed).encode()


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
    for name, value in {"BACKOFF": 0.01, "TIMEOUT": 0.4, "RETRIES": 3}.items():
        monkeypatch.setattr(hub_module, name, value)
    hub.a = tmp_path / "raw/web/web/a.txt"
    hub.b = tmp_path / "raw/code/code/b.txt"
    yield hub
    hub.shutdown()
    hub.server_close()


def ranges(hub, path):
    return [headers.get("Range") for seen, headers in hub.seen if seen == path]


def test_a_download_goes_on_after_a_short_body_a_broken_promise_and_a_stall(hub):
    hub.plans["web/a.txt"] = [("short", 50_000), ("less", 40_000), ("stall", 70_000)]
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
    assert ranges(hub, "web/a.txt") == ["bytes=123457-"] and ranges(hub, "code/b.txt") == [None]
    assert hub.a.read_bytes() == hub.files["web/a.txt"]


def test_429_waits_as_long_as_it_says_and_503_is_tried_again(hub, capsys):
    hub.plans[LIST] = [(503, {})]
    hub.plans["web/a.txt"] = [(429, {"Retry-After": "1"}), (503, {}), (503, {})]
    start = time.monotonic()
    prepare.download(hub.config)
    assert 1 <= time.monotonic() - start < 3
    assert hub.a.read_bytes() == hub.files["web/a.txt"]
    err = capsys.readouterr().err
    assert "429" in err and "attempt 2 in 1.0 s" in err


@pytest.mark.parametrize("path, answer, tries, message", [
    ("web/a.txt", (503, {}), 4, "byte 0: 503 .* given up after 4 failures: run the command again"),
    ("web/a.txt", (403, {}), 1, "byte 0: 403 .* given up after 1 failures: .* accept its terms"),
    ("web/a.txt", (200, {}, bytes(300_007)), 1, "has not the size or the sha256"),
    *[(LIST, (200, {}, answer), 1, "HF_ENDPOINT") for answer in (
        b'{"error": "maintenance"}', b'[{"type": "file"}]', b'[{"type": "file", "path": "web/../../x.txt"}]',
        b"<html>")]])
def test_a_source_that_fails_is_named_and_the_other_is_downloaded(hub, capsys, path, answer, tries, message):
    hub.plans[path] = [answer] * 9
    with pytest.raises(ValueError, match="incomplete: web;"):
        prepare.download(hub.config)
    assert len(ranges(hub, path)) == tries and not hub.a.exists() and hub.b.exists()
    assert re.search(f"warning: o/web/web/.*{message}", capsys.readouterr().err.splitlines()[-1])


def test_the_token_goes_to_the_hub_and_not_where_it_redirects(hub, monkeypatch):
    other = start_hub()
    # as copied over two lines
    monkeypatch.setenv("HF_TOKEN", "hf_sec\nret\n")
    # another host, and the same name at another port
    for host, name in (("localhost", "web/a.txt"), ("127.0.0.1", "code/b.txt")):
        hub.plans[name] = [(302, {"Location": f"http://{host}:{other.server_port}/resolve/main/{name}"})]
    prepare.download(hub.config)
    other.shutdown()
    other.server_close()
    assert hub.a.exists() and hub.b.exists() and len(other.seen) == 2
    assert {headers.get("Authorization") for _, headers in hub.seen} == {"Bearer hf_secret"}
    assert all("secret" not in headers.get("Authorization", "") for _, headers in other.seen)


def test_max_bytes_takes_whole_files_until_there_is_enough_and_lists_are_paged(hub):
    hub.files |= {f"web/{i}.txt": bytes(400) for i in range(7)}
    first_page = listing({"web/0.txt": bytes(400)})
    link = {"Link": '<http://127.0.0.1/api?cursor=2>; rel="next"'}
    hub.plans[LIST] = [(200, link, first_page)]
    prepare.download(replace(hub.config, max_bytes=1000, only="web"))
    assert sorted(file.name for file in hub.a.parent.iterdir()) == ["0.txt", "1.txt"]
    prepare.download(replace(hub.config, only="web"))
    assert len(list(hub.a.parent.iterdir())) == 8


def test_gated_sources_are_left_out_until_there_is_a_token(hub, monkeypatch, capsys):
    mix = Path(hub.config.mix)
    more = '"name": "web", "status": "gated", "steps": ["sign in", "make a token"]'
    mix.write_text(mix.read_text().replace('"name": "web"', more))
    prepare.download(hub.config)
    assert "source:web is not downloaded: sign in; make a token" in capsys.readouterr().out
    assert not hub.a.exists()
    assert [source["name"] for source, _ in prepare.find_files(hub.config)] == ["code"]
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    prepare.download(hub.config)
    assert hub.a.exists()


def test_the_frontier_mix_is_the_cards():
    weights = [source["weight"] for source in prepare.read_mix(DownloadFlags())]
    assert weights == [33.5, 24, 16, 5, 5, 4, 4, 4, 2, 1, 0.6]


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
    import pyarrow.parquet
    documents = texts(400, words=200)
    chats = [[{"role": "user", "content": "Hi "}, {"role": "assistant", "content": "Hello."}], None]
    config = setup(tmp_path, a__parquet=b"", b__parquet=b"")
    for name, column in (("a", {"text": documents}), ("b", {"messages": chats})):
        path = tmp_path / f"raw/{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.table(column), path, row_group_size=100)
    damaged = bytearray((tmp_path / "raw/a.parquet").read_bytes())
    place = len(damaged) * 6 // 10
    damaged[place:place + 3000] = bytes(3000)
    (tmp_path / "raw/a.parquet").write_bytes(damaged)
    mix = Path(config.mix)
    mix.write_text(mix.read_text().replace('"name": "b"', '"name": "b", "chat": "messages"'))
    with pytest.raises(ValueError, match="^a: corrupt files"):
        prepare.tokenize(config)
    assert stream(config) == whole(documents[:200])
    assert stream(config, 1) == whole(["User: Hi\n\nAssistant: Hello."])
    err = capsys.readouterr().err
    assert "a.parquet: corrupt in or after record 200 (" in err
    assert "b.parquet: record 2 skipped: no text in" in err
    # another template of the same
    assert readers.render_chat([{"from": "gpt", "value": "Hello. "}]) == "Assistant: Hello."
    assert readers.render_chat([{"speaker": "user"}]) is readers.render_chat(["Hi"]) is None


def test_bad_records_are_named_counted_and_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(readers, "MAX_LINE", 150_000)
    good = texts(2)
    bad = [b'{"text": "caf\xe9"}', b"not JSON", b'{"title": "x"}', b'{"text": " "}', b'{"text": 5}', b"[1]",
           b"[" * 100_000, lines(["x" * 150_000])[:-1], lines(["y" * 500_000])[:-1], *[b"{}"] * 13]
    content = lines(good[:1]) + b"\n".join(bad) + b"\n\n" + lines(good[1:])
    config = setup(tmp_path, web__jsonl=content, book__txt=b"caf\xe9 and more")
    with pytest.raises(ValueError, match="^book: corrupt files, or no document to train on"):
        prepare.tokenize(config)
    out, err = capsys.readouterr()
    assert stream(config) == whole(good)
    assert "bad_records:22 " in out and err.count("web.jsonl: record") == 20
    for expected in ("web.jsonl: record 2 skipped: 'utf-8' codec can't decode", "record 3 skipped: Expecting",
                     "record 4 skipped: no text", "record 7 skipped: no text", "record 8 skipped: maximum",
                     "record 9 skipped: longer than 150,000 bytes; split it", "record 10 skipped: longer",
                     "book.txt: record 1 skipped: 'utf-8' codec can't decode"):
        assert expected in err, expected


@pytest.mark.parametrize("kind", ["gz", "xz", "zst"])
def test_a_corrupt_file_keeps_what_came_before_and_is_done_again_when_whole(tmp_path, capsys, kind):
    packer = pytest.importorskip(readers.PACKAGES[kind])
    documents = texts(300, words=300)
    content = packer.compress(lines(documents))
    config = setup(tmp_path, **{f"web__jsonl__{kind}": b"", "code__jsonl": lines(texts(5))})
    path = tmp_path / f"raw/web.jsonl.{kind}"
    expected = whole(documents)
    place = len(content) * 2 // 3
    # gzip is cut, the others have a hole
    path.write_bytes(content[:place] + (b"" if kind == "gz" else bytes(500) + content[place + 500:]))
    with pytest.raises(ValueError, match="^web: corrupt files"):
        prepare.tokenize(config)
    kept = stream(config)
    # whole documents only
    assert kept == expected[:len(kept)] and expected[len(kept)] == TOKENIZER.bos
    assert f"{path}: corrupt in or after record" in capsys.readouterr().err
    path.write_bytes(content)
    prepare.tokenize(config)
    assert stream(config) == expected
    assert "source:code done before" in capsys.readouterr().out


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
    val = [text for text in documents if is_validation(text, 0.4)]
    train = [text for text in documents if not is_validation(text, 0.4)]
    assert stream(config, split="val") == whole(val) and 500 < len(val) < 700
    assert stream(config) == whole(train)
    entry = open_data(config.out).entries[0]
    assert len(entry["val"]) == 8
    assert [shard["tokens"] for shard in entry["train"]] == [90_001, 121_336 - 90_001]
    assert sum(shard["documents"] for shard in entry["train"]) == len(train)
    assert sum(shard["bytes"] for shard in entry["train"]) == sum(len(text.encode()) for text in train)


def test_two_processes_exclude_each_other_and_a_killed_one_leaves_nothing_half_done(tmp_path):
    config = setup(tmp_path, code__jsonl=lines(texts(500)), web__jsonl=lines(texts(6000)))
    out = Path(config.out)
    out.mkdir()
    (out / "manifest.json").touch()
    # neither an installed package of the name data nor the folder that it starts in is in its way
    (tmp_path / "elsewhere/data").mkdir(parents=True)
    (tmp_path / "elsewhere/data/__init__.py").write_text("raise ImportError('not this one')")
    flags = ["--mix", config.mix, "--raw", config.raw, "--out", config.out, "--vocab-size", "1024",
             "--val-fraction", "0.0", "--workers", "1"]
    first = subprocess.Popen([sys.executable, prepare.__file__, "tokenize", *flags], start_new_session=True,
                             cwd=tmp_path / "elsewhere", stdout=subprocess.DEVNULL,
                             env=os.environ | {"PYTHONPATH": str(tmp_path / "elsewhere")})
    while not (out / "code.source.json").exists():
        assert first.poll() is None
        time.sleep(0.01)
    with pytest.raises(ValueError, match="another process is writing into"):
        prepare.tokenize(config)
    first.kill()
    first.wait()
    # its worker ends by itself
    with pytest.raises(ProcessLookupError):
        for _ in range(3000):
            os.killpg(first.pid, 0)
            time.sleep(0.01)
    assert not (out / "manifest.json").exists()
    code = (out / "code-train-00000.bin").stat().st_mtime_ns
    prepare.tokenize(config)
    # was finished before, by a worker process
    assert (out / "code-train-00000.bin").stat().st_mtime_ns == code
    # all of it in this process: the same bytes
    fresh = replace(config, out=str(tmp_path / "fresh"))
    prepare.tokenize(fresh)
    for name in ("code-train-00000.bin", "web-train-00000.bin", "manifest.json"):
        assert Path(fresh.out, name).read_bytes() == (out / name).read_bytes()


def test_a_source_is_done_again_when_its_file_or_a_flag_is_another(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 1000)
    config = setup(tmp_path, **{"web-train__jsonl": lines(texts(50)), "web__jsonl": lines(texts(50))})
    prepare.tokenize(config)
    (tmp_path / "raw/web.jsonl").write_bytes(lines(texts(10)))
    prepare.tokenize(config)
    assert stream(config) == whole(texts(50)) and stream(config, 1) == whole(texts(10))
    assert capsys.readouterr().out.count("done before") == 1
    prepare.tokenize(replace(config, val_fraction=0.5))
    assert len(stream(config)) < len(whole(texts(50))) and "done before" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="has another tokenizer"):
        prepare.tokenize(replace(config, vocab_size=512))


def test_inspect_names_a_damaged_shard_and_its_remedy_mends_it(tmp_path, capsys):
    config = setup(tmp_path, web__jsonl=lines(texts(1000)), code__jsonl=lines(texts(3000)))
    prepare.tokenize(config)
    show = InspectFlags(data=config.out, verify=True)
    prepare.inspect(show)
    out = capsys.readouterr().out
    assert "verified" in out and repr(texts(1)[0])[1:50] in out
    # every second sample is of the smaller source
    assert f"twice: {2 * len(stream(config)) - 1:,}\n" in out
    shard = Path(config.out, "web-train-00000.bin")
    content = shard.read_bytes()
    for damaged, message in ((content[:-1] + b"\xff", "are damaged"), (content[:-2], "was cut")):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"web-train-00000.bin .*{message}.*; delete"):
            prepare.inspect(show)
        shard.unlink()
        prepare.tokenize(config)
        assert shard.read_bytes() == content


def test_a_missing_package_is_named_before_anything_is_done(tmp_path, monkeypatch):
    config = setup(tmp_path, a__jsonl=lines(texts(2)), b__jsonl__zst=b"")
    # as when it is not installed
    monkeypatch.setitem(sys.modules, readers.ZSTD, None)
    with pytest.raises(ValueError, match=f"the package {readers.ZSTD} is missing; pip install"):
        prepare.tokenize(config)
    assert not Path(config.out).exists()


def test_a_trained_tokenizer_is_read_by_the_loader_and_did_not_see_validation_text(tmp_path):
    pytest.importorskip("rustbpe")
    secret = [text for text in texts(400, words=50, ending=" zqzqzq") if is_validation(text, 0.3)]
    config = setup(tmp_path, web__jsonl=lines(secret + texts(400)))
    flags = TokenizerFlags(mix=config.mix, raw=config.raw, out=config.out, vocab_size=350, val_fraction=0.3)
    prepare.tokenizer(flags)
    made = Tokenizer.load(config.out)
    assert made.vocab_size == 350 and made.decode(made.encode("the model, 12345")) == "the model, 12345"
    assert b" model" in made.ranks and not any(b"zq" in token for token in made.ranks)


def test_sources_are_chosen_and_replaced_by_name(tmp_path):
    config = setup(tmp_path, web__jsonl=lines(texts(3)), code__jsonl=lines(texts(3)))
    mine = tmp_path / "mine"
    mine.mkdir()
    for name, content in (("b.txt", "second"), ("a.txt", "first"), ("a.txt.part", "half")):
        (mine / name).write_text(content)
    prepare.tokenize(replace(config, source=f"code={mine}", only="code"))
    assert stream(config) == whole(["first", "second"])
    for wrong, message in ((dict(only="cod"), "--only 'cod' or"), (dict(out=""), "--out"),
                           (dict(source="web=/nowhere"), "source web has no file .* in /nowhere"),
                           (dict(source="x=y"), "'x=y' is wrong"), (dict(source="web"), "'web' is wrong")):
        with pytest.raises(ValueError, match=message):
            prepare.tokenize(replace(config, **wrong))


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, *['{"sources": %s}' % sources for sources in (
    "[]", '{"x": 1}', '[{"name": "../x", "weight": 1}]', '[{"name": "x", "weight": 0}]', '[{"name": "x"}]',
    '[{"name": "x", "weight": Infinity}]', '[{"name": "x", "weight": 1}, {"name": "x", "weight": 2}]')]])
def test_what_is_no_mix_file_is_named(tmp_path, content):
    (tmp_path / "mix.json").write_text(content)
    with pytest.raises(ValueError, match="mix.json is no mix file"):
        prepare.read_mix(DownloadFlags(mix=str(tmp_path / "mix.json")))


@pytest.mark.parametrize("argv, expected", [
    ([], "error: the following arguments are required: download|tokenizer|tokenize|inspect"),
    (["tokenize", "--max-bytes", "5"], "error: unrecognized arguments: --max-bytes 5"),
    (["tokenize"], "--out must name a folder"), (["inspect", "--data", ""], "an empty path")])
def test_the_command_line_says_one_line_and_ends_with_2(argv, expected, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    assert expected in refused(prepare.main, *argv)
