"""Several replicas of the service behind one address, on Ray Serve: `pip install -r requirements-replicas.txt`, then

    STARLING_WEIGHTS=weights/demo python -m starling.replicas --min-replicas 1 --max-replicas 4

It answers POST /predictions as Cog's server does, with JSON or a stream of events. Each replica holds a whole model
and takes up to COG_MAX_CONCURRENCY requests at a time. Ray starts replicas when more than that are running or waiting
per replica, and stops idle ones. A request whose replica dies restarts on another unless its text has begun to stream.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starling.errors import PYTHON, EngineError, RequestError, StarlingError, unexpected
from starling.garbage import frozen_heap
from starling.openapi import declared_concurrency
from starling.request import OLD_NAMES, Request
from starling.settings import Settings
from starling.weights import locate_weights

try:
    from ray import serve
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import DeploymentUnavailableError
    from ray.serve.handle import DeploymentHandle
    from starlette.requests import Request as HttpRequest
    from starlette.responses import JSONResponse, Response, StreamingResponse
except ImportError as error:
    sys.exit(
        f"{error.name} is not installed, but replicas need Ray Serve. "
        f"Run: {PYTHON} -m pip install -r requirements-replicas.txt"
    )

if TYPE_CHECKING:
    from starling.generation import Generation

logger = logging.getLogger(__name__)

# A request's text is 1 MiB at most (starling/request.py), and JSON makes up to six bytes of one: \u0001.
MAX_BODY_BYTES = 8 << 20
ATTEMPTS = 5  # replicas on which a request is tried before it fails
RETRY_PAUSE_S = 0.2
Event = dict[str, Any]


class Replica:
    """One model. Streams {"chunk": text}… and finally {"result": metrics} or {"error": message, "again": bool}."""

    def __init__(self, settings: Settings) -> None:
        from starling.logs import configure
        from starling.service import Service

        configure()
        with frozen_heap():
            self._service = Service.load(settings)
        self._threads = ThreadPoolExecutor(settings.max_concurrency, thread_name_prefix="stream")

    async def stream(self, fields: dict[str, Any]) -> AsyncIterator[Event]:
        loop = asyncio.get_running_loop()
        starting: Future[Generation] | None = None
        try:
            request = Request.parse(**fields)
            starting = self._threads.submit(self._service.generate, request)
            generation = await asyncio.wrap_future(starting)
            while (chunk := await loop.run_in_executor(self._threads, next, generation, None)) is not None:
                yield {"chunk": chunk}
            assert generation.result is not None
            yield {"result": {name: value for name, value in asdict(generation.result).items() if name != "text"}}
        except StarlingError as error:
            yield {"error": f"{type(error).__name__}: {error}", "again": isinstance(error, EngineError)}
        except Exception as error:
            logger.exception("a request failed")
            yield {"error": str(unexpected(error)), "again": False}
        finally:
            # A caller may leave while the thread is still starting the answer: compiling a grammar takes seconds.
            if starting is not None:
                starting.add_done_callback(_cancel)

    async def check_health(self) -> None:
        """Ray calls this periodically, and replaces a replica that raises."""
        if not self._service.healthy:
            raise RuntimeError("The engine is not making progress.")


def _cancel(starting: "Future[Generation]") -> None:
    if not starting.cancelled() and starting.exception() is None:
        starting.result().cancel()


class Front:
    """Checks a request, passes it to a replica, and restarts it on another if that one dies before its text begins."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas.options(method_name="stream", stream=True)

    async def __call__(self, http: HttpRequest) -> Response:
        if http.url.path == "/health-check":
            return JSONResponse({"status": "READY"})
        if http.url.path != "/predictions" or http.method != "POST":
            return JSONResponse({"error": "Use POST /predictions or GET /health-check"}, 404)
        try:
            fields = fields_of(await body_of(http))
        except RequestError as error:
            status = error.status if isinstance(error, BodyError) else 422
            return JSONResponse({"detail": [{"loc": ["body", "input"], "msg": str(error)}]}, status)
        identity = secrets.token_hex(13)
        if "text/event-stream" in http.headers.get("accept", ""):
            return StreamingResponse(as_sent_events(identity, self._answer(fields)), media_type="text/event-stream")
        return JSONResponse(await as_one(identity, self._answer(fields)))

    async def _answer(self, fields: dict[str, Any]) -> AsyncIterator[Event]:
        """The stream of the first replica that does not fail before its first chunk."""
        begun = False
        for attempt in range(1, ATTEMPTS + 1):
            try:
                async for event in self._replicas.remote(fields):
                    if event.get("again") and not begun and attempt < ATTEMPTS:
                        logger.warning("a replica could not begin a request (%s); retrying on another", event["error"])
                        break
                    begun = True
                    yield event
                else:
                    return
            except (RayActorError, DeploymentUnavailableError) as error:
                if begun or attempt == ATTEMPTS:
                    yield {"error": "The replica died while it answered. Ask again.", "again": False}
                    return
                logger.warning("a replica died before its answer began (%s); retrying on another", type(error).__name__)
            await asyncio.sleep(RETRY_PAUSE_S)


