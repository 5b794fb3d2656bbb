"""
Publish a run as the model card does: a repository with a branch for each checkpoint, for transformers.

    python publish.py runs/3b --out published               # a git repository: step-XXXXX, main is the newest
    python publish.py runs/3b --out published --folders     # plain folders of these names instead
    python publish.py --import published --out runs/again/step-83923        # back into a checkpoint

A branch holds the weights, model.py and modeling_poe.py, config.json with the bounds of WAND, the tokenizer,
metrics.json and a model card: the tables of report.py for the run up to that step. main has trajectory.csv
besides, a line for each branch. Publishing again changes what changed: a later checkpoint adds its branch and
moves main. Nothing is uploaded.

--import reads such a folder, or another one of safetensors with such a config.json and tokenizer.json.
--rename maps its names of tensors to those of model.py by regular expressions, in order:

    --rename '{"^transformer\\.h\\.(\\d+)": "blocks.\\1", "^transformer\\.": ""}'

Needs pip install transformers, and 2 bytes of memory a parameter; 4 for --import.
"""
import csv
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

import report
from checkpoint import (
    BOUNDS_KEY,
    checkpoint_steps,
    load_tensors,
    read_json,
    save_checkpoint,
    step_number,
    verify_checkpoint,
    write_json,
)
from common import Ranks, flag, parse_flags, run, sha256_of
from dataloader import BOS, Tokenizer, reading
from model import PoE
from schedule import phase_index, phase_of

HERE = Path(__file__).parent
# the most in one file of weights
SHARD = "5GB"
# how to upload what was published, by --folders. Hubs take weights through git-lfs alone
PUSH = ("to push: cd '{0}' && git lfs migrate import --everything --include='*.safetensors' && "
        "git push --force --all https://huggingface.co/USER/NAME",
        "to push, for each folder: hf upload USER/NAME '{0}/BRANCH' . --revision BRANCH")
# in JSON, the folders before the last part of what our records call these
FOLDERS = r'("(?:data|mix|out|resume|continue_from)": ")(?:[^"\\]|\\.)*/'
CARD = """\
---
license: {license}
pipeline_tag: text-generation
library_name: transformers
tags: [poe, per-stage-head, continual-learning]
---
# {name}, {branch}

A per-stage Product-of-Experts language model: stages of {poe_stage_layers} layers, each with a head that
predicts the next token. The model's answer is the average of their log-probabilities. This is the checkpoint
after step {step:,} ({tokens_seen:,} tokens), in phase {phase}: rel_it = {rel_it:,} ({position} +{offset:,},
lrm = {lrm:.3f}). Training data: {data} (sha256 {mix_sha256}). Licence of the weights: {license}.

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

# or a folder that holds this branch, without revision
where = dict(pretrained_model_name_or_path="USER/{name}", revision="{branch}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.{dtype}).eval()
tokenizer = AutoTokenizer.from_pretrained(**where)

# a prompt must begin with <|bos|>
prompt = "The capital of France is"
input_ids = [tokenizer.bos_token_id] + tokenizer.encode(prompt, add_special_tokens=False)
input_ids = torch.tensor([input_ids])
out = model.generate(input_ids=input_ids, max_new_tokens=32, do_sample=False)
print(tokenizer.decode(out[0].tolist()))
```

Where there are several stages, `model.generate_wand(input_ids)` leaves early by this branch's own bounds; in
`model.generate_speculative(input_ids)` the first one drafts; `model(input_ids, stage=0)`, `prefix=2` and
`poe_alpha=0.5` are other answers of the same weights. Logits are log-probabilities. `main` has an index of
all branches, trajectory.csv.

{tables}
"""


def read_public(path):
    """The JSON value in a file, without the folders of this machine."""
    return json.loads(re.sub(FOLDERS, r"\1", path.read_text()))


# --------------------------------------------------------------------------------------------------
# A branch

def write_tokenizer(step, folder, sequence_len):
    """tokenizer.json and tokenizer_config.json: text becomes bos + ordinary text, as everywhere here."""
    from tokenizers.processors import TemplateProcessing
    from transformers.convert_slow_tokenizer import TikTokenConverter
    ours = Tokenizer.load(step)
    theirs = TikTokenConverter(str(step / "tokenizer.txt"), ours.pattern).converted()
    theirs.add_special_tokens([BOS])
    theirs.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, ours.bos)])
    theirs.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True, "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"], "model_max_length": sequence_len,
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), BOS)})


