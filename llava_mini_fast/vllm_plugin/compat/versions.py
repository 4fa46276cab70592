"""Which versions of vLLM this package knows."""

from __future__ import annotations

import os
import re

VERSIONS = {
    "0.32": "tested: every test of the plugin and of the server runs on it",
    "0.33": "its names are checked against its sources; it has no CPU build to run on",
}
"""Minor versions, and how far each is known. A new one is added when its names are in the stored table (CONTRIBUTING)."""
TESTED = ("0.32",)
UNKNOWN_ALLOWED = "LLAVA_MINI_UNKNOWN_VLLM"
"""An environment variable: 1 tries a version that is not in the table."""


def minor(version: str) -> str:
    """ "0.33" of "0.33.1rc2"; the version itself where it has no such beginning."""
    found = re.match(r"\d+\.\d+", version)
    return found[0] if found else version


def refusal(version: str) -> str | None:
    """Why LLaVA-Mini is not run by this version of vLLM, in a sentence, or None."""
    if minor(version) in VERSIONS or os.environ.get(UNKNOWN_ALLOWED) == "1":
        return None
    return (
        f"llava-mini-fast knows vLLM {' and '.join(VERSIONS)}, not {version}: install one of these, or a newer llava-mini-fast; "
        f"{UNKNOWN_ALLOWED}=1 tries it as it is."
    )
