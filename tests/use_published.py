"""
What a stranger does with published folders, in a process that does not find this project: test_publish.py
runs `use_published.py FOLDER OTHER TEXTS OUT` and reads OUT, a file of torch.save.
"""
import json
import re
import sys
from pathlib import Path

import torch
from lm_eval import evaluator
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

folder, other, texts, out = sys.argv[1:]
# the model card's snippet, as pasted
snippet = re.search(r"```python\n(.*?)```", Path(folder, "README.md").read_text(), re.DOTALL)[1]
card = {}
exec(re.sub(r'"USER/.*?"', repr(folder), snippet), card)
model = card["model"]
tokenizer = card["tokenizer"]
ids = card["input_ids"]
new = dict(max_new_tokens=24, do_sample=False)


def load(path, **more):
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **more)


def drafted(model, *lengths):
    return [model.generate_speculative(ids, 24, n) for n in lengths]


# the other folder has the same last name, and shards
half = load(folder, dtype=torch.bfloat16, device_map="auto")
prompts = ["the stage of", "naïve is in the expert x = y", "a"]
batch = tokenizer(prompts, return_tensors="pt", padding=True)
with torch.no_grad():
    found = {
        "logits": [model(ids), model(ids, stage=0), model(ids, stage=2), model(ids, prefix=2),
                   model(ids, poe_alpha=0.5), load(other, dtype=torch.float32)(ids), half(ids)],
        "loss": model(ids, labels=ids).loss,
        "plain": [card["out"], model.generate(ids, **new, use_cache=False), *drafted(model, 4, 15)],
        "half": drafted(half, 0, 4),
        "prefix": model.generate(ids, **new, prefix=2),
        "wand": model.generate_wand(ids, 24),
        "batch": model.generate(**batch, max_new_tokens=9)[:, -9:],
        "each": [model.generate(tokenizer(prompt, return_tensors="pt").input_ids, max_new_tokens=9)[0, -9:]
                 for prompt in prompts]}
found["logits"] = [output.logits for output in found["logits"]]
found["bos alone"] = model.generate_speculative(ids[:, :1], 5)
model.generation_config.eos_token_id = card["out"][0, ids.size(1) + 4].item()
found["ended"] = [model.generate(ids, **new, attention_mask=torch.ones_like(ids)),
                  model.generate_speculative(ids, 24)]
encoded = tokenizer(json.loads(Path(texts).read_text()))["input_ids"]
found["ids"] = torch.tensor([token for document in encoded for token in document])

task = """
task: local
dataset_path: json
dataset_kwargs: {data_files: {test: docs.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "The capital of France is"
doc_to_choice: [Paris, a naïve town]
doc_to_target: 0
"""
Path("docs.jsonl").write_text('{"number": 0}\n')
Path("local.yaml").write_text(task)
# it would ask the machine about itself for seconds
evaluator.add_env_info = lambda *_: None
results = evaluator.simple_evaluate(
    "hf", dict(pretrained=folder, trust_remote_code=True, dtype="float32", add_bos_token=True), ["local"],
    device="cpu", task_manager=TaskManager(include_path=".", include_defaults=False))
found["lm_eval"] = [choice for choice, _ in results["samples"]["local"][0]["filtered_resps"]]
torch.save(found, out)
