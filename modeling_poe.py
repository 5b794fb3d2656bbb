"""
A published checkpoint in transformers: `CognicaPoEForCausalLM`, which publish.py puts beside model.py.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    model.generate(input_ids, max_new_tokens=32)                by the product of all stages
    model.generate(input_ids, max_new_tokens=32, prefix=2)      or stage=0, or poe_alpha=0.5
    model.generate_wand(input_ids)                              early exit by the checkpoint's own bounds
    model.generate_speculative(input_ids, draft_len=4)          the first stage drafts

The model is model.py's `PoE`; here is what transformers wants around it. Logits are log-probabilities: their
softmax is the model's distribution, so sampling, beams and scores mean what they always do. Weights come from
a checkpoint and lie on one device; to train, see train.py.
"""
import torch
import torch.nn.functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .model import KVCache, ModelConfig, PoE, combine, rotary_tables

# transformers' name of a cache, which it changed
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
# rows of a pass of several stages in `decode`, used or not, so that a row's bits depend on nothing beside it
TILE = 16


class CognicaPoEConfig(PretrainedConfig):
    """config.json: the shape by model.py's names (and transformers'), poe_alpha (see model.combine), and the
    bounds of WAND in nats, None where they were not measured.
    """
    model_type = "cognica_poe"
    attribute_map = {"max_position_embeddings": "sequence_len", "num_hidden_layers": "n_layer",
                     "hidden_size": "n_embd", "num_attention_heads": "n_head",
                     "num_key_value_heads": "n_kv_head", "intermediate_size": "mlp_hidden",
                     "stage_layers": "poe_stage_layers"}


class CacheView:
    """A transformers cache, or none, as `PoE.stage` wants it, see model.KVCache.

    attention_mask: (B, n), 0 at padding, whose last T slots are the queries'. A query sees the slots up to
    its own but for padding; padding sees itself, since no softmax may be empty.
    """

    def __init__(self, cache, attention_mask, T):
        self.cache = cache
        slots = torch.arange(attention_mask.size(1), device=attention_mask.device)
        own = slots[-T:, None]
        self.mask = (slots <= own) & attention_mask[:, None, None].bool() | (slots == own)
        self.positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -T:]

    def update(self, layer, k, v):
        if self.cache is None:
            return k, v
        k, v = self.cache.update(k.transpose(1, 2), v.transpose(1, 2), layer)
        return k.transpose(1, 2), v.transpose(1, 2)


class CognicaPoEForCausalLM(PreTrainedModel, GenerationMixin):
    """The product of K stages, each a next-token predictor, see model.py."""
    config_class = CognicaPoEConfig
    base_model_prefix = "model"
    # as everywhere in this project: matrices in the model's dtype, scalars in float32
    _keep_in_fp32_modules_strict = ["resid_lambda", "x0_lambda"]
    _no_split_modules = ["PoE"]
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.model = PoE(ModelConfig(**{name: getattr(config, name) for name in ModelConfig.__annotations__}))
        # kept here: buffers are left uninitialised by `from_pretrained`, and rounded by `to`
        self.tables = rotary_tables(self.model.config)
        del self.model.cos, self.model.sin
        self.post_init()

    def _init_weights(self, module):
        """Do nothing: a checkpoint sets every weight."""

    def get_input_embeddings(self):
        return self.model.wte

    def poe(self):
        """The PoE, with what follows from its weights' device and dtype."""
        poe = self.model
        poe.compute_dtype = self.dtype
        self.tables = [table.to(self.device) for table in self.tables]
        poe.cos, poe.sin = self.tables
        return poe

    def forward(self, input_ids, attention_mask=None, past_key_values=None, cache=None, use_cache=None,
                labels=None, logits_to_keep=0, stage=None, prefix=None, poe_alpha=None, **_):
        """Log-probabilities, float32 (B, T, V), by one stage, by a prefix of K' stages, or by all of them.

        attention_mask: (B, slots), 0 at padding, left or right. past_key_values, or cache, as newer
        transformers call it: a Cache, which is extended; it goes on with the same stages alone. labels: int64
        (B, T), -100 where they do not count: `loss` is the mean nats of each next token. logits_to_keep: only
        those of so many last positions.
        """
        poe = self.poe()
        K = poe.config.n_stage
        stages = range(K if prefix is None else prefix) if stage is None else [stage]
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        T = input_ids.size(1)
        n = T + (0 if cache is None else cache.get_seq_length())
        if n > poe.config.sequence_len or not stages or stages[-1] not in range(K):
            raise ValueError(f"{n} tokens by stages {[*stages]}: this model has {K} stages and a context of "
                             f"{poe.config.sequence_len}")
        view = None
        if cache is not None and attention_mask is None:
            attention_mask = input_ids.new_ones(len(input_ids), n)
        if attention_mask is not None:
            view = CacheView(cache, attention_mask, T)
        logits = 0
        x = x0 = poe.embed(input_ids)
        for k in range(stages[-1] + 1):
            x = poe.stage(k, x, x0, input_ids, view)
            if k in stages:
                logits = logits + poe.log_probs(k, x[:, -logits_to_keep:])
        logits = combine(logits, len(stages), self.config.poe_alpha if poe_alpha is None else poe_alpha)
        loss = labels if labels is None else F.nll_loss(logits[:, :-1].mT, labels[:, 1:])
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})

    def generate_speculative(self, input_ids, max_new_tokens=64, draft_len=4):
        """Greedy text by the product: stage 0 drafts up to 15 tokens, then all stages judge them at once.

        input_ids: int64 (1, T). Returns int64 (1, T + new), which ends with the eos token where that was met.
        The text is that of every other draft_len, 0 included, in every dtype. `generate` makes passes of
        other shapes, so that in bfloat16 near ties may fall otherwise there.
        """
        return decode(self, input_ids, max_new_tokens, draft_len + 1, None)

    def generate_wand(self, input_ids, max_new_tokens=64):
        """Greedy text with early exit, see `generate_speculative`: a token is decided by the first stages
        whose lead exceeds the sum of the config's bounds, which is what the other stages may move it by.
        """
        bounds = self.config.poe_wand_p99_bounds_per_stage_head
        if bounds is None:
            raise ValueError("this checkpoint has no bounds: measure it with evaluate.py, publish it again "
                             "(a model of one stage has none)")
        return decode(self, input_ids, max_new_tokens, 1, bounds)


