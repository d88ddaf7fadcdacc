"""What one step computes, as plain immutable data: the scheduler makes a plan, the runner carries it out.

A plan is all that the leader of a deployment and its further ranks share, so it holds everything a step needs and
no tensor. Its rows name KV pages per group and reserve places for drafts and adapters, so that windows,
speculation and LoRA need no second design.

Source: the division into schedule and execute follows Kwon et al., "Efficient Memory Management for Large Language
Model Serving with PagedAttention", SOSP 2023, section 4.
"""

from typing import NamedTuple

from engine.request import SamplingParams

FULL = "full"  # the KV group whose pages hold every token


class BlockTable(NamedTuple):
    """The KV pages of one row in one group, in token order."""

    group: str
    blocks: tuple[int, ...]


class PlanRow(NamedTuple):
    """What one request does in one step.

    Attributes:
        handle: the request.
        slot: its place in per-request device state.
        start: position of the first scheduled token.
        token_ids: the scheduled tokens, drafts last; -1 - i is what place i of the step before draws.
        num_draft: how many of them are drafts to be verified.
        block_tables: its pages, one table per KV group.
        adapter_slot: which adapter, None for the base model.
        sampling_slot: where its sampling state lies; None when the step does not reach the last token, so that
            nothing is sampled.
        prompt_logprobs: how many likeliest tokens to report for each of `targets`.
        targets: the prompt tokens that follow the scheduled positions, from the first on; none where they are not
            to be reported.
        pooled: the step reaches the last token of a prompt whose vector or score is wanted.
        type_ids: the segment of each scheduled token; none where all are of the first.
    """

    handle: int
    slot: int
    start: int
    token_ids: tuple[int, ...]
    num_draft: int
    block_tables: tuple[BlockTable, ...]
    adapter_slot: int | None
    sampling_slot: int | None
    prompt_logprobs: int = 0
    targets: tuple[int, ...] = ()
    pooled: bool = False
    type_ids: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """Tokens in the KV pages after the step."""
        return self.start + len(self.token_ids)


class SamplerSetup(NamedTuple):
    """A new owner of one sampling slot, valid from this step on.

    Attributes:
        slot: which.
        params: how its tokens are drawn.
        prompt_length: positions before this one hold its prompt.
        logprobs: how many likeliest tokens to report; None reports nothing.
        banned: tokens not drawn before position `banned_until`.
        banned_until: a position.
        history: tokens before the first that its plan rows bring, where `params.uses_history`; the rest the runner
            sees go by.
    """

    slot: int
    params: SamplingParams
    prompt_length: int
    logprobs: int | None = None
    banned: tuple[int, ...] = ()
    banned_until: int = 0
    history: tuple[int, ...] = ()


class StepPlan(NamedTuple):
    """One step.

    Attributes:
        step: its number, from 1.
        rows: what each scheduled request does.
        samplers: sampling slots that change owner in this step.
        scrub: KV pages to zero before anything is written.
    """

    step: int
    rows: tuple[PlanRow, ...]
    samplers: tuple[SamplerSetup, ...] = ()
    scrub: tuple[int, ...] = ()


class TokenLogprob(NamedTuple):
    """What the model thought of one token: natural logarithms of its own distribution, before any change to it.

    Attributes:
        token_id: the token that stands there.
        logprob: its log probability.
        rank: 1 for the likeliest token.
        top: the likeliest tokens with their log probabilities, as many as were asked for.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class ResultRow(NamedTuple):
    """What one step brought one request.

    Attributes:
        handle: the request.
        token_ids: none while its prompt is unfinished, else one, plus one per accepted draft.
        fault: stable code when its numbers were unusable, else empty.
        logprobs: one for each of `token_ids`, where asked for.
        prompt_logprobs: one for each of the row's targets.
        values: the vector or the score of a pooled row.
    """

    handle: int
    token_ids: tuple[int, ...]
    fault: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    values: tuple[float, ...] = ()


class StepResult(NamedTuple):
    """What one step brought; rows in the plan's order."""

    step: int
    rows: tuple[ResultRow, ...]
