"""What a batch says of its scored tokens."""

from __future__ import annotations

import torch
from transformers import ByT5Tokenizer

from drt.train.batches import BatchMaker


def test_where_the_scored_tokens_and_their_predictions_lie(make_config) -> None:
    config = make_config()
    make_batch = BatchMaker(config, ByT5Tokenizer())
    for step, stage in enumerate(config.curriculum):
        batch = make_batch(step, stage)
        ids, scored, columns = batch["input_ids"], batch["scored"], batch["logits_to_keep"]
        assert len(ids) > 1
        assert batch["answer_mask"].flatten()[scored].sum() == batch["answer_mask"].sum() > 0
        columns_of_all = torch.arange(ids.shape[1]).expand_as(ids)
        rows_of_all = torch.arange(len(ids)).unsqueeze(1).expand_as(ids)
        for of_all, before in ((columns_of_all, 1), (rows_of_all, 0)):
            kept = of_all[:, columns].flatten()[batch["predicted_by"]]
            assert torch.equal(kept, of_all.flatten()[scored] - before)
        assert len(columns) == len(set((scored % ids.shape[1]).tolist()))
