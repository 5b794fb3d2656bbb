"""
What every script here needs around its work: flags, one-line errors, the device, torchrun's ranks, whole
files.

A script's config is one frozen dataclass. Its field `peak_lrm` is the flag `--peak-lrm`; the metadata key
`help` says what it is, with its unit. Only the flags that were given come back, so that a script can lay them
over a preset or a checkpoint's config. Bad input raises ValueError or OSError anywhere, and `run` turns that
into one line and exit code 2.

torch is imported where it is used, so that the worker processes of data/prepare.py do without it.
"""
import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import inspect
import math
import os
import re
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

# --------------------------------------------------------------------------------------------------
# Flags

def flag(default, help, **more):
    """A dataclass field that is also a flag. default None: the help says where the value comes from.

    more: choices, a tuple; low and high, the bounds of a number; path=True where it names a file or folder.
    """
    return dataclasses.field(default=default, metadata={"help": help, **more})


@dataclasses.dataclass(frozen=True)
class DeviceFlags:
    """The flags of every script that computes."""
    device: str = flag(None, "cpu, cuda, cuda:1, ... (default: cuda where there is one; under torchrun each "
                             "rank its own)")
    dtype: str = flag(None, "compute dtype; training keeps float32 weights (default: bfloat16 on cuda, else "
                            "float32)",
                      choices=("float32", "bfloat16", "float64"))


def is_first_rank():
    return os.environ.get("RANK", "0") == "0"


def spelled(name):
    """The flag of a dataclass field: peak_lrm is --peak-lrm, and import_ (a word of Python) is --import."""
    return "--" + name.rstrip("_").replace("_", "-")


class _Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n" if is_first_rank() else None)


def _converter(kind, path=False, low=-math.inf, high=math.inf, **_):
    """What makes a value of a flag's text, by the flag's type and metadata."""
    def convert(text):
        # as of a shell's unset variable
        if path and not text:
            raise argparse.ArgumentTypeError("an empty path; name a file or folder, or leave the flag out")
        value = kind(text)
        if kind is not str and not low <= value <= high:
            bounds = f"from {low} to {high}" if high < math.inf else f"at least {low}"
            raise argparse.ArgumentTypeError(f"{text} must be {bounds}")
        return value
    # argparse names it where `kind` refuses the text
    convert.__name__ = kind.__name__
    return convert


def _add_flags(parser, cls, positionals):
    for name, nargs, help in positionals:
        parser.add_argument(name, nargs=nargs, help=help, type=_converter(str, path=True))
    for field in dataclasses.fields(cls):
        help = field.metadata["help"]
        if field.default is not None:
            help += f" (default: {field.default if field.default != '' else 'empty'})"
        if field.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        else:
            kind = dict(type=_converter(field.type, **field.metadata), choices=field.metadata.get("choices"))
        help = help.replace("%", "%%")
        parser.add_argument(spelled(field.name), dest=field.name, default=argparse.SUPPRESS, help=help,
                            **kind)


def parse_flags(cls, description, argv=None, positionals=()):
    """Parse `argv` by dataclass `cls`; return {field: value} of the flags that were given, positionals
    included.

    positionals: tuples (name, nargs, help). Exits with code 2 and one line on a bad flag.
    """
    parser = _Parser(description=description)
    _add_flags(parser, cls, positionals)
    return vars(parser.parse_args(argv))


def parse_command(commands, description, argv=None):
    """As `parse_flags` for a script with subcommands: return (name of the command, what was given).

    commands: {name: (function, dataclass, positionals)}; a command's --help is the docstring of its function.
    """
    parser = _Parser(description=description)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="|".join(commands))
    for name, (function, cls, positionals) in commands.items():
        text = inspect.cleandoc(function.__doc__)
        subparser = subparsers.add_parser(name, description=text, help=text.splitlines()[0])
        _add_flags(subparser, cls, positionals)
    given = vars(parser.parse_args(argv))
    return given.pop("command"), given


# --------------------------------------------------------------------------------------------------
# The device and the ranks

# seconds after which a rank says that it waits for others
PATIENCE = 10


def choose_device(device, dtype, ranks=None):
    """(torch.device, torch.dtype) from their names; the current CUDA device is set.

    None takes cuda where there is one, and bfloat16 there or float32 elsewhere. ranks: under torchrun each
    rank takes the GPU of its local rank. Raises ValueError where there is no such device.
    """
    import torch
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device or "cpu"):
        raise ValueError(f"--device {device} is not one of cpu, cuda, cuda:0, cuda:1, ...")
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda":
        if ranks and ranks.world_size > 1:
            if chosen.index is not None:
                raise ValueError(f"--device {device} is one GPU for {ranks.world_size} ranks; leave it out")
            chosen = torch.device("cuda", ranks.local_rank)
        if (chosen.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"{chosen} is not there: this machine has {torch.cuda.device_count()} CUDA "
                             f"devices")
        torch.cuda.set_device(chosen.index or 0)
    return chosen, getattr(torch, dtype or ("bfloat16" if chosen.type == "cuda" else "float32"))


