"""Files that are either whole or absent: atomic writes, training checkpoints, and model folders as Hugging Face keeps them."""

from __future__ import annotations

import json
import os
import re
import secrets
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FORMAT = "fastprimer training checkpoint 1"
COMPUTED = ".rotary_emb.inv_freq"
"""Not read: the rotary frequencies of each layer, which follow from the config; folders that older transformers wrote have them."""

Tensors = dict[str, Tensor]


class CheckpointError(ValueError):
    """A file or folder that cannot be used; the message says which and why."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a crash at any moment leaves either the old file or the new one, which has the old one's permissions; a link
    stays one, to what it names."""
    path = path.resolve()
    part = path.parent / f".{path.name}.{secrets.token_hex(4)}.part"
    try:
        with open(part, "xb") as file:
            if path.exists():
                os.chmod(part, path.stat().st_mode & 0o777)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:  # of a full disk the system does not say whose
            error.filename = str(path)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable (where the system lets a folder be opened)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(path: Path, tensors: Tensors, record: dict) -> None:
    """Tensors, and a record that json can hold, in one file."""
    metadata = {"format": FORMAT, "record": json.dumps(record)}
    write_atomically(path, safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata))


def load_checkpoint(path: Path) -> tuple[Tensors, dict]:
    """What save_checkpoint has written."""
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(f"{path} is not a checkpoint of `fastprimer train`")
            record = json.loads(metadata["record"])
            if not isinstance(record, dict):
                raise CheckpointError(f"cannot read the checkpoint {path}: its record is {record!r}")
            return {name: file.get_tensor(name) for name in file.keys()}, record  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, RecursionError, json.JSONDecodeError) as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {_first_line(error)}") from error


def read_weights(folder: Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Tensors:
    """All tensors of a model folder, in one file or in shards with an index, under the names that the models have."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no model folder {folder}")
    tensors: Tensors = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                for name in file.keys():  # noqa: SIM118
                    if not name.endswith(COMPUTED):
                        tensor = file.get_tensor(name)
                        tensors[name] = tensor if dtype is None else tensor.to(dtype)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read the weights {path}: {_first_line(error)}") from error
    return stack_experts(tensors)


def read_json(path: Path) -> dict | None:
    """The object in a file, or None without one."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {_first_line(error)}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected an object, got {type(found).__name__}")
    return found


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if index.exists():
        try:
            names = {Path(name).name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"cannot read the index {index}: {_first_line(error)}") from error
        files = [folder / name for name in sorted(names)]
    else:
        files = [folder / WEIGHTS_FILE] if (folder / WEIGHTS_FILE).exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no weights (*.safetensors)")
    for path in files:
        if not path.exists():
            raise CheckpointError(f"the weights {path} are missing")
    return files


EXPERT = re.compile(r"(.+)\.block_sparse_moe\.experts\.(\d+)\.(w1|w2|w3)\.weight")


def stack_experts(tensors: Tensors) -> Tensors:
    """From Mixtral's names on disk, one tensor per expert, to one tensor for all experts.

    block_sparse_moe.gate.weight            -> mlp.gate.weight
    block_sparse_moe.experts.N.{w1, w3, w2} -> mlp.experts.gate_up_proj (E, 2F, C), mlp.experts.down_proj (E, C, F)

    All other tensors stay, under their names.
    """
    single = {name: match for name in tensors if (match := EXPERT.fullmatch(name))}
    result = {name.replace(".block_sparse_moe.gate.", ".mlp.gate."): t for name, t in tensors.items() if name not in single}
    counts: dict[str, int] = {}
    for layer, number, _ in (match.groups() for match in single.values()):
        counts[layer] = max(counts.get(layer, 0), int(number) + 1)
    for layer, count in counts.items():
        try:
            w1, w2, w3 = ([tensors[f"{layer}.block_sparse_moe.experts.{n}.{w}.weight"] for n in range(count)] for w in ("w1", "w2", "w3"))
            gate_up = torch.stack([torch.cat(pair) for pair in zip(w1, w3, strict=True)])
            down = torch.stack(w2)
        except KeyError as error:
            raise CheckpointError(f"the weights lack {error.args[0]}") from error
        except RuntimeError as error:
            raise CheckpointError(f"the experts of {layer} have different shapes: {_first_line(error)}") from error
        result[f"{layer}.mlp.experts.gate_up_proj"], result[f"{layer}.mlp.experts.down_proj"] = gate_up, down
    return result


def split_experts(tensors: Tensors) -> Tensors:
    """The inverse of stack_experts."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        layer, _, part = name.partition(".mlp.experts.")
        start = f"{layer}.block_sparse_moe.experts."
        if part == "gate_up_proj":
            for n, gate_up in enumerate(tensor):
                gate, up = gate_up.chunk(2)
                result[f"{start}{n}.w1.weight"], result[f"{start}{n}.w3.weight"] = gate.clone(), up.clone()
        elif part == "down_proj":
            result.update({f"{start}{n}.w2.weight": down.clone() for n, down in enumerate(tensor)})
        else:
            result[name.replace(".mlp.gate.weight", ".block_sparse_moe.gate.weight")] = tensor
    return result


def write_weights(folder: Path, tensors: Tensors) -> None:
    """A model folder's weights in one file, as Hugging Face's libraries read them."""
    on_disk, places = {}, set()
    for name, tensor in split_experts(tensors).items():
        tensor = tensor.detach().cpu().contiguous()
        on_disk[name] = tensor.clone() if tensor.data_ptr() in places else tensor  # weights that are tied by hand
        places.add(tensor.data_ptr())
    write_atomically(folder / WEIGHTS_FILE, safetensors.torch.save(on_disk, {"format": "pt"}))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
