"""
sample.py against uncached greedy loops, plain decoding, teacher-forced passes, softmax frequencies and
filters worked out by hand.

Run: python -m pytest tests/test_sample.py
"""
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch

import sample
from conftest import ROOT
from checkpoint import BOUNDS_KEY, checkpoint_steps
from dataloader import Tokenizer
from model import combine
from sample import (
    ROWS, Engine, Plan, Sampling, complete, count_new_tokens, generate, gumbel_noise, make_plan, sample_token)
from test_model import make

ROW = torch.zeros(1, dtype=torch.int64)
FULL = Plan(range(3))


def greedy_without_cache(model, prompt, n, experts):
    """The obvious loop: run everything again for each token."""
    ids = list(prompt)
    for _ in range(n):
        stages = [model.log_probs(k, x[:, -1]) for k, x in enumerate(model.boundaries(torch.tensor([ids])))]
        ids.append(int(combine(sum(stages[k] for k in experts), len(experts)).argmax()))
    return ids[len(prompt):]


def small(**changes):
    """A model of three stages whose stage 0 often agrees with the product: float32, room for 80 positions."""
    model = make(torch.float32, sequence_len=80, **changes)
    with torch.no_grad():
        for head in model.lm_head_stages:
            head.weight.mul_(0.2)
        for block in model.blocks[2:]:
            block.attn.c_proj.weight.mul_(0.1)
            block.mlp.c_proj.weight.mul_(0.1)
    return model.freeze_for_inference()


def decode(engine, prompt, n):
    engine.begin([prompt])
    return [token for step in generate(engine, n) for token in step.rows[0]][:n]


def ids(tokens):
    return [token.id for token in tokens]


PROMPT = [22, 3, 1, 4, 15]


@pytest.mark.parametrize("mode, options, experts", [
    ("full", {}, [0, 1, 2]), ("single", {"stage": 0}, [0]), ("single", {"stage": 2}, [2]),
    ("prefix", {"prefix": 1}, [0]), ("prefix", {"prefix": 2}, [0, 1]), ("prefix", {"prefix": 3}, [0, 1, 2])])
def test_cached_greedy_decoding_equals_the_uncached_loop(mode, options, experts):
    model = small()
    plan = make_plan(model.config, mode, **options)
    assert list(plan.experts) == experts
    tokens = decode(Engine(model, plan), PROMPT, 40)
    assert ids(tokens) == greedy_without_cache(model, PROMPT, 40, experts)
    assert {(t.stage, t.depth) for t in tokens} == {(experts[-1], experts[-1] + 1)}
    boundaries = list(model.boundaries(torch.tensor([PROMPT + ids(tokens)])))
    log_probs = combine(sum(model.log_probs(k, boundaries[k]) for k in experts), len(experts))
    expected = log_probs[0, len(PROMPT) - 1:-1].gather(1, torch.tensor(ids(tokens))[:, None])[:, 0]
    assert torch.allclose(torch.tensor([t.log_prob for t in tokens]), expected, atol=1e-5)


def test_a_prompt_of_bos_alone_a_full_context_and_a_long_prompt_work(monkeypatch):
    model = small()
    assert len(decode(Engine(model, FULL), [22], 80)) == 80
    assert len(decode(Engine(model, FULL), [22] * 80, 1)) == 1
    long = [22, *range(20)] * 3
    whole = ids(decode(Engine(model, FULL), long, 10))
    monkeypatch.setattr(sample, "PREFILL", 7)                   # in pieces, the last of 6
    assert ids(decode(Engine(model, FULL), long, 10)) == whole
    assert whole == greedy_without_cache(model, long, 10, range(3))


@pytest.mark.parametrize("length, new, words", [
    (10, 72, "leaves room for 71"), (82, 1, "82 tokens leaves room for 0")])
