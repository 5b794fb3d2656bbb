"""
dataloader.py against arithmetic by hand: what a window holds, which samples a rank sees, how a mix deals its
sources.

Run: python -m pytest tests/test_dataloader.py
"""
import os
import random
import threading

import numpy as np
import pytest
import tiktoken
import torch
from tiktoken.load import load_tiktoken_bpe

import dataloader as D
from common import write_whole
from dataloader import HEADER, Loader, Mix, Source, Tokenizer, open_data, open_shard, permute
from dataloader import validation_windows, write_shard

FRONTIER = [33.5, 24, 16, 5, 5, 4, 4, 4, 2, 1, 0.6]


def source(name="a", weight=50, lengths=(1000,)):
    """A source whose token at position p of its stream is p % 60000, in shards of these lengths."""
    stream = (np.arange(sum(lengths)) % 60_000).astype(np.uint16)
    return Source(name, weight, np.split(stream, np.cumsum(lengths)[:-1]))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(vocab_size=300)


# --------------------------------------------------------------------------------------------------
# Tokenizer

def test_the_shipped_tokenizer_has_32768_ids_and_bos_last():
    tokenizer = Tokenizer.load()
    assert tokenizer.encode("") == [32_767] == [tokenizer.vocab_size - 1]
    table = load_tiktoken_bpe(str(D.HERE / "tokenizer.txt"))
    assert table == {token: rank for rank, token in enumerate(tokenizer.ranks)}


@pytest.mark.parametrize("vocab_size", [257, 300, 32_768])
@pytest.mark.parametrize("text", [
    "", "def f(x):\n\treturn x ** 2  # \r\n", "naïve 東京 🙂 \u0000\u0001", "<|bos|> is plain text here",
    " " * 3000, bytes(range(256)).decode("latin-1")])
def test_decode_inverts_encode(vocab_size, text):
    tokenizer = Tokenizer.load(vocab_size=vocab_size)
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos and tokenizer.bos not in ids[1:]
    assert max(ids) < vocab_size
    assert tokenizer.decode(ids) == text


def test_a_million_spaces_round_trip():
    text = " " * 1_000_000 + "x"
    tokenizer = Tokenizer.load()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_fast_pattern_splits_as_the_pattern_of_the_tokenizer_does():
    # so that the fast one is in use
    assert Tokenizer.load().pattern == D.SPLIT_PATTERN
    # ids of single bytes would hide the split: so make long words tokens
    ranks = {bytes([b]): b for b in range(256)}
    rng = random.Random(0)
    alphabet = "aZ\u00e9\u017f\u4e160\u06639 \t\n\r\u00a0\u3000\u2028'.,-\u0301\U0001f642<|>"
    texts = ["".join(rng.choices(alphabet, k=60)) for _ in range(1500)]
    texts += ["I'LL we've 'S 's 'ſ DON'T", " \r\n \n\n  x  ", "  ", "\r\r\n "]
    # every piece of up to five characters is a token, if it is whole
    for text in texts:
        for i in range(len(text)):
            for n in range(1, 6):
                ranks.setdefault(text[i:i + n].encode(), len(ranks))
    slow, fast = (tiktoken.Encoding("x", pat_str=pattern, special_tokens={}, mergeable_ranks=ranks)
                  for pattern in (D.SPLIT_PATTERN, D.FAST_PATTERN))
    for text in texts:
        assert fast.encode_ordinary(text) == slow.encode_ordinary(text), repr(text)


def test_pieces_have_the_tokens_of_the_whole(monkeypatch):
    tokenizer = Tokenizer.load()
    text = " ".join(f"piece {i}, it's\n\n  {i * 7919} naïve 東京\tend." for i in range(300))
    whole = tokenizer.encoding.encode_ordinary(text)
    monkeypatch.setattr(D, "PIECE", 97)
    assert tokenizer.encode(text) == [tokenizer.bos, *whole]
    assert D.cut_text("a bc\nd e" + "f" * 97, 0) == 6
    # no place to cut at: neither a space behind white space nor a newline behind a sign
    assert D.cut_text(" " * 50 + ".\n" * 50, 0) == 97


def test_lone_surrogates_become_the_replacement_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_token_bytes_sum_to_the_texts_bytes_and_bos_counts_none(tokenizer):
    ids = tokenizer.encode("naïve 東京")
    assert tokenizer.token_bytes[ids].sum() == len("naïve 東京".encode())
    assert tokenizer.token_bytes[tokenizer.bos] == 0


