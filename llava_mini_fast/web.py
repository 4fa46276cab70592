"""The web page: ask about a picture or a clip over an OpenAI endpoint, and see where the compressor looked."""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llava_mini_fast.preprocess.guess import guess
from llava_mini_fast.preprocess.limits import MediaError

Turn = dict[str, Any]
"""{"role": "user" | "assistant", "content": text}."""
MAX_TOKENS = 512


class Endpoint:
    """A served model.

    Args:
        url: of the interface, such as http://127.0.0.1:8000/v1.
        key: the server's API key, where it asks for one.
        model: the served name; the first that the server lists when None.
    """

    def __init__(self, url: str, key: str = "none", model: str | None = None):
        import openai

        self.url, self._model = url, model
        self._client = openai.OpenAI(base_url=url, api_key=key, max_retries=0)

    def answer(self, path: str | None, question: str, history: list[Turn]) -> Iterator[str]:
        """The answer as it comes, longer each time; the server stops writing when the iterator is closed.

        Args:
            path: of the picture or clip, or None for text alone.
            question: the new question.
            history: earlier turns about the same medium, oldest first.

        Raises:
            ValueError: a sentence for people: what the server refuses, or that it doesn't answer or breaks off.
        """
        import openai

        text = ""
        messages = [
            {"role": turn["role"], "content": turn["content"]}
            for turn in [*history, {"role": "user", "content": question}]
        ]
        try:
            if path is not None:
                messages[0]["content"] = [_part(path), {"type": "text", "text": messages[0]["content"]}]
            model = self._model or self._client.models.list().data[0].id
            with self._client.chat.completions.create(
                model=model, messages=messages, max_tokens=MAX_TOKENS, temperature=0, stream=True
            ) as chunks:
                for chunk in chunks:
                    if chunk.choices and chunk.choices[0].delta.content:
                        text += chunk.choices[0].delta.content
                        yield text
        except openai.APIStatusError as error:
            raise ValueError(_said(error)) from None
        except openai.APIConnectionError:
            if text:
                raise ValueError(f"The server at {self.url} broke off in the middle of its answer.") from None
            raise ValueError(f"The server at {self.url} does not answer; start it with llava-mini serve.") from None
        except openai.APIError as error:  # in the middle of a stream
            raise ValueError(error.message) from None


