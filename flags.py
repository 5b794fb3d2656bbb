"""
Command-line flags from a dataclass, and one-line errors. The only home of both; every script here uses it.

A script's config is one dataclass. Field `peak_lrm` is the flag `--peak-lrm`; the metadata key `help` says what it is, with
its unit. Only the flags that were given come back, so that a script can lay them over a preset or a checkpoint's config.
"""
import argparse
import dataclasses
import os
import sys


def flag(default, help, **more):
    """A dataclass field that is also a flag. default None: the help says where the value comes from instead."""
    return dataclasses.field(default=default, metadata={"help": help, **more})


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


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
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=(f.metadata["help"] + shown).replace("%", "%%"), **kind)
    return vars(parser.parse_args(argv))


def run(main):
    """Call a script's `main()`; end with one clear line and exit code 2 on bad input, quietly on Ctrl-C or a closed pipe.

    ValueError and OSError are what wrong flags, files and checkpoints raise here; anything else is our bug and keeps its traceback.
    """
    name = os.path.basename(sys.argv[0])
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")       # a terminal that is not UTF-8 shall not end a run
    try:
        main()
        print(end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # the reader left: nothing more to say
        sys.exit(0)
    except (ValueError, OSError) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError" and "allocate memory" not in str(error):
            raise
        print(f"{name}: error: out of memory; lower --device-batch-size, --num-samples or the model's size", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)