@torch.no_grad()
def decode(model, input_ids, max_new_tokens, n, bounds):
    """Extend a row of ids greedily; a stage may lag behind those below it, which run again with it.

    n: positions that the product judges at once, n - 1 of which the first stage drafts. bounds: a token is
    decided by the first prefix whose margin exceeds the sum of the bounds of the stages that remain; None: by
    all.
    """
    poe = model.poe()
    config = poe.config
    known = input_ids.size(1)
    end = known + max_new_tokens
    if len(input_ids) != 1 or not 1 <= known < end <= config.sequence_len + 1 or not 1 <= n <= TILE:
        raise ValueError(f"{len(input_ids)} rows of {known} tokens, {max_new_tokens} new, {n - 1} drafts: "
                         f"one row, {config.sequence_len + 1} tokens and {TILE - 1} drafts at most")
    # a single stage would only draft for itself
    n = n if config.n_stage > 1 else 1
    slots = torch.arange(end + 2 * TILE, device=model.device)
    tokens = F.pad(input_ids, (0, len(slots) - known))
    cache = KVCache(config, 1, len(slots), model.device, model.dtype)
    # positions that each stage has run
    done = [0] * config.n_stage

    def run(prefix, until):
        """Log-probabilities (T, V) of a prefix at the positions before `until` that its last stage lacks."""
        at = slots[done[prefix - 1]:until]
        T = len(at)
        if prefix > 1:
            # whole tiles
            at = slots[until - T:until + -T % TILE]
        cache.place(at[None], len(slots))
        x = x0 = poe.embed(tokens[:, at])
        total = 0
        for k in range(prefix):
            x = poe.stage(k, x, x0, tokens[:, at], cache)
            total = total + poe.log_probs(k, x[0])
            done[k] = until
        return combine(total, prefix)[:T]

    if known > 1:
        run(config.n_stage, known - 1)
    while True:
        for i in range(known, known + n - 1):
            tokens[0, i] = run(1, i)[-1].argmax()
        for prefix in range(1 if bounds else config.n_stage, config.n_stage + 1):
            scores = run(prefix, known + n - 1)
            top = scores[-1].topk(2).values
            if bounds and top[0] - top[1] > sum(bounds[prefix - 1:]):
                break
        # kept up to the first that differs from its draft
        for token in scores[-n:].argmax(-1):
            is_draft = token == tokens[0, known]
            tokens[0, known] = token
            known += 1
            if known == end or token == model.generation_config.eos_token_id:
                return tokens[:, :known]
            if not is_draft:
                break
        # roll back what ran after it
        done = [min(positions, known - 1) for positions in done]
