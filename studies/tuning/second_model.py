"""A small LLaMA trained from scratch, to check conclusions about quantization on weights that were never integers.

    python -m studies.tuning.second_model -o out/second              # 7 M parameters, about 35 minutes on one core
    python -m studies.tuning.study cell model=out/second fold=scale

SmolLM2's packaged weights come from a 4-bit file and lie on a grid of 16 levels per block, which makes rounding them
again a special case. This one is trained on C4, Wikipedia and Dolly and saved in float16. Its text is
what it is later tuned on too; what it is judged on ("held" rows and WikiText-2 test) it has not seen.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from saap.text.documents import load_documents, pack
from saap.tune.loop.steps import Run, train
from saap.tune.options import TrainOptions
from saap.tune.tuning import TuneOptions, loss_of

VOCABULARY, LENGTH, UNSEEN = 4096, 256, 600  # rows from the front are left to calibration and to judging


def tokenizer_of(texts: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the text."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=["<|end|>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def model_of() -> LlamaForCausalLM:
    """8 layers of 256, random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def say(label: str, done: float, total: float) -> None:
    """A line now and then."""
    if done == total or int(done) % 50 == 0:
        print(f"  {label}: {done:.0f}/{total:.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=4000, help="of 256 tokens, once each")
    parser.add_argument("--passes", type=int, default=3)
    given = parser.parse_args()
    documents = load_documents(None, split="tuning")
    if documents is None:
        raise SystemExit("set SAAP_DATA to a directory with the training text")
    tokenizer = tokenizer_of(documents.texts)
    ids = pack(documents.texts, tokenizer, LENGTH, UNSEEN + given.rows, 0)[UNSEEN:]
    model: Any = model_of()
    options = TrainOptions(
        rows_per_step=4,
        passes=given.passes,
        warmup_share=0.05,
        weight_decay=0.1,
        checkpointing=False,
    )
    groups = [{"params": list(model.parameters()), "lr": 1.5e-3}]
    rows = {"ids": ids[:-32], "labels": ids[:-32]}
    train(
        model, groups, rows, loss_of(None, TuneOptions()),
        Run(options, held_out={"ids": ids[-32:], "labels": ids[-32:]},
            state_dir=given.out.parent / f".{given.out.name}.training"),
        say,
    )  # fmt: skip
    model.half().save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)


if __name__ == "__main__":
    main()
