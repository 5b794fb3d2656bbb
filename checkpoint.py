"""
Checkpoints of a run: saving, checking, reading, resuming, pruning, and the run's log.

    RUN/config.json         what the run was started with; paths of data are relative to RUN
        log.jsonl           a JSON object a step and a validation
        step-XXXXX/         a checkpoint:
            config.json     architecture, tokenizer, step, phase table; calibration adds poe_wand_* keys
            model.pt        weights alone
            optim/          optimizer state by parameter name, one file per rank that saved
            state.json      step, sample cursor, training time
            tokenizer.txt, tokenizer.json
            manifest.json   sha256 of each file above, of config.json without its poe_wand_* keys

A checkpoint appears whole or not at all: it is written under a temporary name, flushed to disk and renamed.
It is read with `weights_only`, so nothing in it is executed. Once its hashes hold, its JSON is trusted.
Optimizer files are keyed by parameter name, so that any number of ranks reads what any other number wrote.
RUN must be on a file system that all ranks share.
"""
import hashlib
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import torch

from common import SharedError, sha256_of, write_whole
from model import PoE

BOUNDS_KEY = "poe_wand_p99_bounds_per_stage_head"       # in a calibrated checkpoint's config.json


# --------------------------------------------------------------------------------------------------
# Finding, checking, reading

