"""Weights on disk: safetensors and published .ckpt files, read strictly and without executing anything."""

from pathlib import Path

from safetensors.torch import save_file


def save_weights(model, path, dtype):
    """Write the model's state dict, floating-point tensors as `dtype`, as safetensors. Never leaves half a file."""
    path = Path(path)
    tensors = {k: (v.to(dtype) if v.is_floating_point() else v).contiguous().cpu() for k, v in model.state_dict().items()}
    temporary = path.with_name(f".{path.name}.part")
    save_file(tensors, temporary)
    temporary.replace(path)
