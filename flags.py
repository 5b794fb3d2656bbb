"""
What every script here needs around its work: command-line flags from a dataclass, one-line errors, and the ranks of torchrun.

A script's config is one dataclass. Field `peak_lrm` is the flag `--peak-lrm`; the metadata key `help` says what it is, with
its unit. Only the flags that were given come back, so that a script can lay them over a preset or a checkpoint's config.
"""
import argparse
import contextlib
import dataclasses
import os
import secrets
import socket
import sys
import threading
import time

BEAT, SILENCE = 1.0, 30.0       # seconds between a rank's signs of life; seconds without one after which it is taken for dead


def flag(default, help, **more):
    """A dataclass field that is also a flag. default None: the help says where the value comes from instead."""
    return dataclasses.field(default=default, metadata={"help": help, **more})


def spelled(name):
    """The flag of a dataclass field: peak_lrm is --peak-lrm."""
    return "--" + name.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n" if _rank() == 0 else None)


def parse_flags(cls, description, argv=None, positionals=()):
    """Parse `argv` by dataclass `cls`; return {field: value} of the flags that were given, positionals included.

    positionals: tuples (name, nargs, help). Exits with code 2 and one line on a bad flag.
    """
    parser = _Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, nargs, help in positionals:
        parser.add_argument(name, nargs=nargs, help=help)
    for f in dataclasses.fields(cls):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(
            type=f.type, choices=f.metadata.get("choices"), metavar=f.metadata.get("metavar"))
        shown = "" if f.default is None else f" (default: {f.default if f.default != '' else 'empty'})"
        parser.add_argument(spelled(f.name), default=argparse.SUPPRESS,
                            help=(f.metadata["help"] + shown).replace("%", "%%"), **kind)
    return vars(parser.parse_args(argv))


def check_types(cls, values):
    """Raise ValueError where a value, say from a file, is not what dataclass `cls` declares; None is for fields whose default it is."""
    for field in dataclasses.fields(cls):
        value = values.get(field.name, field.default)
        kinds = (int, float) if field.type is float else (field.type,)
        if value is not None and value not in (field.metadata.get("choices") or (value,)):
            raise ValueError(f"{field.name} is {value!r} there, not one of {', '.join(field.metadata['choices'])}")
        if not (value is None and field.default is None) and type(value) not in kinds:
            raise ValueError(f"{field.name} is {value!r} there, not {'a number' if field.type is float else 'of type ' + field.type.__name__}")


def _rank():
    return int(rank) if (rank := os.environ.get("RANK", "0")).isdecimal() else 0


