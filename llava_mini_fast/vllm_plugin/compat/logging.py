"""vLLM's log."""

from vllm.logger import init_logger

# outside vLLM's own namespace, vLLM configures no log handler
logger = init_logger("vllm.llava_mini_fast")