@pytest.mark.parametrize("vocab_size", [256, 32_769])
def test_a_vocabulary_that_the_tokenizer_cannot_give_is_refused(vocab_size):
    with pytest.raises(ValueError, match=f"vocab_size {vocab_size}.*257 to 32768"):
        Tokenizer.load(vocab_size=vocab_size)


@pytest.mark.parametrize("name, spoil", [
    ("tokenizer.txt", lambda t: t[:-40] + b"!!!! 9\n"), ("tokenizer.txt", lambda t: t.partition(b"\n")[2]),
    ("tokenizer.txt", lambda t: t.replace(b" 257\n", b" 299\n")),
    ("tokenizer.json", lambda t: b'{"pattern": "("}')])
def test_a_damaged_tokenizer_is_named(tokenizer, tmp_path, name, spoil):
    files = tokenizer.files()
    for file, content in (files | {name: spoil(files[name])}).items():
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"the tokenizer in {tmp_path} is not readable"):
        Tokenizer.load(tmp_path)


# --------------------------------------------------------------------------------------------------
# Shards

def test_shard_round_trip(tokenizer, tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(17, dtype=np.uint16), 3, tokenizer)
    assert (tmp_path / "a.bin").stat().st_size == 128 + 34
    assert open_shard(tmp_path / "a.bin", tokenizer).tolist() == list(range(17))
    header = np.fromfile(tmp_path / "a.bin", HEADER, 1)[0]
    assert header["n_tokens"] == 17 and header["n_documents"] == 3 and header["vocab_size"] == 300


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(os, "fsync", lambda fd: names.append([path.name for path in tmp_path.iterdir()]))
    write_whole(tmp_path / "a", b"header", b"tokens")
    assert names == [["a.tmp"]] and (tmp_path / "a").read_bytes() == b"headertokens"


@pytest.mark.parametrize("spoil, word", [
    (lambda b: b[:100], "was cut"), (lambda b: b[:-1], "was cut"),
    (lambda b: b"poe-TOKS" + b[8:], "not a token shard"),
    (lambda b: b[:32] + b"0" * 64 + b[96:], "another tokenizer")])
def test_a_damaged_shard_is_named(tokenizer, tmp_path, spoil, word):
    write_shard(tmp_path / "a.bin", np.arange(17, dtype=np.uint16), 3, tokenizer)
    (tmp_path / "a.bin").write_bytes(spoil((tmp_path / "a.bin").read_bytes()))
    with pytest.raises(ValueError, match=f"a.bin.*{word}"):
        open_shard(tmp_path / "a.bin", tokenizer)
    with pytest.raises(FileNotFoundError, match="b.bin"):
        open_shard(tmp_path / "b.bin", tokenizer)


def test_open_data_reads_a_folder_of_shards(data, tokenizer, tmp_path):
    opened = open_data(data, 300)
    assert opened.tokenizer.sha256 == tokenizer.sha256 != Tokenizer.load(vocab_size=301).sha256
    assert [(s.name, s.weight) for s in opened.train(16, 0).sources] == [("prose", 70), ("code", 30)]
    with pytest.raises(ValueError, match="vocab_size 1024 does not fit"):
        open_data(data, 1024)
    with pytest.raises(ValueError, match="prose-train-00000.bin .*of 300 ids, than this one of 299; give"):
        open_data(data, 299).train(16, 0)
    for content in ('{"sources": [{"name": "a"}]}', "{"):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match="has no manifest.json that can be read"):
            open_data(tmp_path)


def test_validation_and_training_documents_of_the_embedded_sample_are_disjoint(monkeypatch):
    seen = {}

    def remember(self, texts):
        seen[len(seen)] = texts
        return np.zeros(1000, np.uint16)
    monkeypatch.setattr(Tokenizer, "encode_documents", remember)
    data = open_data("", 300)
    data.train(16, 0)
    data.val(16)
    train = {*seen[0], *seen[1], *seen[2]}
    val = {*seen[3], *seen[4], *seen[5]}
    assert not train & val and len(train) > 2000
    # the tiny preset's score is on at most 128 KB
    assert 110_000 < sum(len(t.encode()) for t in val) <= 131_072


# --------------------------------------------------------------------------------------------------
# Windows and mixing

def test_windows_cross_shards_and_overlap_by_one_token():
    s = source(lengths=(5, 1, 7, 20))
    # 33 tokens: the last window is 28..32
    assert Mix([s], 4, 0).windows.tolist() == [8]
    for w in range(8):
        assert s.window(w, 4).tolist() == list(range(4 * w, 4 * w + 5))


