"""
Readers of text corpora: parquet, JSON lines and plain text, packed or not, as documents that come in blocks. Used by data/prepare.py.

    file --read_records--> records --text_of--> a function that gives the text in blocks --in_pieces--> what is encoded at a time

No document is held twice, however long: a JSON line or a page of parquet is held once, and its text is decoded block by block.
Extras: pyarrow for parquet, backports.zstd for .zst before Python 3.14.
"""
import codecs
import gzip
import importlib
import itertools
import json
import lzma
import os
import re
import sys
import zlib

import numpy as np
try:
    zstd = importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")     # an extra before
except ImportError:
    zstd = None

from dataloader import PIECE, cut_text

BLOCK = 1 << 20                     # bytes, or characters, read or given to a worker at a time
LONG = 1 << 22                      # characters above which a document is encoded in pieces, and always trains
MAX_LINE = 1 << 28                  # bytes of a JSON line that is read, and of a row group of which 16 rows are held at a time
PARSED = 1 << 24                    # bytes of JSON that are parsed whole
LONG_STRING = 1024                  # bytes of a string that is taken out of a longer line
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) + ((zstd.ZstdError,) if zstd else ())     # of a corrupt file
JSON_PART = re.compile(rb'([^"]*+)("[^"\\\x00-\x1f]*+(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*+)*+")?')    # up to a string, a string
WHOLE = re.compile(r"(?:[^\\]++|\\[^u]|\\u(?![dD][89abAB])....|\\u....(?=.{6})(?:\\u[dD][c-fC-F]..)?+)*+", re.DOTALL)   # escapes, and pairs of them


def format_of(path):
    """The format and the compression of a file by its name, or None when it is not one that is read here."""
    match = re.fullmatch(r"[^.].*\.(parquet|jsonl|ndjson|json|txt)(?:\.(gz|xz|zst))?", path.name, re.IGNORECASE)
    return match and tuple((suffix or "").lower() for suffix in match.groups())


def cut(data):
    """Iterate over the blocks of a memoryview or an array."""
    return (data[i:i + BLOCK] for i in range(0, len(data), BLOCK))


def decoded(blocks, encoding="utf-8"):
    """Decode text that comes in blocks of bytes. Raises ValueError where it is not UTF-8."""
    decoder, done = codecs.getincrementaldecoder(encoding)(), 0
    for block in itertools.chain(blocks, [b""]):
        begin = done - len(decoder.getstate()[0])                           # of what is decoded now
        try:
            yield decoder.decode(block, final=not block)
        except UnicodeDecodeError as e:
            raise ValueError(f"'utf-8' codec can't decode byte {e.object[e.start]:#x} in position {begin + e.start}: {e.reason}") from None
        done += len(block)


def unescaped(blocks):
    """Undo the escapes of a JSON string that comes in blocks of text."""
    text = ""
    for block in itertools.chain(blocks, [None]):
        text += block or ""
        stop = len(text) if block is None else WHOLE.match(text).end()
        yield json.loads(f'"{text[:stop]}"')
        text = text[stop:]


def parse_line(line):
    """Parse a JSON line: (what it holds, a function that gives one of its texts in blocks).

    Parsed whole, a line can take 30 times its size. So of a line of more than PARSED bytes the long strings are taken out, each leaving
    a mark in its place; the rest is parsed, and where a text holds a mark, the string is decoded and unescaped in blocks."""
    if len(line) > MAX_LINE:
        raise ValueError(f"longer than {MAX_LINE:,} bytes; split it, or make it a .txt file")
    if len(line) <= PARSED:
        return json.loads(line.decode("utf-8-sig")), lambda text: [text]    # json.loads alone would let lone surrogates pass
    for _ in decoded(cut(line)):
        pass
    mark, strings, rest, stop = os.urandom(8).hex(), [], bytearray(), 0
    while stop < len(line):
        part = JSON_PART.match(line, stop)
        (start, end), stop = part.span(2), part.end()
        if start < 0 and stop < len(line):
            raise ValueError(f"the string at byte {stop:,} has no end, a wrong escape or a control character")
        if len(rest) + part.end(1) - part.start() > PARSED:
            raise ValueError(f"more than {PARSED:,} bytes beside its long strings; split it")
        rest += part[1]
        if end - start > LONG_STRING:
            rest += b'"%s%d;"' % (mark.encode(), len(strings))
            strings.append(memoryview(line)[start + 1:end - 1])
        else:
            rest += part[2] or b""

    def blocks(text):
        for i, part in enumerate(re.split(rf"{mark}(\d+);", text)):         # text, number of a string, text, ...
            yield from unescaped(decoded(cut(strings[int(part)]))) if i % 2 else [part]
    return json.loads(rest.decode("utf-8-sig")), blocks


