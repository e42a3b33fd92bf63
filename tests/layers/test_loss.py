"""Cross entropy in chunks and over a split vocabulary is F.cross_entropy."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from megnorm.layers import loss
from megnorm.parallel.mesh import Axis


@given(st.integers(1, 9), st.integers(2, 40), st.integers(0, 5), st.integers(1, 64), st.sampled_from((0.0, 0.1, 0.7)))
def test_values_and_gradients(tokens: int, vocab: int, padding: int, chunk: int, smoothing: float) -> None:
    """Padding columns have no part, ignored labels no gradient, whatever the chunk; smoothing is torch's."""
    generator = torch.Generator().manual_seed(tokens * 1000 + vocab)
    logits = 4 * torch.randn(tokens, vocab + padding, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[-1] = -100
    weights = torch.rand(tokens, generator=generator, dtype=torch.float64) * (labels >= 0)
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(loss.CHUNK, "cpu", chunk)
        losses = loss.cross_entropy(mine, labels, 0, vocab, Axis("tp"), smoothing=smoothing, vocab_size=vocab)
        got = (losses * weights).sum()
        got.backward()
    each = F.cross_entropy(theirs[:, :vocab], labels, reduction="none", label_smoothing=smoothing)
    wanted = (each * weights).sum()
    wanted.backward()
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def test_low_precision_logits_have_a_wide_loss() -> None:
    logits = torch.full((3, 50304), 0.0, dtype=torch.bfloat16)
    got = loss.cross_entropy(logits, torch.zeros(3, dtype=torch.int64), 0, 50304, Axis("tp"))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.full((3,), 10.8258), rtol=0, atol=1e-4)
