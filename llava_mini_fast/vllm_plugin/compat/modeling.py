"""What the model takes from vLLM: its interfaces, its own Llama, and the registry of processors."""

from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMultiModal, SupportsPP
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

__all__ = [
    "MULTIMODAL_REGISTRY",
    "IntermediateTensors",
    "SupportsMultiModal",
    "SupportsPP",
    "VllmConfig",
    "init_vllm_registered_model",
    "maybe_prefix",
]

MEMBERS = ("SupportsMultiModal._mark_language_model", "SupportsMultiModal._mark_tower_model")
"""What is used of these beyond themselves; the table of names has it too."""
