"""The library's own tools over any of the models: trainer and collators, pipelines, tokenizers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    ByT5Tokenizer,
    DataCollatorForLanguageModeling,
    FeatureExtractionPipeline,
    PreTrainedModel,
    TextGenerationPipeline,
    Trainer,
    TrainingArguments,
)

from drt.models.loading import load_model, shipped_checkpoint

MODELS = ["drt", "window", "full_attention", "landmark", "block_recurrent"]
TEXTS = ["hello world " * count for count in (2, 5, 3, 4)]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, make_baseline) -> PreTrainedModel:
    return make_baseline(request.param, vocab_size=259, eos_token_id=1).float()


def trainer(
    model: PreTrainedModel, folder: Path, collator: DataCollatorForLanguageModeling, **more
) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        max_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        dataloader_pin_memory=False,
        **more,
    )
    data = [collator.tokenizer(text) for text in TEXTS]
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data, data_collator=collator)


@pytest.mark.parametrize("side", ["left", "right"])
def test_trainer_with_the_usual_collator(model, tmp_path, side):
    collator = DataCollatorForLanguageModeling(ByT5Tokenizer(extra_ids=0, padding_side=side), mlm=False)
    run = trainer(model, tmp_path, collator)
    assert run.train().global_step == 1
    rows = [torch.tensor([collator.tokenizer(text)["input_ids"]]) for text in TEXTS]
    model.eval()
    with torch.no_grad():
        losses = [float(model(row, labels=row).loss) for row in rows]
    tokens = [row.shape[1] - 1 for row in rows]
    expected = sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=0.02)  # a mean of the batches' means


def test_label_smoothing_scores_the_token_that_follows(model, tmp_path):
    collator = DataCollatorForLanguageModeling(ByT5Tokenizer(extra_ids=0), mlm=False)
    run = trainer(model, tmp_path, collator, label_smoothing_factor=0.1)
    batch = collator([collator.tokenizer(text) for text in TEXTS[:2]])
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        expected = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=0.1
        )
        found = run.compute_loss(model, dict(batch))
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_features_of_a_ragged_batch(model):
    pipeline = FeatureExtractionPipeline(
        model=model.model, tokenizer=ByT5Tokenizer(extra_ids=0), device="cpu", framework="pt"
    )
    found = pipeline(TEXTS[:3], batch_size=2, return_tensors=True)
    for text, states in zip(TEXTS, found, strict=False):
        ids = torch.tensor([ByT5Tokenizer(extra_ids=0)(text)["input_ids"]])
        alone = model.model(ids).last_hidden_state
        torch.testing.assert_close(states[:, : ids.shape[1]], alone, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_shipped_tokenizer_pads_prompts_where_generate_wants_it():
    model, tokenizer = load_model(shipped_checkpoint())
    line = "The quick brown fox jumps over the lazy dog. "
    prompts = [f"|qx=48213| {line * 20}|qx?", f"{line}|qx=59812| {line * 30}|qx?"]
    batch = tokenizer(prompts, padding=True, add_special_tokens=False, return_tensors="pt")
    assert batch["attention_mask"][0, 0] == 0
    found = model.generate(**batch, max_new_tokens=5, do_sample=False)
    assert tokenizer.batch_decode(found[:, -5:]) == ["48213", "59812"]
    pipeline = TextGenerationPipeline(model=model, tokenizer=tokenizer, device="cpu")
    settings = {
        "max_new_tokens": 5,
        "do_sample": False,
        "add_special_tokens": False,
        "return_full_text": False,
    }
    assert [out[0]["generated_text"] for out in pipeline(prompts, batch_size=2, **settings)] == [
        "48213",
        "59812",
    ]
