"""`interleaf chat`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from interleaf.cli.app import app, quiet


@app.command(epilog="Example: interleaf chat bundled:smollm2 out/code")
def chat(
    base: Annotated[str, typer.Argument(help="Pretrained model: hub name, folder, bundled:NAME.")],
    adapter: Annotated[
        str | None, typer.Argument(help="Adapter folder or hub name; the base alone if not given.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 200,
) -> None:
    """Try a model by hand: a line in, the answer streams out; /off and /on switch the adapter."""
    from transformers import TextStreamer

    quiet()
    task, model, tokenizer = _opened(base, adapter)
    streamer: Any = TextStreamer(tokenizer, skip_prompt=not task.encoder_decoder, skip_special_tokens=True)
    if sys.stdin.isatty():
        print("A line is a prompt. /off and /on switch the adapter, Ctrl-D ends.", file=sys.stderr)
    for line in sys.stdin:
        text = line.strip()
        if text in ("/off", "/on"):
            model.disable_adapters() if text == "/off" else model.enable_adapters()
            continue
        if text:
            options = {"streamer": streamer, "num_beams": 1, "max_new_tokens": max_new_tokens}
            list(task.generate(model, tokenizer, {"text": [text]}, **options))


def _opened(base: str, adapter: str | None) -> tuple[Any, Any, Any]:
    from interleaf.errors import ConfigError
    from interleaf.evaluate import open_adapter
    from interleaf.model import adapt
    from interleaf.tasks import Code
    from interleaf.tasks.generation import Generation

    if adapter is not None:
        opened = open_adapter(adapter, base)
        if not isinstance(opened.task, Generation):
            raise ConfigError(f"{adapter} is for {opened.task.name}: it answers nothing. Use `interleaf predict`.")
        return opened.task, opened.model, opened.tokenizer
    task = Code(stop=[])
    tokenizer = task.tokenizer(base)
    task.chat_template = tokenizer.chat_template
    task.chat = bool(task.chat_template)
    return task, adapt(task.model(base)), tokenizer