def test_a_context_that_would_overflow_says_what_is_left(length, new, words):
    with pytest.raises(ValueError, match=words):
        count_new_tokens(small().config, [[1], [1] * length], new)


@pytest.mark.parametrize("longest, asked, new", [
    (10, None, 64), (60, None, 21), (80, None, 1), (60, 20, 20), (60, 21, 21)])
def test_tokens_to_generate_are_those_asked_for_or_64_as_far_as_the_context_of_80_goes(longest, asked, new):
    assert count_new_tokens(small().config, [[1], [1] * longest], asked) == new


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, seed=5), Sampling(1.3, 9, 0.8, seed=6)])
def test_speculation_writes_the_very_tokens_of_plain_decoding(sampling):
    model = small()
    plain = decode(Engine(model, FULL, sampling=sampling), PROMPT, 36)
    for draft_len in (1, 2, 4, 8, 16):
        tokens = decode(Engine(model, Plan(range(3), draft_len), sampling=sampling), PROMPT, 36)
        assert ids(tokens) == ids(plain), draft_len
        assert [t.log_prob for t in tokens] == [t.log_prob for t in plain]
        assert 4 < sum(t.stage == 0 for t in tokens) < 36       # some drafts were right, some were not


class Scripted(Engine):
    """Its drafts are plain decoding's tokens, but for those at `wrong`, counted from the prompt's end."""

    def decide(self, k):
        super().decide(k)
        place = int(self.cursors[1]) - len(PROMPT)
        truth = self.plain[place] if place < len(self.plain) else 0
        self.tokens[0, place + len(PROMPT)] = (truth + 1) % 23 if place in self.wrong else truth


