"""Reference chains with one plausible mistake each: what the tests of the law must tell from the truth."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from power_kernels.reference import Answer, ReferenceChain, leave_probability, token_quantities


class NoLengthRatio(ReferenceChain):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.length_term = np.zeros_like(self.length_term)


class InvertedLengthRatio(ReferenceChain):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.length_term = -self.length_term


class ProposalSumMissesFirstSuffixWeight(ReferenceChain):
    def rejects(self, answer, proposal, closed, theta, cap):
        pairs = zip(answer.tokens, proposal.tokens, strict=False)
        first = next(t for t, (x, y) in enumerate(pairs) if x != y)
        weight = proposal.cumw[first + 1] - proposal.cumw[first]
        cumw = (*proposal.cumw[:-1], proposal.cumw[-1] - weight)
        return super().rejects(answer, replace(proposal, cumw=cumw), closed, theta, cap)


class CurrentSumMissesLastWeight(ReferenceChain):
    def threshold(self, answer, u):
        return super().threshold(answer, u) - answer.cumw[-1] + answer.cumw[-2]


class NoExclusion(ReferenceChain):
    """The kept token may be drawn again at the divergence, and then counts as kept."""

    def draw(self, answer, serial, exclude=-1):
        return super().draw(answer, serial)


class WeightOfExcludedRow(ReferenceChain):
    def draw(self, answer, serial, exclude=-1):
        drawn = super().draw(answer, serial, exclude)
        row = self.excluded_row(answer, drawn, exclude)
        if row is None:
            return drawn
        h = self.cut_weight(self.next_logits(answer.tokens))
        return answer.append(drawn.tokens[-1], drawn.logq[-1], self.stored(row.weight), h)

    def excluded_row(self, answer, drawn, exclude):
        if exclude < 0 or drawn.tokens[-1] == exclude:
            return None
        z = np.array(self.next_logits(answer.tokens))
        z[exclude] = -np.inf
        return token_quantities(z, drawn.tokens[-1], self.alpha, self.beta)


class LogqOfExcludedRow(WeightOfExcludedRow):
    """Harmless to the step that draws it; later steps keep the token too often."""

    def draw(self, answer, serial, exclude=-1):
        drawn = ReferenceChain.draw(self, answer, serial, exclude)
        row = self.excluded_row(answer, drawn, exclude)
        if row is None:
            return drawn
        h = self.cut_weight(self.next_logits(answer.tokens))
        return answer.append(drawn.tokens[-1], self.stored(row.logq), drawn.cumw[-1] - answer.cumw[-1], h)


class EarlyRejectionWithoutLengths(ReferenceChain):
    """Compares running sums alone while the proposal is open; a shorter answer's log n/n' comes too late."""

    def rejects(self, answer, proposal, closed, theta, cap):
        if closed:
            return super().rejects(answer, proposal, closed, theta, cap)
        return proposal.cumw[-1] < theta - self.length_term[len(answer)]


class EarlyRejectionWithoutCurrentLength(ReferenceChain):
    """theta = W + log u while the proposal is open, F + log u at its end."""

    def rejects(self, answer, proposal, closed, theta, cap):
        if closed:
            return super().rejects(answer, proposal, closed, theta, cap)
        return super().rejects(answer, proposal, closed, theta - self.length_term[len(answer)], cap)


class EarlyRejectionAtHorizonLength(ReferenceChain):
    """Assumes that an open proposal will run to the horizon."""

    def rejects(self, answer, proposal, closed, theta, cap):
        if closed:
            return super().rejects(answer, proposal, closed, theta, cap)
        return proposal.cumw[-1] + self.length_term[self.law.max_new_tokens] < theta


class SerialsRestartEachStage(ReferenceChain):
    def steps(self, answer, horizon, count):
        self.serial = 0
        return super().steps(answer, horizon, count)


class FirstProposalSharesExtensionSerial(ReferenceChain):
    def propose(self, answer, horizon, serial):
        return super().propose(answer, horizon, serial - 1)


class ProposalCappedAtCurrentLength(ReferenceChain):
    def propose(self, answer, horizon, serial):
        return super().propose(answer, len(answer), serial)


class KeepTestUsesP(ReferenceChain):
    def walk(self, answer, start, serial):
        for t in range(start, len(answer)):
            z = self.next_logits(answer.tokens[:t])
            row = token_quantities(z, answer.tokens[t], self.alpha, self.beta)
            if self.position_uniforms(t, serial)[1] < leave_probability(row.logp):
                return t
        return len(answer)


class AcceptanceSharesCutUniform(ReferenceChain):
    def step_uniforms(self, serial):
        cut, _ = super().step_uniforms(serial)
        return cut, cut


class TokenSharesKeepUniform(ReferenceChain):
    def position_uniforms(self, position, serial):
        token, _ = super().position_uniforms(position, serial)
        return token, token


class CutMissesLastPosition(ReferenceChain):
    def cut(self, answer, u):
        return int(u * max(len(answer) - 1, 1))


# ---- divergence cuts (DESIGN 3.6)


class NoZRatio(ReferenceChain):
    def log_z(self, answer):
        return 0.0


class InvertedZRatio(ReferenceChain):
    def log_z(self, answer):
        return -super().log_z(answer)


class LengthForZ(ReferenceChain):
    """The uniform cut's ratio."""

    def log_z(self, answer):
        return math.log(len(answer))


