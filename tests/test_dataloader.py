"""
dataloader.py against arithmetic by hand: what a window holds, which samples a rank sees, how a mix deals its
sources.

Run: python -m pytest tests/test_dataloader.py
"""
import json
import random
import threading

import numpy as np
import pytest
import tiktoken
import torch

import dataloader as D
from dataloader import Loader, Mix, Source, Tokenizer, open_data, open_shard, write_shard


def source(name="a", weight=50, lengths=(1000,)):
    """A source whose token at position p of its stream is p % 60000, in shards of these lengths."""
    stream = (np.arange(sum(lengths)) % 60_000).astype(np.uint16)
    return Source(name, weight, np.split(stream, np.cumsum(lengths)[:-1]))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(vocab_size=300)


# --------------------------------------------------------------------------------------------------
# Tokenizer

@pytest.mark.parametrize("vocab_size", [257, 32_768])
@pytest.mark.parametrize("text", [
    "", "def f(x):\n\treturn x ** 2  # \r\n", "naïve 東京 🙂 \u0000\u0001", "<|bos|> is plain text here",
    " " * 1_000_000 + "x", "a" * 1_000_000, bytes(range(256)).decode("latin-1")])
def test_decode_inverts_encode(vocab_size, text):
    tokenizer = Tokenizer.load(vocab_size=vocab_size)
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos == vocab_size - 1 and tokenizer.bos not in ids[1:]
    assert tokenizer.decode(ids) == text


def test_the_fast_pattern_splits_as_the_pattern_of_the_tokenizer_does():
    # so that the fast one is in use
    assert Tokenizer.load().pattern == D.SPLIT_PATTERN
    # ids of single bytes would hide the split: so make long words tokens
    ranks = {bytes([b]): b for b in range(256)}
    alphabet = "aZ\u00e9\u017f\u4e160\u06639 \t\n\r\u00a0\u3000\u2028'.,-\u0301\U0001f642<|>"
    text = "".join(random.Random(0).choices(alphabet, k=90_000))
    text += "I'LL we've a'mx a'dx a'tx a'llx a'vex a'rex 'S 's 'ſ DON'T \r\n \n\n  x    \r\r\n "
    # every piece of up to five characters is a token, if it is whole
    for i in range(len(text)):
        for n in range(1, 6):
            ranks.setdefault(text[i:i + n].encode(), len(ranks))
    slow, fast = (tiktoken.Encoding("x", pat_str=pattern, special_tokens={}, mergeable_ranks=ranks)
                  for pattern in (D.SPLIT_PATTERN, D.FAST_PATTERN))
    assert fast.encode_ordinary(text) == slow.encode_ordinary(text)


def test_pieces_have_the_tokens_of_the_whole(monkeypatch):
    tokenizer = Tokenizer.load()
    text = " ".join(f"piece {i}, it's\n\n  {i * 7919} naïve 東京\tend." for i in range(300))
    whole = tokenizer.encoding.encode_ordinary(text)
    monkeypatch.setattr(D, "PIECE", 97)
    assert tokenizer.encode(text) == [tokenizer.bos, *whole]
    # the last has no place to cut at: neither a space behind white space nor a newline behind a sign
    for text, n in (("a bc\nd e" + "f" * 97, 6), (" " * 50 + ".\n" * 50, 97)):
        assert len(next(D.cut(text))) == n


def test_lone_surrogates_become_the_replacement_character_and_bos_counts_no_bytes(tokenizer):
    ids = tokenizer.encode("na\ud800ïve 東京")
    assert tokenizer.decode(ids) == "na\ufffdïve 東京"
    assert tokenizer.token_bytes[ids].sum() == len("na\ufffdïve 東京".encode())


def test_a_vocabulary_that_the_tokenizer_cannot_give_is_refused():
    for vocab_size in (256, 32_769):
        with pytest.raises(ValueError, match=f"vocab_size {vocab_size}.*257 to 32768"):
            Tokenizer.load(vocab_size=vocab_size)


@pytest.mark.parametrize("name, spoil", [
    ("txt", lambda t: t[:-40] + b"!!!! 9\n"), ("txt", lambda t: t.partition(b"\n")[2]),
    ("txt", lambda t: t.replace(b" 257\n", b" 299\n")), ("json", lambda t: b'{"pattern": "("}')])
def test_a_damaged_tokenizer_is_named(tokenizer, tmp_path, name, spoil):
    for file, content in tokenizer.files().items():
        (tmp_path / file).write_bytes(spoil(content) if file.endswith(name) else content)
    with pytest.raises(ValueError, match=f"the tokenizer in {tmp_path} cannot be read"):
        Tokenizer.load(tmp_path)


# --------------------------------------------------------------------------------------------------
# Shards

@pytest.mark.parametrize("spoil", [
    lambda b: b[:100], lambda b: b[:-1], lambda b: b"poe-TOKS" + b[8:],
    lambda b: b[:32] + b"0" * 64 + b[96:]])
def test_a_shard_is_read_back_and_named_where_it_is_damaged(tokenizer, tmp_path, spoil):
    path = tmp_path / "a.bin"
    write_shard(path, np.arange(17, dtype=np.uint16), 3, tokenizer)
    assert path.stat().st_size == 128 + 34 and open_shard(path, tokenizer).tolist() == list(range(17))
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match="a.bin was cut, is not a token shard .* another tokenizer"):
        open_shard(path, tokenizer)


