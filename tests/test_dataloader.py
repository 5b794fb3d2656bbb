"""
dataloader.py against arithmetic by hand: what a window holds, which samples a rank sees, how a mix deals its sources.

Run: python -m pytest tests/test_dataloader.py
"""
import json
import lzma
import os
import random
import sys
import time

import numpy as np
import pytest
import tiktoken
import torch
from tiktoken.load import load_tiktoken_bpe

import dataloader as D
from dataloader import HEADER, Loader, Mix, Source, Tokenizer, open_data, open_shard, permute, validation_windows, write_shard

FRONTIER = dict(edu=33.5, dclm=24, stack=16, wiki=5, culturax=5, proof=4, owm=4, gutenberg=4, pg19=2, ultrachat=1, hermes=0.6)


def source(name="a", weight=50, lengths=(1000,), start=0):
    """A source whose token at position p of its stream is (start + p) % 60000, in shards of these lengths."""
    ends = np.cumsum((0, *lengths))
    return Source(name, weight, [((start + np.arange(b, e)) % 60_000).astype(np.uint16) for b, e in zip(ends, ends[1:])])


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(vocab_size=300)


# -- tokenizer ----------------------------------------------------------------------------------------------------

def test_the_shipped_tokenizer_has_32768_ids_and_bos_last():
    tokenizer = Tokenizer.load()
    assert (tokenizer.vocab_size, tokenizer.bos) == (32_768, 32_767)
    assert tokenizer.encode("") == [32_767]


def test_rank_file_is_what_tiktoken_itself_reads():
    tokenizer = Tokenizer.load()
    assert load_tiktoken_bpe(str(D.HERE / "tokenizer.txt")) == {token: rank for rank, token in enumerate(tokenizer.ranks)}


@pytest.mark.parametrize("vocab_size", [257, 300, 1024, 32_768])
@pytest.mark.parametrize("text", [
    "", "The capital of France is Paris.", "def f(x):\n\treturn x ** 2  # \r\n", "naïve 東京 🙂 \u0000\u0001", "<|bos|> is plain text here",
    "a" * 5000, " " * 3000, bytes(range(256)).decode("latin-1")])
def test_decode_inverts_encode(vocab_size, text):
    tokenizer = Tokenizer.load(vocab_size=vocab_size)
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos and tokenizer.bos not in ids[1:]
    assert max(ids) < vocab_size
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", [" " * 1_000_000 + "x", "a" * 1_000_000, "word " * 60_000 + "\n" + "x1 = 'naïve'\n" * 30_000])
def test_a_million_characters_round_trip(text):
    tokenizer = Tokenizer.load()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_document_of_the_embedded_sample_round_trips():
    tokenizer, n = Tokenizer.load(), 0
    for file in sorted((D.HERE / "sample").glob("*.jsonl.xz")):
        for line in lzma.open(file, "rt", encoding="utf-8"):
            text, n = json.loads(line)["text"], n + 1
            ids = tokenizer.encode(text)
            assert ids[0] == tokenizer.bos not in ids[1:] and tokenizer.decode(ids) == text, (file.name, n)
    assert n > 2000


def test_the_fast_pattern_splits_as_the_pattern_of_the_tokenizer_does():
    assert Tokenizer.load().pattern == D.SPLIT_PATTERN          # so that the fast one is in use
    ranks = {bytes([b]): b for b in range(256)}                 # ids of single bytes would hide the split: so make long words tokens
    draw = random.Random(0)
    alphabet = "aZ\u00e9\u017f\u4e160\u06639 \t\n\r\u00a0\u3000\u2028'.,-\u0301\U0001f642<|>"
    texts = ["".join(draw.choices(alphabet, k=60)) for _ in range(1500)] + ["I'LL we've 'S 's 'ſ DON'T", " \r\n \n\n  x  ", "  ", "\r\r\n "]
    for text in texts:                                          # every piece of up to five characters is a token, if it is whole
        for i in range(len(text)):
            for n in range(1, 6):
                ranks.setdefault(text[i:i + n].encode(), len(ranks))
    slow, fast = (tiktoken.Encoding("x", pat_str=pattern, special_tokens={}, mergeable_ranks=ranks) for pattern in (D.SPLIT_PATTERN, D.FAST_PATTERN))
    for text in texts:
        assert fast.encode_ordinary(text) == slow.encode_ordinary(text), repr(text)


