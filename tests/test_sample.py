"""
sample.py against uncached greedy loops, plain decoding, teacher-forced passes, softmax frequencies and
filters worked out by hand.

Run: python -m pytest tests/test_sample.py
"""
import json
import math
import os
import subprocess
import sys

import pytest
import torch

import common
import sample
from checkpoint import BOUNDS_KEY, write_json
from conftest import ROOT, change_json, closed_stdout, table
from dataloader import Tokenizer
from model import combine
from sample import ROWS, Engine, Plan, Sampling, complete, count_new_tokens, generate, make_plan, sample_token
from test_model import make

FULL = Plan(range(3))
TOKENIZER = Tokenizer.load(vocab_size=300)
PROMPT = [22, 3, 1, 4, 15]


def greedy_without_cache(model, prompt, n, experts):
    """The obvious loop, everything again for each token: ids, and their log-probabilities."""
    ids = list(prompt)
    found = []
    for _ in range(n):
        stages = [model.log_probs(k, x[:, -1]) for k, x in enumerate(model.boundaries(torch.tensor([ids])))]
        best = combine(sum(stages[k] for k in experts), len(experts)).max(dim=-1)
        ids.append(best.indices.item())
        found.append(best.values.item())
    return ids[len(prompt):], found


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


@pytest.mark.parametrize("mode, options, experts", [
    ("full", {}, [0, 1, 2]), ("single", {"stage": 2}, [2]), ("prefix", {"prefix": 2}, [0, 1])])
def test_cached_greedy_decoding_equals_the_uncached_loop(mode, options, experts):
    model = small()
    plan = make_plan(model.config, mode, **options)
    assert list(plan.experts) == experts
    tokens = decode(Engine(model, plan), PROMPT, 20)
    expected, log_probs = greedy_without_cache(model, PROMPT, 20, experts)
    assert ids(tokens) == expected
    assert [t.log_prob for t in tokens] == pytest.approx(log_probs, abs=1e-5)


def test_a_prompt_of_bos_alone_a_full_context_and_a_long_prompt_work(monkeypatch):
    model = small()
    assert len(decode(Engine(model, FULL), [22], 80)) == 80
    assert len(decode(Engine(model, FULL), [22] * 80, 1)) == 1
    long = [22, *range(20)] * 3
    # in pieces, the last of 6
    monkeypatch.setattr(sample, "PREFILL", 7)
    assert ids(decode(Engine(model, FULL), long, 6)) == greedy_without_cache(model, long, 6, range(3))[0]


def test_tokens_to_generate_are_those_asked_for_or_64_as_far_as_the_context_of_80_goes():
    model = make(vocab_size=300, sequence_len=80)
    for longest, asked, new in ((10, None, 64), (60, None, 21), (80, None, 1), (60, 21, 21)):
        assert count_new_tokens(model.config, [[1], [1] * longest], asked) == new
    # of a list that is said before the first is answered
    with pytest.raises(ValueError, match="prompt 2, of 61 tokens, leaves room for 20 of 22"):
        next(complete(model, TOKENIZER, ["x", "\x00" * 60], 22, Plan(range(3), 4)))


@pytest.mark.parametrize("draft_weights", ["same", "int8"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.3, 9, 0.8, seed=6)])
def test_speculation_writes_the_very_tokens_of_plain_decoding(sampling, draft_weights):
    model = small()
    plain = decode(Engine(model, FULL, sampling=sampling), PROMPT, 24)
    for draft_len in (1, 4, 16):
        plan = Plan(range(3), draft_len, draft_weights)
        tokens = decode(Engine(model, plan, sampling=sampling), PROMPT, 24)
        assert [(t.id, t.log_prob) for t in tokens] == [(t.id, t.log_prob) for t in plain]
        # some drafts were right, some were not
        assert 2 < sum(t.stage == 0 for t in tokens) < 24


