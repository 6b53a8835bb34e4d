"""An exported file behind FastAPI and uvicorn: python -m examples.serve model.pt2 --port 8000.

    pip install 'magi-train[serve]'
    curl localhost:8000/                      # what goes in and comes out
    curl localhost:8000/predict -H 'content-type: application/json' -d '{"ids": [[1, 2, 3]]}'

A body names the file's inputs, as lists. Whatever does not fit the file's contract is answered with
status 422 and the contract's sentence. Requests run side by side in the server's threads, since
calls of a loaded file may; each request is a batch, which the file pads to one of its buckets, so
that the server itself needs no batching and no lock.
"""

import argparse
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import torch
import uvicorn
from fastapi import Body, FastAPI, HTTPException
from torch import Tensor

import magi_train
from magi_train.core.errors import ExportError
from magi_train.exporter.contract import Contract, TensorSpec, flatten
from magi_train.exporter.loaded import Loaded


def as_tensor(value: Any, spec: TensorSpec, device: str) -> Tensor:
    """Return nested lists as a tensor; only a number's width is changed, never its kind.

    Raises:
        HTTPException: They are no tensor.
    """
    try:
        found = torch.tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        sentence = f"{spec.name} must be {spec.text()}: {error}"
        raise HTTPException(422, sentence) from error
    wanted = getattr(torch, spec.dtype)
    numbers = found.dtype != torch.bool and wanted != torch.bool
    if numbers and (wanted.is_floating_point or not found.is_floating_point()):
        found = found.to(wanted)
    return found.to(device)


def make_app(
    run: Callable[..., Any], contract: Contract, start: Callable[[], Any] = lambda: None
) -> FastAPI:
    """Return the application.

    Args:
        run: What a request's inputs are given to, by name; called from several threads.
        contract: What goes in and comes out.
        start: Called once, before the first request.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        start()
        yield

    app = FastAPI(title="A model exported with magi-train", lifespan=lifespan)
    inputs = {each.name: each for each in contract.inputs}

    @app.get("/")
    def describe() -> dict[str, Any]:
        return {
            "inputs": {each.name: each.text() for each in contract.inputs},
            "outputs": {each.name: each.text() for each in contract.outputs},
        }

    @app.post("/predict")  # no coroutine: the server runs it in one of its threads
    def predict(given: dict[str, Any] = Body()) -> dict[str, Any]:  # noqa: B008
        tensors = {
            name: as_tensor(value, inputs[name], contract.device) if name in inputs else value
            for name, value in given.items()
        }
        try:
            results = run(**tensors)
        except ExportError as error:
            raise HTTPException(422, str(error)) from error
        found = flatten(results)[0]
        return {s.name: t.tolist() for s, t in zip(contract.outputs, found, strict=True)}

    return app


def app_of(loaded: Loaded) -> FastAPI:
    """Return the application of a loaded file, warmed up before the first request."""
    return make_app(loaded, loaded.contract, loaded.warmup)


def main() -> None:
    """Serve a file until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("path")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--buckets", type=int, nargs="*", default=[])
    parser.add_argument("--compile", action="store_true", help="a program, with Inductor")
    parser.add_argument("--cuda-graphs", action="store_true", help="for every shape")
    parser.add_argument("--auto-cuda-graphs", action="store_const", const="auto",
                        dest="cuda_graphs", help="for shapes that gain")  # fmt: skip
    options = parser.parse_args()
    loaded = magi_train.load(options.path, buckets=options.buckets, compile=options.compile,
                             cuda_graphs=options.cuda_graphs)  # fmt: skip
    uvicorn.run(app_of(loaded), host=options.host, port=options.port)


if __name__ == "__main__":
    main()