def test_pieces_have_the_tokens_of_the_whole(monkeypatch):
    tokenizer, text = Tokenizer.load(), " ".join(f"piece {i}, it's\n\n  {i * 7919} naïve 東京\tend." for i in range(300))
    whole = tokenizer.encoding.encode_ordinary(text)
    monkeypatch.setattr(D, "PIECE", 97)
    assert tokenizer.encode(text) == [tokenizer.bos, *whole]


def test_lone_surrogates_become_the_replacement_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_token_bytes_sum_to_the_texts_bytes_and_bos_counts_none(tokenizer):
    ids = tokenizer.encode("naïve 東京")
    assert tokenizer.token_bytes[ids].sum() == len("naïve 東京".encode())
    assert tokenizer.token_bytes[tokenizer.bos] == 0


def test_saved_tokenizer_is_the_same_tokenizer(tokenizer, tmp_path):
    for name, content in tokenizer.files().items():
        (tmp_path / name).write_bytes(content)
    assert Tokenizer.load(tmp_path).sha256 == tokenizer.sha256
    assert Tokenizer.load(vocab_size=301).sha256 != tokenizer.sha256


@pytest.mark.parametrize("vocab_size", [256, 32_769])
def test_a_vocabulary_that_the_tokenizer_cannot_give_is_refused(vocab_size):
    with pytest.raises(ValueError, match=f"vocab_size {vocab_size}.*257 to 32768"):
        Tokenizer.load(vocab_size=vocab_size)


@pytest.mark.parametrize("spoil", [lambda t: t[:-40] + b"!!!! 9\n", lambda t: b"".join(t.splitlines(True)[1:]), lambda t: b""])
def test_a_damaged_rank_file_is_named(tokenizer, tmp_path, spoil):
    for name, content in tokenizer.files().items():
        (tmp_path / name).write_bytes(spoil(content) if name == "tokenizer.txt" else content)
    with pytest.raises(ValueError, match="tokenizer"):
        Tokenizer.load(tmp_path)


# -- shards -------------------------------------------------------------------------------------------------------

def test_shard_round_trip(tokenizer, tmp_path):
    tokens = np.arange(17, dtype=np.uint16)
    write_shard(tmp_path / "a.bin", tokens, 3, tokenizer)
    assert (tmp_path / "a.bin").stat().st_size == 128 + 34
    assert np.array_equal(open_shard(tmp_path / "a.bin", tokenizer), tokens)
    header = np.fromfile(tmp_path / "a.bin", HEADER, 1)[0]
    assert (header["n_tokens"], header["n_documents"], header["vocab_size"]) == (17, 3, 300)
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"old")
    flushed = []

    def record(fd):                                             # what a loss of power right after it would leave
        flushed.append((os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd).st_size, (tmp_path / "a").read_bytes()))
    monkeypatch.setattr(os, "fsync", record)
    D.write_whole(tmp_path / "a", b"header", np.arange(5, dtype="<u2"))
    assert flushed == [(str(tmp_path / "a.tmp"), 16, b"old")]
    assert (tmp_path / "a").read_bytes() == b"header" + bytes([0, 0, 1, 0, 2, 0, 3, 0, 4, 0])


@pytest.mark.parametrize("spoil, word", [
    (lambda b: b[:100], "less than a header"), (lambda b: b[:-2], "was cut"), (lambda b: b + b"\0\0", "header says"),
    (lambda b: b"poe-TOKS" + b[8:], "not a token shard"), (lambda b: b[:32] + b"0" * 64 + b[96:], "another tokenizer")])
def test_a_damaged_shard_is_named(tokenizer, tmp_path, spoil, word):
    write_shard(tmp_path / "a.bin", np.arange(17, dtype=np.uint16), 3, tokenizer)
    (tmp_path / "a.bin").write_bytes(spoil((tmp_path / "a.bin").read_bytes()))
    with pytest.raises(ValueError, match=f"a.bin.*{word}"):
        open_shard(tmp_path / "a.bin", tokenizer)


def test_a_missing_shard_and_an_empty_folder_are_named(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="b.bin is missing"):
        open_shard(tmp_path / "b.bin", tokenizer)
    with pytest.raises(FileNotFoundError, match="no manifest.json"):
        open_data(tmp_path)


