"""What a developer writes in ten minutes: AsyncOpenAI, a semaphore and gather, to compare with.

python plain.py FOLDER JOBS SIZE CONCURRENCY [--retry]
"""

from __future__ import annotations

import asyncio
import base64
import sys
from pathlib import Path

from openai import AsyncOpenAI, RateLimitError


async def main(folder: Path, jobs: int, size: str, concurrency: int, *, retry: bool) -> None:
    slots = asyncio.Semaphore(concurrency)
    refused = 0
    async with AsyncOpenAI(max_retries=0) as client:

        async def one(number: int) -> None:
            nonlocal refused
            async with slots:
                while True:
                    try:
                        answer = await client.images.generate(
                            model="gpt-image-2", prompt=f"job {number}", size=size
                        )
                        break
                    except RateLimitError as error:
                        if not retry:
                            raise
                        refused += 1
                        await asyncio.sleep(float(error.response.headers["retry-after"]))
            for image in answer.data or []:
                (folder / f"{number}.png").write_bytes(base64.b64decode(image.b64_json or ""))

        await asyncio.gather(*[one(number) for number in range(jobs)])


if __name__ == "__main__":
    where, count, pixels, slots_, *rest = sys.argv[1:]
    asyncio.run(main(Path(where), int(count), pixels, int(slots_), retry="--retry" in rest))
