"""Pages whose chunks lie in tensors."""

from __future__ import annotations

from torch import Tensor

from drt.memory.chunk_codec import Fields


class TensorPage:
    """Chunk slots in tensors (P, capacity, ...), one for each field, and landmarks (P, capacity, H)."""

    def __init__(self, fields: Fields, landmarks: Tensor) -> None:
        self.fields, self.stored_landmarks = fields, landmarks

    @classmethod
    def like(cls, fields: Fields, landmarks: Tensor, capacity: int) -> TensorPage:
        """Empty slots for chunks like those given, (B, N, ...), on the same devices."""

        def room(like: Tensor) -> Tensor:
            return like.new_empty(like.shape[0], capacity, *like.shape[2:])

        # Landmarks of slots not yet written are scored and masked: they must be finite.
        return cls(tuple(room(field) for field in fields), room(landmarks).zero_())

    @property
    def capacity(self) -> int:
        return self.stored_landmarks.shape[1]

    def write(self, row: Tensor, slot: Tensor, fields: Fields, landmarks: Tensor) -> None:
        for held, offer in zip((*self.fields, self.stored_landmarks), (*fields, landmarks), strict=True):
            held[row.to(held.device), slot.to(held.device)] = offer

    def read(self, row: Tensor, slot: Tensor) -> Fields:
        return tuple(field[row, slot] for field in self.fields)

    def copy(self, rows: Tensor) -> TensorPage:
        return type(self)(
            tuple(field[rows.to(field.device)] for field in self.fields),
            self.stored_landmarks[rows.to(self.stored_landmarks.device)],
        )

    def landmark_ranges(self, held: int) -> list[tuple[int, int]]:
        return [(0, held)]

    def landmarks(self, first: int, last: int) -> Tensor:
        return self.stored_landmarks[:, first:last]

    def landmarks_at(self, row: Tensor, slot: Tensor) -> Tensor:
        device = self.stored_landmarks.device
        return self.stored_landmarks[row.to(device), slot.to(device)]