def page(endpoint: Endpoint, look: Callable[[str], Any] | None = None, examples: Path | None = None) -> Any:
    """The page, a `gradio.Blocks`.

    Args:
        look: path of a picture or clip -> the heat map, a PIL image; without it there is no button for one.
        examples: a directory with pictures and clips to try.
    """
    import gradio as gr

    with gr.Blocks(title="LLaVA-Mini") as blocks:
        gr.Markdown("# LLaVA-Mini\nAsk about a picture or a clip. A new file starts a new chat.")
        with gr.Row():
            with gr.Column():
                medium = gr.File(label="Picture or clip", type="filepath", elem_id="medium")
                picture = gr.Image(label="Picture", visible=False, interactive=False, elem_id="picture")
                clip = gr.Video(label="Clip", visible=False, interactive=False, elem_id="clip")
                for file in (
                    sorted(path for path in examples.iterdir() if path.suffix in (".png", ".mp4")) if examples else ()
                ):
                    gr.Button(f"Try {file.name}", elem_id=f"try-{file.stem}").click(
                        lambda path=str(file): path, outputs=medium
                    )
                if look is not None:
                    button = gr.Button("Where did it look?", elem_id="look")
                    map_ = gr.Image(label="Where the compressor looked", interactive=False, elem_id="map")
            with gr.Column():
                chat = gr.Chatbot(label="Chat", elem_id="chat")
                status = gr.Markdown(elem_id="status")
                question = gr.Textbox(
                    label="Question", placeholder="What is this?", elem_id="question", submit_btn=True
                )
                with gr.Row():
                    stop = gr.Button("Stop", elem_id="stop")
                    again = gr.Button("New chat", elem_id="new")

        def shown(path: str | None) -> tuple[Any, ...]:
            """Preview a file and empty the chat; what is no picture or clip is said at once."""
            hidden = (gr.update(visible=False, value=None), gr.update(visible=False, value=None), [])
            if path is None:
                return *hidden, ""
            try:
                kind = guess(path).kind
            except (MediaError, OSError) as error:
                return *hidden, f"⚠️ {_without(str(error), path)}"
            if kind == "image":
                return gr.update(visible=True, value=path), hidden[1], [], ""
            return hidden[0], gr.update(visible=True, value=path), [], ""

        def ask(text: str, path: str | None, history: list[Turn]) -> Iterator[tuple[Any, ...]]:
            """Stream an answer into the chat; an error leaves the chat and the question as they were."""
            if not text.strip():
                yield history, text, "⚠️ Type a question first."
                return
            earlier = [{"role": turn["role"], "content": _text(turn["content"])} for turn in history]
            asked = [*earlier, {"role": "user", "content": text}]
            yield asked, "", ""
            try:
                for answer in endpoint.answer(path, text, earlier):
                    yield [*asked, {"role": "assistant", "content": answer}], "", ""
            except ValueError as error:
                yield earlier, text, f"⚠️ {error}"

        def looked(path: str | None) -> tuple[Any, str]:
            if path is None:
                return None, "⚠️ Choose a picture or a clip first."
            try:
                return look(path), ""
            except (ValueError, OSError) as error:
                return None, f"⚠️ {_without(str(error), path)}"

        # Gradio would let one answer come at a time; the server batches them.
        asking = question.submit(ask, [question, medium, chat], [chat, question, status], concurrency_limit=None)
        # What starts a new chat stops the old one's answer, which would else be written into the new chat. The chat is
        # cleared once that is done: beside it, a late piece could come behind the clearing.
        medium.change(None, cancels=asking).then(shown, medium, [picture, clip, chat, status])
        stop.click(None, cancels=asking)
        again.click(None, cancels=asking).then(lambda: ([], "", ""), outputs=[chat, question, status])
        if look is not None:
            button.click(looked, medium, [map_, status])
    return blocks


def serve(
    endpoint: Endpoint, host: str, port: int, look: Callable[[str], Any] | None = None, examples: Path | None = None
) -> None:
    """Show the page until a signal comes."""
    blocks = page(endpoint, look, examples)
    allowed = [str(examples)] if examples else []
    blocks.queue().launch(server_name=host, server_port=port, allowed_paths=allowed, share=False, show_error=False)


def looker(model: str, device: str = "cpu") -> Callable[[str], Any]:
    """A function that draws heat maps with a checkpoint's front end, which is loaded at its first call.

    Raises:
        ValueError: there is no such device here.
    """
    from functools import cache

    from llava_mini_fast.device import choose_device
    from llava_mini_fast.heatmap import heatmap, load_front

    where = choose_device(device)
    loaded = cache(lambda: load_front(model, where))
    return lambda path: heatmap(loaded(), guess(path))


def _part(path: str) -> dict[str, Any]:
    """A file as a message's part, by its content."""
    try:
        kind = guess(path).kind
    except (MediaError, OSError) as error:
        raise ValueError(_without(str(error), path)) from None
    mime = mimetypes.guess_type(path)[0] or ("image/png" if kind == "image" else "video/mp4")
    name = "image_url" if kind == "image" else "video_url"
    return {"type": name, name: {"url": f"data:{mime};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"}}


def _said(error: Any) -> str:
    """The sentence in a server's refusal."""
    body = error.body if isinstance(error.body, dict) else {}
    return str(body.get("message") or f"The server answered with status {error.status_code}.")


def _text(content: Any) -> str:
    """A chat message's text, however the chat window keeps it."""
    if isinstance(content, list):
        return "".join(part.get("text", "") if isinstance(part, dict) else str(part) for part in content)
    return str(content)


def _without(message: str, path: str) -> str:
    """A message with the file's bare name in place of the path where it was uploaded to."""
    return message.replace(repr(path), repr(Path(path).name)).replace(path, Path(path).name)