class Scripted(Engine):
    """Its drafts are plain decoding's tokens, but for those at `wrong`, counted from the prompt's end."""

    def __init__(self, plan, plain, wrong):
        super().__init__(small(), plan)
        self.plain = plain
        self.wrong = wrong
        self.passes = [0, 0, 0]

    def advance(self, k, T):
        super().advance(k, T)
        self.passes[k] += 1

    def decide(self, k):
        super().decide(k)
        place = int(self.cursors[1]) - len(PROMPT)
        truth = self.plain[place] if place < len(self.plain) else 0
        self.tokens[0, place + len(PROMPT)] = (truth + 1) % 23 if place in self.wrong else truth


@pytest.fixture(scope="module")
def plain():
    return ids(decode(Engine(small(), FULL), PROMPT, 45))


def rounded(weight):
    """A matrix of whole multiples of each row's step, a 127th of its largest weight, row by row."""
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / step).round() * step


@torch.no_grad()
def test_int8_drafts_are_those_of_a_stage_0_whose_matrices_are_rounded_row_by_row():
    twin = small()
    twin.merged_heads[0] = rounded(twin.merged_heads[0])
    for name, p in twin.named_parameters():
        if p.dim() == 2 and name.startswith("blocks") and "value_embed" not in name:
            p.copy_(rounded(p))
    engines = [Engine(small(), Plan(range(3), 9, "int8")), Engine(twin, Plan(range(1)))]
    for engine in engines:
        engine.begin([[22]])
        for _ in range(9):
            engine.draft()
    assert torch.equal(engines[0].tokens, engines[1].tokens)
    assert torch.allclose(engines[0].stream[1, :, :9], engines[1].stream[1, :, :9], atol=1e-4)


@pytest.mark.parametrize("draft_len, wrong, cycles", [
    (1, set(), 17), (1, {1}, None), (4, set(), 7), (4, {*range(100)}, 34), (4, {0}, None), (4, {3}, None),
    (16, set(), 2), (16, {15}, None)])
