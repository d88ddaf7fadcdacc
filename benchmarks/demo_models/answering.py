"""Greedy answers of a demo model, in batches, with how sure it was of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.demo_models.notes import FieldScores, Note, score


@dataclass(frozen=True)
class Answer:
    """A note, what the model wrote, and the smallest gap (in logits) between its choice and the runner-up."""

    note: Note
    text: str
    gap: float

    @property
    def scores(self) -> FieldScores:
        """The answer against the note's gold."""
        return score(self.note.gold, self.text)


@dataclass(frozen=True)
class Model:
    """A loaded model folder."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype = torch.float32) -> Model:
        """Read a folder as any user of transformers would; nothing is fetched."""
        network = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
        return cls(network.eval(), tokenizer)

    def answer(self, notes: Sequence[Note], batch: int = 48) -> list[Answer]:
        """Greedy answers in the order of `notes`; batches are of similar length."""
        order = sorted(range(len(notes)), key=lambda i: len(notes[i].prompt))
        answers: dict[int, Answer] = {}
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            answers.update(zip(chosen, self._answer([notes[i] for i in chosen]), strict=True))
        return [answers[i] for i in range(len(notes))]

    @torch.inference_mode()
    def _answer(self, notes: list[Note]) -> list[Answer]:
        texts = [
            self.tokenizer.apply_chat_template(n.messages, tokenize=False, add_generation_prompt=True)
            for n in notes
        ]
        asked = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        said = self.network.generate(
            input_ids=asked.input_ids,
            attention_mask=asked.attention_mask,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = said.sequences[:, asked.input_ids.shape[1] :]
        best = torch.stack(said.logits, dim=1).float().topk(2).values
        gaps = (
            (best[..., 0] - best[..., 1]).masked_fill(tokens == self.tokenizer.pad_token_id, torch.inf).amin(dim=1)
        )
        written = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [Answer(n, text, gap) for n, text, gap in zip(notes, written, gaps.tolist(), strict=True)]
