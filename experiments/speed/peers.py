"""Other libraries' LoRA for the same model code: each linear layer is a module of theirs, or a weight to them."""

from contenders import SCALE, trained
from models import plain


def _modules(nnx, task, params, dense):
    """A module with one submodule for each linear layer, called as the model code calls its weights."""

    class Adapted(nnx.Module):
        def __init__(self):
            for i, layer in enumerate(params["layers"]):
                for name in task.model.linear:
                    setattr(self, f"layer{i}_{name}", dense(name, layer[name]))

        def __call__(self, rest, batch):
            layers = [
                layer | {name: getattr(self, f"layer{i}_{name}") for name in task.model.linear}
                for i, layer in enumerate(rest["layers"])
            ]
            return task.loss(lambda module, x: module(x))(rest | {"layers": layers}, batch)

    return Adapted()


def _linear(nnx, p):
    d, k = p["kernel"].shape
    layer = nnx.Linear(d, k, use_bias="bias" in p, param_dtype=p["kernel"].dtype, rngs=nnx.Rngs(0))
    layer.kernel = nnx.Param(p["kernel"])
    if "bias" in p:
        layer.bias = nnx.Param(p["bias"])
    return layer


def _rest(task, params):
    layers = [{name: x for name, x in layer.items() if name not in task.model.linear} for layer in params["layers"]]
    return params | {"layers": layers}


def _trained(nnx, module, rest):
    graph, trainable, frozen = nnx.split(module, nnx.LoRAParam, ...)

    def loss(trainable, frozen, batch):
        return nnx.merge(graph, trainable, frozen[0])(frozen[1], batch)

    return trained(loss, trainable, (frozen, rest))


def nnx_lora(task, params):
    """flax.nnx.LoRA around nnx.Linear. It has no alpha: the scale is 1."""
    from flax import nnx

    def dense(name, p):
        layer = _linear(nnx, p)
        d, k = p["kernel"].shape
        return nnx.LoRA(d, task.rank, k, base_module=layer, rngs=nnx.Rngs(0)) if name in task.names else layer

    return _trained(nnx, _modules(nnx, task, params, dense), _rest(task, params))


def qwix_lora(task, params):
    """qwix.apply_lora_to_model over nnx.Linear."""
    import qwix
    from flax import nnx

    module, rest = _modules(nnx, task, params, lambda _, p: _linear(nnx, p)), _rest(task, params)
    provider = qwix.LoraProvider(module_path=rf".*_({'|'.join(task.names)})", rank=task.rank, alpha=SCALE * task.rank)
    return _trained(nnx, qwix.apply_lora_to_model(module, provider, rest, task.batch, rngs=nnx.Rngs(0)), rest)


def mlorax_lora(task, params):
    """mlorax.lora_init over the function of the weights."""
    from mlorax import LoRASpec, lora_init

    as_dicts = params | {"layers": {str(i): layer for i, layer in enumerate(params["layers"])}}

    def apply(params, batch):
        return task.loss(plain)(params | {"layers": list(params["layers"].values())}, batch)

    rules = [f".{name}.kernel" for name in task.names]
    spec = LoRASpec(rank=task.rank, rules=rules, alpha=SCALE * task.rank, logger_level="ERROR")
    trainable, _, _ = lora_init(spec, None, params=as_dicts, apply_fn=apply)

    def loss(trainable, frozen, batch):
        # It closes over the frozen weights: made anew, they are arguments here as for all others.
        _, apply_fn, _ = lora_init(spec, None, params=frozen, apply_fn=apply)
        return apply_fn(trainable, batch=batch)

    return trained(loss, trainable, as_dicts)


PEERS = {"flax.nnx.LoRA": nnx_lora, "qwix": qwix_lora, "mlorax": mlorax_lora}
