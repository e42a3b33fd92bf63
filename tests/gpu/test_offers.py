"""On an accelerator: every offer that does not refuse, against the reference. One command: pytest tests/gpu."""

import pytest
import torch

from megnorm.kernels import backends, check, registry
from megnorm.layers import loss
from tests.kernels.needs import needs

assert backends.REFERENCE and loss.make_cross_entropy
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offer", registry.offers(), ids=lambda offer: f"{offer.backend}-{offer.op}-{offer.priority}")
def test_agrees_with_the_reference(offer: registry.Offer, dtype: torch.dtype) -> None:
    reasons, served = [], 0
    for need in needs(offer.op, dtype):
        if dtype != torch.float32 and any(form is not None and form.kind == "derf" for form in need.norms):
            continue  # the gradient of its scalars is a sum that cancels
        reason = offer.reason(need)
        if reason is not None:
            reasons.append(reason)
            continue
        served += 1
        for seed, rows in enumerate([(5, 3), (1, 1), (130, 2)]):
            found = check.difference(offer, need, "cuda", rows=rows, seed=seed)
            # The reference rounds between its steps, which a joined kernel need not.
            assert found <= check.tolerance(need) * (3 if offer.backend == "torch" else 1), (need, found)
    if not served:
        pytest.skip("; ".join(sorted(set(reasons))))
