"""The model that vLLM runs: the fusion front end before vLLM's own, unmodified Llama."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from llava_mini_fast import checkpoint
from llava_mini_fast.fusion import FusionFrontEnd
from llava_mini_fast.preprocess.prompt import PLACEHOLDER
from llava_mini_fast.preprocess.views import Views
from llava_mini_fast.vllm_plugin import metrics
from llava_mini_fast.vllm_plugin.compat.modeling import (
    MULTIMODAL_REGISTRY,
    IntermediateTensors,
    SupportsMultiModal,
    SupportsPP,
    VllmConfig,
    init_vllm_registered_model,
    maybe_prefix,
)
from llava_mini_fast.vllm_plugin.processor import DummyInputs, Info, Processor, read_config


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=DummyInputs)
class LlavaMiniForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsPP):
    """Fused rows take the place of every prompt token's embedding; generated tokens enter as plain embeddings."""

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return PLACEHOLDER if modality in ("image", "video") else None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        model_config = vllm_config.model_config
        self.config = model_config.hf_config
        config = read_config(model_config)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=model_config.hf_config,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=["LlamaForCausalLM"],
            )
        with self._mark_tower_model(vllm_config, {"image", "video"}):
            self.front = FusionFrontEnd(config, self.language_model.embed_input_ids)
        if isinstance(self.front, FusionFrontEnd):  # vLLM leaves it out when every media limit is 0
            self.front.cache.allocate()  # before vLLM measures what is left for paged KV
            self._publish = metrics.export(self.front)
        self._tower = checkpoint.VisionTowerSource(checkpoint.resolve(model_config.model), config)
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(
        self, *, pixels: Any = (), digests: Any = (), prompt_ids: Any = (), span: Any = (), **_: object
    ) -> list[Tensor]:
        """Fused rows of every item (a segment of a prompt), in order; see `processor.py` for the fields."""
        segments = [
            _Segment(p, d.numpy().tobytes(), ids.flatten().tolist(), rows.flatten().tolist())
            for p, d, ids, rows in zip(pixels, digests, prompt_ids, span)
        ]
        # segments of one prompt share their beginning: the longest is computed, the others are slices of it
        requests: list[_Segment] = []
        for segment in sorted(segments, key=lambda s: -len(s.ids)):
            if not any(segment.begins(request) for request in requests):
                requests.append(segment)
        fused = self.front.fuse([(request.ids, request.views()) for request in requests])
        self._publish()
        found = [next(rows for rows, r in zip(fused, requests) if s.begins(r)) for s in segments]
        # copies, because vLLM keeps them: a view of a few rows would keep the whole prompt's alive
        return [rows[s.start : s.stop].clone() for rows, s in zip(found, segments)]

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **_: object,
    ) -> Tensor | IntermediateTensors:
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Published names in; the winning vision tower is read by the published rule (`checkpoint.VisionTowerSource`)."""
        loaded = {f"language_model.{name}" for name in self.language_model.load_weights(self._front_first(weights))}
        if isinstance(self.front, FusionFrontEnd):
            self.front.finish_loading()
            loaded |= {f"front.{name}" for name, _ in self.front.named_parameters()}
            self.front.pack()
        return loaded

    def _front_first(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Load the front end's tensors as they come, hand on the language model's."""
        has_front = isinstance(self.front, FusionFrontEnd)
        for name, tensor in weights:
            if name.startswith(checkpoint.TOWER_PREFIX) and not self._tower.inside:
                continue
            if not name.startswith(checkpoint.FRONT_PREFIXES):
                yield name, tensor
            elif has_front:
                self.front.load_tensor(name, tensor)
        if has_front and not self._tower.inside:
            for name, tensor in self._tower.items():
                self.front.load_tensor(name, tensor)


class _Segment:
    """One item of a prompt: rows [start, stop) of what media and ids up to the segment's end fuse to."""

    def __init__(self, pixels: Tensor, digests: bytes, ids: list[int], span: list[int]):
        self.pixels, self.digests, self.ids = pixels, digests, ids
        self.start, self.stop = span

    def begins(self, other: _Segment) -> bool:
        """Whether this segment's input is a beginning of the other's."""
        return self.digests == other.digests and self.ids == other.ids[: len(self.ids)]

    def views(self) -> Views:
        frames = self.pixels.shape[0]
        size = len(self.digests) // frames
        digests = tuple(self.digests[i * size : (i + 1) * size] for i in range(frames))
        return Views("image" if frames == 1 else "video", self.pixels, digests)