def checkpoint_steps(run):
    """The step directories of a run, ordered by number (as text step-100000 sorts before step-84000)."""
    paths = [path for path in Path(run).glob("step-*/") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(paths, key=step_number)


def step_number(path):
    """84000 of RUN/step-84000."""
    return int(path.name.removeprefix("step-"))


def resolve_checkpoint(path):
    """A step directory from a path that names one, or the newest of a run. Raises FileNotFoundError."""
    path = Path(path)
    if (path / "model.pt").exists():
        return path
    steps = checkpoint_steps(path)
    if not steps:
        raise FileNotFoundError(f"no checkpoint at {path}: give a RUN/step-XXXXX, or a run that holds some")
    return steps[-1]


def read_json(path):
    """The JSON value in a file."""
    return json.loads(path.read_text())


def write_json(path, value):
    """Write a JSON file whole or not at all. A hard link to the old file elsewhere keeps the old content."""
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


def with_data_paths(record, convert):
    """A config.json's content with `convert` applied to the paths of data in it; "", the sample, stays."""
    phases = [row | {"mix": row["mix"] and convert(row["mix"])} for row in record["phases"]]
    return record | {"train": record["train"] | {"data": phases[-1]["mix"]}, "phases": phases}


def recorded_in(run, record):
    """What config.json in `run` holds for this record, whose paths of data are as seen from here."""
    return with_data_paths(record,
                           lambda path: os.path.relpath(os.path.realpath(path), os.path.realpath(run)))


def read_record(folder):
    """config.json of a run or checkpoint, with absolute paths of data."""
    folder = Path(folder)
    run = folder.parent if (folder / "manifest.json").exists() else folder
    record = read_json(folder / "config.json")
    if "phases" not in record:
        raise ValueError(f"{folder / 'config.json'} was not written by train.py; name a run of its making")
    return with_data_paths(record,
                           lambda path: os.path.normpath(os.path.join(os.path.realpath(run), path)))


def digest(path):
    """Hex sha256 of a checkpoint's file; of config.json without the keys that calibration may write later."""
    if path.name != "config.json":
        return sha256_of(path)
    config = {key: value for key, value in read_json(path).items() if not key.startswith("poe_wand_")}
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def verify_checkpoint(path, skip_optimizer=False, first=0, every=1):
    """Check a step directory against its manifest; return the manifest's {file: sha256}.

    skip_optimizer: leave out optim/, for readers of the weights alone. first, every: check only every n-th
    file, from the first on. Raises ValueError that names the file which is missing or altered.
    """
    try:
        files = read_json(path / "manifest.json")["files"]
        for name in list(files)[first::every]:
            if name.startswith("/") or ".." in Path(name).parts:
                raise ValueError(f"its manifest names {name}, outside of it")
            if skip_optimizer and name.startswith("optim/"):
                continue
            if digest(path / name) != files[name]:
                raise ValueError(f"{name} was altered or cut")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is not a whole checkpoint ({e}); use another step") from None
    return files


def load_tensors(path):
    """Tensors of a file that torch.save wrote, mapped on the CPU. Executes nothing."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError) as e:
        raise ValueError(f"{path} is not a file of tensors ({str(e).splitlines()[0]}); use another "
                         f"step") from None


def load_checkpoint(path, device="cpu", dtype=torch.float32):
    """Read a checkpoint's weights for inference: (model, config.json as a dict, sha256 of model.pt).

    path: a step or run directory. Raises as `resolve_checkpoint` and `verify_checkpoint`.
    """
    path = resolve_checkpoint(path)
    files = verify_checkpoint(path, skip_optimizer=True)
    record = read_json(path / "config.json")
    model = PoE.from_config(record["model"], load_tensors(path / "model.pt"), dtype)
    return model.to(device).freeze_for_inference(), record, files["model.pt"]


# --------------------------------------------------------------------------------------------------
# Saving and pruning

def sync(path):
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_manifest(path, files):
    """Write manifest.json of a checkpoint, {file: sha256}, whole or not at all."""
    write_json(path / "manifest.json", {"format": 1, "files": dict(sorted(files.items()))})
    sync(path)


def save_checkpoint(out, ranks, model, optimizer, record, state, tokenizer):
    """Save RUN/step-XXXXX whole or not at all: each rank the optimizer state that it owns, rank 0 the rest.
    Returns its path.

    optimizer: None saves none. record: the run's config.json. state: state.json. Raises SharedError or
    OSError, on a full disk for one, and then leaves everything before as it was.
    """
    final = out / f"step-{state['step']:05d}"
    temporary = out / f".tmp-{final.name}"
    # this rank's files
    written = [f"optim/rank-{ranks.rank:05d}.pt"] if optimizer else []
    try:
        with ranks.together():
            if ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                # not its parents: a run whose folder is gone must not go on in a part of it
                temporary.mkdir()
                (temporary / "optim").mkdir()
        with ranks.together():
            try:
                if optimizer:
                    torch.save(optimizer.state_dict(), temporary / written[0])
                if ranks.rank == 0:
                    torch.save(model.state_dict(), temporary / "model.pt")
                    write_json(temporary / "config.json", record | {"step": state["step"]})
                    write_json(temporary / "state.json", state)
                    texts = tokenizer.files()
                    for name, content in texts.items():
                        (temporary / name).write_bytes(content)
                    written += ["model.pt", "config.json", "state.json", *texts]
            except RuntimeError as e:
                # what torch.save raises when the disk is full
                raise OSError(str(e).splitlines()[0]) from None
            for name in written:
                sync(temporary / name)
            digests = {name: digest(temporary / name) for name in written}
        files = {}
        for of_rank in ranks.gather(digests):
            files |= of_rank
        with ranks.together():
            if ranks.rank == 0:
                write_manifest(temporary, files)
                sync(temporary / "optim")
                # there only where a resume found it damaged and trained that step again
                shutil.rmtree(final, ignore_errors=True)
                os.rename(temporary, final)
                sync(out)
    except (ValueError, OSError) as e:
        shutil.rmtree(temporary, ignore_errors=True)
        raise SharedError(f"{final} could not be written ({e}); the checkpoints before it are whole: "
                          f"free disk space, then train.py --resume {out}") from None
    return final


def drop_optimizer_state(out, step, keep, phase_ends):
    """Delete the optimizer state of the saves up to `step`, but of the newest `keep` and of `phase_ends`.

    keep: -1 or 0 keeps all.
    """
    # steps beyond were skipped as damaged: they must not count as the newest
    paths = [path for path in checkpoint_steps(out) if step_number(path) <= step]
    for path in paths[:-keep] if keep > 0 else []:
        if step_number(path) in phase_ends or not (path / "optim").exists():
            continue
        try:
            files = read_json(path / "manifest.json")["files"]
        except (OSError, ValueError, KeyError):
            # damaged: left as it is, for its owner to look at
            continue
        # the manifest first: a run that is killed between the two leaves files that nothing reads
        write_manifest(path, {name: files[name] for name in files if not name.startswith("optim/")})
        shutil.rmtree(path / "optim")


def place_seed(parent, files, out):
    """Put the files of a checkpoint into the new run `out` as its first: hard links where possible, else
    copies. config.json is written anew, because its paths are relative to the run.
    """
    record = read_record(parent)
    final = out / f"step-{record['step']:05d}"
    temporary = out / f".tmp-{final.name}"
    for name in files:
        target = temporary / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            # the file itself where it is a symbolic link, as caches have them
            os.link(os.path.realpath(parent / name), target)
        except OSError:
            # another file system
            shutil.copyfile(parent / name, target)
            sync(target)
    write_json(temporary / "config.json", recorded_in(out, record))
    write_manifest(temporary, files | {"config.json": digest(temporary / "config.json")})
    for folder in {(temporary / name).parent for name in files}:
        sync(folder)
    os.rename(temporary, final)
    sync(out)


# --------------------------------------------------------------------------------------------------
# Resuming

def newest_whole(out, ranks, reset_at=None):
    """The newest checkpoint of a run that it can go on from, or None before the first save; says which are
    skipped.

    reset_at: the step whose optimizer state is not needed. The ranks share the work of hashing. Raises
    SharedError where there are checkpoints and none serves.
    """
    # a shared file system may show them late elsewhere
    paths = ranks.gather(checkpoint_steps(out))[0]
    for path in reversed(paths):
        try:
            with ranks.together():
                files = verify_checkpoint(path, first=ranks.rank, every=ranks.world_size)
                if step_number(path) != reset_at and not any(name.startswith("optim/") for name in files):
                    raise ValueError(f"{path} holds no optimizer state (see --keep-optim)")
            return path
        except (ValueError, OSError) as e:
            if ranks.rank == 0:
                print(f"skipping: {e}", flush=True)
    if paths:
        raise SharedError(f"no checkpoint in {out} is whole: restore one from a copy, or start another --out")
    return None


def restore(path, model, optimizer):
    """Load a checkpoint's weights and the optimizer state that this rank owns, from any number of ranks'
    files.
    """
    model.load_state_dict(load_tensors(path / "model.pt"))
    if optimizer:
        state = {}
        for name in read_json(path / "manifest.json")["files"]:
            if name.startswith("optim/"):
                # mapped: a rank reads from the disk only what it owns
                state.update(load_tensors(path / name))
        optimizer.load_state_dict(state)


# --------------------------------------------------------------------------------------------------
# The run's log

def read_log(path):
    """The entries of a log.jsonl, dicts with `kind` and `step`; the last line that a killed run left half is
    left out.
    """
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    entries = []
    for line in lines:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


class RunLog:
    """RUN/log.jsonl, appended to by rank 0; on other ranks `write` does nothing.

    What a run that resumes at `step` writes again is cut off first. validated: steps whose validation is in
    the log.
    """

    def __init__(self, path, step, rank):
        self.file = None
        self.validated = set()
        if rank == 0:
            kept = [entry for entry in read_log(path)
                    if entry["step"] < step or (entry["step"] == step and entry["kind"] != "step")]
            write_whole(path, "".join(json.dumps(entry) + "\n" for entry in kept).encode())
            self.validated = {entry["step"] for entry in kept if entry["kind"] == "val"}
            self.file = open(path, "a", buffering=1)

    def write(self, kind, step, **entry):
        if self.file:
            self.file.write(json.dumps({"kind": kind, "step": step, **entry}) + "\n")

    def sync(self):
        """Flush to disk, so that a log is as long as its checkpoints say."""
        if self.file:
            os.fsync(self.file.fileno())
