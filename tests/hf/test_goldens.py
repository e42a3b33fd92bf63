"""The shipped modeling file against numbers of the reference implementations: logits, loss and gradients in float64."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megnorm.hf import custom
from megnorm.models.config import ModelConfig
from megnorm.norms.resolve import Resolved
from megnorm.norms.scheme import FFN, Attention, Layer, Norm, Residual, Scale
from tests.conftest import PROJECT

PARTS = {"query": "q", "key": "k", "value": "v", "output": "o", "query_norm": "q_norm", "key_norm": "k_norm"}
PARTS |= {"value_norm": "v_norm", "context_norm": "context_norm", "head_scale": "head_scale"}
OUTSIDE = {"embedding": "embed", "lm_head": "head"}


def goldens() -> list[str]:
    import os

    folder = Path(os.environ.get("MEGNORM_SHARED", PROJECT.parent / "shared")) / "golden"
    found = [p.stem for pattern in ("hybrid_dense__*", "fairseq_lm__*", "torchscale__decoder_*")
             for p in sorted(folder.glob(f"{pattern}.json"))]  # fmt: skip
    return found or ["none"]


def norm(c: dict[str, Any], over: Any = "width") -> Norm:
    return Norm(over, c["norm"], "vector", c["norm_bias"], c["norm_eps"], "before_gain", 0.5)


def layer(c: dict[str, Any], i: int) -> tuple[Layer, list[str]]:
    """The layer that a golden's json describes, and the site of its two norms called plainly "norm"."""
    n, alpha = norm(c), Scale(float(c.get("residual_alpha", 1.0)))
    if "placement_per_layer" in c:
        heads = {s[:1] if s != "context" else s: norm(c, "head") for s in ("query", "key", "value", "context")
                 if c["per_head_norms"][s]}  # fmt: skip
        said = c["placement_per_layer"][i]
        kinds = [said[f"{part}_sublayer"].split(" ")[0] for part in ("attention", "ffn")]
        subs = [
            {"input": None if kind == "none" else n,
             "residual": Residual(source="input" if kind.startswith("norm_then") else "stream")}
            for kind in kinds
        ]  # fmt: skip
        return Layer(Attention(**subs[0], **heads), FFN(**subs[1])), ["input", "input"]
    site = {"pre": "input", "post": "post"}[c.get("norm_placement") or c["decoder"]["norm_placement_actually_used"]]
    lam = Scale(1.0, "width") if c.get("scale_resids") else alpha
    inner = n if c.get("scale_fc") or c.get("sub_ln") else None
    attention = Attention(
        **{site: n},
        output=n if c.get("scale_attn") else None,
        context=n if c.get("sub_ln") else None,
        head_scale="post_projection" if c.get("scale_heads") else None,
        residual=Residual(skip=alpha),
    )
    return Layer(attention, FFN(**{site: n}, inner=inner, residual=Residual(skip=lam))), [site, site]


def model_of(c: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[ModelConfig, Resolved, list[list[str]]]:
    sizes = c | c.get("decoder", {})
    made = [layer(c, i) for i in range(sizes["layers"])]
    positions = c.get("positions", "rotary").split(" ")[0].strip(",")
    table = tensors.get("weight/embedding.position.weight")
    model = ModelConfig(
        layers=sizes["layers"],
        width=sizes["hidden"],
        heads=sizes["heads"],
        kv_heads=sizes.get("kv_heads"),
        ffn=sizes["ffn_hidden"],
        vocab_size=c["vocab"],
        max_positions=64 if table is None else len(table),
        activation=c["activation"].split(" ")[0],
        positions=positions,  # type: ignore[arg-type]
        rope_theta=float(c.get("rope_theta", 10000)),
        padding_id=c.get("padding_id"),
        embedding_scale="sqrt_width" if c.get("embedding_scale") == "sqrt(hidden)" else 1.0,
        tied_head=c["tied_lm_head"],
        bias=c["linear_bias"],
        head_bias="weight/lm_head.bias" in tensors,
    )
    final = norm(c) if sizes["final_norm"] else None
    resolved = Resolved(
        "golden", tuple(one for one, _ in made), norm(c) if c["embedding_norm"] else None, final, None, ()
    )
    return model, resolved, [sites for _, sites in made]


def canonical(name: str, sites: list[list[str]]) -> str:
    """A golden's neutral name -> ours."""
    head, *rest = name.replace(".gain", ".weight").split(".")
    if not head.startswith("block"):
        return ".".join([OUTSIDE.get(head, head), *rest])
    i, part = int(head.removeprefix("block")), rest[0]
    plain = {"norm": f"{sites[i][part == 'ffn']}_norm", "residual_scale": "residual.skip"}
    plain["inner_norm"] = "context_norm" if part == "attention" else "inner_norm"
    return ".".join(["blocks", str(i), part, plain.get(rest[1], PARTS.get(rest[1], rest[1])), *rest[2:]])


@pytest.mark.parametrize("name", goldens())
def test_the_modeling_file_gives_the_reference_numbers(name: str, shared: Path) -> None:
    if name == "none":
        pytest.skip("no goldens in the shared material")
    tensors = load_file(shared / "golden" / f"{name}.safetensors")
    config = json.loads((shared / "golden" / f"{name}.json").read_text(encoding="utf-8"))["config"]
    model, resolved, sites = model_of(config, tensors)
    weights = {canonical(k[7:], sites): t for k, t in tensors.items() if k.startswith("weight/")}
    decoder = custom.build(weights, model, resolved, dtype=torch.float64)
    logits = decoder(tensors["input/ids"].long()).logits
    scale = tensors["output/logits"].abs().max()
    assert (logits - tensors["output/logits"]).abs().max() <= 1e-10 * scale
    targets = tensors["input/targets"].long()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    assert abs(loss.item() - tensors["output/loss"].item()) < 1e-10
    loss.backward()
    ours = custom.unrename({k: p.grad for k, p in decoder.named_parameters()}, model)
    theirs = {canonical(k[5:], sites): t.double() for k, t in tensors.items() if k.startswith("grad/")}
    assert set(ours) == set(theirs)
    whole = torch.stack([g.norm() for g in theirs.values()]).norm()
    for key, grad in theirs.items():
        if key == "embed.token.weight" and model.padding_id is not None:
            grad[model.padding_id], ours[key][model.padding_id] = 0.0, 0.0
        assert (ours[key] - grad).norm() <= 1e-6 * max(grad.norm(), 1e-3 * whole), key
