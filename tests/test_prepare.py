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
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

import train
from conftest import table
from data import hub as hub_module
from data import prepare, readers
from data.prepare import DownloadFlags, InspectFlags, TokenizeFlags, TokenizerFlags
from dataloader import Data, Tokenizer, is_validation, open_data
from model import PRESETS

LIST = "/api/datasets/o/web/tree/main/web"
WORDS = "the of and to model token stage expert a score, which (never) its bound; 1234 don't 5x\n".split(" ")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Every test has an empty folder as its working directory."""
    monkeypatch.chdir(tmp_path)


def refusing(message):
    """A context in which ValueError is raised with a message like this; none where it is None."""
    return pytest.raises(ValueError, match=message) if message else nullcontext()


# --------------------------------------------------------------------------------------------------
# A hub that misbehaves

class Handler(http.server.BaseHTTPRequestHandler):
    """A hub on the loopback. Its server has `files` {path: content}, `seen` [(path, first byte asked for,
    headers)] and `plans`: for a path, how each of its first answers differs from the right one, see `answer`.
    """

    def do_GET(self):
        hub = self.server
        name = self.path.partition("?")[0].split("/resolve/main/")[-1]
        begin = int(self.headers.get("Range", "bytes=0-")[6:-1])
        hub.seen.append((name, begin, self.headers))
        body = hub.files[name][begin:] if name in hub.files else listing(hub.files)
        plan = hub.plans.get(name) or [{}]
        self.answer(**{"status": 206 if begin else 200, "body": body, **plan.pop(0)})

    def answer(self, status, body, headers={}, sent=None, silence=0):
        """Without a Content-Length: where the body ends is for the client to judge."""
        self.send_response(status)
        for header in headers.items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body[:sent])
        time.sleep(silence)

    def log_message(self, *_):
        pass


def listing(files):
    """The hub's list of these files."""
    listed = [{"type": "file", "path": name, "size": len(content),
               "lfs": {"oid": hashlib.sha256(content).hexdigest()}}
              for name, content in sorted(files.items())]
    return json.dumps([{"type": "directory"}, *listed]).encode()


def start_hub():
    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.files = {"web/a.txt": random.Random(1).randbytes(300_007), "code/b.txt": b"b" * 1009}
    hub.plans = {}
    hub.seen = []
    threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True).start()
    return hub


@pytest.fixture
def hub(monkeypatch):
    hub = start_hub()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    Path("m.json").write_text(json.dumps({"sources": [
        {"name": name, "weight": 1, "repository": f"o/{name}", "files": [f"{name}/*.txt"]}
        for name in ("web", "code")]}))
    for name, value in {"BACKOFF": 0.01, "TIMEOUT": 0.4, "RETRIES": 3, "OFFLINE": 0.01}.items():
        monkeypatch.setattr(hub_module, name, value)
    hub.a = Path("raw/web/web/a.txt")
    hub.b = Path("raw/code/code/b.txt")
    yield hub
    hub.shutdown()


def download(refused=None, **changes):
    """The command for the mix m.json, which is to be refused with a message like `refused`."""
    with refusing(refused):
        prepare.download(DownloadFlags(mix="m.json", **changes))


def begins(hub, path):
    """The first bytes that were asked for, request by request."""
    return [begin for seen, begin, _ in hub.seen if seen == path]


def test_a_download_goes_on_after_refusals_short_bodies_and_a_stall(hub):
    hub.plans[LIST] = [{"status": 503}]
    hub.plans["web/a.txt"] = [{"status": 429, "headers": {"Retry-After": "1"}}, {"status": 503},
                              {"sent": 50_000}, {"sent": 40_000}, {"sent": 70_000, "silence": 0.7}]
    start = time.monotonic()
    download()
    # as long as 429 says
    assert 1 <= time.monotonic() - start < 4
    assert hub.a.read_bytes() == hub.files["web/a.txt"]
    # each goes on from a later byte
    begun = begins(hub, "web/a.txt")
    assert len(begun) == 6 and begun[2:] == sorted({*begun}), begun