def write_data(folder, tokenizer, n_train=5000, n_val=3000):
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)
    sources = []
    for name, weight in (("a", 75), ("b", 25)):
        row = {"name": name, "weight": weight}
        for split, n in (("train", n_train), ("val", n_val)):
            write_shard(folder / f"{name}-{split}-00000.bin", np.arange(n) % 299, 1, tokenizer)
            row[split] = [{"file": f"{name}-{split}-00000.bin", "tokens": n}]
        sources.append(row)
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "sources": sources}))


def test_open_data_reads_a_folder_of_shards(tokenizer, tmp_path):
    write_data(tmp_path, tokenizer)
    data = open_data(tmp_path, 300)
    assert data.tokenizer.sha256 == tokenizer.sha256
    assert [(s.name, s.weight, s.n_tokens) for s in data.train(16, 0).sources] == [("a", 75, 5000), ("b", 25, 5000)]
    with pytest.raises(ValueError, match="300 ids.*vocab_size 1024"):
        open_data(tmp_path, 1024)
    for name, content in Tokenizer.load(vocab_size=301).files().items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="a-train-00000.bin was written with another tokenizer .300 ids.*expected 301.*data/prepare.py tokenize"):
        open_data(tmp_path).train(16, 0)
    (tmp_path / "manifest.json").write_text('{"sources": [{"name": "a"}]}')
    with pytest.raises(ValueError, match="manifest.json is not readable"):
        open_data(tmp_path)


def test_validation_and_training_documents_of_the_embedded_sample_are_disjoint(monkeypatch):
    seen = {}
    monkeypatch.setattr(Tokenizer, "encode_documents", lambda self, texts: seen.setdefault(len(seen), texts) and np.zeros(1000, np.uint16))
    data = open_data("", 300)
    data.train(16, 0), data.val(16)
    train, val = set(sum(list(seen.values())[:3], [])), set(sum(list(seen.values())[3:], []))
    assert not train & val and len(train) > 2000
    assert 110_000 < sum(len(t.encode()) for t in val) <= 131_072        # the tiny preset's score is on at most 128 KB


# -- windows and mixing -------------------------------------------------------------------------------------------

def test_windows_cross_shards_and_overlap_by_one_token():
    s = source(lengths=(5, 1, 7, 20))
    assert s.n_windows(4) == 8                                  # 33 tokens: the last window is 28..32
    for w in range(8):
        assert s.window(w, 4).tolist() == list(range(4 * w, 4 * w + 5))


@pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 1000])
def test_permute_is_a_permutation_that_its_key_chooses(n):
    index = np.arange(n, dtype=np.uint64)
    first = permute(index, n, np.full(n, 7, np.uint64))
    assert sorted(first.tolist()) == list(range(n))
    if n >= 17:
        assert first.tolist() != list(range(n))
        assert not np.array_equal(first, permute(index, n, np.full(n, 8, np.uint64)))


def frontier(seed=0):
    return Mix([source(name, weight, (100_000,)) for name, weight in FRONTIER.items()], 100, seed)


@pytest.mark.parametrize("start", [0, 777, 123_456, 10 ** 9])
def test_shares_of_any_20000_samples_are_within_a_hundredth_of_a_point(start):
    mix = frontier()
    assert mix.cards.sum() == 991
    chosen, _, _ = mix.locate(np.arange(start, start + 20_000))
    for s, weight in enumerate(FRONTIER.values()):
        share = 100 * (chosen == s).mean()
        assert abs(share - 100 * weight / 99.1) <= 0.0101, (s, share)      # at most one card at each end: 2 of 20,000


