"""What a good programmer writes without the SDK: threads, http.client, files that are synced.

python threads.py FOLDER JOBS SIZE CONCURRENCY [--downscale-max-dim EDGE]
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path
from urllib.parse import urlsplit

from PIL import Image

COPY_LEVEL = 4  # as image_gen.py has it
API = urlsplit(os.environ["OPENAI_BASE_URL"])
HEADERS = {
    "Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}",
    "Content-Type": "application/json",
}
own = threading.local()


def generate(prompt: str, size: str) -> bytes:
    """One request, on the connection of this thread."""
    if not hasattr(own, "connection"):
        kind = HTTPSConnection if API.scheme == "https" else HTTPConnection
        own.connection = kind(API.netloc)
    body = json.dumps({"model": "gpt-image-2", "prompt": prompt, "size": size})
    own.connection.request("POST", f"{API.path}/images/generations", body, HEADERS)
    response = own.connection.getresponse()
    answer = response.read()
    if response.status != 200:
        raise RuntimeError(answer.decode())
    return base64.b64decode(json.loads(answer)["data"][0]["b64_json"])


def save(path: Path, content: bytes) -> None:
    """A whole file or none, which outlives a power cut."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def one(folder: Path, number: int, size: str, edge: int | None) -> None:
    content = generate(f"job {number}", size)
    save(folder / f"{number}.png", content)
    if edge:
        with Image.open(io.BytesIO(content)) as image:
            image.thumbnail((edge, edge), Image.Resampling.LANCZOS)
            image.save(folder / f"{number}-web.png", compress_level=COPY_LEVEL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("jobs", type=int)
    parser.add_argument("size")
    parser.add_argument("concurrency", type=int)
    parser.add_argument("--downscale-max-dim", type=int)
    words = parser.parse_args()
    with ThreadPoolExecutor(words.concurrency) as pool:
        tasks = [
            pool.submit(one, words.folder, number, words.size, words.downscale_max_dim)
            for number in range(words.jobs)
        ]
    for task in tasks:
        task.result()


if __name__ == "__main__":
    main()
