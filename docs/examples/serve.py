"""A small HTTP server around `model.stablehlo`: jax and the standard library, none of treesurgeon's code.

    python docs/examples/serve.py runs/demo/selected --port 8000
    curl --data-binary @images.npy http://127.0.0.1:8000/predict

The body is a .npy file of images `[N, H, W, C]`, uint8 (0 to 255) or float in 0 to 1; the answer is JSON:
`{"labels": [...], "logits": [[...]]}`. Images are normalised as manifest.json says.
"""

import argparse
import io
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export

LARGEST = 64 * 2**20  # bytes of a request


class Model:
    """The exported function with its normalisation and the names of its classes."""

    def __init__(self, selected: Path):
        manifest = json.loads((selected / "manifest.json").read_text())
        self.labels = manifest["labels"]
        self.shape = tuple(manifest["model"]["input_shape"])
        self.mean, self.std = (np.float32(manifest["normalisation"][name]) for name in ("mean", "std"))
        self.call = jax.jit(export.deserialize(bytearray((selected / "model.stablehlo").read_bytes())).call)

    def answer(self, body: bytes) -> dict[str, Any]:
        """What is told about the images of a request."""
        images = np.load(io.BytesIO(body), allow_pickle=False)
        if images.ndim != 4 or images.shape[1:] != self.shape or not len(images):
            raise ValueError(f"expected images [N, {', '.join(map(str, self.shape))}], got {list(images.shape)}")
        if images.dtype == np.uint8:
            images = images / np.float32(255)
        # Padded to a power of two, so that few batch sizes are compiled.
        count, size = len(images), 1 << (len(images) - 1).bit_length()
        x = np.resize((images.astype(np.float32) - self.mean) / self.std, (size, *self.shape))
        logits = np.asarray(self.call(x))[:count]
        return {"labels": [self.labels[i] for i in logits.argmax(-1)], "logits": logits.tolist()}


def server(selected: Path, port: int, host: str = "127.0.0.1") -> ThreadingHTTPServer:
    """A server that is bound and not yet running; port 0 takes a free one."""
    model = Model(selected)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            """Answer /predict."""
            length = int(self.headers.get("Content-Length", 0))
            if self.path != "/predict" or not 0 < length <= LARGEST:
                self.reply(404 if self.path != "/predict" else 413, {"error": "POST a .npy file to /predict"})
                return
            try:
                self.reply(200, model.answer(self.rfile.read(length)))
            except (ValueError, EOFError) as error:
                self.reply(400, {"error": str(error)})

        def reply(self, code: int, content: Any) -> None:
            data = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    return ThreadingHTTPServer((host, port), Handler)


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("selected", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    with server(options.selected, options.port) as serving:
        print(f"listening on http://127.0.0.1:{serving.server_port}/predict")
        serving.serve_forever()


if __name__ == "__main__":
    main()
