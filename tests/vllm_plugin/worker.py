"""One vLLM process for the tests: does what it is told over a socket, one engine at a time.

Started by conftest.py as `python worker.py FD`. A request is (operation, arguments); the reply is (True, result) or
(False, the exception's class names, its message, its traceback), pickled here: `Connection.send` would hand tensors over
as file descriptors, by way of a server that asks for a key.
"""

import gc
import logging
import os
import pickle
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any


class Worker:
    """The operations."""

    def __init__(self):
        self.llm = None
        self.calls: dict[str, list[Any]] = {}

    def start(self, checkpoint: str, options: dict[str, Any]) -> None:
        """An engine; the one before it is closed."""
        from vllm import LLM

        self.stop()
        _restore_hash()
        if not gc.get_freeze_count():
            gc.freeze()  # imports live as long as the process: the collections that end an engine needn't walk them
        self.llm = LLM(checkpoint, **options)
        if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0":
            self.llm.apply_model(self._count)

    def stop(self) -> None:
        if self.llm is None:
            return
        self.llm.llm_engine.engine_core.shutdown()
        self.llm = None
        gc.collect()

    def reset(self) -> None:
        """The engine as it was when it started: nothing cached, nothing counted."""
        _restore_hash()
        self.counted()
        assert self.llm.reset_prefix_cache()
        self.llm.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()
        self.llm.apply_model(_clear_image_cache)

    def generate(self, prompts: list[Any], sampling: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return self._answers(self.llm.generate(prompts, _params(sampling), use_tqdm=False))

    def chat(
        self, messages: list[Any], sampling: list[dict[str, Any]], options: dict[str, Any]
    ) -> list[dict[str, Any]]:
        return self._answers(self.llm.chat(messages, _params(sampling), use_tqdm=False, **options))

    def tokenize(self, text: str) -> list[int]:
        """As vLLM does with a text prompt."""
        return self.llm.get_tokenizer()(text)["input_ids"]

    def register(self, path: str | None) -> list[str]:
        """Register the plugin again, with `path` on sys.path; the warnings that it logs."""
        from llava_mini_fast.vllm_plugin import register
        from llava_mini_fast.vllm_plugin.compat.logging import logger

        said: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())
        before = list(sys.path)
        logger.addHandler(handler)
        try:
            sys.path[:0] = [path] if path else []
            register()
        finally:
            sys.path[:] = before
            logger.removeHandler(handler)
        return said

    def load_video(self, url: str) -> Any:
        """The frames that a clip in a chat message becomes, by the loader that vLLM picks for the model."""
        from vllm.multimodal.media import MediaConnector
        from vllm.transformers_utils.processor import get_video_processor_cls_name

        processor = get_video_processor_cls_name(self.llm.model_config)
        frames, _ = MediaConnector().fetch_video(url, video_processor=processor)
        return frames

    def runner(self) -> list[str]:
        """Modules of the model runner's classes, and of what its Triton kernels are."""
        from vllm.v1.worker.gpu.input_batch import _prepare_prefill_inputs_kernel as kernel

        (classes,) = self.llm.collective_rpc(lambda worker: [c.__module__ for c in type(worker.model_runner).__mro__])
        return [*classes, type(kernel).__module__]

    def sample(self, name: str) -> float | None:
        """A value of this process's own Prometheus registry."""
        from prometheus_client import REGISTRY

        return REGISTRY.get_sample_value(name)

    def metric(self, name: str) -> int:
        return sum(metric.value for metric in self.llm.get_metrics() if metric.name == name)

    def counted(self) -> dict[str, list[Any]]:
        """Since the start or the last call: the views of each run of the vision tower ("tower"), the items of each call of the front
        end ("embed"), and whether its rows were finite, and kept no others alive ("sound")."""
        counted = {name: list(found) for name, found in self.calls.items()}
        for found in self.calls.values():
            found.clear()
        return counted

    def leave_ids_out_of_the_hash(self) -> None:
        """Until the next start or reset."""
        from llava_mini_fast.vllm_plugin import processor

        processor.segment_hash = _hash_without_ids

    def _count(self, model: Any) -> None:
        if not hasattr(model.front, "vision_tower"):  # left out, with every media limit at 0
            return
        tower, embeds, sound = [], [], []
        self.calls = {"tower": tower, "embed": embeds, "sound": sound}
        model.front.vision_tower.register_forward_pre_hook(lambda _, args: tower.append(len(args[0])))
        embed = model.embed_multimodal

        def embed_multimodal(**items: Any) -> Any:
            rows = embed(**items)
            embeds.append(len(rows))
            sound.append(all(part.isfinite().all() and part.untyped_storage().nbytes() == part.nbytes for part in rows))
            return rows

        model.embed_multimodal = embed_multimodal

    @staticmethod
    def _answers(outputs: list[Any]) -> list[dict[str, Any]]:
        return [
            {
                "tokens": list(output.outputs[0].token_ids),
                "text": output.outputs[0].text,
                "cached": output.num_cached_tokens,
                "prompt": list(output.prompt_token_ids),
            }
            for output in outputs
        ]


def _clear_image_cache(model: Any) -> None:
    model.front.cache.clear()


def _restore_hash() -> None:
    from llava_mini_fast.vllm_plugin import processor, segments

    processor.segment_hash = segments.segment_hash


def _params(sampling: list[dict[str, Any]]) -> list[Any]:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    def params(choice: list[str] | None = None, **rest: Any) -> SamplingParams:
        return SamplingParams(**rest, structured_outputs=StructuredOutputsParams(choice=choice) if choice else None)

    return [params(**one) for one in sampling]


def _hash_without_ids(model: str, kind: str, pixels: str, digests: Any, start: int, ids: Any) -> str:
    """The mistake that the negative control makes: text rows are taken for a function of the media alone."""
    from llava_mini_fast.vllm_plugin.segments import segment_hash

    return segment_hash(model, kind, pixels, digests, start, ())


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    worker = Worker()
    while True:
        try:
            operation, arguments = pickle.loads(connection.recv_bytes())
        except EOFError:
            return worker.stop()
        try:
            reply = (True, getattr(worker, operation)(*arguments))
        except Exception as error:
            names = [cls.__name__ for cls in type(error).__mro__]
            reply = (False, names, str(error), traceback.format_exc())
        connection.send_bytes(pickle.dumps(reply))


if __name__ == "__main__":
    main()