class BodyError(RequestError):
    """A body that is too long or not JSON. `status`: the HTTP status with which Cog's server answers it."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


async def body_of(http: HttpRequest) -> bytes:
    """The body. Stops reading when it exceeds what is accepted. Raises BodyError."""
    body = bytearray()
    async for part in http.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise BodyError(f"The body is longer than {MAX_BODY_BYTES} bytes. Shorten it", 413)
    return bytes(body)


def fields_of(body: bytes) -> dict[str, Any]:
    """Cog's body, {"input": {…}} → a request's fields, checked. Raises RequestError."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):  # RecursionError: brackets nested a thousand deep
        raise BodyError("The body is not JSON", 400) from None
    try:
        fields = content["input"]
    except (TypeError, KeyError):
        raise RequestError('The body is not of the form {"input": {…}}') from None
    if not isinstance(fields, dict):
        raise RequestError("input is not an object. Give the inputs by name")
    known = Request.model_fields.keys() | OLD_NAMES
    fields = {name: value for name, value in fields.items() if name in known}  # like Cog, drop others
    Request.parse(**fields)
    return fields


async def as_sent_events(identity: str, events: AsyncIterator[Event]) -> AsyncIterator[str]:
    """The server-sent events that Cog's server would send."""

    def sent(name: str, **data: Any) -> str:
        return f"event: {name}\ndata: {json.dumps({'id': identity, **data})}\n\n"

    yield sent("start", status="processing")
    async for event in events:
        if "chunk" in event:
            yield sent("output", chunk=event["chunk"])
        elif "result" in event:
            yield sent("completed", status="succeeded", metrics=event["result"])
        else:
            yield sent("completed", status="failed", error=event["error"], metrics={})


async def as_one(identity: str, events: AsyncIterator[Event]) -> dict[str, Any]:
    """The whole prediction, as Cog's server would return it."""
    prediction: dict[str, Any] = {"id": identity, "output": [], "status": "failed", "error": None, "metrics": {}}
    async for event in events:
        if "chunk" in event:
            prediction["output"].append(event["chunk"])
        elif "result" in event:
            prediction |= {"status": "succeeded", "metrics": event["result"]}
        else:
            prediction["error"] = event["error"]
    return prediction


def application(settings: Settings, least: int, most: int, cores: float, gpus: float) -> serve.Application:
    """Between `least` and `most` replicas, each with `cores` CPU cores and `gpus` GPUs of its own."""
    replica = serve.deployment(
        Replica,
        name="starling",
        max_ongoing_requests=settings.max_concurrency,
        autoscaling_config={
            "min_replicas": least,
            "max_replicas": most,
            "initial_replicas": least,
            "target_ongoing_requests": settings.max_concurrency,  # waiting ones count too
        },
        ray_actor_options={"num_cpus": cores, "num_gpus": gpus},
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=120,  # lets streams finish
    )
    front = serve.deployment(Front, name="front", max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0})
    return front.bind(replica.bind(settings))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m starling.replicas", description="Replicas behind one address, on Ray Serve."
    )
    parser.add_argument("--min-replicas", type=int, default=1, help="replicas that always run (default: %(default)s)")
    parser.add_argument("--max-replicas", type=int, default=4, help="replicas under load (default: %(default)s)")
    parser.add_argument("--cores", type=float, default=1, help="CPU cores that Ray reserves for each replica")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs that Ray reserves for each replica")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=5000, help="(default: %(default)s)")
    options = parser.parse_args()
    least, most = options.min_replicas, options.max_replicas
    if least < 0 or most < max(1, least):
        parser.error(f"--min-replicas is {least} and --max-replicas {most}; give 0 <= min <= max, and max above 0")
    as_in_an_image = {"COG_MAX_CONCURRENCY": str(declared_concurrency(Path(__file__).parent.parent / "predict.py"))}
    try:
        settings = Settings.from_env(as_in_an_image | os.environ)
        locate_weights(settings)  # once, before Ray starts, or each replica would fail or fetch them itself
    except StarlingError as error:
        sys.exit(str(error))
    serve.start(http_options={"host": options.host, "port": options.port})
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C; Ray's own handler aborts the process
    with contextlib.suppress(KeyboardInterrupt):
        serve.run(application(settings, least, most, options.cores, options.gpus), blocking=True)


if __name__ == "__main__":
    main()