class Ranks:
    """The processes that torchrun started for this script; without it, this process alone, and every method costs nothing.

    Collectives go over gloo on the CPU and over NCCL on CUDA. A thread gives the other ranks a sign of life every BEAT seconds, and
    ends this process, naming the rank, when one has been silent for SILENCE seconds: a collective on a GPU would wait for it for ever.
    Raises ValueError where the environment is not torchrun's.
    """

    current = None      # the one that this process made and has not closed, for `run`
    made = False        # whether it ever made one

    def __init__(self):
        self.rank, self.world_size, self.local_rank, place = self.environment()
        self.restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if self.world_size == 1:
            return
        import torch                                                        # not needed by a script that is only asked for --help
        from torch import distributed
        Ranks.made = True
        self.distributed = distributed
        self.keeps_store = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"      # torchrun's agent does elsewhere
        self.rendezvous = f"rendezvous at {place[0]}:{place[1]}"
        try:
            store = distributed.TCPStore(*place, is_master=self.keeps_store, wait_for_workers=False)
        except RuntimeError as e:
            raise ValueError(f"rank {self.rank} finds no {self.rendezvous} ({str(e).splitlines()[0]}); set MASTER_ADDR and MASTER_PORT to a free port "
                             f"of rank 0's machine, or use torchrun") from None
        meeting = self._meet(store)
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", rank=self.rank, world_size=self.world_size,
                                       store=distributed.PrefixStore(meeting, store))
        self.store = distributed.PrefixStore(meeting + "/beat", distributed.TCPStore(*place, is_master=False, wait_for_workers=False))
        self.names = self.gather(f"rank {self.rank} on {socket.gethostname()}")
        self.restarted = any(self.gather(self.restarted))                   # torchrun's count is each node's own
        self.heard = {}         # rank -> (its last beat, when it came)
        self._beat("0")
        self.gather(None)
        self.closed, self.left = threading.Event(), threading.Event()       # no longer watching; no longer using the store
        self.watcher, self.watched = threading.Thread(target=self._watch, daemon=True), time.monotonic()
        self.watcher.start()
        threading.Thread(target=self._watch_store, daemon=True).start()
        Ranks.current = self

    @staticmethod
    def environment():
        """(rank, world size, local rank, (address, port) of the store or None) as torchrun sets them."""
        try:
            rank, world_size, local_rank = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
            place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])) if world_size > 1 else None
            if not 0 <= rank < world_size or (place and not 0 < place[1] < 65536):
                raise ValueError(f"rank {rank} of {world_size}, meeting at {place}")
            return rank, world_size, local_rank, place
        except (KeyError, ValueError) as e:
            raise ValueError(f"RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are not as torchrun sets them ({e}); unset them or use "
                             f"torchrun") from None

    def _meet(self, store):
        """Agree on a name with the ranks that are alive now, and with no others: the prefix of all that they put into `store`.

        torchrun keeps one store through its restarts, with what dead ranks left in it, and no count of restarts is common to all nodes.
        So each rank writes a word of its own; rank 0 reads them all out; each repeats the list in which its word is; when all have
        repeated the same list, rank 0 declares it. Raises TimeoutError after ten minutes.
        """
        def keys(what):
            return [f"{what}/{rank}" for rank in range(self.world_size)]
        word, end = secrets.token_hex(8), time.monotonic() + 600
        store.set(f"word/{self.rank}", word)
        while time.monotonic() < end:
            if self.rank == 0 and store.check(keys("word")):
                store.set("list", b" ".join(store.multi_get(keys("word"))).decode())
            if store.check(["list"]) and word in (words := store.get("list").decode()):
                store.set(f"repeated/{self.rank}", words)
                if self.rank == 0 and store.check(keys("repeated")) and {*store.multi_get(keys("repeated"))} == {words.encode()}:
                    store.set("declared", words)
                if store.check(["declared"]) and store.get("declared").decode() == words:
                    return words.replace(" ", "-")
            time.sleep(0.05)
        raise TimeoutError(f"rank {self.rank} waited ten minutes for the other {self.world_size - 1} ranks; look at their machines, then start again")

    def device_name(self, device):
        """The --device of this rank: each takes the GPU of its local rank."""
        import torch
        if self.world_size > 1 and (device or "cuda").startswith("cuda") and torch.cuda.is_available():
            if device not in (None, "cuda"):
                raise ValueError(f"--device {device} is one GPU for {self.world_size} ranks; leave it out, and each takes the GPU of its local rank")
            return f"cuda:{self.local_rank}"
        return device

    def gather(self, value):
        """Every rank's value, in order of rank, on every rank. Small Python values; they travel over the CPU."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        self.distributed.all_gather_object(values, value)
        return values

    @contextlib.contextmanager
    def agree(self):
        """Run a block without collectives on every rank; where it fails on one with ValueError or OSError, ValueError is raised on all."""
        if self.world_size == 1:
            yield
            return
        error = None
        try:
            yield
        except (ValueError, OSError) as e:
            error = e
        errors = self.gather(error and str(error))
        failed = [rank for rank, message in enumerate(errors) if message is not None]
        if isinstance(error, BrokenPipeError):
            raise error                                                     # this rank's own reader left: `run` ends it quietly
        if failed:
            raise ValueError(errors[failed[0]] + (f" ({self.names[failed[0]]})" if len(failed) < self.world_size else "")) from error

    @contextlib.contextmanager
    def together(self):
        """As `agree`, but all ranks end, and rank 0 alone says why."""
        with self.alike(), self.agree():
            yield

    @contextlib.contextmanager
    def alike(self):
        """Run a block that does the same on every rank: where it fails, it fails on all, and rank 0 alone says why."""
        try:
            yield
        except (ValueError, OSError):
            self.close()
            if self.rank == 0:
                raise
            sys.exit(2)

    def _beat(self, beat):
        self.store.set(str(self.rank), beat)

    def _listen(self):
        """Note who has been heard of; return the ranks' silences in seconds."""
        now, others = time.monotonic(), [r for r in range(self.world_size) if r != self.rank]
        for rank, beat in zip(others, self.store.multi_get([str(r) for r in others])):
            if self.heard.get(rank, (None,))[0] != beat or beat == b"end":
                self.heard[rank] = beat, now
        return self._silences()

    def _silences(self):
        return {rank: time.monotonic() - when for rank, (_, when) in self.heard.items()}

    def _end(self, who, why):
        print(f"{os.path.basename(sys.argv[0])}: error: {who} {why}; this rank ends too (--resume goes on from the last checkpoint)",
              file=sys.stderr, flush=True)
        os._exit(1)

    def _watch_store(self):
        """End this process where a call of the store does not return, as none does whose process is stopped or whose machine is cut off.

        Silence is counted in this thread's own turns: where the whole process stood still, nothing is to be said of the store.
        """
        seen, turns = None, 0
        while not self.left.wait(BEAT):
            turns, seen = turns + 1 if seen == self.watched else 0, self.watched
            if turns * BEAT > SILENCE:
                self._end(f"the {self.rendezvous}", f"has not answered for {SILENCE:.0f} s")

    def _watch(self):
        while not self.closed.wait(BEAT):
            if time.monotonic() - self.watched > SILENCE:                   # this process stood still itself: nobody was heard meanwhile
                self.heard.clear()
            self.watched = time.monotonic()
            why = f"has not been heard of for {SILENCE:.0f} s: it died, or its machine is gone"
            try:
                self._beat(str(time.monotonic()))
                dead = [self.names[rank] for rank, silence in self._listen().items() if silence > SILENCE]
            except RuntimeError:
                dead, why = [f"the {self.rendezvous}"], "is gone, with its process or its machine"
            if dead and not self.closed.is_set():
                self._end(", ".join(dead), why)

    def stop_watching(self):
        """End the watching thread: one that Python's end finds inside a call of the store would abort the process."""
        self.closed.set()
        self.watcher.join(timeout=5 * BEAT)

    def dead(self):
        """The names of the ranks that are silent for seconds, after a collective has failed. Rank 0, which may keep the store, listens longest."""
        self.stop_watching()
        silent, end = self._silences(), time.monotonic() + (5 if self.rank else 7) * BEAT
        with contextlib.suppress(RuntimeError):                             # the store is gone: what was heard until then must do
            while time.monotonic() < end:
                self.watched = time.monotonic()
                self._beat(str(time.monotonic()))
                silent = self._listen()
                time.sleep(BEAT / 2)
            self._beat("end")                                               # this rank leaves, it did not die
        return [self.names[rank] for rank, silence in silent.items() if silence > 4 * BEAT]

    def close(self):
        """Leave: the others no longer wait to hear of this rank. Who keeps the store waits some seconds for them to leave it."""
        if Ranks.current is self:
            self.stop_watching()
            self.watched = time.monotonic()
            with contextlib.suppress(RuntimeError):                         # where rank 0 keeps the store, it may be gone already
                self._beat("end")
                end, ranks = time.monotonic() + 5 * BEAT, [str(r) for r in range(self.world_size)]
                while self.keeps_store and {*self.store.multi_get(ranks)} != {b"end"} and time.monotonic() < end:
                    time.sleep(0.02)
            self.left.set()
            self.distributed.destroy_process_group()
            Ranks.current = None


def discard_stdout():
    """Let what is printed from here on go nowhere: its reader left."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(main):
    """Call a script's `main()`; end with one clear line and exit code 2 on bad input, quietly on Ctrl-C or a closed pipe.

    ValueError and OSError are what wrong flags, files and checkpoints raise here; anything else is our bug and keeps its traceback.
    """
    name, code = os.path.basename(sys.argv[0]) + (f": rank {_rank()}" if _rank() else ""), 0
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")       # a terminal that is not UTF-8 shall not end a run
    try:
        main()
        print(end="", flush=True)
    except BrokenPipeError:
        discard_stdout()
    except SystemExit as done:
        if not Ranks.made:
            raise
        code = done.code or 0
    except (ValueError, OSError) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error):
            print(f"{name}: error: out of memory; lower --device-batch-size, --num-samples or the model's size", file=sys.stderr)
            code = 2
        elif Ranks.current and (dead := Ranks.current.dead()):
            print(f"{name}: error: {', '.join(dead)} died; this rank ends too (--resume goes on from the last checkpoint)", file=sys.stderr)
            code = 1
        else:
            raise
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        code = 130
    if Ranks.made:                                              # threads of the collectives may abort a process that takes its interpreter down
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(code)
    if code:
        sys.exit(code)
