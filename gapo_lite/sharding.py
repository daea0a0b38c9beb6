"""The base model's layers over all processes (FSDP2), for models that one GPU cannot hold.

Each process keeps a share of every layer's frozen weights; a layer is gathered when it is used, in
the forward and again in the backward pass, and freed after it. Nothing else is sharded: adapter,
gradients and optimizer are whole in every process, as are embedding, final norm and output head. So
summing gradients, checkpoints and resume are those of data parallel.

All processes must call the model equally often: a gather waits for all of them.
"""

from __future__ import annotations

from peft import PeftModel
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gapo_lite.errors import ModelError
from gapo_lite.model import causal_model


def shard_base(policy: PeftModel) -> None:
    """Leaves this process its share of the layers of `policy`, which it holds whole.

    Raises:
        ModelError: it is not known what a layer of this model is.
    """
    causal = causal_model(policy)
    names = causal._no_split_modules or ()
    layers = [module for module in causal.modules() if type(module).__name__ in names]
    if not layers:
        raise ModelError(
            f"training.fsdp cannot shard {causal.config.name_or_path}: transformers does not say "
            "which of its modules are layers. Use data parallel (training.fsdp: false)."
        )
    mesh = init_device_mesh(causal.device.type, (distributed.get_world_size(),))
    adapter = {parameter for parameter in policy.parameters() if parameter.requires_grad}
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=adapter)
    # The root, for what its layers share; it must be the module that model.forward_logps calls.
    fully_shard(causal.base_model, mesh=mesh, ignored_params=set(policy.parameters()))
