"""The command line, `llava-mini`. Each command calls one function elsewhere, imported inside it so that --help is quick."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from llava_mini_fast import terminal

app = typer.Typer(
    name="llava-mini",
    help="Ask LLaVA-Mini about pictures and clips, check the engine, look at the environment.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Engine = Literal["torch", "vllm"]
Dtype = Literal["float32", "bfloat16", "float16"]
AnyDtype = Literal["float32", "bfloat16", "float16", "auto"]
Device = Annotated[
    Literal["auto", "cpu", "cuda"],
    typer.Option(help="Where the torch engine computes; auto takes CUDA where there is one. vLLM chooses by itself."),
]
Style = Literal["chat", "published"]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _examples(*lines: str) -> str:
    """An epilog with one command a line."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  {line}" for line in lines)])


@app.callback(
    epilog=_examples(
        'llava-mini ask picture.png "What is this?" --model path/or/hub-name',
        "llava-mini verify tests/goldens",
        "llava-mini doctor",
    )
)
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=lambda on: _version(on), help="Show the version and exit."),
    ] = False,
) -> None:
    pass


def _version(asked: bool) -> None:
    if asked:
        import llava_mini_fast

        typer.echo(f"llava-mini-fast {llava_mini_fast.__version__}")
        raise typer.Exit


