"""State dicts as `torch.save` writes them, without PyTorch: in a zip archive, and as it did before."""

import collections
import io
import pickle
import struct
import sys
import types
import zipfile
from contextlib import contextmanager
from unittest import mock

import numpy as np

from treesurgeon.models.pickles import LEGACY, PROTOCOL


class Storage:
    """What a tensor's pickle refers to."""

    def __init__(self, key, values):
        self.key, self.values = key, values


class Call:
    """Pickled as a call."""

    def __init__(self, fn, *args):
        self.fn, self.args = fn, args

    def __reduce__(self):
        return self.fn, self.args


class Pickler(pickle.Pickler):
    old = False

    def persistent_id(self, obj):
        if isinstance(obj, Storage):
            view = (None,) if self.old else ()
            return ("storage", sys.modules["torch"].FloatStorage, obj.key, "cpu", len(obj.values), *view)
        return None


class OldPickler(Pickler):
    old = True


@contextmanager
def names_of_torch():
    """Modules that have the names that such a pickle refers to; gives what makes a tensor."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    torch.FloatStorage = type("FloatStorage", (), {"__module__": "torch"})

    def rebuild():
        raise AssertionError

    rebuild.__module__, rebuild.__qualname__, rebuild.__name__ = "torch._utils", *["_rebuild_tensor_v2"] * 2
    utils._rebuild_tensor_v2 = rebuild
    with mock.patch.dict(sys.modules, {"torch": torch, "torch._utils": utils}):
        yield lambda *args: Call(rebuild, *args, False, collections.OrderedDict())


def tensors(arrays):
    """A state dict of these arrays, and its storages."""
    tensor = lambda *args: Call(sys.modules["torch._utils"]._rebuild_tensor_v2, *args, False, collections.OrderedDict())
    stored = [Storage(str(i), np.ascontiguousarray(a, "f4").reshape(-1)) for i, a in enumerate(arrays.values())]
    steps = [tuple(int(np.prod(a.shape[d + 1 :])) for d in range(a.ndim)) for a in arrays.values()]
    return {
        name: tensor(storage, 0, a.shape, step)
        for (name, a), storage, step in zip(arrays.items(), stored, steps, strict=True)
    }, stored


def zipped(path, arrays):
    """Write a state dict as PyTorch 1.6 and later do."""
    state, stored = tensors(arrays)
    data = io.BytesIO()
    Pickler(data, 2).dump(state)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", data.getvalue())
        for storage in stored:
            archive.writestr(f"x/data/{storage.key}", storage.values.tobytes())


def pickled(arrays):
    """The bytes of a state dict as PyTorch wrote it before."""
    state, stored = tensors(arrays)
    out = io.BytesIO(LEGACY)
    out.seek(0, io.SEEK_END)
    for part in (PROTOCOL, {"little_endian": True}, state, [storage.key for storage in stored]):
        OldPickler(out, 2).dump(part)
    for storage in stored:
        out.write(struct.pack("<q", len(storage.values)) + storage.values.tobytes())
    return out.getvalue()
