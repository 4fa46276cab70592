"""The folders beside this file are collected by the child processes that test_children.py starts, each by its own."""

import os

collect_ignore = []
if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore.append("interpreted")
if os.environ.get("LLAVA_MINI_TEST_COMPILE") != "1":
    collect_ignore.append("compiled")