@pytest.mark.parametrize("n", [1, 2, 3, 17, 1000])
def test_permute_is_a_permutation_that_its_key_chooses(n):
    index = np.arange(n, dtype=np.uint64)
    size = np.full(n, n, np.uint64)
    first = permute(index, size, np.full(n, 7, np.uint64))
    assert sorted(first.tolist()) == list(range(n))
    if n >= 17:
        assert first.tolist() != list(range(n))
        assert not np.array_equal(first, permute(index, size, np.full(n, 8, np.uint64)))


def test_the_order_of_samples_is_what_every_run_so_far_has_seen():
    # literal: a run's data is named by its seed and its sample cursor
    mix = Mix([source("a", 33.5, (400,)), source("b", 16, (200,)), source("c", 0.6, (90,))], 10, 1)
    source_of, epoch, window = mix.locate([0, 1, 2, 3, 4, 5, 100, 10 ** 6])
    assert source_of.tolist() == [0, 1, 0, 0, 1, 0, 0, 1]
    assert epoch.tolist() == [0, 0, 0, 0, 0, 0, 1, 16808]
    assert window.tolist() == [26, 15, 13, 17, 17, 5, 12, 5]


def frontier(seed=0):
    return Mix([source(str(name), weight, (100_000,)) for name, weight in enumerate(FRONTIER)], 100, seed)


@pytest.mark.parametrize("start", [0, 777, 123_456, 10 ** 9])
def test_shares_of_any_20000_samples_are_within_a_hundredth_of_a_point(start):
    mix = frontier()
    assert mix.cards.sum() == 991
    chosen, _, _ = mix.locate(np.arange(start, start + 20_000))
    for s, weight in enumerate(FRONTIER):
        share = 100 * (chosen == s).mean()
        # at most one card at each end: 2 of 20,000
        assert abs(share - 100 * weight / 99.1) <= 0.0101, (s, share)


def test_every_window_of_a_source_comes_once_an_epoch_in_another_order():
    # 40 and 97 windows, 3 to 1
    mix = Mix([source("a", 30, (401,)), source("b", 10, (977,))], 10, seed=3)
    chosen, epoch, window = mix.locate(np.arange(4 * 40))
    first, second = (window[(chosen == 0) & (epoch == e)].tolist() for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second and first != sorted(first)
    assert mix.n_in_first_epoch() == int(np.argmax(mix.locate(np.arange(500))[1] > 0))


def test_targets_are_inputs_shifted_by_one():
    inputs, targets = frontier().batch(np.arange(6))
    assert inputs.dtype == targets.dtype == torch.int64 and inputs.shape == targets.shape == (6, 100)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    # the sources count up
    assert torch.equal(targets - inputs, torch.ones_like(inputs))


def test_a_source_shorter_than_a_window_is_named():
    with pytest.raises(ValueError, match="source tiny has 5 tokens"):
        Mix([source("tiny", 1, (5,))], 5, 0)


def test_a_token_beyond_the_vocabulary_is_named():
    with pytest.raises(ValueError, match="source a holds token 9.*vocabulary of 300"):
        Mix([source("a", 1)], 5, 0, vocab_size=300).batch(np.arange(180))


def test_weights_that_are_not_tenths_are_dealt_in_a_thousand_cards():
    mix = Mix([source("a", 1 / 3), source("b", 2 / 3), source("c", 1e-9)], 5, 0)
    assert mix.cards.tolist() == [333, 667, 1]


def test_too_many_validation_tokens_are_refused_with_what_there_is():
    mix = Mix([source("a", 1, (1001,))], 10, 0)
    assert validation_windows(mix, 1000, "--eval-tokens") == 100
    with pytest.raises(ValueError, match="--eval-tokens 1010 must be from 10 .* to 1000, .*--val-fraction"):
        validation_windows(mix, 1010, "--eval-tokens")


# --------------------------------------------------------------------------------------------------
# Batches

@pytest.mark.parametrize("world", [1, 2, 3, 12])
def test_from_any_start_the_ranks_batches_together_are_the_same_whatever_the_world_size(world):
    mix = frontier()
    batch = 24
    start = 1000
    loaders = [Loader(mix, start, batch, 1, rank=r, world=world) for r in range(world)]
    for step in range(3):
        rows = [next(loader)[0] for loader in loaders for _ in range(batch // world)]
        expected, _ = mix.batch(np.arange(start + step * batch, start + (step + 1) * batch))
        assert sorted(map(tuple, torch.cat(rows).tolist())) == sorted(map(tuple, expected.tolist()))
    for loader in loaders:
        loader.close()


def test_closing_ends_the_thread_that_reads():
    before = threading.active_count()
    loader = Loader(frontier(), 0, 8, 4)
    next(loader)
    assert threading.active_count() == before + 1
    loader.close()
    assert threading.active_count() == before