@pytest.mark.parametrize("with_ranges", [True, False])
def test_an_interrupted_command_goes_on_and_finished_files_are_not_fetched_again(hub, with_ranges):
    content = hub.files["web/a.txt"]
    if not with_ranges:
        hub.plans["web/a.txt"] = [{"status": 200, "body": content}]
    hub.a.parent.mkdir(parents=True)
    Path(f"{hub.a}.part").write_bytes(content[:123_457])
    for _ in range(2):
        download()
    assert begins(hub, "web/a.txt") == [123_457] and begins(hub, "code/b.txt") == [0]
    assert hub.a.read_bytes() == content


@pytest.mark.parametrize("path, answer, tries, message", [
    ("web/a.txt", {"status": 503}, 4, "byte 0: 503 .* after 4 failures: run the command again"),
    ("web/a.txt", {"status": 403}, 1, "byte 0: 403 .* after 1 failures: .* accept its terms"),
    ("web/a.txt", {"body": bytes(300_007)}, 1, "has not the size or the sha256"),
    *[(LIST, {"body": body}, 1, "HF_ENDPOINT") for body in (
        b'{"error": "maintenance"}', b'[{"type": "file"}]', b"<html>")],
    (LIST, {"body": listing({"web/../../x.txt": b"x"})}, 1, "")])
def test_a_source_that_fails_is_named_and_the_other_is_downloaded(hub, capsys, path, answer, tries, message):
    hub.plans[path] = [answer] * 9
    download("incomplete: web;")
    assert len(begins(hub, path)) == tries and not hub.a.exists() and hub.b.exists()
    assert re.search(message, capsys.readouterr().err)
    assert not any("x.txt" in name for name, *_ in hub.seen)


def test_without_a_network_a_source_is_given_up_soon(hub, monkeypatch, capsys):
    # connections to this port are refused
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    download("incomplete: web, code;")
    # by OFFLINE, before there are four failures
    assert re.search("after [12] failures: .*look at the network", capsys.readouterr().err)


def test_the_token_goes_to_the_hub_and_not_where_it_redirects(hub, monkeypatch):
    other = start_hub()
    # as copied over two lines
    monkeypatch.setenv("HF_TOKEN", "hf_sec\nret\n")
    # another host, and the same name at another port
    for host, name in (("localhost", "web/a.txt"), ("127.0.0.1", "code/b.txt")):
        place = f"http://{host}:{other.server_port}/resolve/main/{name}"
        hub.plans[name] = [{"status": 302, "headers": {"Location": place}}]
    download()
    other.shutdown()
    sent, passed_on = ([headers["Authorization"] for *_, headers in each.seen] for each in (hub, other))
    assert {*sent} == {"Bearer hf_secret"} and passed_on == [None, None]


def test_max_bytes_takes_whole_files_until_there_is_enough_and_lists_are_paged(hub):
    hub.files |= {f"web/{i}.txt": bytes(400) for i in range(7)}
    hub.plans[LIST] = [{"body": listing({"web/0.txt": bytes(400)}),
                        "headers": {"Link": '<http://127.0.0.1/api?cursor=2>; rel="next"'}}]
    download(max_bytes=1000, only="web")
    assert sorted(file.name for file in hub.a.parent.iterdir()) == ["0.txt", "1.txt"]
    download(only="web")
    assert len([*hub.a.parent.iterdir()]) == 8


def test_gated_sources_are_left_out_until_there_is_a_token(hub, monkeypatch, capsys):
    mix = Path("m.json")
    more = '"name": "web", "status": "gated", "steps": ["sign in"]'
    mix.write_text(mix.read_text().replace('"name": "web"', more))
    download()
    assert "source:web is not downloaded: sign in" in capsys.readouterr().out and not hub.a.exists()
    assert len(prepare.find_files(TokenizerFlags(mix="m.json", out="nowhere"))) == 1
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    download()
    assert hub.a.exists()


# --------------------------------------------------------------------------------------------------
# Files

