"""
Generate text from a checkpoint with a KV cache: from the full product, from one stage, or from a prefix of stages.

    python sample.py runs/tiny --prompt "The capital of France is" --max-new-tokens 32 --temperature 0
    python sample.py runs/tiny/step-00300 --mode single --stage 0 --num-samples 3
    python sample.py runs/tiny --mode prefix --prefix 2 --json

A prompt is always encoded as bos + ordinary text; an empty one is bos alone. Generation stops at bos, which begins the next
document. Noise is a function of (seed, row, position), not of a generator's state: the same seed gives the same text whatever
else is generated beside it.

`generate` works on token ids; text exists only in `complete` and `main`.
"""
import codecs
import json
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dataloader import Tokenizer, clean_text
from flags import flag, parse_flags, run
from model import KVCache, attention_backends, choose_device, combine, load_checkpoint, resolve_checkpoint

MODES = ("full", "single", "prefix")


# ---------------------------------------------------------------------------------------------------------------
# Choosing a token

def _hash32(x):
    """A bijective 32-bit integer hash with low bias (C. Wellons, "hash prospector"), on int64 tensors."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def gumbel_noise(seed, rows, positions, vocab_size):
    """Standard Gumbel noise as a pure function of (seed, row, position, token): float64 (B, V).

    rows, positions: int64 (B,). argmax(log p + noise) is a draw from p, and the same draw wherever it is computed.
    """
    key = torch.full_like(rows, seed & 0xFFFFFFFF)
    for part in (torch.full_like(rows, seed >> 32 & 0xFFFFFFFF), rows, positions):
        key = _hash32(key ^ _hash32(part + 0x9E3779B9 & 0xFFFFFFFF))
    tokens = torch.arange(vocab_size, device=rows.device)
    bits = _hash32(_hash32(tokens * 0x9E3779B1 & 0xFFFFFFFF) ^ key[:, None])       # (B, V)
    uniform = (bits.double() + 0.5) / 2 ** 32                                   # in (0, 1)
    return -torch.log(-torch.log(uniform))


def choose(log_probs, temperature, top_k, top_p, seed, rows, positions):
    """Choose the next token of each row: int64 (B,). log_probs: float32 (B, V), nats, of the distribution to sample from.

    temperature 0 is argmax. Otherwise top-k, then top-p (the smallest set whose probability reaches top_p) at that temperature.
    rows, positions: int64 (B,), of the tokens chosen: the noise's coordinates.
    """
    if temperature == 0:
        return log_probs.argmax(dim=-1)
    scores = (log_probs - log_probs.max(dim=-1, keepdim=True).values) / temperature     # the best at 0: no temperature is too small
    if 0 < top_k < scores.size(-1):
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1.0:
        ordered, order = F.softmax(scores, dim=-1).sort(dim=-1, descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= top_p                      # the probability before it is enough already
        scores = scores.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    return (scores.double() + gumbel_noise(seed, rows, positions, scores.size(-1))).argmax(dim=-1)


# ---------------------------------------------------------------------------------------------------------------
# Decoding

def stages_of_mode(config, mode, stage=None, prefix=None):
    """Which heads a mode combines: a range of stages. The trunk runs up to the last. Raises ValueError on a stage or prefix that is not there."""
    K = config.n_stage
    for name, given, its_mode in (("--stage", stage, "single"), ("--prefix", prefix, "prefix")):
        if given is not None and mode != its_mode:
            raise ValueError(f"{name} {given} goes with --mode {its_mode}, not with --mode {mode}")
    if mode == "single":
        if stage is None or not 0 <= stage < K:
            raise ValueError(f"--mode single needs --stage from 0 to {K - 1}, not {stage}: this checkpoint has {K} stage{'s'[:K > 1]}")
        return range(stage, stage + 1)
    if mode == "prefix":
        if prefix is None or not 1 <= prefix <= K:
            raise ValueError(f"--mode prefix needs --prefix from 1 to {K}, not {prefix}: this checkpoint has {K} stage{'s'[:K > 1]}")
        return range(prefix)
    return range(K)


def next_log_probs(model, tokens, positions, cache, heads):
    """Run tokens (B, T) at positions (B, T) over the cache; return log-probabilities after the last one, float32 (B, V)."""
    x = x0 = model.embed(tokens)
    total = 0.0
    for k in range(heads[-1] + 1):
        x = model.stage(k, x, x0, tokens, cache)
        if k in heads:
            total = total + model.log_probs(k, x[:, -1])
    return combine(total, len(heads))


@torch.no_grad()
def generate(model, prompt, max_new_tokens, heads, n_rows=1, temperature=1.0, top_k=0, top_p=1.0, seed=0):
    """Yield the next token of each row, int64 (n_rows,), up to `max_new_tokens` times; rows are samples of one prompt.

    prompt: list of ids, beginning with bos. heads: see `stages_of_mode`. Raises ValueError when the context would overflow.
    Rows do not stop here: the caller drops what follows a row's bos.
    """
    context, device = model.config.sequence_len, model.cos.device
    if len(prompt) + max_new_tokens > context + 1:                              # the last token is never fed back
        left = context + 1 - len(prompt)
        raise ValueError(f"the prompt has {len(prompt)} tokens of a context of {context}: " + (
            f"{left} are left, so --max-new-tokens {max_new_tokens} is too many" if left > 0 else "it is too long; shorten it"))
    cache = KVCache(model.config, n_rows, min(context, len(prompt) + max_new_tokens), device, model.compute_dtype)
    rows = torch.arange(n_rows, device=device)
    tokens = torch.tensor([prompt], device=device).expand(n_rows, -1)           # (n_rows, T)
    positions = torch.arange(len(prompt), device=device).expand(n_rows, -1)
    for end in range(len(prompt), len(prompt) + max_new_tokens):
        cache.place(positions, end)
        log_probs = next_log_probs(model, tokens, positions, cache, heads)
        positions = torch.full((n_rows, 1), end, device=device)
        tokens = choose(log_probs, temperature, top_k, top_p, seed, rows, positions[:, 0])[:, None]
        yield tokens[:, 0]


def complete(model, tokenizer, prompt, max_new_tokens, heads, n_rows=1, on_text=None, **sampling):
    """Continue a text: a list of dicts (prompt, completion, token_ids, stopped), one per row. on_text: called with row 0's text as it comes.

    stopped is "bos" or "length". A character whose bytes are not complete is held back until they are.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    ids, open_rows = [[] for _ in range(n_rows)], set(range(n_rows))
    for tokens in generate(model, tokenizer.encode(prompt), max_new_tokens, heads, n_rows, **sampling):
        for row, token in enumerate(tokens.tolist()):
            if row in open_rows:
                if token == tokenizer.bos:
                    open_rows.discard(row)
                    continue
                ids[row].append(token)
                if row == 0 and on_text:
                    on_text(decoder.decode(tokenizer.decode_bytes([token])))
        if not open_rows:
            break
    if on_text:
        on_text(decoder.decode(b"", final=True))
    return [{"prompt": prompt, "completion": tokenizer.decode(ids[row]), "token_ids": ids[row],
             "stopped": "length" if row in open_rows else "bos"} for row in range(n_rows)]


