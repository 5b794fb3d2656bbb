"""
sample.py against uncached greedy loops, softmax frequencies and filters worked out by hand.

Run: python -m pytest tests/test_sample.py
"""
import json
import math
import subprocess
import sys

import pytest
import torch

import sample
from conftest import ROOT
from dataloader import Tokenizer
from model import combine
from sample import choose, complete, generate, gumbel_noise, stages_of_mode
from test_model import make

GREEDY = dict(temperature=0.0)
ROWS = torch.zeros(1, dtype=torch.int64)


def greedy_without_cache(model, prompt, n, heads):
    """The obvious loop: run everything again for each token."""
    ids = list(prompt)
    for _ in range(n):
        stages = [model.log_probs(k, x[:, -1]) for k, x in enumerate(model.boundaries(torch.tensor([ids])))]
        ids.append(int(combine(sum(stages[k] for k in heads), len(heads)).argmax()))
    return ids[len(prompt):]


@pytest.mark.parametrize("mode, options, heads", [("full", {}, [0, 1, 2]), ("single", {"stage": 0}, [0]), ("single", {"stage": 2}, [2]),
                                                  ("prefix", {"prefix": 1}, [0]), ("prefix", {"prefix": 2}, [0, 1]), ("prefix", {"prefix": 3}, [0, 1, 2])])
def test_cached_greedy_decoding_equals_the_uncached_loop(mode, options, heads):
    model, prompt = make(), [22, 3, 1, 4]
    chosen = stages_of_mode(model.config, mode, **options)
    assert list(chosen) == heads
    tokens = [int(t) for t in generate(model, prompt, 10, chosen, **GREEDY)]       # 13 of context + the last, which is not fed back
    assert tokens == greedy_without_cache(model, prompt, 10, heads)


def test_a_prompt_of_bos_alone_and_a_full_context_work():
    model = make()
    assert len(list(generate(model, [22], 13, range(3), **GREEDY))) == 13
    assert len(list(generate(model, [22] * 13, 1, range(3), **GREEDY))) == 1


@pytest.mark.parametrize("length, new, words", [(10, 5, "10 tokens of a context of 13: 4 are left"), (15, 1, "too long")])
def test_a_context_that_would_overflow_says_what_is_left(length, new, words):
    with pytest.raises(ValueError, match=words):
        list(generate(make(), [1] * length, new, range(3)))


def test_the_same_seed_gives_the_same_rows_whatever_is_generated_beside_them():
    model, prompt = make(), [22, 5]
    def rows(n, seed):
        return torch.stack(list(generate(model, prompt, 11, range(3), n_rows=n, temperature=1.5, seed=seed)), dim=1)
    three = rows(3, seed=7)
    assert torch.equal(three[:2], rows(2, seed=7)) and torch.equal(three[:1], rows(1, seed=7))
    assert not torch.equal(three[0], three[1]) and not torch.equal(three, rows(3, seed=8))
    assert not torch.equal(three, rows(3, seed=7 + 2 ** 32))                        # the seed's upper half counts too


def test_frequencies_of_sampled_tokens_match_softmax():
    """Chi-square, 6 degrees of freedom, threshold 33.1: false alarms 1 in 100,000; the seed is fixed."""
    log_probs = torch.log_softmax(torch.tensor([[0.5, -1.0, 2.0, 0.0, 1.0, -2.0, 0.3]]) , dim=-1)
    n, T = 20_000, 0.7
    positions, rows = torch.arange(n) % 500, torch.arange(n) // 500
    tokens = choose(log_probs.expand(n, -1), T, 0, 1.0, 3, rows, positions)
    expected = n * torch.softmax(log_probs[0] / T, dim=-1)
    chi_square = ((torch.bincount(tokens, minlength=7) - expected) ** 2 / expected).sum().item()
    assert chi_square < 33.1, chi_square


def test_noise_is_standard_gumbel_and_uncorrelated_between_neighbours():
    positions = torch.arange(2000)
    noise = gumbel_noise(1, torch.zeros(2000, dtype=torch.int64), positions, 50)
    assert abs(noise.mean() - 0.5772) < 0.02 and abs(noise.var() - math.pi ** 2 / 6) < 0.05     # 100,000 draws: 5 and 6 standard errors
    for a, b in ((noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1]), (noise, gumbel_noise(1, torch.ones(2000, dtype=torch.int64), positions, 50))):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.015


def sampled_set(**filters):
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    n = 2000                                                    # a kept token of p = 0.1 stays unseen with probability 0.9^2000 = 10^-92
    draws = choose(p.log().expand(n, -1), 1.0, filters.get("top_k", 0), filters.get("top_p", 1.0), 0, torch.zeros(n, dtype=torch.int64), torch.arange(n))
    return set(draws.tolist())