# of the first 1,024 ids of the embedded one
TOKENIZER = Tokenizer.load(vocab_size=1024)
FLAGS = TokenizeFlags(mix="m.json", out="out", vocab_size=1024, workers=0, val_fraction=0.0)


def texts(n, words=60, ending=""):
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=words)) + f" {i}{ending}" for i in range(n)]


def lines(documents):
    return "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()


def parquet_of(column):
    """The bytes of a parquet file with this column, {name: values}, in row groups of a hundred."""
    pyarrow.parquet.write_table(pyarrow.table(column), "made", row_group_size=100)
    return Path("made").read_bytes()


def setup(**files):
    """Write RAW with the given files (name__suffix: content, or name: documents), and a mix of them."""
    Path("raw").mkdir()
    for name, content in files.items():
        if isinstance(content, list):
            Path("raw", f"{name}.jsonl").write_bytes(lines(content))
        else:
            Path("raw", name.replace("__", ".")).write_bytes(content)
    sources = [{"name": name.partition("__")[0], "weight": 1} for name in files]
    Path("m.json").write_text(json.dumps({"sources": sources}))


def tokenize(refused=None, **changes):
    """The command for the mix m.json, with other FLAGS, which is to be refused with a message like `refused`.
    """
    with refusing(refused):
        prepare.tokenize(replace(FLAGS, **changes))


def stream(source=0, split="train"):
    """All tokens of a source, from the shards that the manifest names."""
    data = open_data("out")
    return np.concatenate(data._shards(data.entries[source], split)).tolist()


def whole(documents):
    """What a stream should be: documents encoded in one go."""
    return [token for text in documents for token in TOKENIZER.encode(text)]


def test_every_kind_of_json_lines_gives_the_same_tokens():
    documents = texts(300) + ["a document\nof three\n\nlines", "Grüße, 世界 😀 \u2028 <|bos|>"]
    plain = lines(documents)
    setup(a__jsonl=plain, b__ndjson=b"\xef\xbb\xbf" + plain.strip(),
          c__json=plain.replace(b"\n", b"\n\r\n"))
    tokenize()
    for i in range(3):
        assert stream(i) == whole(documents)


def test_the_mix_names_a_column_of_chats(capsys):
    chats = [[{"role": "user", "content": "Hi "}], None]
    setup(a__parquet=parquet_of({"messages": chats}), b__parquet=parquet_of({"Text": ["b"]}))
    mix = Path("m.json")
    mix.write_text(mix.read_text().replace('"weight"', '"chat": "messages", "weight"'))
    tokenize("^a, b: corrupt files")
    assert stream() == whole(["User: Hi"])
    err = capsys.readouterr().err
    assert "a.parquet: 1 of 2 records skipped: record 2: no text" in err
    assert "no column 'messages' but ['Text']" in err


