"""Other libraries' LoRA for the same model code: each linear layer is a module of theirs, or their function's weight."""


from contenders import SCALE, trained
from models import plain


def _modules(nnx, model, params, dense):
    """A module with one submodule for each linear layer, called as the model code calls its weights."""

    class Adapted(nnx.Module):
        def __init__(self):
            for i, layer in enumerate(params["layers"]):
                for name in model.linear:
                    setattr(self, f"layer{i}_{name}", dense(name, layer[name]))

        def __call__(self, rest, batch):
            layers = [
                layer | {name: getattr(self, f"layer{i}_{name}") for name in model.linear}
                for i, layer in enumerate(rest["layers"])
            ]
            return model(lambda module, x: module(x), rest | {"layers": layers}, batch)

    return Adapted()


def _linear(nnx, p):
    d, k = p["kernel"].shape
    layer = nnx.Linear(d, k, use_bias="bias" in p, param_dtype=p["kernel"].dtype, rngs=nnx.Rngs(0))
    layer.kernel = nnx.Param(p["kernel"])
    if "bias" in p:
        layer.bias = nnx.Param(p["bias"])
    return layer


def _trained(nnx, module, params, names_of_linear):
    rest = params | {
        "layers": [{n: x for n, x in layer.items() if n not in names_of_linear} for layer in params["layers"]]
    }
    graph, trainable, frozen = nnx.split(module, nnx.LoRAParam, ...)

    def loss(trainable, frozen, batch):
        return nnx.merge(graph, trainable, frozen[0])(frozen[1], batch)

    return trained(loss, trainable, (frozen, rest))


def nnx_lora(model, params, names, rank):
    """flax.nnx.LoRA around nnx.Linear. It has no alpha: the scale is 1."""
    from flax import nnx

    def dense(name, p):
        layer = _linear(nnx, p)
        d, k = p["kernel"].shape
        return nnx.LoRA(d, rank, k, base_module=layer, rngs=nnx.Rngs(0)) if name in names else layer

    return _trained(nnx, _modules(nnx, model, params, dense), params, model.linear)


def qwix_lora(model, params, names, rank):
    """qwix.apply_lora_to_model over nnx.Linear."""
    import qwix
    from flax import nnx

    module = _modules(nnx, model, params, lambda _, p: _linear(nnx, p))
    rest = params | {"layers": [{n: x for n, x in p.items() if n not in model.linear} for p in params["layers"]]}
    provider = qwix.LoraProvider(module_path=rf".*_({'|'.join(names)})", rank=rank, alpha=SCALE * rank)
    adapted = qwix.apply_lora_to_model(module, provider, rest, model.data(), rngs=nnx.Rngs(0))
    return _trained(nnx, adapted, params, model.linear)


def mlorax_lora(model, params, names, rank):
    """mlorax.lora_init over the function of the weights."""
    from mlorax import LoRASpec, lora_init

    as_dicts = params | {"layers": {str(i): layer for i, layer in enumerate(params["layers"])}}

    def apply(params, batch):
        return model(plain, params | {"layers": list(params["layers"].values())}, batch)

    spec = LoRASpec(rank=rank, rules=[f".{name}.kernel" for name in names], alpha=SCALE * rank, logger_level="ERROR")
    trainable, _, _ = lora_init(spec, None, params=as_dicts, apply_fn=apply)

    def loss(trainable, frozen, batch):
        # It closes over the frozen weights: made anew, they are arguments here as for all others.
        _, apply_fn, _ = lora_init(spec, None, params=frozen, apply_fn=apply)
        return apply_fn(trainable, batch=batch)

    return trained(loss, trainable, as_dicts)


PEERS = {"flax.nnx.LoRA": nnx_lora, "qwix": qwix_lora, "mlorax": mlorax_lora}