def write_model(step, record, folder, dtype):
    """Weights, scalars in float32; code; generation_config.json; config.json, which is returned."""
    from huggingface_hub import save_torch_state_dict
    tensors = load_tensors(step / "model.pt")
    save_torch_state_dict({
        f"model.{name}": tensor.to(getattr(torch, dtype) if tensor.dim() else torch.float32)
        for name, tensor in tensors.items()}, folder, max_shard_size=SHARD)
    for code in ("model.py", "modeling_poe.py"):
        shutil.copy(HERE / code, folder)
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), record["tokenizer"]["bos"])
    write_json(folder / "generation_config.json", special)
    shape = dict(record["model"])
    config = {
        "architectures": ["CognicaPoEForCausalLM"], "model_type": "cognica_poe", "dtype": dtype, **special,
        "auto_map": {"AutoConfig": "modeling_poe.CognicaPoEConfig",
                     "AutoModelForCausalLM": "modeling_poe.CognicaPoEForCausalLM"},
        "tie_word_embeddings": False, "poe_stage_layers": shape.pop("stage_layers"), **shape,
        "poe_alpha": 0.0, BOUNDS_KEY: read_json(step / "config.json").get(BOUNDS_KEY), "poe_training": record}
    write_json(folder / "config.json", config)
    return config


def write_card(run, step, record, rows, folder, more):
    """README.md of a checkpoint, whose line of trajectory.csv is returned.

    rows: {step directory: row} of the measured checkpoints up to it. more: what else the card names.
    """
    phases = list(map(phase_of, record["phases"]))
    n = record["step"]
    number = phase_index(phases, n)
    line = {"branch": step.name, "step": n, "tokens_seen": report.tokens_seen(record, n), "phase": number + 1,
            **report.phase_position(phases, n), "bpb_full": report.lookup(rows.get(step), "bpb/full")}
    for k in range(len(more["poe_stage_layers"])):
        line[f"bpb_s{k}"] = report.lookup(rows.get(step), f"bpb/single/{k}")
    tables = report.trajectory(run, rows, record)[0] if rows else ""
    if step not in rows:
        tables += f"\n{step.name} was not measured."
    phase = record["phases"][number]
    card = more | phase | line | {"tables": tables, "data": phase["mix"] or "the embedded sample"}
    (folder / "README.md").write_text(CARD.format(**card))
    return line


# --------------------------------------------------------------------------------------------------
# The repository