def test_open_data_reads_a_folder_of_shards(data, tmp_path):
    assert [(s.name, s.weight) for s in open_data(data, 300).train(16, 0).sources] == [
        ("prose", 70), ("code", 30)]
    with pytest.raises(ValueError, match="vocab_size 1024 does not fit"):
        open_data(data, 1024)
    with pytest.raises(ValueError, match="prose-train-00000.bin .*of 300 ids, than this one of 299; give"):
        open_data(data, 299).train(16, 0)
    (tmp_path / "manifest.json").write_text('{"sources": [{"name": "a"}]}')
    with pytest.raises(ValueError, match="manifest.json in .* cannot be read"):
        open_data(tmp_path)


def test_validation_and_training_documents_of_the_embedded_sample_are_disjoint(monkeypatch):
    seen = []
    monkeypatch.setattr(Tokenizer, "encode_documents", lambda _, texts: seen.append(texts) or np.zeros(1000))
    data = open_data("", 300)
    data.train(16, 0)
    data.val(16)
    train, val = ({text for texts in part for text in texts} for part in (seen[:3], seen[3:]))
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


def test_the_order_of_samples_is_what_every_run_so_far_has_seen():
    # literal: a run's data is named by its seed and its sample cursor
    mix = Mix([source("a", 33.5, (400,)), source("b", 16, (200,)), source("c", 0.6, (90,))], 10, 1)
    source_of, epoch, window = mix.locate([0, 1, 2, 3, 4, 5, 100, 10 ** 6])
    assert source_of.tolist() == [0, 1, 0, 0, 1, 0, 0, 1]
    assert epoch.tolist() == [0, 0, 0, 0, 0, 0, 1, 16808]
    assert window.tolist() == [26, 15, 13, 17, 17, 5, 12, 5]


def frontier(seed=0):
    rows = json.loads((D.HERE / "frontier_v1.json").read_text())["sources"]
    return Mix([source(row["name"], row["weight"], (100_000,)) for row in rows], 100, seed)


def test_the_count_of_a_source_in_a_prefix_is_within_a_few_cards_of_its_share():
    for seed in range(20):
        counts = np.cumsum(frontier(seed).deck[:, None] == np.arange(11), axis=0)
        # ten times the weights
        assert counts[-1].tolist() == [335, 240, 160, 50, 50, 40, 40, 40, 20, 10, 6]
        # the most of 2,000 seeds is 2.53
        assert np.abs(counts - np.arange(1, 992)[:, None] / 991 * counts[-1]).max() < 2.6


def test_every_window_of_a_source_comes_once_an_epoch_in_another_order():
    # 40 and 97 windows, 3 to 1
    mix = Mix([source("a", 30, (401,)), source("b", 10, (977,))], 10, seed=3)
    chosen, epoch, window = mix.locate(np.arange(4 * 40))
    first, second = (window[(chosen == 0) & (epoch == e)].tolist() for e in (0, 1))
    assert sorted(first) == sorted(second) == [*range(40)] and first != second
    assert min(mix.first_repeats()) == np.argmax(epoch > 0)


def test_targets_are_inputs_shifted_by_one():
    inputs, targets = frontier().batch(np.arange(6))
    # the sources count up
    assert inputs.shape == (6, 100) and torch.equal(targets, inputs + 1)


def test_a_source_shorter_than_a_window_is_named():
    with pytest.raises(ValueError, match="source tiny has 5 tokens"):
        Mix([source("tiny", 1, (5,))], 5, 0)


def test_a_token_beyond_the_vocabulary_is_named():
    with pytest.raises(ValueError, match="source a holds token 9.*vocabulary of 300"):
        Mix([source("a", 1)], 5, 0, vocab_size=300).batch(np.arange(180))


def test_weights_that_are_not_tenths_are_dealt_in_a_thousand_cards():
    sources = [source(weight=weight) for weight in (1 / 3, 2 / 3, 1e-9)]
    assert Mix(sources, 5, 0).cards.tolist() == [333, 667, 1]


def test_too_many_validation_tokens_are_refused_with_what_there_is():
    mix = Mix([source("rich", 1), source("poor", 1, (501,))], 10, 0)
    assert D.validation_windows(mix, 1000, "--eval-tokens") == 100
    with pytest.raises(ValueError, match="--eval-tokens 1010 must be from 10 .*1000, .*source poor .*before"):
        D.validation_windows(mix, 1010, "--eval-tokens")


# --------------------------------------------------------------------------------------------------
# Batches

@pytest.mark.parametrize("world", [1, 3, 12])
def test_from_any_start_the_ranks_batches_together_are_the_same_whatever_the_world_size(world):
    mix = frontier()
    threads = threading.active_count()
    loaders = [Loader(mix, 1000, 24, 2, rank=r, world=world) for r in range(world)]
    for start in (1000, 1024, 1048):
        rows = [next(loader)[0] for loader in loaders for _ in range(12 // world)]
        expected, _ = mix.batch(np.arange(start, start + 24))
        assert sorted(torch.cat(rows).tolist()) == sorted(expected.tolist())
    for loader in loaders:
        loader.close()
    # closing ends the threads that read
    assert threading.active_count() == threads