class SharedError(ValueError):
    """An error that every rank raises with the same text, so that rank 0 alone prints it."""


class Ranks:
    """The processes that torchrun started for this script; without torchrun this process alone, and every
    method costs nothing.

    Collectives go over gloo on the CPU and over NCCL on CUDA. Where a rank dies, its closed connections end
    the collectives of the others; one that merely stops ends them after 30 minutes. torchrun ends the
    siblings of a rank that failed.
    """

    def __init__(self):
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if self.world_size > 1:
            import torch
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            text = f"rank {self.rank} still waits for the others of WORLD_SIZE={self.world_size}, which " \
                   f"torchrun sets; unset it where it is left over\n"
            waiting = threading.Timer(PATIENCE, os.write, (2, text.encode()))
            waiting.daemon = True
            waiting.start()
            torch.distributed.init_process_group(backend, timeout=timedelta(minutes=30))
            waiting.cancel()
            # torchrun's count is each node's own
            self.restarted = any(self.gather(self.restarted))

    def gather(self, value):
        """Every rank's value, in order of rank, on every rank. Small Python values, sent over the CPU."""
        if self.world_size == 1:
            return [value]
        import torch
        values = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    @contextlib.contextmanager
    def together(self):
        """Run a block without collectives; where it fails on one rank with ValueError or OSError, all ranks
        raise SharedError.
        """
        error = None
        try:
            yield
        except (ValueError, OSError) as e:
            if self.world_size == 1:
                raise
            error = e
        messages = self.gather(error and str(error))
        failed = [rank for rank, message in enumerate(messages) if message is not None]
        if failed:
            where = f" (rank {failed[0]})" if len(failed) < self.world_size else ""
            raise SharedError(messages[failed[0]] + where) from error

    def close(self):
        """Leave the process group when the work is done."""
        if self.world_size > 1:
            import torch
            torch.distributed.destroy_process_group()


def discard_stdout():
    """Let what is printed from here on go nowhere: its reader left."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(main):
    """Call a script's `main()`; end with one clear line and exit code 2 on bad input, quietly on Ctrl-C or a
    closed pipe.

    ValueError and OSError are what wrong flags, files and checkpoints raise here, ModuleNotFoundError what a
    missing extra does; anything else is our bug and keeps its traceback.
    """
    name = os.path.basename(sys.argv[0])
    code = 0
    if sys.stdout:
        # a terminal that is not UTF-8 shall not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        print(end="", flush=True)
    except BrokenPipeError:
        discard_stdout()
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        code = 130
    except (ValueError, OSError, ModuleNotFoundError) as error:
        code = 2
        remedy = f"; pip install {error.name}" if isinstance(error, ModuleNotFoundError) else ""
        if is_first_rank() or not isinstance(error, SharedError):
            print(f"{name}: error: {' '.join(str(error).split())}{remedy}", file=sys.stderr)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        code = 2
        print(f"{name}: error: out of memory; take smaller batches or a smaller model", file=sys.stderr)
    if code and "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
        # threads of the collectives may still wait for other ranks: end without them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


class Progress:
    """How far a piece of work is and when it will be done, on stderr: on a terminal one line with a bar, else
    a line every ten seconds.
    """
    label = None

    def __call__(self, label, done, total):
        now = time.monotonic()
        if label != self.label:
            self.label = label
            self.begun = self.shown = now
        terminal = sys.stderr.isatty()
        if now - self.shown > (0.2 if terminal else 10) or terminal and done == total:
            self.shown = now
            eta = (now - self.begun) / max(done, 1) * (total - done)
            bar = f"\r[{'#' * (20 * done // total):<20}] " if terminal else ""
            end = "" if terminal and done < total else "\n"
            print(f"{bar}{label} {done:,} of {total:,} eta:{eta:.0f}s  ", end=end, file=sys.stderr,
                  flush=True)


# --------------------------------------------------------------------------------------------------
# Files

def sha256_of(path):
    """Hex sha256 of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_whole(path, *parts):
    """Write a file (parts: bytes-like), whole or not at all: what gets its name is on the disk already."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "wb") as f:
        f.writelines(parts)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def lock(folder):
    """Make a folder and hold it for this process; returns what holds it, until it is closed or the process
    ends.

    Raises ValueError where another process holds it, OSError where it cannot be made.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process is writing into {folder}; wait for it, or name another") from None
    return file
