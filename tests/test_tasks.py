"""
tasks.py against a naive twin (one pair at a time, encoded by lm-eval's rule), pencil and paper, and chance.

Run: python -m pytest tests/test_tasks.py
"""
import gzip
import json

import numpy as np
import pytest
import torch

import tasks
from checkpoint import read_json, write_json
from dataloader import Tokenizer
from model import combine
from tasks import measure_task
from test_model import make

TOKENIZER = Tokenizer.load(vocab_size=300)


def write_task(folder, questions, metric="acc_raw", name="quiz/rc_5shot"):
    """A file of questions: a label, then pairs of context and continuation."""
    lines = [{"doc_id": number, "idx": idx, "label": label,
              "request": {"context": context, "continuation": text}}
             for number, (label, *pairs) in enumerate(questions) for idx, (context, text) in enumerate(pairs)]
    # the last asks for a probability without the question
    lines.append({"doc_id": 1_000_000})
    file = folder / name / "requests.jsonl.gz"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    write_json(file.with_name("config.json"), {"task_config": {"primary_metric": metric}})
    return file


def model_of(*stage_layers):
    return make(vocab_size=300, sequence_len=16, stage_layers=stage_layers).freeze_for_inference()


@torch.no_grad()
def naive_bpb(model, context, continuation):
    """Of every head, by one pass over one pair, cut to the model's 16 inputs."""
    whole = TOKENIZER.encode(context + continuation)
    ids = whole[len(TOKENIZER.encode(context.rstrip())):]
    log_p = [model.log_probs(k, x)[0, -len(ids):]
             for k, x in enumerate(model.boundaries(torch.tensor([whole[-17:-1]])))]
    log_p += [combine(sum(log_p[:k]), k) for k in range(2, len(log_p) + 1)]
    return [-of[range(len(ids)), ids].sum() / np.log(2) / len(continuation.encode()) for of in log_p]


def test_every_head_equals_the_naive_twin(tmp_path):
    # one context or several in a question; some end with spaces, some are too long for the model
    contexts = ["The", " X naïve and 12", "of the and the  ", "a " * 9]
    questions = [[(contexts[(n // 9 + n * i) % 4], f" é{n ** i}") for i in range(3)] for n in range(40)]
    model = model_of(2, 1, 2)
    for right in range(3):
        entry = measure_task(model, TOKENIZER, write_task(tmp_path, [(right, *pairs) for pairs in questions]))
        expected = np.mean([naive_bpb(model, *pairs[right]) for pairs in questions], axis=0)
        assert [head["gold_bpb"] for head in entry["heads"].values()] == pytest.approx(expected, rel=1e-9)
    assert [*entry["heads"]] == ["s0", "s1", "s2", "prefix2", "full"] and entry["cut_contexts"] > 20


def test_five_questions_by_pencil(tmp_path):
    # each of their bytes is a token, and " t" is one; a uniform model needs log2(300) bits for a token
    texts = {" Q, QQ": 0, " QQQ, t": 1, " éé, QQ": 1, " Q, é": 0, " ééé, é, QQQ": 1}
    questions = [(right, *[("a", text) for text in text.split(",")]) for text, right in texts.items()]
    model = model_of(2, 1, 2)
    model.merged_heads = [0 * head for head in model.merged_heads]
    # raw: the fewest tokens win; per character: the fewest é, and " t"; per token all tie: the first
    for metric, hits in {"acc_raw": 5, "acc_per_char": 4, "acc_per_token": 2}.items():
        head = measure_task(model, TOKENIZER, write_task(tmp_path, questions, metric))["heads"]["prefix2"]
        # 9 tokens for 10 bytes
        assert [head["accuracy"], head["gold_bpb"]] == pytest.approx([hits / 5, 0.9 * np.log2(300)])


def test_a_row_holds_at_most_16_continuations(tmp_path):
    file = write_task(tmp_path, [(0, *[("Q:", " a")] * 33)])
    # bos and Q, then a slot for each " a"
    assert [len(row) for row in tasks.read_task(file, TOKENIZER, 16)[1]] == [3, 18, 18]


def test_a_random_models_accuracy_is_chance_within_the_known_error_of_a_mean(tmp_path):
    questions = [(0, *[("Q:", f" {(4 * n + i) ** 9 % 10007:05}") for i in range(4)]) for n in range(400)]
    (name, head), = measure_task(model_of(5), TOKENIZER, write_task(tmp_path, questions))["heads"].items()
    # the root of 1/4 3/4 / 400
    error = 0.02165
    # a false alarm in 370; the bootstrap knows errors to 7 %
    assert name == "full" and abs(head["accuracy"] - 0.25) < 3 * error
    assert head["accuracy_stderr"] == pytest.approx(error, rel=0.3)


def test_the_script_measures_what_is_new_and_refuses_bad_input(run, tmp_path, refused):
    write_task(tmp_path, [(0, ("a", " b"), ("a", " c"))] * 2)
    file = write_task(tmp_path, [("text", ("a", " b"))] * 3, name="cloze/b")
    call = f"{run} --requests {tmp_path} --tasks quiz,cloze".split()
    tasks.main([*call, "--picture", f"{run}/tasks.svg"])
    drawn = (run / "tasks.svg").read_text()
    assert all(f"<!-- {run} {head} -->" in drawn for head in ("full", "s0", "prefix2"))
    # no part of what the manifest lists
    written = run / "step-00006" / "tasks.json"
    entries = read_json(written)
    assert "accuracy" not in entries["cloze"]["heads"]["full"]

    entries["quiz"]["questions"] = 99
    write_json(written, entries)
    for more, count in ([], 99), (["--dtype", "float64"], 2):
        tasks.main(call + more)
        assert read_json(written)["quiz"]["questions"] == count

    assert "holds no nowhere/VARIANT" in refused(tasks.main, *call, "--tasks", "nowhere")
    file.write_bytes(b"no gzip")
    assert "cannot be read" in refused(tasks.main, *call)
    write_task(tmp_path, [(0, ("a", " Q" * 12))])
    assert "has 24 tokens; the model's context takes 1 to 16" in refused(tasks.main, *call)
