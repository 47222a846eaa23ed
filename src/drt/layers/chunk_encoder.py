"""The chunk encoder: bidirectional attention inside one chunk, giving its representation and its landmark."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drt.layers.mlp import SwiGLU
from drt.layers.rms_norm import RMSNorm
from drt.ops.window_attention import apply_rope


class ChunkEncoderLayer(nn.Module):
    """Pre-norm attention and MLP over the S + 1 slots of a chunk."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        rope_theta: float,
        eps: float,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.rope_theta = rope_theta
        self.input_norm = RMSNorm(hidden_size, eps=eps)
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.mlp_norm = RMSNorm(hidden_size, eps=eps)
        self.mlp = SwiGLU(hidden_size, intermediate_size)

    def forward(self, hidden_states: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """(M, S + 1, hidden_size) to the same; positions (S + 1,) or (M, S + 1); mask (M, 1, 1, S + 1) or None."""
        normed = self.input_norm(hidden_states)
        query, key, value = (
            projection(normed).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query = apply_rope(query, positions, self.rope_theta).transpose(1, 2)
        key = apply_rope(key, positions, self.rope_theta).transpose(1, 2)
        attended = F.scaled_dot_product_attention(
            query, key, value.transpose(1, 2), attn_mask=mask, enable_gqa=key.shape[1] != query.shape[1]
        )
        hidden_states = hidden_states + self.o_proj(attended.transpose(1, 2).flatten(-2))
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class ChunkEncoder(nn.Module):
    """Encode closed chunks.

    Positions are counted from the chunk's right end: with n tokens they lie at S - n .. S - 1, the landmark at S.

    Args:
        num_layers: encoder layers; 0 leaves only the norms.
        input_eps: epsilon of the norm on the lower decoder's output.
        eps: epsilon of the norms inside the encoder.
        Others as in `ChunkEncoderLayer`.
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        intermediate_size: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        rope_theta: float,
        input_eps: float,
        eps: float,
    ) -> None:
        super().__init__()
        self.input_norm = RMSNorm(hidden_size, eps=input_eps)
        self.layers = nn.ModuleList(
            ChunkEncoderLayer(
                hidden_size, intermediate_size, num_heads, num_key_value_heads, head_dim, rope_theta, eps
            )
            for _ in range(num_layers)
        )
        self.norm = RMSNorm(hidden_size, eps=eps)

    def forward(self, tokens: Tensor, landmarks: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Encode B x N chunks.

        Args:
            tokens: (B, N, S, hidden_size) lower-decoder outputs, a short chunk in the first slots.
            landmarks: (B, N, hidden_size) lower-decoder output at each chunk's landmark.
            lengths: (B, N) tokens in each chunk; ``None`` when all hold S.

        Returns:
            The tokens' representations (B, N, S, hidden_size) and the retrieval keys (B, N, hidden_size).
        """
        batch_size, num_chunks, chunk_size = tokens.shape[:3]
        hidden_states = self.input_norm(torch.cat([tokens, landmarks.unsqueeze(2)], 2).flatten(0, 1))
        slots = torch.arange(chunk_size + 1, device=tokens.device)
        if lengths is None:
            positions, mask = slots, None
        else:
            flat_lengths = lengths.reshape(-1, 1)
            is_landmark = slots == chunk_size
            positions = torch.where(is_landmark, slots, slots + chunk_size - flat_lengths)
            mask = (is_landmark | (slots < flat_lengths))[:, None, None, :]
        # Where no chunk closes there is nothing to encode, and cuDNN's attention would return None for no rows.
        for layer in self.layers if num_chunks else ():
            hidden_states = layer(hidden_states, positions, mask)
        hidden_states = self.norm(hidden_states).unflatten(0, (batch_size, num_chunks))
        return hidden_states[:, :, :-1], hidden_states[:, :, -1]
