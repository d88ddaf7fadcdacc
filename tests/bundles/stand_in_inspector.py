"""Stands in for engine-inspect in tests of its caller: reads what it was handed, knows one architecture."""

import json
import os
import sys

files = {entry["path"]: entry["fd"] for entry in json.load(sys.stdin)["files"]}
config = json.loads(os.pread(files["config.json"], 1 << 20, 0))
(architecture,) = config["architectures"]
if "sleep" in config:
    while True:
        pass
if "exit" in config:
    sys.exit(config["exit"])
if "write" in config:
    os.pwrite(files["config.json"], b"x", 0)
if architecture == "LlamaForCausalLM":
    verdict = {
        "ok": True,
        "architecture": architecture,
        "max_context_tokens": 512,
        "parameters": os.fstat(files["model.safetensors"]).st_size,
        "dtype": "float16",
        "capabilities": ["generate"],
    }
else:
    verdict = {"ok": False, "code": "UNSUPPORTED_ARCHITECTURE", "message": f"{architecture} is not known"}
print(json.dumps(verdict))
