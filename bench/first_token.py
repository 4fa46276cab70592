"""The first token of the whole engine: front end and language model, at a published model's widths with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llava_mini_fast.bench.frontend import MODELS, SMALL, TEXT_ROWS, build, fill, make_views
from llava_mini_fast.bench.timing import interleave, waiting_clock
from llava_mini_fast.image_cache import CacheSizes

LAYERS = {"cpu": 2, "cuda": 32}
"""Of the language model; a CPU tries the benchmark."""


@torch.no_grad()
def measure(
    device: torch.device, dtype: torch.dtype, rounds: int, report: Callable[[dict[str, Any]], None], small: bool = False
) -> None:
    """Seconds from pixels and ids to the logits of the first token: of a cold image, of a second question, and of the language
    model alone, beside the least time that reading its weights takes."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    widths = MODELS["llama"] | (SMALL if small else {})
    known = {name: value for name, value in widths.items() if name in LlamaConfig().to_dict()} | {"vocab_size": 128256}
    config = LlamaConfig(**known | {"num_hidden_layers": LAYERS[device.type], "model_type": "llama"})
    if small:
        config.vocab_size = 1000
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights(), device:
            llm = LlamaForCausalLM(config).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)
    fill(llm, torch.Generator().manual_seed(1))
    front = build(dtype, hd=False, small=small, device=device)
    image, ids = make_views(1, 1, seed=1, device=device), [1, -200, *range(2, TEXT_ROWS + 1)]

    def first_token(rows: torch.Tensor) -> int:
        return int(llm(inputs_embeds=rows[None], use_cache=True, logits_to_keep=1).logits[0, -1].argmax())

    (rows,) = front.fuse([(ids, image)])
    clock = waiting_clock(device)
    weights = sum(p.numel() * p.element_size() for p in llm.parameters())
    runs = {
        "second question": lambda: first_token(front.fuse([(ids, image)])[0]),
        "language model alone": lambda: first_token(rows),
    }
    times = interleave(runs, rounds, clock=clock)
    front.configure(CacheSizes(0, 0))
    times |= interleave({"cold image": lambda: first_token(front.fuse([(ids, image)])[0])}, rounds, clock=clock)
    for name, timing in times.items():
        report({"name": f"first token: {name}", "ours": timing.as_json(), "language_model_bytes": weights})