def read_lines(f):
    """Yield (number, bytearray) of the lines that are not blank. One of more than MAX_LINE bytes is cut, and stays above MAX_LINE."""
    for number in itertools.count(1):
        line = part = bytearray(f.readline(BLOCK))
        while len(part) == BLOCK and not part.endswith(b"\n"):              # readline alone would hold a long line twice
            part = f.readline(BLOCK)
            line += part if len(line) <= MAX_LINE else b""
        if not line:
            return
        if not line.isspace():
            yield number, line


def read_parquet(f, field):
    """Yield (number, {field: value}) of the rows; "text" is read where there is no such column. Text is a view of its bytes, else as pyarrow has it."""
    import pyarrow.parquet                                                  # an extra
    file, number = pyarrow.parquet.ParquetFile(f, buffer_size=BLOCK, pre_buffer=False), itertools.count(1)
    column = field if field in file.schema_arrow.names else "text"
    if column not in file.schema_arrow.names:
        raise ValueError(f"no column {field!r}; it has {', '.join(file.schema_arrow.names)}")
    for group in range(file.num_row_groups):
        rows = 16 if file.metadata.row_group(group).total_byte_size < MAX_LINE else 1
        for batch in file.iter_batches(rows, [group], [column]):
            values = batch.column(0)
            if str(values.type) in ("string", "large_string", "binary", "large_binary"):
                values = values.cast(pyarrow.large_binary())                # text may not be UTF-8: that is one bad record
                _, ends, data = values.buffers()                            # views of these, since a value that pyarrow gives is a copy
                ends, data = np.frombuffer(ends, np.int64)[values.offset:][:len(batch) + 1], memoryview(data or b"")
                values = (data[start:end] for start, end in zip(ends, ends[1:]))
            for value in values:
                yield next(number), {field: value}
            batch = values = value = data = None                            # before the next batch is read


def read_records(path, raw, field):
    """Iterate over (number, record) of a file, open for reading as `raw`. A record is a JSON line in bytes, a dict, or a function that
    gives a text in blocks. Raises one of READ_ERRORS where the file is corrupt."""
    format, packed = format_of(path)
    f = {"gz": gzip, "xz": lzma, "zst": zstd}[packed].open(raw) if packed else raw

    def blocks():
        f.seek(0)
        return decoded(iter(lambda: f.read(BLOCK), b""), "utf-8-sig")
    return [(1, blocks)] if format == "txt" else read_parquet(f, field) if format == "parquet" else read_lines(f)


def render_chat(messages):
    """Render a conversation as plain text: "User: ...", "Assistant: ...", "System: ...", with an empty line between.

    messages: a list of {"role", "content"} or {"from", "value"}; human and gpt are User and Assistant. Raises ValueError otherwise."""
    names = {"human": "User", "gpt": "Assistant"}
    try:
        turns = [(m["role"], m["content"]) if "role" in m else (m["from"], m["value"]) for m in messages]
        return "\n\n".join(f"{names.get(role, role.capitalize())}: {text.strip()}" for role, text in turns if text.strip())
    except (TypeError, KeyError, AttributeError):
        raise ValueError("not a list of messages") from None


def text_of(record, source):
    """Find the text of a record: a function that gives it in blocks. Raises ValueError where the record has none."""
    if callable(record):
        return record
    record, blocks = parse_line(record) if isinstance(record, bytearray) else (record, lambda text: [text])
    field = source.get("chat") or source.get("text", "text")
    text = record.get(field, record.get("text")) if isinstance(record, dict) else None
    if hasattr(text, "as_py"):                                              # a list of parquet: text in it that is not UTF-8 is one bad record
        text = text.as_py()
    if isinstance(text, (bytes, memoryview)):
        return lambda: decoded(cut(text))
    if "chat" in source and isinstance(text, list):
        text = render_chat(text)
    if not isinstance(text, str):
        raise ValueError(f"no text field {field!r}")
    return lambda: blocks(text)


def in_pieces(blocks):
    """Cut a document, which comes in blocks of text: yield (text, part), "whole" or, beyond LONG characters, "first" and "next" pieces."""
    text, part = "", "whole"
    for block in blocks:
        text, start = text + block, 0
        while len(text) - start > (LONG if part == "whole" else PIECE):
            part, stop = "first" if part == "whole" else "next", cut_text(text, start)
            yield text[start:stop], part
            start = stop
        text = text[start:]
    if part == "whole" and (not text or text.isspace()):
        raise ValueError("an empty document")
    yield text, "whole" if part == "whole" else "next"