def git(out, *args):
    """What git prints, without your settings and name, and without compression, which weights resist."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "TZ": "UTC"}
    options = ["-c", "user.name=publish.py", "-c", "user.email=", "-c", "core.compression=0"]
    done = subprocess.run(["git", "-C", out, *options, *args], capture_output=True, text=True, env=env)
    if done.returncode:
        raise OSError(f"git {args[0]} failed: {done.stderr}")
    return done.stdout


def commit(out, branch):
    """Make the files in `out` the newest commit of a branch, where they are not that already."""
    git(out, "symbolic-ref", "HEAD", f"refs/heads/{branch}")
    git(out, "add", "--all", "--force")
    if git(out, "status", "--porcelain"):
        git(out, "commit", "-q", "-m", f"Publish {branch}")


def publish(run, out, config):
    """Publish the checkpoints of a run in `out`, a new folder or one that was published from this run."""
    steps = checkpoint_steps(run)
    hashes = [verify_checkpoint(step, skip_optimizer=True)["model.pt"] for step in steps]
    main = out / "main" if config.folders else out
    # whose checkpoints are published here; there from the beginning, so that an interrupted run goes on
    mark = out / (".publish.json" if config.folders else ".git/publish.json")
    old = read_json(mark) if mark.exists() else []
    if not steps or set(old) - set(hashes) or (not old and out.exists() and os.listdir(out)):
        raise ValueError(f"{run} is not a run with checkpoints, or {out} holds something else than those "
                         f"that were published of it; name a run, and a new folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    if not config.folders:
        git(out, "init", "-q", "--template=")
        (out / ".git/index.lock").unlink(missing_ok=True)
    write_json(mark, hashes)
    record = read_public(run / "config.json")
    rows = {}
    lines = []
    for step, sha256 in zip(steps, hashes):
        folder = out / step.name if config.folders else out
        folder.mkdir(exist_ok=True)
        for path in filter(Path.is_file, folder.iterdir()):
            path.unlink()
        write_tokenizer(step, folder, record["model"]["sequence_len"])
        record |= {"step": step_number(step), "state": read_json(step / "state.json")}
        more = vars(config) | write_model(step, record, folder, config.dtype)
        if (step / "metrics.json").exists():
            metrics = read_public(step / "metrics.json")
            write_json(folder / "metrics.json", metrics)
            rows[step] = metrics | {"timings": read_json(step / "timings.json")}
        line = write_card(run, step, record, rows, folder, more | {"name": out.resolve().name})
        weights = []
        for path in sorted(folder.glob("*.safetensors")):
            path.chmod(0o644)
            weights.append(sha256_of(path))
        lines.append(line | {"checkpoint_sha256": sha256, "weights_sha256": " ".join(weights)})
        if not config.folders:
            commit(out, step.name)
        print(f"{step.name}: bpb {line['bpb_full'] or 'not measured'}", flush=True)
    if config.folders:
        shutil.rmtree(main, ignore_errors=True)
        shutil.copytree(folder, main, copy_function=os.link)
    with open(main / "trajectory.csv", "w") as file:
        # a dict is its keys: the header
        csv.writer(file, lineterminator="\n").writerows([lines[0], *map(dict.values, lines)])
    if not config.folders:
        commit(out, "main")
    print(PUSH[config.folders].format(out))


# --------------------------------------------------------------------------------------------------
# Back into a checkpoint

def import_checkpoint(folder, out, rename):
    """Make the checkpoint `out` of a published folder, without optimizer state.

    rename: JSON {pattern: replacement} of regular expressions for the names of tensors, in order. Raises
    ValueError where the folder is no such model, or `out` cannot be its checkpoint.
    """
    from safetensors.torch import load_file
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    with reading(f"the model in {folder}", "name a folder that publish.py wrote, or map names by --rename"):
        weights = {}
        for file in folder.glob("*.safetensors"):
            for name, tensor in load_file(file).items():
                for pattern, replacement in json.loads(rename).items():
                    name = re.sub(pattern, replacement, name)
                weights[name] = tensor.float()
        config = read_json(folder / "config.json")
        record = config["poe_training"] | {BOUNDS_KEY: config[BOUNDS_KEY]}
        model = PoE.from_config(record["model"], weights, torch.float32)
        words = read_json(folder / "tokenizer.json")
        vocab = words["model"]["vocab"]
        byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
        tokenizer = Tokenizer([bytes(map(byte_of.get, word)) for word in sorted(vocab, key=vocab.get)],
                              words["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"])
        trained_with = record["tokenizer"]["sha256"]
        step = record["step"]
        state = record.pop("state") | {"step": step}
    if out.exists() or out.name != f"step-{step:05d}" or tokenizer.sha256 != trained_with:
        raise ValueError(f"--out {out} must be a new RUN/step-{step:05d}, and the tokenizer in {folder} the "
                         f"one that the model was trained with")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not (out.parent / "config.json").exists():
        write_json(out.parent / "config.json", record)
    print(f"wrote {save_checkpoint(out.parent, Ranks(), model, None, record, state, tokenizer)}")


# --------------------------------------------------------------------------------------------------
# Command line

@dataclass(frozen=True)
class Flags:
    out: str = flag("published", "the repository, or the folder of folders; with --import RUN/step-XXXXX",
                    path=True)
    dtype: str = flag("bfloat16", "of the published weights", choices=("bfloat16", "float32"))
    license: str = flag("apache-2.0", "of the weights, by the hub's name for it")
    folders: bool = flag(False, "plain folders instead of branches of a git repository")
    import_: bool = flag(False, "make a checkpoint of a published folder")
    rename: str = flag(r'{"^model\\.": ""}', "with --import: regular expressions for names of tensors, and "
                                             "what replaces them, JSON")


def main(argv=None):
    given = parse_flags(Flags, __doc__, argv, positionals=[
        ("source", None, "a run, all of whose checkpoints are published; with --import a published folder")])
    source = Path(given.pop("source"))
    config = Flags(**given)
    if config.import_:
        import_checkpoint(source, Path(config.out), config.rename)
    else:
        publish(source, Path(config.out), config)


if __name__ == "__main__":
    run(main)