def test_every_window_of_a_source_comes_once_an_epoch_in_another_order():
    mix = Mix([source("a", 30, (401,)), source("b", 10, (977,))], 10, seed=3)      # 40 and 97 windows, 3 to 1
    chosen, epoch, window = mix.locate(np.arange(4 * 40))
    first, second = (window[(chosen == 0) & (epoch == e)].tolist() for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second and first != sorted(first)
    assert mix.n_in_first_epoch() == int(np.argmax(mix.locate(np.arange(500))[1] > 0))


def test_order_is_a_pure_function_of_seed_and_index():
    a, b = frontier(1), frontier(1)
    ahead = a.locate(np.arange(5000, 5100))
    b.locate(np.arange(17))                                     # whatever was asked before
    assert all(np.array_equal(x, y) for x, y in zip(ahead, b.locate(np.arange(5000, 5100))))
    assert not np.array_equal(ahead[2], frontier(2).locate(np.arange(5000, 5100))[2])


def test_targets_are_inputs_shifted_by_one():
    inputs, targets = frontier().batch(np.arange(6))
    assert inputs.dtype == targets.dtype == torch.int64 and inputs.shape == targets.shape == (6, 100)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(targets - inputs, torch.ones_like(inputs))      # the sources count up


def test_a_source_shorter_than_a_window_and_a_bad_weight_are_named():
    with pytest.raises(ValueError, match="source tiny has 5 tokens"):
        Mix([source("tiny", 1, (5,))], 5, 0)
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weights must be positive"):
            Mix([source("a", weight)], 5, 0)


def test_a_token_beyond_the_vocabulary_is_named():
    with pytest.raises(ValueError, match="source a holds token 9.*vocabulary of 300"):
        Mix([source("a", 1)], 5, 0, vocab_size=300).batch(np.arange(180))


def test_weights_that_are_not_tenths_are_dealt_in_a_thousand_cards():
    mix = Mix([source("a", 1 / 3), source("b", 2 / 3)], 5, 0)
    assert abs(mix.cards[0] / mix.cards.sum() - 1 / 3) < 1e-3


def test_too_many_validation_tokens_are_refused_with_what_there_is():
    mix = Mix([source("a", 1, (1001,))], 10, 0)
    assert validation_windows(mix, 1000, "--eval-tokens") == 100
    with pytest.raises(ValueError, match="--eval-tokens 1010: .* holds 1000 tokens.*--val-fraction"):
        validation_windows(mix, 1010, "--eval-tokens")
    with pytest.raises(ValueError, match="--split-tokens 9 is less than one window of 10 tokens"):
        validation_windows(mix, 9, "--split-tokens")


# -- batches ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("world", [1, 2, 3, 4, 12])
def test_the_ranks_batches_together_are_the_same_whatever_the_world_size(world):
    mix, batch, start = frontier(), 24, 1000
    loaders = [Loader(mix, start, batch, 1, rank=r, world=world) for r in range(world)]
    for step in range(3):
        rows = [next(loader)[0] for loader in loaders for _ in range(batch // world)]
        expected, _ = mix.batch(np.arange(start + step * batch, start + (step + 1) * batch))
        assert sorted(map(tuple, torch.cat(rows).tolist())) == sorted(map(tuple, expected.tolist()))
    for loader in loaders:
        loader.close()


def test_a_loader_opened_later_gives_the_very_next_batch():
    mix = frontier()
    a, b = Loader(mix, 0, 8, 4), Loader(mix, 16, 8, 4)
    for _ in range(4):
        next(a)
    for _ in range(4):
        assert all(torch.equal(x, y) for x, y in zip(next(a), next(b)))
    a.close(), b.close()


@pytest.mark.parametrize("taken", [0, 3])
def test_closing_ends_the_thread_that_reads_whether_it_waits_or_works(taken):
    loader = Loader(frontier(), 0, 8, 4)
    while not loader.queue.full():
        time.sleep(0.001)
    for _ in range(taken):
        next(loader)
    loader.close()
    assert not loader.thread.is_alive()


def test_a_seek_to_step_1e9_does_as_much_work_as_one_to_step_0():
    mix, batch = frontier(), 24

    def calls(step):
        """Python calls (C functions too) that opening the mix at a step and reading its first batch take."""
        n = 0

        def count(frame, event, arg):
            nonlocal n
            n += event in ("call", "c_call")
        sys.setprofile(count)
        try:
            read = mix.batch(np.arange(step * batch, (step + 1) * batch))
        finally:
            sys.setprofile(None)
        return n, read
    near, far = calls(0), calls(10 ** 9)
    assert far[0] < 1.5 * near[0], (near[0], far[0])            # permutations walk on until they land inside: a few rounds more or less
    loader = Loader(mix, 10 ** 9 * batch, batch, batch)         # and the loader gives just that batch
    assert all(torch.equal(a, b) for a, b in zip(next(loader), far[1]))
    loader.close()


def test_an_error_in_the_reading_thread_reaches_the_caller():
    mix = frontier()
    mix.sources[0].shards[0] = None
    loader = Loader(mix, 0, 64, 64)
    with pytest.raises(TypeError):
        next(loader)
    loader.close()