def test_filters_keep_the_tokens_worked_out_by_hand():
    assert sampled_set() == {0, 1, 2, 3}
    assert sampled_set(top_k=2) == {0, 1}
    assert sampled_set(top_k=9) == {0, 1, 2, 3}
    assert sampled_set(top_p=0.5) == {0, 1}                     # 0.4 is not enough, 0.7 is
    assert sampled_set(top_p=0.35) == {0}
    assert sampled_set(top_k=3, top_p=0.8) == {0, 1, 2}         # of 4/9, 3/9, 2/9: 7/9 is not yet 0.8
    assert choose(torch.tensor([[0.1, 0.7, 0.2]]).log(), 1e-45, 0, 1.0, 0, ROWS, ROWS).tolist() == [1]      # as cold as float32 goes
    assert choose(torch.tensor([[0.1, 0.7, 0.2]]).log(), 0.0, 0, 1.0, 0, ROWS, ROWS).tolist() == [1]


def test_completion_stops_at_bos_and_holds_back_half_a_character(monkeypatch):
    tokenizer = Tokenizer.load(vocab_size=300)
    e_acute = [tokenizer.ranks.index(bytes([b])) for b in "é".encode()]
    script = [[65, 66], [e_acute[0], 66], [e_acute[1], tokenizer.bos], [tokenizer.bos, 66], [67, 67]]     # time x row
    monkeypatch.setattr(sample, "generate", lambda *a, **k: iter(torch.tensor(script)))     # a model with known tokens
    streamed = []
    out = complete(None, tokenizer, "x", 5, range(1), n_rows=2, on_text=streamed.append)
    a = tokenizer.decode([65])
    assert out[0] == {"prompt": "x", "completion": a + "é", "token_ids": [65, *e_acute], "stopped": "bos"}
    assert out[1]["token_ids"] == [66, 66] and out[1]["stopped"] == "bos"
    assert "".join(streamed) == a + "é" and "\ufffd" not in "".join(streamed)


def test_the_script_prints_one_json_object_per_sample(trained, capsys):
    sample.main([str(trained), "--prompt", "<|bos|> a", "--max-new-tokens", "4", "--num-samples", "2", "--json", "--dtype", "float64"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2 and all(line["prompt"] == "<|bos|> a" and len(line["token_ids"]) <= 4 for line in lines)
    tokenizer = Tokenizer.load(trained / "step-00006")
    assert all(tokenizer.decode(line["token_ids"]) == line["completion"] for line in lines)
    assert tokenizer.bos not in tokenizer.encode("<|bos|> a")[1:]


def test_the_script_streams_the_prompt_and_its_completion(trained, capsys):
    argv = [str(trained / "step-00006"), "--prompt", "the", "--max-new-tokens", "5", "--temperature", "0"]
    sample.main([*argv, "--json"])
    completion = json.loads(capsys.readouterr().out)["completion"]
    sample.main(argv)
    assert capsys.readouterr().out == "the" + completion + "\n"


@pytest.mark.parametrize("argv, words", [
    (["--mode", "single"], ["--stage", "0 to 2"]), (["--mode", "single", "--stage", "3"], ["3", "0 to 2"]), (["--mode", "prefix", "--prefix", "0"], ["1 to 3"]),
    (["--mode", "prefix", "--prefix", "4"], ["4", "1 to 3"]), (["--stage", "1"], ["--stage 1", "--mode single"]), (["--temperature", "-1"], ["temperature -1"]), (["--temperature", "nan"], ["temperature nan"]),
    (["--top-p", "0"], ["top-p 0"]), (["--top-k", "-2"], ["top-k -2"]), (["--num-samples", "0"], ["num-samples 0"]), (["--max-new-tokens", "0"], ["max-new-tokens 0"]),
    (["--prompt", "a b c d e f g h i j k l m n o p q r"], ["context of 16", "too long"]), (["--mode", "turbo"], ["turbo", "full"]), (["--device", "abacus"], ["abacus"])])
def test_bad_input_gets_one_line(argv, words, trained, refused):
    line = refused(sample.main, trained, *argv)
    assert all(word in line for word in words), line


def test_a_path_without_a_checkpoint_is_named(tmp_path, refused):
    assert "no checkpoint at" in refused(sample.main, tmp_path / "nowhere")
    assert "holds no step-XXXXX" in refused(sample.main, tmp_path)
    (tmp_path / "step-00001").mkdir()
    assert "no manifest.json" in refused(sample.main, tmp_path)


def test_a_closed_pipe_ends_quietly(trained):
    process = subprocess.Popen([sys.executable, ROOT / "sample.py", trained, "--num-samples", "3", "--max-new-tokens", "3"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=30) == 0
