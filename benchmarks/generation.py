"""Text generation with lowered parts (`nm.lower_parts`) beside the dense model, both eager, token after token.

    python benchmarks/generation.py [--quick] [--threads 1] [--layers 8] [--pattern 2:4]

A Llama with the sizes of TinyLlama 1.1B but fewer layers, random weights, all linears of its layers N:M; 32 new tokens after
a prompt of 16, batch 1, with the cache of Hugging Face. Needs transformers: pip install -e ".[zoo]".
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cpu_sections.weights import random_weight
from harness import arguments, environment, interleaved, table, write
from torch import Tensor, nn
from zoo.shim import declare_missing_operators

import nm_compiler as nm
from nm_compiler.pattern import Pattern

PROMPT, NEW = 16, 32
DENSE = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """A model with lowered parts. dense: the one it is made of; values: how packed ones are stored, "" as they were."""

    dense: str
    parts: tuple[str, ...] = ("*.mlp", "*.self_attn.?_proj")
    values: str = ""


CASES = {
    "float32, packed MLPs": Case("float32", ("*.mlp",)),
    "float32, packed": Case("float32"),
    "int8, packed": Case("float32", values="int8"),
    "bfloat16, packed": Case("bfloat16"),
}


def llama(layers: int, pattern: Pattern) -> nn.Module:
    """All weights of its layers N:M, in evaluation mode."""
    declare_missing_operators()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=4
        )
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".layers." in name and weight.ndim == 2:
                weight.copy_(random_weight(tuple(weight.shape), pattern).mul_(0.02))
    return model.eval()


def generate(model: Any, prompt: Tensor, count: int) -> Tensor:
    """As many new tokens, whatever they are."""
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    found: Tensor = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
    return found


def lowered(model: Any, prompt: Tensor, case: Case, pattern: str, cache: Path) -> tuple[Any, float]:
    """The model with the case's parts lowered, and the seconds that took."""
    begin = time.perf_counter()
    fast = nm.lower_parts(
        model, case.parts, lambda model: generate(model, prompt, 3), backend="cpu", pattern=pattern,
        options={"cache": cache, **({"values": case.values} if case.values else {})},
    )  # fmt: skip
    return fast, time.perf_counter() - begin


def main(argv: Sequence[str]) -> None:
    """Lower, measure in turns, print, write."""
    parser = arguments("Text generation with lowered parts", Path(__file__).stem)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--pattern", default="2:4")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    started, layers, pattern = environment(options.threads), 1 if options.quick else options.layers, options.pattern
    prompt, taken = torch.randint(0, 32000, (1, PROMPT)), dict[str, float]()
    models = {name: llama(layers, Pattern.parse(pattern)).to(dtype) for name, dtype in DENSE.items()}
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            models[name], taken[name] = lowered(models[case.dense], prompt, case, pattern, Path(folder) / "cache.json")
    work = {name: partial(generate, model, prompt, NEW) for name, model in models.items()}
    spent = interleaved(work, repeats=1 if options.quick else 7, warmup=1)
    gains = {name: spent[case.dense].over(spent[name]) for name, case in CASES.items()}
    rows = [
        [name, f"{1e3 * each.median / NEW:.1f}"]
        + ([f"{gains[name].median:.2f}x", f"{taken[name]:.0f}"] if name in gains else ["", ""])
        for name, each in spent.items()
    ]
    print(table([f"Llama, {layers} layers, {pattern}", "ms a token", "over dense", "lowering, s"], rows))
    body: dict[str, Any] = {name: {"seconds": each.as_json()} for name, each in spent.items()}
    for name, gain in gains.items():
        body[name] |= {"over_dense": gain.as_json(), "lowering_seconds": taken[name]}
    write(options.out, started, {"layers": layers, "pattern": pattern, "prompt": PROMPT, "new": NEW, "cases": body})


if __name__ == "__main__":
    main(sys.argv[1:])
