"""Picks tokens from logits: penalties, bans, temperature, truncation, noise, and logprobs for those who asked.

    raw logits ─► bias, bans, penalties ─► temperature ─► min_p ─► top_k ─► top_p ─► argmax(logit + Gumbel noise)
        └► logprobs (raw distribution)            (the order and the meanings are vLLM's)

What nobody asked for is not computed: a batch of plain greedy requests costs one argmax. Every row depends on its own
request alone, so the composition of a batch cannot change a draw.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from replicas.contract import SamplingParams, TokenLogprob
from replicas.engine.noise import exponential_noise
from replicas.engine.sequence import Sampled, SamplePoint
from replicas.engine.structured.mask import few_allowed, forbid

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: dividing by them would overflow."""

# Candidates looked at for top_p before the whole vocabulary is sorted.
_TOP_P_CANDIDATES = (64, 1024)


@dataclass(frozen=True, slots=True)
class Sampler:
    """`token_hashes`: `noise.hash_tokens(vocab_size)` on the logits' device. `eos_token_ids` are what `min_tokens` bans
    besides the request's own stop tokens."""

    token_hashes: Tensor
    eos_token_ids: tuple[int, ...]

    def sample(self, logits: Tensor, points: Rows[SamplePoint]) -> tuple[Sampled, ...]:
        """Draws the token that follows at each point. logits: [num_points, vocab] float32, changed in place."""
        logprobs = _sampled_logprobs(logits, points)
        for row, point in zip(logits, points, strict=True):
            self._adjust(row, point)
        token_ids = torch.argmax(logits, dim=-1).tolist()
        if logprobs is None:
            return tuple(Sampled(token_id) for token_id in token_ids)
        return tuple(
            Sampled(
                token_id,
                None if row is None else _token_logprob(row, token_id, point.seq.request.sampling.logprobs or 0),
            )
            for token_id, point, row in zip(token_ids, points, logprobs, strict=True)
        )

    def _adjust(self, row: Tensor, point: SamplePoint) -> None:
        """Rewrites a row of logits so that its argmax is the draw. row: [vocab]."""
        params = point.seq.request.sampling
        if params.logit_bias:
            row[list(params.logit_bias)] += torch.tensor(list(params.logit_bias.values()), device=row.device)
        few = self._ban(row, point)
        _penalise(row, point, params)
        if few is None:
            _perturb(row, point, self.token_hashes)
            return
        few = few.to(row.device)
        some = row[few]
        _perturb(some, point, self.token_hashes[few])
        row.fill_(float("-inf"))
        row[few] = some

    def _ban(self, row: Tensor, point: SamplePoint) -> Tensor | None:
        """Bans what `min_tokens` and a grammar ban. An answer that is complete by its grammar may end.

        Where a grammar allows few tokens nothing is banned yet: they are returned, to draw among them alone.
        """
        banned, grammar = point.banned(self.eos_token_ids), point.seq.grammar
        allowed = None if grammar is None else grammar.allowed(point.path)
        if allowed is not None:
            few = few_allowed(allowed, banned)
            if few is None:
                forbid(row, allowed, banned)
            return few
        if banned:
            row[list(banned)] = float("-inf")
        return None


def _perturb(row: Tensor, point: SamplePoint, token_hashes: Tensor) -> None:
    """Temperature, truncation and noise, so that the argmax is the draw; greedy requests stay as they are. row: logits
    of the tokens whose hashes are given."""
    params = point.seq.request.sampling
    if params.temperature >= GREEDY_BELOW:
        row.div_(params.temperature)
        truncate(row, params)
        row.sub_(exponential_noise(params.seed, point.num_output, token_hashes).log_())


def prompt_logprobs(logits: Tensor, token_ids: Rows[int], num_top: int) -> tuple[TokenLogprob, ...]:
    """Logprobs of given tokens, one per row, with the `num_top` likeliest. logits: [num_rows, vocab]."""
    logprobs = torch.log_softmax(logits, dim=-1)
    return tuple(_token_logprob(row, token_id, num_top) for row, token_id in zip(logprobs, token_ids, strict=True))


def _sampled_logprobs(logits: Tensor, points: Rows[SamplePoint]) -> list[Tensor | None] | None:
    """Log of the raw distribution for the rows that want it; None when none does."""
    wanted = [i for i, point in enumerate(points) if point.seq.request.sampling.logprobs is not None]
    if not wanted:
        return None
    rows: list[Tensor | None] = [None] * len(points)
    for i, row in zip(wanted, torch.log_softmax(logits[wanted], dim=-1), strict=True):
        rows[i] = row
    return rows


def _token_logprob(logprobs: Tensor, token_id: int, num_top: int) -> TokenLogprob:
    values, ids = logprobs.topk(num_top)
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token_id, logprobs[token_id].item(), top)


def _penalise(row: Tensor, point: SamplePoint, params: SamplingParams) -> None:
    """Repetition (CTRL, over prompt and output): divides positive logits, multiplies negative ones. Presence and
    frequency (OpenAI, over the output): subtract once and per occurrence."""
    if params.repetition_penalty != 1.0:
        seen = torch.from_numpy(np.unique(np.asarray(point.tokens)).astype(np.int64)).to(row.device)
        logits = row[seen]
        penalty = params.repetition_penalty
        row[seen] = torch.where(logits > 0, logits / penalty, logits * penalty)
    if (params.presence_penalty or params.frequency_penalty) and point.num_output:
        output = np.asarray(point.tokens[point.seq.num_prompt :])
        ids, counts = np.unique(output, return_counts=True)
        cost = params.presence_penalty + params.frequency_penalty * counts
        row[torch.from_numpy(ids.astype(np.int64)).to(row.device)] -= torch.from_numpy(cost).to(row)


def truncate(row: Tensor, params: SamplingParams) -> None:
    """Bans all tokens outside min_p, then top_k, then top_p of what is left. Ties at a limit stay in."""
    if params.min_p > 0.0:
        row.masked_fill_(row < row.max() + np.log(params.min_p), float("-inf"))
    if params.top_k is not None and 0 < params.top_k < row.shape[0]:
        row.masked_fill_(row < row.topk(params.top_k).values[-1], float("-inf"))
    if params.top_p < 1.0:
        row.masked_fill_(row < _top_p_limit(row, params.top_p), float("-inf"))


def _top_p_limit(row: Tensor, top_p: float) -> Tensor:
    """The smallest logit of the likeliest tokens whose probabilities reach `top_p` together: at least one token, so
    that 0 keeps the likeliest alone."""
    log_total = torch.logsumexp(row, dim=0)
    for count in (*_TOP_P_CANDIDATES, row.shape[0]):
        values = row.topk(min(count, row.shape[0])).values
        reached = torch.cumsum(torch.exp(values - log_total), dim=0) >= top_p
        if reached[-1] or count >= row.shape[0]:
            break
    # Rounding can keep the sum of everything just below top_p: then everything stays.
    index = int(reached.int().argmax()) if bool(reached.any()) else values.shape[0] - 1
    return values[index]
