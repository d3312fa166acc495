"""A local folder of growing files that is mirrored to a URL."""

import shutil
import tempfile
import time
from pathlib import Path
from types import TracebackType

from rayjobs.storage.paths import is_url, upload_file


class SyncedFolder:
    """A folder for files that grow: the folder itself if it is local, else one here whose files are sent on, whole,
    every `SEND_EVERY_S` at most and at the end."""

    SEND_EVERY_S = 10.0

    def __init__(self, folder: Path) -> None:
        self.folder, self.sent_at = folder, 0.0
        self.local = Path(tempfile.mkdtemp(prefix="rayjobs-")) if is_url(folder) else folder
        self.sent: dict[Path, int] = {}

    def fetch(self, name: str) -> Path:
        """The local file of this name, as an earlier start of the run left it."""
        if is_url(self.folder) and not (self.local / name).exists() and (self.folder / name).exists():
            (self.local / name).write_bytes((self.folder / name).read_bytes())
        return self.local / name

    def send(self, *, now: bool = False) -> None:
        """Sends what has grown, if it is time."""
        if self.local == self.folder or not (now or time.monotonic() - self.sent_at > self.SEND_EVERY_S):
            return
        # first what lies in folders: a list is there after the images that it names
        for file in sorted(self.local.rglob("*"), key=lambda file: -len(file.parts)):
            if file.is_file() and self.sent.get(file) != file.stat().st_size:
                size = file.stat().st_size
                upload_file(file, self.folder / file.relative_to(self.local).as_posix())
                self.sent[file] = size
        self.sent_at = time.monotonic()

    def __enter__(self) -> "SyncedFolder":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.send(now=True)
        if self.local != self.folder:
            shutil.rmtree(self.local)
