"""Stands in for engine-inspect in tests of its caller: reads what it was handed; knows one architecture."""

import json
import os
import sys

question = json.load(sys.stdin)
files = {entry["path"]: entry for entry in question["files"]}


def read(path):  # type: ignore[no-untyped-def]  # a script without imports of ours, run isolated
    entry = files[path]
    return json.loads(os.pread(question["fd"], entry["length"], entry["offset"]))


verdict = {"ok": True, "max_context_tokens": 512, "dtype": "float16", "facts": {}, "quantisation": None}
verdict["capabilities"] = ["generate", "chat"] if "chat_template.jinja" in files else ["generate"]
if question["kind"] == "adapter":
    rank = read("adapter_config.json")["r"]
    verdict |= {"architecture": "LoRA", "max_context_tokens": 0, "capabilities": [], "facts": {"rank": str(rank)}}
    verdict["parameters"] = files["adapter_model.safetensors"]["size"]
else:
    config = read("config.json")
    (architecture,) = config["architectures"]
    if "sleep" in config:
        while True:
            pass
    if "exit" in config:
        sys.exit(config["exit"])
    if "write" in config:
        os.pwrite(question["fd"], b"x", 0)
    if architecture == "LlamaForCausalLM":
        verdict |= {"architecture": architecture, "facts": {"layers": "1"}}
        verdict["capabilities"] = config.get("answers", verdict["capabilities"])
        verdict["parameters"] = sum(f["size"] for path, f in files.items() if path.endswith(".safetensors"))
    else:
        verdict = {"ok": False, "code": "UNSUPPORTED_ARCHITECTURE", "message": f"{architecture} is not known"}
print(json.dumps(verdict))
