"""A local folder of growing files that is uploaded to a URL."""

import shutil
import tempfile
import time
from pathlib import Path
from types import TracebackType

from rayjobs.storage.lease import check_lease
from rayjobs.storage.paths import is_url, read_bytes, upload_file


class SyncedFolder:
    """A folder for files that grow line by line, which object stores cannot append to.

    `local` is where to write: the folder itself if it is a local path; for a URL a temporary folder, whose files are
    uploaded whole, every `UPLOAD_EVERY_S` seconds at most and at the end.
    """

    UPLOAD_EVERY_S = 10.0

    def __init__(self, folder: Path) -> None:
        self.folder, self.uploaded_at = folder, 0.0
        self.local = Path(tempfile.mkdtemp(prefix="rayjobs-")) if is_url(folder) else folder
        self.uploaded_sizes: dict[Path, int] = {}

    def fetch(self, name: str) -> Path:
        """The local file of this name, with the content that an earlier start of the run left."""
        if is_url(self.folder) and not (self.local / name).exists() and (self.folder / name).exists():
            (self.local / name).write_bytes(read_bytes(self.folder / name))
        return self.local / name

    def send(self, *, now: bool = False) -> None:
        """Upload the files that have grown, if it is time or `now`. Raises StorageError; a later call tries again.

        Raises LeaseLostError if another driver has taken over the folder.
        """
        if not (now or time.monotonic() - self.uploaded_at > self.UPLOAD_EVERY_S):
            return
        check_lease(self.folder / "file")
        if self.local == self.folder:
            return
        # Files in subfolders go first, so that a list of images arrives after the images that it names.
        for file in sorted(self.local.rglob("*"), key=lambda file: -len(file.parts)):
            if file.is_file() and self.uploaded_sizes.get(file) != file.stat().st_size:
                size = file.stat().st_size
                upload_file(file, self.folder / file.relative_to(self.local).as_posix())
                self.uploaded_sizes[file] = size
        self.uploaded_at = time.monotonic()

    def __enter__(self) -> "SyncedFolder":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.send(now=True)
        if self.local != self.folder:
            shutil.rmtree(self.local)