@pytest.mark.parametrize("messages, text", [
    ([{"from": "gpt", "value": "Hello. "}], "Assistant: Hello."), (["Hi"], None), ([{"who": "user"}], None),
    ([{"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "image"}, {"text": "a"}]}],
     "User: Look:\na"), ([{"role": "user", "content": None}], None)])
def test_a_chat_is_the_text_that_is_there(messages, text):
    assert readers.render_chat(messages) == text


def test_losses_are_counted_and_named_by_file_and_more_than_a_twentieth_ends_with_an_error(
        monkeypatch, capsys):
    monkeypatch.setattr(readers, "MAX_LINE", 150_000)
    good = texts(200)
    bad = [b'{"text": "caf\xe9"}', b"not JSON", b'{"Text": "x"}', b"[" * 100_000, lines(["x" * 500_000])[:-1]]
    few = lines(good) + b"\n".join(bad) + b'\n\n{"text": " "}\n'
    setup(web__jsonl=few, book__txt=b"caf\xe9", many__jsonl=few * 2 + b"{}\n" * 20,
          array__json=b'[\n{"text": "x"},', document__json=b'{\n "text": "x"\n}\n')
    # of the same source, behind a file with many losses
    Path("raw/many.z.txt").write_bytes(b"caf\xe9")
    tokenize("^book, many, array, document: corrupt files, more than 5%")
    out, err = capsys.readouterr()
    assert stream() == whole(good)
    assert "records:206 bad_records:5\n" in out and "bad_records:31\n" in out
    for expected in ("web.jsonl: 5 of 206 records skipped: record 201: 'utf-8' ", "longer than 150,",
                     "many.jsonl: 30 of", "many.z.txt: 1 of 1", "book.txt: 1 of 1", "array.json: 2 of 2",
                     "document.json: 3 of 3", "makes lines of an array", "before training"):
        assert expected in err, expected


def test_a_file_of_another_kind_is_an_error_and_one_without_text_is_named(capsys):
    setup(web=texts(300))
    Path("raw/web.empty.jsonl").write_text('{"text": ""}\n')
    tokenize()
    assert "web.empty.jsonl: no text" in capsys.readouterr().err
    # one bad record of 302
    Path("raw/web.array.json").write_text(json.dumps([{"text": "x"}] * 500))
    tokenize("^web: corrupt")


@pytest.mark.parametrize("between, corrupt", [(b"", 0), (bytes(8), 0), (b"damage!!", 1)])
def test_an_xz_file_is_read_to_its_end_or_named(monkeypatch, between, corrupt):
    # streams end, and zeros lie, anywhere in a block
    monkeypatch.setattr(readers, "BLOCK", 8)
    first = "first\n" * 9000
    path = Path("a.txt.xz")
    path.write_bytes(lzma.compress(first.encode()) + between + lzma.compress(b"second") + bytes(4))
    lost = Counter()
    found = [*prepare.read_source({"files": [path]}, lost)]
    assert found == [first + "second"] * (1 - corrupt) and lost["corrupt_files"] == corrupt


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.xz", "jsonl.zst", "parquet"])
def test_a_corrupt_file_keeps_what_came_before_and_is_done_again_when_whole(capsys, kind):
    documents = texts(300, words=300)
    if kind == "parquet":
        content = parquet_of({"text": documents})
    else:
        content = pytest.importorskip(readers.PACKAGES[kind[6:]]).compress(lines(documents))
    setup(**{f"web__{kind}": b"", "code": texts(5)})
    path = Path(f"raw/web.{kind}")
    expected = whole(documents)
    place = len(content) * 2 // 3
    # gzip is cut, the others have a hole
    path.write_bytes(content[:place] + (b"" if "gz" in kind else bytes(500) + content[place + 500:]))
    tokenize("^web: corrupt files")
    kept = stream()
    # whole documents only
    assert kept and kept == expected[:len(kept)] and expected[len(kept)] == TOKENIZER.bos
    assert f"{path}: 0 of" in capsys.readouterr().err
    path.write_bytes(content)
    tokenize()
    assert stream() == expected and "source:code done before" in capsys.readouterr().out


def test_our_own_bugs_are_not_told_as_corrupt_files(monkeypatch):
    monkeypatch.setattr(readers, "_parse_line", None)
    setup(web=texts(1))
    with pytest.raises(TypeError):
        tokenize()


# --------------------------------------------------------------------------------------------------
# Folders of shards

def test_validation_documents_are_chosen_by_hash_into_eight_shards(monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 90_001)
    documents = texts(1500)
    setup(web=documents)
    tokenize(val_fraction=0.4)
    val, train = ([text for text in documents if is_validation(text, 0.4) == held_out] for held_out in (1, 0))
    assert stream(split="val") == whole(val) and 500 < len(val) < 700
    assert stream() == whole(train)
    entry, = open_data("out").entries
    assert len(entry["val"]) == 8 and [shard["tokens"] for shard in entry["train"]] == [90_001, 31_335]
    assert sum(shard["bytes"] for shard in entry["train"]) == len("".join(train))


def test_two_processes_exclude_each_other_and_a_killed_one_leaves_nothing_half_done():
    setup(code=texts(500), web=texts(6000))
    manifest = Path("out/manifest.json")
    manifest.parent.mkdir()
    manifest.touch()
    flags = "--mix m.json --out out --vocab-size 1024 --workers 1 --val-fraction 0"
    first = subprocess.Popen([sys.executable, prepare.__file__, "tokenize", *flags.split()],
                             start_new_session=True)
    while not Path("out/code.source.json").exists():
        assert first.poll() is None
        time.sleep(0.01)
    tokenize("another process is writing into")
    first.kill()
    first.wait()
    # its worker ends by itself
    with pytest.raises(ProcessLookupError):
        for _ in range(3000):
            os.killpg(first.pid, 0)
            time.sleep(0.01)
    assert not manifest.exists()
    tokenize()
    # all of it in this process: the same shards, by their sha256
    tokenize(out="fresh")
    assert Path("fresh/manifest.json").read_text() == manifest.read_text()


def test_a_source_is_done_again_when_its_file_or_a_flag_is_another(monkeypatch, capsys):
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 1000)
    setup(**{"web-train": texts(50), "web": texts(50)})
    tokenize()
    Path("raw/web.jsonl").write_bytes(lines(texts(10)))
    tokenize()
    assert stream() == whole(texts(50)) and stream(1) == whole(texts(10))
    tokenize(val_fraction=0.5)
    assert len(stream()) < len(whole(texts(50))) and capsys.readouterr().out.count("done before") == 1
    tokenize("has another tokenizer", vocab_size=512)


def test_inspect_names_a_damaged_shard_and_its_remedy_mends_it(capsys):
    setup(web=texts(1000), code=texts(3000))
    tokenize()
    show = InspectFlags(data="out", verify=True)
    prepare.inspect(show)
    out = capsys.readouterr().out
    assert "verified" in out
    shard = Path("out/web-train-00000.bin")
    content = shard.read_bytes()
    for damaged, message in ((content[:-1] + b"\xff", "are damaged"), (content[:-2], "was cut")):
        shard.write_bytes(damaged)
        with refusing(f"web-train-00000.bin .*{message}.* delete"):
            prepare.inspect(show)
        shard.unlink()
        tokenize()
        assert shard.read_bytes() == content


def test_a_missing_package_is_named_before_anything_is_done(monkeypatch):
    setup(a=texts(2), b__jsonl__zst=b"")
    # as when it is not installed
    monkeypatch.setitem(sys.modules, readers.ZSTD, None)
    tokenize(f"the package {readers.ZSTD} is missing; pip install")
    assert not Path("out").exists()


def test_a_trained_tokenizer_is_read_by_the_loader_and_did_not_see_validation_text():
    secret = [text for text in texts(400, words=50, ending=" zqzqzq") if is_validation(text, 0.3)]
    setup(web=secret + texts(400))
    flags = TokenizerFlags(mix="m.json", out="out", vocab_size=350, val_fraction=0.3)
    prepare.tokenizer(flags)
    made = Tokenizer.load("out")
    assert made.vocab_size == 350 and b" model" in made.ranks
    assert not any(b"zq" in token for token in made.ranks)
    with refusing("--vocab-size"):
        prepare.tokenizer(replace(flags, out="other", vocab_size=30_000))
    with refusing("has another tokenizer"):
        prepare.tokenizer(flags)


def test_a_folder_without_a_mix_is_one_source_cut_at_blank_lines(capsys):
    story = "\n\n".join(texts(3000))
    for name in "raw/a.txt raw/sub/b.md raw/c.csv raw/.git/hidden.txt else/linked.txt".split():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(story if name == "raw/a.txt" else "short")
    for name, target in table("raw/link | ../else \n raw/sub/loop | .. \n raw/dead.txt | nowhere"):
        Path(name).symlink_to(target)
    # the second command finds what the first wrote
    for _ in range(2):
        prepare.tokenize(TokenizeFlags(out="raw/out", vocab_size=1024, workers=0, extensions=".md"))
    out, err = capsys.readouterr()
    assert not err and out.count("source:text files:3 not read:1 .csv, 1 that cannot be opened\n") == 2, out
    entry, = open_data("raw/out").entries
    assert entry["val_fraction"] == 0.2
    n_documents = sum(shard["documents"] for shard in entry["train"] + entry["val"])
    assert 4096 < len(story) / (n_documents - 2) < 4400


@pytest.mark.parametrize("text, sizes", [("a" * 9000, [8192, 808]), ("a\n" * 4000, [4098, 3902]),
                                         (("a" * 5000 + "\n \n") * 2, [5003, 5003])])
def test_a_text_is_cut_at_a_blank_line_or_a_line_end_or_anywhere(text, sizes):
    assert [len(piece) for piece in prepare.DOCUMENT.findall(text)] == sizes


def test_250_kb_are_held_out_by_default():
    setup(web__txt=bytes(5_000_000))
    source, = prepare.find_files(replace(FLAGS, val_fraction=None))
    assert source["val_fraction"] == pytest.approx(0.05)


def test_a_preset_that_could_not_validate_is_named_with_the_source_that_limits_it(data, capsys, monkeypatch):
    for preset, T, n_tokens in prepare.PRESETS.values():
        assert (T, n_tokens) == (PRESETS[preset].sequence_len, train.RECIPES[preset].eval_tokens)
    prepare.check_validation(open_data(data))
    lengths = {"train": 10 ** 8 + 2, "val": 7000}
    # of a shard that is not read, its length
    monkeypatch.setattr(Data, "_shards", lambda self, entry, split: [range(lengths[split])])
    prepare.check_validation(open_data(data))
    warnings = capsys.readouterr().err
    for preset in ("tiny --eval-tokens 36864", "d12 --eval-tokens 10485760"):
        assert re.search(f"{preset} must .* source prose has", warnings)


def test_the_cpus_are_those_that_may_be_used():
    for quota, most in (("max 100000", 10 ** 6), ("150000 100000", 1)):
        Path("cpu.max").write_text(quota)
        assert prepare.n_cpus(Path("cpu.max")) == min(most, len(os.sched_getaffinity(0)))


def test_a_killed_worker_is_named():
    with refusing("fewer --workers"), prepare.start_workers(1) as pool:
        pool.submit(os._exit, 1).result()


def test_sources_are_chosen_and_replaced_by_name():
    setup(web=texts(3), code=texts(3))
    Path("mine").mkdir()
    for name, content in (("b.txt", "second"), ("a.txt", "first"), ("a.txt.part", "half")):
        Path("mine", name).write_text(content)
    tokenize(source="code=mine", only="code")
    assert stream() == whole(["first", "second"])
    for name, value, message in table("""
            only   | web          | would drop .code
            only   | cod          | --only 'cod'
            out    |              | --out
            source | web=/nowhere | source web has no file
            source | x=y          | 'x=y'
            source | web          | --source 'web'"""):
        tokenize(message, **{name: value})


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, *['{"sources": %s}' % sources for sources in (
    "[]", '{"x": 1}', '[{"name": "../x", "weight": 1}]', '[{"name": "x", "weight": 0}]', '[{"name": "x"}]',
    '[{"name": "x", "weight": Infinity}]', '[{"name": "x", "weight": 1}, {"name": "x", "weight": 2}]')]])
def test_what_is_no_mix_file_is_named(content):
    Path("m.json").write_text(content)
    download("the mix m.json .* cannot be read")


def test_the_command_line_says_one_line_and_ends_with_2_and_has_help_with_examples(refused, capsys):
    assert "required: download|tokenizer|tokenize|inspect" in refused(prepare.main)
    assert "unrecognized arguments: --max-bytes 5" in refused(prepare.main, "tokenize", "--max-bytes", "5")
    for command in prepare.COMMANDS:
        with pytest.raises(SystemExit):
            prepare.main([command, "--help"])
        assert f"\npython data/prepare.py {command} --" in capsys.readouterr().out
