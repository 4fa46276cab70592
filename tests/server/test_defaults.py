"""What `llava-mini serve` sets where the user doesn't, and the chat templates."""

from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from typer.testing import CliRunner

from llava_mini_fast.cli import app
from llava_mini_fast.preprocess.prompt import VICUNA_SYSTEM, conversation, render
from llava_mini_fast.server import main
from llava_mini_fast.testing.checkpoints import DATA

HISTORIES = ([], [("What is it?", "A cat ")], [("a", "b"), ("c", "d")])


class Vicuna:
    """As much of a tokenizer as `render` asks for."""

    unk_token_id = 0

    def convert_tokens_to_ids(self, token):
        return 0


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
@pytest.mark.parametrize("kind", ["llama-3.1", "vicuna"])
def test_templates_give_the_prompts_of_every_other_door(kind, system, history):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DATA / "tokenizer") if kind == "llama-3.1" else Vicuna()
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
        (main.TEMPLATES / f"{kind}.jinja").read_text()
    )
    messages = system + conversation("Where?", history)
    bos = "<|begin_of_text|>" if kind == "llama-3.1" else "<s>"
    text = template.render(messages=messages, bos_token=bos, add_generation_prompt=True)
    wanted = render(tokenizer, messages)
    assert text == (wanted if kind == "llama-3.1" else f"<s>{wanted}")
    assert kind != "vicuna" or system or VICUNA_SYSTEM in text


def test_defaults_fit_the_checkpoint(checkpoint):
    given = main.defaults(str(checkpoint("llama31")))
    assert Path(given[1]).name == "llama-3.1.jinja" and Path(given[1]).is_file()
    assert dict(zip(given[2::2], given[3::2]))["--max-model-len"] == str(2048 + main.MAX_NEW_TOKENS)
    with pytest.raises(FileNotFoundError, match="neither a directory"):
        main.defaults("nowhere")


def test_vllms_flags_win(checkpoint):
    options = main.parsed(
        [str(checkpoint("llama31")), "--max-model-len", "100", "--port", "1234", "--middleware", "a.b"]
    )
    assert (options.max_model_len, options.port, options.shutdown_timeout) == (100, 1234, main.DRAIN_SECONDS)
    assert options.middleware[0] == "a.b" and options.middleware[-1].endswith("Bounded")
    assert options.model == str(checkpoint("llama31"))


@pytest.mark.parametrize("variable", ["LLAVA_MINI_MAX_PIXELS", "LLAVA_MINI_MAX_BODY_BYTES"])
def test_a_wrong_limit_is_said_at_the_start(monkeypatch, variable):
    monkeypatch.setenv(variable, "many")
    refused = CliRunner().invoke(app, ["serve", "m"])
    assert refused.exit_code == 1 and f"{variable} must be a positive number or none" in refused.stderr


def test_the_command(monkeypatch):
    asked = []
    monkeypatch.setattr(main, "serve", lambda arguments: asked.append(arguments) or 0)
    for words in (["serve"], ["serve", "m", "--port", "1"], ["serve", "--port", "1", "--api-key", "k"]):
        assert CliRunner().invoke(app, words).exit_code == 0
    assert asked == [[], ["m", "--port", "1"], ["--port", "1", "--api-key", "k"]]
    help_text = CliRunner().invoke(app, ["serve", "--help"]).output
    assert "Examples" in help_text and "docs/serving.md" in help_text
