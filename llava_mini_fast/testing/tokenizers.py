"""A tiny SentencePiece tokenizer of Vicuna's kind: real files, nothing downloaded."""

from __future__ import annotations

import io
import json
from pathlib import Path

_SENTENCES = (
    "A chat between a curious human and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the human's questions.",
    "USER: What is in this picture? ASSISTANT: A red square and two blue circles.",
    "USER: What moves in the video? ASSISTANT: The green triangle moves from left to right.",
    "Where is the largest shape? It is in the upper left corner, above the yellow star.",
    "How many circles are there, and which colours do they have? Three: red, green and blue.",
    "Describe the picture in one sentence. Then name every shape that you can see.",
)


def make_sentencepiece(out_dir: str | Path, vocab_size: int = 420) -> Path:
    """Train a tokenizer on a few sentences and write `tokenizer.model` and `tokenizer_config.json`.

    As in Llama-2: BPE with byte fallback, digits one by one, a space marked at the start of a text, no normalisation;
    ids 0, 1, 2 are `<unk>`, `<s>`, `</s>`, 3 to 258 the bytes. transformers' AutoTokenizer loads the directory.
    Needs the `sentencepiece` package.

    Args:
        out_dir: made if it isn't there; a checkpoint's directory will do.
        vocab_size: 259 for the special and byte tokens, the rest for pieces.

    Returns:
        `out_dir`.
    """
    import sentencepiece

    out_dir, model = Path(out_dir), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_SENTENCES),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "tokenizer.model").write_bytes(model.getvalue())
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "padding_side": "right",
    }
    (out_dir / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return out_dir