# ---------------------------------------------------------------------------------------------------------------
# Command line

@dataclass(frozen=True)
class SampleConfig:
    prompt: str = flag("", "text to continue; empty is bos alone: a new document")
    mode: str = flag("full", "which experts speak: full, single (--stage) or prefix (--prefix)", choices=MODES)
    stage: int = flag(None, "the one stage of --mode single, counted from 0")
    prefix: int = flag(None, "how many first stages --mode prefix combines, 1 to K")
    max_new_tokens: int = flag(64, "tokens to generate at most")
    temperature: float = flag(0.8, "0 is greedy; 1 samples the model's own distribution")
    top_k: int = flag(0, "sample among the k most probable tokens (0 = all)")
    top_p: float = flag(1.0, "sample among the most probable tokens that hold this probability together (1 = all)")
    num_samples: int = flag(1, "samples of the prompt")
    seed: int = flag(0, "of the noise; the same seed gives the same text")
    device: str = flag(None, "cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    dtype: str = flag(None, "compute dtype (default: bfloat16 on cuda, else float32)", choices=("float32", "bfloat16", "float64"))
    json: bool = flag(False, "print one JSON object per sample: prompt, completion, token_ids, stopped")

    def __post_init__(self):
        for name, ok, must in (("temperature", 0 <= self.temperature < float("inf"), "be 0 or more"),
                               ("top_k", self.top_k >= 0, "be 0 or more"), ("top_p", 0 < self.top_p <= 1, "be above 0 and at most 1"),
                               ("num_samples", 1 <= self.num_samples <= 10 ** 6, "be from 1 to 1,000,000"),
                               ("max_new_tokens", self.max_new_tokens >= 1, "be at least 1"), ("seed", self.seed >= 0, "be 0 or more")):
            if not ok:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must {must}")


def main(argv=None):
    given = parse_flags(SampleConfig, __doc__, argv, positionals=[("checkpoint", None, "a step-XXXXX directory, or a run: its newest")])
    path = resolve_checkpoint(given.pop("checkpoint"))
    config = SampleConfig(**given)
    device, dtype = choose_device(config.device, config.dtype)
    model, record, _ = load_checkpoint(path, device, dtype)
    tokenizer = Tokenizer.load(path)
    if tokenizer.sha256 != record["tokenizer"]["sha256"]:
        raise ValueError(f"the tokenizer in {path} is not the one that its config.json names; use another step")
    heads = stages_of_mode(model.config, config.mode, config.stage, config.prefix)
    prompt, streaming = clean_text(config.prompt), not config.json and config.num_samples == 1     # argv may not be UTF-8
    if streaming:
        print(prompt, end="", flush=True)
    with attention_backends(device):
        samples = complete(model, tokenizer, prompt, config.max_new_tokens, heads, config.num_samples,
                           on_text=(lambda text: print(text, end="", flush=True)) if streaming else None,
                           temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, seed=config.seed)
    if streaming:
        print()
    for number, sample in enumerate(() if streaming else samples):
        print(json.dumps(sample) if config.json else f"--- sample {number} ---\n{prompt}{sample['completion']}")


if __name__ == "__main__":
    run(main)
