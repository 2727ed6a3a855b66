"""Where captured activations are kept: on the model's device, in memory, or in files that are read where they lie."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from mechinterp.core.sites import Site
from mechinterp.errors import FileFormatError

__all__ = ["Store", "mapped_file", "put_whole"]

# What safetensors calls the dtypes that activations have.
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def mapped_file(
    path: Path, layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]], note: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """A new safetensors file of tensors of these shapes; what is written to the tensors is written to the file.

    safetensors itself writes files from tensors that are there whole; here they come row by row.
    """
    header: dict[str, object] = {} if note is None else {"__metadata__": dict(note)}
    stop = 0
    # Larger items first, so that each tensor begins at a multiple of its item size.
    for name, (shape, dtype) in sorted(layout.items(), key=lambda each: -each[1][1].itemsize):
        start, stop = stop, stop + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    begin = 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        if hasattr(os, "posix_fallocate"):
            # A full disk is an error here; later it would end the process.
            os.posix_fallocate(file.fileno(), 0, begin + stop)
        file.truncate(begin + stop)
    storage = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=begin + stop)
    tensors = {}
    for name, (shape, dtype) in layout.items():
        start = begin + header[name]["data_offsets"][0]  # type: ignore[index]
        tensors[name] = torch.empty(0, dtype=dtype).set_(storage, start // dtype.itemsize, shape)  # type: ignore[call-overload]
    return tensors


@contextmanager
def put_whole(target: Path) -> Iterator[Path]:
    """A path to write a file or folder to, which then takes the place of ``target`` at once; or goes, if that fails."""
    part, old = (target.with_name(f".{target.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    try:
        yield part
        if target.is_dir():
            os.replace(target, old)
        try:
            os.replace(part, target)
        except OSError:
            if old.exists():
                os.replace(old, target)
            raise
    finally:
        for left in (part, old):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)


class Store(MutableMapping[Site, Tensor]):
    """Takes activations as they pass, whole or some rows at a time, and keeps each once.

    Parameters
    ----------
    rows
        How many there will be; those of the next pass begin at `first`, which the caller moves on.
    device
        Where they are kept, as far as there is room.
    memory
        Bytes that may be kept there. What does not fit goes to a file of its own.
    folder
        Where all of them become files; ``None``: the device, and a temporary folder for what does not fit.
    """

    def __init__(self, rows: int, device: torch.device, memory: int, folder: Path | None = None) -> None:
        self.rows, self.device, self.memory, self.folder = rows, device, memory, folder
        self.first = 0
        self.held = 0
        self.files: dict[Site, Path] = {}
        self._kept: dict[Site, Tensor] = {}
        self._folder = folder
        if folder is not None:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise FileFormatError(f"{folder} is there already and not an empty folder; activations go to a new one")
            folder.mkdir(parents=True, exist_ok=True)

    def __setitem__(self, site: Site, value: Tensor) -> None:
        rows = value.shape[0]
        if site not in self._kept:
            size = value.element_size() * self.rows * value[0].numel()
            fits = self.folder is None and self.held + size <= self.memory
            if fits and rows == self.rows:
                self.held += size
                self._kept[site] = value.to(self.device)
                return
            shape = (self.rows, *value.shape[1:])
            if fits:
                self.held += size
                self._kept[site] = torch.empty(shape, dtype=value.dtype, device=self.device)
            else:
                self.files[site] = self._home() / f"{site}.safetensors"
                self._kept[site] = mapped_file(self.files[site], {"activation": (shape, value.dtype)})["activation"]
        self._kept[site][self.first : self.first + rows] = value

    def _home(self) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="mechinterp-"))
            # The tensors stay readable until they are dropped themselves: an open file outlives its name.
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder

    def discard(self) -> None:
        """Remove the files, of which not all have been written."""
        for path in self.files.values():
            path.unlink(missing_ok=True)

    def __getitem__(self, site: Site) -> Tensor:
        return self._kept[site]

    def __delitem__(self, site: Site) -> None:
        del self._kept[site]

    def __iter__(self) -> Iterator[Site]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)
