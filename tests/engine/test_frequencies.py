"""Drawn tokens come as often as their exact probabilities say, by chi-square, for every way of sampling.

The draws use the engine's own numbers, which depend on seed and position alone: nothing here is left to chance.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.plan import PlanRow, SamplerSetup
from engine.request import SamplingParams
from engine.sampler import SamplerState
from kernels.ops import Adjustments, Sampling
from kernels.sampling import sample
from tests.engine.tiny import engine, record_logits, request, run, save_llama

DRAWS = 20000
LEAST_P = 1e-4
PROMPT, ANSWER, BANNED = (3, 5, 5, 9), (5, 7, 7, 7, 11), (2, 4, 290)
BIAS = ((6, 1.5), (0, -2.0), (7, 0.75), (299, 4.0))
WAYS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.0},
    "a low temperature": {"temperature": 0.4},
    "a high temperature": {"temperature": 3.0},
    "top-k": {"temperature": 1.0, "top_k": 12},
    "top-p": {"temperature": 1.2, "top_p": 0.8},
    "a top-p of more tokens than are sorted at first": {"temperature": 3.0, "top_p": 0.98},
    "a top-k of more tokens than are sorted at first": {"temperature": 3.0, "top_k": 270},
    "min-p": {"temperature": 1.0, "min_p": 0.05},
    "bias": {"temperature": 1.0, "logit_bias": BIAS},
    "repetition": {"temperature": 1.0, "repetition_penalty": 1.6},
    "presence": {"temperature": 1.0, "presence_penalty": 1.1},
    "frequency": {"temperature": 1.0, "frequency_penalty": 0.6},
    "rewarded repetition": {"temperature": 1.0, "repetition_penalty": 0.8, "frequency_penalty": -0.5},
    "bans": {"temperature": 1.0, "banned": BANNED},
    "top-k and top-p": {"temperature": 0.9, "top_k": 20, "top_p": 0.85},
    "top-k and min-p": {"temperature": 1.0, "top_k": 9, "min_p": 0.1},
    "min-p and top-p": {"temperature": 1.5, "min_p": 0.02, "top_p": 0.9},
    "everything": {
        "temperature": 1.3,
        "top_k": 30,
        "top_p": 0.93,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "logit_bias": BIAS,
        "banned": BANNED,
    },
}


def some_logits(vocabulary: int = 300) -> Tensor:
    """Logits of which a few are far above the rest, the tokens of prompt and answer among them."""
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(5))
    logits[:12] = logits[:12].abs() / 2 + torch.linspace(3.2, 2.4, 12)
    return logits


def exact(logits: Tensor, params: SamplingParams, banned: Sequence[int] = ()) -> Tensor:
    """The probability of each token, written out token by token."""
    values = {token: float(value) for token, value in enumerate(logits.tolist()) if token not in banned}
    for token, bias in params.logit_bias:
        values[token] += bias
    for token in values.keys() & {*PROMPT, *ANSWER}:
        penalty = params.repetition_penalty
        values[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
    for token in values.keys() & set(ANSWER):
        values[token] -= params.presence_penalty + params.frequency_penalty * ANSWER.count(token)
    tensor = torch.full((len(logits),), float("-inf"), dtype=torch.float64)
    tensor[list(values)] = torch.tensor(list(values.values()), dtype=torch.float64)
    odds = torch.softmax(tensor / params.temperature, 0)
    order = sorted(values, key=lambda token: -float(odds[token]))
    kept = [token for token in order if odds[token] >= params.min_p * odds[order[0]]]
    kept = kept[: params.top_k or None]
    reached, needed = 0.0, params.top_p * float(odds[kept].sum())
    nucleus: list[int] = []
    while kept and reached < needed:
        reached += float(odds[kept[0]])
        nucleus.append(kept.pop(0))
    result = torch.zeros_like(odds)
    result[nucleus] = odds[nucleus] / odds[nucleus].sum()
    return result


def sampling(params: SamplingParams, banned: Sequence[int], vocabulary: int, draws: int = DRAWS) -> Sampling:
    """As many draws, each at another position after the same prompt and answer."""
    first = len(PROMPT) + len(ANSWER)
    setup = SamplerSetup(0, params, len(PROMPT), None, tuple(banned), first + draws, history=PROMPT[:2])
    state = SamplerState(1)
    state.set_up([setup])
    state.observe([PlanRow(0, 0, 2, (*PROMPT[2:], *ANSWER), 0, (), None, 0)])
    return state.gather([0] * draws, range(first, first + draws), vocabulary)


def drawn(logits: Tensor, given: Sampling, at_once: int = 1000) -> list[int]:
    """A token for each draw from the same logits, in pieces that a cache holds."""
    tokens: list[int] = []
    for first in range(0, DRAWS, at_once):
        temperature, top_k, top_p, uniform, min_p = (field[first : first + at_once] for field in given[:5])
        adjustments = given.adjustments and Adjustments(
            *(piece(entries, first, first + at_once) for entries in given.adjustments)
        )
        part = Sampling(temperature, top_k, top_p, uniform, min_p, adjustments)
        tokens.extend(sample(logits.expand(len(uniform), -1), part).token_ids)
    return tokens


def piece(entries: Sequence[Tensor], first: int, last: int) -> Any:
    """Of the entries of adjustments, those of rows `first` to `last`, which become row 0 and on."""
    inside = (entries[0] >= first) & (entries[0] < last)
    rows, *rest = (entry[inside] for entry in entries)
    return rows - first, *rest


def p_value(tokens: Sequence[int], probabilities: Tensor) -> float:
    """Of Pearson's chi-square; rare tokens are counted together, and an impossible one cannot come."""
    observed = torch.bincount(torch.tensor(tokens), minlength=len(probabilities)).double()
    if observed[probabilities == 0].any():
        return 0.0
    expected = probabilities * len(tokens)
    common = expected >= 5
    if (~common & (expected > 0)).any():
        observed = torch.cat([observed[common], observed[~common].sum()[None]])
        expected = torch.cat([expected[common], expected[~common].sum()[None]])
    else:
        observed, expected = observed[common], expected[common]
    statistic = ((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def split(way: dict[str, Any], seed: int = 11) -> tuple[SamplingParams, Sequence[int]]:
    rest = {name: value for name, value in way.items() if name != "banned"}
    return SamplingParams(seed=seed, **rest), way.get("banned", ())


@pytest.mark.parametrize("way", WAYS)
def test_tokens_come_as_often_as_their_exact_probabilities_say(way: str) -> None:
    logits = some_logits()
    params, banned = split(WAYS[way])
    tokens = drawn(logits, sampling(params, banned, len(logits)))
    assert p_value(tokens, exact(logits, params, banned)) > LEAST_P


def only_from(adjustments: Adjustments | None, **changes: Any) -> Adjustments:
    assert adjustments is not None
    return adjustments._replace(**changes)


def prompt_counted(adjustments: Adjustments | None) -> tuple[Tensor, ...]:
    assert adjustments is not None
    rows, tokens, repetition, taken = adjustments.penalties
    return rows, tokens, repetition, taken + 0.7 * torch.isin(tokens, torch.tensor(PROMPT))


WRONG: dict[str, tuple[str, Callable[[Sampling], Sampling]]] = {
    "a little warmer": ("temperature", lambda s: s._replace(temperature=s.temperature * 1.1)),
    "one token more": ("top-k", lambda s: s._replace(top_k=s.top_k + 1)),
    "one token less": ("top-k", lambda s: s._replace(top_k=s.top_k - 1)),
    "a smaller nucleus": ("top-p", lambda s: s._replace(top_p=s.top_p - 0.02)),
    "no floor": ("min-p", lambda s: s._replace(min_p=s.min_p * 0)),
    "no adjustments": ("everything", lambda s: s._replace(adjustments=None)),
    "bias of the wrong sign": (
        "bias",
        lambda s: s._replace(
            adjustments=only_from(s.adjustments, bias=(*s.adjustments.bias[:2], -s.adjustments.bias[2]))  # type: ignore[union-attr]  # only_from looks
        ),
    ),
    "nothing banned": (
        "bans",
        lambda s: s._replace(adjustments=only_from(s.adjustments, banned=(torch.tensor([]).long(),) * 2)),
    ),
    "the prompt's tokens taken for the answer's": (
        "everything",
        lambda s: s._replace(adjustments=only_from(s.adjustments, penalties=prompt_counted(s.adjustments))),
    ),
    "numbers that do not reach 1": ("temperature", lambda s: s._replace(uniform=s.uniform * 0.97)),
    "numbers that lean to 0": ("temperature", lambda s: s._replace(uniform=s.uniform**1.1)),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_sampler_that_is_a_little_wrong_is_caught(fault: str) -> None:
    way, spoil = WRONG[fault]
    logits = some_logits()
    params, banned = split(WAYS[way])
    tokens = drawn(logits, spoil(sampling(params, banned, len(logits))))
    assert p_value(tokens, exact(logits, params, banned)) < LEAST_P


def of_transformers(logits: Tensor, params: SamplingParams, banned: Sequence[int]) -> Tensor:
    """Probabilities by the processors of transformers, in our order; two of the penalties it has not."""
    steps: list[Any] = []
    if banned:
        steps.append(SuppressTokensLogitsProcessor(list(banned)))
    if params.logit_bias:
        steps.append(SequenceBiasLogitsProcessor([[[token], bias] for token, bias in params.logit_bias]))
    if params.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    steps.append(TemperatureLogitsWarper(params.temperature))
    if params.min_p:
        steps.append(MinPLogitsWarper(params.min_p))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(TopPLogitsWarper(params.top_p))
    scores = LogitsProcessorList(steps)(torch.tensor([[*PROMPT, *ANSWER]]), logits[None].double())
    return torch.softmax(scores[0], -1)


@pytest.mark.parametrize("way", WAYS)
def test_the_exact_probabilities_are_those_of_transformers(way: str) -> None:
    alike = {
        name: value for name, value in WAYS[way].items() if "presence" not in name and "frequency" not in name
    }
    params, banned = split(alike)
    logits = some_logits()
    expected = of_transformers(logits, params, banned)
    torch.testing.assert_close(exact(logits, params, banned), expected, rtol=0, atol=1e-9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_llama(folder)
    return folder


def test_first_tokens_drawn_by_the_whole_engine_follow_the_exact_probabilities(folder: Path) -> None:
    loop = engine(folder, max_running=64, deterministic=True, max_step_tokens=1024)
    seen = record_logits(loop)
    way = {
        "temperature": 2.5,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 2.0,
        "logit_bias": ((20, 2.0), *((token, 5.0) for token in set(PROMPT))),
    }
    draws = 2000
    for seed in range(draws):
        loop.submit(request(seed, PROMPT, max_tokens=1, seed=seed, ignore_eos=True, **way))
    tokens = [answer.token_ids[0] for answer in run(loop).values()]
    logits = seen[0, len(PROMPT)]
    assert all(torch.equal(logits, other) for other in seen.values())
    assert len(tokens) == draws
    expected = exact_first(logits, SamplingParams(**way))
    assert (expected > 0.01).sum() > 5  # else any sampler would do
    assert p_value(tokens, expected) > LEAST_P
    assert p_value(tokens, exact_first(logits, SamplingParams(**(way | {"repetition_penalty": 1.0})))) < LEAST_P


def exact_first(logits: Tensor, params: SamplingParams) -> Tensor:
    """As `exact`, of the first token of an answer: nothing but the prompt is there."""
    changed = logits.double()
    for token, bias in params.logit_bias:
        changed[token] += bias
    for token in set(PROMPT):
        penalty = params.repetition_penalty
        changed[token] = changed[token] / penalty if changed[token] > 0 else changed[token] * penalty
    rest = SamplingParams(
        temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p
    )
    return exact(changed, rest)
