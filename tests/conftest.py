"""What the tests share: the import path, one torch thread (small tensors gain nothing from more), a small corpus and a trained run."""
import json
import random
import sys
import traceback
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

import train  # noqa: E402
from dataloader import Tokenizer, write_shard  # noqa: E402

SMALL = ["--n-layer", "4", "--n-embd", "12", "--n-head", "3", "--n-kv-head", "1", "--mlp-hidden", "20", "--stage-layers", "2,1,1",
         "--sequence-len", "16", "--vocab-size", "300", "--total-batch-tokens", "64", "--device-batch-size", "2", "--dtype", "float64",
         "--device", "cpu", "--warmup-steps", "2", "--eval-tokens", "320", "--num-steps", "6", "--save-every", "3"]


def said_by_us(output):
    """What a rank printed, without the lines in which the Gloo of torch 2.9 tells of its connections."""
    return "".join(line for line in output.splitlines(keepends=True) if not line.startswith("[Gloo] "))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of token shards: two sources of random words, 300 ids."""
    folder, tokenizer, draw = tmp_path_factory.mktemp("data"), Tokenizer.load(vocab_size=300), random.Random(0)
    words = ["the", "of", "naïve", "stage", "expert", "in", "a\n", "is", "12", "x = y"]
    sources = []
    for name, weight in (("prose", 70), ("code", 30)):
        row = {"name": name, "weight": weight}
        for split, documents in (("train", 40), ("val", 12)):
            texts = [" ".join(draw.choices(words, k=40)) for _ in range(documents)]
            tokens = tokenizer.encode_documents(texts)
            write_shard(folder / f"{name}-{split}-00000.bin", tokens, documents, tokenizer)
            row[split] = [{"file": f"{name}-{split}-00000.bin", "tokens": len(tokens)}]
        sources.append(row)
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "sources": sources}))
    return folder


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """A run of six steps with checkpoints step-00003 and step-00006, float64. Read only: copy it to change it."""
    out = tmp_path_factory.mktemp("runs") / "small"
    train.main([*SMALL, "--data", str(data), "--out", str(out)])
    return out


@pytest.fixture
def refused(capsys):
    """Call a script's main in-process as the shell would; assert exit code 2 and one line on stderr; return that line."""
    from common import run

    def call(main, *argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run(lambda: main([str(a) for a in argv]))
        code, lines, error = stopped.value.code, capsys.readouterr().err.splitlines(), stopped.value
        while error:            # a process of its own would close the run's lock at its end; here the exceptions' frames hold it
            traceback.clear_frames(error.__traceback__)
            error = error.__context__
        assert code == 2 and len(lines) == 1, lines
        return lines[0]
    return call
