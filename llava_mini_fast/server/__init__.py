"""`llava-mini serve`: vLLM's OpenAI server with this model's defaults, and media that can't harm it."""