class ZWithoutEntropy(ReferenceChain):
    """The cut weighs by entropy, the ratio does not."""

    def log_z(self, answer):
        return math.log(sum(leave_probability(value) for value in answer.logq))


class CutWithoutEntropy(ReferenceChain):
    """The ratio weighs by entropy, the cut does not."""

    def cut(self, answer, u):
        plain = Answer()
        for token, logq in zip(answer.tokens, answer.logq, strict=True):
            plain = plain.append(token, logq, 0.0)
        return super().cut(plain, u)


class ZMissesLastToken(ReferenceChain):
    def log_z(self, answer):
        return math.log(answer.cumz[-2] or answer.cumz[-1])


class ZMissesFirstToken(ReferenceChain):
    def log_z(self, answer):
        return math.log(answer.cumz[-1] - answer.cumz[1] or answer.cumz[-1])


class EntropyOfNextRow(ReferenceChain):
    """h of x[:t+1] in place of x[:t]: it depends on the token that may be left."""

    def with_token(self, answer, z, token):
        plain = super().with_token(answer, z, token)
        if token in self.eos or len(plain) == self.law.max_new_tokens:
            return plain
        h = self.cut_weight(self.next_logits(plain.tokens))
        return answer.append(token, plain.logq[-1], plain.cumw[-1] - answer.cumw[-1], h)


class CutOnePositionLate(ReferenceChain):
    def cut(self, answer, u):
        return min(super().cut(answer, u) + 1, len(answer) - 1)


class CutOnePositionEarly(ReferenceChain):
    def cut(self, answer, u):
        return max(super().cut(answer, u) - 1, 0)


class UniformDivergence(ReferenceChain):
    """Leaves anywhere with one probability, with the ratio of the masses."""

    def cut(self, answer, u):
        return min(int(u * len(answer)), len(answer) - 1)


class WalkAfterDivergence(ReferenceChain):
    """The drawn divergence taken for the beginning of a walk, as under the uniform cut."""

    def leave(self, answer, start, serial):
        return self.walk(answer, start, serial)


class EarlyRejectionWithLookahead(ReferenceChain):
    """log(Z + 1) while open, as if the next token had to add 1 to Z as it does to n."""

    def rejects(self, answer, proposal, closed, theta, cap):
        if closed:
            return super().rejects(answer, proposal, closed, theta, cap)
        return proposal.cumw[-1] - math.log(proposal.cumz[-1] + 1.0) < theta


class EarlyRejectionWithoutCurrentZ(ReferenceChain):
    """theta = W + log u while the proposal is open, F + log u at its end."""

    def rejects(self, answer, proposal, closed, theta, cap):
        if closed:
            return super().rejects(answer, proposal, closed, theta, cap)
        return super().rejects(answer, proposal, closed, theta + self.log_z(answer), cap)


# ---- stop strings and the length term (DESIGN 3.1)


class BonusMissesClosingToken(ReferenceChain):
    """The token that closes an answer before its horizon is not counted."""

    def log_f(self, answer, length=None):
        return super().log_f(answer, length) - self.law.length_bonus * self.ends(answer)


class EarlyRejectionAtNextTokenOnly(ReferenceChain):
    """The bound of no length term, which can grow with lambda > 0."""

    def most_log_f(self, proposal, cap):
        return self.log_f(proposal, len(proposal) + 1 if self.can_end_early else cap)


class AutomatonNotRewound(ReferenceChain):
    """A proposal goes on from the automaton's state at the end of the answer that it leaves."""

    def propose(self, answer, horizon, serial):
        states = (max(answer.stop_state[-1], 0),) * len(answer.stop_state)
        stale = replace(answer, stop_state=states)
        proposal = super().propose(stale, horizon, serial)
        return answer if proposal is stale else proposal


class StopMatchedInPrompt(ReferenceChain):
    """The automaton has read the prompt, which ends with token 0."""

    def next_stop_state(self, answer, token):
        before = answer.stop_state[-1] if len(answer) else self.stop_next[0, 0]
        return int(self.stop_next[before, token])


# Not faults: the law is the same.


class EarlyRejectionWithoutProposalLength(ReferenceChain):
    """No log m while open: the same test with log 1, which rejects less."""

    def rejects(self, answer, proposal, closed, theta, cap):
        if closed:
            return super().rejects(answer, proposal, closed, theta, cap)
        return self.law.early_rejection and proposal.cumw[-1] < theta


class LogOfUniform(ReferenceChain):
    """u and 1 - u have one law; log(u) is wrong only because u can be 0."""

    def threshold(self, answer, u):
        return self.log_f(answer) + math.log(u)


class EarlyRejectionOneTokenLate(ReferenceChain):
    """log m instead of log (m + 1) while open. m <= n', so it rejects nothing that the last test accepts."""

    def rejects(self, answer, proposal, closed, theta, cap):
        if closed:
            return super().rejects(answer, proposal, closed, theta, cap)
        return self.law.early_rejection and proposal.cumw[-1] + self.length_term[len(proposal)] < theta


class TwiceTheWeight(ReferenceChain):
    """Z is a ratio's business: twice h is h."""

    def cut_weight(self, z):
        return 2.0 * super().cut_weight(z)


HARMLESS = (EarlyRejectionWithoutProposalLength, LogOfUniform, EarlyRejectionOneTokenLate)
HARMLESS_TO_DIVERGENCE = (TwiceTheWeight, LogOfUniform)
