"""Hugging Face's Trainer trains a llama from scratch with N:M weights, on text that follows a rule, and saves it.

    python examples/hf_trainer.py --out tiny-llama            # a minute on a CPU; loads again with from_pretrained
    python examples/hf_trainer.py --layers 8 --hidden 512 --steps 5000

The lines that nm_compiler adds end in "# nm"; without them this is a dense training. What they need is `pip install ".[hf]"`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import nm_compiler as nm
from nm_compiler.integrations.transformers import SparsityCallback

WORDS = 64


class Rows(Dataset[dict[str, Tensor]]):
    """Sequences in which each word is the sum of the two before it."""

    def __init__(self, count: int, length: int = 16) -> None:
        self.count, self.length = count, length

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        words = torch.randint(WORDS, (2,), generator=torch.Generator().manual_seed(index)).tolist()
        while len(words) < self.length:
            words.append((words[-1] + words[-2]) % WORDS)
        tokens = torch.tensor(words)
        return {"input_ids": tokens, "labels": tokens}


def main(arguments: Sequence[str] | None = None) -> PreTrainedModel:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--then", default="inductor", help="what runs the sparse graphs: inductor, aot_eager, eager")
    parser.add_argument("--out", help="the finished model goes here")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=options.hidden, intermediate_size=2 * options.hidden, num_attention_heads=4,
        num_hidden_layers=options.layers, num_key_value_heads=2, pad_token_id=None, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    callbacks = []
    model = nm.compile(model, method=nm.LBC(), then=options.then)  # nm
    callbacks.append(SparsityCallback())  # nm
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder, max_steps=options.steps, per_device_train_batch_size=options.batch_size, learning_rate=3e-3,
            lr_scheduler_type="cosine", warmup_steps=options.steps // 20, save_strategy="no", report_to=[],
            use_cpu=options.cpu, logging_steps=max(options.steps // 10, 1), dataloader_pin_memory=False,
        )  # fmt: skip
        Trainer(model, settings, train_dataset=Rows(10_000), callbacks=callbacks).train()
    model = nm.freeze(model)  # nm
    print(nm.verify(model, "2:4"))
    if options.out:
        model.save_pretrained(options.out)
    return model


if __name__ == "__main__":
    main()