@pytest.mark.parametrize("draft_len", [1, 4, 16])
def test_right_wrong_and_once_wrong_drafters_change_nothing_but_the_number_of_cycles(draft_len):
    model = small()
    plain = ids(decode(Engine(model, FULL), PROMPT, 34))
    all_right = -(-34 // (draft_len + 1))
    once_wrong = range(0, 18, 4 if draft_len == 16 else 1)
    for wrong, cycles in [(set(), all_right), (set(range(100)), 34), *[({i}, None) for i in once_wrong][:9]]:
        engine = Scripted(model, Plan(range(3), draft_len))
        engine.plain = plain
        engine.wrong = wrong
        engine.begin([PROMPT])
        steps = list(generate(engine, 34))
        assert [t.id for step in steps for t in step.rows[0]][:34] == plain
        # the bytes of a benchmark rest on the number of passes; an upper stage takes a tile at a time here
        upper = len(steps) * -(-(draft_len + 1) // ROWS)
        assert engine.passes == [len(steps) * (draft_len + 1), upper, upper]
        found = sample.count(steps)
        if cycles:
            accepted = draft_len if not wrong else 0
            assert found == {"cycles": cycles, "accepted": cycles * accepted,
                             "judged": cycles * max(accepted, 1)}


def test_with_two_cycles_in_flight_none_is_started_that_the_text_has_no_room_for():
    model = small()
    engine = Scripted(model, Plan(range(3), draft_len=4))
    engine.plain = ids(decode(Engine(model, FULL), PROMPT, 45))
    engine.wrong = set()
    engine.in_flight = 2                                        # as with CUDA graphs
    assert ids(decode(engine, PROMPT, 40)) == engine.plain[:40] and engine.passes == [40, 8, 8]


@torch.no_grad()
def read_along(engine, prompt, ids):
    """Run every stage of an engine over a text that is there already, position by position."""
    engine.begin([prompt])
    engine.tokens[0, len(prompt):len(prompt) + len(ids)] = torch.tensor(ids, device=engine.tokens.device)
    for _ in ids:
        for k in range(engine.last + 1):
            engine.run_stage(k)
        engine.cursors[0] += 1


@pytest.mark.parametrize("plan", [Plan(range(3), exits=(0.4, 0.4)), Plan(range(3), 5),
                                  Plan(range(3), exits=(0.04, math.inf)),
                                  Plan(range(3), exits=(0.15, math.inf), score="probability")])
def test_stages_that_caught_up_hold_a_teacher_forced_passes_state_and_garbage_is_never_read(plan):
    model = small()
    engine, teacher = Engine(model, plan), Engine(model, FULL)
    engine.begin([PROMPT])
    for state in (engine.cache.keys, engine.cache.values):      # (L, B, slots, H_kv, D)
        state[:, :, len(PROMPT) - 1:] = 1e4
    engine.stream.fill_(-1e4)
    engine.sums.fill_(1e4)
    tokens = [token for step in generate(engine, 70) for token in step.rows[0]]
    read_along(teacher, PROMPT, ids(tokens))
    n = int(engine.cursors[1])
    for k in (1, 2):
        waiting = n - int(engine.cursors[k + 1])
        if waiting:
            engine.start_lift(k, waiting, decides=False)
    assert engine.cursors[1:, 0].tolist() == [n] * 3 and n >= len(PROMPT) + 60
    for ours, theirs in ((engine.cache.keys, teacher.cache.keys),
                         (engine.cache.values, teacher.cache.values)):
        assert torch.equal(ours[:, :, :n], theirs[:, :, :n])
    if plan.exits:
        depths = [t.depth for t in tokens]
        longest = max(map(len, "".join(map(str, depths)).replace("2", "3").split("3")))
        # more waited than one pass takes
        assert 3 in depths and 1 in depths and (plan.exits[0] != 0.04 or longest > ROWS)
    with torch.no_grad():
        cache = sample.KVCache(model.config, 1, 80, "cpu", torch.float32)
        cache.place(torch.arange(n)[None], n)
        x = x0 = model.embed(engine.tokens[:, :n])
        for k in range(3):
            x = model.stage(k, x, x0, engine.tokens[:, :n], cache)
    assert torch.allclose(engine.cache.keys[:, :, :n], cache.keys[:, :, :n], atol=1e-4)


@pytest.mark.parametrize("plan, passes", [
    (FULL, [10, 10, 10]), (Plan(range(1)), [10]), (Plan(range(3), exits=(0.0, 0.0)), [10, 0, 0]),
    (Plan(range(3), exits=(math.inf, math.inf)), [10, 10, 10])])
def test_passes_of_ten_tokens_are_counted(plan, passes):
    engine = Engine(small(), plan)
    assert len(decode(engine, PROMPT, 10)) == 10 and engine.passes == passes


def test_wand_stays_where_the_margin_is_the_bound_exactly():
    remaining = [2.25 + 1.5, 1.5]
    plan = make_plan(small().config, "wand", bounds=[2.25, 1.5])
    for bound, threshold in zip(remaining, plan.exits):
        margin = torch.tensor([bound, math.nextafter(bound, 9) + 1e-6], dtype=torch.float32)
        assert (margin >= threshold).tolist() == [False, True]


def test_early_exit_leaves_where_its_rule_says_and_says_what_that_prefix_says():
    model = small()
    plan = Plan(range(3), exits=(0.5, 0.3))
    tokens = decode(Engine(model, plan), PROMPT, 60)
    boundaries = model.boundaries(torch.tensor([PROMPT + ids(tokens)]))
    stages = [model.log_probs(k, x)[0] for k, x in enumerate(boundaries)]
    for i, token in enumerate(tokens):
        for k in range(3):
            score = sum(stages[:k + 1])[len(PROMPT) - 1 + i] / (k + 1)
            top = score.topk(2).values
            if k == 2 or top[0] - top[1] >= plan.exits[k]:
                break
        assert (token.depth, token.id) == (k + 1, int(score.argmax()))
    assert len({t.depth for t in tokens}) == 3


def test_ragged_rows_are_what_they_are_alone():
    model = small()
    prompts = [PROMPT, [22], [22, *range(20)], [22, 7, 7]]
    for plan in (FULL, Plan(range(2)), Plan(range(1, 2))):
        engine = Engine(model, plan, 4, Sampling(0.8, seed=3))
        engine.begin(prompts, [5, 6, 7, 8])
        steps = list(generate(engine, 30))
        rows = [[step.rows[row][0].id for step in steps] for row in range(4)]
        for prompt, number, row in zip(prompts, (5, 6, 7, 8), rows):
            alone = Engine(model, plan, 1, Sampling(0.8, seed=3))
            alone.begin([prompt], [number])
            assert row == [t.id for step in generate(alone, 30) for t in step.rows[0]]


def test_the_same_seed_gives_the_same_rows_whatever_is_generated_beside_them():
    tokenizer = Tokenizer.load(vocab_size=300)
    model = make(torch.float64, vocab_size=300, sequence_len=30).freeze_for_inference()

    def rows(n, seed, plan=FULL):
        samples = complete(model, tokenizer, ["ab"], 11, plan, Sampling(1.5, seed=seed), n_samples=n)
        return [s["token_ids"] for s in samples]
    twenty = rows(20, seed=7)                                   # a group of ROWS and one of four
    assert len(twenty) == 20 > ROWS and twenty[0] != twenty[1]
    assert twenty[:2] == rows(2, seed=7) == rows(2, 7, Plan(range(3), draft_len=3))
    assert twenty[:1] == rows(1, seed=7)
    # the seed's upper half counts too
    assert twenty != rows(20, seed=8) and twenty != rows(20, seed=7 + 2 ** 32)


KERNELS = """
import torch, triton.language as tl
import kernels
from sample import WIDEST, Engine, Plan
from test_model import make
kernels.gdc_wait = kernels.gdc_launch_dependents = lambda: None
tl.inline_asm_elementwise = lambda *args, **kwargs: None
torch.set_num_threads(1)
shape = dict(sequence_len=60, n_layer=3, n_head=2, n_kv_head=1, mlp_hidden=256, stage_layers=(2, 1))
small = make(torch.float32, vocab_size=70, n_embd=64, **shape).freeze_for_inference()
# its blocks are of 16 columns
narrow_head = make(torch.float32, vocab_size=300, n_embd=256, **shape).freeze_for_inference()
for model, prompts, draft_len in (
        (small, [[69, *range(31)]], 2), (small, [[69, 5, 6], [69, *range(35)], [69]], 0),
        (small, [[69, 1]], 17), (narrow_head, [[69], [5]], 0)):
    plan = Plan(range(2), draft_len=draft_len)
    slow, fast = (Engine(model, plan, len(prompts), fast=fast) for fast in (False, True))
    for engine in (slow, fast):
        engine.begin(prompts)
    if draft_len > 16:
        # more than a tile will wait; the interpreter is slow, so the plain twin drafts for both
        for _ in range(draft_len):
            slow.draft()
        slow.run_stage(0)
        for state in ("tokens", "cursors", "stream", "sums"):
            getattr(fast, state).copy_(getattr(slow, state))
        for ours, theirs in ((fast.cache.keys, slow.cache.keys), (fast.cache.values, slow.cache.values)):
            ours.copy_(theirs)
    for engine in (slow, fast):
        (engine.verify if draft_len > 16 else engine.cycle)(draft_len + 1)
    n = slow.cursors[1:].min()
    assert torch.equal(slow.cursors, fast.cursors) and torch.equal(slow.tokens, fast.tokens)
    for a, b in ((slow.outcome, fast.outcome), (slow.cache.keys[:, :, :n], fast.cache.keys[:, :, :n]),
                 (slow.cache.values[:, :, :n], fast.cache.values[:, :, :n]),
                 (slow.stream[:, :, n - 1:n], fast.stream[:, :, n - 1:n])):
        assert torch.allclose(a, b, atol=1e-3), (a - b).abs().max()
    # nats, of rare tokens too
    a, b = (engine.sums if len(prompts) > 1 else engine.sums[(n - 1) % WIDEST] for engine in (slow, fast))
    assert torch.allclose(a, b, atol=2e-3), (a - b).abs().max()
    print(slow.cursors[0].tolist())
"""


@pytest.fixture(scope="module", autouse=True)
def interpreted(request):
    """KERNELS in Triton's interpreter, which is slow: a process beside this file's other tests, the last of
    which looks at it.
    """
    if all(item.function is not test_the_cuda_kernels_do_what_their_twin_does_in_tritons_interpreter
           for item in request.session.items):
        yield None
        return
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with subprocess.Popen([sys.executable, "-c", KERNELS], env=env, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_frequencies_of_sampled_tokens_match_softmax():
    """Chi-square, 6 degrees of freedom, threshold 33.1: false alarms 1 in 100,000; the seed is fixed."""
    log_probs = torch.log_softmax(torch.tensor([[0.5, -1.0, 2.0, 0.0, 1.0, -2.0, 0.3]]) , dim=-1)
    n, T = 20_000, 0.7
    positions, rows = torch.arange(n) % 500, torch.arange(n) // 500
    tokens = sample_token(log_probs.expand(n, -1), Sampling(T, seed=3), rows, positions)
    expected = n * torch.softmax(log_probs[0] / T, dim=-1)
    chi_square = ((torch.bincount(tokens, minlength=7) - expected) ** 2 / expected).sum().item()
    assert chi_square < 33.1, chi_square


def test_noise_is_standard_gumbel_and_uncorrelated_between_neighbours():
    positions = torch.arange(2000)
    noise = gumbel_noise(1, torch.zeros(2000, dtype=torch.int64), positions, 50)
    # 100,000 draws: 5 and 6 standard errors
    assert abs(noise.mean() - 0.5772) < 0.02 and abs(noise.var() - math.pi ** 2 / 6) < 0.05
    for a, b in ((noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1]),
                 (noise, gumbel_noise(1, torch.ones(2000, dtype=torch.int64), positions, 50))):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.015


def sampled_set(**filters):
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    # a kept token of p = 0.1 stays unseen with probability 0.9^2000 = 10^-92
    n = 2000
    rows = torch.zeros(n, dtype=torch.int64)
    return set(sample_token(p.log().expand(n, -1), Sampling(1.0, **filters), rows, torch.arange(n)).tolist())


def test_filters_keep_the_tokens_worked_out_by_hand():
    assert sampled_set() == {0, 1, 2, 3}
    assert sampled_set(top_k=2) == {0, 1}
    assert sampled_set(top_k=9) == {0, 1, 2, 3}
    assert sampled_set(top_p=0.5) == {0, 1}                     # 0.4 is not enough, 0.7 is
    assert sampled_set(top_p=0.35) == {0}
    assert sampled_set(top_k=3, top_p=0.8) == {0, 1, 2}         # of 4/9, 3/9, 2/9: 7/9 is not yet 0.8
    cold = Sampling(1e-45)                                      # as cold as float32 goes
    assert sample_token(torch.tensor([[0.1, 0.7, 0.2]]).log(), cold, ROW, ROW).tolist() == [1]


def test_completion_stops_at_bos_and_holds_back_half_a_character(monkeypatch):
    tokenizer = Tokenizer.load(vocab_size=300)
    e_acute = [tokenizer.ranks.index(bytes([b])) for b in "é".encode()]
    # time x row
    script = [[65, 66], [e_acute[0], 66], [e_acute[1], tokenizer.bos], [tokenizer.bos, 66], [67, 67]]
    steps = [sample.Step([[sample.Token(i, -1.0, 2, 3)] for i in ids], 0, 0) for ids in script]
    monkeypatch.setattr(sample, "generate", lambda *a: iter(steps))
    streamed = []
    out = list(complete(make(vocab_size=300), tokenizer, ["x"], 5, FULL, n_samples=2,
                        on_text=streamed.append))
    a = tokenizer.decode([65])
    assert out[0] == {"prompt": "x", "completion": a + "é", "token_ids": [65, *e_acute],
                      "log_probs": [-1.0] * 3, "stages": [2] * 3, "depths": [3] * 3, "stopped": "bos"}
    assert out[1]["token_ids"] == [66, 66] and out[1]["stopped"] == "bos"
    assert "".join(streamed) == "x" + a + "é" and "\ufffd" not in "".join(streamed)


def test_the_script_prints_one_json_object_per_sample(trained, capsys):
    sample.main([str(trained), "--prompt", "<|bos|> a", "--max-new-tokens", "4", "--num-samples", "2",
                 "--json", "--dtype", "float64"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2
    assert all(line["prompt"] == "<|bos|> a" and len(line["token_ids"]) <= 4 for line in lines)
    tokenizer = Tokenizer.load(trained / "step-00006")
    assert all(tokenizer.decode(line["token_ids"]) == line["completion"] for line in lines)
    assert tokenizer.bos not in tokenizer.encode("<|bos|> a")[1:]


def test_the_script_streams_the_prompt_and_its_completion(trained, capsys):
    argv = [str(trained / "step-00006"), "--prompt", "the", "--max-new-tokens", "5", "--temperature", "0"]
    sample.main([*argv, "--json"])
    completion = json.loads(capsys.readouterr().out)["completion"]
    sample.main(argv)
    assert capsys.readouterr().out == "the" + completion + "\n"


def test_modes_read_what_calibration_wrote_and_say_what_is_missing(trained, tmp_path, refused, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    step = checkpoint_steps(run)[-1]
    for argv in (["--mode", "wand"], ["--mode", "wand", "--wand-margin"], ["--mode", "routing"]):
        line = refused(sample.main, step, *argv)
        assert all(word in line for word in (BOUNDS_KEY, "metrics.json", "python evaluate.py RUN")), line
    record = json.loads((step / "config.json").read_text())
    (step / "config.json").write_text(json.dumps(record | {BOUNDS_KEY: [0.004, 0.002]}))
    (step / "metrics.json").write_text(json.dumps({"wand": {"margin": {"thresholds": [0.001, None]}},
                                                   "routing": {"threshold": 0.0035}}))
    for argv in (["--mode", "wand"], ["--mode", "wand", "--wand-margin"], ["--mode", "routing"],
                 ["--mode", "routing", "--routing-threshold", "1"]):
        sample.main([str(step), "--prompt", "a", "--max-new-tokens", "14", "--temperature", "0", "--json",
                     *argv])
        out = json.loads(capsys.readouterr().out)
        assert len(out["token_ids"]) == len(out["log_probs"]) == len(out["stages"]) == len(out["depths"])
        assert all(s == d - 1 for s, d in zip(out["stages"], out["depths"]))
        assert argv[-1] != "1" or set(out["depths"]) == {3}
    plan = make_plan(make().config, "wand", bounds=[3.0, 2.0])
    # strictly more than the bounds that remain
    assert 5.0 < plan.exits[0] < 5.00001 and 2.0 < plan.exits[1] < 2.00001
    assert make_plan(make().config, "wand", wand_margin=True,
                     metrics={"wand": {"margin": {"thresholds": [1.5, None]}}}).exits == (1.5, math.inf)


@pytest.mark.parametrize("mode", ["wand", "routing", "speculative"])
def test_a_checkpoint_of_one_stage_refuses_modes_of_several(mode):
    with pytest.raises(ValueError, match="this checkpoint has one: use --mode full"):
        make_plan(make(objective="bp", stage_layers=(5,)).config, mode)


def test_prompts_come_from_a_file_or_standard_input(trained, tmp_path, refused, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("the\na b\n")
    argv = [str(trained), "--max-new-tokens", "3", "--temperature", "0", "--json", "--mode", "speculative"]
    sample.main([*argv, "--prompt-file", str(file)])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["the", "a b"]
    assert all(line["judged"] >= line["accepted"] for line in lines)
    file.write_bytes(b"a\xffb")
    assert "0xff in position 1" in refused(sample.main, *argv, "--prompt-file", file)
    file.write_bytes(b"")
    assert "empty" in refused(sample.main, *argv, "--prompt-file", file)
    assert "No such file" in refused(sample.main, *argv, "--prompt-file", tmp_path / "none")
    assert "exclude each other" in refused(sample.main, *argv, "--prompt-file", file, "--prompt", "x")


@pytest.mark.parametrize("argv, words", [
    (["--mode", "single"], ["--stage", "0 to 2"]),
    (["--mode", "single", "--stage", "3"], ["3", "0 to 2"]),
    (["--mode", "prefix", "--prefix", "0"], ["1 to 3"]),
    (["--stage", "0"], ["--stage 0", "--mode single"]),
    (["--draft-len", "8"], ["--draft-len 8", "--mode speculative"]),
    (["--wand-margin"], ["--wand-margin", "--mode wand"]),
    (["--routing-threshold", "0.5"], ["--routing-threshold 0.5", "--mode routing"]),
    (["--mode", "speculative", "--draft-len", "0"], ["--draft-len: 0", "1 to 31"]),
    (["--mode", "speculative", "--draft-len", "32"], ["--draft-len: 32"]),
    (["--mode", "turbo"], ["turbo", "full"]),
    (["--temperature", "nan"], ["temperature: nan"]),
    (["--top-p", "0"], ["top-p: 0"]),
    (["--top-k", "-2"], ["top-k: -2", "at least 0"]),
    (["--num-samples", "0"], ["num-samples: 0"]),
    (["--max-new-tokens", "0"], ["max-new-tokens: 0"]),
    (["--seed", str(2 ** 63)], ["--seed"]),
    (["--prompt", "a b c d e f g h i j k l m n o p q r"], ["context of 16", "room for 0"]),
    (["--device", "abacus"], ["abacus"]),
    (["--compile"], ["CUDA"]),
    (["--prompt-file", ""], ["--prompt-file", "an empty path"])])
def test_bad_input_gets_one_line(argv, words, trained, refused):
    line = refused(sample.main, trained, *argv)
    assert all(word in line for word in words), line


def test_a_prompt_that_does_not_fit_is_refused_before_it_is_printed(trained, capsys):
    with pytest.raises(ValueError, match="leaves room"):
        sample.main([str(trained), "--prompt", "a b c d e f g h i j k l m n o p q r"])
    assert capsys.readouterr().out == ""


def test_a_path_without_a_checkpoint_is_named(tmp_path, refused):
    assert "no checkpoint at" in refused(sample.main, tmp_path / "nowhere")


def test_a_closed_pipe_ends_quietly(trained):
    process = subprocess.Popen([sys.executable, ROOT / "sample.py", trained, "--num-samples", "3",
                                "--max-new-tokens", "3"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=30) == 0


def test_a_prompt_files_line_ends_and_byte_order_mark_are_no_part_of_its_prompts(tmp_path):
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbfOne\r\n\r\nTwo \r\n")
    assert sample.read_prompts(str(tmp_path / "windows.txt")) == ["One", "", "Two "]


def test_the_cuda_kernels_do_what_their_twin_does_in_tritons_interpreter(interpreted):
    pytest.importorskip("triton")
    output, errors = interpreted.communicate()
    assert interpreted.returncode == 0, errors[-2000:]
    assert len(output.splitlines()) == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_gpu.py of the same process imports it")
def test_training_ranks_which_import_sample_do_not_import_triton():
    assert "kernels" not in sys.modules
