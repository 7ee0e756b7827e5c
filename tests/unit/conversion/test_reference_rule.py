"""The transcription of the published layer, token by token once more."""

import torch
from torch import Tensor, nn

from megatron_ttt.conversion.reference_rule import ReferenceMLP, reference_keys

HIDDEN, FFN, CHUNK, ETA = 5, 7, 4, 0.03


class Plain(nn.Module):
    """A gated MLP's three matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, FFN, bias=False, dtype=torch.float64)
        self.up_proj = nn.Linear(HIDDEN, FFN, bias=False, dtype=torch.float64)
        self.down_proj = nn.Linear(FFN, HIDDEN, bias=False, dtype=torch.float64)


def token_by_token(mlp: Plain, kernel: Tensor, projection: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """``o = W z``, with ``W`` grown by ``eta v z^T`` of every token of the chunks before."""
    gate, up = mlp.gate_proj.weight, mlp.up_proj.weight
    fast = mlp.down_proj.weight.clone()
    outputs = []
    for first in range(0, len(x), CHUNK):
        last = min(first + CHUNK, len(x))
        written = torch.zeros_like(fast)
        for t in range(first, last):
            gated = gate @ x[t]
            key = gated * torch.sigmoid(gated) * (up @ x[t])
            outputs.append(fast @ key)
            mixed = torch.zeros(HIDDEN, dtype=x.dtype)
            for tap in range(5):
                if first <= t + tap - 2 < last:
                    mixed += kernel[:, 0, tap] * u[t + tap - 2]
            written += torch.outer(mixed @ projection, key)
        fast = fast + ETA * written
    return torch.stack(outputs)


@torch.no_grad()
def test_equals_the_equations_token_by_token() -> None:
    torch.manual_seed(0)
    mlp = Plain()
    kernel = torch.randn(HIDDEN, 1, 5, dtype=torch.float64)
    projection = torch.randn(HIDDEN, HIDDEN, dtype=torch.float64)
    inputs, source = torch.randn(2, 2, 3 * CHUNK + 1, HIDDEN, dtype=torch.float64).unbind()
    found = ReferenceMLP(
        mlp,
        kernel_D15=kernel,
        projection_DD=projection,
        eta=ETA,
        chunk_size=CHUNK,
        source_BTD=source,
    )(inputs)
    wanted = [token_by_token(mlp, kernel, projection, *row) for row in zip(inputs, source)]  # noqa: B905
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-12, atol=1e-12)
    still = [mlp.down_proj(_keys(mlp, row)) for row in inputs]
    assert (found - torch.stack(still)).abs().max() > 0.05, "the fast weights changed nothing"


def _keys(mlp: Plain, row: Tensor) -> Tensor:
    return torch.nn.functional.silu(mlp.gate_proj(row)) * mlp.up_proj(row)


def test_absent_keys_have_the_published_values() -> None:
    keys = reference_keys({"ttt_chunk": 4096})
    assert keys.layers == (0, 6, 12, 18, 24, 30)
    assert (keys.eta, keys.chunk_size, keys.projects, keys.reads_embeddings) == (
        0.3,
        4096,
        True,
        False,
    )
    assert reference_keys({"ttt_mode": False, "ttt_layers": [0]}).layers == ()