def test_right_wrong_and_once_wrong_drafters_change_nothing_but_the_number_of_cycles(
        draft_len, wrong, cycles, plain):
    engine = Scripted(Plan(range(3), draft_len), plain, wrong)
    engine.begin([PROMPT])
    steps = list(generate(engine, 34))
    assert [t.id for step in steps for t in step.rows[0]][:34] == plain[:34]
    # the bytes of a benchmark rest on the number of passes; an upper stage takes a tile at a time here
    upper = len(steps) * -(-(draft_len + 1) // ROWS)
    assert engine.passes == [len(steps) * (draft_len + 1), upper, upper]
    if cycles:
        accepted = 0 if wrong else cycles * draft_len
        assert sample.count(steps) == {"cycles": cycles, "accepted": accepted, "judged": accepted or cycles}


def test_with_two_cycles_in_flight_none_is_started_that_the_text_has_no_room_for(plain):
    engine = Scripted(Plan(range(3), draft_len=4), plain, wrong=set())
    # as with CUDA graphs
    engine.in_flight = 2
    assert ids(decode(engine, PROMPT, 40)) == plain[:40] and engine.passes == [40, 8, 8]


@torch.no_grad()
def read_along(engine, prompt, ids):
    """Run every stage of an engine over a text that is there already, position by position."""
    engine.begin([prompt])
    engine.tokens[0, len(prompt):len(prompt) + len(ids)] = torch.tensor(ids, device=engine.tokens.device)
    for _ in ids:
        for k in range(engine.last + 1):
            engine.run_stage(k)
        engine.cursors[0] += 1


def decode_over_garbage(engine, prompt, n):
    """Decode with garbage in every slot that no query may read; then every stage catches up with stage 0."""
    engine.begin([prompt])
    for state in (engine.cache.keys, engine.cache.values):      # (L, B, slots, H_kv, D)
        state[:, :, len(prompt) - 1:] = 1e4
    engine.sums.fill_(1e4)
    tokens = [token for step in generate(engine, n) for token in step.rows[0]]
    for k in range(1, engine.last + 1):
        waiting = int(engine.cursors[1] - engine.cursors[k + 1])
        if waiting:
            engine.start_lift(k, waiting, decides=False)
    assert len(set(engine.cursors[1:, 0].tolist())) == 1
    return tokens


@pytest.mark.parametrize("plan", [
    Plan(range(3), exits=(0.4, 0.4)), Plan(range(3), 5), Plan(range(3), 5, "int8"),
    Plan(range(3), exits=(0.04, math.inf)),
    Plan(range(3), exits=(0.15, math.inf), score="probability")])
def test_stages_that_caught_up_hold_a_teacher_forced_passes_state_and_garbage_is_never_read(plan):
    model = small()
    engine = Engine(model, plan)
    teacher = Engine(model, FULL)
    engine.stream.fill_(-1e4)
    tokens = decode_over_garbage(engine, PROMPT, 70)
    read_along(teacher, PROMPT, ids(tokens))
    n = int(engine.cursors[1])
    assert torch.equal(engine.cache.keys[:, :, :n], teacher.cache.keys[:, :, :n])
    assert torch.equal(engine.cache.values[:, :, :n], teacher.cache.values[:, :, :n])
    if plan.exits:
        # with the low threshold more waited than one pass takes
        waited = "".join(str(t.depth) for t in tokens).replace("2", "3").split("3")
        assert len(tokens) > len(max(waited)) > (ROWS if plan.exits[0] == 0.04 else 0)


def test_wand_stays_where_the_margin_is_the_sum_of_the_bounds_exactly():
    plan = make_plan(make().config, "wand", bounds=[2.25, 1.5])
    for bound, threshold in zip([3.75, 1.5], plan.exits, strict=True):
        margin = torch.tensor([bound, bound + 1e-6])
        assert (margin >= threshold).tolist() == [False, True]


def test_early_exit_leaves_where_its_rule_says_and_says_what_that_prefix_says():
    model = small()
    plan = Plan(range(3), exits=(0.5, 0.3))
    tokens = decode(Engine(model, plan), PROMPT, 60)
    boundaries = model.boundaries(torch.tensor([PROMPT + ids(tokens)]))
    stages = torch.stack([model.log_probs(k, x)[0] for k, x in enumerate(boundaries)])
    for i, token in enumerate(tokens):
        for k in range(3):
            score = stages[:k + 1, len(PROMPT) - 1 + i].mean(dim=0)
            top = score.topk(2).values
            if k == 2 or top[0] - top[1] >= plan.exits[k]:
                break
        assert (token.depth, token.id) == (k + 1, int(score.argmax()))
    assert len({t.depth for t in tokens}) == 3


@pytest.mark.parametrize("plan", [FULL, Plan(range(1, 2))])
def test_prompts_of_a_list_are_answered_at_once_as_those_of_an_iterator_are_one_by_one(plan):
    model = make(vocab_size=300, sequence_len=80).freeze_for_inference()
    prompts = ["the stage of", "", "a longer prompt than all others here", "is"]
    together, alone = (complete(model, TOKENIZER, texts, 20, plan, Sampling(0.8, seed=3))
                       for texts in (prompts, iter(prompts)))
    assert [row["token_ids"] for row in together] == [row["token_ids"] for row in alone]
    # a text is taken when it is its turn
    lines = iter("ab")
    assert next(complete(model, TOKENIZER, lines, 3, plan))["prompt"] == "a" and next(lines) == "b"


def test_the_same_seed_gives_the_same_rows_whatever_is_generated_beside_them():
    model = make(torch.float64, vocab_size=300, sequence_len=30).freeze_for_inference()

    def rows(n, seed=7):
        samples = complete(model, TOKENIZER, ["ab"], 11, FULL, Sampling(1.5, seed=seed), n_samples=n)
        return [s["token_ids"] for s in samples]
    # a group of ROWS and one of four
    twenty = rows(20)
    assert len(twenty) == 20 > ROWS and twenty[0] != twenty[1]
    assert twenty[:2] == rows(2)
    # the seed's upper half counts too
    assert twenty[0] not in (rows(1, seed=8)[0], rows(1, seed=7 + 2 ** 32)[0])


KERNELS = """
import torch, triton.language as tl
from triton.runtime import interpreter
import kernels
from sample import WIDEST, Engine, Plan
from test_model import make
# several chunks, and several parts of them
kernels.CHUNK = 16
kernels.PART = 2
kernels.gdc_wait = kernels.gdc_launch_dependents = lambda: None
tl.inline_asm_elementwise = lambda *args, **kwargs: None
# the interpreter patches the language once, not at every call of a function: a quarter of the time
interpreter._patch_lang(tl.max.fn)
interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
torch.set_num_threads(1)
shape = dict(sequence_len=72, n_head=2, n_kv_head=1)
small = make(torch.float32, vocab_size=70, n_layer=3, n_embd=64, mlp_hidden=768, stage_layers=(2, 1), **shape)
# its blocks are of 16 columns
narrow_head = make(torch.float32, vocab_size=70, n_layer=2, n_embd=256, mlp_hidden=64, stage_layers=(1, 1),
                   **shape)
for model, prompts, plan in (
        (small, [[69, 5]], Plan(range(2), 1, "same")),
        (small, [[69, *range(36)]], Plan(range(2), 1, "int8")),
        (small, [[69, 5, 6], [69, *range(35)], [69]], Plan(range(2))),
        (small, [[69, 1]], Plan(range(2), 17, "int8")), (narrow_head, [[69], [5]], Plan(range(2)))):
    model.freeze_for_inference()
    slow, fast = (Engine(model, plan, len(prompts), fast=fast) for fast in (False, True))
    for state in (fast.kernels.partial, fast.kernels.total):
        state.fill_(1e4)
    for engine in (slow, fast):
        engine.begin(prompts)
        # more than a tile will wait; the interpreter is slow, so the plain twin drafts for both
        if plan.draft_len < 16 or engine is slow:
            for _ in range(plan.draft_len):
                engine.draft()
    if plan.draft_len > 16:
        for state in ("tokens", "cursors", "stream", "sums"):
            getattr(fast, state).copy_(getattr(slow, state))
        for ours, theirs in ((fast.cache.keys, slow.cache.keys), (fast.cache.values, slow.cache.values)):
            ours.copy_(theirs)
    assert torch.allclose(slow.stream[1], fast.stream[1], atol=1e-3)
    for engine in (slow, fast):
        engine.verify(plan.draft_len + 1)
    n = slow.cursors[1:].min()
    assert torch.equal(slow.cursors, fast.cursors) and torch.equal(slow.tokens, fast.tokens)
    for a, b in ((slow.outcome, fast.outcome), (slow.cache.keys[:, :, :n], fast.cache.keys[:, :, :n]),
                 (slow.cache.values[:, :, :n], fast.cache.values[:, :, :n]),
                 (slow.stream[:, :, n - 1:n], fast.stream[:, :, n - 1:n])):
        assert torch.allclose(a, b, atol=1e-3), (a - b).abs().max()
    # nats, of rare tokens too
    a, b = (engine.sums if len(prompts) > 1 else engine.sums[(n - 1) % WIDEST] for engine in (slow, fast))
    assert torch.allclose(a, b, atol=2e-3), (a - b).abs().max()
"""


def test_frequencies_of_sampled_tokens_match_softmax():
    """Chi-square, 6 degrees of freedom, threshold 33.1: false alarms 1 in 100,000; the seed is fixed."""
    logits = torch.tensor([[0.5, -1.0, 2.0, 0.0, 1.0, -2.0, 0.3]])
    n = torch.arange(20_000)
    log_probs = logits.log_softmax(dim=-1).expand(20_000, -1)
    tokens = sample_token(log_probs, Sampling(0.7, seed=3), n // 500, n % 500)
    expected = 20_000 * torch.softmax(logits[0] / 0.7, dim=-1)
    chi_square = ((torch.bincount(tokens, minlength=7) - expected) ** 2 / expected).sum().item()
    assert chi_square < 33.1, chi_square


def test_noise_is_uncorrelated_between_neighbours():
    a, b = (sample.gumbel_noise(1, torch.full((2000,), row), torch.arange(2000), 50) for row in (0, 1))
    # 100,000 draws: five standard errors
    for a, b in ((a[1:], a[:-1]), (a[:, 1:], a[:, :-1]), (a, b)):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.015


@pytest.mark.parametrize("sampling, kept", [
    (Sampling(1.0, top_k=2), {0, 1}), (Sampling(1.0, top_k=9), {0, 1, 2, 3}),
    # 0.4 is not enough, 0.7 is
    (Sampling(1.0, top_p=0.5), {0, 1}), (Sampling(1.0, top_p=0.35), {0}),
    # of 4/9, 3/9, 2/9: 7/9 is not yet 0.8
    (Sampling(1.0, top_k=3, top_p=0.8), {0, 1, 2}),
    # as cold as float32 goes
    (Sampling(1e-45), {0})])
def test_filters_keep_the_tokens_worked_out_by_hand(sampling, kept):
    log_probs = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    # a kept token of p = 0.1 stays unseen with probability 0.9^2000 = 10^-92
    n = torch.arange(2000)
    assert set(sample_token(log_probs.expand(2000, -1), sampling, 0 * n, n).tolist()) == kept


def test_completion_stops_at_bos_and_holds_back_half_a_character(monkeypatch):
    first, second = (TOKENIZER.ranks.index(bytes([b])) for b in "é".encode())
    # time x row
    script = [[65, 66], [first, 66], [second, TOKENIZER.bos], [TOKENIZER.bos, 66], [67, 67]]
    steps = [sample.Step([[sample.Token(i, -1.0, 2, 3)] for i in ids], 0, 0) for ids in script]
    monkeypatch.setattr(sample, "generate", lambda *a: iter(steps))
    streamed = []
    a, b = complete(make(vocab_size=300), TOKENIZER, ["x"], 5, FULL, n_samples=2, on_text=streamed.append)
    assert a["completion"] == TOKENIZER.decode([65]) + "é" and a["token_ids"] == [65, first, second]
    assert a["log_probs"] == [-1.0] * 3 and a["depths"] == [3] * 3 and a["stopped"] == "bos"
    assert b["token_ids"] == [66, 66]
    assert "".join(streamed) == "x" + a["completion"] and "\ufffd" not in "".join(streamed)


# --------------------------------------------------------------------------------------------------
# The script

def printed(capsys, *argv):
    """What sample.py prints with --json, greedy: a dict for each sample."""
    capsys.readouterr()
    sample.main([*map(str, argv), "--temperature", "0", "--dtype", "float64", "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_prompt_is_plain_text_after_bos_and_streams_with_its_completion(trained, capsys):
    argv = [str(trained), "--prompt", "<|bos|> a", "--max-new-tokens", "4"]
    one, two = printed(capsys, *argv, "--num-samples", "2")
    assert one == two and TOKENIZER.decode(one["token_ids"]) == one["completion"]
    sample.main([*argv, "--temperature", "0", "--dtype", "float64"])
    assert capsys.readouterr().out == "<|bos|> a" + one["completion"] + "\n"


def test_modes_read_what_calibration_wrote_and_say_what_is_missing(run, refused, capsys):
    step = run / "step-00006"
    calibrated = [("wand",), ("wand", "--wand-margin"), ("routing",)]
    for mode in calibrated:
        assert "python evaluate.py RUN" in refused(sample.main, step, "--mode", *mode)
    change_json(step / "config.json", **{BOUNDS_KEY: [0.004, 0.002]})
    metrics = {"wand": {"margin": {"thresholds": [0.001, None]}}, "routing": {"threshold": 0.0035}}
    write_json(step / "metrics.json", metrics)
    argv = [step, "--prompt", "a", "--max-new-tokens", "14", "--mode"]
    for mode in calibrated:
        out, = printed(capsys, *argv, *mode)
        assert out["stages"] == [depth - 1 for depth in out["depths"]]
    # the flag comes first: no token is that probable
    assert set(printed(capsys, *argv, "routing", "--routing-threshold", "1")[0]["depths"]) == {3}
    assert make_plan(make().config, "wand", wand_margin=True, metrics=metrics).exits == (0.001, math.inf)


@pytest.mark.parametrize("mode", ["wand", "routing", "speculative"])
def test_a_checkpoint_of_one_stage_refuses_modes_of_several(mode):
    with pytest.raises(ValueError, match="--mode full"):
        make_plan(make(objective="bp", stage_layers=(5,)).config, mode)


def test_prompts_come_from_a_file_without_its_line_ends_and_byte_order_mark(
        trained, tmp_path, refused, capsys):
    file = tmp_path / "prompts.txt"
    argv = [trained, "--max-new-tokens", "3", "--mode", "speculative", "--prompt-file", file]
    file.write_bytes(b"\xef\xbb\xbfthe\r\n\r\na b \r\n")
    lines = printed(capsys, *argv)
    assert [line["prompt"] for line in lines] == ["the", "", "a b "]
    file.write_bytes(b"a\xffb")
    assert "0xff in position 1" in refused(sample.main, *argv)
    file.write_bytes(b"")
    assert "empty" in refused(sample.main, *argv)
    assert "exclude each other" in refused(sample.main, *argv, "--prompt", "x")


@pytest.mark.parametrize("argv, word", table("""
    --mode single                     | 0 to 2
    --mode single --stage 3           | 0 to 2
    --mode prefix --prefix 0          | 1 to 3
    --stage 0                         | --mode single
    --draft-len 8                     | --mode speculative
    --draft-weights int8              | --mode speculative
    --wand-margin                     | --mode wand
    --routing-threshold 0.5           | --mode routing
    --mode speculative --draft-len 0  | 1 to 31
    --mode speculative --draft-len 32 | 1 to 31
    --temperature nan                 | temperature
    --top-p 0                         | top-p
    --top-k -2                        | top-k
    --device abacus                   | abacus
    --compile                         | CUDA
    --prompt-file=                    | --prompt-file"""))
def test_bad_input_gets_one_line(argv, word, trained, refused):
    assert word in refused(sample.main, trained, *argv.split())


def test_in_bfloat16_several_prompts_are_decoded_as_one_is():
    # wide enough for a CPU to round rows differently when there are 8 of them
    model = make(torch.bfloat16, vocab_size=300, sequence_len=80, n_embd=384, n_head=6, n_kv_head=2,
                 mlp_hidden=1024).freeze_for_inference()
    prompts = [word * n for word in ("the ", "of a ") for n in range(1, 5)]
    texts = [list(complete(model, TOKENIZER, prompts, 6, plan, Sampling(0.8)))
             for plan in (FULL, Plan(range(3), draft_len=4))]
    for key in ("token_ids", "log_probs"):
        assert [text[key] for text in texts[0]] == [text[key] for text in texts[1]]


def test_a_small_model_decodes_on_one_thread_of_a_cpu():
    torch.set_num_threads(2)
    with sample.decoding_threads(make()):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_a_closed_pipe_ends_quietly(trained, capsys):
    with closed_stdout():
        common.run(lambda: sample.main([str(trained), "--num-samples", "3", "--max-new-tokens", "3"]))
    assert capsys.readouterr().err == ""


def test_the_cuda_kernels_do_what_their_twin_does_in_tritons_interpreter():
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", KERNELS], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_gpu.py of the same process imports it")
def test_training_ranks_which_import_sample_do_not_import_triton():
    assert "kernels" not in sys.modules
