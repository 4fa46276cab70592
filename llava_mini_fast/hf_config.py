"""The model type as transformers knows it, so that AutoConfig and AutoTokenizer accept a published checkpoint."""

from transformers import AutoConfig, LlamaConfig

from llava_mini_fast.config import MODEL_TYPE


class LlavaMiniHFConfig(LlamaConfig):
    """A Llama config under the published model type; the front end's keys ride along as attributes."""

    model_type = MODEL_TYPE


def register_config() -> None:
    """Make transformers resolve `model_type: llava_mini_llama`; calling it again changes nothing."""
    AutoConfig.register(MODEL_TYPE, LlavaMiniHFConfig, exist_ok=True)