@app.command(
    epilog=_examples(
        'llava-mini ask picture.png "What is this?" --model path/or/hub-name --stream',
        'llava-mini ask clip.mp4 "What happens?" --model path/or/hub-name --engine vllm --dtype bfloat16',
        'llava-mini ask picture.png "Which shape is red?" --heatmap looked.png',
        'llava-mini ask - "What is a mural?" --model path/or/hub-name --temperature 0.7 --top-p 0.9',
    )
)
def ask(
    media: Annotated[
        str, typer.Argument(metavar="MEDIA", help='A picture or a clip, told apart by content; "-" for text alone.')
    ],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="A checkpoint directory or hub name. Without it the shipped demo model answers: coloured shapes only."
        ),
    ] = None,
    engine: Annotated[Engine, typer.Option(help="torch starts at once; vllm takes its start-up time first.")] = "torch",
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer as it comes.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy; above 0 samples.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens that reach this probability.")
    ] = 1.0,
    device: Device = "auto",
    dtype: Annotated[
        AnyDtype, typer.Option(help="What the model computes in; auto takes what the device does fast.")
    ] = "float32",
    style: Annotated[
        Style, typer.Option(help="The prompt as in training (chat) or as the published scripts send it.")
    ] = "chat",
    heatmap: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Draw where the compressor looked, over the picture (torch engine)."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Ask one question about a picture, about a clip, or about nothing."""
    with _sentences(debug):
        medium = None if media == "-" else _guess(media)
        if heatmap is not None and (medium is None or engine == "vllm"):
            raise ValueError("--heatmap needs a picture or a clip, and the torch engine.")
        model = model or _demo()
        loaded = _load(engine, model, device, dtype, max_tokens)
        if stream and engine == "vllm":
            _say("--stream: vLLM's offline engine gives the whole answer at once, when it is done.")
        answer = loaded.ask(
            medium,
            question,
            max_tokens,
            stream,
            temperature=temperature,
            top_p=top_p,
            style=style,
            progress=sys.stderr.isatty(),
        )
        # closed on Ctrl-C too, so that nothing goes on computing behind an answer that nobody reads
        with closing(answer if stream else (text for text in (answer,))) as pieces:
            for piece in pieces:
                sys.stdout.write(terminal.printable(piece))
                sys.stdout.flush()
        typer.echo()
        if heatmap is not None:
            from llava_mini_fast.heatmap import heatmap as drawn

            drawn(loaded, medium).save(heatmap)
            _say(f"where the compressor looked: {heatmap}")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog=_examples(
        "llava-mini serve",
        "llava-mini serve path/or/hub-name --port 8080 --api-key secret",
        "llava-mini serve path/or/hub-name --tensor-parallel-size 2 --allowed-media-domains example.org",
    ),
)
def serve(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A checkpoint directory or hub name; else the demo model.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Serve a model by OpenAI's HTTP interface: vLLM's server with this model's defaults.

    Every flag of `vllm serve` may follow and wins over the defaults; docs/serving.md lists them and the limits on media.
    """
    with _sentences(debug):
        from llava_mini_fast.server.main import serve as run

        if model is not None and model.startswith("-"):  # a flag came first, so no model was named
            context.args.insert(0, model)
            model = None
        raise typer.Exit(run([*([model] if model else []), *context.args]))


@app.command(
    epilog=_examples(
        "llava-mini web",
        "llava-mini web --endpoint http://host:8000/v1 --api-key secret --model path/or/hub-name --port 7861",
    )
)
def web(
    endpoint: Annotated[
        str, typer.Option(help="Where a server answers (llava-mini serve).")
    ] = "http://127.0.0.1:8000/v1",
    api_key: Annotated[str, typer.Option(help="The server's key, where it asks for one.")] = "none",
    model: Annotated[
        str | None,
        typer.Option(help="The served checkpoint, for heat maps, whose front end is loaded here; else the demo model."),
    ] = None,
    heatmap: Annotated[bool, typer.Option("--heatmap/--no-heatmap", help="Offer heat maps.")] = True,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where heat maps are computed; the server may need the GPU.")
    ] = "cpu",
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on.")] = 7860,
    debug: Debug = False,
) -> None:
    """Show a web page that asks a server about pictures and clips. Needs the extra web."""
    with _sentences(debug):
        from llava_mini_fast import web as pages

        examples = None
        with suppress(FileNotFoundError):
            from llava_mini_fast.demo import examples as found

            examples = found()
        look = pages.looker(model or _demo(), device) if heatmap else None
        typer.echo(f"the page: http://{host}:{port} (asks {endpoint})")
        pages.serve(pages.Endpoint(endpoint, api_key), host, port, look, examples)


@app.command(
    epilog=_examples(
        "llava-mini verify tests/goldens",
        "llava-mini verify tests/goldens --engine vllm --json result.json",
    )
)
def verify(
    goldens: Annotated[Path, typer.Argument(metavar="GOLDENS_DIR", help="A directory with cases/*.json.")],
    engine: Annotated[Engine, typer.Option(help="torch compares fused rows and tokens, vllm tokens alone.")] = "torch",
    device: Device = "auto",
    dtype: Annotated[Dtype | None, typer.Option(help="Run only the cases of this dtype.")] = None,
    json: Annotated[Path | None, typer.Option(metavar="PATH", help="Write the results there too.")] = None,
    debug: Debug = False,
) -> None:
    """Run recorded outputs of the published code through an engine and compare.

    Exits with 1 if a row is wrong or nothing was run.
    """
    with _sentences(debug):
        from llava_mini_fast.testing import goldens as table
        from llava_mini_fast.testing import verify as runner

        _check_device(engine, device)
        with _progress(f"verify {goldens} ({engine})") as advance:
            results = runner.verify(goldens, engine, dtype, advance, device)
        typer.echo(table.format_table(results))
        if json is not None:
            json.write_text(
                runner.to_json(results, goldens=str(goldens), engine=engine, device=device), encoding="utf-8"
            )
        if not runner.passed(results):
            raise typer.Exit(1)


@app.command(
    "eval",
    epilog=_examples(
        "llava-mini eval",
        "llava-mini eval --engine vllm --questions 2000 --json result.json",
        "llava-mini eval build/demo-model/model --quantization int8",
        "TRITON_INTERPRET=1 llava-mini eval --backend triton --questions 18",
    ),
)
def evaluate(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A checkpoint directory or hub name; else the demo model.")
    ] = None,
    engine: Annotated[Engine, typer.Option(help="Which engine answers.")] = "torch",
    device: Device = "auto",
    dtype: Annotated[AnyDtype, typer.Option(help="What the model computes in.")] = "float32",
    backend: Annotated[
        Literal["auto", "torch", "triton", "cuda", "cuda-cpu"],
        typer.Option(help="Which kernels run the front end's ops (torch engine)."),
    ] = "auto",
    quantization: Annotated[
        Literal["int8"] | None, typer.Option(help="int8 weights (torch engine; needs the extra int8).")
    ] = None,
    questions: Annotated[int, typer.Option(min=9, help="How many, as many of each kind.")] = 900,
    seed: Annotated[int, typer.Option(help="The same seed asks the same questions.")] = 0,
    json: Annotated[Path | None, typer.Option(metavar="PATH", help="Write the result there too.")] = None,
    debug: Debug = False,
) -> None:
    """Ask about held-out pictures and clips of coloured shapes, and show how many answers are right, by kind of question.

    Beside each share stands what the commonest answer alone would reach.
    """
    with _sentences(debug):
        from llava_mini_fast.demo import exam

        if engine == "vllm" and (backend != "auto" or quantization):
            raise ValueError("--backend and --quantization are the torch engine's; leave them out with --engine vllm.")
        tasks = exam.exam(questions, seed)
        options = {"backend": backend, "quantization": quantization} if engine == "torch" else {}
        name = model or _demo()
        loaded = _load(engine, name, device, dtype, exam.MAX_TOKENS, **options)
        with _bar(f"eval ({engine}, {dtype})", len(tasks)) as advance:
            result = exam.examine(loaded, tasks, progress=advance)
        _print_table(("kind", "right", "majority", "questions"), exam.table(result))
        if json is not None:
            said = {
                "model": model or "demo",
                "engine": engine,
                "device": device,
                "dtype": dtype,
                "seed": seed,
            } | options
            json.write_text(result.to_json(**said), encoding="utf-8")


@app.command(epilog=_examples("llava-mini doctor"))
def doctor(debug: Debug = False) -> None:
    """Show versions, devices, which engines and kernels work here, and why others don't.

    Exits with 1 only if the torch engine can't work.
    """
    with _sentences(debug):
        from llava_mini_fast.doctor import examine

        with _status("looking around"):
            report = examine()
        _print_report(report)
        if not report.healthy:
            _say("the torch engine does not work here; see above.")
            raise typer.Exit(1)


@app.command(
    "make-data",
    epilog=_examples(
        "llava-mini make-data data/train --scenes 1000 --clips 200",
        "llava-mini make-data data/held-out --scenes 200 --clips 60 --split held_out --seed 1",
    ),
)
def make_data(
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Where to write; made, and must be empty.")],
    scenes: Annotated[int, typer.Option(min=0, help="How many pictures.")] = 1000,
    clips: Annotated[int, typer.Option(min=0, help="How many clips.")] = 200,
    split: Annotated[
        Literal["train", "validation", "held_out"], typer.Option(help="Splits share no scene, whatever the seeds.")
    ] = "train",
    seed: Annotated[int, typer.Option(help="The same seed draws the same data.")] = 0,
    debug: Debug = False,
) -> None:
    """Draw pictures and clips of coloured shapes, with captions and questions in LLaVA's JSON: data to train on.

    DIRECTORY gets images/, videos/, captions.json (stage 1) and questions.json (stage 2).
    """
    with _sentences(debug):
        from llava_mini_fast.demo import data

        with _bar(f"make-data {directory}", scenes + clips) as advance:
            data.make_data(directory, scenes, clips, split, seed, progress=advance)
        typer.echo(f"{scenes} pictures and {clips} clips of split {split} are in {directory}.")


@app.command(
    epilog=_examples(
        "llava-mini train path/to/checkpoint data/train/captions.json --stage 1 --out stage1",
        "llava-mini train stage1 data/train/questions.json --stage 2 --out stage2 --bf16 --gradient-checkpointing",
        "torchrun --nproc-per-node 8 --no-python llava-mini train stage1 questions.json --stage 2 --out stage2",
    )
)
def train(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint directory or hub name to start from.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A LLaVA-format JSON file.")],
    stage: Annotated[
        int, typer.Option(min=1, max=2, help="1: the projector, on captions; 2: all but the vision tower.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIRECTORY", help="Where the trained checkpoint goes.")],
    folder: Annotated[
        Path | None, typer.Option(metavar="DIRECTORY", help="What paths in DATA are relative to; else DATA's own.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Examples of a step, all processes together.")] = 256,
    micro_batch: Annotated[int, typer.Option(min=1, help="Examples that a process takes at once.")] = 16,
    learning_rate: Annotated[float | None, typer.Option(help="In place of the recipe's (1e-3, then 1e-4).")] = None,
    epochs: Annotated[float | None, typer.Option(help="In place of the recipe's (1, then 2).")] = None,
    save_steps: Annotated[
        int, typer.Option(min=1, help="Save this often; a run that is cut off goes on from there.")
    ] = 100,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16; weights stay float32.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    deepspeed: Annotated[Path | None, typer.Option(metavar="JSON", help="A DeepSpeed configuration.")] = None,
    debug: Debug = False,
) -> None:
    """Train one stage of the published recipe; the same command again goes on where a run was cut off.

    Needs the extra train. Several GPUs through torchrun or accelerate.
    """
    with _sentences(debug):
        from llava_mini_fast.train import recipe

        more = {"learning_rate": learning_rate, "num_train_epochs": epochs, "deepspeed": deepspeed and str(deepspeed)}
        options = {name: value for name, value in more.items() if value is not None} | {
            "save_steps": save_steps, "bf16": bf16, "gradient_checkpointing": gradient_checkpointing,
        }  # fmt: skip
        job = recipe.Job(model, data, folder or data.parent, out, stage, batch, micro_batch, options)
        typer.echo(f"trained checkpoint: {recipe.train(job)}")


bench = typer.Typer(
    name="bench",
    help="Time parts of the engine on this machine.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench)


@bench.callback(epilog=_examples("llava-mini bench kernels --device cpu", "llava-mini bench kernels --list"))
def _bench() -> None:
    pass


@bench.command(
    epilog=_examples(
        "llava-mini bench kernels --device cpu",
        "llava-mini bench kernels --op prefix_attention --shape text60 --dtype bfloat16",
        "llava-mini bench kernels --backend triton --json result.json --markdown result.md --plot result.svg",
        "llava-mini bench kernels --list",
    )
)
def kernels(
    op: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this op; may be repeated.")] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help='Only shapes of this name or with this part, as "text60"; may be repeated.'),
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where to run; auto takes CUDA where there is one.")
    ] = "auto",
    dtype: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="May be repeated; without it float32 on a CPU and bfloat16 on CUDA."),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="torch, triton or cuda; may be repeated. Without it torch on a CPU, the other two on CUDA.",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each measurement; heavy shapes get fewer.")] = 7,
    compiled: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Compare with torch.compile; without it on CUDA alone."),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Write the results there, with the machine.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="PATH", help="Write the table there too.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="PATH", help="Write a bar chart there, as SVG.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Show ops and shapes, and run nothing.")] = False,
    debug: Debug = False,
) -> None:
    """Time each kernel at the model's shapes beside the published structure and other libraries.

    A row's numbers are checked first; a row that fails gives no number, and the command exits with 1.
    """
    with _sentences(debug):
        from llava_mini_fast.bench import kernels as runner
        from llava_mini_fast.bench import report

        options = runner.Options(op or (), shape or (), device, dtype or (), backend or (), rounds, compiled)
        if listed:
            typer.echo(runner.listing(options))
            return
        with _progress(f"bench kernels ({options.device})") as advance:
            result = runner.run(options, progress=advance)
        report.show(result, _console())
        runner.store(result, json, markdown, plot)
        if runner.red(result):
            _say(f"red, so without numbers: {'; '.join(runner.red(result))}")
            raise typer.Exit(1)


@contextmanager
def _sentences(debug: bool) -> Iterator[None]:
    """Errors that the user can do something about become a sentence and exit status 1; Ctrl-C becomes 130."""
    with warnings.catch_warnings():
        warnings.showwarning = terminal.show_warning
        terminal.quiet()
        try:
            yield
        except KeyboardInterrupt:
            _say("interrupted")
            raise typer.Exit(130) from None
        except typer.Exit:
            raise
        except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
            if debug:
                traceback.print_exc()
            _say(f"error: {terminal.sentence(error)}")
            raise typer.Exit(1) from None


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _guess(path: str) -> Any:
    from llava_mini_fast.preprocess.guess import guess

    return guess(path)


def _demo() -> str:
    from llava_mini_fast.demo import shipped

    directory = str(shipped())
    _say("no --model: the demo model answers, which knows coloured shapes only (docs/demo-model.md)")
    return directory


def _check_device(engine: str, device: str) -> None:
    if engine == "vllm" and device != "auto":
        raise ValueError("--device is the torch engine's; vLLM runs on what it was built for.")


def _load(engine: str, model: str, device: str, dtype: str, max_tokens: int, **options: Any) -> Any:
    """An engine; `options` are more of `llava_mini_fast.load`'s, for torch alone."""
    _check_device(engine, device)
    with _status(f"loading {model}"):
        if engine == "vllm":
            from llava_mini_fast.vllm_plugin.offline import OfflineEngine

            return OfflineEngine(model, dtype, max_tokens)
        import llava_mini_fast as lmf

        return lmf.load(model, device, dtype, **options)


def _console(stderr: bool = False) -> Any:
    from rich.console import Console

    return Console(stderr=stderr)


def _status(text: str) -> Any:
    """A spinner on the terminal while a block runs; nothing where stderr is a file."""
    return _console(stderr=True).status(f"{text} ...")


@contextmanager
def _progress(title: str) -> Iterator[Any]:
    """A bar on stderr where that is a terminal; yields a function of (one more result, how many there are in all)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = _console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda result, total: bar.update(task, advance=1, total=total, description=f"{title}: {result.case}")


@contextmanager
def _bar(title: str, total: int) -> Iterator[Any]:
    """A bar on stderr where that is a terminal; yields a function of how many more are done."""
    from tqdm import tqdm

    with tqdm(desc=title, total=total, file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        yield bar.update


def _print_table(heads: tuple[str, ...], rows: Any) -> None:
    from rich.table import Table

    table = Table(*heads)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    _console().print(table)


def _print_report(report: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "warning": "yellow", "bad": "red"}
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for title, findings in report.sections.items():
        table.add_row(Text(title, style="bold"))
        for finding in findings:
            colour = colours[finding.state]
            table.add_row(Text(f"  {finding.name}"), Text(finding.value, style=colour), Text(finding.note))
    _console().print(table)
