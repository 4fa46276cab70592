"""The wall to vLLM: the only place that touches vLLM's names beyond `vllm` itself (`from vllm import LLM`).

A module a subject, each with what the rest of the package needs of it; nothing here is imported before vLLM is. `versions.py`
says which vLLM this package knows. `tests/vllm_plugin/vllm_names.json` has the names that each of these versions defines;
where a new minor renames one, it is imported here from either place.
"""
