"""
Readers of text corpora: parquet, JSON lines and plain text, packed or not. Used by data/prepare.py.

    file --read_records--> (number, function that gives the record's field) --text_of--> document (str)

Extras: pyarrow for parquet, backports.zstd for .zst before Python 3.14.
"""
import importlib
import itertools
import json
import lzma
import re
import sys
import zlib
from functools import partial

ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
# by the ends of files' names
PACKAGES = {"parquet": "pyarrow.parquet", "gz": "gzip", "xz": "lzma", "zst": ZSTD}
# bytes of the longest JSON line that is read
MAX_LINE = 1 << 26
# rows of parquet that are held at a time
ROWS = 16


def format_of(path):
    """(format, compression or None) of a file by its name, or None when it is not one that is read here."""
    match = re.fullmatch(r"[^.].*\.(parquet|jsonl|ndjson|json|txt)(?:\.(gz|xz|zst))?", path.name.lower())
    return match and match.groups()


def require(package):
    """Import an extra package and return it. Raises ValueError where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.removesuffix(".parquet")
        raise ValueError(f"the package {name} is missing; pip install {name}") from None


def corruption():
    """The errors that reading on raises where a file is corrupt; others are our bugs."""
    errors = [OSError, EOFError, ValueError, NotImplementedError, zlib.error, lzma.LZMAError]
    # once a file needed it
    if sys.modules.get(ZSTD):
        errors.append(sys.modules[ZSTD].ZstdError)
    return tuple(errors)


def read_records(path, raw, field):
    """Yield (number, function) of the records of a file, open for reading as `raw`.

    The function returns the record's field of that name, or its "text", as it is there: str, bytes or a list,
    None where there is none. It raises ValueError or RecursionError where the record is bad; where the file
    is corrupt, reading on raises one of `corruption`. Numbers count from 1; those of JSON are of lines.
    """
    format, packed = format_of(path)
    f = require(PACKAGES[packed]).open(raw) if packed else raw
    if format == "txt":
        content = f.read()
        yield 1, partial(content.decode, "utf-8-sig")
    elif format == "parquet":
        for number, value in enumerate(_read_column(f, field), 1):
            yield number, value.as_py
    else:
        for number in itertools.count(1):
            line = f.readline(MAX_LINE + 1)
            rest = line
            while len(rest) > MAX_LINE and not rest.endswith(b"\n"):
                rest = f.readline(MAX_LINE + 1)
            if not line:
                return
            if not line.isspace():
                yield number, partial(_parse_line, line, field)


def _read_column(f, field):
    file = require(PACKAGES["parquet"]).ParquetFile(f, pre_buffer=False, buffer_size=1 << 20)
    names = file.schema_arrow.names
    column = field if field in names else "text"
    if column not in names:
        raise ValueError(f"no column {field!r}; it has {', '.join(names)}")
    # each row group alone: where one is corrupt, the rows before it are kept
    for group in range(file.num_row_groups):
        for batch in file.iter_batches(ROWS, [group], [column]):
            yield from batch.column(0)


def _parse_line(line, field):
    if len(line) > MAX_LINE:
        raise ValueError(f"longer than {MAX_LINE:,} bytes; split it, or make it a .txt file")
    # json.loads alone would let lone surrogates in its bytes pass
    record = json.loads(line.decode("utf-8-sig"))
    return record.get(field, record.get("text")) if isinstance(record, dict) else None


def text_of(value):
    """The document in a record's field: text, its UTF-8 bytes, or messages. Raises ValueError without one."""
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, list):
        value = render_chat(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError("no text in this field, or an empty one")
    return value


def render_chat(messages):
    """Render a conversation: "User: ...", "Assistant: ...", "System: ...", an empty line between them.

    messages: a list of {"role", "content"} or {"from", "value"}; human and gpt are User and Assistant.
    Returns None for any other list.
    """
    names = {"human": "User", "gpt": "Assistant"}
    turns = []
    for message in messages:
        fields = message if isinstance(message, dict) else {}
        role = fields.get("role", fields.get("from"))
        text = fields.get("content", fields.get("value"))
        if not isinstance(role, str) or not isinstance(text, str):
            return None
        if text.strip():
            turns.append(f"{names.get(role, role.capitalize())}: {text.strip()}")
    return "\n\n".join(turns)
