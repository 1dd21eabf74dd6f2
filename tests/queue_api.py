"""Runs through the loopback Batch API: its routes, command lines, and what is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import image_gen
import live
from images_api import BatchPlan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from inputs import Job

UPLOAD = "POST /v1/files"
FILE = "GET /v1/files/{file_id}"
DELETE = "DELETE /v1/files/{file_id}"
CREATE = "POST /v1/batches"
LIST = "GET /v1/batches"
POLL = "GET /v1/batches/{batch_id}"
CANCEL = "POST /v1/batches/{batch_id}/cancel"
DOWNLOAD = "GET /v1/files/{file_id}/content"

STATE = Path("out", image_gen.STATE_NAME)
GOES_ON = BatchPlan(states=("in_progress",))


def queued(jobs: int | Sequence[Job], *flags: object) -> list[str]:
    """The command line of a run through the Batch API, into the folder out."""
    return live.batch(jobs, "--batch-api", *flags)


def made(folder: str = "out") -> list[str]:
    """The files of a folder that are not hidden."""
    return [name for name in live.names(folder) if not name.startswith(".")]
