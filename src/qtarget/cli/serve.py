"""``qtarget serve``: a frozen model that others can ask for log-probs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qtarget.cli.options.typed import finite

if TYPE_CHECKING:
    from qtarget.scoring.sources.identity import Identity
    from qtarget.serving.settings import ServeSettings


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub name of a causal language model.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine's need a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8100,
    token_file: Annotated[
        Path | None, typer.Option(help="Bearer token that clients must send; else $QTARGET_API_KEY.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    workers: Annotated[
        int, typer.Option(help="Processes that score, one thread each; on a CPU they share the weights.")
    ] = 1,
    max_batch: Annotated[int, typer.Option(help="Requests scored together.")] = 16,
    wait_ms: Annotated[int, typer.Option(help="How long the first of them waits.")] = 5,
    tokens_per_batch: Annotated[int, typer.Option(help="Padded tokens a forward pass; 0: by device.")] = 0,
    queue: Annotated[int, typer.Option(help="Requests that may wait; beyond: 429.")] = 1024,
    timeout: Annotated[
        float, typer.Option(callback=finite, help="Seconds for a request, waiting included; beyond: 408.")
    ] = 60.0,
    start_timeout: Annotated[float, typer.Option(callback=finite, help="Seconds until it must be ready.")] = 600.0,
    max_restarts: Annotated[int, typer.Option(help="After crashes, within ten minutes.")] = 20,
    header_timeout: Annotated[
        float,
        typer.Option(
            callback=finite, help="Seconds for a request's header; a connection that is silent longer is closed."
        ),
    ] = 10.0,
    max_connections: Annotated[int, typer.Option(help="At once; the longest silent one makes room.")] = 1024,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Another name in Host and Origin that may ask without a token. Repeatable.")
    ] = None,
    max_body_bytes: Annotated[int, typer.Option(help="Of a request.")] = 2**20,
    max_rows: Annotated[int, typer.Option(help="A request.")] = 64,
    max_row_tokens: Annotated[int, typer.Option(help="0: what the model allows.")] = 0,
    max_tokens: Annotated[int, typer.Option(help="A request.")] = 2**16,
    max_top_k: Annotated[int, typer.Option(help="Log-probs a position.")] = 1024,
    max_candidates: Annotated[int, typer.Option(help="Ids a request.")] = 1024,
    max_answer_bytes: Annotated[int, typer.Option(help="Of an answer.")] = 2**26,
    allow_new_weights: Annotated[
        bool, typer.Option("--allow-new-weights", help="Serve a model with missing or unknown weights.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
) -> None:
    """Serve MODEL until Ctrl-C or SIGTERM; the URL is printed once requests are answered."""
    from qtarget.scoring.sources.identity import Limits
    from qtarget.serving.settings import ServeSettings

    # fmt: off
    limits = Limits(
        body_bytes=max_body_bytes, rows=max_rows, row_tokens=max_row_tokens, tokens=max_tokens, top_k=max_top_k,
        candidates=max_candidates, answer_bytes=max_answer_bytes,
    )
    settings = ServeSettings(
        model=model, dtype=dtype, device=device, trust_remote_code=trust_remote_code,
        allow_new_weights=allow_new_weights, workers=workers, max_batch=max_batch,
        wait_ms=wait_ms, tokens_per_batch=tokens_per_batch, queue=queue, timeout=timeout, start_timeout=start_timeout,
        max_restarts=max_restarts, header_timeout=header_timeout, max_connections=max_connections,
        hosts=tuple(name.lower() for name in allow_host or ()), limits=limits,
    )
    # fmt: on
    run_server(settings, host, port, token_file)


def run_server(settings: ServeSettings, host: str, port: int, token_file: Path | None) -> None:
    """Serve until a signal; what happens goes to standard error.

    Raises:
        MissingDependencyError: mosec is not installed.
        ConfigError, ServingError: see ``qtarget.serving.server``.
    """
    import asyncio
    import logging
    import os

    from qtarget.core.errors import MissingDependencyError
    from qtarget.scoring.sources.http import KEY_VARIABLE

    try:
        from qtarget.serving import server
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "qtarget":
            raise
        raise MissingDependencyError(f"serving needs {error.name}; run `pip install 'qtarget[serve]'`") from error
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    token = server.read_token(token_file, os.environ.get(KEY_VARIABLE))
    asyncio.run(server.serve(settings, host=host, port=port, token=token, on_ready=announce))


def announce(url: str, identity: Identity) -> None:
    """One line that scripts can wait for."""
    print(
        f"{url} serves {identity.model_id} ({identity.vocab_size} ids, {identity.dtype}, rows of at most "
        f"{identity.limits.row_tokens} tokens)",
        flush=True,
    )
