"""Solved tensors on disk: one safetensors file per key, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from pathlib import Path
from typing import final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from autocompress.files import write_whole
from autocompress.techniques.technique import Variant


def network_hash(network: nn.Module) -> str:
    """Twelve hexadecimal digits of a network's structure and weights."""
    digest = hashlib.sha256(repr(network).encode())
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(_raw(tensor))
    return digest.hexdigest()[:12]


def tensors_hash(tensors: tuple[Tensor, ...]) -> str:
    """Twelve hexadecimal digits of some tensors' contents."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(_raw(tensor))
    return digest.hexdigest()[:12]


def _raw(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


@final
class VariantStore:
    """Variants by key: the most recent in memory up to a limit, the lasting ones on disk too."""

    def __init__(self, folder: Path, memory_bytes: int = 1 << 29) -> None:
        self._folder = folder
        self._limit = memory_bytes
        self._held: OrderedDict[str, Variant] = OrderedDict()
        self._held_bytes = 0
        # Candidates are built in more than one thread.
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> Variant | None:
        """The variant of that key, or None if it was never put or its file is damaged."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        path = self._path(key)
        if not path.exists():
            return None
        try:
            variant = load_file(path)
        except (SafetensorError, OSError):
            # A damaged file is solved again; the new one replaces it.
            return None
        self._hold(key, variant)
        return variant

    def has(self, key: str) -> bool:
        """Whether a lasting variant of that key is on disk, as far as its file's header tells."""
        try:
            with safe_open(self._path(key), "pt"):
                return True
        except (SafetensorError, OSError):
            return False

    def put(self, key: str, variant: Variant, *, lasting: bool) -> None:
        """Keep a variant; a lasting one goes to disk before this returns."""
        self._hold(key, variant)
        if lasting:
            path = self._path(key)
            write_whole(path, save({k: v.contiguous() for k, v in variant.items()}, {"key": key}))

    @property
    def held_bytes(self) -> int:
        """Bytes of the variants that are in memory."""
        return self._held_bytes

    def held(self) -> dict[str, Variant]:
        """The variants that are in memory."""
        with self._lock:
            return dict(self._held)

    def _path(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.safetensors"

    def _hold(self, key: str, variant: Variant) -> None:
        with self._lock:
            self._held_bytes += _size(variant) - _size(self._held.get(key, {}))
            self._held[key] = variant
            self._held.move_to_end(key)
            while self._held_bytes > self._limit and len(self._held) > 1:
                _, dropped = self._held.popitem(last=False)
                self._held_bytes -= _size(dropped)


def _size(variant: Variant) -> int:
    return sum(t.numel() * t.element_size() for t in variant.values())


def make_key(*parts: object) -> str:
    """A store key of JSON-like parts."""
    return json.dumps(parts, sort_keys=True, default=str, separators=(",", ":"))
